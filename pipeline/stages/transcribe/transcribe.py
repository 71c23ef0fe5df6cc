"""Transcribe a video: from its best usable subtitle file, else by Whisper, else not at all.

Subtitle files are untrusted; an unusable one is reported, and the next one is tried. A manual transcript,
whose cues give only rough times, takes word times from the automatic captions of the same video. Import nothing heavy
at the top of this module: torch and Whisper come in when a model is needed.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from clipmill.base.errors import ItemError, UserError
from clipmill.base.settings import operational, setting
from pipeline.runtime.watchdog import time_limit
from pipeline.stages.transcribe.subtitles import (
    Cue,
    Mark,
    SubtitleSettings,
    clean,
    read_subtitles,
    unreadable,
    words_of,
)
from pipeline.stages.transcribe.words import Word

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

SAMPLE_RATE = 16_000  # Hz, Whisper's input
START_S = 300.0  # allowed for starting recognition of a sound of any length


class TranscribeSettings(SubtitleSettings):
    """Settings of the stage `transcribe`: choice of subtitles, and Whisper for videos without them."""

    # Subtitle languages, best first; "en" also takes en-US and en-orig. English, because CLIP's text tower reads it.
    languages: list[str] = ["en"]
    # Use another language if none of these is available, so that the video keeps a transcript with its language.
    other_languages: bool = True
    # The track to prefer within one language. People punctuate; automatic captions have better word times.
    prefer: Literal["manual", "auto"] = "manual"
    # A subtitle file with fewer words is skipped, and the next one, or Whisper, is tried. 1 skips empty files only.
    min_words: int = Field(1, ge=1)
    # Take word times for a manual transcript from automatic captions, because manual cues are coarsely timed.
    align_manual_to_auto: bool = True

    # Speech recognition for videos without a usable subtitle: a model's name (tiny, base, small, turbo …), a path of
    # weights, or null for no transcript. base understands clear English and keeps up with speech on one core.
    whisper: str | None = setting("base", reaches="reads a file", unless=r"[a-z0-9-]+(\.en)?")
    # The spoken language as Whisper's code (en, de …); null: recognised from the first 30 s.
    whisper_language: str | None = None
    # Beams of the search: 5 as in Whisper's paper; 1 decodes greedily, about twice as fast.
    whisper_beam_size: int = Field(5, ge=1)
    # Tried in turn while the text is repetitive or improbable, as in Whisper's paper. Above 0 the text is sampled, from
    # a fixed seed.
    whisper_temperatures: list[float] = Field([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], min_length=1)
    # Prompt Whisper with the text before. Off by default: the text is smoother, but repetitions spread.
    whisper_condition_on_previous: bool = False
    # Seconds that recognition may take per second of sound, plus five minutes, before it counts as hung. 60 leaves room
    # for a large model on one slow core.
    whisper_timeout_per_second: float = operational(60.0, gt=0)
    # "cuda" or "cpu"; null: a GPU if torch finds one.
    whisper_device: str | None = operational(None)
    # Folder of downloaded models; null: Whisper's own cache.
    whisper_folder: str | None = operational(None, reaches="reads and writes that folder")

    # Seconds that reading a video's subtitles, and decoding its sound, may each take before they count as hung. Half an
    # hour is enough for hours of video from a slow disk.
    timeout_s: float = operational(1800.0, gt=0)
    # Megabytes of memory for each of the two: six hours of sound need 2.8 GB.
    memory_mb: int = operational(3072, ge=256)
    # Seconds of sound to transcribe; the rest is left out. Six hours fit in memory_mb.
    max_speech_s: float = operational(6 * 3600.0, gt=0)
    # A subtitle file with more words is refused: a million words are a hundred hours of speech.
    max_words: int = operational(1_000_000, ge=1)

    @field_validator("whisper", mode="before")
    @classmethod
    def _off_is_none(cls, value: Any) -> Any:
        return None if value in (False, "", "off", "none") else value  # YAML reads a bare off as false


Extract = Callable[[Path], "np.ndarray | None"]  # a video's speech as float32 at 16 kHz, mono
Read = Callable[[Sequence[dict], TranscribeSettings], "tuple[Transcript | None, list[ItemError]]"]
LoadModel = Callable[[TranscribeSettings], Any]


@dataclass(frozen=True)
class Transcript:
    """The words of a video, and where they come from."""

    origin: str  # manual | auto | given | sidecar | whisper | none
    language: str | None = None
    word_times: str = "none"  # tags | cues | asr | none
    words: Sequence[Word] = ()

    def as_row(self) -> dict:
        """Return the columns of `transcripts` except video_id."""
        words = [{"text": word.text, "start_s": word.start_s, "end_s": word.end_s} for word in self.words]
        return {
            "language": self.language,
            "origin": self.origin,
            "word_times": self.word_times,
            "words": words,
            "num_words": len(words),
        }


def load_whisper(settings: TranscribeSettings) -> Any:
    """Load the Whisper model of the settings, once per process.

    Raises UserError for an unknown model or a missing device, and ItemError "model-unavailable" (transient) if the
    download fails.
    """
    return _load_whisper(settings.whisper, settings.whisper_device, settings.whisper_folder)


@lru_cache(maxsize=1)
def _load_whisper(name: str, device: str | None, folder: str | None) -> Any:
    import torch
    import whisper

    if name not in whisper.available_models() and not Path(name).is_file():
        known = ", ".join(whisper.available_models())
        raise UserError(f"setting transcribe.whisper = {name!r}: give null, a file of weights, or one of {known}.")
    try:
        torch.device(device or "cpu")
        return whisper.load_model(name, device=device, download_root=folder).eval()
    except OSError as error:  # without network or disk space every waiting video can be tried again later
        raise ItemError("model-unavailable", f"Whisper {name}: {error}", transient=True) from error
    except Exception as error:  # torch and Whisper raise anything for foreign weights or a missing device
        raise UserError(
            f"setting transcribe.whisper = {name!r} cannot be loaded on {device or 'the default device'} "
            f"({type(error).__name__}: {error}); check the weights file and transcribe.whisper_device."
        ) from error


def transcribe_video(
    subtitle_files: Sequence[dict],
    video_path: str | Path,
    settings: TranscribeSettings,
    load_model: LoadModel = load_whisper,
    extract: Extract | None = None,
    problems: list[ItemError] | None = None,
    read: Read | None = None,
) -> dict:
    """Return the row of `transcripts` for one video, without video_id.

    `subtitle_files` are dicts with path, language (or None), kind (manual, auto, given, sidecar) and format (or None).
    `read` reads subtitles, by default `transcript_of_subtitles`; `extract` decodes speech, by default `extract_speech`.
    Both open hostile files, so callers pass ones that run in a sandbox. A video without sound or speech is not a
    failure: its origin is "none", or it has no words. Unusable subtitle files are appended to `problems`, or logged if
    that is None, when the words come from another source.

    Raises ItemError: subtitle-unreadable if all files are unreadable and Whisper is off, model-unavailable, asr-failed,
    and those of `extract`; UserError as `load_model` does.
    """
    transcript, found = _read_safely(_ranked(subtitle_files, settings), settings, read or transcript_of_subtitles)
    if transcript is None and settings.whisper is not None:
        transcript = _from_speech(Path(video_path), settings, load_model, extract)
    elif transcript is None and found and len(found) == len(subtitle_files):
        raise found[0]
    if problems is not None:
        problems += found
    else:
        for problem in found:
            log.warning("%s", problem)
    return (transcript or Transcript("none")).as_row()


# --- subtitles -----------------------------------------------------------------------------------------------------


def _ranked(files: Sequence[dict], settings: TranscribeSettings) -> list[dict]:
    """Order the files to try, best first: given by the user, then by language, then by kind; leave out the others."""
    kinds = ("manual", "auto") if settings.prefer == "manual" else ("auto", "manual")
    ranked = []
    for index, file in enumerate(files):
        language = _language_rank(file.get("language"), settings.languages)
        if language > len(settings.languages) and not settings.other_languages:
            continue
        kind = file["kind"]
        ranked.append((kind in kinds, language, kinds.index(kind) if kind in kinds else 0, index))
    return [files[index] for *_, index in sorted(ranked)]


def _language_rank(language: str | None, preferred: Sequence[str]) -> float:
    """Rank a language: its index among the preferred ones (a regional variant + 0.5), then unknown, then others."""
    if not language:
        return len(preferred)
    code = _code(language)
    for index, wanted in enumerate(_code(name) for name in preferred):
        if code == wanted:
            return index
        if code.split("-")[0] == wanted:
            return index + 0.5
    return len(preferred) + 1


def _code(language: str) -> str:
    return language.casefold().replace("_", "-")


def _read_safely(
    files: Sequence[dict], settings: TranscribeSettings, read: Read
) -> tuple[Transcript | None, list[ItemError]]:
    """Read all files at once; if one of them breaks `read`, read each of them alone."""
    problems: list[ItemError] = []
    for some in [files, *([file] for file in files if len(files) > 1)] if files else []:
        try:
            transcript, found = read(some, settings)
        except ItemError as error:
            names = ", ".join(Path(file["path"]).name for file in some)
            problems.append(ItemError(error.error_class, f"{names}: {error.message}", transient=error.transient))
            continue
        problems += found
        if transcript is not None or some is files:
            return transcript, problems
    return None, problems


def transcript_of_subtitles(
    files: Sequence[dict], settings: TranscribeSettings
) -> tuple[Transcript | None, list[ItemError]]:
    """Return the transcript of the first file with enough words (None without one), and the problems of the files."""
    problems: list[ItemError] = []
    for file in files:
        transcript = _read(file, settings, problems)
        if transcript is None or len(transcript.words) < settings.min_words:
            continue
        if settings.align_manual_to_auto and file["kind"] != "auto" and transcript.word_times == "cues":
            transcript = _on_automatic_times(transcript, files, settings, problems)
        return transcript, problems
    return None, problems


def _read(file: dict, settings: TranscribeSettings, problems: list[ItemError]) -> Transcript | None:
    """Read one file; append its problem, once, and return None if it is unusable."""
    try:
        cues = read_subtitles(file["path"], file.get("format"), settings)
        words, word_times = words_of(cues)
        if len(words) > settings.max_words:
            raise unreadable(f"{len(words):,} words are more than transcribe.max_words = {settings.max_words:,}")
    except ItemError as error:
        problem = ItemError(error.error_class, f"{Path(file['path']).name}: {error.message}")
        if problem.args not in [known.args for known in problems]:
            problems.append(problem)
        return None
    if cues.repairs:
        log.info("%s: repaired: %s", Path(file["path"]).name, cues.repairs)
    return Transcript(file["kind"], file.get("language") or cues.language, word_times, words)


MAX_MISMATCH = 0.4  # mean cost above which two transcripts differ in their words (unrelated text has about 0.8)


def _on_automatic_times(
    transcript: Transcript, files: Sequence[dict], settings: TranscribeSettings, problems: list[ItemError]
) -> Transcript:
    """Take word times from automatic captions of the same language, if any exist and their words agree."""
    from pipeline.stages.transcribe.alignment import retime

    for file in files:
        languages = {_code(code).split("-")[0] for code in (file.get("language"), transcript.language) if code}
        if file["kind"] != "auto" or len(languages) > 1:  # an unknown language may be the same one
            continue
        automatic = _read(file, settings, problems)
        if automatic is None or automatic.word_times != "tags":
            continue
        words, costs = retime(transcript.words, automatic.words)
        if costs.mean() <= MAX_MISMATCH:
            return Transcript(transcript.origin, transcript.language, "tags", words)
    return transcript


# --- speech --------------------------------------------------------------------------------------------------------


def _from_speech(
    path: Path, settings: TranscribeSettings, load_model: LoadModel, extract: Extract | None
) -> Transcript | None:
    """Transcribe the sound of a video; None without sound. Raises ItemError."""
    if extract is None:
        from pipeline.stages.transcribe.speech import extract_speech as extract
    try:
        samples = extract(path)
    except ItemError as error:
        if error.error_class.startswith("no-audio"):
            return None
        raise
    if samples is None or not len(samples):
        return None
    language, words = recognise(samples, load_model(settings), settings)
    return Transcript("whisper", language, "asr" if words else "none", words)


def recognise(samples: "np.ndarray", model: Any, settings: TranscribeSettings) -> tuple[str, list[Word]]:
    """Recognise speech in 16 kHz mono float32 samples; return its language and words, the same for the same samples.

    Raises ItemError "asr-failed".
    """
    import torch

    options = {
        "beam_size": settings.whisper_beam_size if settings.whisper_beam_size > 1 else None,
        "language": settings.whisper_language,
        "fp16": model.device.type == "cuda",
    }
    duration_s = len(samples) / SAMPLE_RATE
    timeout_s = START_S + settings.whisper_timeout_per_second * duration_s
    try:
        gpus = [model.device] if model.device.type == "cuda" else []
        limit = time_limit(timeout_s, f"transcribing {duration_s:,.0f} s of sound")
        with limit, torch.random.fork_rng(devices=gpus), torch.inference_mode():
            torch.manual_seed(0)
            result = model.transcribe(
                samples.copy(),  # torch needs a writable array
                temperature=tuple(settings.whisper_temperatures),
                condition_on_previous_text=settings.whisper_condition_on_previous,
                word_timestamps=True,
                **options,
            )
    except Exception as error:  # any exception of the model is the failure of this video alone
        raise ItemError("asr-failed", f"Whisper: {type(error).__name__}: {error}") from error
    cues = [cue for segment in result["segments"] if (cue := _segment_cue(segment, duration_s, settings))]
    return result["language"], words_of(cues)[0]


def _segment_cue(segment: dict, duration_s: float, settings: TranscribeSettings) -> Cue | None:
    """Convert a segment of Whisper's to a cue, so that sound and speaker labels are cleaned as those of subtitles."""
    text, marks = "", []
    for word in segment.get("words", ()):
        start_s = min(max(0.0, float(word["start"])), duration_s)
        marks.append(Mark(len(text), start_s, min(max(start_s, float(word["end"])), duration_s)))
        text += word["word"]
    if not marks:
        return None
    return Cue(marks[0].start_s, marks[-1].end_s or duration_s, clean(text, settings), tuple(marks))
