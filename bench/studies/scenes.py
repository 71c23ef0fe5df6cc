"""Draw clips of the demo world for studies as small pictures, without encoding them as video.

Shape letters: N clips, T frames, S pixels a side.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from bench.studies.keep import kept
from clipmill.base.settings import digest
from pipeline.demo import grammar, render
from pipeline.demo.grammar import Scene


def frames_of(scenes: Sequence[Scene], num_frames: int, image_size: int, seconds: float, cache: Path) -> np.ndarray:
    """Return uint8 [N, T, 3, S, S], mapped from `cache`: frames evenly over the first `seconds` of each scene."""
    name = digest([[asdict(scene) for scene in scenes], num_frames, image_size, seconds, _drawn_by()])
    path = kept(cache / f"frames-{name}.npy", lambda path: _draw(path, scenes, num_frames, image_size, seconds))
    return np.load(path, mmap_mode="r")


def _draw(path: Path, scenes: Sequence[Scene], num_frames: int, image_size: int, seconds: float) -> None:
    """Draw all frames and write them as an array."""
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


def single_scenes(num: int, seed: Sequence[int], pair_fraction: float = 0.3) -> list[Scene]:
    """Sample scenes as in the world, a share `pair_fraction` with two objects."""
    rng = np.random.default_rng(seed)
    return [grammar.sample_scene(rng, 6.0, pair_fraction=pair_fraction) for _ in range(num)]


def alike_scenes(num: int, seed: Sequence[int]) -> list[Scene]:
    """Sample a hard gallery: scenes on the same background, no two with the same description."""
    rng = np.random.default_rng(seed)
    background = grammar.sample_scene(rng).background
    scenes: dict[str, Scene] = {}
    while len(scenes) < num:
        scene = replace(grammar.sample_scene(rng, 6.0), background=background)
        scenes.setdefault(grammar.still_text(scene), scene)
    return list(scenes.values())


def growing_scenes(num: int, seed: Sequence[int], seconds: float) -> list[Scene]:
    """Sample scenes of one object that grows, without starting again in the first `seconds`."""
    rng = np.random.default_rng(seed)
    scenes = []
    for _ in range(num):
        scene = grammar.sample_scene(rng, 6.0, lambda combination: combination[2] == "growing", pair_fraction=0.0)
        thing = scene.objects[0]
        phase = thing.phase * (1 - seconds / thing.period_s)
        scenes.append(replace(scene, objects=(replace(thing, phase=phase),)))
    return scenes


def backwards(scene: Scene) -> Scene:
    """Return the scene that describes a growing scene's clip played backwards."""
    (thing,) = scene.objects
    assert thing.motion == "growing"
    return replace(scene, objects=(replace(thing, motion="shrinking"),))
