"""A folder of narrated videos, their subtitles and the truth about them; also lists of its sources.

WORLD/
  world.json             settings and totals; a folder with totals is complete
  videos/ID.EXT          the videos; two of them may have the same bytes
  subtitles/ID.en.EXT    for the videos that have subtitles
  truth.jsonl            one line per video: file facts, scenes, words with times; broken videos are listed, too
  truth.parquet          one row per scene, for SQL
  faults.json            faults that the server plays for some paths (see `pipeline.demo.server`)

The same settings give the same bytes in every file, with any number of processes. Times are seconds from the first
frame.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipmill.base.errors import UserError
from clipmill.base.settings import digest
from pipeline.demo import grammar
from pipeline.demo.narration import SUBTITLE_WRITERS, Sentence, narrate, shifted
from pipeline.demo.plan import FORMATS, NOISE_LEVELS, VideoPlan, WorldSettings, frames_of, plan_video

__all__ = ["NOISE_LEVELS", "WorldSettings", "WorldSummary", "make_world", "read_truth", "scene_at", "write_sources"]

VERSION = 1  # of the world that the settings describe
LICENCE = "CC0-1.0"
UNKNOWN_HOST = "http://nowhere.invalid"  # a name that never resolves (RFC 2606)
NEVER_WORK = ("not-found", "html", "truncated", "empty", "unknown-host", "audio-only")

Progress = Callable[[int, int], None]  # (videos written, videos in all)


@dataclass(frozen=True)
class WorldSummary:
    num_videos: int  # videos that work, copies included
    num_broken: int
    num_scenes: int
    duration_s: float
    num_bytes: int


def make_world(folder: str | Path, settings: WorldSettings, progress: Progress | None = None) -> WorldSummary:
    """Write the world of these settings into `folder`, unless it exists.

    Raises UserError if the folder has any other content.
    """
    folder = Path(folder)
    fingerprint = digest([VERSION, settings.fingerprint()])
    finished = _claim(folder, fingerprint)
    if finished:
        return finished
    (folder / "videos").mkdir(exist_ok=True)
    (folder / "subtitles").mkdir(exist_ok=True)
    # A broken source with a file of its own gets a small plain video.
    plain = dict(formats=("h264-mp4",), sizes=("320x240",), rates=("12.5",), rotation=False, missing_fraction=0.0)
    short = settings.model_copy(update=plain | {"min_video_s": 12.0, "max_video_s": 15.0})
    broken = [kind for kind in dict.fromkeys(settings.broken) if kind != "duplicate"]
    jobs = [Job(settings, index) for index in range(settings.num_videos)]
    jobs += [Job(short, settings.num_videos + n, kind) for n, kind in enumerate(broken)]
    rows = []
    for row in _run(folder, jobs, settings.workers):
        rows.append(row)
        if progress:
            progress(len(rows), len(jobs))
    rows.sort(key=lambda row: row["index"])
    if "duplicate" in settings.broken:  # a copy of the first video under another name and URL
        video_id = f"{rows[0]['video_id']}copy"
        file = f"videos/{video_id}{Path(rows[0]['file']).suffix}"
        shutil.copyfile(folder / rows[0]["file"], folder / file)
        changed = {"index": len(rows), "video_id": video_id, "file": file, "url_path": f"/{file}"}
        rows.append(rows[0] | changed | {"broken": "duplicate", "duplicate_of": rows[0]["video_id"]})
    return _finish(folder, settings, fingerprint, rows)


def read_truth(folder: str | Path) -> list[dict[str, Any]]:
    """Return the rows of truth.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "truth.jsonl").read_text().splitlines()]


def scene_at(video: dict[str, Any], start_s: float, end_s: float) -> dict[str, Any]:
    """Return the scene of a truth row that overlaps most with the span [start_s, end_s)."""
    return max(video["scenes"], key=lambda s: min(end_s, s["end_s"]) - max(start_s, s["start_s"]))


def write_sources(folder: str | Path, base_url: str, path: str | Path) -> int:
    """Write a source list for the world served at `base_url`; return the number of lines.

    Each line is a JSON object.
    """
    rows = [_source(video, base_url.rstrip("/")) for video in read_truth(folder)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def _source(video: dict[str, Any], base_url: str) -> dict[str, str]:
    host = UNKNOWN_HOST if video["broken"] == "unknown-host" else base_url
    row = {"url": host + video["url_path"], "id": video["video_id"], "title": video["title"]}
    row |= {"category": video["category"], "language": "en", "licence": LICENCE}
    if video["subtitle"]:
        row["subtitle"] = base_url + video["subtitle"]["url_path"]
    return row


# ---------------------------------------------------------------- the folder


def _claim(folder: Path, fingerprint: str) -> WorldSummary | None:
    """Mark the folder as this world's; return the totals if the world is complete already, else None."""
    mark = folder / "world.json"
    if mark.exists():
        known = json.loads(mark.read_text())
        if known.get("fingerprint") == fingerprint:
            return WorldSummary(**known["summary"]) if known["summary"] else None
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"demo world: {folder} is not empty and holds no world of these settings; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"fingerprint": fingerprint, "summary": None}))
    return None


def _finish(folder: Path, settings: WorldSettings, fingerprint: str, rows: list[dict[str, Any]]) -> WorldSummary:
    """Write the truth and fault files, then the totals, which mark the world as complete."""
    faults = {row["file"]: row.pop("fault") for row in rows if row["fault"]}
    for row in rows:
        row.pop("fault", None)
    (folder / "faults.json").write_text(json.dumps(faults, indent=1))
    (folder / "truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(
        pa.Table.from_pylist([r for row in rows for r in _scene_rows(row)], SCENE_ROWS), folder / "truth.parquet"
    )
    working = [row for row in rows if row["works"]]
    summary = WorldSummary(
        num_videos=len(working),
        num_broken=len(rows) - len(working),
        num_scenes=sum(len(row["scenes"]) for row in working),
        duration_s=round(sum(row["duration_s"] for row in working), 3),
        num_bytes=sum(row["num_bytes"] for row in rows),
    )
    shown = settings.model_dump(mode="json", exclude={"workers"})
    mark = {"fingerprint": fingerprint, "summary": asdict(summary), "settings": shown}
    (folder / "world.json").write_text(json.dumps(mark, indent=1))
    return summary


@dataclass(frozen=True)
class Job:
    settings: WorldSettings
    index: int
    broken: str | None = None


def _run(folder: Path, jobs: list[Job], workers: int) -> Iterator[dict[str, Any]]:
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers == 1:
        yield from (_make_video(folder, job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        for future in as_completed([pool.submit(_make_video, folder, job) for job in jobs]):
            yield future.result()


def _one_thread() -> None:
    import cv2

    cv2.setNumThreads(1)


# ---------------------------------------------------------------- one video


def _make_video(folder: Path, job: Job) -> dict[str, Any]:
    """Write the files of one video; return its row of the truth."""
    plan = plan_video(job.settings, job.index)
    rng = np.random.default_rng([job.settings.seed, job.index, 1])
    sentences = narrate(plan.scenes, rng, job.settings.filler_fraction)
    fault = _write_media(folder / plan.file, plan, job.broken, rng)
    subtitle = None
    if plan.subtitle_file and job.broken not in NEVER_WORK:
        _, write = SUBTITLE_WRITERS[plan.subtitle_kind]
        text = write(shifted(sentences, plan.subtitle_offset_s), bool(rng.random() < 0.5))
        (folder / plan.subtitle_file).write_bytes(text.encode())
        subtitle = {"file": plan.subtitle_file, "url_path": f"/{plan.subtitle_file}"}
        subtitle |= {"kind": plan.subtitle_kind, "offset_s": plan.subtitle_offset_s}
    title = f"The {plan.scenes[0][1].objects[0].name} and {len(plan.scenes) - 1} more scenes"
    row = {"index": job.index, "video_id": plan.video_id, "title": title, "category": plan.category}
    row |= {"file": plan.file, "url_path": f"/{plan.file}", "broken": job.broken, "works": job.broken not in NEVER_WORK}
    row |= {"duplicate_of": None, "fault": fault, "subtitle": subtitle}
    scenes = [_scene(n, start_s, scene, plan, sentences) for n, (start_s, scene) in enumerate(plan.scenes)]
    return row | _file_facts(folder / plan.file, plan) | {"scenes": scenes if row["works"] else []}


def _write_media(path: Path, plan: VideoPlan, broken: str | None, rng: np.random.Generator) -> dict[str, Any] | None:
    """Write the video, or the file that a broken source has instead.

    Returns the fault that the server plays, if any.
    """
    from pipeline.demo import encode

    if broken == "html":
        path.write_text("<!DOCTYPE html>\n<html><body><h1>This video is not available</h1></body></html>\n")
        return {"content_type": "text/html; charset=utf-8"}
    if broken == "empty":
        path.write_bytes(b"")
        return None
    if broken in ("not-found", "unknown-host"):
        return None
    audio = encode.quiet_audio(plan.duration_s, rng) if plan.has_audio or broken == "audio-only" else None
    if broken == "audio-only":
        encode.write_audio(path, audio)
        return None
    encode.write_video(path, plan.format_name, frames_of(plan), plan.size, plan.rate, audio, plan.rotation)
    if broken == "truncated":  # an MP4's index is at its end, so none of it plays
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 6 // 10])
    if broken == "cut-off":
        return {"cut_after_bytes": path.stat().st_size // 2, "times": 1}
    return {"status": 503, "times": 1} if broken == "unavailable-once" else None


def _file_facts(path: Path, plan: VideoPlan) -> dict[str, Any]:
    """Return a video file's columns of the truth. `fps` is null if it varies; `width` and `height` are as displayed."""
    data = path.read_bytes() if path.exists() else b""
    return {
        "num_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest() if path.exists() else None,
        "format": plan.format_name,
        "codec": FORMATS[plan.format_name].codec,
        "width": plan.size[0],
        "height": plan.size[1],
        "fps": float(plan.rate) if plan.rate else None,
        "rotation": plan.rotation,
        "has_audio": plan.has_audio,
        "num_frames": len(plan.frame_times),
        "duration_s": plan.duration_s,
    }


def _scene(n: int, start_s: float, scene: grammar.Scene, plan: VideoPlan, sentences: list[Sentence]) -> dict[str, Any]:
    """Return the truth about one scene.

    `fade_s` is for how long after `start_s` the previous scene is still visible; `filler` marks unrelated speech.
    """
    from pipeline.demo.plan import FADE_S

    spoken = [sentence for sentence in sentences if sentence.scene == n]
    return {
        "n": n,
        "start_s": start_s,
        "end_s": start_s + scene.duration_s,
        "fade_s": FADE_S if plan.fades[n] else 0.0,
        "facts": grammar.facts(scene),
        "still_text": grammar.still_text(scene, n),
        "motion_text": grammar.motion_text(scene, n),
        "filler": any(sentence.filler for sentence in spoken),
        "narration": [{"text": s.text, "words": [asdict(word) for word in s.words]} for s in spoken],
        "scene": asdict(scene),
    }


# ---------------------------------------------------------------- truth.parquet

_TEXTS = ("shape", "colour", "size", "texture", "motion")
SCENE_ROWS = pa.schema(
    [(name, pa.string()) for name in ("video_id", "file", "category", "subtitle_kind")]
    + [("subtitle_offset_s", pa.float64()), ("n", pa.int32()), ("start_s", pa.float64()), ("end_s", pa.float64())]
    + [(name, pa.string()) for name in _TEXTS]  # of the first object
    + [(f"{name}_2", pa.string()) for name in _TEXTS]  # of the second object, null if there is only one
    + [("background_colour", pa.string()), ("background_texture", pa.string()), ("passing", pa.bool_())]
    + [("still_text", pa.string()), ("motion_text", pa.string()), ("spoken", pa.string()), ("filler", pa.bool_())]
)


def _scene_rows(video: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of truth.parquet (SCENE_ROWS) for a video's row of the truth."""
    subtitle = video["subtitle"] or {"kind": None, "offset_s": None}
    for scene in video["scenes"]:
        facts = scene["facts"]
        row = {name: video[name] for name in ("video_id", "file", "category")}
        row |= {"subtitle_kind": subtitle["kind"], "subtitle_offset_s": subtitle["offset_s"]}
        row |= {name: scene[name] for name in ("n", "start_s", "end_s", "still_text", "motion_text", "filler")}
        row |= {"spoken": " ".join(sentence["text"] for sentence in scene["narration"]), "passing": facts["passing"]}
        row |= {f"background_{name}": value for name, value in facts["background"].items()}
        for suffix, thing in zip(("", "_2"), facts["objects"], strict=False):
            row |= {f"{name}{suffix}": thing[name] for name in _TEXTS}
        yield row
