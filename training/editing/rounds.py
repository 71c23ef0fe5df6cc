"""Run the rounds of teacher and student (docs/methods/video_editing.md section 6), for any model with `EditBackend`.

In a round the teacher edits every clip from its current boundaries; the student trains an epoch on them and is
validated on held-out clips of the same weak kind. If the student sets a new best, the teacher takes its weights, the
boundaries stay and the step doubles, up to its initial size; else the boundaries are reverted and the step is halved.
Without a student all boundaries stay, and editing ends when a round moves none. The student's weights are not reverted:
the next round trains it on new edits of the old boundaries.

The tables `EDITS` and `ROUNDS` are the whole state: `state_after` computes it from their rows, so that a killed editing
resumes at its last complete round.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from clipmill.base.errors import ItemError, UserError
from shards.corpus.schema import TABLES
from training.editing.boundaries import (
    EDITS,
    Drift,
    Edited,
    Floats,
    Spans,
    VideoClips,
    drift,
    edit_videos,
    lowest_threshold,
)
from training.editing.settings import EditSettings

# Columns of the table `edit_rounds` except those of the report
_REPORTED = ("editing", "threshold", "num_overlapping", "reasons", "length_changes", "shifts", "settings")
ROUNDS = pa.schema([field for field in TABLES["edit_rounds"] if field.name not in _REPORTED])


HELD = ("kept", "untrained")  # outcomes of rounds whose boundaries stay


class EditBackend(Protocol):
    """A teacher and a student, with their own loss, settings and captions."""

    def teacher(self) -> str:
        """Return a hash of the teacher's weights."""

    def score(self, video: VideoClips, offered: Sequence[Floats]) -> Sequence[Floats]:
        """Score candidates with the teacher, as a `Scorer`."""

    def train(self, spans: Mapping[str, Floats]) -> float | None:
        """Train the student one epoch on clips with these boundaries; return its validation R@1.

        None: the backend trains no student, and the teacher's boundaries stay.
        """

    def promote(self) -> None:
        """Copy the student's weights to the teacher."""

    def restore(self) -> None:
        """Copy the teacher's weights to the student."""


@dataclass(frozen=True)
class State:
    """State of an editing before round `round_number`."""

    round_number: int
    best: float  # highest validation R@1
    step_scale: float
    num_failed_rounds: int  # since the last improvement
    spans: Spans
    is_over: bool = False


# Computes one round's edits of all clips
Edit = Callable[[Sequence[VideoClips], EditBackend, EditSettings, State], Edited]


class Round(NamedTuple):
    """Result of one round: its rows of both tables, and the state after it."""

    edits: pa.Table
    row: pa.Table
    state: State
    failures: list[tuple[str, ItemError]]


def base_spans(videos: Sequence[VideoClips]) -> Spans:
    return {video.video_id: video.base_N2.copy() for video in videos}


def warm_up(videos: Sequence[VideoClips], backend: EditBackend, settings: EditSettings) -> Round:
    """Train on the first boundaries until validation has not risen for `warmup_patience` epochs (section 4).

    Teacher and student then have the weights of the best epoch.
    """
    spans, best, num_flat = base_spans(videos), -np.inf, 0
    for _ in range(settings.max_warmup_epochs):
        validation = backend.train(spans)
        if validation > best:
            best, num_flat = validation, 0
            backend.promote()
        else:
            num_flat += 1
        if num_flat == settings.warmup_patience:
            break
    backend.restore()
    row = {"round": 0, "teacher": backend.teacher(), "validation": best, "outcome": "warm-up", "step_scale": 1.0}
    row |= {"num_clips": sum(map(len, videos)), "num_accepted": 0, "num_failed": 0}
    row |= {"median_change": 0.0, "share_at_limit": 0.0}
    return Round(EDITS.empty_table(), _table(row), State(1, best, 1.0, 0, spans), [])


def edit_here(videos: Sequence[VideoClips], backend: EditBackend, settings: EditSettings, state: State) -> Edited:
    """Edit in this process, with the backend's `score`."""
    return edit_videos(
        videos,
        state.spans,
        backend.score,
        settings,
        round_number=state.round_number,
        teacher=backend.teacher(),
        step_scale=state.step_scale,
        threshold=lowest_threshold(videos, state.spans, backend.score, settings),
    )


def rounds(
    videos: Sequence[VideoClips],
    backend: EditBackend,
    settings: EditSettings,
    state: State,
    held_out: Collection[str] = (),
    edit: Edit = edit_here,
) -> Iterator[Round]:
    """Run rounds until a stop criterion of section 6; yield each as soon as its outcome is known.

    state     of `warm_up`, or of `state_after` for a resumed editing
    held_out  ids of videos that must not be edited. Raises UserError if one is among `videos`
    """
    shared = {video.video_id for video in videos} & set(held_out)
    if shared:
        raise UserError(
            f"{len(shared)} videos to edit are held out for evaluation, {min(shared)} among them: leave them out"
        )
    while not is_done(state, settings):
        result = run_round(videos, backend, settings, state, edit)
        state = result.state
        yield result


def is_done(state: State, settings: EditSettings) -> bool:
    return (
        state.is_over
        or state.round_number > settings.max_rounds
        or state.num_failed_rounds >= settings.patience
        or state.step_scale * settings.step_s < settings.smallest_step_s
    )


def run_round(
    videos: Sequence[VideoClips], backend: EditBackend, settings: EditSettings, state: State, edit: Edit = edit_here
) -> Round:
    """Run one round. If its boundaries collapse, it is reverted without training and is the last."""
    teacher = backend.teacher()
    edited = edit(videos, backend, settings, state)
    change = drift(videos, edited.spans, settings)
    outcome, validation = "collapsed", None
    if not has_collapsed(change, settings):
        validation = backend.train(edited.spans)
        outcome = "untrained" if validation is None else "kept" if validation > state.best else "rolled-back"
    if outcome == "kept":
        backend.promote()
    row = {
        "round": state.round_number,
        "teacher": teacher,
        "validation": validation,
        "best_before": state.best,
        "outcome": outcome,
        "step_scale": state.step_scale,
        "num_clips": sum(map(len, videos)),
        "num_accepted": sum(edited.rows["accepted"].to_pylist()),
        "num_failed": len(edited.failures),
        "median_change": change.median_change,
        "share_at_limit": change.share_at_limit,
    }
    return Round(edited.rows, _table(row), _next_state(state, row, edited.spans), edited.failures)


def has_collapsed(change: Drift, settings: EditSettings) -> bool:
    """Return True if a round violates guard 6 of section 9."""
    too_long = settings.max_median_change is not None and abs(change.median_change) > settings.max_median_change
    at_limit = settings.max_share_at_limit is not None and change.share_at_limit > settings.max_share_at_limit
    return too_long or at_limit


def state_after(videos: Sequence[VideoClips], edits: pa.Table, rounds: pa.Table) -> State:
    """Compute an editing's state after the last of `rounds` from the rows it has written, in any order.

    Rows of `edits` whose round is not in `rounds` are of a killed round, which runs again.
    """
    state = State(0, -np.inf, 1.0, 0, base_spans(videos))
    by_round = _spans_by_round(videos, edits)
    for row in sorted(rounds.to_pylist(), key=lambda row: row["round"]):
        state = _next_state(state, row, state.spans | by_round.get(row["round"], {}))
    if state.round_number == 0:
        raise UserError("the editing has not been warmed up yet: no round is recorded")
    return state


def fold_of(video_id: str, num_folds: int = 2) -> int:
    """Return a video's fold, a function of its id; a teacher trained on the other folds edits it (section 9.7)."""
    return int.from_bytes(hashlib.sha256(video_id.encode()).digest()[:8]) % num_folds


def _next_state(state: State, row: Mapping[str, Any], edited: Spans) -> State:
    state = replace(state, round_number=row["round"] + 1)
    if row["outcome"] == "collapsed":
        return replace(state, is_over=True)
    if row["outcome"] == "rolled-back":
        return replace(state, step_scale=state.step_scale / 2, num_failed_rounds=state.num_failed_rounds + 1)
    if row["outcome"] == "untrained":
        return replace(state, spans=edited, is_over=row["num_accepted"] == 0)
    if row["validation"] is None:  # round 0 without a student
        return replace(state, num_failed_rounds=0, spans=edited)
    scale = min(1.0, 2 * state.step_scale)
    return replace(state, best=row["validation"], step_scale=scale, num_failed_rounds=0, spans=edited)


def _spans_by_round(videos: Sequence[VideoClips], edits: pa.Table) -> dict[int, Spans]:
    """Collect the boundaries after each round, for videos that have rows in it."""
    spans: dict[int, dict[str, tuple[float, float]]] = {}
    for row in edits.select(["round", "clip_id", "start_s", "end_s"]).to_pylist():
        spans.setdefault(row["round"], {})[row["clip_id"]] = (row["start_s"], row["end_s"])
    return {
        number: {
            video.video_id: np.array([of_clip[clip_id] for clip_id in video.clip_ids])
            for video in videos
            if len(video) and video.clip_ids[0] in of_clip
        }
        for number, of_clip in spans.items()
    }


def _table(row: Mapping[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([dict(row)], schema=ROUNDS)
