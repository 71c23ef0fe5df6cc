"""`clipmill edit`: a teacher moves the boundaries of a corpus's clips, round by round; rows, never other clips."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from clipmill.base.errors import UserError
from clipmill.base.file_lock import take_lock
from clipmill.base.settings import digest, read_yaml
from clipmill.cli.display import plain_console
from pipeline.editing.clips import Items, freeze_items
from pipeline.editing.host import CorpusHost, hash_of
from pipeline.editing.report import show
from pipeline.editing.students import Editing
from pipeline.editing.worker import CODE_VERSION
from pipeline.engine.build import difference
from pipeline.engine.settings import resolve
from shards.corpus.folder import Corpus, write_text_atomically
from training.data.selection import EVAL_FILE, Selection
from training.editing.rounds import HELD
from training.editing.settings import EditRunSettings, EditSettings, resolve_edit
from training.models import registry as models
from training.run.best_checkpoint import chosen_checkpoint
from training.run.folder import RunFolder


@dataclass(frozen=True)
class EditRequest:
    """A `clipmill edit` command.

    corpus, model  None: OUT's. A model is a run, whose best or else latest checkpoint is taken with its settings, or
                   what `model.init` may be, with those of `recipe`
    where          a condition on `catalog`, or a SELECT with clip_id; None: the run's data.where on its own corpus
    rounds         at most so many; 0: one, and no student
    trains         False: the given teacher edits all rounds, and no student is trained; None: OUT's, else True
    workers        processes that score, on Ray when more than one
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
        """`--set`, and what other options set."""
        return [*self.assignments, *([f"edit.max_rounds={max(1, self.rounds)}"] if self.rounds is not None else [])]

    @property
    def wants_students(self) -> bool | None:
        return False if self.rounds == 0 else self.trains

    def check(self) -> None:
        """Raises UserError."""
        if self.rounds is not None and self.rounds < 0:
            raise UserError(f"--rounds {self.rounds}: give 0 for one round by the given teacher alone, or more.")
        if self.rounds == 0 and self.trains:
            raise UserError("--rounds 0 is one round by the given teacher alone; it goes without --train.")
        if self.workers < 1:
            raise UserError(f"--workers {self.workers}: at least 1 process has to score.")


def run_edit(request: EditRequest, console: Console | None = None) -> list[dict[str, Any]]:
    """Edits, or goes on editing in OUT; prints and returns the rows of `edit_rounds`. Raises UserError."""
    request.check()
    console = console or plain_console()
    out = request.out.expanduser().absolute()
    with _writer(out):
        saved = _load(out)
        editing = _begin(out, request) if saved is None else _resume(out, saved, request)
        host = CorpusHost(editing)
        console.print(f"[bold]editing {host.editing}[/] of {escape(str(editing.corpus))}", soft_wrap=True)
        rows = host.play(lambda row: show(row, console))
    _say_what_next(host, rows, console)
    return rows


# --- Beginning


def _begin(out: Path, request: EditRequest) -> Editing:
    """The folder of a new editing: its clips, its teacher, and last its settings."""
    if request.corpus is None or request.model is None:
        raise UserError(f"--corpus and --model are missing: {out} is no editing yet that would know them.")
    corpus = Corpus(request.corpus).require().root
    run = RunFolder(request.model) if RunFolder(request.model).exists else None
    if run:
        settings, where, never = _of_run(run, corpus, request)
    else:
        settings, where, never = _of_model(request.model, request.recipe, request.settings), "", frozenset()
    _refuse_settings_of_others(settings)
    where = where if request.where is None else request.where
    trains = request.wants_students is not False
    freeze_items(
        out / "clips.arrow", corpus, where, settings.edit, trains=trains, never=never, tables=dict(request.tables)
    )
    teacher = _copy_teacher(run, settings, out / "teacher")
    editing = _name(teacher, settings, Items(out / "clips.arrow"), corpus, trains)
    saved = {"editing": editing, "corpus": str(corpus), "where": where, "trains": trains}
    saved |= {"settings": settings.model_dump(mode="json")}
    text = "# An editing of clips' boundaries. Go on with `clipmill edit --out DIR`.\n"
    write_text_atomically(out / "edit.yaml", text + yaml.safe_dump(saved, sort_keys=False, allow_unicode=True))
    return Editing(editing, corpus, out, settings, where, trains, request.workers, request.command)


def _refuse_settings_of_others(settings: EditRunSettings) -> None:
    """Raises UserError for what only a host without a corpus does."""
    for name in ("initial", "half_length_s", "warmup_patience", "max_warmup_epochs"):
        if getattr(settings.edit, name) != EditSettings.model_fields[name].default:
            raise UserError(
                f"edit.{name}: a corpus's clips begin with their spans, its teacher with what it was taught."
            )


def _of_run(run: RunFolder, corpus: Path, request: EditRequest) -> tuple[EditRunSettings, str, frozenset[str]]:
    """The settings; the condition of the run's clips; the videos that the run is measured on and that stay."""
    if request.recipe:
        raise UserError("--recipe goes with a model's file: a run has its own settings, which --set changes.")
    record = run.load()
    settings = resolve_edit(record.settings, None, request.settings)
    if Path(record.corpus) != corpus:
        return settings, "", frozenset()
    measured = run.root / EVAL_FILE
    never = Selection(measured).column("video_id").to_pylist() if measured.exists() else []
    return settings, settings.data.where, frozenset(never)


def _of_model(model: str, recipe: str | None, assignments: list[str]) -> EditRunSettings:
    """Without a recipe texts are cut at what the model reads, and precision is full."""
    assignments = [f"model.init={json.dumps(model)}", *assignments]
    if recipe:
        return resolve_edit({}, recipe, assignments)
    base: dict[str, Any] = {"train": {"precision": "fp32"}}
    settings = resolve_edit(base, None, assignments)
    limit = min(settings.data.max_text_tokens, models.config_of(settings.model).context_length)
    return resolve_edit(base | {"data": {"max_text_tokens": limit}}, None, assignments)


def _name(teacher: Path, settings: EditRunSettings, items: Items, corpus: Path, trains: bool) -> str:
    """A hash of everything that decides an editing's rows but how many rounds there are."""
    cut = resolve(Corpus(corpus).load_settings(), None, []).cut
    parts = [CODE_VERSION, hash_of(teacher), settings.edit.fingerprint(), settings.model.fingerprint()]
    parts += [settings.data.fingerprint(), cut.fingerprint(), items.hash, trains]
    if trains or settings.edit.folds == 2:
        parts += [settings.train.fingerprint(), settings.eval.text]
    return f"e{digest(parts)[:12]}"


def _copy_teacher(run: RunFolder | None, settings: EditRunSettings, folder: Path) -> Path:
    """The weights it begins with, kept because a run goes on and drops old checkpoints."""
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


# --- Going on


def _load(out: Path) -> dict[str, Any] | None:
    path = out / "edit.yaml"
    if not path.exists():
        return None
    try:
        saved = read_yaml(path.read_text())
        return {name: saved[name] for name in ("editing", "corpus", "where", "trains", "settings")}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as an editing's settings: {error}") from error


def _resume(out: Path, saved: dict[str, Any], request: EditRequest) -> Editing:
    """What OUT is of. Raises UserError where the command asks for something else.

    How far it goes may change, and how the work is done; the model is the one that was copied when it began.
    """
    if request.recipe:
        raise UserError(f"--recipe: {out} has begun with its settings. Give --out another folder.")
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
        raise UserError(f"{out} was begun otherwise:\n{lines}\nGo on with the old values, or give --out a new folder.")
    own = (saved["editing"], Path(saved["corpus"]), out, settings, saved["where"], saved["trains"])
    return Editing(*own, request.workers, request.command)


def _decisive(settings: EditRunSettings) -> dict[str, Any]:
    """Settings without those that only say how far or how quickly."""
    sections = {name: getattr(settings, name) for name in type(settings).model_fields}
    return {name: section.model_dump(mode="json", exclude=section._operational()) for name, section in sections.items()}


@contextmanager
def _writer(out: Path) -> Iterator[None]:
    """One process at a time in OUT. Raises UserError for a folder that is something else or cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / ".lock").exists() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise UserError(f"{out} is not empty and no editing: give --out a new or an empty folder.")
        lock = open(out / ".lock", "a")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from error
    with lock:
        if not take_lock(lock):
            raise UserError(f"{out} is being worked on by another process. Stop it, or give --out another folder.")
        yield


def _say_what_next(host: CorpusHost, rows: Sequence[dict[str, Any]], console: Console) -> None:
    held = [row["round"] for row in rows if row["outcome"] in HELD and row["num_accepted"]]
    if not held:
        said = "No round held: the clips stay as they are."
    else:
        said = f"Rounds that held: {', '.join(map(str, held))}. Their clips are cut again beside the old ones.\n"
        said += f"  clipmill train --corpus {host.asked.corpus} --run DIR --set data.edits={host.editing}:accepted …"
    console.print(said, soft_wrap=True, markup=False, highlight=False)
