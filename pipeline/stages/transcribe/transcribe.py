"""Transcribe a video: from its best usable subtitle file or track, else by Whisper, else not at all.

Subtitle files are untrusted; an unusable one is reported, and the next one is tried. A manual transcript,
whose cues give only rough times, takes word times from the automatic captions of the same video. Import nothing heavy
at the top of this module: torch and Whisper come in when a model is needed.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from clipmill.base.errors import ItemError
from clipmill.base.settings import operational
from pipeline.stages.transcribe.cues import Cues, unreadable
from pipeline.stages.transcribe.recognition import LoadModel, RecognitionSettings, load_recogniser, recognise
from pipeline.stages.transcribe.subtitles import read_subtitles, words_of
from pipeline.stages.transcribe.words import Word

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)


class TranscribeSettings(RecognitionSettings):
    """Settings of the stage `transcribe`: reading and choice of subtitles, and Whisper for videos without them."""

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

    # Seconds that reading a video's subtitles, and decoding its sound, may each take before they count as hung. Half an
    # hour is enough for hours of video from a slow disk.
    timeout_s: float = operational(1800.0, gt=0)
    # Megabytes of memory for each of the two: six hours of sound need 2.8 GB.
    memory_mb: int = operational(3072, ge=256)
    # Seconds of sound to transcribe; the rest is left out. Six hours fit in memory_mb.
    max_speech_s: float = operational(6 * 3600.0, gt=0)
    # A subtitle file with more words is refused: a million words are a hundred hours of speech.
    max_words: int = operational(1_000_000, ge=1)


Extract = Callable[[Path], "np.ndarray | None"]  # a video's speech as float32 at 16 kHz, mono
Read = Callable[[Sequence[dict], TranscribeSettings], "tuple[Transcript | None, list[ItemError]]"]


@dataclass(frozen=True)
class Transcript:
    """The words of a video, and where they come from."""

    origin: str  # manual | auto | given | sidecar | embedded | whisper | none
    language: str | None = None
    word_times: str = "none"  # tags | cues | asr | none
    words: Sequence[Word] = ()
    encoding: str | None = None  # of the subtitle file
    encoding_guessed: bool | None = None
    repairs: dict[str, int] | None = None  # of the subtitle file, by kind
    asr_segments: Sequence[dict] = ()

    def as_row(self) -> dict:
        """Return the columns of `transcripts` except video_id."""
        words = [{"text": word.text, "start_s": word.start_s, "end_s": word.end_s} for word in self.words]
        return {
            "language": self.language,
            "origin": self.origin,
            "word_times": self.word_times,
            "words": words,
            "num_words": len(words),
            "encoding": self.encoding,
            "encoding_guessed": self.encoding_guessed,
            "repairs": json.dumps(self.repairs, sort_keys=True) if self.repairs else None,
            "asr_segments": list(self.asr_segments) or None,
        }


def transcribe_video(
    subtitle_files: Sequence[dict],
    video_path: str | Path,
    settings: TranscribeSettings,
    load_model: LoadModel = load_recogniser,
    extract: Extract | None = None,
    problems: list[ItemError] | None = None,
    read: Read | None = None,
    language: str | None = None,
) -> dict:
    """Return the row of `transcripts` for one video, without video_id.

    `subtitle_files` are dicts with path, language (or None), kind (manual, auto, given, sidecar, embedded) and format
    (or None); for tracks of the video also track; and, if known, video_language and fps of the video.
    `read` reads subtitles, by default `transcript_of_subtitles`; `extract` decodes speech, by default `extract_speech`.
    Both open hostile files, so callers pass ones that run in a sandbox. `language` is the spoken one, if it is known. A
    video without sound or speech is not a
    failure: its origin is "none", or it has no words. Unusable subtitle files are appended to `problems`, or logged if
    that is None, when the words come from another source.

    Raises ItemError: subtitle-unreadable if all files are unreadable and Whisper is off, model-unavailable, asr-failed,
    and those of `extract`; UserError as `load_model` does.
    """
    transcript, found = _read_safely(_ranked(subtitle_files, settings), settings, read or transcript_of_subtitles)
    if transcript is None and settings.whisper is not None:
        transcript = _from_speech(Path(video_path), settings, load_model, extract, language)
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
    kinds = ("manual", "embedded", "auto") if settings.prefer == "manual" else ("auto", "manual", "embedded")
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
    """Return a language's code in its shortest form: "eng" and "en" are one language."""
    from langcodes import LanguageTagError, standardize_tag

    try:
        return standardize_tag(language).casefold()
    except LanguageTagError:
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
        cues = _cues(file, settings)
        words, word_times = words_of(cues)
        if len(words) > settings.max_words:
            raise unreadable(f"{len(words):,} words are more than transcribe.max_words = {settings.max_words:,}")
    except ItemError as error:
        track = f", track {file['track']}" if "track" in file else ""
        problem = ItemError(error.error_class, f"{Path(file['path']).name}{track}: {error.message}")
        if problem.args not in [known.args for known in problems]:
            problems.append(problem)
        return None
    if cues.repairs:
        log.info("%s: repaired: %s", Path(file["path"]).name, cues.repairs)
    language = file.get("language") or cues.language
    return Transcript(file["kind"], language, word_times, words, cues.encoding, cues.encoding_guessed, cues.repairs)


def _cues(file: dict, settings: TranscribeSettings) -> Cues:
    """Read the cues of a file, or of a track of the video. Raises ItemError."""
    if "track" in file:
        from pipeline.stages.transcribe.tracks import read_track

        return read_track(file["path"], file["track"], settings)
    language = file.get("language") or file.get("video_language")
    return read_subtitles(file["path"], file.get("format"), settings, language=language, fps=file.get("fps"))


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
            return replace(transcript, word_times="tags", words=words)
    return transcript


# --- speech --------------------------------------------------------------------------------------------------------


def _from_speech(
    path: Path, settings: TranscribeSettings, load_model: LoadModel, extract: Extract | None, language: str | None
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
    speech = recognise(samples, load_model, settings, language)
    word_times = "asr" if speech.words else "none"
    return Transcript("whisper", speech.language, word_times, speech.words, asr_segments=speech.segments)
