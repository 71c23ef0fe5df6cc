"""Subtitles of every format, beside or inside a video, pass from the folder through download and transcribe to rows."""

import json
from pathlib import Path

import pytest

from pipeline.runtime.task import Task, commit
from pipeline.stages.download.settings import DownloadSettings
from pipeline.stages.download.stage import run_download
from pipeline.stages.transcribe.stage import PAYLOAD, run_transcribe
from pipeline.stages.transcribe.transcribe import TranscribeSettings
from tests.helpers.http import make_video

CUES = {
    "vtt": b"WEBVTT\n\n00:01.000 --> 00:03.000\nHello there.\n",
    "srt": b"1\n00:00:01,000 --> 00:00:03,000\nHello there.\n",
    "ttml": b'<tt xmlns="urn:ttml"><body><div begin="1s" end="3s"><p>Hello there.</p></div></body></tt>',
    "json3": b'{"events":[{"tStartMs":1000,"dDurationMs":2000,"segs":[{"utf8":"Hello there."}]}]}',
    "srv3": b'<timedtext format="3"><body><p t="1000" d="2000">Hello there.</p></body></timedtext>',
    "srv1": b'<?xml version="1.0"?><transcript><text start="1" dur="2">Hello there.</text></transcript>',
    "ass": b"[Script Info]\n[Events]\nDialogue: 0,0:00:01.00,0:00:03.00,Default,,0,0,0,,Hello there.\n",
    "ssa": b"[Script Info]\n[Events]\nFormat: Start, End, Text\nDialogue: 0:00:01.00,0:00:03.00,Hello there.\n",
    "sbv": b"0:00:01.000,0:00:03.000\nHello there.\n",
    "sub": b"{10}{30}Hello| there.\n",  # frames of a video of 10 per second
    "smi": b"<SAMI><BODY><SYNC Start=1000><P>Hello there.<SYNC Start=3000><P>&nbsp;</BODY></SAMI>",
}


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> bytes:
    return make_video(tmp_path_factory.mktemp("video") / "v.mp4", duration_s=4)


def transcribed(folder: Path, language: str | None = None, **settings) -> tuple[dict, list[str]]:
    """Send v.mp4 through both stages; return its row of `transcripts` and the classes of the failures of its parts."""
    root = folder / "corpus"
    source = {"video_id": "v", "url": str(folder / "v.mp4"), "kind": "file", "subtitle": None, "language": language}
    item = {"item_id": "v", "key": "k", "attempts": 0, "cost": 1.0}
    task = Task("download", "u0", [item | source], DownloadSettings(), "f", str(root), "r")
    download = run_download(task)[0][0]
    assert download.failure is None, download.failure
    row = download.rows["downloads"][0]
    for column in ("path", "sha256", "duration_s", "subtitles", "audio_codec", "fps", "language"):
        assert column in PAYLOAD
    payload = item | {**row, "language": language or row["language"]}
    task = Task("transcribe", "u0", [payload], TranscribeSettings(whisper=None, **settings), "f", str(root), "r")
    outcome = run_transcribe(task)[0][0]
    assert outcome.failure is None, outcome.failure
    commit(task, [outcome], [])  # the row fits its table
    return outcome.rows["transcripts"][0], [error.error_class for _, error in [*download.parts, *outcome.parts]]


@pytest.mark.parametrize("extension", CUES)
def test_a_side_car_of_each_format_becomes_words(tmp_path, video, extension):
    (tmp_path / "v.mp4").write_bytes(video)
    (tmp_path / f"v.{extension}").write_bytes(CUES[extension])
    row, failures = transcribed(tmp_path)
    assert (row["origin"], [word["text"] for word in row["words"]], failures) == ("sidecar", ["Hello", "there."], [])
    assert (row["words"][0]["start_s"], row["words"][-1]["end_s"]) == (1.0, 3.0)


def test_the_language_of_the_list_helps_and_the_guess_is_on_the_row(tmp_path, video):
    (tmp_path / "v.mp4").write_bytes(video)
    (tmp_path / "v.srt").write_bytes(CUES["srt"].decode().replace("Hello there.", "你好，今天天气很好。").encode("gbk"))
    row, failures = transcribed(tmp_path, language="zh")
    assert "".join(word["text"] for word in row["words"]) == "你好，今天天气很好。"
    assert (row["encoding"], row["encoding_guessed"], failures) == ("gb18030", True, [])
    assert json.loads(row["repairs"]) == {"encoding-guessed": 1}


def test_an_encoding_that_cannot_be_told_is_a_failure_row_and_not_words(tmp_path, video):
    (tmp_path / "v.mp4").write_bytes(video)
    (tmp_path / "v.srt").write_bytes(CUES["srt"].decode().replace("Hello there.", "שלום, מזג האוויר").encode("cp1255"))
    row, failures = transcribed(tmp_path)
    assert (row["origin"], row["words"], failures) == ("none", [], ["subtitle-unreadable"])


def test_pictures_of_text_are_named(tmp_path, video):
    (tmp_path / "v.mp4").write_bytes(video)
    (tmp_path / "v.sub").write_bytes(b"\0\0\1\xba" + bytes(range(256)))
    row, failures = transcribed(tmp_path)
    assert (row["words"], failures) == ([], ["bad-subtitle"])
