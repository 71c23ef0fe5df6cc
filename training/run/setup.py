"""Prepare a run: resolve its settings, select and freeze its clips, write its folder.

The first process of a run calls `prepare`; every process then opens the result. A run with a checkpoint keeps the clips
that it froze at its start.
"""

import functools
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from clipmill.base.errors import UserError
from training.data.selection import Selection, freeze_run
from training.data.selection_schema import EVAL_FILE
from training.losses import load_loss
from training.run.folder import RunFolder, RunRecord
from training.run.settings import RunSettings, resolve


@dataclass(frozen=True)
class Request:
    """A `clipmill train` command, with which any process can take part in the run."""

    run: str
    corpus: str | None = None  # None: the corpus of the existing run
    recipe: str | None = None
    assignments: tuple[str, ...] = ()  # of --set
    tables: tuple[tuple[str, str], ...] = ()  # of --table: (name, file)
    command: str = ""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to train; each process opens its own."""

    folder: RunFolder
    settings: RunSettings
    selection: Selection
    held_out: Selection | None
    corpus: str

    @classmethod
    def open(cls, folder: RunFolder) -> "Prepared":
        """Open a run that `prepare` has prepared. Raises UserError if its selection file was replaced."""
        record = folder.load()
        settings = resolve(record.settings, None, [])
        selection = Selection(folder.selection_path)
        if selection.hash != record.selection_hash:
            raise UserError(f"{selection.path} is not the run's original selection: restore the original file.")
        held_out = Selection(folder.root / EVAL_FILE) if settings.eval.where.strip() else None
        return cls(folder, settings, selection, held_out, record.corpus)


def requested_settings(request: Request, folder: RunFolder) -> RunSettings:
    """Resolve the run's saved settings, or the recipe's, with the command's on top; do not check changes."""
    saved = folder.load().settings if folder.exists else None
    return resolve(saved, request.recipe, list(request.assignments))


def prepare(request: Request, folder: RunFolder) -> list[str]:
    """Create the run, or bring its settings up to date; return notes for the user. The caller holds the run's lock.

    Raises UserError; once the run has a checkpoint, also for a change of a setting that would make it another run.
    """
    saved = folder.load() if folder.exists else None
    settings = requested_settings(request, folder)  # under the lock, because another command may have changed the run
    corpus = request.corpus or (saved.corpus if saved else None)
    if corpus is None:
        raise UserError(f"--corpus is missing: {folder.root} is a new run, which needs a corpus.")
    notes = [f"changed: {line}" for line in folder.changes(settings)]
    if folder.checkpoints.steps():
        selection_hash = saved.selection_hash
    else:
        selected = freeze_run(folder.root, corpus, settings.data, settings.eval, dict(request.tables))
        notes += [note for clips in selected if clips for note in clips.notes()]
        selection = Selection(folder.selection_path)
        notes += _require_texts(selection, settings)
        if selected[1]:
            _require_queries(Selection(folder.root / EVAL_FILE), settings)
        selection_hash = selection.hash
    command = saved.command if saved else request.command
    folder.save(RunRecord(str(corpus), command, selection_hash, settings.model_dump(mode="json")))
    return notes


def _require_texts(selection: Selection, settings: RunSettings) -> list[str]:
    """Raise UserError if no clip has a text that the loss compares, because the loss would be 0.

    Returns a note on the clips without one.
    """
    loss = load_loss(settings.train.loss)
    columns = {"subtitle": settings.data.subtitle, "caption": "caption"}
    names = [column for source, column in columns.items() if source in loss.sources]
    names += ["neighbours"] if loss.takes_neighbours and settings.data.neighbours else []
    if not names:
        return []
    num_without = selection.num_clips - _num_with_text(selection, names)
    compared = f"train.loss = {settings.train.loss} compares clips with {' and '.join(names)}"
    if num_without == selection.num_clips:
        raise UserError(
            f"{compared}, and none of the {num_without:,} selected clips has such a text. Choose other clips "
            "(data.where), another text (data.subtitle) or another train.loss. In plain tars the texts of KEY.mp4 are "
            "KEY.txt and KEY.json."
        )
    return [f"{num_without:,} of {selection.num_clips:,} clips have no text: {compared}"] if num_without else []


def _require_queries(held_out: Selection, settings: RunSettings) -> None:
    """Raise UserError if no evaluation clip has a text, before the training and not at its first evaluation."""
    if not _num_with_text(held_out, [settings.eval.text]):
        raise UserError(
            f"eval.text = {settings.eval.text}: none of the {held_out.num_clips:,} clips of eval.where has such a "
            "text. Choose another eval.text or eval.where."
        )


def _num_with_text(selection: Selection, names: list[str]) -> int:
    """Count the clips with a text that is not blank in one of the columns of strings or lists of strings."""
    found = 0
    for chunks in zip(*(selection.column(name).chunks for name in names), strict=True):
        found += pc.sum(functools.reduce(pc.or_, map(_has_text, chunks))).as_py() or 0
    return found


def _has_text(column: pa.Array) -> pa.Array:
    """Return for each row whether it has a text that is not blank."""
    if not pa.types.is_list(column.type):
        return pc.fill_null(pc.greater(pc.binary_length(pc.utf8_trim_whitespace(column)), 0), False)
    rows = pc.list_parent_indices(column).filter(_has_text(column.flatten()))
    return pc.is_in(pa.array(range(len(column)), rows.type), value_set=rows)
