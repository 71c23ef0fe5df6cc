"""One video's transcript: from its best usable subtitle file, else by Whisper, else none.

Subtitle files may be anything; those that cannot be used are reported, and the next one is tried. A manual transcript
whose cues only tell roughly when things are said takes its times from the automatic captions of the same video.
Nothing heavy is imported before a model is needed.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from clipmill.base.errors import ItemError, UserError
from clipmill.base.settings import operational
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

SAMPLE_RATE = 16_000  # what Whisper hears
START_S = 300.0  # of recognition, before the first word


class TranscribeSettings(SubtitleSettings):
    languages: list[str] = ["en"]  # in order of preference; "en" also takes en-US and en-orig
    other_languages: bool = True  # take another language when none of these is there; the manifest says which it is
    prefer: Literal["manual", "auto"] = "manual"  # which track of one language: people punctuate, machines time words
    min_words: int = Field(1, ge=1)  # a subtitle with fewer words is none, and the next one, or Whisper, is tried
    align_manual_to_auto: bool = True  # manual text on automatic word times, because manual cues are coarsely timed

    # Where no subtitle is usable: a model's name (tiny, base, small, turbo …), a path of weights, or null for no
    # transcript. base hears clear English well and keeps up with speech on one core.
    whisper: str | None = "base"
    whisper_language: str | None = None  # what is spoken, as Whisper's code (en, de …); None: heard from the first 30 s
    whisper_beam_size: int = Field(5, ge=1)  # as in Whisper's paper; 1 decodes greedily, about twice as fast
    # Tried one after the other while the text is repetitive or improbable; above 0 it is sampled, from a fixed seed.
    whisper_temperatures: list[float] = Field([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], min_length=1)
    whisper_condition_on_previous: bool = False  # the text before as a prompt: smoother, but loops spread
    # Recognition may take this long for each second of sound, and five minutes more, before it counts as hung.
    whisper_timeout_per_second: float = operational(60.0, gt=0)
    whisper_device: str | None = operational(None)  # "cuda", "cpu"; None: a GPU if there is one
    whisper_folder: str | None = operational(None)  # where downloaded models are kept; None: Whisper's own cache

    # Reading the subtitles of a video, and getting at its sound, may take this long each …
    timeout_s: float = operational(1800.0, gt=0)
    # … and this much memory: six hours of sound need 2.8 GB.
    memory_mb: int = operational(3072, ge=256)
    # What comes after is not listened to.
    max_speech_s: float = operational(6 * 3600.0, gt=0)
    # A subtitle file with more words than this is none: nobody speaks a hundred hours.
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
    """Where a video's words come from, and the words."""

    origin: str  # manual | auto | given | sidecar | whisper | none
    language: str | None = None
    word_times: str = "none"  # tags | cues | asr | none
    words: Sequence[Word] = ()

    def as_row(self) -> dict:
        """The columns of `transcripts` but video_id."""
        words = [{"text": word.text, "start_s": word.start_s, "end_s": word.end_s} for word in self.words]
        return {
            "language": self.language,
            "origin": self.origin,
            "word_times": self.word_times,
            "words": words,
            "num_words": len(words),
        }


def load_whisper(settings: TranscribeSettings) -> Any:
    """The Whisper model of the settings, loaded once per process. Raises UserError for a name that is none."""
    return _load_whisper(settings.whisper, settings.whisper_device, settings.whisper_folder)


@lru_cache(maxsize=1)
def _load_whisper(name: str, device: str | None, folder: str | None) -> Any:
    import torch
    import whisper

    if name not in whisper.available_models() and not Path(name).is_file():
        known = ", ".join(whisper.available_models())
        raise UserError(f"setting transcribe.whisper = {name!r}: neither null, nor a file, nor one of {known}.")
    try:
        torch.device(device or "cpu")
        return whisper.load_model(name, device=device, download_root=folder).eval()
    except OSError as error:  # no network, no space: every video waiting for the model can be tried again
        raise ItemError("model-unavailable", f"Whisper {name}: {error}", transient=True) from error
    except Exception as error:  # a weights file that is not Whisper's, or a device that is not there
        problem = f"{type(error).__name__}: {error}"
        raise UserError(
            f"setting transcribe.whisper = {name!r} on {device or 'the default device'}: {problem}"
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
    """Row of `transcripts` without video_id.

    `subtitle_files` are dicts with path, language (or None), kind (manual, auto, given, sidecar) and format (or None).
    Subtitles are read by `read`, by default `transcript_of_subtitles`; speech by `extract`, by default `extract_speech`
    of `speech`. Both read hostile files: callers pass functions that run in a sandbox. A video without sound or speech
    has origin "none" or no words, which is not a failure. Subtitle files that could not be used, although the words
    come from elsewhere, are appended to `problems`, else logged. Raises ItemError: subtitle-unreadable if no file can
    be read and Whisper is off, model-unavailable, asr-failed, and those of `extract`.
    """
    transcript, found = _read_safely(_ranked(subtitle_files, settings), settings, read or transcript_of_subtitles)
    if transcript is None and settings.whisper is not None:
        transcript = _from_speech(Path(video_path), settings, load_model, extract or _extract_speech)
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
    """The files worth trying, best first: what the user gave, then by language, then by kind."""
    kinds = ("manual", "auto") if settings.prefer == "manual" else ("auto", "manual")
    ranked = []
    for place, file in enumerate(files):
        language = _language_rank(file.get("language"), settings.languages)
        if language > len(settings.languages) and not settings.other_languages:
            continue
        kind = file["kind"]
        ranked.append((kind in kinds, language, kinds.index(kind) if kind in kinds else 0, place))
    return [files[place] for *_, place in sorted(ranked)]


def _language_rank(language: str | None, preferred: Sequence[str]) -> float:
    """Place among the preferred ones, an exact match before a regional one; unknown after them, others last."""
    if not language:
        return len(preferred)
    code = _code(language)
    for place, wanted in enumerate(_code(name) for name in preferred):
        if code == wanted:
            return place
        if code.split("-")[0] == wanted:
            return place + 0.5
    return len(preferred) + 1


def _code(language: str) -> str:
    return language.casefold().replace("_", "-")


def _read_safely(
    files: Sequence[dict], settings: TranscribeSettings, read: Read
) -> tuple[Transcript | None, list[ItemError]]:
    """What `read` makes of the files; where one of them breaks it, what it makes of each alone."""
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
    """The transcript of the first file with enough words, None where none has, and what was wrong with files."""
    problems: list[ItemError] = []
    return _from_subtitles(files, settings, problems), problems


def _from_subtitles(
    files: Sequence[dict], settings: TranscribeSettings, problems: list[ItemError]
) -> Transcript | None:
    for file in files:
        transcript = _read(file, settings, problems)
        if transcript is None or len(transcript.words) < settings.min_words:
            continue
        if settings.align_manual_to_auto and file["kind"] != "auto" and transcript.word_times == "cues":
            transcript = _on_automatic_times(transcript, files, settings, problems)
        return transcript
    return None


def _read(file: dict, settings: TranscribeSettings, problems: list[ItemError]) -> Transcript | None:
    try:
        cues = read_subtitles(file["path"], file.get("format"), settings)
        words, word_times = words_of(cues)
        if len(words) > settings.max_words:
            raise unreadable(f"{len(words):,} words, at most transcribe.max_words = {settings.max_words:,} are taken")
    except ItemError as error:
        problem = ItemError(error.error_class, f"{Path(file['path']).name}: {error.message}")
        if problem.args not in [known.args for known in problems]:
            problems.append(problem)
        return None
    if cues.repairs:
        log.info("%s: set right: %s", Path(file["path"]).name, cues.repairs)
    return Transcript(file["kind"], file.get("language") or cues.language, word_times, words)


MAX_MISMATCH = 0.4  # mean cost above which two transcripts are not of the same words (unrelated text has about 0.8)


def _on_automatic_times(
    transcript: Transcript, files: Sequence[dict], settings: TranscribeSettings, problems: list[ItemError]
) -> Transcript:
    """The transcript with word times of automatic captions in its language, where there are such and they agree."""
    from pipeline.stages.transcribe.alignment import retime

    for file in files:
        if file["kind"] != "auto" or not _same_language(file.get("language"), transcript.language):
            continue
        automatic = _read(file, settings, problems)
        if automatic is None or automatic.word_times != "tags":
            continue
        words, costs = retime(transcript.words, automatic.words)
        if costs.mean() <= MAX_MISMATCH:
            return Transcript(transcript.origin, transcript.language, "tags", words)
    return transcript


def _same_language(a: str | None, b: str | None) -> bool:
    return not a or not b or _code(a).split("-")[0] == _code(b).split("-")[0]


# --- speech --------------------------------------------------------------------------------------------------------


def _extract_speech(path: Path) -> "np.ndarray | None":
    from pipeline.stages.transcribe.speech import extract_speech

    return extract_speech(path)


def _from_speech(
    path: Path, settings: TranscribeSettings, load_model: LoadModel, extract: Extract
) -> Transcript | None:
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
    """Language and words that Whisper hears in 16 kHz mono float32 samples. The same samples give the same words."""
    import torch

    options = {
        "beam_size": settings.whisper_beam_size if settings.whisper_beam_size > 1 else None,
        "language": settings.whisper_language,
        "fp16": model.device.type == "cuda",
    }
    try:
        gpus = [model.device] if model.device.type == "cuda" else []
        with _recognition_limit(samples, settings), torch.random.fork_rng(devices=gpus), torch.inference_mode():
            torch.manual_seed(0)
            result = model.transcribe(
                samples.copy(),  # torch wants to own what it reads
                temperature=tuple(settings.whisper_temperatures),
                condition_on_previous_text=settings.whisper_condition_on_previous,
                word_timestamps=True,
                **options,
            )
    except Exception as error:  # tensors, memory, tokens: whatever a model stumbles over is this video's failure
        raise ItemError("asr-failed", f"Whisper: {type(error).__name__}: {error}") from error
    limit_s = len(samples) / SAMPLE_RATE
    cues = [cue for segment in result["segments"] if (cue := _segment_cue(segment, limit_s, settings))]
    return result["language"], words_of(cues)[0]


def _recognition_limit(samples: "np.ndarray", settings: TranscribeSettings) -> AbstractContextManager:
    duration_s = len(samples) / SAMPLE_RATE
    limit_s = START_S + settings.whisper_timeout_per_second * duration_s
    return time_limit(limit_s, f"listening to {duration_s:,.0f} s of sound")


def _segment_cue(segment: dict, limit_s: float, settings: TranscribeSettings) -> Cue | None:
    """A segment of Whisper's as a cue, so that sound and speaker tags are treated as those of subtitles are."""
    text, marks = "", []
    for word in segment.get("words", ()):
        start_s = min(max(0.0, float(word["start"])), limit_s)
        marks.append(Mark(len(text), start_s, min(max(start_s, float(word["end"])), limit_s)))
        text += word["word"]
    if not marks:
        return None
    return Cue(marks[0].start_s, marks[-1].end_s or limit_s, clean(text, settings), tuple(marks))
