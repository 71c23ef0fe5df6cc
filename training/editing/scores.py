"""Score candidate boundaries: similarity of clip and caption, relative to the captions of other videos.

`FrameScorer` is the cheap `Scorer` of docs/methods/video_editing.md section 5: a video's frames are encoded once per
round and every candidate is the mean of its frames, from cumulative sums. Shape letters as in
`training.editing.boundaries`, and    F frames of a video   J captions of the bank   C embed_dim
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmill.base.errors import ItemError, UserError
from training.editing.boundaries import Floats, VideoClips

_OUT = 2.0  # penalty that excludes a candidate: cosines cannot differ by more


def contrastive_score(own: Floats, bank_J: Floats, log_scale: float) -> Floats:
    """Compute own - logmeanexp(bank at the model's temperature), in units of a cosine, along the bank's last dimension.

    A clip that is similar to every caption, as very short and very long clips tend to be, thus gains nothing.
    """
    scaled = bank_J * np.exp(log_scale)
    highest = scaled.max(axis=-1, keepdims=True)
    log_mean = np.log(np.exp(scaled - highest).mean(axis=-1)) + highest[..., 0]
    return own - log_mean / np.exp(log_scale)


@dataclass(frozen=True)
class Bank:
    """Captions for comparison: unit vectors [J, C] and the ids of their videos [J]."""

    features_JC: Floats
    video_ids_J: NDArray[Any]

    def against(self, video_id: str, text_C: Floats, same: float) -> Floats:
        """Select captions [J', C] of other videos with a cosine of at most `same` to `text`.

        A caption with the same meaning is left out, because no candidate could be nearer to its own caption without
        being nearer to that one. Raises ItemError "no-bank" if no caption remains.
        """
        others = self.features_JC[self.video_ids_J != video_id]
        others = others[others @ text_C <= same]
        if not len(others):
            raise ItemError("no-bank", f"no caption of another video to compare the clips of {video_id} with")
        return others


def draw_bank(video_ids: Sequence[str], features_NC: NDArray[Any], size: int, seed: int = 0) -> Bank:
    """Draw at most `size` of the captions, as a function of the seed and their order."""
    if len(video_ids) != len(features_NC):
        raise UserError(f"a bank needs one video id per caption, but has {len(video_ids)} for {len(features_NC)}")
    rows = np.sort(np.random.default_rng(seed).permutation(len(video_ids))[:size])
    return Bank(_unit(np.asarray(features_NC)[rows]), np.asarray(video_ids, dtype=object)[rows])


@dataclass(frozen=True)
class FrameFeatures:
    """Ascending times of a video's frames, and their features, which need not be normalised."""

    times_F: Floats
    features_FC: NDArray[Any]


class FrameScorer:
    """A `Scorer` for models whose video vector is the mean of its frames' unit vectors, or close to it.

    frames     by video_id
    texts      feature [C] of the caption by clip_id
    bank       None: the score is the cosine
    log_scale  of the model: the logarithm of 1 / temperature
    same       captions of the bank with a larger cosine to a clip's own are left out
    """

    def __init__(
        self,
        frames: Mapping[str, FrameFeatures],
        texts: Mapping[str, NDArray[Any]],
        bank: Bank | None,
        log_scale: float,
        same: float = 0.95,
    ):
        self.frames, self.texts, self.bank, self.log_scale, self.same = frames, texts, bank, log_scale, same

    def __call__(self, video: VideoClips, offered: Sequence[Floats]) -> list[Floats]:
        """Score candidates. Raises ItemError "no-frames" for a video without any, and as `Bank.against`."""
        frames = self.frames[video.video_id]
        if not len(frames.times_F):
            raise ItemError("no-frames", f"video {video.video_id} has no frame features")
        sums_FC = running_sums(frames.features_FC)
        return [
            self.score(video.video_id, self.texts[clip_id], mean_frames(frames.times_F, sums_FC, spans_K2))
            for clip_id, spans_K2 in zip(video.clip_ids, offered, strict=True)
        ]

    def score(self, video_id: str, text_C: NDArray[Any], clips_KC: Floats) -> Floats:
        """Score a text and unit vectors of clips of that video: [K]."""
        text_C = _unit(text_C)
        if self.bank is None:
            return clips_KC @ text_C
        bank_JC = self.bank.against(video_id, text_C, self.same)
        return contrastive_score(clips_KC @ text_C, clips_KC @ bank_JC.T, self.log_scale)


class VideoScorer:
    """A `Scorer` for models whose video vector is not just the mean of its frames (section 5).

    The current boundaries and the `num_best` candidates by their frames are encoded as videos; the others are excluded.

    encode  returns features [K, C] of pieces [K, 2] of the video
    """

    def __init__(self, frames: FrameScorer, encode: Callable[[Floats], NDArray[Any]], num_best: int):
        self.frames, self.encode, self.num_best = frames, encode, num_best

    def __call__(self, video: VideoClips, offered: Sequence[Floats]) -> list[Floats]:
        """Score candidates. Raises ItemError like `FrameScorer`."""
        chosen = [
            np.append(0, 1 + np.argsort(-scores_K[1:], kind="stable")[: self.num_best])
            for scores_K in self.frames(video, offered)
        ]
        pieces = [spans_K2[best] for spans_K2, best in zip(offered, chosen, strict=True)]
        features = _unit(self.encode(np.concatenate(pieces)))
        ends = np.cumsum([len(best) for best in chosen])[:-1]
        scored = []
        for clip_id, spans_K2, best, of_clip in zip(
            video.clip_ids, offered, chosen, np.split(features, ends), strict=True
        ):
            found = self.frames.score(video.video_id, self.frames.texts[clip_id], of_clip)
            scores_K = np.full(len(spans_K2), found[0] - _OUT)
            scores_K[best] = found
            scored.append(scores_K)
        return scored


def running_sums(features_FC: NDArray[Any]) -> Floats:
    """Sum the frames' unit vectors cumulatively: [F + 1, C], the first row 0."""
    unit_FC = _unit(features_FC)
    return np.concatenate([np.zeros((1, unit_FC.shape[1])), unit_FC.cumsum(axis=0)])


def mean_frames(times_F: Floats, sums_FC: Floats, spans_K2: Floats) -> Floats:
    """Average the frames in [start, end), or take the nearest one if there is none: unit vectors [K, C]."""
    first, last = np.searchsorted(times_F, spans_K2[:, 0]), np.searchsorted(times_F, spans_K2[:, 1])
    nearest = np.abs(times_F[None] - spans_K2.mean(axis=1, keepdims=True)).argmin(axis=1)
    first = np.where(first == last, nearest, first)
    return _unit(sums_FC[np.maximum(last, first + 1)] - sums_FC[first])


def _unit(features: NDArray[Any]) -> Floats:
    """Scale to length 1, in float64; zeros stay zeros."""
    wide = np.asarray(features, dtype=np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
