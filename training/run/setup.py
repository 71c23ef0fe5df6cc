"""What happens before the first step: settings resolved, clips chosen and frozen, the run folder ready.

Done by a run's first process alone; the others open what it has made. A run that has begun keeps what it froze then.
"""

from dataclasses import dataclass
from pathlib import Path

from clipmill.base.errors import UserError
from training.data.selection import EVAL_FILE, Choice, Selection, Tables, freeze_run
from training.run.folder import RunFolder, RunRecord
from training.settings import RunSettings, resolve


@dataclass(frozen=True)
class Request:
    """A `clipmill train` command: enough for any process of it to take part."""

    run: str
    corpus: str | None = None  # None: the one that the run began with
    recipe: str | None = None
    assignments: tuple[str, ...] = ()  # of --set
    tables: tuple[tuple[str, str], ...] = ()  # of --table: (name, file)
    command: str = ""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to train, as every process opens it."""

    folder: RunFolder
    settings: RunSettings
    selection: Selection
    held_out: Selection | None
    corpus: str

    @classmethod
    def open(cls, run: str | Path) -> "Prepared":
        folder = RunFolder(run).require()
        record = folder.load()
        settings = resolve(record.settings, None, [])
        selection = Selection.open(folder.selection_path)
        if selection.hash != record.selection_hash:
            raise UserError(f"{selection.path} is not the selection that the run began with: put that one back.")
        held_out = Selection.open(folder.root / EVAL_FILE) if settings.eval.where.strip() else None
        return cls(folder, settings, selection, held_out, record.corpus)


def requested_settings(request: Request) -> RunSettings:
    """What the run's saved settings become with those of the command; nothing is checked against the run yet."""
    folder = RunFolder(request.run)
    saved = folder.load().settings if folder.exists else None
    return resolve(saved, request.recipe, list(request.assignments))


def prepare(request: Request) -> list[str]:
    """Makes the run, or brings its settings up to date; the caller holds its lock. Returns what a person should hear.

    Raises UserError, for a run that has begun also where a setting changes that makes it another run.
    """
    folder = RunFolder(request.run)
    saved = folder.load() if folder.exists else None
    settings = requested_settings(request)
    corpus = request.corpus or (saved.corpus if saved else None)
    if corpus is None:
        raise UserError(f"--corpus is missing: {folder.root} is no run yet that would know its corpus.")
    notes = [f"changed: {line}" for line in folder.changes(settings)]
    if folder.checkpoints.steps():
        selection_hash = saved.selection_hash
    else:
        notes += _freeze(folder, corpus, settings, dict(request.tables))
        selection_hash = Selection.open(folder.selection_path).hash
    command = saved.command if saved else request.command
    folder.save(RunRecord(str(corpus), command, selection_hash, settings.model_dump(mode="json")))
    return notes


def _freeze(folder: RunFolder, corpus: str, settings: RunSettings, tables: Tables) -> list[str]:
    training, held_out = freeze_run(folder.root, corpus, settings.data, settings.eval, tables)
    choices: list[Choice] = [training, *([held_out] if held_out else [])]
    return [note for choice in choices for note in choice.notes()]
