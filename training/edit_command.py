"""`clipmill edit`: a teacher moves the boundaries of a corpus's clips, round by round; rows, never other clips."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from pipeline.build import difference
from pipeline.corpus import Corpus, take_lock, write_text_atomically
from pipeline.display import plain_console
from pipeline.errors import UserError
from training import models
from training.edit_clips import freeze_items
from training.edit_host import CorpusHost, Editing
from training.edit_report import show
from training.edit_settings import EditRunSettings, resolve_edit
from training.run_folder import RunFolder
from training.selection import EVAL_FILE, Selection


def run_edit(
    corpus: str | Path | None,
    model: str | None,
    out: str | Path,
    *,
    recipe: str | None = None,
    where: str | None = None,
    rounds: int | None = None,
    trains: bool | None = None,
    workers: int = 1,
    assignments: Sequence[str] = (),
    tables: Sequence[tuple[str, str]] = (),
    command: str = "",
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Edits, or goes on editing in OUT; prints and returns the rows of `edit_rounds`. Raises UserError.

    corpus, model  None: OUT's. A model is a run, whose latest checkpoint is taken with its settings, or what
                   `model.init` may be, with those of `recipe`
    where          a condition on `catalog`, or a SELECT with clip_id; None: the run's data.where on its own corpus
    rounds         at most so many; 0: one, and no student
    trains         False: the given teacher edits all rounds, and no student is trained; None: OUT's, else True
    """
    out = Path(out).expanduser().absolute()
    console = console or plain_console()
    if rounds is not None and rounds < 0:
        raise UserError(
            f"--rounds {rounds}: 0 is edits by the given teacher alone, 1 or more are rounds with students."
        )
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 process has to score.")
    if rounds == 0:
        rounds, trains = 1, False
    assignments = [*assignments, *([f"edit.max_rounds={rounds}"] if rounds else [])]
    with _writer(out):
        saved = _load(out)
        trains = (saved["trains"] if saved else True) if trains is None else trains
        asked = _resume(out, saved, corpus, model, recipe, where, trains, workers, assignments, command)
        if saved is None:
            asked = _begin(out, corpus, model, recipe, where, trains, workers, assignments, dict(tables), command)
        host = CorpusHost(asked)
        console.print(f"[bold]editing {host.editing}[/] of {escape(str(asked.corpus))}", soft_wrap=True)
        rows = host.play(lambda row: show(row, console))
        _next(host, rows, console)
    return rows


# --- Beginning


def _begin(
    out: Path,
    corpus: str | Path | None,
    model: str | None,
    recipe: str | None,
    where: str | None,
    trains: bool,
    workers: int,
    assignments: list[str],
    tables: dict[str, str],
    command: str,
) -> Editing:
    """The folder of a new editing: its clips and its teacher, and last its settings."""
    if corpus is None or model is None:
        raise UserError(f"--corpus and --model are missing: {out} is no editing yet that would know them.")
    root = Corpus(corpus).require().root
    run = RunFolder(model) if RunFolder(model).exists else None
    settings, where_of_run, never = _settings(run, model, root, recipe, assignments)
    where = where if where is not None else where_of_run
    freeze_items(out / "clips.arrow", root, where, settings.edit, trains=trains, never=never, tables=tables)
    _copy_teacher(run, settings, out / "teacher")
    saved = {"corpus": str(root), "where": where, "trains": trains, "settings": settings.model_dump(mode="json")}
    text = "# An editing of clips' boundaries. Go on with `clipmill edit --out DIR`.\n"
    write_text_atomically(out / "edit.yaml", text + yaml.safe_dump(saved, sort_keys=False, allow_unicode=True))
    return Editing(root, out, settings, where, trains, workers, command)


def _settings(
    run: RunFolder | None, model: str, corpus: Path, recipe: str | None, assignments: list[str]
) -> tuple[EditRunSettings, str, frozenset[str]]:
    """The settings; the condition of the run's clips; the videos that the run is measured on and that stay."""
    if run is None:
        return _settings_of_model(model, recipe, assignments), "", frozenset()
    if recipe:
        raise UserError("--recipe goes with a model's file: a run has its own settings, which --set changes.")
    record = run.load()
    settings = resolve_edit(record.settings, None, assignments)
    measured = run.root / EVAL_FILE
    same_corpus = Path(record.corpus) == corpus
    never: frozenset[str] = frozenset()
    if same_corpus and measured.exists():
        never = frozenset(Selection.open(measured).column("video_id").to_pylist())
    return settings, settings.data.where if same_corpus else "", never


def _settings_of_model(model: str, recipe: str | None, assignments: list[str]) -> EditRunSettings:
    """Without a recipe texts are cut at what the model reads, and precision is full."""
    assignments = [f"model.init={json.dumps(model)}", *assignments]
    if recipe:
        return resolve_edit({}, recipe, assignments)
    base: dict[str, Any] = {"train": {"precision": "fp32"}}
    settings = resolve_edit(base, None, assignments)
    limit = min(settings.data.max_text_tokens, models.config_of(settings.model).context_length)
    return resolve_edit(base | {"data": {"max_text_tokens": limit}}, None, assignments)


def _copy_teacher(run: RunFolder | None, settings: EditRunSettings, folder: Path) -> None:
    """The weights it begins with, kept because a run goes on and drops old checkpoints."""
    if run is None:
        model = models.load(settings.model, settings.data.seed)
        models.writer(model)(model.state_dict(), folder)
        return
    step = run.checkpoints.find_latest()
    if step is None:
        raise UserError(f"--model {run.root} has no checkpoint yet: nothing that could edit.")
    source = run.checkpoints.path(step)
    folder.mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


# --- Going on


def _load(out: Path) -> dict[str, Any] | None:
    path = out / "edit.yaml"
    if not path.exists():
        return None
    try:
        saved = yaml.safe_load(path.read_text())
        return {name: saved[name] for name in ("corpus", "where", "trains", "settings")}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as an editing's settings: {error}") from error


def _resume(
    out: Path,
    saved: dict[str, Any] | None,
    corpus: str | Path | None,
    model: str | None,
    recipe: str | None,
    where: str | None,
    trains: bool,
    workers: int,
    assignments: list[str],
    command: str,
) -> Editing | None:
    """What OUT is of; None: nothing yet. Raises UserError where the command asks for something else.

    How far it goes may change, and how the work is done; the model is the one that was copied when it began.
    """
    if saved is None:
        return None
    if recipe:
        raise UserError(f"--recipe: {out} has begun with its settings. Give --out another folder.")
    settings = resolve_edit(saved["settings"], None, assignments)
    asked = {"corpus": str(Path(corpus).absolute()) if corpus else saved["corpus"], "where": where or saved["where"]}
    asked |= {"trains": trains}
    before = resolve_edit(saved["settings"], None, [])
    changed = difference(_decisive(before), _decisive(settings))
    changed += difference({name: saved[name] for name in asked}, asked)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise UserError(f"{out} was begun otherwise:\n{lines}\nGo on with the old values, or give --out a new folder.")
    return Editing(Path(saved["corpus"]), out, settings, saved["where"], saved["trains"], workers, command)


def _decisive(settings: EditRunSettings) -> dict[str, Any]:
    """Settings without those that only say how far or how quickly."""
    return {
        name: getattr(settings, name).model_dump(mode="json", exclude=getattr(settings, name)._operational())
        for name in type(settings).model_fields
    }


@contextmanager
def _writer(out: Path) -> Iterator[None]:
    """One process at a time in OUT. Raises UserError for a folder that is something else or cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / ".lock").exists() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise UserError(f"{out} is not empty and no editing: give --out a new or an empty folder.")
        with open(out / ".lock", "a") as file:
            if not take_lock(file):
                raise UserError(f"{out} is being worked on by another process. Stop it, or give --out another folder.")
            yield
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from error


def _next(host: CorpusHost, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """What became of it, and how to use it."""
    held = [row["round"] for row in rows if row["outcome"] in ("kept", "untrained") and row["num_accepted"]]
    if not held:
        console.print("No round held: the clips stay as they are.")
        return
    console.print(
        f"Rounds that held: {', '.join(map(str, held))}. Their clips are cut again beside the old ones.\n"
        f"  clipmill train --corpus {host.asked.corpus} --run DIR --set data.edits={host.editing}:accepted …",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
