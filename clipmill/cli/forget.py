"""What people see of `forget` and `compact`: what would go, a question, what went."""

import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from clipmill.base.errors import UserError
from clipmill.base.text import visible
from pipeline.maintenance.forget import Doomed, compact, find, forget

SHOWN = 20  # videos that are listed


def run_forget(
    root: str | Path,
    ids: list[str],
    urls: list[str],
    where: str | None,
    *,
    reason: str | None,
    yes: bool,
    dry_run: bool,
) -> int:
    """The exit code."""
    console = Console(highlight=False)
    doomed = find(root, ids, urls, where)
    _show(console, doomed)
    if dry_run or not (doomed.videos or doomed.urls):
        return 0
    if not yes and not _agreed(console):
        console.print("Nothing was changed.")
        return 0
    published = forget(root, doomed, reason)
    if not published:
        console.print("A build is running: it leaves them out from now on, and so does the next manifest it publishes.")
    console.print(
        f"Forgotten: no query, build or training run sees them any more.\n"
        f"Their bytes go with [bold]clipmill compact {escape(str(root))}[/]",
        soft_wrap=True,
    )
    return 0


def _show(console: Console, doomed: Doomed) -> None:
    for video in doomed.videos[:SHOWN]:
        what = f"{video['num_clips']} clips, {video['num_samples']} samples, {video['num_captions']} captions"
        copy = ", the same file as one of them" if video["is_copy"] else ""
        console.print(f"{video['video_id']}  {what}{copy}\n    {escape(visible(video['url']))}", soft_wrap=True)
        if video["kind"] == "file":
            console.print("    [dim]that file is not the corpus's: delete it yourself[/]")
    if len(doomed.videos) > SHOWN:
        console.print(f"… and {len(doomed.videos) - SHOWN:,} more")
    for url in doomed.urls:
        console.print(f"not in the corpus, and to be kept out: {escape(visible(url))}", soft_wrap=True)
    if doomed.videos:
        totals = ((name, doomed.total(f"num_{name}")) for name in ("clips", "samples", "captions", "sentences"))
        parts = ", ".join(f"{count:,} {name}" for name, count in totals)
        console.print(f"[bold]{len(doomed.videos):,} videos[/]: {parts}")
    elif not doomed.urls:
        console.print("Forgotten already: there is nothing to do.")


def _agreed(console: Console) -> bool:
    if not sys.stdin.isatty():
        raise UserError("nobody is there to ask: add --yes to forget them, or --dry-run to see them only.")
    return console.input("Forget them for good? [dim](y/N)[/] ").strip().lower() in ("y", "yes")


def run_compact(root: str | Path) -> int:
    """The exit code: 1 where a setting still names what was to be forgotten."""
    console = Console(highlight=False)
    report = compact(root)
    if report.did_something:
        console.print(
            f"{report.num_samples:,} samples out of {report.num_shards:,} shards, {report.num_commits:,} commits "
            f"written again, {report.num_files:,} source files removed: {report.num_bytes / 1e6:,.1f} MB less"
        )
    else:
        console.print("Nothing to do: nothing is left of what has a tombstone.")
    for name in report.settings:
        console.print(f"[red]corpus.yaml still names {escape(visible(name))}[/]: change that setting yourself.")
    return 1 if report.settings else 0
