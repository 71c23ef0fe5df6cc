"""OpenAI's package and faster-whisper find the same words at the same times with the same weights."""

import builtins
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.base.errors import UserError
from pipeline.stages.transcribe.recognition import SAMPLE_RATE, load_recogniser, recognise
from pipeline.stages.transcribe.speech import extract_speech
from pipeline.stages.transcribe.stage import identity
from pipeline.stages.transcribe.transcribe import TranscribeSettings
from tests.helpers.whisper_weights import convert_for_faster_whisper, save_random_whisper

SPEECH = Path(__file__).parents[1] / "data" / "speech" / "jfk.ogg"


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    checkpoint = save_random_whisper(folder / "random.pt", n_text_ctx=448)  # faster-whisper expects the usual context
    return {"whisper": checkpoint, "faster-whisper": convert_for_faster_whisper(checkpoint, folder / "converted")}


@pytest.mark.slow
def test_both_engines_agree_on_words_times_language_and_confidences(both):
    pytest.importorskip("faster_whisper")
    samples = extract_speech(SPEECH)[: 4 * SAMPLE_RATE]
    first, second = (
        recognise(
            samples,
            load_recogniser,
            TranscribeSettings(engine=engine, whisper=str(path), whisper_temperatures=[0.0], whisper_device="cpu"),
        )
        for engine, path in both.items()
    )
    assert first.words and first.language == second.language
    assert [word.text for word in first.words] == [word.text for word in second.words]
    for one, other in zip(first.words, second.words, strict=True):
        assert (one.start_s, one.end_s) == pytest.approx(
            (other.start_s, other.end_s), abs=0.021
        )  # a token lasts 0.02 s
    for one, other in zip(first.segments, second.segments, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@given(num_samples=st.integers(1600, 48_000))
def test_no_part_ends_behind_the_last_frame_of_the_sound(num_samples):
    """Whisper counts whole frames of 10 ms; it never reached an end behind the last one, and never came back."""
    given_parts = []

    class Listener:
        is_multilingual, on_cpu = False, True

        def transcribe(self, samples, parts, language, options):
            given_parts.extend(parts)
            return []

    settings = TranscribeSettings(whisper="tiny", voice_activity=False)
    recognise(np.zeros(num_samples, np.float32), lambda _: Listener(), settings)
    ((start_s, end_s),) = given_parts
    assert start_s == 0 and round(end_s * 100) == num_samples // 160


def test_a_model_that_the_engine_does_not_know_is_the_user_s_mistake(tmp_path):
    pytest.importorskip("faster_whisper")
    for name in ("enormous", str(tmp_path / "missing")):
        with pytest.raises(UserError, match="transcribe.whisper.*a folder of converted weights.*tiny"):
            load_recogniser(TranscribeSettings(engine="faster-whisper", whisper=name))


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    real = builtins.__import__

    def no_faster_whisper(name, *arguments):
        if name == "faster_whisper":
            raise ImportError("No module named 'faster_whisper'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", no_faster_whisper)
    with pytest.raises(UserError, match=r"transcribe.engine = faster-whisper.*pip install 'clipmill\[faster\]'"):
        load_recogniser(TranscribeSettings(engine="faster-whisper", whisper="tiny"))


def test_names_and_weights_are_told_apart(tmp_path):
    for name in ("base", "base.en", "Systran/faster-whisper-tiny"):
        assert identity(TranscribeSettings(whisper=name)) == TranscribeSettings(whisper=name).fingerprint()
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"one")
    settings = TranscribeSettings(engine="faster-whisper", whisper=str(folder))
    before = identity(settings)
    (folder / "model.bin").write_bytes(b"other")
    assert before != identity(settings) != settings.fingerprint()
    with pytest.raises(UserError, match="does not exist"):
        identity(TranscribeSettings(whisper=str(tmp_path / "missing.pt")))
