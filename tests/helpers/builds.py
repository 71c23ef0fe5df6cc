"""Run whole builds on small served worlds, and compare the corpora they make."""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import duckdb

from pipeline.demo.world import read_truth
from pipeline.engine.build import BuildReport, build
from pipeline.engine.registry import stage_names

# Small settings for test builds: tiny pictures, few workers, and 1 MB shards so that there are several.
SMALL = [
    "ingest.unit_videos=2",
    "cut.short_side=96",
    "pack.shard_bytes=1000000",
    "engine.publish_every_s=0.5",
    "engine.downloads_per_node=2",
    # No work hangs in these builds, so reaching a limit would only mean that the machine is slow.
    "download.stall_timeout_s=600",
    "download.probe_timeout_s=600",
    "cut.timeout_base_s=600",
]

PLAIN = (
    "caption.captioner=tests.helpers.plain_captioner:Plain",
    "score.model=null",
)  # captions, but no model to be loaded

WORDLESS = tuple(stage for stage in stage_names() if stage not in ("caption", "score"))  # no model has to be loaded


@dataclass(frozen=True)
class ServedWorld:
    folder: Path
    base_url: str
    sources: Path
    faults: dict[str, dict]  # settings of its server, which picks up changes

    @property
    def truth(self) -> dict[str, dict]:
        return {row["video_id"]: row for row in read_truth(self.folder)}


def sound_sources(world: ServedWorld) -> list[dict]:
    """Return the lines of the world's list whose videos have no fault."""
    rows = [json.loads(line) for line in world.sources.read_text().splitlines()]
    return [row for row in rows if world.truth[row["id"]]["works"] and not world.truth[row["id"]]["broken"]]


def build_here(
    corpus: Path, sources: list[str], *settings: str, stages=stage_names(), recipe="demo", **kwargs
) -> BuildReport:
    """Build in this process, on the Ray of the test session."""
    assignments = [*SMALL, *settings] if recipe else list(settings)
    return build(corpus, sources, stages=stages, recipe=recipe, assignments=assignments, command="test", **kwargs)


def clipmill(*arguments: str, timeout_s: float = 1200) -> subprocess.CompletedProcess:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "clipmill", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def ask(corpus: Path, sql: str) -> list[tuple]:
    with duckdb.connect(str(corpus / "manifest.duckdb"), read_only=True) as connection:
        return connection.execute(sql).fetchall()


def hashes(folder: Path, pattern: str = "*.tar") -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def tables(corpus: Path) -> dict[str, list[tuple]]:
    """Return every table of the manifest as sorted rows, without columns of times and runs."""
    wanted = ("videos", "sentences", "spans", "clips", "captions", "scores", "samples")
    return {
        table: sorted(
            map(
                str,
                ask(
                    corpus,
                    f"SELECT * EXCLUDE (tar, mp4_offset, frames) FROM {table}"
                    if table == "clips"
                    else f"SELECT * FROM {table}",
                ),
            )
        )
        for table in wanted
    }


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of every file of the corpus."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".clipmill" not in path.parts]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def write_list(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
