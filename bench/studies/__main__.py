"""`clipmill study`: what there is and what came out, or one of them run."""

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table as Lines

from bench.studies import STUDIES


def list_studies(console: Console, out: Path | None) -> None:
    """Also writes the index of the studies that were run into folders of `out`. Raises UserError."""
    lines = Lines(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, (_, question) in STUDIES.items():
        lines.add_row(name, question)
    console.print(lines)
    if out is not None:
        from bench.studies.runner import index

        index(out)
        console.print(f"\n{out / 'README.md'} has what came out.", soft_wrap=True, highlight=False)


def run_named(
    name: str, out: Path, size: str, num_seeds: int | None, cache: Path, workers: int | None, console: Console
) -> None:
    """Raises UserError."""
    from bench.studies import load
    from bench.studies.runner import run_study

    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    run_study(name, out, size=size, num_seeds=num_seeds, cache=cache, workers=workers, progress=_say(console))
    console.print(f"\n{out / 'README.md'} has the table of {load(name).title!r}.", soft_wrap=True, highlight=False)


def _say(console: Console):
    return lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False)
