"""Whisper transcribes videos without a usable subtitle, here with tiny random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from clipmill.base.errors import ItemError, UserError
from pipeline.stages.transcribe.recognition import load_recogniser
from pipeline.stages.transcribe.transcribe import TranscribeSettings, transcribe_video
from tests.helpers.whisper_weights import save_random_whisper

TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000 * 2) / 16_000)).astype(np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_random_whisper(tmp_path_factory.mktemp("whisper") / "random.pt")


def settings(weights: Path, **changes) -> TranscribeSettings:
    quick = {"whisper_temperatures": [0.0], "whisper_beam_size": 1, "whisper_device": "cpu"}
    quick |= {"voice_activity": False}  # a tone is no speech
    return TranscribeSettings(**{"whisper": str(weights), **quick, **changes})


def hear(weights: Path, samples: np.ndarray | None = TONE, files=(), **changes) -> dict:
    return transcribe_video(files, "video.mp4", settings(weights, **changes), extract=lambda path: samples)


def check(row: dict, duration_s: float) -> None:
    assert row["origin"] == "whisper" and row["language"] and row["num_words"] == len(row["words"])
    assert row["word_times"] == ("asr" if row["words"] else "none")
    ends = 0.0
    for word in row["words"]:
        assert ends <= word["start_s"] <= word["end_s"] <= duration_s
        ends = word["end_s"]


def test_words_with_times_come_out_of_samples(weights):
    row = hear(weights)
    check(row, 2.0)
    assert row["words"], "random weights give a text"


def test_the_same_sound_gives_the_same_words_even_where_they_are_sampled(weights):
    first = hear(weights, whisper_temperatures=[0.0, 0.8])
    torch.rand(7)
    state = torch.random.get_rng_state()
    assert hear(weights, whisper_temperatures=[0.0, 0.8]) == first
    assert torch.equal(torch.random.get_rng_state(), state)  # the global random state is unchanged


def test_beam_search_runs_and_a_language_can_be_set(weights):
    row = hear(weights, whisper_beam_size=2, whisper_language="de")
    check(row, 2.0)
    assert row["language"] == "de"


def test_a_model_is_loaded_once_per_process(weights):
    assert load_recogniser(settings(weights)) is load_recogniser(settings(weights, min_words=3))


def test_real_speech_runs_through(weights, footage):
    check(transcribe_video([], footage / "jfk.flac", settings(weights)), 11.0)


def test_a_real_video_without_sound_has_no_words(weights, footage):
    row = transcribe_video([], footage / "cosmos_test_video_30s.mp4", settings(weights))
    assert (row["origin"], row["words"]) == ("none", [])


@pytest.mark.parametrize("samples", [None, np.zeros(0, np.float32)])
def test_a_video_without_sound_has_no_words(samples):
    row = hear(Path("never-loaded"), samples)
    assert (row["origin"], row["words"]) == ("none", [])


def test_a_video_without_an_audio_stream_has_no_words_but_broken_sound_fails():
    def failing(error_class):
        def extract(path):
            raise ItemError(error_class, "…")

        return extract

    listening = TranscribeSettings(whisper="tiny")
    assert transcribe_video([], "v", listening, extract=failing("no-audio"))["origin"] == "none"
    with pytest.raises(ItemError, match="undecodable"):
        transcribe_video([], "v", listening, extract=failing("undecodable"))


def test_a_usable_subtitle_is_preferred_and_an_unusable_one_is_reported(weights, tmp_path):
    good, bad = tmp_path / "good.srt", tmp_path / "bad.srt"
    good.write_text("1\n00:00:01,000 --> 00:00:02,000\nHello there\n")
    bad.write_bytes(b"\x00\x01")
    files = [{"path": str(path), "kind": "manual", "language": "en", "format": "srt"} for path in (bad, good)]
    assert hear(Path("never-loaded"), None, files)["origin"] == "manual"
    problems = []
    row = transcribe_video(files[:1], "v", settings(weights), extract=lambda path: TONE, problems=problems)
    assert row["origin"] == "whisper" and [problem.error_class for problem in problems] == ["subtitle-unreadable"]
    assert hear(weights, TONE, files[1:], min_words=3)["origin"] == "whisper"


def test_a_model_that_fails_is_that_video_s_failure(weights):
    class Broken:
        on_cpu, is_multilingual = True, False

        def transcribe(self, *arguments):
            raise RuntimeError("out of memory")

    with pytest.raises(ItemError, match="asr-failed.*out of memory"):
        transcribe_video([], "v", settings(weights), load_model=lambda _: Broken(), extract=lambda path: TONE)


def test_a_name_that_is_no_model_is_the_user_s_mistake(weights, tmp_path):
    with pytest.raises(UserError, match="transcribe.whisper = 'enormous'.*tiny"):
        load_recogniser(TranscribeSettings(whisper="enormous"))
    other = tmp_path / "other.pt"
    torch.save({"weights": 1}, other)
    with pytest.raises(UserError, match="other.pt"):
        load_recogniser(settings(other))
    with pytest.raises(ValidationError, match="whisper_temperatures"):
        TranscribeSettings(whisper_temperatures=[])
