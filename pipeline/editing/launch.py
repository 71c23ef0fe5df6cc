"""Start or resume an editing: resolve settings, freeze clips, copy the teacher, then run all rounds.

Nothing is printed: `on_start` and `on_round` report progress.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clipmill.base.atomic_file import write_text
from clipmill.base.errors import UserError
from clipmill.base.file_lock import take_lock
from clipmill.base.settings import digest, read_yaml
from pipeline.editing.clips import Items, freeze_items
from pipeline.editing.host import CorpusBackend, RoundDone, hash_of
from pipeline.editing.settings import EditRunSettings, resolve_edit
from pipeline.editing.students import Editing
from pipeline.editing.worker import CODE_VERSION
from pipeline.engine.build import difference
from pipeline.engine.settings import resolve
from shards.corpus.folder import Corpus
from training.data.selection import Selection
from training.data.selection_schema import EVAL_FILE
from training.editing.settings import EditSettings
from training.models import registry as models
from training.run.best_checkpoint import chosen_checkpoint
from training.run.folder import RunFolder


@dataclass(frozen=True)
class EditRequest:
    """A `clipmill edit` command.

    corpus, model  None: OUT's. The model is a run (its best, else latest checkpoint, with the run's settings), or any
                   value of `model.init`, with the settings of `recipe`
    where          a condition on `catalog`, or a SELECT with clip_id; None: the run's data.where on its own corpus
    rounds         largest number of rounds; 0: one round without a student
    trains         False: the given teacher edits all rounds and no student is trained; None: OUT's, else True
    workers        processes that score, on Ray if more than one
    """

    out: Path
    corpus: str | Path | None = None
    model: str | None = None
    recipe: str | None = None
    where: str | None = None
    rounds: int | None = None
    trains: bool | None = None
    workers: int = 1
    assignments: tuple[str, ...] = ()
    tables: tuple[tuple[str, str], ...] = ()
    command: str = ""

    @property
    def settings(self) -> list[str]:
        """Return the assignments of `--set` and of options that are short for a setting."""
        return [*self.assignments, *([f"edit.max_rounds={max(1, self.rounds)}"] if self.rounds is not None else [])]

    @property
    def wants_students(self) -> bool | None:
        return False if self.rounds == 0 else self.trains

    def check(self) -> None:
        """Raise UserError for options that contradict each other."""
        if self.rounds is not None and self.rounds < 0:
            raise UserError(f"--rounds {self.rounds}: give 0 for one round by the given teacher alone, or more.")
        if self.rounds == 0 and self.trains:
            raise UserError("--rounds 0 is one round by the given teacher alone: leave out --train.")
        if self.workers < 1:
            raise UserError(f"--workers {self.workers}: at least 1 process is needed.")


def launch_edit(
    request: EditRequest, on_start: Callable[[Editing], None], on_round: RoundDone
) -> tuple[Editing, list[dict[str, Any]], int]:
    """Start or resume the editing in OUT. Raises UserError.

    on_start  called with the editing before its first round
    on_round  called with each row of `edit_rounds`, also with those of earlier commands
    Returns the editing, its rows of `edit_rounds`, and how many of them earlier commands made.
    """
    request.check()
    out = request.out.expanduser().absolute()
    with _writer(out):
        saved = _load(out)
        editing = _start(out, request) if saved is None else _resume(out, saved, request)
        on_start(editing)
        backend = CorpusBackend(editing)
        return editing, backend.run(on_round), backend.num_recorded


# --- Starting


def _start(out: Path, request: EditRequest) -> Editing:
    """Create the folder of a new editing: its clips, its teacher, and last its settings."""
    if request.corpus is None or request.model is None:
        raise UserError(f"--corpus and --model are missing: {out} holds no editing yet, so give both.")
    corpus = Corpus(request.corpus).require().root
    run = RunFolder(request.model) if RunFolder(request.model).exists else None
    if run:
        settings, where, never = _of_run(run, corpus, request)
    else:
        settings, where, never = _of_model(request.model, request.recipe, request.settings), "", frozenset()
    for name in ("initial", "half_length_s", "warmup_patience", "max_warmup_epochs"):
        if getattr(settings.edit, name) != EditSettings.model_fields[name].default:
            raise UserError(
                f"edit.{name} has no effect here: a corpus's clips start from their spans and its teacher is trained."
            )
    where = where if request.where is None else request.where
    trains = request.wants_students is not False
    freeze_items(
        out / "clips.arrow", corpus, where, settings.edit, trains=trains, never=never, tables=dict(request.tables)
    )
    teacher = _copy_teacher(run, settings, out / "teacher")
    editing = _name(teacher, settings, Items(out / "clips.arrow"), corpus, trains)
    saved = {"editing": editing, "corpus": str(corpus), "where": where, "trains": trains}
    saved |= {"settings": settings.model_dump(mode="json")}
    text = "# An editing of clips' boundaries. Resume it with `clipmill edit --out DIR`.\n"
    write_text(out / "edit.yaml", text + yaml.safe_dump(saved, sort_keys=False, allow_unicode=True))
    return Editing(editing, corpus, out, settings, where, trains, request.workers, request.command)


def _of_run(run: RunFolder, corpus: Path, request: EditRequest) -> tuple[EditRunSettings, str, frozenset[str]]:
    """Return the settings, the condition of the run's clips, and the videos of its evaluation, which stay unedited."""
    if request.recipe:
        raise UserError("--recipe is for a model's file: a run has its own settings, which --set changes.")
    record = run.load()
    settings = resolve_edit(record.settings, None, request.settings)
    if Path(record.corpus) != corpus:
        return settings, "", frozenset()
    measured = run.root / EVAL_FILE
    never = Selection(measured).column("video_id").to_pylist() if measured.exists() else []
    return settings, settings.data.where, frozenset(never)


def _of_model(model: str, recipe: str | None, assignments: list[str]) -> EditRunSettings:
    """Resolve the settings; without a recipe texts are cut at the model's limit and precision is fp32."""
    assignments = [f"model.init={json.dumps(model)}", *assignments]
    if recipe:
        return resolve_edit({}, recipe, assignments)
    base: dict[str, Any] = {"train": {"precision": "fp32"}}
    settings = resolve_edit(base, None, assignments)
    limit = min(settings.data.max_text_tokens, models.config_of(settings.model).context_length)
    return resolve_edit(base | {"data": {"max_text_tokens": limit}}, None, assignments)


def _name(teacher: Path, settings: EditRunSettings, items: Items, corpus: Path, trains: bool) -> str:
    """Hash all inputs of an editing's rows except the number of rounds."""
    cut = resolve(Corpus(corpus).load_settings(), None, []).cut
    parts = [CODE_VERSION, hash_of(teacher), settings.edit.fingerprint(), settings.model.fingerprint()]
    parts += [settings.data.fingerprint(), cut.fingerprint(), items.hash, trains]
    if trains or settings.edit.folds == 2:
        parts += [settings.train.fingerprint(), settings.eval.text]
    return f"e{digest(parts)[:12]}"


def _copy_teacher(run: RunFolder | None, settings: EditRunSettings, folder: Path) -> Path:
    """Copy the teacher's weights, because a resumed run deletes old checkpoints; return the file."""
    weights = folder / "model.safetensors"
    if run is None:
        model = models.load(settings.model, settings.data.seed)
        models.writer(model)(model.state_dict(), folder)
        return weights
    source = run.checkpoints.path(chosen_checkpoint(run).step)
    folder.mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    return weights


# --- Resuming


def _load(out: Path) -> dict[str, Any] | None:
    """Read edit.yaml; return None if it does not exist. Raises UserError if it cannot be read."""
    path = out / "edit.yaml"
    if not path.exists():
        return None
    try:
        saved = read_yaml(path.read_text())
        return {name: saved[name] for name in ("editing", "corpus", "where", "trains", "settings")}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as an editing's settings: {error}") from error


def _resume(out: Path, saved: dict[str, Any], request: EditRequest) -> Editing:
    """Open the editing in OUT. Raises UserError if the command's options differ from it.

    The number of rounds and operational settings may change; the model is the one copied at the start.
    """
    if request.recipe:
        raise UserError(f"--recipe: {out} already has its settings. Give --out another folder.")
    settings = resolve_edit(saved["settings"], None, request.settings)
    changed = difference(_decisive(resolve_edit(saved["settings"], None, [])), _decisive(settings))
    asked = {
        "corpus": str(Path(request.corpus).expanduser().absolute()) if request.corpus else None,
        "where": request.where,
        "trains": request.wants_students,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    changed += difference({name: saved[name] for name in given}, given)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise UserError(
            f"{out} was started with other options:\n{lines}\nKeep the old values, or give --out a new folder."
        )
    own = (saved["editing"], Path(saved["corpus"]), out, settings, saved["where"], saved["trains"])
    return Editing(*own, request.workers, request.command)


def _decisive(settings: EditRunSettings) -> dict[str, Any]:
    """Dump the settings without the operational ones."""
    sections = {name: getattr(settings, name) for name in type(settings).model_fields}
    return {name: section.model_dump(mode="json", exclude=section._operational()) for name, section in sections.items()}


@contextmanager
def _writer(out: Path) -> Iterator[None]:
    """Hold OUT's lock. Raises UserError if another process holds it, or if OUT holds other files or is not writable."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / ".lock").exists() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise UserError(f"{out} is not empty and holds no editing: give --out a new or an empty folder.")
        lock = open(out / ".lock", "a")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from error
    with lock:
        if not take_lock(lock):
            raise UserError(f"{out} is in use by another process. Stop it, or give --out another folder.")
        yield
