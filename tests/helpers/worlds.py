"""Read a demo video back: its upright pictures, and the position of colours in them."""

from pathlib import Path

import numpy as np

from clipmill.media.probe import open_media, orientation_of
from pipeline.demo.grammar import Background, Scene, Thing
from pipeline.demo.render import COLOUR_RGB

NEAR = 48.0  # RGB distance within which a decoded pixel counts as a palette colour


def decode(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return seconds from the first frame, and upright RGB pictures."""
    times, pictures = [], []
    with open_media(path) as container:
        for frame in container.decode(video=0):
            times.append(float(frame.pts * frame.time_base))
            pictures.append(orientation_of(frame).upright(frame.to_ndarray(format="rgb24")))
    return np.array(times) - times[0], pictures


def mask_of(picture: np.ndarray, colour: str) -> np.ndarray:
    """Return the mask of pixels that are close to this palette colour and closer than to any other."""
    palette = np.array(list(COLOUR_RGB.values()), np.float32)
    distance = np.linalg.norm(picture[:, :, None].astype(np.float32) - palette, axis=-1)
    nearest = distance.argmin(axis=-1) == list(COLOUR_RGB).index(colour)
    return nearest & (distance.min(axis=-1) < NEAR)


def box(picture: np.ndarray, x: float, y: float, radius: float) -> np.ndarray:
    """Return the part of the picture around a point."""
    x0, y0 = max(0, round(x - radius)), max(0, round(y - radius))
    return picture[y0 : round(y + radius) + 1, x0 : round(x + radius) + 1]


def main_colour(part: np.ndarray) -> str:
    """Return the palette colour of most pixels of the picture part."""
    return max(COLOUR_RGB, key=lambda colour: int(mask_of(part, colour).sum()))


def scene_from_dict(data: dict) -> Scene:
    """Restore a scene from `dataclasses.asdict`, also after a round trip through JSON."""
    objects = tuple(Thing(**{**thing, "cell": tuple(thing["cell"])}) for thing in data["objects"])
    return Scene(data["duration_s"], Background(**data["background"]), objects)
