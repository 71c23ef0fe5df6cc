"""Recognise speech with Whisper, in the parts of a sound where silero-vad hears a voice.

Music, tones and noise become words of their own invention in Whisper, so everything but speech is silenced before. Two
packages run the model: openai-whisper, and faster-whisper, which is optional. Import nothing heavy at the top of this
module: torch and the models come in when sound has to be recognised.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, field_validator

from clipmill.base.errors import ItemError, UserError
from clipmill.base.settings import added_later, operational, setting
from pipeline.runtime.watchdog import time_limit
from pipeline.stages.transcribe.cues import Cue, Mark, SubtitleSettings
from pipeline.stages.transcribe.subtitles import clean, words_of
from pipeline.stages.transcribe.words import Word

if TYPE_CHECKING:
    import numpy as np

SAMPLE_RATE = 16_000  # Hz, Whisper's input
FRAME = 160  # samples of a frame of Whisper's spectrogram
WINDOW_S = 30.0  # Whisper reads windows of this length
START_S = 300.0  # allowed for starting recognition of a sound of any length

# A pause shorter than this is part of the speech, and so is a margin around it, so that Whisper hears whole words.
MIN_PAUSE_S, MARGIN_S = 2.0, 0.4

Interval = tuple[float, float]  # start and end in seconds


class RecognitionSettings(SubtitleSettings):
    """Settings of recognising speech in videos without a usable subtitle."""

    # Package that runs Whisper. whisper is OpenAI's own; faster-whisper (pip install 'clipmill[faster]') takes models
    # in CTranslate2's format, and with 8-bit weights it is several times as fast on a CPU.
    engine: Literal["whisper", "faster-whisper"] = added_later("whisper")
    # A model's name (tiny, base, small, turbo …), a path of weights (a file; a folder for faster-whisper), or null for
    # no transcript. base understands clear English and keeps up with speech on one core.
    whisper: str | None = setting("base", reaches="reads a file", unless=r"[a-z0-9-]+(\.en)?")
    # The spoken language as Whisper's code (en, de …); null: the one that the list or the site gives, else recognised
    # from the first 30 s of speech.
    whisper_language: str | None = None
    # Beams of the search; 1 decodes greedily. null: 1 on a CPU, and 5 on a GPU, as in Whisper's paper. On clear speech
    # one beam finds the same words.
    whisper_beam_size: int | None = Field(None, ge=1)
    # Tried in turn while the text is repetitive or improbable, as in Whisper's paper. Above 0 the text is sampled, from
    # a fixed seed.
    whisper_temperatures: list[float] = Field([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], min_length=1)
    # Prompt Whisper with the text before. Off by default: the text is smoother, but repetitions spread.
    whisper_condition_on_previous: bool = False
    # Number format of faster-whisper's weights, such as int8, int8_float16, float16 or float32; null: float16 on a GPU,
    # float32 on a CPU. int8 is faster on a CPU and may change a word.
    whisper_compute_type: str | None = added_later(None)
    # Recognise only what sounds like speech to silero-vad. Off, music and tones may become words.
    voice_activity: bool = added_later(True)
    # Probability of speech from which a sound counts as speech. Lower it for singing or for speech under loud music.
    voice_threshold: float = added_later(0.5, gt=0, lt=1)
    # Seconds that recognition may take per second of sound, plus five minutes, before it counts as hung. 60 leaves room
    # for a large model on one slow core.
    whisper_timeout_per_second: float = operational(60.0, gt=0)
    # "cuda" or "cpu"; null: a GPU if torch finds one.
    whisper_device: str | None = operational(None)
    # Folder of downloaded models; null: the package's own cache.
    whisper_folder: str | None = operational(None, reaches="reads and writes that folder")

    @field_validator("whisper", mode="before")
    @classmethod
    def _off_is_none(cls, value: Any) -> Any:
        return None if value in (False, "", "off", "none") else value  # YAML reads a bare off as false

    def fingerprint(self) -> str:
        """Return a hash as for the earlier default of 5 beams if the number of beams is left to the device."""
        if self.whisper_beam_size is None:
            return self.model_copy(update={"whisper_beam_size": 5}).fingerprint()
        return super().fingerprint()


LoadModel = Callable[[RecognitionSettings], "Recogniser"]


class Recogniser(Protocol):
    """A loaded Whisper model."""

    on_cpu: bool
    is_multilingual: bool

    def detect_language(self, speech: "np.ndarray") -> str:
        """Return the code of the language of at most 30 s of speech."""

    def transcribe(self, samples: "np.ndarray", parts: Sequence[Interval], language: str, options: dict) -> list[dict]:
        """Return Whisper's segments of these parts of the sound, with word times on the clock of the whole."""


class _OpenAI:
    """Whisper run by OpenAI's package."""

    def __init__(self, settings: RecognitionSettings) -> None:
        import torch
        import whisper

        torch.device(settings.whisper_device or "cpu")
        self._model = whisper.load_model(
            settings.whisper, device=settings.whisper_device, download_root=settings.whisper_folder
        ).eval()
        self.on_cpu = self._model.device.type == "cpu"
        self.is_multilingual = self._model.is_multilingual

    @staticmethod
    def names() -> list[str]:
        import whisper

        return whisper.available_models()

    def detect_language(self, speech: "np.ndarray") -> str:
        import whisper

        sound = whisper.log_mel_spectrogram(whisper.pad_or_trim(speech), self._model.dims.n_mels)
        _, probabilities = self._model.detect_language(sound.to(self._model.device))
        return max(probabilities, key=probabilities.get)

    def transcribe(self, samples: "np.ndarray", parts: Sequence[Interval], language: str, options: dict) -> list[dict]:
        import torch

        beams = options["beam_size"]
        options |= {"beam_size": beams if beams > 1 else None, "fp16": not self.on_cpu}
        clips = [second for part in parts for second in part]
        gpus = [] if self.on_cpu else [self._model.device]
        with torch.random.fork_rng(devices=gpus), torch.inference_mode():
            torch.manual_seed(0)
            result = self._model.transcribe(samples, language=language, clip_timestamps=clips, **options)
        return result["segments"]


class _Faster:
    """Whisper run by CTranslate2, through faster-whisper."""

    def __init__(self, settings: RecognitionSettings) -> None:
        import torch
        from faster_whisper import WhisperModel

        device = settings.whisper_device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.on_cpu = device == "cpu"
        self._model = WhisperModel(
            settings.whisper,
            device=device,
            compute_type=settings.whisper_compute_type or ("float32" if self.on_cpu else "float16"),
            cpu_threads=torch.get_num_threads(),
            download_root=settings.whisper_folder,
        )
        self.is_multilingual = self._model.model.is_multilingual

    @staticmethod
    def names() -> list[str]:
        from faster_whisper import available_models

        return available_models()

    def detect_language(self, speech: "np.ndarray") -> str:
        return self._model.detect_language(speech)[0]

    def transcribe(self, samples: "np.ndarray", parts: Sequence[Interval], language: str, options: dict) -> list[dict]:
        import ctranslate2

        ctranslate2.set_random_seed(0)
        clips = [second for part in parts for second in part]
        segments, _ = self._model.transcribe(samples, language=language, clip_timestamps=clips, best_of=1, **options)
        words = ("word", "start", "end")
        return [
            {
                **{name: getattr(segment, name) for name in (*CONFIDENCES, "start", "end")},
                "words": [{name: getattr(word, name) for name in words} for word in segment.words or ()],
            }
            for segment in segments
        ]


ENGINES = {"whisper": _OpenAI, "faster-whisper": _Faster}

# What Whisper says of a segment: the mean log-probability of its tokens, the probability that it holds no speech, and
# how far its text can be compressed (repetitions give more than 2.4).
CONFIDENCES = ("avg_logprob", "no_speech_prob", "compression_ratio")


def load_recogniser(settings: RecognitionSettings) -> Recogniser:
    """Load the Whisper model of the settings, once per process.

    Raises UserError for an unknown model, a missing package or a missing device, and ItemError "model-unavailable"
    (transient) if the download fails.
    """
    names = ("engine", "whisper", "whisper_device", "whisper_folder", "whisper_compute_type")
    return _load(RecognitionSettings(**{name: getattr(settings, name) for name in names}).model_dump_json())


@lru_cache(maxsize=1)
def _load(chosen: str) -> Recogniser:
    settings = RecognitionSettings.model_validate_json(chosen)
    engine, name = ENGINES[settings.engine], settings.whisper
    wrong = f"setting transcribe.whisper = {name!r}"
    try:
        known = engine.names()
    except ImportError as error:
        raise UserError(
            f"setting transcribe.engine = {settings.engine}: {error}. Run: pip install 'clipmill[faster]'."
        ) from error
    is_file = Path(name).is_file() if engine is _OpenAI else Path(name).is_dir()
    if name not in known and not is_file and not (engine is _Faster and name.count("/") == 1):
        weights = "a file of weights" if engine is _OpenAI else "a folder of converted weights, a hub id"
        raise UserError(f"{wrong}: give null, {weights}, or one of {', '.join(known)}.")
    try:
        return engine(settings)
    except OSError as error:  # without network or disk space every waiting video can be tried again later
        raise ItemError("model-unavailable", f"Whisper {name}: {error}", transient=True) from error
    except Exception as error:  # the packages raise anything for foreign weights or a missing device
        raise UserError(
            f"{wrong} cannot be loaded on {settings.whisper_device or 'the default device'} "
            f"({type(error).__name__}: {error}); check the weights and transcribe.whisper_device."
        ) from error


# -- voice activity ----------------------------------------------------------------------------------------------------


def find_speech(samples: "np.ndarray", threshold: float = 0.5) -> list[Interval]:
    """Return where 16 kHz mono float32 samples hold speech: intervals in order, in seconds, without overlap."""
    import torch
    from silero_vad import get_speech_timestamps

    found = get_speech_timestamps(
        torch.from_numpy(samples),
        _voice_model(),
        threshold=threshold,
        sampling_rate=SAMPLE_RATE,
        min_silence_duration_ms=round(1000 * MIN_PAUSE_S),
        speech_pad_ms=round(1000 * MARGIN_S),
    )
    return [(part["start"] / SAMPLE_RATE, part["end"] / SAMPLE_RATE) for part in found]


@lru_cache(maxsize=1)
def _voice_model() -> Any:
    import warnings

    from silero_vad import load_silero_vad

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and the package's weights are in its format
        return load_silero_vad()


def _joined(parts: Sequence[Interval]) -> list[Interval]:
    """Join parts whose gap is shorter than a window, since skipping it would save no window."""
    joined: list[Interval] = []
    for start_s, end_s in parts:
        if joined and start_s - joined[-1][1] < WINDOW_S:
            start_s = joined.pop()[0]
        joined.append((start_s, end_s))
    return joined


def _inside(parts: Sequence[Interval], num_samples: int) -> list[Interval]:
    """Cut off what is behind the last whole frame: Whisper never reaches such an end, and would go on for ever."""
    last_s = num_samples // FRAME * FRAME / SAMPLE_RATE
    bounded = ((start_s, min(end_s, last_s)) for start_s, end_s in parts)
    return [(start_s, end_s) for start_s, end_s in bounded if end_s > start_s]


# -- recognition -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recognised:
    """The words of a sound."""

    language: str | None  # Whisper's code; null: no speech, and no language given
    words: list[Word]
    segments: list[dict]  # of Whisper, with start_s, end_s and CONFIDENCES


def recognise(
    samples: "np.ndarray",
    load_model: LoadModel,
    settings: RecognitionSettings,
    language: str | None = None,
) -> Recognised:
    """Recognise speech in 16 kHz mono float32 samples; the same samples give the same words.

    Args:
        load_model: called as `load_model(settings)` if there is speech.
        language: as the list or the site gives it (en, en-US, English), used unless the settings name one.

    Raises ItemError "asr-failed", and what `load_model` raises.
    """
    duration_s = len(samples) / SAMPLE_RATE
    timeout_s = START_S + settings.whisper_timeout_per_second * duration_s
    samples, parts = samples.copy(), [(0.0, duration_s)]  # torch needs a writable array
    if settings.voice_activity:
        with time_limit(timeout_s, f"looking for speech in {duration_s:,.0f} s of sound"):
            parts = find_speech(samples, settings.voice_threshold)
    if not parts:
        return Recognised(whisper_code(language), [], [])
    model = load_model(settings)
    try:
        with time_limit(timeout_s, f"transcribing {duration_s:,.0f} s of sound"):
            segments, language = _transcribe(samples, parts, model, settings, language)
    except Exception as error:  # any exception of the model is the failure of this video alone
        raise ItemError("asr-failed", f"Whisper: {type(error).__name__}: {error}") from error
    cues, spoken = [], []
    for segment in segments:
        cue = _cue_of(segment, parts, duration_s, settings)
        if cue:
            cues.append(cue)
            confidences = {name: float(segment[name]) for name in CONFIDENCES}
            spoken.append({"start_s": cue.start_s, "end_s": cue.end_s, **confidences})
    return Recognised(language, words_of(cues)[0], spoken)


def _transcribe(
    samples: "np.ndarray", parts: list[Interval], model: Recogniser, settings: RecognitionSettings, language: str | None
) -> tuple[list[dict], str]:
    """Return Whisper's segments, and the language. Silence the samples outside the parts."""
    bounds = [(round(start_s * SAMPLE_RATE), round(end_s * SAMPLE_RATE)) for start_s, end_s in parts]
    end = 0
    for start, stop in [*bounds, (len(samples), len(samples))]:
        samples[end:start] = 0.0
        end = stop
    if model.is_multilingual:
        language = settings.whisper_language or whisper_code(language)
        language = language or model.detect_language(samples[bounds[0][0] :][: round(WINDOW_S * SAMPLE_RATE)])
    else:
        language = "en"
    options = {
        "beam_size": settings.whisper_beam_size or (1 if model.on_cpu else 5),
        "temperature": tuple(settings.whisper_temperatures),
        "condition_on_previous_text": settings.whisper_condition_on_previous,
        "word_timestamps": True,
    }
    return model.transcribe(samples, _inside(_joined(parts), len(samples)), language, options), language


def whisper_code(language: str | None) -> str | None:
    """Return Whisper's code of a language given as code or English name (en, en-US, English); None if it has none."""
    from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

    name = (language or "").strip().casefold().replace("_", "-")
    for code in (name, name.split("-")[0]):
        if code in LANGUAGES:
            return code
    return TO_LANGUAGE_CODE.get(name)


def _cue_of(segment: dict, parts: Sequence[Interval], duration_s: float, settings: RecognitionSettings) -> Cue | None:
    """Convert a segment of Whisper's to a cue, so that sound and speaker labels are cleaned as those of subtitles.

    Words that lie outside of all speech are left out: Whisper invents some for silence.
    """
    text, marks = "", []
    for word in segment.get("words", ()):
        start_s = min(max(0.0, float(word["start"])), duration_s)
        end_s = min(max(start_s, float(word["end"])), duration_s)
        if any(start_s <= stop_s and end_s >= begin_s for begin_s, stop_s in parts):
            marks.append(Mark(len(text), start_s, end_s))
            text += word["word"]
    if not marks:
        return None
    return Cue(marks[0].start_s, marks[-1].end_s or duration_s, clean(text, settings), tuple(marks))
