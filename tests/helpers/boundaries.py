"""Make synthetic videos with known segments and noisy timestamps, and teachers that score them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.editing.boundaries import Floats, Spans, VideoClips, iou, video_clips
from training.editing.scores import FrameFeatures
from training.editing.settings import EditSettings

DIM = 128


@dataclass(frozen=True)
class Truth:
    """Describe a video that shows each caption's content between `spans_N2`, and something else in the gaps."""

    clips: VideoClips
    spans_N2: Floats
    topics_N: NDArray[np.int64]


def make_truth(number: int, settings: EditSettings, num_topics: int = 40) -> Truth:
    """Draw three to six segments of 4 to 16 s with gaps of 0 to 6 s, and a timestamp inside each segment."""
    draw = np.random.default_rng([7, number])
    lengths, gaps = draw.uniform(4, 16, draw.integers(3, 7)), draw.uniform(0, 6, 8)
    ends = np.cumsum(lengths + gaps[: len(lengths)])
    spans_N2 = np.stack([ends - lengths, ends], axis=1)
    times = draw.uniform(spans_N2[:, 0], spans_N2[:, 1])
    ids = [f"v{number:03d}.{n}" for n in range(len(times))]
    clips = video_clips(f"v{number:03d}", ends[-1] + 3, ids, times, settings)
    return Truth(clips, spans_N2, draw.choice(num_topics, len(times), replace=False))


def make_truths(count: int, settings: EditSettings) -> list[Truth]:
    return [make_truth(number, settings) for number in range(count)]


def mean_iou(truths: Sequence[Truth], spans: Spans) -> float:
    return float(np.concatenate([iou(spans[t.clips.video_id], t.spans_N2) for t in truths]).mean())


class Oracle:
    """Score a candidate by its IoU with the truth."""

    def __init__(self, truths: Sequence[Truth]):
        self.truths = {truth.clips.video_id: truth for truth in truths}

    def __call__(self, video: VideoClips, offered: Sequence[Floats]) -> list[Floats]:
        truth_N2 = self.truths[video.video_id].spans_N2
        return [
            iou(spans_K2, np.broadcast_to(span, spans_K2.shape))
            for span, spans_K2 in zip(truth_N2, offered, strict=True)
        ]


def topic_vectors(num_topics: int = 40) -> Floats:
    return np.random.default_rng(1).normal(size=(num_topics, DIM))


def paired_vectors(num_topics: int, rank: int = 24) -> tuple[Floats, Floats]:
    """Return image and text vectors of topics: learnable, as two linear views of the same few latent numbers."""
    draw = np.random.default_rng(5)
    hidden = draw.normal(size=(num_topics, rank))
    looks, names = (hidden @ draw.normal(size=(rank, DIM)) / rank**0.5 for _ in range(2))
    return looks, names


def frame_features(truth: Truth, topics: Floats, noise: float, fps: float = 2.0) -> FrameFeatures:
    """Return features of each frame: its segment's topic plus noise, or noise only in the gaps."""
    times = np.arange(0, truth.clips.duration_s, 1 / fps)
    draw = np.random.default_rng([11, len(times), int(truth.clips.video_id[1:])])
    features = noise * draw.normal(size=(len(times), DIM))
    for (start, end), topic in zip(truth.spans_N2, truth.topics_N, strict=True):
        features[(times >= start) & (times < end)] += topics[topic]
    return FrameFeatures(times, features)
