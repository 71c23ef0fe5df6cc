"""Video Editing for Video Retrieval: clips from single timestamps, and a teacher that edits their boundaries.

This implements docs/methods/video_editing.md sections 3, 5 and 9 as pure functions of numbers; [design] there marks our
own decisions. A model is a `Scorer`: `training.editing.scores` has one for cached frame features, and
`training.editing.rounds` runs the rounds of teacher and student. Times are seconds as doubles; shape letters:
    N clips of a video   K candidates of a clip   2 start and end

The first boundaries of a clip are its *base* and never change. A round writes a row of `EDITS` for every clip, edited
or not, so the rows of one round are the boundaries after it.
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
Spans = dict[str, Floats]  # current boundaries [N, 2] by video_id, in the order of the video's clips

# Columns of the table `clip_edits` except those that name the editing and the text
EDITS = pa.schema([field for field in TABLES["clip_edits"] if field.name not in ("editing", "text_md5")])


@dataclass(frozen=True)
class VideoClips:
    """The clips of one video in order of their timestamps, built by `video_clips`."""

    video_id: str
    duration_s: float
    clip_ids: tuple[str, ...]
    timestamps_N: Floats
    base_N2: Floats
    room_N2: Floats  # range of a clip's boundaries: the part of the video with frames
    has_source: bool = True  # False: the source video is not kept, and the clips' own frames are used

    def __len__(self) -> int:
        return len(self.clip_ids)


# Returns a teacher's scores [K] for each clip's candidates [K, 2]; higher means that the clip shows its caption better.
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
    """Build one video's clips, given in any order, with boundaries from their timestamps or, if given, `spans_s`.

    frames_s  range of frames of each clip if the source video is not kept; None: all of the video

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
    """Span each clip between the midpoints to the previous and the next timestamp: [N, 2] (section 3).

    The first and the last clip extend outwards by half the video's median gap, or by `half_length_s` if there is no
    gap. Timestamps ascend. Clips with equal ones share their boundary, and are widened to the least length.
    """
    if not len(timestamps_N):
        return np.zeros((0, 2))
    gaps = np.diff(timestamps_N)
    outwards = np.median(gaps[gaps > 0]) / 2 if (gaps > 0).any() else settings.half_length_s
    between = (timestamps_N[:-1] + timestamps_N[1:]) / 2
    edges = np.concatenate([[timestamps_N[0] - outwards], between, [timestamps_N[-1] + outwards]])
    return _widened(np.stack([edges[:-1], edges[1:]], axis=1), duration_s, settings)


def fixed_spans(timestamps_N: Floats, duration_s: float, settings: EditSettings) -> Floats:
    """Span each clip `half_length_s` to either side of its timestamp, clipped to the video: [N, 2]."""
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
                "bad-span",
                f"clip {clip_id} from {start} to {end} s does not contain its time {time} s, or leaves its video of "
                f"{duration_s} s",
            )
    return spans_N2


# -- one clip's candidates ---------------------------------------------------------------------------------------------

# moves of start and end, in steps: none; one boundary; both outwards, inwards; the whole clip
_MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1], [-1, 1], [1, -1], [-1, -1], [1, 1]], dtype=np.float64)


def candidates(
    video: VideoClips, spans_N2: Floats, number: int, settings: EditSettings, step_scale: float = 1.0
) -> Floats:
    """List a clip's current boundaries, then the candidates for new ones, each once: [K, 2] (section 5).

    A move beyond a limit ends at the limit. The clip contains its timestamp, stays within its room and between the
    nearest other timestamps, and its length stays between the least and the largest. A limit that the current
    boundaries already exceed (fixed clips may contain their neighbours' timestamps) must not be exceeded further.
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
    """Bound each clip by the nearest other timestamps before and after its own, within its room: [N, 2]."""
    times = video.timestamps_N
    bounded = np.concatenate([[0.0], times, [video.duration_s]])
    before, after = np.searchsorted(times, times, "left"), np.searchsorted(times, times, "right") + 1
    low_N, high_N = video.room_N2.T
    return np.stack([np.maximum(bounded[before], low_N), np.minimum(bounded[after], high_N)], axis=1)


def overlap(one: Floats, others_K2: Floats) -> Floats:
    """Compute the length that a span shares with each of others, relative to the shorter one: [K]."""
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
    """Edit videos for one round; rows do not depend on the order of videos or their distribution to workers.

    threshold  only clips that score at most this are edited: see `lowest_threshold`
    A video whose scores are not finite keeps its boundaries, has no rows and is listed in `failures`.
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

    Clips are edited in order of time, each next to the new boundaries of its left neighbour. An edit must not raise the
    overlap with a neighbour above `max_overlap`.
    """
    offered = [candidates(video, spans_N2, number, settings, step_scale) for number in range(len(video))]
    scores = scores_of(video, offered, score, settings)
    current_N2, rows = spans_N2.copy(), []
    for number, (spans_K2, scores_K) in enumerate(zip(offered, scores, strict=True)):
        choice, reason = 0, "not-lowest"
        if scores_K[0] <= threshold:
            choice, reason = _choose(spans_K2, scores_K, current_N2, number, settings)
        rows.append(_row(video, number, spans_K2[choice], scores_K[0], scores_K[choice], reason))
        current_N2[number] = spans_K2[choice]
    return rows


def scores_of(video: VideoClips, offered: Sequence[Floats], score: Scorer, settings: EditSettings) -> list[Floats]:
    """Return the teacher's scores minus the cost of a change from the first length. Raises ItemError "bad-score"."""
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
    """Return the quantile `lowest_share` of the current scores, up to which clips are edited; skip failed videos."""
    if settings.lowest_share == 1:
        return np.inf
    current: list[float] = []
    for video in videos:
        try:
            kept = scores_of(video, list(spans[video.video_id][:, None]), score, settings)
        except ItemError:
            continue  # `edit_videos` reports it
        current += [scores_K[0] for scores_K in kept]
    return float(np.quantile(current, settings.lowest_share, method="lower")) if current else np.inf


def _choose(
    spans_K2: Floats, scores_K: Floats, present_N2: Floats, number: int, settings: EditSettings
) -> tuple[int, str]:
    """Choose the best candidate that the neighbours allow and that gains more than `min_gain`; name the reason."""
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

    median_change: float  # relative change of the median length
    share_at_limit: float  # share of clips that editing has moved to a limit


def drift(videos: Sequence[VideoClips], spans: Mapping[str, Floats], settings: EditSettings) -> Drift:
    videos = [video for video in videos if len(video)]
    if not videos:
        return Drift(0.0, 0.0)
    lengths = np.concatenate([np.diff(spans[video.video_id], axis=1)[:, 0] for video in videos])
    first = np.concatenate([np.diff(video.base_N2, axis=1)[:, 0] for video in videos])
    newly = [(_limits_met(v, spans[v.video_id], settings) & ~_limits_met(v, v.base_N2, settings)) for v in videos]
    return Drift(float(np.median(lengths) / np.median(first) - 1), float(np.concatenate(newly).any(axis=1).mean()))


def _limits_met(video: VideoClips, spans_N2: Floats, settings: EditSettings) -> NDArray[np.bool_]:
    """Test limits, [N, 6]: least and largest length, start and end at the timestamp, start and end at `reach`."""
    lengths, times, reach_N2 = spans_N2[:, 1] - spans_N2[:, 0], video.timestamps_N, reach(video)
    start, end = spans_N2[:, 0], spans_N2[:, 1]
    by_length = (lengths <= settings.min_length_s, lengths >= settings.max_length_s)
    by_time = (start >= times, end <= times, start <= reach_N2[:, 0], end >= reach_N2[:, 1])
    return np.stack(by_length + by_time, axis=1)


def overlapping(
    videos: Iterable[VideoClips], spans: Mapping[str, Floats], share: float
) -> list[tuple[str, str, float]]:
    """Find pairs of clips of one video that overlap by more than `share` of the shorter clip."""
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
