"""Train the students of an editing: ordinary training runs on edited clips, one per round, or per round and fold.

Each starts from the weights of the previous one, even if its round was reverted, with a new optimiser and schedule. A
killed student resumes like any other run. With two folds, each half of the videos has a student that is trained on it,
and is edited by the other half's teacher.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from clipmill.base.atomic_file import write_text
from clipmill.base.errors import UserError
from pipeline.editing.clips import Items
from pipeline.editing.settings import EditRunSettings
from training.data.selection import Selection, freeze
from training.evaluation.retrieval import evaluate
from training.models import registry as models
from training.parallel.distributed import join
from training.run.best_checkpoint import chosen_checkpoint
from training.run.folder import RunFolder
from training.run.settings import RunSettings
from training.run.setup import Request
from training.trainer import train

VALIDATION, TRAINING = "edit_validation", "edit_clips"  # tables of clip ids in the conditions of students' settings


@dataclass(frozen=True)
class Editing:
    """An editing and its options. `settings` include the students'; `editing` is its name in the rows."""

    editing: str
    corpus: Path
    out: Path
    settings: EditRunSettings
    where: str
    trains: bool
    workers: int = 1
    command: str = ""

    @property
    def teacher_path(self) -> Path:
        return self.out / "teacher" / "model.safetensors"

    @cached_property
    def items(self) -> Items:
        return Items(self.out / "clips.arrow")

    @property
    def run_settings(self) -> RunSettings:
        return RunSettings.model_validate(self.settings.model_dump(exclude={"edit"}))


class Students:
    """The students of an editing and their runs."""

    def __init__(self, options: Editing):
        self.options = options

    @property
    def folds(self) -> list[int | None]:
        """Return the fold of videos of each student; None: all videos."""
        return [0, 1] if self.options.settings.edit.folds == 2 else [None]

    def weights(self, round_number: int) -> list[Path]:
        """Return the weights of a round's students; of round 0 the initial ones. Raises UserError if missing."""
        return [self._weights(round_number, fold) for fold in self.folds]

    def begin(self) -> list[Path]:
        """Return the teachers: the given one, or two trained like it on half of the videos each."""
        for fold in self.folds:
            if fold is not None:
                self._run(0, fold, {})
        return self.weights(0)

    def train(self, round_number: int) -> float:
        """Train a round's students to their end; return their mean R@1 on the videos held out."""
        epochs, before = self.options.settings.edit.epochs, self.weights(round_number - 1)
        changes = {"data.edits": f"{self.options.editing}:{round_number}", "train.epochs": epochs}
        changes |= {"train.max_steps": None, "eval.every": None}
        recalls = [
            self._run(round_number, fold, changes | {"model.weights": str(weights)})
            for fold, weights in zip(self.folds, before, strict=True)
        ]
        return float(np.mean(recalls))

    def validate(self, weights: list[Path]) -> float:
        """Compute the mean R@1 of these weights on the videos held out."""
        path, settings = self.options.out / "validation.arrow", self.options.run_settings
        freeze(path, self.options.corpus, f"SELECT clip_id FROM {VALIDATION}", tables=self._tables(None))
        recalls = []
        for of_one in weights:
            with join(settings.train.device) as process:
                model = models.read(of_one, settings.model, settings.data.seed).to(process.device)
                recalls.append(evaluate(model, Selection(path), settings, process)["t2v"]["r1"])
        return float(np.mean(recalls))

    def _weights(self, round_number: int, fold: int | None) -> Path:
        if round_number == 0 and fold is None:
            return self.options.teacher_path
        run = RunFolder(self._folder(round_number, fold))
        if not run.exists:
            raise UserError(
                f"{run.root} does not exist, but the corpus has that round of editing {self.options.editing}: give "
                "--out the folder that it was started in."
            )
        return run.checkpoints.path(chosen_checkpoint(run).step) / "model.safetensors"

    def _folder(self, round_number: int, fold: int | None) -> Path:
        name = f"round-{round_number:02d}" if round_number else "warm-up"
        return self.options.out / (name if fold is None else f"{name}-fold-{fold + 1}")

    def _run(self, round_number: int, fold: int | None, changes: Mapping[str, Any]) -> float:
        """Train a run on the clips to edit, of one fold; return its last R@1, 0 if nothing is held out."""
        folder, tables = self._folder(round_number, fold), self._tables(fold)
        settings = self.options.run_settings.model_dump(mode="json")
        settings["data"]["where"] = f"SELECT clip_id FROM {TRAINING}"
        held_out = f"SELECT clip_id FROM {VALIDATION}" if VALIDATION in tables else ""
        settings["eval"] |= {"where": held_out, "overlap": "exclude"}
        for name, value in changes.items():
            section, _, key = name.partition(".")
            settings[section][key] = value
        recipe = folder.with_name(f"{folder.name}.yaml")
        write_text(recipe, yaml.safe_dump(settings, sort_keys=False))
        files = tuple((name, str(path)) for name, path in tables.items())
        report = train(Request(str(folder), str(self.options.corpus), str(recipe), (), files, self.options.command))
        if report.reason != "done":
            raise KeyboardInterrupt  # a signal stopped the run, so the editing stops, too
        if not held_out:
            return 0.0
        return float(json.loads((folder / "eval.jsonl").read_text().splitlines()[-1])["t2v"]["r1"])

    def _tables(self, fold: int | None) -> dict[str, Path]:
        """Write files of clip ids: those to train on and those to validate on."""
        out, items = self.options.out, self.options.items
        suffix = "" if fold is None else f"-fold-{fold + 1}"
        ids = {TRAINING: items.ids("edit", fold), VALIDATION: items.ids("validation")}
        paths = {TRAINING: out / f"train{suffix}.parquet", VALIDATION: out / "validation.parquet"}
        for name, path in paths.items():
            pq.write_table(pa.table({"clip_id": pa.array(ids[name], pa.string())}), path)
        return {name: path for name, path in paths.items() if ids[name]}
