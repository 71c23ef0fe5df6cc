"""Find the encoding of clips that is cheapest to train from.

    python -m bench.clip_encoding [--write docs/clip_encoding.md]

For every preset of `clipmill.media.encode`, and for x264 variants of them: size of a clip of 34 frames at short side
256, CPU milliseconds to write it and to read 12 evenly spread frames of it as 224x224 RGB, and the loss of quality. One
process and one thread; the encodings alternate, and the minimum of the rounds counts, because other work on the machine
only adds time. Gates on the default preset: its size, its reading cost relative to plain x264 (`small`), its bytes.

Reading: "naive" decodes from the first frame to the last wanted one, as any library does; "planned" gives the decoder
only the packets that a wanted frame depends on, as `clipmill.media.decode` does. JPEG frames are read one by one.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from bench.media import DEFAULT_DIR, DURATION_S, benchmark_set
from clipmill.media.encode import ENCODINGS, ClipEncoder, Encoding, JpegSequence, jpeg_frames, x264
from pipeline.stages.cut.cut import CutSettings
from pipeline.stages.cut.picture import PictureMaker

NUM_FRAMES, NUM_READ, SIDE = 34, 12, 224
MOST_KB, MOST_OF_PLAIN = 450, 0.6
DEFAULT = CutSettings().encoding
WANTED = np.linspace(0, NUM_FRAMES - 1, NUM_READ).astype(int).tolist()

VARIANTS: dict[str, Encoding] = {
    "x264 medium": x264(preset="medium", crf="23"),
    "small without B-frames": x264(preset="veryfast", crf="23", bf="0"),
    "fastdecode with B-frames": x264(preset="veryfast", crf="24", tune="fastdecode"),
    "fastdecode, keyframe every 6": x264(preset="veryfast", crf="24", tune="fastdecode", bf="0", g="6"),
    "fastdecode crf 23": x264(preset="veryfast", crf="23", tune="fastdecode", bf="0"),
    "fastdecode crf 26": x264(preset="veryfast", crf="26", tune="fastdecode", bf="0"),
    "ultrafast crf 28": x264(preset="ultrafast", crf="28", bf="0"),
}


@dataclass
class Tally:
    """Figures of an encoding."""

    num_bytes: int = 0
    write_ms: list[float] = field(default_factory=list)  # of each round, per clip
    naive_ms: list[float] = field(default_factory=list)
    planned_ms: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    same_bytes: bool = True


def clips_of(videos: list[dict], count: int) -> list[list[av.VideoFrame]]:
    """Make `count` clips of 34 scaled pictures at 3 fps, spread over the videos."""
    clips = []
    for i, video in enumerate(videos):
        maker, pictures = PictureMaker(Fraction(1), 256), []
        share = (count + i) // len(videos)
        with av.open(video["path"]) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if len(pictures) == share * NUM_FRAMES:
                    break
                if number % 10 == 0:
                    pictures.append(maker(frame))
        clips += [pictures[k : k + NUM_FRAMES] for k in range(0, len(pictures), NUM_FRAMES)]
    return clips


def encoded(encoding: Encoding, pictures: list[av.VideoFrame]) -> bytes:
    """Encode pictures as a clip."""
    if encoding.codec == "jpeg-frames":
        encoder = JpegSequence(CutSettings().jpeg_quality)
    else:
        size = (pictures[0].width, pictures[0].height)
        encoder = ClipEncoder(encoding, size, Fraction(3), len(pictures), 0.0)
    for picture in pictures:
        encoder.add(picture, 0.0, 0.0)
    return encoder.finish()


def read_naive(data: bytes) -> np.ndarray:
    """Return uint8 [12, 224, 224, 3], decoding every frame up to the last wanted one."""
    return _read(data, needed=lambda packets: range(len(packets)))


def read_planned(data: bytes) -> np.ndarray:
    """Return the same pictures, decoding only from each wanted frame's keyframe on."""
    return _read(data, needed=_dependencies)


def _read(data: bytes, needed: Callable[[list], range | list[int]]) -> np.ndarray:
    """Decode the needed packets; return the wanted frames."""
    out = np.empty((NUM_READ, SIDE, SIDE, 3), np.uint8)
    scaler, found = VideoReformatter(), 0
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        decoder = stream.codec_context
        decoder.thread_count = 1
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = sorted(packet.pts for packet in packets)
        wanted = {shown[k] for k in WANTED}
        for frame in _frames(decoder, packets, list(needed(packets))):
            if frame.pts in wanted:
                view = scaler.reformat(frame, SIDE, SIDE, "rgb24", interpolation=Interpolation.BILINEAR, threads=1)
                out[found] = view.to_ndarray()
                found += 1
    assert found == NUM_READ, f"{found} of {NUM_READ} frames were decoded"
    return out


def _frames(decoder, packets: list, needed: list[int]):
    """Decode the needed packets; drain and flush where some are left out, or two keyframes may become one picture."""
    last = -1
    for i in needed:
        if i != last + 1 and last >= 0:
            yield from decoder.decode(None)
            decoder.flush_buffers()
        last = i
        yield from decoder.decode(packets[i])
    yield from decoder.decode(None)


def _dependencies(packets: list) -> list[int]:
    """Return the packets from the keyframe before each wanted frame to it; all of them where frames are reordered."""
    if any(a.pts > b.pts for a, b in zip(packets, packets[1:], strict=False)):
        return list(range(len(packets)))
    chosen: set[int] = set()
    for k in WANTED:
        start = max(i for i in range(k + 1) if packets[i].is_keyframe)
        chosen.update(range(start, k + 1))
    return sorted(chosen)


def read_jpegs(data: bytes) -> np.ndarray:
    """Return uint8 [12, 224, 224, 3] of a clip of JPEG frames."""
    files = jpeg_frames(data)
    views = [cv2.imdecode(np.frombuffer(files[k], np.uint8), cv2.IMREAD_COLOR) for k in WANTED]
    return np.stack([cv2.cvtColor(cv2.resize(view, (SIDE, SIDE)), cv2.COLOR_BGR2RGB) for view in views])


def psnr_of(data: bytes, pictures: list[av.VideoFrame], encoding: Encoding) -> float:
    """Return the luma peak signal-to-noise ratio in decibels, on limited range."""
    if encoding.codec == "jpeg-frames" or encoding.pix_fmt != "yuv420p":
        return float("nan")
    with av.open(io.BytesIO(data)) as container:
        errors = [
            float(np.mean((_luma(a).astype(np.float32) - _luma(b)) ** 2))
            for a, b in zip(container.decode(video=0), pictures, strict=True)
        ]
    return 10 * float(np.log10(255**2 / np.mean(errors)))


def _luma(frame: av.VideoFrame) -> np.ndarray:
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width]


def timed_ms(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return 1000 * (time.process_time() - begun)


def measure(clips: list[list[av.VideoFrame]], rounds: int) -> dict[str, Tally]:
    """Measure all encodings, alternating them by round."""
    encodings = ENCODINGS | VARIANTS
    tallies = {name: Tally() for name in encodings}
    kept: dict[str, list[bytes]] = {}
    for turn in range(rounds):
        for name, encoding in encodings.items():
            tally, files = tallies[name], []
            write = timed_ms(lambda e=encoding, f=files: f.extend(encoded(e, pictures) for pictures in clips))
            tally.write_ms.append(write / len(clips))
            is_jpeg = encoding.codec == "jpeg-frames"
            naive = timed_ms(lambda f=files, j=is_jpeg: [(read_jpegs if j else read_naive)(data) for data in f])
            planned = timed_ms(lambda f=files, j=is_jpeg: [(read_jpegs if j else read_planned)(data) for data in f])
            tally.naive_ms.append(naive / len(clips))
            tally.planned_ms.append(planned / len(clips))
            if turn == 0:
                tally.num_bytes = sum(map(len, files)) // len(clips)
                tally.psnr = [psnr_of(data, pics, encoding) for data, pics in zip(files, clips, strict=True)]
            tally.same_bytes &= kept.setdefault(name, files) == files
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| encoding | KB / clip | write, ms | 12 frames, ms: naive | planned | PSNR-Y, dB | same bytes each time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, tally in tallies.items():
        label = f"**{name}** (default)" if name == DEFAULT else f"**{name}**" if name in ENCODINGS else name
        psnr = "-" if np.isnan(tally.psnr[0]) else f"{np.mean(tally.psnr):.1f}"
        times = " | ".join(f"{min(ms):.1f}" for ms in (tally.write_ms, tally.naive_ms, tally.planned_ms))
        same = "yes" if tally.same_bytes else "no"
        lines.append(f"| {label} | {tally.num_bytes / 1000:.0f} | {times} | {psnr} | {same} |")
    return "\n".join(lines)


def broken(tally: Tally, plain: Tally) -> list[str]:
    """Print the gates; return those that failed."""
    kilobytes, ratio = tally.num_bytes / 1000, min(tally.planned_ms) / min(plain.planned_ms)
    checks = {
        f"{kilobytes:.0f} KB a clip, at most {MOST_KB}": kilobytes <= MOST_KB,
        f"{ratio:.2f} of plain x264's time for 12 frames, at most {MOST_OF_PLAIN}": ratio <= MOST_OF_PLAIN,
        "the same bytes each time": tally.same_bytes,
    }
    for text, holds in checks.items():
        print(f"gate ({DEFAULT}): {text}: {'passed' if holds else 'FAILED'}")
    return [text for text, holds in checks.items() if not holds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=22, help="number of clips of 34 frames")
    parser.add_argument("--folder", type=Path, default=DEFAULT_DIR, help="where the benchmark set is kept")
    parser.add_argument("--footage", type=Path, help="a folder of real videos to make the set from")
    parser.add_argument("--duration-s", type=float, default=DURATION_S, help="length of each of its videos")
    parser.add_argument("--write", type=Path, help="write the table into this document, between its marks")
    options = parser.parse_args()
    videos = benchmark_set(options.folder, options.footage, options.duration_s)
    tallies = measure(clips_of(videos, options.clips), options.rounds)
    text = table(tallies)
    print(text)
    if options.write:
        _put_between_marks(options.write, text)
    if broken(tallies[DEFAULT], tallies["small"]):
        sys.exit(1)


def _put_between_marks(document: Path, text: str) -> None:
    """Replace the table in a document."""
    before, _, rest = document.read_text().partition("<!-- table -->")
    _, mark, after = rest.partition("<!-- end of table -->")
    if not mark:
        sys.exit(f"{document} has no <!-- table --> … <!-- end of table --> for the table; add these two lines")
    document.write_text(f"{before}<!-- table -->\n{text}\n{mark}{after}")


if __name__ == "__main__":
    main()
