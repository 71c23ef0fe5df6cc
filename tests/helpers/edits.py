"""Build a corpus of numbered frames with the real stages in this process, and edit it."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from clipmill.cli.edit import run_edit
from pipeline.editing.launch import EditRequest
from pipeline.engine.build import Silent, session
from pipeline.engine.registry import fingerprints, stages
from pipeline.runtime.task import Task, execute
from pipeline.stages.ingest.stage import ingest_sources
from pipeline.stages.pack import pack_corpus
from shards.packing.tar import read_member
from shards.query.sql import open_manifest
from tests.helpers.media import SHORT_GOP, Shape, expected_numbers, make_video, numbers_in

FPS, CLIP_FPS = 6, 3
STAGES_RUN = ("download", "transcribe", "segment", "cut")
SETTINGS = ["ingest.unit_videos=2", "cut.short_side=source", f"cut.fps={CLIP_FPS}", "segment.wordless=fixed"]
SETTINGS += ["segment.target_s=6", "segment.min_s=3", "segment.max_s=8"]
SENTENCES = (
    ((3.0, 8.0), "A red circle moves to the left over the sea."),
    ((12.0, 17.0), "The blue square is very small and it spins."),
    ((20.0, 26.0), "We see a green star that jumps up and down."),
)
# Settings under which every clip may move by any distance
EAGER = ("edit.min_gain=0", "edit.length_weight=0", "edit.max_median_change=null", "edit.max_share_at_limit=null")


def build_corpus(root: Path, num_videos: int = 4) -> Path:
    """Build a corpus of videos video0, video1, … of 30 s at 3 fps, each with three sentences but the last with none."""
    videos = root.with_name(f"{root.name}-videos")
    videos.mkdir(parents=True)
    lines = []
    for number in range(num_videos):
        frames = {"num_frames": 30 * FPS + number, "fps": FPS, "size": (96, 64)}  # makes every file different
        path = make_video(videos, Shape(f"video{number}.mp4", options=dict(SHORT_GOP), **frames))
        line = {"id": f"video{number}", "path": str(path)}
        if number < num_videos - 1:
            (videos / f"video{number}.srt").write_text(_subtitles(number))
            line["subtitle"] = str(path.with_suffix(".srt"))
        lines.append(json.dumps(line) + "\n")
    (videos / "list.jsonl").write_text("".join(lines))
    with session(root, None, SETTINGS, "test", create=True) as (current, _):
        ingest_sources(current, [str(videos / "list.jsonl")])
        for stage in stages():
            if stage.name in STAGES_RUN:
                _run_stage(current, stage)
        current.publish()
        pack_corpus(current, Silent(), write=True, redo=False)
        current.publish()
    return root


def _run_stage(current: Any, stage: Any) -> None:
    current.refresh_state()
    units = current.ledger.unit_of_work(stage.name)
    items = current.ledger.work(stage.name)
    fingerprint = fingerprints(current.settings)[stage.name]
    for unit in sorted(set(units.values())):
        some = [item for item in items if units[item["item_id"]] == unit]
        settings, root = getattr(current.settings, stage.name), str(current.corpus.root)
        task = Task(stage.name, unit, some, settings, fingerprint, root, current.run_id)
        current.ledger.load([execute(stage.run, task).name])


def _subtitles(number: int) -> str:
    cues = []
    for n, ((start, end), text) in enumerate(SENTENCES):
        shift = 0.1 * number
        cues.append(f"{n + 1}\n{_clock(start + shift)} --> {_clock(end + shift)}\n{text}\n")
    return "\n".join(cues)


def _clock(seconds: float) -> str:
    return f"00:00:{int(seconds):02d},{round(seconds % 1 * 1000):03d}"


def copy_of(corpus: Path, folder: Path) -> Path:
    """Copy a corpus for one test to change; its source videos stay shared."""
    return Path(shutil.copytree(corpus, folder / "corpus"))


def edit(corpus: Path, out: Path, *settings: str, **asked: Any) -> list[dict[str, Any]]:
    """Run `clipmill edit` with the demo's model in this process; return the rows of its rounds."""
    asked = {"corpus": corpus, "model": "demo", "rounds": 0} | asked
    asked["assignments"] = (*EAGER, *settings)
    rows, _ = run_edit(EditRequest(out, **asked), Console(file=io.StringIO()))
    return rows


def edit_command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "clipmill", "edit", *map(str, arguments)]


def rows(corpus: Path, sql: str) -> list[dict[str, Any]]:
    with open_manifest(corpus) as connection:
        return connection.sql(sql).to_arrow_table().to_pylist()


def edits(corpus: Path) -> list[dict[str, Any]]:
    return rows(corpus, "SELECT * FROM clip_edits ORDER BY editing, round, clip_id")


def edit_tables(corpus: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the tables that editing has written, without columns of times."""
    tables = {name: rows(corpus, f"SELECT * FROM {name} ORDER BY ALL") for name in ("clip_edits", "edited_clips")}
    return tables | {"edit_rounds": rows(corpus, 'SELECT * EXCLUDE ("at") FROM edit_rounds ORDER BY editing, round')}


def shown(corpus: Path, tar: str, offset: int, num_bytes: int) -> list[int]:
    """Return the numbers of the source frames that a clip shows."""
    return numbers_in(read_member(corpus / tar, offset, num_bytes))


def numbers_of(clip_id: str, start_s: float, end_s: float) -> list[int]:
    """Return the numbers that a clip with these boundaries should show."""
    number = int(clip_id.removeprefix("video")[0])
    shape = Shape("x.mp4", num_frames=30 * FPS + number, fps=FPS)
    return expected_numbers(shape.times_s(), shape.end_s(), start_s, end_s, CLIP_FPS)
