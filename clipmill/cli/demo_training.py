"""The second half of `clipmill demo`: evaluate the image model, post-pretrain it on the corpus, evaluate it again.

Both evaluations search the clips that the `demo` recipe holds out. Zero-shot encodes each frame with the image model as
it ships and averages the unit vectors.
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipmill.cli.evaluate import ROWS, cells, run_eval
from clipmill.cli.train import show_report
from shards.query.sql import open_manifest, rows_of
from training.launch import launch_training
from training.run.plots import bars, lines, save
from training.run.settings import RunSettings, resolve

RECIPE = "demo"
BEFORE, AFTER = "image model, zero-shot", "after post-pretraining"
RECALLS = {"r1": "R@1", "r5": "R@5", "r10": "R@10"}
DIRECTIONS = ("t2v", "v2t")
Results = dict[str, dict[str, Any]]


def run_training_demo(console: Console, corpus: Path, run: Path) -> int:
    """Evaluate, train into `run` (or resume there), evaluate again; print and plot. Return the exit code."""
    settings = resolve(None, RECIPE, [])
    if too_few := _too_few(corpus, settings):
        console.print(f"\nSkipping the training: {escape(too_few)}", soft_wrap=True)
        return 0
    model = settings.model.init
    command = f"clipmill eval --model {model} --corpus {corpus} --recipe {RECIPE} --set model.pooling=mean"
    _announce(console, "4. Evaluate:", "search held-out clips with the image model as it ships", command)
    before = run_eval(model=model, corpus=corpus, recipe=RECIPE, assignments=["model.pooling=mean"], console=console)
    command = f"clipmill train --corpus {corpus} --run {run} --recipe {RECIPE}"
    _announce(console, "5. Train:", "post-pretrain it on the other clips", command)
    report = launch_training(str(corpus), run, recipe=RECIPE)
    show_report(report)
    if report.reason != "done":
        return 1
    command = f"clipmill eval --run {run} --corpus {corpus}"
    _announce(console, "6. Evaluate:", "search the same clips with the trained model", command)
    after = run_eval(run=run, corpus=corpus, console=console)
    results = {BEFORE: before, AFTER: after}
    console.print("\n[bold]Result:[/] share of queries with the right answer among the first 1, 5 and 10\n")
    console.print(comparison(results))
    drawn = plot_retrieval(run / "retrieval.svg", results), plot_loss(run / "loss.svg", run / "log.jsonl")
    console.print(f"\nplots: {drawn[0]} · {drawn[1]}", highlight=False)
    return 0


def _too_few(corpus: Path, settings: RunSettings) -> str | None:
    """Explain why the corpus is too small to train on, or return None. A fourth of it is held out."""
    with open_manifest(corpus) as connection:
        [num_samples] = rows_of(connection, "SELECT count(*) FROM samples")
    least = 2 * settings.train.batch_size
    return (
        None
        if num_samples >= least
        else f"the corpus has {num_samples} samples, the demo's training needs at least {least}."
    )


def _announce(console: Console, verb: str, what: str, command: str) -> None:
    console.print(f"\n[bold]{verb}[/] {what}\n\n   [cyan]{escape(command)}[/]\n", highlight=False, soft_wrap=True)


def comparison(results: Results) -> Table:
    """Build a table of both directions, with a row per result and one for chance level."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "", *RECALLS.values(), "median rank", "mean rank"):
        table.add_column(column, justify="right" if column else "left")
    for direction in DIRECTIONS:
        levels = {name: metrics[direction] for name, metrics in results.items()}
        for name, values in {**levels, "chance": _chance(results, direction)}.items():
            table.add_row(ROWS[direction], name, *cells(values))
    return table


def plot_retrieval(path: Path, results: Results) -> Path:
    """Draw bars of all recalls, with chance level as a dashed line."""
    groups, marks = {}, {}
    for direction in DIRECTIONS:
        for key, label in RECALLS.items():
            group = f"{ROWS[direction].replace(' ', '')} {label}"
            groups[group] = {name: 100 * metrics[direction][key] for name, metrics in results.items()}
            marks[group] = 100 * _chance(results, direction)[key]
    return save(bars("Retrieval on held-out demo videos", groups, y_label="share of queries (%)", marks=marks), path)


def plot_loss(path: Path, log: Path) -> Path:
    """Draw the loss of every logged step."""
    rows = map(json.loads, log.read_text().splitlines())
    losses = [(row["step"], row["loss"]) for row in rows]
    return save(lines("Training loss", {"loss": losses}, x_label="step", y_label="loss"), path)


def _chance(results: Results, direction: str) -> dict[str, float]:
    return next(iter(results.values()))["chance"][direction]
