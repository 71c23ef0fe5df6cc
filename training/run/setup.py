"""Prepare a run: resolve its settings, select and freeze its clips, write its folder.

The first process of a run calls `prepare`; every process then opens the result. A run with a checkpoint keeps the clips
that it froze at its start.
"""

from dataclasses import dataclass

from clipmill.base.errors import UserError
from training.data.selection import Selection, freeze_run
from training.data.selection_schema import EVAL_FILE
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
        selection_hash = Selection(folder.selection_path).hash
    command = saved.command if saved else request.command
    folder.save(RunRecord(str(corpus), command, selection_hash, settings.model_dump(mode="json")))
    return notes
