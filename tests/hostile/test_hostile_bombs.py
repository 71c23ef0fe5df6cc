"""Small files that expand without limit (pictures, frames, sound, pages, subtitles, lists) fail alone.

Defences: pixels and frames are counted before decoding, sandboxes limit memory and time, downloaded and unpacked bytes
are counted as they arrive, XML entities and words have limits.
"""

import gzip
import itertools
import json
import resource
import struct
import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest

from clipmill.base.errors import ItemError, UserError
from clipmill.media.probe import probe
from clipmill.media.sandbox import Sandbox
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_in_sandbox
from pipeline.stages.download import site_fetch
from pipeline.stages.download.address_guard import EgressGuard
from pipeline.stages.download.fetch import DownloadSettings, fetch
from pipeline.stages.download.site_fetch import download_site
from pipeline.stages.ingest.ingest import IngestSettings
from pipeline.stages.ingest.source_lists import read_sources
from pipeline.stages.segment.shots import detect_shots
from pipeline.stages.transcribe.speech import extract_speech
from pipeline.stages.transcribe.transcribe import TranscribeSettings, transcribe_video, transcript_of_subtitles
from tests.helpers.call_count import count_calls
from tests.helpers.http import MediaServer, media_server

MB = 1 << 20


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def server():
    with media_server() as server:
        yield server


def failure(call, *arguments, **named) -> str:
    with pytest.raises(ItemError) as caught:
        call(*arguments, **named)
    return caught.value.error_class


def encode(path: Path, *inputs: str, options: str) -> Path:
    sources = list(itertools.chain.from_iterable(["-f", "lavfi", "-i", each] for each in inputs))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *sources, *options.split(), "-threads", "1"]
    subprocess.run([*command, str(path)], check=True, stdin=subprocess.DEVNULL)
    return path


def gif(width: int, height: int, num_frames: int) -> bytes:
    """Return a GIF with frames of one pixel, 23 bytes each, on a canvas of any size."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"!\xf9\x04\0\x0a\0\0\0," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return head + frame * num_frames + b";"


def cut(sandbox: Sandbox, path: Path, **settings):
    spans = [SpanRequest("v.0", 0, 0.0, 3.0)]
    return cut_in_sandbox(sandbox, path, spans, CutSettings(timeout_base_s=1000, **settings), path.with_suffix(".out"))


def test_a_canvas_of_four_gigapixels_is_not_painted(tmp_path, sandbox):
    path = tmp_path / "huge.gif"
    path.write_bytes(gif(65535, 65535, 3))
    assert failure(sandbox.call, probe, path, timeout_s=600) in ("undecodable", "out-of-memory")
    assert failure(cut, sandbox, path) in ("too-large", "undecodable")


def test_frames_beyond_count_end_at_the_limits(tmp_path, sandbox):
    path = tmp_path / "many.gif"
    path.write_bytes(gif(2000, 2000, 50_000))
    assert failure(cut, sandbox, path, max_frames=1000) == "too-many-frames"
    assert failure(sandbox.call, detect_shots, path, timeout_s=1) == "timeout"


def test_hours_of_silence_in_a_megabyte_end_at_the_longest_sound(tmp_path, sandbox):
    path = encode(tmp_path / "quiet.flac", "anullsrc=r=8000:cl=mono:d=2000", options="-compression_level 0")
    assert path.stat().st_size < MB
    samples = sandbox.call(extract_speech, path, 100.0, timeout_s=600)
    assert len(samples) == 100 * 16_000
    assert failure(sandbox.call, extract_speech, path, timeout_s=600, memory_bytes=100 * MB) == "out-of-memory"


def test_an_output_beyond_the_limit_ends_the_video(tmp_path, sandbox):
    path = encode(tmp_path / "busy.mp4", "testsrc2=s=640x480:r=25:d=3", options="-c:v libx264 -preset ultrafast")
    source = {"short_side": "source", "fps": "source", "encoding": "mjpeg"}
    assert failure(cut, sandbox, path, max_output_mb=1, **source) == "output-too-large"


# --- downloads

OPEN = DownloadSettings(allow_private_addresses=True, retries=0, timeout_s=600, stall_timeout_s=600, backoff_s=0)


def test_a_stream_without_end_ends_at_the_bytes_and_at_the_time(server: MediaServer, tmp_path):
    url = server.add("/endless", b"\0" * 30 * MB, announce=False)
    source = {"video_id": "v", "url": url, "kind": "url"}
    assert failure(fetch, source, tmp_path / "a", OPEN.model_copy(update={"max_bytes": 2 * MB})) == "too-large"
    server.routes["/endless"].bytes_per_s = 1000  # hours of it
    assert failure(fetch, source, tmp_path / "b", OPEN.model_copy(update={"timeout_s": 1})) == "timeout"


def test_a_body_packed_a_thousandfold_is_counted_unpacked(server: MediaServer, tmp_path):
    url = server.add("/bomb.mp4", b"\0" * 100 * MB, gzipped=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    settings = OPEN.model_copy(update={"max_bytes": 10 * MB})
    assert failure(fetch, {"video_id": "v", "url": url, "kind": "url"}, tmp_path / "s", settings) == "too-large"
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 60, f"{grown_mb:.0f} MB at once"


def test_a_page_without_end_is_not_read_whole(server: MediaServer, tmp_path, monkeypatch):
    """Extractors read a page into memory, so its limit is far below that of a video."""
    monkeypatch.setattr(site_fetch, "MAX_PAGE_BYTES", 2 * MB)
    url = server.add("/page", b"<html>" + b"x" * 8 * MB, content_type="text/html", announce=False)
    (tmp_path / "work").mkdir()
    with EgressGuard(True, 600) as guard:
        assert failure(download_site, url, tmp_path / "work", OPEN, guard, generic=True) == "too-large"


def test_a_page_that_never_ends_its_headers_ends_too(server: MediaServer, tmp_path):
    url = server.add("/slow", b"<html>" + b"x" * MB, content_type="text/html", bytes_per_s=1000)
    (tmp_path / "work").mkdir()
    with EgressGuard(True, 1.0) as guard:
        assert failure(download_site, url, tmp_path / "work", OPEN, guard, generic=True) == "timeout"


# --- subtitles

LAUGHS = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
TTML = '<?xml version="1.0"?>{}<tt xmlns="http://www.w3.org/ns/ttml"><body><div>{}</div></body></tt>'
CUE = '<p begin="00:00:01.0" end="00:00:02.0">{}</p>'
SUBTITLES = {
    "a billion laughs": TTML.format(f'<!DOCTYPE tt [<!ENTITY e0 "ha">{LAUGHS}]>', CUE.format("&e9;")),
    "one entity many times": TTML.format(f'<!DOCTYPE tt [<!ENTITY e "{"ha" * 5000}">]>', CUE.format("&e;" * 20_000)),
    "an entity of another file": TTML.format(
        '<!DOCTYPE tt [<!ENTITY e SYSTEM "file:///etc/passwd">]>', CUE.format("&e;")
    ),
    "elements a hundred thousand deep": TTML.format("", "<span>" * 100_000 + CUE.format("x")),
    "a token of megabytes": TTML.format("", CUE.format("x").replace("<p ", "<p " + "a" * 3_000_000)),
    "json a hundred thousand deep": '{"events":' + "[" * 100_000,
    "one word of megabytes": "1\n00:00:01,000 --> 00:00:02,000\n" + "x" * 2_000_000,
    "tags that never close": "WEBVTT\n\n00:00.000 --> 00:01.000\n" + "<c" * 200_000,
    "parentheses that never close": "1\n00:00:01,000 --> 00:00:02,000\n" + "(" * 500_000,
    "times beyond number": "1\n" + "9" * 100_000 + ":00:00,000 --> 00:00:02,000\nx",
}  # fmt: skip


@pytest.mark.parametrize("attack", SUBTITLES)
def test_a_subtitle_made_to_grow_ends_in_its_sandbox(attack, tmp_path, sandbox):
    path = tmp_path / "bomb.srt"
    path.write_text(SUBTITLES[attack])
    files = [{"path": str(path), "language": "en", "kind": "given", "format": None}]
    try:
        limits = {"timeout_s": 10, "memory_bytes": 400 * MB}
        transcript, problems = sandbox.call(transcript_of_subtitles, files, TranscribeSettings(), **limits)
        said = " ".join(word.text for word in transcript.words) if transcript else ""
        assert {problem.error_class for problem in problems} <= {"subtitle-unreadable"} and "root:" not in said
    except ItemError as error:
        assert error.error_class in ("timeout", "out-of-memory", "decoder-crash")


def test_an_implausible_number_of_words_is_not_a_subtitle(tmp_path):
    path = tmp_path / "words.srt"
    path.write_text("1\n00:00:01,000 --> 00:00:02,000\n" + "ha " * 5000)
    files = [{"path": str(path), "language": "en", "kind": "given", "format": None}]
    transcript, problems = transcript_of_subtitles(files, TranscribeSettings(max_words=1000))
    assert transcript is None and "transcribe.max_words" in problems[0].message


def test_a_subtitle_that_breaks_its_reader_does_not_take_the_next_one_along(tmp_path):
    (tmp_path / "good.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello there\n")
    (tmp_path / "bomb.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nboom\n")
    files = [
        {"path": str(tmp_path / name), "language": "en", "kind": "manual", "format": None}
        for name in ("bomb.srt", "good.srt")
    ]

    def read(files, settings):
        if any("bomb" in file["path"] for file in files):
            raise ItemError("out-of-memory", "an allocation beyond the limit")
        return transcript_of_subtitles(files, settings)

    problems = []
    row = transcribe_video(files, tmp_path / "v.mp4", TranscribeSettings(whisper=None), problems=problems, read=read)
    assert [word["text"] for word in row["words"]] == ["Hello", "there"]
    assert {problem.error_class for problem in problems} == {"out-of-memory"}


# --- lists


def test_a_packed_list_is_unpacked_as_far_as_the_setting_says(tmp_path):
    path = tmp_path / "list.txt.gz"
    path.write_bytes(gzip.compress(b"http://h/1.mp4\n" * 20_000))
    assert path.stat().st_size < 2_000
    with pytest.raises(UserError, match="ingest.max_unpacked_bytes"):
        read_sources([str(path)], IngestSettings(max_unpacked_bytes=100_000))
    assert read_sources([str(path)], IngestSettings()).table.num_rows == 20_000


def test_a_row_with_a_million_spans_is_bounded_by_its_line(tmp_path):
    spans = [{"clip_id": f"v.{n}.mp4", "span": ["00:00:00.000", "00:00:01.000"]} for n in range(20_000)]
    (tmp_path / "l.jsonl").write_text(json.dumps({"url": "http://h/1.mp4", "clip": spans}))
    listed, num_calls = count_calls(read_sources, [str(tmp_path / "l.jsonl")], IngestSettings())
    assert listed.table.num_rows == 1 and num_calls < 1_000_000  # 7 for each of its spans
