"""`clipmill eval`: retrieval on clips of a corpus, printed as a table or JSON.

One process, or several under `torchrun`, of which the first prints.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from clipmill.base.console import plain_console, print_failures
from training.launch import launch_evaluation

Format = Literal["table", "json"]
ROWS = {"t2v": "text → video", "v2t": "video → text", "t2v_dsl": "text → video, DSL", "v2t_dsl": "video → text, DSL"}


def run_eval(*, format: Format = "table", console: Console | None = None, **options: Any) -> dict[str, Any]:
    """Evaluate with the options of `training.launch.launch_evaluation`, print the metrics and return them.

    Raises UserError.
    """
    prints = int(os.environ.get("RANK", 0)) == 0  # torchrun's other processes only compute
    console = console or (plain_console() if format == "table" else Console(stderr=True))
    with _bar(console, prints) as progress:
        metrics = launch_evaluation(**options, progress=progress)
    if prints and format == "json":
        print(json.dumps(metrics, indent=1))
    elif prints:
        show(metrics, console)
    return metrics


def show(metrics: dict[str, Any], console: Console) -> None:
    """Print the metrics as a table, and below it what they were computed on."""
    where = f", {metrics['where']}" if metrics["where"] else ""
    console.print(f"[bold]{escape(metrics['model'])}[/] on {escape(metrics['corpus'] + where)}", soft_wrap=True)
    console.print(metrics_table(metrics))
    console.print(f"[dim]{'; '.join(notes(metrics))}[/]", soft_wrap=True)
    counted = Counter(failure["error_class"] for failure in metrics["failures"])
    example = {failure["error_class"]: f"{failure['clip_id']}: {failure['message']}" for failure in metrics["failures"]}
    print_failures(console, [("eval", name, count, example[name]) for name, count in counted.most_common()])


def metrics_table(metrics: dict[str, Any]) -> Table:
    """Build a table with a row per direction and one per direction for chance level."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("R@1", "R@5", "R@10", "median rank", "mean rank", "queries"):
        table.add_column(column, justify="right")
    for key, name in ROWS.items():
        if key in metrics:
            table.add_row(name, *cells(metrics[key]), f"{metrics[key]['num_queries']:,}")
    for key, values in metrics["chance"].items():
        table.add_row(f"[dim]chance, {ROWS[key]}[/]", *(f"[dim]{cell}[/]" for cell in cells(values)))
    return table


def cells(values: dict[str, float]) -> list[str]:
    """Format recalls in percent and ranks, which count from 1."""
    recalls = [f"{100 * values[key]:.1f} %" for key in ("r1", "r5", "r10")]
    return [*recalls, f"{values['medr']:,.1f}", f"{values['meanr']:,.1f}"]


def notes(metrics: dict[str, Any]) -> list[str]:
    """Describe the clips and texts behind the numbers."""
    lines = [f"{metrics['num_videos']:,} clips searched with {metrics['num_texts']:,} {metrics['text']}s"]
    for key, text in (
        ("num_without_text", "clips have no text and are only candidates"),
        ("num_repeated_texts", f"of the {metrics['text']}s belong to more than one clip"),
        ("num_seen", "clips come from videos of the training selection"),
        ("num_chosen_on", "clips were also used to choose the checkpoint"),
    ):
        if metrics.get(key):
            lines.append(f"{metrics[key]:,} {text}")
    return lines


@contextmanager
def _bar(console: Console, prints: bool) -> Iterator[Any]:
    """Show a progress bar on a terminal; yield the function that moves it, None if there is no bar."""
    if not (console.is_terminal and prints):
        yield None
        return
    columns = (TextColumn("[bold]encoding clips"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
