"""Clips of the demo world for studies: drawn straight to small pictures, without files of video in between.

Shape letters: N clips, T frames, S pixels a side.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.config import digest
from pipeline.demo import grammar, render
from pipeline.demo.grammar import SINGLE_RADII, Scene
from training.studies.keep import kept

# A clip of the first played backwards is one of the second, and has the same frames: only their order tells which.
REVERSED = {"left": "right", "up": "down", "growing": "shrinking"}
DIRECTIONS = tuple(motion for pair in REVERSED.items() for motion in pair)


def frames_of(scenes: Sequence[Scene], num_frames: int, image_size: int, seconds: float, cache: Path) -> np.ndarray:
    """uint8 [N, T, 3, S, S], mapped from `cache`: frames evenly over the first `seconds` of each scene."""
    name = digest([[asdict(scene) for scene in scenes], num_frames, image_size, seconds, _drawn_by()])
    path = kept(cache / f"frames-{name}.npy", lambda path: _draw(path, scenes, num_frames, image_size, seconds))
    return np.load(path, mmap_mode="r")


def _draw(path: Path, scenes: Sequence[Scene], num_frames: int, image_size: int, seconds: float) -> None:
    times_s = (np.arange(num_frames) + 0.5) * (seconds / num_frames)
    shape = (len(scenes), num_frames, 3, image_size, image_size)
    pixels = np.empty(shape, np.uint8)
    for n, scene in enumerate(scenes):
        for t, time_s in enumerate(times_s):
            pixels[n, t] = render.render_frame(scene, float(time_s), image_size, image_size).transpose(2, 0, 1)
    with open(path, "wb") as file:
        np.save(file, pixels)


@lru_cache(maxsize=1)
def _drawn_by() -> str:
    return digest(Path(render.__file__).read_text())


def families(num: int, seed: Sequence[int]) -> list[tuple[Scene, ...]]:
    """Per family one scene for each of `REVERSED`'s keys: same looks, place and pace, so that the motion is all that
    differs. While there are enough of them, no two families have the same colour and shape.
    """
    rng = np.random.default_rng(seed)
    names = [(colour, shape) for colour in grammar.COLOURS for shape in grammar.SHAPES]
    order = [int(i) for _ in range(-(-num // len(names))) for i in rng.permutation(len(names))]
    return [_family(rng, *names[i]) for i in order[:num]]


def _family(rng: np.random.Generator, colour: str, shape: str) -> tuple[Scene, ...]:
    scene = grammar.sample_scene(rng, 6.0, lambda combination: combination[2] == "left", pair_fraction=0.0)
    thing = replace(scene.objects[0], colour=colour, shape=shape)
    low, high = SINGLE_RADII[thing.size]
    radii = {"growing": (low, high)}
    scenes = []
    for motion in REVERSED:
        radius, max_radius = radii.get(motion, (thing.radius, thing.max_radius))
        phase, lane = rng.random(2)
        changed = {"motion": motion, "radius": radius, "max_radius": max_radius, "phase": float(phase)}
        scenes.append(replace(scene, objects=(replace(thing, **changed, lane=float(0.1 + 0.8 * lane)),)))
    return tuple(scenes)


def with_reversed(scenes: Sequence[Scene], pixels_NT3SS: np.ndarray) -> tuple[list[Scene], np.ndarray]:
    """Every clip, and behind it the same played backwards: [2 N, T, 3, S, S]."""
    both = np.stack([pixels_NT3SS, pixels_NT3SS[:, ::-1]], axis=1)
    told = [one for scene in scenes for one in (scene, _backwards(scene))]
    return told, both.reshape(-1, *pixels_NT3SS.shape[1:])


def _backwards(scene: Scene) -> Scene:
    """As texts tell it; its phase is not that of the clip."""
    (thing,) = scene.objects
    return replace(scene, objects=(replace(thing, motion=REVERSED[thing.motion]),))
