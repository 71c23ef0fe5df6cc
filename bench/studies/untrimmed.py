"""Make untrimmed videos for studies: several scenes, some with descriptions, as features of the demo's image model.

A description comes with one time at which it is true; its true span is known to the evaluation only.
Shape letters: N descriptions of a video, F its frames, C the model's embed_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.studies.keep import kept
from pipeline.demo.grammar import Scene, sample_scene, spoken_sentences
from pipeline.demo.render import render_frame

FRAMES_PER_S = 2.0
SCENE_S = (3.0, 6.0, 15.0)  # shortest, most frequent, longest
NUM_SCENES = (5, 9)
DESCRIBED = 0.65  # share of the scenes
NUM_WORDS = 25  # most words of a description


@dataclass(frozen=True)
class Untrimmed:
    """A video of consecutive scenes; a good clip shows none without a description."""

    video_id: str
    duration_s: float
    times_F: NDArray[np.float64]
    frames_FC: NDArray[np.float32]  # unit vectors
    spans_N2: NDArray[np.float64]  # where each description is true
    timestamps_N: NDArray[np.float64]  # one time within each
    texts_NC: NDArray[np.float32]

    @property
    def clip_ids(self) -> list[str]:
        return [f"{self.video_id}.{n}" for n in range(len(self.timestamps_N))]


def untrimmed_videos(num: int, seed: int, cache: Path) -> list[Untrimmed]:
    """Return the first `num` videos of a seed, which are drawn and encoded once and kept in `cache`."""
    path = kept(cache / f"untrimmed-{seed}-{num}.npz", lambda path: _write(path, num, seed))
    with np.load(path) as file:
        return [_read(file, n) for n in range(num)]


_ARRAYS = ("times_F", "frames_FC", "spans_N2", "timestamps_N", "texts_NC")


def _write(path: Path, num: int, seed: int) -> None:
    """Make videos and write them."""
    arrays = {}
    for n, video in enumerate(_make(num, seed)):
        arrays |= {f"{n}/{name}": getattr(video, name) for name in _ARRAYS}
        arrays[f"{n}/duration_s"] = np.float64(video.duration_s)
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def _read(file: Any, n: int) -> Untrimmed:
    arrays = {name: file[f"{n}/{name}"] for name in _ARRAYS}
    return Untrimmed(_id(n), float(file[f"{n}/duration_s"]), **arrays)


def _id(n: int) -> str:
    return f"v{n:04d}"


def _make(num: int, seed: int) -> Iterator[Untrimmed]:
    """Yield the videos of a seed."""
    from bench.studies.fitting import text_features, video_features
    from training.models import registry as models
    from training.models.registry import ModelSettings

    model = models.load(ModelSettings(init="demo", pooling="mean")).eval()
    for n in range(num):
        rng = np.random.default_rng([seed, n])
        scenes = [sample_scene(rng, float(rng.triangular(*SCENE_S))) for _ in range(rng.integers(*NUM_SCENES) + 1)]
        ends = np.cumsum([scene.duration_s for scene in scenes])
        spans = np.stack([ends - [scene.duration_s for scene in scenes], ends], axis=1)
        chosen = np.flatnonzero(rng.random(len(scenes)) < DESCRIBED)
        chosen = chosen if len(chosen) else np.array([0])
        texts = [" ".join(spoken_sentences(scenes[i], rng, NUM_WORDS)) for i in chosen]
        times, pixels = _frames(scenes, spans, model.config.image_size)
        yield Untrimmed(
            video_id=_id(n),
            duration_s=float(ends[-1]),
            times_F=times,
            frames_FC=video_features(model, pixels).numpy(),
            spans_N2=spans[chosen],
            timestamps_N=rng.uniform(spans[chosen, 0], spans[chosen, 1]),
            texts_NC=text_features(model, texts).numpy(),
        )


def _frames(scenes: list[Scene], spans: NDArray[np.float64], size: int) -> tuple[NDArray[np.float64], np.ndarray]:
    """Draw frames; return times [F] and uint8 [F, 1, 3, size, size], each frame as a clip."""
    times = np.arange(0.5 / FRAMES_PER_S, spans[-1, 1], 1 / FRAMES_PER_S)
    numbers = np.searchsorted(spans[:, 1], times, side="right")
    pictures = [
        render_frame(scenes[n], float(t - spans[n, 0]), size, size) for t, n in zip(times, numbers, strict=True)
    ]
    return times, np.stack(pictures).transpose(0, 3, 1, 2)[:, None]
