"""Check that the same pictures always become the same bytes, with x264's AVX-512 code and without it.

    python -m bench.clip_bytes [--encodes 1000] [--encoding fastdecode]

informational  number of encodes of one clip whose bytes differ from those of most

The clip is encoded many times while memory is allocated and freed between its frames, because x264 reads such memory by
mistake. Not every clip shows it: try other seeds. On a processor without AVX-512 both rows are the same code.
"""

import argparse
import hashlib
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np

from clipmill.media.encode import ENCODINGS, ClipEncoder, Encoding, cpu_flags
from pipeline.demo.grammar import sample_scene
from pipeline.demo.render import render_frame

SIZE, NUM_FRAMES, FPS = (170, 96), 26, Fraction(3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encodes", type=int, default=1000)
    parser.add_argument(
        "--encoding", default="fastdecode", choices=[n for n, e in ENCODINGS.items() if "264" in e.codec]
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ours = ENCODINGS[arguments.encoding]
    options = {name: value for name, value in ours.options.items() if name != "x264-params"}
    frames = pictures(arguments.seed)
    print(f"{arguments.encodes} encodes of one clip, {SIZE[0]}x{SIZE[1]}; AVX-512: {'avx512f' in cpu_flags()}")
    for way, encoding in (("as clips are encoded", ours), ("as x264 chooses", replace(ours, options=options))):
        counts = Counter(encoded(frames, encoding, random.Random(n)) for n in range(arguments.encodes))
        print(f"{way}: {arguments.encodes - max(counts.values())} encodes differ from most")


def pictures(seed: int) -> list[np.ndarray]:
    """Draw a scene of the demo world as yuv420p frames."""
    scene = sample_scene(np.random.default_rng(seed))
    frames = (render_frame(scene, float(n / FPS), *SIZE) for n in range(NUM_FRAMES))
    return [av.VideoFrame.from_ndarray(frame, format="rgb24").to_ndarray(format="yuv420p") for frame in frames]


def encoded(frames: list[np.ndarray], encoding: Encoding, rng: random.Random) -> str:
    """Encode the frames with random allocations between them; return the hash of the clip."""
    encoder, held = ClipEncoder(encoding, SIZE, FPS, len(frames), 0.0), []
    noise = np.random.default_rng(rng.randrange(1 << 30))
    for n, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame, format="yuv420p")
        encoder.add(picture, float(n / FPS), float((n + 1) / FPS))
        held.append(noise.integers(0, 255, rng.randrange(1, 200_000), dtype=np.uint8))
        if len(held) > 8:
            held.pop(rng.randrange(8))
    return hashlib.sha256(encoder.finish()).hexdigest()


if __name__ == "__main__":
    main()
