"""The commands `forget` and `compact`: a preview, a question, a report."""

import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from clipmill.base.errors import UserError
from clipmill.base.text import visible
from pipeline.maintenance.forget import ForgetPlan, compact, find, forget

SHOWN = 20  # videos listed


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
    """Ask for confirmation and forget the videos; return the exit code."""
    console = Console(highlight=False)
    plan = find(root, ids, urls, where)
    _show(console, plan)
    if dry_run or not (plan.videos or plan.urls):
        return 0
    if not yes and not sys.stdin.isatty():
        raise UserError("not a terminal: pass --yes to confirm or --dry-run to preview.")
    if not yes and console.input("Forget them for good? [dim](y/N)[/] ").strip().lower() not in ("y", "yes"):
        console.print("Nothing was changed.")
        return 0
    published = forget(root, plan, reason)
    if not published:
        console.print("A build is running: it drops them from now on, and its next manifest is without them.")
    console.print(
        f"Forgotten: queries, builds and training runs no longer see them.\n"
        f"Delete their bytes with [bold]clipmill compact {escape(str(root))}[/]",
        soft_wrap=True,
    )
    return 0


def _show(console: Console, plan: ForgetPlan) -> None:
    for video in plan.videos[:SHOWN]:
        what = f"{video['num_clips']} clips, {video['num_samples']} samples, {video['num_captions']} captions"
        copy = ", a copy of one of them" if video["is_copy"] else ""
        console.print(f"{video['video_id']}  {what}{copy}\n    {escape(visible(video['url']))}", soft_wrap=True)
        if video["kind"] == "file":
            console.print("    [dim]the corpus does not own this file: delete it yourself[/]")
    if len(plan.videos) > SHOWN:
        console.print(f"… and {len(plan.videos) - SHOWN:,} more")
    for url in plan.urls:
        console.print(f"not in the corpus, will never be added: {escape(visible(url))}", soft_wrap=True)
    if plan.videos:
        totals = ((name, plan.total(f"num_{name}")) for name in ("clips", "samples", "captions", "sentences"))
        parts = ", ".join(f"{count:,} {name}" for name, count in totals)
        console.print(f"[bold]{len(plan.videos):,} videos[/]: {parts}")
    elif not plan.urls:
        console.print("Nothing to do: all of them have been forgotten already.")


def run_compact(root: str | Path) -> int:
    """Compact a corpus; return the exit code, 1 when a setting still names a forgotten video."""
    console = Console(highlight=False)
    report = compact(root)
    if report.did_something:
        console.print(
            f"{report.num_samples:,} samples removed from {report.num_shards:,} shards, {report.num_commits:,} commits "
            f"rewritten, {report.num_files:,} source files deleted: {report.num_bytes / 1e6:,.1f} MB freed",
            soft_wrap=True,
        )
    else:
        console.print("Nothing to do: no bytes of forgotten videos are left.")
    for name in report.settings:
        console.print(f"[red]a setting in corpus.yaml still names {escape(visible(name))}[/]: edit it there.")
    return 1 if report.settings else 0
