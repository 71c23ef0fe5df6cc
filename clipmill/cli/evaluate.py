"""`clipmill eval`: a checkpoint of a run, or any model, searched on clips of a corpus; the answer as table or JSON.

One process, or several under `torchrun`: the same numbers.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from clipmill.base.console import plain_console, print_failures
from clipmill.base.errors import UserError
from training.data.selection import EVAL_FILE, SELECTION_FILE, Selection, freeze
from training.evaluation.retrieval import evaluate, similarity_format
from training.models import registry as models
from training.models.clip_vip import ClipVip
from training.parallel.distributed import Process, join
from training.run.best_checkpoint import chosen_checkpoint
from training.run.folder import RunFolder
from training.settings import RunSettings, resolve

Format = Literal["table", "json"]
ROWS = {"t2v": "text → video", "v2t": "video → text", "t2v_dsl": "text → video, DSL", "v2t_dsl": "video → text, DSL"}


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    name: str
    model: ClipVip
    settings: RunSettings
    corpus: str | None  # of the run, for when no other is given
    trained_on: Path | None  # the run's frozen selection
    chosen_on: Path | None = None  # the one whose evaluation chose the checkpoint


def run_eval(
    run: str | Path | None = None,
    model: str | None = None,
    corpus: str | Path | None = None,
    *,
    recipe: str | None = None,
    select: str | None = None,
    where: str | None = None,
    text: str | None = None,
    dsl: bool = False,
    checkpoint: str | None = None,
    ema: bool = False,
    save_similarity: str | Path | None = None,
    assignments: Sequence[str] = (),
    format: Format = "table",
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates, prints, and returns the metrics of `training.evaluation.retrieval.evaluate` with `model`, `corpus`, `where`.

    run, model     one of them: a run folder, with the run's settings; or what `model.init` may be, with the settings of
                   `recipe`, else the defaults in float32
    corpus         None: the run's
    select, where  a SELECT with clip_id, or a condition on `catalog`; neither: eval.where, which is empty by default:
                   every sample
    checkpoint     of the run, as `training.run.best_checkpoint.chosen_checkpoint` has it
    ema            the run's averaged weights
    Raises UserError.
    """
    if save_similarity is not None:
        similarity_format(save_similarity)
    assignments = [*assignments, *([f"eval.text={text}"] if text else [])]
    subject = open_subject(run, model, recipe, checkpoint, ema, assignments)
    settings, corpus = subject.settings, corpus or subject.corpus
    chosen = _chosen(select, where, settings.eval.where)
    if corpus is None:
        raise UserError("--corpus is missing: which corpus are the clips to come from?")
    console = console or (plain_console() if format == "table" else Console(stderr=True))
    with (
        join(settings.train.device) as process,
        _selected(process, corpus, chosen) as selection,
        _bar(console, process, selection) as progress,
    ):
        metrics = evaluate(
            subject.model.to(process.device),
            selection,
            settings,
            process,
            dsl="per_direction" if dsl else None,
            save_similarity=save_similarity,
            progress=progress,
        )
        metrics |= {"model": subject.name, "corpus": str(corpus), "where": chosen}
        if subject.trained_on is not None:
            metrics["num_seen"] = num_seen(selection, Selection.open(subject.trained_on))
        if subject.chosen_on is not None:
            metrics["num_chosen_on"] = _num_common(selection, Selection.open(subject.chosen_on))
        if process.is_first:
            print(json.dumps(metrics, indent=1)) if format == "json" else show(metrics, console)
    return metrics


# --- What is evaluated, on what


def open_subject(
    run: str | Path | None,
    model: str | None,
    recipe: str | None,
    checkpoint: str | None,
    ema: bool,
    assignments: Sequence[str],
) -> Subject:
    """Raises UserError."""
    if (run is None) == (model is None):
        raise UserError("give either --run DIR or --model MODEL, one of the two.")
    if run is not None:
        if recipe:
            raise UserError("--recipe goes with --model: a run has its own settings, which --set changes.")
        return _of_run(RunFolder(run).require(), checkpoint, ema, list(assignments))
    if checkpoint:
        raise UserError("--checkpoint goes with --run: a model's file is one set of weights.")
    if ema:
        raise UserError("--ema goes with --run: a model's file has one set of weights.")
    return _of_model(model, recipe, list(assignments))


def _of_run(folder: RunFolder, which: str | None, ema: bool, assignments: list[str]) -> Subject:
    record = folder.load()
    settings = resolve(record.settings, None, assignments)
    chosen = chosen_checkpoint(folder, which)
    checkpoint = folder.checkpoints.load(chosen.step)
    weights = checkpoint.averaged if ema else checkpoint.weights
    if weights is None:
        raise UserError(f"--ema: {checkpoint.path} holds no averaged weights; the run's train.ema was not set.")
    model = models.read(weights, settings.model, settings.data.seed)
    name = f"{folder.root} at step {chosen.step}{chosen.reason}" + (", averaged weights" if ema else "")
    chosen_on = folder.root / EVAL_FILE if chosen.reason else None
    return Subject(name, model, settings, record.corpus, folder.root / SELECTION_FILE, chosen_on)


def _of_model(name: str, recipe: str | None, assignments: list[str]) -> Subject:
    """Without a recipe texts are cut at what the model reads, unless the settings say where."""
    assignments = [f"model.init={json.dumps(name)}", *assignments]
    base: dict[str, Any] = {"train": {"precision": "fp32"}}
    settings = resolve(base, recipe, assignments)
    model = models.load(settings.model)
    if not recipe:
        limit = min(settings.data.max_text_tokens, model.config.context_length)
        settings = resolve(base | {"data": {"max_text_tokens": limit}}, None, assignments)
    return Subject(name, model, settings, None, None)


def _chosen(select: str | None, where: str | None, default: str) -> str:
    if select and where:
        raise UserError("give --select or --where, not both: each of them says which clips are meant.")
    return select or where or default


@contextmanager
def _selected(process: Process, corpus: str | Path, where: str) -> Iterator[Selection]:
    """The clips, frozen by the first process; every process has a copy of the file, so that no folder is shared."""
    with tempfile.TemporaryDirectory(prefix="clipmill-eval-") as folder:
        path = Path(folder) / "eval.arrow"

        def frozen() -> bytes:
            freeze(path, corpus, where, setting="--where")
            return path.read_bytes()

        content = process.first(frozen)
        if not process.is_first:
            path.write_bytes(content)
        yield Selection.open(path)


def num_seen(selection: Selection, trained_on: Selection) -> int:
    """How many clips of a selection are of videos that another has clips of."""
    videos = selection.column("video_id")
    in_training = pc.is_in(trained_on.column("video_id"), value_set=pc.unique(videos))
    seen = pc.unique(trained_on.column("video_id").filter(in_training))
    return pc.sum(pc.is_in(videos, value_set=seen)).as_py() or 0


def _num_common(selection: Selection, other: Selection) -> int:
    """How many clips are in both."""
    return pc.sum(pc.is_in(selection.column("clip_id"), value_set=pc.unique(other.column("clip_id")))).as_py() or 0


# --- Showing it


def show(metrics: dict[str, Any], console: Console) -> None:
    where = f", {metrics['where']}" if metrics["where"] else ""
    console.print(f"[bold]{escape(metrics['model'])}[/] on {escape(metrics['corpus'] + where)}", soft_wrap=True)
    console.print(metrics_table(metrics))
    console.print(f"[dim]{'; '.join(notes(metrics))}[/]", soft_wrap=True)
    print_failures(console, _failures(metrics))


def metrics_table(metrics: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("R@1", "R@5", "R@10", "median rank", "mean rank", "queries"):
        table.add_column(column, justify="right")
    for key, name in ROWS.items():
        if key in metrics:
            table.add_row(name, *cells(metrics[key]), f"{metrics[key]['num_queries']:,}")
    for key, values in metrics["chance"].items():
        table.add_row(f"[dim]guessing, {ROWS[key]}[/]", *(f"[dim]{cell}[/]" for cell in cells(values)))
    return table


def cells(values: dict[str, float]) -> list[str]:
    """Recalls in percent, ranks from 1."""
    recalls = [f"{100 * values[key]:.1f} %" for key in ("r1", "r5", "r10")]
    return [*recalls, f"{values['medr']:,.1f}", f"{values['meanr']:,.1f}"]


def notes(metrics: dict[str, Any]) -> list[str]:
    """What the numbers are over, in words."""
    said = [f"{metrics['num_videos']:,} clips searched by {metrics['num_texts']:,} {metrics['text']}s"]
    said += [f"{metrics['num_without_text']:,} clips have none and are only found"] * bool(metrics["num_without_text"])
    repeated = f"{metrics['num_repeated_texts']:,} of the {metrics['text']}s are another clip's, too"
    said += [repeated] * bool(metrics["num_repeated_texts"])
    said += [f"{metrics.get('num_seen') or 0:,} clips are of videos trained on"] * bool(metrics.get("num_seen"))
    said += [f"{metrics.get('num_chosen_on') or 0:,} clips chose the checkpoint"] * bool(metrics.get("num_chosen_on"))
    return said


def _failures(metrics: dict[str, Any]) -> list[tuple[str, str, int, str]]:
    counted = Counter(failure["error_class"] for failure in metrics["failures"])
    example = {failure["error_class"]: f"{failure['clip_id']}: {failure['message']}" for failure in metrics["failures"]}
    return [("eval", name, count, example[name]) for name, count in counted.most_common()]


@contextmanager
def _bar(console: Console, process: Process, selection: Selection) -> Iterator[Any]:
    """A progress bar on a terminal; gives the function to call, None where there is nothing to show it on."""
    if not (console.is_terminal and process.is_first):
        yield None
        return
    columns = (TextColumn("[bold]encoding clips"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=selection.num_clips)
        yield lambda done, total: bars.update(task, completed=done, total=total)
