"""Video Editing for Video Retrieval: clips from single timestamps, and a teacher that edits their boundaries.

docs/methods/video_editing.md sections 3, 5 and 9; what is marked [design] there is ours. Pure functions of numbers: no
model, no files. A model enters as a `Scorer`; `training.editing.scores` has one for cached frame features, and
`training.editing.rounds` plays the rounds of teacher and student. Times are seconds as doubles; shape letters:
    N clips of a video   K candidates of a clip   2 start and end

A clip's first boundaries are its *base* and never change; what a round decides is a row of `EDITS`, and a round's rows
hold every clip, edited or not, so that the rows of one round are the boundaries after it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipmill.base.errors import ItemError
from shards.corpus.schema import TABLES
from training.editing.settings import EditSettings

Floats = NDArray[np.float64]
Spans = dict[str, Floats]  # present boundaries [N, 2] by video_id, in the order of the video's clips

# The table's columns but those that name the editing and the text
EDITS = pa.schema([field for field in TABLES["clip_edits"] if field.name not in ("editing", "text_md5")])


@dataclass(frozen=True)
class VideoClips:
    """The clips of one video in order of their timestamps. Made by `video_clips`."""

    video_id: str
    duration_s: float
    clip_ids: tuple[str, ...]
    timestamps_N: Floats
    base_N2: Floats
    room_N2: Floats  # what a clip may not leave: where there are frames of it
    has_source: bool = True  # False: the frames are the clips' own

    def __len__(self) -> int:
        return len(self.clip_ids)


# What a teacher says of each clip's candidates [K, 2]: [K] scores, the higher the better the clip shows its caption.
Scorer = Callable[[VideoClips, Sequence[Floats]], Sequence[Floats]]


# -- first boundaries --------------------------------------------------------------------------------------------------


def video_clips(
    video_id: str,
    duration_s: float,
    clip_ids: Sequence[str],
    timestamps_s: Sequence[float],
    settings: EditSettings,
    spans_s: Sequence[Sequence[float]] | None = None,
    frames_s: Sequence[Sequence[float]] | None = None,
) -> VideoClips:
    """Build one video's clips, in any order, with boundaries from their timestamps or, if given, `spans_s`.

    frames_s  what there is of each clip where the source video is gone; None: all of the video

    Raises ItemError "bad-duration", "bad-timestamp" or "bad-span".
    """
    if not (np.isfinite(duration_s) and duration_s > 0):
        raise ItemError("bad-duration", f"video {video_id} is {duration_s} s long")
    times = np.asarray(timestamps_s, dtype=np.float64)
    for clip_id, time in zip(clip_ids, times, strict=True):
        if not 0 <= time <= duration_s:
            raise ItemError("bad-timestamp", f"clip {clip_id} is at {time} s of a video of {duration_s} s")
    order = np.argsort(times, kind="stable")
    times, ids = times[order], tuple(clip_ids[i] for i in order)
    if spans_s is not None:
        base = _checked_spans(np.asarray(spans_s, dtype=np.float64).reshape(-1, 2)[order], ids, times, duration_s)
    else:
        base = {"midpoint": midpoint_spans, "fixed": fixed_spans}[settings.initial](times, duration_s, settings)
    room = np.repeat([[0.0, duration_s]], len(times), axis=0)
    if frames_s is not None:
        room = np.asarray(frames_s, dtype=np.float64).reshape(-1, 2)[order]
        room = np.stack([np.minimum(room[:, 0], base[:, 0]), np.maximum(room[:, 1], base[:, 1])], axis=1)
    elif spans_s is not None:
        room = (base + [-settings.margin_s, settings.margin_s]).clip(0, duration_s)
    for array in (times, base, room):
        array.flags.writeable = False
    return VideoClips(video_id, float(duration_s), ids, times, base, room, frames_s is None)


def midpoint_spans(timestamps_N: Floats, duration_s: float, settings: EditSettings) -> Floats:
    """Reach from the midpoint with the timestamp before to that with the one behind: [N, 2] (section 3).

    The first and the last clip reach half the video's median gap outwards; a clip without a gap to any other one
    `half_length_s`. Timestamps in rising order. Equal ones share their boundary, and are widened to the least length.
    """
    if not len(timestamps_N):
        return np.zeros((0, 2))
    gaps = np.diff(timestamps_N)
    outwards = np.median(gaps[gaps > 0]) / 2 if (gaps > 0).any() else settings.half_length_s
    between = (timestamps_N[:-1] + timestamps_N[1:]) / 2
    edges = np.concatenate([[timestamps_N[0] - outwards], between, [timestamps_N[-1] + outwards]])
    return _widened(np.stack([edges[:-1], edges[1:]], axis=1), duration_s, settings)


def fixed_spans(timestamps_N: Floats, duration_s: float, settings: EditSettings) -> Floats:
    """Reach `half_length_s` to either side of each timestamp, cut at the video's ends: [N, 2]."""
    half = settings.half_length_s
    return _widened(np.stack([timestamps_N - half, timestamps_N + half], axis=1), duration_s, settings)


def _widened(spans_N2: Floats, duration_s: float, settings: EditSettings) -> Floats:
    """Clip to the video and widen around the middle to the least length, or the whole video if it is shorter."""
    spans_N2 = spans_N2.clip(0, duration_s)
    least = min(settings.min_length_s, duration_s)
    starts = (spans_N2.mean(axis=1) - least / 2).clip(0, duration_s - least)
    wide = np.stack([starts, starts + least], axis=1)
    wide[:, 0], wide[:, 1] = np.minimum(wide[:, 0], spans_N2[:, 0]), np.maximum(wide[:, 1], spans_N2[:, 1])
    return np.where(spans_N2[:, 1:] - spans_N2[:, :1] < least, wide.clip(0, duration_s), spans_N2)


def _checked_spans(spans_N2: Floats, ids: Sequence[str], times: Floats, duration_s: float) -> Floats:
    for clip_id, time, (start, end) in zip(ids, times, spans_N2, strict=True):
        if not (0 <= start <= time <= end <= duration_s and start < end):
            raise ItemError(
                "bad-span", f"clip {clip_id}, {start} to {end} s of a video of {duration_s} s, lacks its time {time} s"
            )
    return spans_N2


# -- one clip's candidates ---------------------------------------------------------------------------------------------

# by how many steps start and end move: nothing; one boundary; both outwards, inwards; the whole clip
_MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1], [-1, 1], [1, -1], [-1, -1], [1, 1]], dtype=np.float64)


def candidates(
    video: VideoClips, spans_N2: Floats, number: int, settings: EditSettings, step_scale: float = 1.0
) -> Floats:
    """List a clip's present boundaries, then those it might get, each once: [K, 2] (section 5).

    A move beyond a limit goes to the limit. The limits: the timestamp stays inside; neither the clip's room nor the
    nearest other timestamps are left; the length stays between the least and the largest. A limit that the present
    boundaries break already (fixed clips reach over their neighbours' timestamps) may not be broken further.
    """
    start, end = spans_N2[number]
    time, (low, high) = video.timestamps_N[number], reach(video)[number]
    step = step_scale * max(settings.step_s, settings.step_ratio * (end - start))
    moves = _MOVES if settings.rings == 1 else np.concatenate([_MOVES, 2 * _MOVES[1:]])
    moved = spans_N2[number] + step * moves
    moved = np.stack([moved[:, 0].clip(min(low, start), time), moved[:, 1].clip(time, max(high, end))], axis=1)
    lengths = moved[:, 1] - moved[:, 0]
    least, largest = min(settings.min_length_s, end - start), max(settings.max_length_s, end - start)
    moved = moved[(lengths >= least) & (lengths <= largest)]
    _, first = np.unique(moved, axis=0, return_index=True)
    return moved[np.sort(first)]


def reach(video: VideoClips) -> Floats:
    """Bound each clip by the nearest other timestamps before and behind its own, within its room: [N, 2]."""
    times = video.timestamps_N
    bounded = np.concatenate([[0.0], times, [video.duration_s]])
    before, behind = np.searchsorted(times, times, "left"), np.searchsorted(times, times, "right") + 1
    low_N, high_N = video.room_N2.T
    return np.stack([np.maximum(bounded[before], low_N), np.minimum(bounded[behind], high_N)], axis=1)


def overlap(one: Floats, others_K2: Floats) -> Floats:
    """Compute the part that two spans share, relative to the shorter one: [K]."""
    common = np.minimum(one[1], others_K2[:, 1]) - np.maximum(one[0], others_K2[:, 0])
    shorter = np.minimum(one[1] - one[0], others_K2[:, 1] - others_K2[:, 0])
    return common.clip(0) / shorter


def iou(spans_N2: Floats, truth_N2: Floats) -> Floats:
    """Compute intersection over union of each pair of spans: [N]."""
    low, high = np.maximum(spans_N2[:, 0], truth_N2[:, 0]), np.minimum(spans_N2[:, 1], truth_N2[:, 1])
    common = (high - low).clip(0)
    return common / ((spans_N2[:, 1] - spans_N2[:, 0]) + (truth_N2[:, 1] - truth_N2[:, 0]) - common)


# -- editing -----------------------------------------------------------------------------------------------------------


@dataclass
class Edited:
    """Decisions of one round: rows of `EDITS` by video and time, the boundaries after it, and failed videos."""

    rows: pa.Table
    spans: Spans
    failures: list[tuple[str, ItemError]] = field(default_factory=list)


def edit_videos(
    videos: Iterable[VideoClips],
    spans: Mapping[str, Floats],
    score: Scorer,
    settings: EditSettings,
    *,
    round_number: int,
    teacher: str,
    step_scale: float = 1.0,
    threshold: float = np.inf,
) -> Edited:
    """Edit videos for one round; their order, and how they are dealt to workers, changes no row.

    threshold  only clips that score at most this are edited: see `lowest_threshold`
    A video whose scores are not finite keeps its boundaries and has no rows; it is among `failures`.
    """
    edited = Edited(EDITS.empty_table(), dict(spans))
    rows: list[dict[str, Any]] = []
    for video in sorted(videos, key=lambda video: video.video_id):
        try:
            chosen = edit_video(video, spans[video.video_id], score, settings, step_scale, threshold)
        except ItemError as error:
            edited.failures.append((video.video_id, error))
            continue
        edited.spans[video.video_id] = np.array([[row["start_s"], row["end_s"]] for row in chosen]).reshape(-1, 2)
        rows += [row | {"round": round_number, "teacher": teacher} for row in chosen]
    edited.rows = pa.Table.from_pylist(rows, schema=EDITS)
    return edited


def edit_video(
    video: VideoClips,
    spans_N2: Floats,
    score: Scorer,
    settings: EditSettings,
    step_scale: float = 1.0,
    threshold: float = np.inf,
) -> list[dict[str, Any]]:
    """Edit one video: return a row per clip, without round and teacher. Raises ItemError "bad-score".

    In order of time, so that a clip is held against the boundaries its left neighbour has just got. An edit may not
    raise the overlap with a neighbour above `max_overlap`.
    """
    offered = [candidates(video, spans_N2, number, settings, step_scale) for number in range(len(video))]
    scores = scores_of(video, offered, score, settings)
    present, rows = spans_N2.copy(), []
    for number, (spans_K2, scores_K) in enumerate(zip(offered, scores, strict=True)):
        choice, reason = 0, "not-lowest"
        if scores_K[0] <= threshold:
            choice, reason = _choose(spans_K2, scores_K, present, number, settings)
        rows.append(_row(video, number, spans_K2[choice], scores_K[0], scores_K[choice], reason))
        present[number] = spans_K2[choice]
    return rows


def scores_of(video: VideoClips, offered: Sequence[Floats], score: Scorer, settings: EditSettings) -> list[Floats]:
    """Return the teacher's scores, less the cost of a change from the first length. Raises ItemError "bad-score"."""
    scores = [np.asarray(scores_K, dtype=np.float64) for scores_K in score(video, offered)]
    assert [len(scores_K) for scores_K in scores] == [len(spans_K2) for spans_K2 in offered], "a score per candidate"
    for clip_id, scores_K in zip(video.clip_ids, scores, strict=True):
        if not np.isfinite(scores_K).all():
            raise ItemError("bad-score", f"clip {clip_id} has scores {scores_K[~np.isfinite(scores_K)]}")
    first_N = video.base_N2[:, 1] - video.base_N2[:, 0]
    return [
        scores_K - settings.length_weight * np.abs(np.log((spans_K2[:, 1] - spans_K2[:, 0]) / first))
        for spans_K2, scores_K, first in zip(offered, scores, first_N, strict=True)
    ]


def lowest_threshold(
    videos: Iterable[VideoClips], spans: Mapping[str, Floats], score: Scorer, settings: EditSettings
) -> float:
    """Return the score up to which clips are edited, so that `lowest_share` of them is; failed videos do not count."""
    if settings.lowest_share == 1:
        return np.inf
    present: list[float] = []
    for video in videos:
        try:
            kept = scores_of(video, list(spans[video.video_id][:, None]), score, settings)
        except ItemError:
            continue  # `edit_videos` meets and reports it
        present += [scores_K[0] for scores_K in kept]
    return float(np.quantile(present, settings.lowest_share, method="lower")) if present else np.inf


def _choose(
    spans_K2: Floats, scores_K: Floats, present_N2: Floats, number: int, settings: EditSettings
) -> tuple[int, str]:
    """Choose the best candidate that the neighbours allow, and name the reason: the present one unless another is
    better by enough.
    """
    allowed_K = np.ones(len(spans_K2), dtype=bool)
    for neighbour in (number - 1, number + 1):
        if 0 <= neighbour < len(present_N2):
            shares_K = overlap(present_N2[neighbour], spans_K2)
            allowed_K &= shares_K <= max(settings.max_overlap, shares_K[0])
    if allowed_K.sum() == 1:
        return 0, "no-candidate"
    best = int(np.argmax(np.where(allowed_K, scores_K, -np.inf)))  # the first of equals
    return (best, "better") if scores_K[best] - scores_K[0] > settings.min_gain else (0, "no-better")


def _row(video: VideoClips, number: int, span: Floats, before: float, after: float, reason: str) -> dict[str, Any]:
    base_start_s, base_end_s = video.base_N2[number].tolist()
    start_s, end_s = span.tolist()
    return {
        "clip_id": video.clip_ids[number],
        "video_id": video.video_id,
        "start_s": start_s,
        "end_s": end_s,
        "base_start_s": base_start_s,
        "base_end_s": base_end_s,
        "score_before": float(before),
        "score_after": float(after),
        "accepted": reason == "better",
        "reason": reason if video.has_source else f"{reason}-without-source",
    }


# -- guards ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """Distance of the boundaries from the first ones, over all clips."""

    median_change: float  # of the median length, relative
    share_at_limit: float  # clips that editing has brought to a limit


def drift(videos: Sequence[VideoClips], spans: Mapping[str, Floats], settings: EditSettings) -> Drift:
    videos = [video for video in videos if len(video)]
    if not videos:
        return Drift(0.0, 0.0)
    lengths = np.concatenate([np.diff(spans[video.video_id], axis=1)[:, 0] for video in videos])
    first = np.concatenate([np.diff(video.base_N2, axis=1)[:, 0] for video in videos])
    newly = [(_limits_met(v, spans[v.video_id], settings) & ~_limits_met(v, v.base_N2, settings)) for v in videos]
    return Drift(float(np.median(lengths) / np.median(first) - 1), float(np.concatenate(newly).any(axis=1).mean()))


def _limits_met(video: VideoClips, spans_N2: Floats, settings: EditSettings) -> NDArray[np.bool_]:
    """Test each clip's limits: [N, 6]: least or largest length; start or end at its timestamp; at the next one or the
    end.
    """
    lengths, times, reach_N2 = spans_N2[:, 1] - spans_N2[:, 0], video.timestamps_N, reach(video)
    start, end = spans_N2[:, 0], spans_N2[:, 1]
    by_length = (lengths <= settings.min_length_s, lengths >= settings.max_length_s)
    by_time = (start >= times, end <= times, start <= reach_N2[:, 0], end >= reach_N2[:, 1])
    return np.stack(by_length + by_time, axis=1)


def overlapping(
    videos: Iterable[VideoClips], spans: Mapping[str, Floats], share: float
) -> list[tuple[str, str, float]]:
    """Find pairs of clips of one video that overlap by more than `share` of the shorter: not each other's negatives."""
    pairs = []
    for video in sorted(videos, key=lambda video: video.video_id):
        spans_N2 = spans[video.video_id]
        for number in range(len(video) - 1):
            shares = overlap(spans_N2[number], spans_N2[number + 1 :])
            pairs += [
                (video.clip_ids[number], video.clip_ids[number + 1 + other], float(shares[other]))
                for other in np.flatnonzero(shares > share)
            ]
    return pairs
