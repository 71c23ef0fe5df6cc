"""A corpus of numbered frames, built by the real stages in this process, and editings of it."""

import sys
from pathlib import Path
from typing import Any

from media_support import SHORT_GOP, Shape, make_video

from pipeline.build import Silent, session
from pipeline.ingest_stage import ingest_sources
from pipeline.pack_stage import pack_corpus
from pipeline.stages import STAGES, fingerprints
from pipeline.worker import Work, execute

FPS = 6
STAGES_RUN = ("download", "transcribe", "segment", "cut")
SETTINGS = [
    "ingest.unit_videos=2",
    "cut.short_side=source",
    "cut.fps=3",
    "segment.target_s=6",
    "segment.min_s=3",
    "segment.max_s=8",
]
SENTENCES = (
    ((3.0, 8.0), "A red circle moves to the left over the sea."),
    ((12.0, 17.0), "The blue square is very small and it spins."),
    ((20.0, 26.0), "We see a green star that jumps up and down."),
)


def build_corpus(root: Path, num_videos: int = 4) -> Path:
    """Videos of 30 s with three sentences each; clips are what is said, cut at 3 frames a second."""
    videos = root.with_name(f"{root.name}-videos")
    videos.mkdir(parents=True)
    for number in range(num_videos):
        shape = Shape(
            f"video{number}.mp4", num_frames=30 * FPS + number, fps=FPS, size=(96, 64), options=dict(SHORT_GOP)
        )
        make_video(videos, shape)
        (videos / f"video{number}.srt").write_text(_subtitles(number))
    with session(root, None, SETTINGS, "test", create=True) as (current, _):
        ingest_sources(current, [str(videos)])
        for stage in STAGES:
            if stage.name in STAGES_RUN:
                _run_stage(current, stage)
        current.publish()
        pack_corpus(current, Silent(), write=True, redo=False)
        current.publish()
    return root


def _run_stage(current: Any, stage: Any) -> None:
    current.derive_all()
    units = current.ledger.unit_of_work(stage.name)
    items = current.ledger.work(stage.name)
    fingerprint = fingerprints(current.settings)[stage.name]
    for unit in sorted(set(units.values())):
        some = [item for item in items if units[item["item_id"]] == unit]
        settings, root = stage.settings(current.settings), str(current.corpus.root)
        current.ledger.load([execute(Work(stage.name, unit, some, settings, fingerprint, root, current.run_id)).name])


def _subtitles(number: int) -> str:
    cues = []
    for n, ((start, end), text) in enumerate(SENTENCES):
        shift = 0.1 * number
        cues.append(f"{n + 1}\n{_clock(start + shift)} --> {_clock(end + shift)}\n{text}\n")
    return "\n".join(cues)


def _clock(seconds: float) -> str:
    return f"00:00:{int(seconds):02d},{round(seconds % 1 * 1000):03d}"


def edit_command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", "edit", *map(str, arguments)]
