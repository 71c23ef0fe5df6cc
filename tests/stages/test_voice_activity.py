"""Only speech becomes words: silero-vad finds it, with its real weights, and Whisper hears nothing else.

The speech is eleven seconds of John F. Kennedy's inaugural address of 1961, which is in the public domain.
"""

from pathlib import Path

import numpy as np
import pytest

from pipeline.stages.transcribe.recognition import SAMPLE_RATE, find_speech, recognise, whisper_code
from pipeline.stages.transcribe.speech import extract_speech
from pipeline.stages.transcribe.transcribe import TranscribeSettings

SPEECH = Path(__file__).parents[1] / "data" / "speech" / "jfk.ogg"
T = np.arange(20 * SAMPLE_RATE) / SAMPLE_RATE
WITHOUT_SPEECH = {
    "silence": np.zeros_like(T),
    "tone": 0.3 * np.sin(2 * np.pi * 440 * T),
    "noise": np.random.default_rng(0).normal(scale=0.1, size=len(T)),
    "chords": sum(0.1 * np.sin(2 * np.pi * f * T) * (1 + np.sin(2 * np.pi * 3 * T)) for f in (220, 277, 330)),
    "beats": 0.5 * np.sin(2 * np.pi * 60 * T) * (T % 0.5 < 0.1),
}


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return extract_speech(SPEECH)


class Listener:
    """Stand in for Whisper: record what it is given, and answer with segments of fixed words."""

    def __init__(self, words: list[tuple[str, float, float]] = (), on_cpu: bool = True, is_multilingual: bool = True):
        self.on_cpu, self.is_multilingual, self.words, self.heard = on_cpu, is_multilingual, words, {}

    def detect_language(self, speech: np.ndarray) -> str:
        self.heard["language"] = speech.copy()
        return "la"

    def transcribe(self, samples, parts, language, options) -> list[dict]:
        self.heard |= {"samples": samples.copy(), "parts": parts, "language_of_words": language, "options": options}
        words = [{"word": f" {word}", "start": start_s, "end": end_s} for word, start_s, end_s in self.words]
        return [{"avg_logprob": -0.3, "no_speech_prob": 0.1, "compression_ratio": 1.2, "words": words}]


def hear(samples: np.ndarray, listener: Listener, language: str | None = None, **settings):
    return recognise(samples, lambda _: listener, TranscribeSettings(**settings), language)


@pytest.mark.parametrize("name", WITHOUT_SPEECH)
def test_a_sound_without_speech_has_no_words_and_loads_no_model(name):
    def load(settings):
        raise AssertionError("the model must not be loaded")

    found = recognise(WITHOUT_SPEECH[name].astype(np.float32), load, TranscribeSettings(), "en")
    assert (found.language, found.words, found.segments) == ("en", [], [])


def test_speech_is_found_where_it_is(speech):
    parts = find_speech(speech)
    assert parts[0][0] < 0.4 and 10.4 < parts[-1][1] <= len(speech) / SAMPLE_RATE
    assert all(start_s < end_s for start_s, end_s in parts) and sum(end_s - start_s for start_s, end_s in parts) > 8


def test_whisper_hears_the_speech_and_silence_instead_of_music(speech):
    music = WITHOUT_SPEECH["chords"].astype(np.float32)
    listener = Listener()
    hear(np.concatenate([music, speech, music]), listener)
    begin, end = len(music), len(music) + len(speech)
    heard = listener.heard["samples"]
    assert not heard[: begin - SAMPLE_RATE].any() and not heard[end + SAMPLE_RATE :].any()
    middle = slice(begin + SAMPLE_RATE, begin + 10 * SAMPLE_RATE)
    assert np.array_equal(heard[middle], speech[SAMPLE_RATE : 10 * SAMPLE_RATE])


def test_the_language_is_that_of_the_speech_not_of_the_music_before(speech):
    listener = Listener()
    assert hear(np.concatenate([WITHOUT_SPEECH["beats"].astype(np.float32), speech]), listener).language == "la"
    assert np.abs(listener.heard["language"][:SAMPLE_RATE]).max() > 0.01


def test_long_gaps_are_skipped_and_short_ones_are_not_worth_it(speech):
    for gap_s, count in ((12, 1), (70, 2)):
        listener = Listener()
        hear(np.concatenate([speech, np.zeros(gap_s * SAMPLE_RATE, np.float32), speech]), listener)
        assert len(listener.heard["parts"]) == count


def test_words_that_whisper_invents_outside_the_speech_are_left_out(speech):
    listener = Listener([("ceremony.", 3.0, 4.0), ("ask", 28.0, 28.4), ("not", 28.4, 29.0)])
    found = hear(np.concatenate([WITHOUT_SPEECH["tone"].astype(np.float32), speech]), listener)
    assert [word.text for word in found.words] == ["ask", "not"]
    assert [(segment["start_s"], segment["end_s"]) for segment in found.segments] == [(28.0, 29.0)]


def test_the_check_can_be_turned_off():
    listener = Listener([("ceremony.", 3.0, 4.0)])
    found = hear(WITHOUT_SPEECH["tone"].astype(np.float32), listener, voice_activity=False)
    assert [word.text for word in found.words] == ["ceremony."]


@pytest.mark.parametrize(
    "given, setting, used",
    [("en-US", None, "en"), ("German", None, "de"), ("tlh", None, "la"), (None, None, "la"), ("en", "de", "de")],
)
def test_the_given_language_is_passed_on(given, setting, used, speech):
    listener = Listener()
    assert hear(speech, listener, given, whisper_language=setting).language == used
    assert listener.heard["language_of_words"] == used
    assert ("language" in listener.heard) == (used == "la")


def test_a_model_for_english_alone_hears_english(speech):
    listener = Listener(is_multilingual=False)
    assert hear(speech, listener, "de").language == "en" and "language" not in listener.heard


@pytest.mark.parametrize("on_cpu, setting, beams", [(True, None, 1), (False, None, 5), (True, 3, 3), (False, 1, 1)])
def test_a_cpu_decodes_greedily_unless_told_otherwise(on_cpu, setting, beams, speech):
    listener = Listener(on_cpu=on_cpu)
    hear(speech, listener, whisper_beam_size=setting)
    assert listener.heard["options"]["beam_size"] == beams


@pytest.mark.parametrize(
    "name, code",
    [("en", "en"), ("EN_gb", "en"), ("English", "en"), ("zh-Hans", "zh"), ("yue", "yue"), ("", None), ("xx", None)],
)
def test_languages_have_whisper_s_codes(name, code):
    assert whisper_code(name) == code
