"""The transcribe stage: a video's subtitles beside or inside it, or else its speech → words with times."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

from captioning.model_identity import file_sha256
from clipmill.base.errors import ItemError, UserError
from clipmill.base.settings import digest
from pipeline.runtime.source_file import CHANGED, unchanged
from pipeline.runtime.task import Result, Stopwatch, Task, sandbox
from pipeline.stages.stage import Stage
from pipeline.stages.transcribe.recognition import Recogniser, load_recogniser
from pipeline.stages.transcribe.speech import extract_speech
from pipeline.stages.transcribe.tracks import subtitle_tracks
from pipeline.stages.transcribe.transcribe import (
    TranscribeSettings,
    Transcript,
    transcribe_video,
    transcript_of_subtitles,
)
from shards.corpus.stage_query import chosen_rows
from shards.storage.mirror import files_of

WANTED = """
    -- Costs are in seconds of video to cut: reading subtitles takes almost no time, recognition as long as cutting.
    SELECT video_id AS item_id, unit, coalesce(duration_s, 0) / if(len(subtitles) > 0, 100, 1) AS cost,
           md5(concat_ws('|', $fingerprint, sha256, subtitles::VARCHAR)) AS key
    FROM current_videos WHERE duplicate_of IS NULL
"""

PAYLOAD = """
    SELECT w.item_id, w.key, w.attempts, w.cost, v.video_id, v.path, v.sha256, v.file_stamp, v.duration_s, v.subtitles,
           v.audio_codec, v.fps,
           coalesce(s.language, v.language) AS language
    FROM work w JOIN current_videos v ON v.video_id = w.item_id JOIN sources s ON s.video_id = w.item_id
    ORDER BY w.item_id
"""


def identity(settings: TranscribeSettings) -> str:
    """Hash the settings, and the weights if they are a file or a folder for faster-whisper."""
    path = Path(settings.whisper or "")
    weights = path / "model.bin" if path.is_dir() else path
    if settings.whisper and weights.is_file():
        return digest([settings.fingerprint(), file_sha256(weights)])
    if path.is_absolute() or path.suffix in (".pt", ".pth", ".bin"):
        raise UserError(f"setting transcribe.whisper = {settings.whisper}: this file does not exist.")
    return settings.fingerprint()


def run_transcribe(task: Task) -> Result:
    """Find the words of each video.

    An unreadable subtitle or a missing model loses the words, not the video: it is a failure of the part
    VIDEO_ID.speech, which stands until the video is transcribed again.
    """
    settings, local, outcomes = task.settings, files_of(task.root).local, []
    limits = {"timeout_s": settings.timeout_s, "memory_bytes": settings.memory_mb * 2**20}

    def in_sandbox(function: Callable, *arguments):
        return sandbox().call(function, *arguments, **limits)

    for item in task.items:
        with Stopwatch(item["item_id"]) as outcome, ExitStack() as stack:
            video = {"video_language": item["language"], "fps": item["fps"]}
            files = [{**file, **video, "path": str(local(file["path"]))} for file in item["subtitles"] or []]
            for file in files:
                if Path(file["path"]).exists():  # else it is reported, and the next one is tried
                    stack.enter_context(unchanged(file["path"], file["sha256"]))
            problems: list[ItemError] = []

            def extract(path: Path, item: dict = item):
                with unchanged(path, item["sha256"], item["file_stamp"]):
                    return in_sandbox(extract_speech, path, settings.max_speech_s)

            try:
                tracks = in_sandbox(subtitle_tracks, local(item["path"]))
            except ItemError as error:
                problems.append(error)
            else:
                files += tracks
                if tracks:
                    stack.enter_context(unchanged(local(item["path"]), item["sha256"], item["file_stamp"]))
            try:
                row = transcribe_video(
                    files,
                    local(item["path"]),
                    settings,
                    _whisper,
                    extract,
                    problems,
                    lambda files, settings: in_sandbox(transcript_of_subtitles, files, settings),
                    item["language"],
                )
            except ItemError as error:
                if error.error_class == CHANGED:
                    raise
                row, problems = Transcript("none").as_row(), [*problems, error]
            confidences = [row["asr_segments"]] if row["asr_segments"] else []  # none in rows of earlier versions
            row["digest"] = digest([row["language"], row["words"], *confidences])
            outcome.rows["transcripts"] = [{"video_id": item["video_id"], "source_sha256": item["sha256"], **row}]
            outcome.parts = [(f"{item['video_id']}.speech", problem) for problem in problems[-1:]]
        outcomes.append(outcome)
    return outcomes, []


def _whisper(settings: TranscribeSettings) -> Recogniser:
    """Return the model, or raise the ItemError of the first failed attempt to load it in this process."""
    model = _whisper_or_error(settings.model_dump_json())
    if isinstance(model, ItemError):
        raise model
    return model


@lru_cache(maxsize=1)
def _whisper_or_error(settings: str):
    try:
        return load_recogniser(TranscribeSettings.model_validate_json(settings))
    except ItemError as error:
        return error


TRANSCRIBE = Stage(
    "transcribe",
    help="subtitles or speech → words with times",
    settings=TranscribeSettings,
    identity=identity,
    item="video",
    reads_source=True,
    after=("download",),
    wanted=WANTED,
    current=(f"CREATE OR REPLACE TEMP TABLE current_transcripts AS {chosen_rows('transcribe', 'transcripts')}",),
    payload=PAYLOAD,
    run=run_transcribe,
)
