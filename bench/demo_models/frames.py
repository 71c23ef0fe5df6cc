"""Draw frames of the demo world as the captioner gets them, with their facts, for training and evaluation.

The world's grammar and renderer make the pictures; a frame passes through video coding, scaling and JPEG as in the cut
stage.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from PIL import Image

from pipeline.demo.grammar import COLOURS, SHAPES, SIZES, TEXTURES, Scene, facts, sample_scene
from pipeline.demo.render import locate, render_frame

# width x height of the pictures; common aspect ratios occur more often
FRAME_SIZES = ((426, 240), (480, 270), (640, 360), (320, 240), (320, 240), (480, 360), (240, 426), (320, 320))
SHORT_SIDE = 256  # the cut stage's default
SCENES_PER_BACKGROUND = 5  # drawing a background costs more than the rest of a frame


@dataclass(frozen=True)
class DemoFrame:
    """A frame with its scene, as the captioner gets it."""

    scene: Scene
    jpeg: bytes
    boxes: tuple[tuple[float, float, float, float], ...]  # x0, y0, x1, y1 of every object, fractions of the frame

    def picture(self) -> Image.Image:
        return Image.open(io.BytesIO(self.jpeg)).convert("RGB")


def demo_frames(
    seed: int, pair_fraction: float = 0.3, per_background: int = SCENES_PER_BACKGROUND
) -> Iterator[DemoFrame]:
    """Yield endless frames of random scenes, a function of the seed; seeds below 1,000 are for training."""
    rng = np.random.default_rng(seed)
    while True:
        background = sample_scene(rng).background
        width, height = FRAME_SIZES[rng.integers(len(FRAME_SIZES))]
        for _ in range(per_background):
            scene = replace(sample_scene(rng, pair_fraction=pair_fraction), background=background)
            yield _demo_frame(scene, float(rng.uniform(0, scene.duration_s)), width, height, rng)


def _demo_frame(scene: Scene, t_s: float, width: int, height: int, rng: np.random.Generator) -> DemoFrame:
    """Draw a frame and pass it through video coding, scaling and JPEG."""
    pixels = _video_coded(render_frame(scene, t_s, width, height), crf=int(rng.integers(18, 30)))
    scale = SHORT_SIDE / min(width, height)
    picture = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(rng.integers(80, 96)))
    boxes = []
    for thing in scene.objects:
        x, y, radius = locate(thing, t_s, width, height)
        boxes.append(((x - radius) / width, (y - radius) / height, (x + radius) / width, (y + radius) / height))
    return DemoFrame(scene, file.getvalue(), tuple(boxes))


def _video_coded(pixels: np.ndarray, crf: int) -> np.ndarray:
    """Return RGB pixels after H.264 coding with 4:2:0 chroma."""
    import av

    height, width = pixels.shape[:2]
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.time_base = Fraction(1, 25)
    encoder.options = {"preset": "ultrafast", "tune": "zerolatency", "crf": str(crf), "threads": "1"}
    packets = [*encoder.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")), *encoder.encode(None)]
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1
    frames = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    return frames[0].to_ndarray(format="rgb24")


_OBJECT = re.compile(
    rf"(?:({'|'.join(SIZES)}) )?(?:({'|'.join(TEXTURES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"
)
_BACKGROUND = re.compile(r"(\w+) (\w+) background")


def said(text: str) -> dict:
    """Parse a caption to the form of `grammar.facts`, without motion; missing parts are None."""
    background = _BACKGROUND.search(text)
    texture, colour = background.groups() if background else (None, None)
    things = [
        {"size": size or None, "texture": texture or "solid", "colour": colour, "shape": shape}
        for size, texture, colour, shape in _OBJECT.findall(text)
    ]
    return {"background": {"texture": texture, "colour": colour}, "objects": things}


def correct(text: str, scene: Scene) -> dict[str, bool]:
    """Return per property whether the caption is exactly true, for every object and no other."""
    claim, truth = said(text), facts(scene)
    result = {
        name: sorted(str(thing[name]) for thing in claim["objects"])
        == sorted(thing[name] for thing in truth["objects"])
        for name in ("colour", "shape", "size", "texture")
    }
    result["background colour"] = claim["background"]["colour"] == truth["background"]["colour"]
    result["background texture"] = claim["background"]["texture"] == truth["background"]["texture"]
    result["everything"] = all(result.values()) and _objects(claim) == _objects(truth)
    return result


def _objects(statement: dict) -> list[tuple]:
    names = ("size", "texture", "colour", "shape")
    return sorted(tuple(str(thing[name]) for name in names) for thing in statement["objects"])
