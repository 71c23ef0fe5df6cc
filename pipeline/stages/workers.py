"""The stages that touch videos, as a worker runs them: from the ledger's items to rows, calling each stage's module.

Each runner takes a `Work` and returns an Outcome per item and the media files it wrote, relative to the corpus. Source
videos are decoded in this process's sandbox, so that a crash, a hang or a balloon costs one video.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

from clipmill.base.errors import ItemError
from clipmill.base.settings import digest
from clipmill.media.probe import probe
from clipmill.media.sandbox import Sandbox
from pipeline.runtime.task import GOVERNOR, Outcome, Result, Stopwatch, Work, require_holder
from pipeline.runtime.watchdog import time_limit
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_in_sandbox
from pipeline.stages.download.fetch import fetch, new_rate_limiter
from pipeline.stages.segment.segment import needs_shots, segment_video
from pipeline.stages.segment.shots import detect_shots
from pipeline.stages.transcribe.speech import extract_speech
from pipeline.stages.transcribe.transcribe import (
    TranscribeSettings,
    Transcript,
    load_whisper,
    transcribe_video,
    transcript_of_subtitles,
)
from pipeline.stages.transcribe.words import Word
from shards.corpus.fragments import temporary_folder
from shards.corpus.tombstones import FORGOTTEN, read_tombstones
from shards.packing.tar import Blob, write_clips_tar
from shards.storage.mirror import files_of


@lru_cache(maxsize=1)
def sandbox() -> Sandbox:
    """This process's one sandbox: its child is started once and used for every video after."""
    return Sandbox()


def run_download(work: Work) -> Result:
    """The unit's sources side by side: this is waiting for the network, and each host has its own cap."""
    root = Path(work.root)
    folder = root / "sources" / work.unit
    governor = _governor(work)
    forgotten = set(read_tombstones(root)["sha256"].to_pylist())

    def one(item: dict) -> Outcome:
        with Stopwatch(item["item_id"]) as outcome:
            probe = partial(_probe_in_sandbox, work.settings.probe_timeout_s)
            row = fetch(
                item,
                folder,
                work.settings,
                corpus_root=root,
                rate_limiter=governor,
                probe=probe,
                require_lock=partial(require_holder, work),
            )
            if row["sha256"] in forgotten:
                _remove_files(folder, item["video_id"])
                raise ItemError(FORGOTTEN, "these are the bytes of a video that the corpus was told to forget")
            if not os.path.isabs(row["path"]):
                files_of(root).written(*(str(p.relative_to(root)) for p in folder.glob(f"{item['video_id']}.*")))
            outcome.rows["downloads"] = [row]
            outcome.parts = list(_subtitle_failures(row))
        return outcome

    with ThreadPoolExecutor(max_workers=len(work.items), thread_name_prefix="download") as pool:
        return list(pool.map(one, work.items)), []


def _remove_files(folder: Path, video_id: str) -> None:
    for path in folder.glob(f"{video_id}.*"):
        path.unlink()


def _subtitle_failures(row: dict) -> Iterator[tuple[str, ItemError]]:
    """Subtitles that a source names and that could not be had: the video is kept, the loss is a row."""
    for number, problem in enumerate(json.loads(row["meta"] or "{}").get("subtitle_errors", [])):
        message = f"{problem['subtitle']}: {problem['message']}"
        yield f"{row['video_id']}.subtitle{number}", ItemError(problem["error_class"], message)


def _probe_in_sandbox(timeout_s: float, path: Path):
    return sandbox().call(probe, path, timeout_s=timeout_s)


def _governor(work: Work):
    """The cluster's one governor of hosts, which the driver starts when the first URL is to be fetched."""
    if all(item["kind"] == "file" for item in work.items):
        return None
    import ray

    return ray.get_actor(GOVERNOR) if ray.is_initialized() else new_rate_limiter(work.settings)


def run_transcribe(work: Work) -> Result:
    """Speech that cannot be had (an unreadable subtitle, a model that is not there) costs the words, not the video.

    It is a failure of the part VIDEO_ID.speech, which stands until the video is transcribed again.
    """
    local, outcomes = files_of(work.root).local, []
    for item in work.items:
        with Stopwatch(item["item_id"]) as outcome:
            files = [{**file, "path": str(local(file["path"]))} for file in item["subtitles"] or []]
            problems: list[ItemError] = []
            try:
                row = transcribe_video(
                    files,
                    local(item["path"]),
                    work.settings,
                    _whisper,
                    partial(_speech, work.settings),
                    problems,
                    _read,
                )
            except ItemError as error:
                row, problems = Transcript("none").as_row(), [*problems, error]
            row["digest"] = digest([row["language"], row["words"]])
            outcome.rows["transcripts"] = [{"video_id": item["video_id"], "source_sha256": item["sha256"], **row}]
            outcome.parts = [(f"{item['video_id']}.speech", problem) for problem in problems[-1:]]
        outcomes.append(outcome)
    return outcomes, []


def _speech(settings: TranscribeSettings, path: Path):
    return _in_sandbox(settings, extract_speech, path, settings.timeout_s, settings.max_speech_s)


def _read(files: Sequence[dict], settings: TranscribeSettings):
    return _in_sandbox(settings, transcript_of_subtitles, files, settings)


def _in_sandbox(settings: TranscribeSettings, function: Callable, *arguments):
    limits = {"timeout_s": settings.timeout_s, "memory_bytes": settings.memory_mb * 2**20}
    return sandbox().call(function, *arguments, **limits)


@lru_cache(maxsize=1)
def _whisper_or_error(settings: str):
    try:
        return load_whisper(TranscribeSettings.model_validate_json(settings))
    except ItemError as error:
        return error


def _whisper(settings: TranscribeSettings):
    """The model; one that cannot be loaded is not tried again for every video of this process."""
    model = _whisper_or_error(settings.model_dump_json())
    if isinstance(model, ItemError):
        raise model
    return model


def run_segment(work: Work) -> Result:
    outcomes = []
    for item in work.items:
        with Stopwatch(item["item_id"]) as outcome:
            words, given = [Word(**word) for word in item["words"]], item["given_spans"]
            shots = _shots(work, item) if needs_shots(words, given, work.settings) else None
            with time_limit(work.settings.timeout_base_s, f"segmenting {len(words):,} words"):
                segmented = segment_video(item["video_id"], words, item["duration_s"], given, shots, work.settings)
            stamp = {"source_sha256": item["sha256"]}
            outcome.rows["sentences"] = [{**row, **stamp} for row in segmented.sentences]
            outcome.rows["spans"] = [{**row, **stamp} for row in segmented.spans]
        outcomes.append(outcome)
    return outcomes, []


def _shots(work: Work, item: dict) -> list[tuple[float, float]]:
    settings = work.settings
    limit_s = settings.timeout_base_s + settings.timeout_per_second * (item["duration_s"] or 0)
    limit_s = min(limit_s, settings.timeout_most_s)
    path = files_of(work.root).local(item["path"])
    return sandbox().call(detect_shots, path, work.settings.shots, timeout_s=limit_s)


def run_cut(work: Work) -> Result:
    """Each video is cut into a blob file by the sandbox; the blobs then become one tar of the work's name."""
    root, name = Path(work.root), f"clips/{work.name}.tar"
    with temporary_folder(root / "clips" / work.name) as folder:
        outcomes = [_cut_video(work, item, folder) for item in work.items]
        rows = [row for outcome in outcomes for row in outcome.rows.get("clips", [])]
        if rows:
            _write_tar(root / name, folder, rows)
            for row in rows:
                row["tar"] = name
        return outcomes, [name] if rows else []


def _cut_video(work: Work, item: dict, folder: Path) -> Outcome:
    settings: CutSettings = work.settings
    with Stopwatch(item["item_id"]) as outcome:
        spans = [SpanRequest(**span) for span in item["spans"]]
        source = files_of(work.root).local(item["path"])
        result = cut_in_sandbox(sandbox(), source, spans, settings, folder / item["video_id"], item["duration_s"])
        stamp = {"video_id": item["video_id"], "source_sha256": item["sha256"]}
        outcome.rows["clips"] = [{**row, **stamp} for row in result.rows]
        outcome.parts = list(result.failures)
    return outcome


def _write_tar(path: Path, folder: Path, rows: list[dict]) -> None:
    """Copy every clip's mp4 and caption frames into one tar and point the rows at them."""
    blobs = []
    for row in rows:
        source = folder / row["video_id"]
        blobs.append(Blob(f"{row['clip_id']}.mp4", source, row["mp4_offset"], row["num_bytes"]))
        for index, frame in enumerate(row["frames"]):
            blobs.append(Blob(f"{row['clip_id']}.{index}.jpg", source, frame["offset"], frame["num_bytes"]))
    offsets = {member.name: member.offset for member in write_clips_tar(path, blobs)}
    for row in rows:
        row["mp4_offset"] = offsets[f"{row['clip_id']}.mp4"]
        for index, frame in enumerate(row["frames"]):
            frame["offset"] = offsets[f"{row['clip_id']}.{index}.jpg"]
