"""Print what the build commands show: progress, the summary of a build, `status` and `verify`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from clipmill.base.console import one_line, plain_console, print_failures
from clipmill.base.text import visible
from pipeline.engine.build import BuildReport, Status, status
from pipeline.engine.driver import Engine
from pipeline.engine.registry import stages
from pipeline.engine.trust import confirm, lines
from pipeline.stages.ingest.stage import IngestReport
from pipeline.stages.pack import PACK
from shards.corpus.folder import Corpus
from shards.packing.deep_verify import repair_of
from shards.packing.release import ReleaseReport
from shards.packing.verify import Problem

PLAIN_OUTPUT_INTERVAL_S = 10.0  # between progress lines where the output is not a terminal
OPEN = ("pending", "retry")


class Terminal:
    """Show a build on a terminal, or as plain lines if the output is not a terminal."""

    def __init__(self, console: Console | None = None):
        self.console = console or plain_console()
        self.bars: Progress | None = None
        self.rows: dict[str, object] = {}
        self.known: dict[str, int] = {}
        self.printed_at = self.saved_at = 0.0
        self.started = time.perf_counter()

    # -- called by `build`, in this order ----------------------------------------------------------------------------

    def creating(self, corpus: str) -> None:
        self.console.print(f"[bold]new corpus[/] {escape(corpus)}", soft_wrap=True)

    def settings_changed(self, changed: list[str]) -> None:
        for line in changed:
            self.console.print(f"[yellow]setting changed[/] {escape(line)}")

    def damaged(self, problems: list[Problem]) -> None:
        show_damaged(self.console, problems)

    def ingested(self, report: IngestReport) -> None:
        self.console.print(
            f"[bold]ingest[/] {report.num_seen:,} sources read: {report.num_new:,} new, "
            + (f"{report.num_added:,} with more spans of a listed video, " if report.num_added else "")
            + (f"{report.num_grown:,} known videos have more spans, " if report.num_grown else "")
            + f"{report.num_duplicates:,} already known or repeated, {report.num_problems:,} unreadable"
            + (f", {report.num_forgotten:,} left out because they were forgotten" if report.num_forgotten else "")
        )
        for split, num_videos, num_texts, num_repeated in report.splits:
            name = escape(one_line(split))
            self.console.print(
                f"  {name}: {num_videos:,} videos, {num_texts:,} texts, {num_repeated:,} of them repeated"
            )

    def plan(self, counts: dict[str, dict[str, int]], stages: Sequence[str]) -> None:
        parts = []
        for stage, by_status in counts.items():
            num_open, waiting = sum(by_status.get(status, 0) for status in OPEN), by_status.get("waiting", 0)
            if stage in stages and (num_open or waiting):
                parts.append(f"{stage} {num_open:,}" + (f" (+{waiting:,} waiting)" if waiting else ""))
        self.console.print("[bold]to do[/] " + (" · ".join(parts) if parts else "nothing is pending"))
        num_left = {
            name: sum(by.get(status, 0) for status in OPEN) for name, by in counts.items() if name not in stages
        }
        left = " · ".join(f"{name} {num:,}" for name, num in num_left.items() if num)
        if "pack" in stages and left:  # pack.where does not match their clips, so the shards lack them
            self.console.print(
                f"[yellow]note[/] the shards may lack clips that are pending in other stages: {left}. "
                "`clipmill build` runs those stages first.",
                soft_wrap=True,
            )

    @contextmanager
    def progress(self, engine: Engine, counts: dict[str, dict[str, int]]) -> Iterator[None]:
        self.known = {stage: sum(n for status, n in by.items() if status in OPEN) for stage, by in counts.items()}
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("[bold]{task.description:10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as self.bars:
            self.rows = {stage.name: self.bars.add_task(stage.name, total=None, note="") for stage in engine.stages}
            yield
            self.tick(engine)
        self.bars = None

    def tick(self, engine: Engine) -> None:
        now = time.perf_counter()
        totals = {  # at least so many items: pending at the start, or more that appeared since
            name: max(self.known.get(name, 0), state.done + state.failed + state.in_flight)
            for name, state in engine.report.by_stage.items()
        }
        if now - self.saved_at > 1:
            self.saved_at = now
            engine.corpus.write_progress(progress_row(engine, totals, now - self.started))
        if self.bars is not None:
            for name, row in self.rows.items():
                state = engine.report.by_stage[name]
                note = f"[red]{state.failed} failed[/]" if state.failed else ""
                self.bars.update(row, completed=state.done + state.failed, total=totals[name], note=note)
        elif now - self.printed_at > PLAIN_OUTPUT_INTERVAL_S:
            self.printed_at = now
            parts = []
            for name, state in engine.report.by_stage.items():
                failed = f" ({state.failed} failed)" if state.failed else ""
                if totals[name]:
                    parts.append(f"{name} {state.done + state.failed}/{totals[name]}{failed}")
            self.console.print(" · ".join(parts), highlight=False)

    def packing(self, done: int, total: int) -> None:
        if done == total:
            self.console.print(f"[bold]pack[/] {total:,} shards written")

    def released(self, report: ReleaseReport) -> None:
        if report.num_tars:
            size = f"{report.num_bytes / 1e6:,.1f} MB"
            self.console.print(f"[bold]clips[/] {report.num_tars:,} tars deleted, {size}: their clips are in shards")

    def finished(self, report: BuildReport, corpus: str | Path) -> None:
        if not report.did_something:
            self.console.print("Nothing to do: everything is up to date.")
        else:
            self._summary(report)
        print_failures(self.console, report.failures)
        if report.num_old_failures:
            self.console.print(
                f"{report.num_old_failures:,} failed in earlier runs and were not tried again: "
                f"clipmill status {escape(str(corpus))}",
                soft_wrap=True,
            )
        _print_without_clips(self.console, report.without_clips)
        corpus_text = escape(str(corpus))
        self.console.print(
            f'[dim]next:[/] clipmill stats {corpus_text} · clipmill sql {corpus_text} "SELECT * FROM funnel" · '
            f"clipmill verify {corpus_text}",
            soft_wrap=True,
        )

    # -- parts --------------------------------------------------------------------------------------------------------

    def _summary(self, report: BuildReport) -> None:
        table = Table(box=None, pad_edge=False)
        for column in ("stage", "done", "failed", "task seconds"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        for name, state in report.engine.by_stage.items():
            if state.done or state.failed:
                table.add_row(
                    name, f"{state.done:,}", f"{state.failed:,}" if state.failed else "", f"{state.seconds:,.1f}"
                )
        if report.pack and (report.pack.num_written or report.pack.num_refreshed):
            note = f"{report.pack.num_refreshed} indexes updated" if report.pack.num_refreshed else ""
            table.add_row("pack", f"{report.pack.num_samples:,}", "", f"{report.pack.seconds:,.1f}", note)
        self.console.print(table)
        seconds, driver_s = time.perf_counter() - self.started, report.engine.loop_s
        self.console.print(f"[dim]{seconds:,.1f} s in total, of which {driver_s:,.1f} s for ledger and manifest[/]")


def show_damaged(console: Console, problems: Sequence[Problem]) -> None:
    for problem in problems:
        what = one_line(f"{problem.path} {problem.item}".rstrip() + f": {problem.message}")
        console.print(f"[yellow]damaged[/] {escape(what)}. `clipmill build` makes it again", soft_wrap=True)


def progress_row(engine: Engine, totals: dict[str, int], elapsed_s: float) -> dict:
    """Return the progress of a running build for `status` in another process."""
    stages = {}
    for name, state in engine.report.by_stage.items():
        num_finished = state.done + state.failed
        rate = num_finished / elapsed_s if elapsed_s else 0.0
        left = totals[name] - num_finished
        stages[name] = {
            "done": state.done,
            "failed": state.failed,
            "in_flight": state.in_flight,
            "left": left,
            "per_s": rate,
            "time_left_s": left / rate if rate else None,
        }
    return {"run_id": engine.run_id, "elapsed_s": elapsed_s, "stages": stages}


def show_status(root: str | Path, assignments: list[str]) -> None:
    """Print the progress of a running build, or else what each stage has done and has to do."""
    console = plain_console()
    running = Corpus(root).require().read_progress()
    if running and not assignments:
        _show_running(console, running)
        return
    _show_idle(console, status(root, assignments))


def _show_running(console: Console, progress: dict) -> None:
    console.print(f"A build has been running for {progress['elapsed_s']:,.0f} s (run {progress['run_id']}).")
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "done", "failed", "in flight", "left", "per s", "time left"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, row in progress["stages"].items():
        left = f"{row['time_left_s']:,.0f} s" if row["time_left_s"] is not None else "?"
        numbers = (row["done"], row["failed"], row["in_flight"], row["left"])
        table.add_row(name, *(f"{n:,}" for n in numbers), f"{row['per_s']:.2f}", left if row["left"] else "")
    console.print(table)


def _show_idle(console: Console, current: Status) -> None:
    show_damaged(console, current.damaged)
    for line in current.changed:
        console.print(f"[yellow]if set[/] {escape(line)}")
    for problem in current.problems:
        console.print(f"[red]problem[/] {escape(visible(problem, keep=chr(10)))}", soft_wrap=True)
    if current.writer:
        console.print(f"being written by {escape(current.writer)}: what is committed so far", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "done", "pending", "waiting", "failed", "quarantined", ""):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    for stage in stages():
        row = current.counts[stage.name]
        num_open = sum(row.get(status, 0) for status in OPEN)
        ended = (row.get("waiting", 0), row.get("failed", 0), row.get("quarantined", 0))
        cells = (row.get("done", 0), num_open, *ended)
        note = "off" if stage.name in current.off else stage.help
        table.add_row(stage.name, *(f"{n:,}" if n else "" for n in cells), f"[dim]{note}[/]")
    pack = current.pack
    table.add_row(
        "pack",
        f"{pack['packed']:,}" if pack else "?",
        f"{pack['to_pack']:,}" if pack and pack["to_pack"] else "" if pack else "?",
        "",
        "",
        "",
        f"[dim]{PACK.help}[/]",
    )
    console.print(table)
    if any(row.get("waiting") for row in current.counts.values()):
        console.print("[dim]waiting: done, but an input is pending; pending again if that input changes[/]")
    if any(row.get("quarantined") for row in current.counts.values()):
        hint = "failed engine.max_attempts times; `clipmill run STAGE --where quarantined` retries"
        console.print(f"[dim]quarantined: {hint}[/]")
    print_failures(console, current.failures)
    _print_without_clips(console, current.without_clips)
    if current.untrusted:
        console.print("[yellow]not yours:[/] these settings take effect after `clipmill trust`, or a --set of them:")
        for line in current.untrusted:
            console.print(f"  {escape(one_line(line))}", soft_wrap=True)


def show_trust(root: str | Path) -> None:
    """Confirm the settings that reach outside the corpus, and print them."""
    console = plain_console()
    confirmed = confirm(root)
    for line in lines(confirmed):
        console.print(escape(one_line(line)), soft_wrap=True)
    console.print(
        "Confirmed: they take effect from now on." if confirmed else "Nothing to confirm: all of it is yours."
    )


def _print_without_clips(console: Console, reasons: list[tuple[str, int, str]]) -> None:
    """Print how many videos give no clip, and a line for each reason; print nothing if all give some."""
    if not reasons:
        return
    num_videos = sum(num_videos for _, num_videos, _ in reasons)
    console.print(f"[yellow]{num_videos:,} {'videos give' if num_videos > 1 else 'video gives'} no clip[/]")
    for reason, num_videos, example in reasons:
        text = f"  {escape(one_line(reason)):<29} {num_videos:>7,}  [dim]{escape(one_line(example))}[/]"
        console.print(text, no_wrap=True, overflow="ellipsis", highlight=False)


def verify_corpus(root: str | Path, decode: bool, deep: bool = False) -> int:
    """Print the problems of the shards, or with `deep` of all files, and the commands that repair them."""
    from pipeline.maintenance.verify import verify_with_sandbox

    console = plain_console()
    problems, checked = verify_with_sandbox(root, decode, console, deep=deep)
    for problem in problems:
        colour = "yellow" if problem.is_warning else "red"
        console.print(
            f"[{colour}]{problem.kind}[/] {escape(one_line(f'{problem.path} {problem.item}: {problem.message}'))}"
        )
    repairs = dict.fromkeys(repair_of(problem, str(root)) for problem in problems if not problem.is_warning)
    for command in repairs if deep else ():
        count = sum(not problem.is_warning and repair_of(problem, str(root)) == command for problem in problems)
        console.print(f"[dim]repair of {count:,}:[/] {escape(command)}", soft_wrap=True)
    wrong = sum(not problem.is_warning for problem in problems)
    console.print(f"{checked}: {f'{wrong:,} problems' if wrong else 'no problems'}")
    return 1 if wrong else 0
