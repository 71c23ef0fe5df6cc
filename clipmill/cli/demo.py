"""`clipmill demo`: make and serve a world of videos, build a corpus from its URLs, query it, train on it."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress

from clipmill.base.atomic_file import write_text
from clipmill.base.console import plain_console
from clipmill.cli.display import Terminal
from pipeline.demo.server import serve
from pipeline.demo.world import WorldSettings, make_world, write_sources
from pipeline.engine.build import BuildReport, build
from pipeline.engine.registry import stage_names
from shards.query.sql import open_manifest, run_query
from shards.query.statistics import render, report

QUERIES = (
    ("How many sources, clips and samples passed each stage", "FROM funnel"),
    (
        "Captions of the clips whose speech fits the picture best",
        "SELECT clip_id, round(start_s, 1) AS start_s, caption, text AS subtitle, round(subtitle_similarity, 2) AS sim "
        "FROM catalog WHERE subtitle_similarity IS NOT NULL ORDER BY subtitle_similarity DESC LIMIT 5",
    ),
    (
        "The clips with the most motion",
        "SELECT clip_id, round(motion, 4) AS motion, duration_s, caption FROM catalog ORDER BY motion DESC LIMIT 5",
    ),
    ("What failed, and why", "FROM failures_by_reason"),
)

BROKEN = ("not-found", "html", "truncated", "empty", "audio-only", "unavailable-once", "duplicate")


def run_demo(folder: Path, num_videos: int) -> int:
    """Run the whole demo in `folder`, resuming an earlier call; return the exit code."""
    from clipmill.cli.demo_training import run_training_demo

    console, started = plain_console(), time.perf_counter()
    world, corpus = folder / "world", folder / "corpus"
    _make_world(console, world, num_videos)
    with _served(folder, world) as base_url:
        sources = folder / "sources.jsonl"
        write_sources(world, base_url, sources)
        console.print(f"[bold]2. Build:[/] make a corpus from the URLs in {sources}, served at {base_url}\n")
        console.print(f"   clipmill build {sources} --corpus {corpus} --recipe demo\n", style="cyan")
        display = Terminal(console)
        result = build(
            corpus,
            [str(sources)],
            stages=stage_names(),
            recipe="demo",
            assignments=[],
            command=f"clipmill build {sources} --corpus {corpus} --recipe demo",
            display=display,
        )
    display.finished(result, corpus)
    _ask(console, corpus)
    trained = run_training_demo(console, corpus, folder / "run")
    console.print(_last_screen(folder, corpus, result, time.perf_counter() - started))
    truth = [json.loads(line) for line in (world / "truth.jsonl").read_text().splitlines()]
    num_broken = sum(row["broken"] is not None and not row["works"] for row in truth)
    return 1 if _num_failed(result) > num_broken else trained


def _num_failed(result: BuildReport) -> int:
    return sum(count for _, _, count, _ in result.failures) + result.num_old_failures


def _make_world(console: Console, world: Path, num_videos: int) -> None:
    console.print(f"[bold]1. World:[/] render {num_videos} narrated videos of moving shapes, add broken links\n")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("rendering", total=num_videos)
        settings = WorldSettings(num_videos=num_videos, broken=BROKEN)
        made = make_world(world, settings, lambda done, total: progress.update(task, completed=done, total=total))
    console.print(
        f"   {made.num_videos} videos, {made.num_scenes} scenes, {made.duration_s / 60:.0f} minutes, "
        f"{made.num_bytes / 1e6:.1f} MB in {world}; {made.num_broken} broken links\n"
    )


@contextmanager
def _served(folder: Path, world: Path):
    """Serve the world on the same port as before, since a source is identified by its URL, port included."""
    port_file = folder / "port"
    port = int(port_file.read_text()) if port_file.exists() else 0
    with serve(world, port=port) as base_url:
        write_text(port_file, base_url.rpartition(":")[2])
        yield base_url


def _ask(console: Console, corpus: Path) -> None:
    console.print("\n[bold]3. Query:[/] ask the corpus a few things\n")
    with open_manifest(corpus) as connection:
        render(report(connection), console)
        for title, sql in QUERIES:
            console.print(
                f'\n[bold]{title}[/]\n   [cyan]clipmill sql {corpus} "{sql}"[/]', highlight=False, soft_wrap=True
            )
            run_query(connection, sql)


def _last_screen(folder: Path, corpus: Path, result: BuildReport, seconds: float) -> Panel:
    num_failed, run = _num_failed(result), folder / "run"
    commands = {
        f"clipmill sql {corpus}": "query it (.tables lists the tables)",
        f"clipmill verify {corpus}": "check every byte of every shard",
        f"clipmill status {corpus} --set cut.fps=2": "see what this change would make pending",
        f"clipmill run caption --corpus {corpus} --set caption.max_tokens=12": "redo the captions only",
    }
    if run.exists():  # not if the world is too small to train on
        commands |= {
            f"clipmill eval --run {run} --text caption --dsl": "search with captions, add dual softmax",
            f"tensorboard --logdir {folder}": f"see the training curves of {run}",
        }
    commands[f"clipmill demo {folder}"] = "run it again: nothing is left to do"
    width = max(map(len, commands))
    return Panel(
        f"Made in {seconds:,.0f} s: {corpus} with {result.pack.num_samples:,} samples in {result.pack.num_shards} "
        f"shards. The {num_failed} failures are the broken links.\n\nTry next\n"
        + "\n".join(f"  {command:{width}}  {purpose}" for command, purpose in commands.items()),
        title="clipmill",
        expand=False,
    )
