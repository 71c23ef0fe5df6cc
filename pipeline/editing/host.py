"""Run the rounds of teacher and student on a corpus: an `EditBackend` of models, training runs and the corpus's ledger.

A round's edits are commits of units of videos, its student is an ordinary training run on the edited clips, and its
result is a row. These are the whole state: a killed editing resumes from its commits, its unfinished run and its rows.

OUT/
  edit.yaml          corpus, condition and settings, for resuming with `clipmill edit --out OUT`
  clips.arrow        the clips of the editing (pipeline/editing/clips.py)
  teacher/           the initial weights
  *.parquet          ids of the clips that students train and are validated on, as tables for their settings
  round-01/ …        the student's run of each round, its settings in round-01.yaml
  warm-up-fold-1/ …  with edit.folds = 2: runs that trained a teacher on half of the videos each
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open

from clipmill.base.errors import ItemError
from clipmill.base.settings import digest
from pipeline.editing.clips import Video
from pipeline.editing.pool import Editors, pool
from pipeline.editing.report import measures
from pipeline.editing.students import Editing, Students
from pipeline.editing.worker import CODE_VERSION, Job, Plan, work_of
from pipeline.engine.build import Session, session
from pipeline.runtime.task import Outcome, Task, commit
from training.editing.boundaries import EDITS, Edited, Floats, Spans, VideoClips
from training.editing.rounds import ROUNDS, EditBackend, Round, State, base_spans, rounds, state_after
from training.editing.settings import EditSettings

UNIT = "rounds"  # unit of the commits with rows of rounds

RoundDone = Callable[[Mapping[str, Any]], None]


class CorpusBackend:
    """An `EditBackend` whose teachers and students are weights files; with two folds each has half of the videos."""

    def __init__(self, options: Editing):
        self.options, self.settings, self.items = options, options.settings, options.items
        self.editing = options.editing
        self.students = Students(options)
        self.weights: list[Path] = []
        self.threshold: float | None = None
        self.round_number = 0
        self.num_recorded = 0  # rounds of earlier commands

    # -- EditBackend --------------------------------------------------------------------------------------------------

    def teacher(self) -> str:
        return "+".join(map(hash_of, self.weights))

    def score(self, video: VideoClips, offered: Sequence[Floats]) -> Sequence[Floats]:
        raise AssertionError("units are edited by `edit`")

    def train(self, spans: Mapping[str, Floats]) -> float | None:
        return self.students.train(self.round_number) if self.options.trains else None

    def promote(self) -> None:
        self.weights = self.students.weights(self.round_number)

    def restore(self) -> None:
        raise AssertionError("a corpus's teacher is trained by `clipmill train`, without a warm-up here")

    # -- the editing --------------------------------------------------------------------------------------------------

    def run(self, on_round: RoundDone) -> list[dict[str, Any]]:
        """Run all remaining rounds; call `on_round` with the row of each, recorded ones too; return all rows."""
        videos = self._video_clips()
        recorded = self._recorded(videos)
        self.num_recorded = len(recorded[0]) if recorded else 0
        rows, state = recorded or self._warm_up(videos)
        for row in rows:
            on_round(row)
        for result in rounds(videos, self, self.settings.edit, state, self.items.held_out_videos, self.edit):
            rows.append(self._record(videos, result))
            on_round(rows[-1])
        return rows

    def _video_clips(self) -> list[VideoClips]:
        """Build the clips of videos with valid times; editing reports the others as failures."""
        clips = []
        for video in self.items.videos:
            try:
                clips.append(video.clips(self.settings.edit))
            except ItemError:
                continue
        return clips

    def _recorded(self, videos: Sequence[VideoClips]) -> tuple[list[dict[str, Any]], State] | None:
        """Return the recorded rows and the state after them; None for a new editing."""
        with self._session() as current:
            query = "SELECT * EXCLUDE (item_id, unit, key, fragment) FROM edit_rounds WHERE editing = ?"
            table = current.ledger.rows_of_volumes(query, [self.editing]).sort_by("round")
            if not table.num_rows:
                return None
            edits = pa.concat_tables(self._rows_of(current, number) for number in table["round"].to_pylist())
        rows = table.to_pylist()
        kept = [row["round"] for row in rows if row["outcome"] == "kept"]
        self.weights = self.students.weights(kept[-1]) if kept else self.students.begin()
        return rows, state_after(videos, edits, table.select(ROUNDS.names).cast(ROUNDS))

    def _warm_up(self, videos: Sequence[VideoClips]) -> tuple[list[dict[str, Any]], State]:
        self.weights = self.students.begin()
        validation = self.students.validate(self.weights) if self.options.trains else None
        row = {"round": 0, "teacher": self.teacher(), "validation": validation, "outcome": "warm-up"}
        row |= {"step_scale": 1.0, "num_clips": sum(map(len, videos)), "num_accepted": 0, "num_failed": 0}
        row |= {"median_change": 0.0, "share_at_limit": 0.0}
        best = -np.inf if validation is None else validation
        rows = [self._write_round(row | measures(EDITS.empty_table(), [], {}))]
        return rows, State(1, best, 1.0, 0, base_spans(videos))

    # -- a round ------------------------------------------------------------------------------------------------------

    def edit(self, videos: Sequence[VideoClips], backend: EditBackend, settings: EditSettings, state: State) -> Edited:
        """Edit the units without a commit, then publish the round to the manifest."""
        self.round_number = state.round_number
        with self._session() as current:
            root, lock_owner = str(current.corpus.root), current.corpus.lock_owner
            plan = Plan(root, self.editing, self.settings, current.settings.cut, current.run_id, lock_owner)
            train = self.settings.train
            with pool(plan, self.options.workers, train.device, allow_open=train.allow_open_cluster) as editors:
                jobs = self._jobs(state, editors)
                pending = [job for job in jobs if not current.ledger.has_commit(work_of(plan, job).name)]
                for done in editors.edit(pending):
                    current.ledger.load([done.name])
            current.publish()
            rows, failures = self._rows_of(current, state.round_number), self._failures_of(current, plan, jobs)
        return Edited(rows, state.spans | _spans(videos, rows), failures)

    def _jobs(self, state: State, editors: Editors) -> list[Job]:
        """Build one job per unit; those of the first round also report clips without a text."""
        by_unit: dict[str, list[Video]] = {}
        for video in self.items.videos:
            by_unit.setdefault(video.unit, []).append(video)
        without_text = self.items.clips_without_text if state.round_number == 1 else {}
        weights, hashes = tuple(map(str, self.weights)), tuple(map(hash_of, self.weights))
        texts = [(video.video_id, item["text"]) for video in self.items.videos for item in video.items]
        teachers = (weights, hashes, tuple(editors.banks(weights, texts)))

        def job(unit: str, threshold: float) -> Job:
            videos = tuple(by_unit.get(unit, ()))
            spans = tuple(state.spans.get(video.video_id, np.zeros((0, 2))) for video in videos)
            textless = tuple(without_text.get(unit, ()))
            return Job(unit, state.round_number, *teachers, videos, spans, textless, state.step_scale, threshold)

        units = sorted({*by_unit, *without_text})
        threshold = np.inf
        if self.settings.edit.lowest_share < 1:
            scores = [score for of_unit in editors.scores([job(unit, np.inf) for unit in units]) for score in of_unit]
            threshold = float(np.quantile(scores or [np.inf], self.settings.edit.lowest_share, method="lower"))
        self.threshold = None if np.isinf(threshold) else threshold
        return [job(unit, threshold) for unit in units]

    def _rows_of(self, current: Session, round_number: int) -> pa.Table:
        columns = ", ".join(EDITS.names)
        sql = f"SELECT {columns} FROM clip_edits WHERE editing = ? AND round = ?"
        table = current.ledger.rows_of_volumes(sql, [self.editing, round_number]).cast(EDITS)
        return table.sort_by([(name, "ascending") for name in ("video_id", "start_s", "clip_id")])

    def _failures_of(self, current: Session, plan: Plan, jobs: Sequence[Job]) -> list[tuple[str, ItemError]]:
        keys = {plan.key(video.video_id, job.round_number): video.video_id for job in jobs for video in job.videos}
        sql = "SELECT key, item_id, error_class, message FROM ledger WHERE stage = 'edit' AND status = 'failed'"
        rows = current.ledger.rows_of_volumes(sql).sort_by("item_id").to_pylist()
        return [
            (row["item_id"], ItemError(row["error_class"], row["message"]))
            for row in rows
            if keys.get(row["key"]) == row["item_id"]
        ]

    def _record(self, videos: Sequence[VideoClips], result: Round) -> dict[str, Any]:
        [row] = result.row.to_pylist()
        spans = _spans(videos, result.edits)
        edited = [video for video in videos if video.video_id in spans]
        return self._write_round(row | {"threshold": self.threshold} | measures(result.edits, edited, spans))

    def _write_round(self, row: dict[str, Any]) -> dict[str, Any]:
        edit = self.settings.edit
        settings = {"edit": edit.model_dump(mode="json", exclude=edit._operational()), "where": self.options.where}
        settings |= {"model": self.settings.model.model_dump(mode="json"), "trains": self.options.trains}
        row = {"best_before": None, "threshold": None} | row
        row |= {"editing": self.editing, "settings": json.dumps(settings, sort_keys=True)}
        name = f"{self.editing}.{row['round']}"
        with self._session() as current:
            item = {"item_id": name, "key": digest([CODE_VERSION, name]), "attempts": 0, "cost": 0.0}
            root = str(current.corpus.root)
            work = Task("edit", UNIT, [item], self.settings, self.editing, root, current.run_id)
            current.ledger.load([commit(work, [Outcome(name, {"edit_rounds": [row]})], []).name])
            current.record_run(ended=True)
            current.publish()
        return row

    @contextmanager
    def _session(self) -> Iterator[Session]:
        """Open the corpus for writing; it stays closed while a student trains, so that a build can run."""
        with session(self.options.corpus, None, [], self.options.command, create=False) as (current, _):
            yield current


@lru_cache(maxsize=64)
def hash_of(weights: Path) -> str:
    """Hash the tensors without the header, because files of the same weights may order their metadata differently."""
    digest_of = hashlib.sha256()
    with safe_open(weights, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest_of.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest_of.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest_of.hexdigest()[:16]


def _spans(videos: Sequence[VideoClips], rows: pa.Table) -> Spans:
    """Collect the boundaries after a round for videos with rows in it, in the order of their clips."""
    columns = (rows[name].to_pylist() for name in ("clip_id", "start_s", "end_s"))
    of_clip = {clip_id: (start, end) for clip_id, start, end in zip(*columns, strict=True)}
    return {
        video.video_id: np.array([of_clip[clip_id] for clip_id in video.clip_ids])
        for video in videos
        if video.clip_ids[0] in of_clip
    }
