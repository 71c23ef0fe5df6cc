"""Direct links: server faults are recovered from where possible, otherwise they give one error of the right class."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipmill.base.errors import ItemError
from clipmill.base.file_lock import lock_file
from pipeline.stages.download.errors import ERROR_CLASSES
from pipeline.stages.download.fetch import DownloadSettings, backoff_s, fetch
from pipeline.stages.download.host_limiter import HostRateLimiter
from shards.corpus.schema import TABLES
from tests.helpers.http import MediaServer, make_video, media_server

SETTINGS = DownloadSettings(allow_private_addresses=True, backoff_s=0.01, stall_timeout_s=600, retries=3)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> bytes:
    body = make_video(tmp_path_factory.mktemp("video") / "noise.mp4")
    assert 100_000 < len(body) < 2_000_000
    return body


@pytest.fixture
def server():
    with media_server() as running:
        yield running


def source(url: str, **columns) -> dict:
    row = dict.fromkeys(TABLES["sources"].names)
    return {**row, "video_id": "clip1", "url": url, "kind": "url", **columns}


def get(url: str, tmp_path: Path, settings: DownloadSettings = SETTINGS, **columns) -> dict:
    return fetch(source(url, **columns), tmp_path / "sources", settings, corpus_root=tmp_path)


def failure(url: str, tmp_path: Path, settings: DownloadSettings = SETTINGS, **columns) -> ItemError:
    with pytest.raises(ItemError) as caught:
        get(url, tmp_path, settings, **columns)
    error = caught.value
    assert error.error_class in ERROR_CLASSES
    left = sorted(path.name for path in (tmp_path / "sources").iterdir())
    assert left in ([], ["clip1.part"]), "no file may have its final name"
    assert error.transient or left == [], "a permanent failure leaves nothing"
    return error


def test_a_link_becomes_a_file_and_a_row(server: MediaServer, tmp_path, video):
    row = get(server.add("/a.mp4", video) + "?token=1&x=y", tmp_path)
    assert set(row) == set(TABLES["downloads"].names)
    assert (tmp_path / row["path"]).read_bytes() == video
    assert row["path"] == "sources/clip1.mp4"
    assert (row["num_bytes"], row["sha256"]) == (len(video), hashlib.sha256(video).hexdigest())
    assert (row["width"], row["height"], row["extractor"]) == (160, 120, "http")
    assert os.listdir(tmp_path / "sources") == ["clip1.mp4"]
    assert len(server.requests_for("/a.mp4")) == 1


def test_the_extension_comes_from_the_bytes(server: MediaServer, tmp_path):
    body = make_video(tmp_path / "v.webm.mkv", duration_s=0.3)
    row = get(server.add("/evil.php", body, content_type="application/octet-stream"), tmp_path)
    assert row["path"] == "sources/clip1.mkv"


@pytest.mark.parametrize("drops", [[1000], [0], [50_000, 30_000, 10]])
def test_a_dropped_connection_resumes_where_it_broke(server: MediaServer, tmp_path, video, drops):
    row = get(server.add("/a.mp4", video, drops=list(drops)), tmp_path)
    assert (tmp_path / row["path"]).read_bytes() == video
    asked = server.requests_for("/a.mp4")
    assert len(asked) == len(drops) + 1
    if drops[0]:
        assert asked[1]["Range"] == f"bytes={drops[0]}-" and asked[1]["If-Range"] == '"one"'


def test_a_server_without_ranges_starts_over(server: MediaServer, tmp_path, video):
    row = get(server.add("/a.mp4", video, drops=[40_000], ranges=False), tmp_path)
    assert (tmp_path / row["path"]).read_bytes() == video


def test_a_file_that_changed_meanwhile_starts_over(server: MediaServer, tmp_path, video):
    url = server.add("/a.mp4", b"\x00old bytes" * 90_000, drops=[30_000] * 9)
    assert failure(url, tmp_path).error_class == "truncated"
    server.add("/a.mp4", video, etag='"two"')
    assert (tmp_path / get(url, tmp_path)["path"]).read_bytes() == video


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_a_download_resumes_only_with_a_strong_validator(server: MediaServer, tmp_path, video, etag):
    row = get(server.add("/a.mp4", video, drops=[30_000], etag=etag), tmp_path)
    assert (tmp_path / row["path"]).read_bytes() == video
    assert "Range" not in server.requests_for("/a.mp4")[1]


def test_a_length_that_never_comes_is_truncated(server: MediaServer, tmp_path, video):
    error = failure(server.add("/a.mp4", video, length_delta=100, ranges=False), tmp_path)
    assert (error.error_class, error.transient) == ("truncated", True)
    assert len(server.requests_for("/a.mp4")) == SETTINGS.retries + 1


def test_a_length_too_long_heals_where_the_server_knows_the_end(server: MediaServer, tmp_path, video):
    row = get(server.add("/a.mp4", video, length_delta=100), tmp_path)
    assert (tmp_path / row["path"]).read_bytes() == video


def test_a_length_too_short_is_a_truncated_video(server: MediaServer, tmp_path, video):
    error = failure(server.add("/a.mp4", video, length_delta=-5000), tmp_path)
    assert (error.error_class, error.transient) == ("truncated", False)


@pytest.mark.parametrize("etag", ['"one"', None], ids=["continued", "begun anew"])
def test_a_length_too_short_once_heals(server: MediaServer, tmp_path, video, etag):
    url = server.add("/a.mp4", video, etag=etag, short_lengths=[5000])
    assert (tmp_path / get(url, tmp_path)["path"]).read_bytes() == video
    assert ("Range" in server.requests_for("/a.mp4")[1]) == (etag is not None)


def test_an_mp4_cut_off_at_the_source_is_truncated(server: MediaServer, tmp_path, video):
    error = failure(server.add("/a.mp4", video[:-9000]), tmp_path)
    assert error.error_class == "truncated" and "mdat" in error.message and not error.transient
    assert len(server.requests_for("/a.mp4")) == 2, "one more request asks for the rest"


def test_a_matroska_file_cut_off_at_the_source_is_truncated(server: MediaServer, tmp_path):
    whole = make_video(tmp_path / "v.mkv", duration_s=0.3)
    assert get(server.add("/whole", whole, content_type="video/webm"), tmp_path)["num_bytes"] == len(whole)
    error = failure(server.add("/cut", whole[:-700], content_type="video/webm"), tmp_path / "other")
    assert error.error_class == "truncated" and "segment" in error.message and not error.transient


@pytest.mark.parametrize(
    ("status", "error_class", "transient"),
    [
        (401, "login-required", False),
        (403, "forbidden", False),
        (404, "not-found", False),
        (410, "removed", False),
        (418, "http-error", False),
        (451, "geo-blocked", False),
        (500, "server-error", True),
        (503, "server-error", True),
    ],
)
def test_http_statuses(server: MediaServer, tmp_path, status, error_class, transient):
    url = server.add("/a.mp4", b"<html>sorry</html>", status=status, content_type="text/html")
    error = failure(url, tmp_path)
    assert (error.error_class, error.transient) == (error_class, transient)
    assert str(status) in error.message
    assert len(server.requests_for("/a.mp4")) == (SETTINGS.retries + 1 if transient else 1)


def test_a_server_error_is_retried(server: MediaServer, tmp_path, video):
    url = server.add("/a.mp4", video, failures=[(503, {}), (500, {})])
    assert get(url, tmp_path)["num_bytes"] == len(video)


def test_retry_after_is_waited_for(server: MediaServer, tmp_path, video):
    url = server.add("/a.mp4", video, failures=[(429, {"Retry-After": "1"})])
    started = time.monotonic()
    assert get(url, tmp_path)["num_bytes"] == len(video)
    assert time.monotonic() - started >= 1.0


def test_a_lockout_pauses_the_host_and_costs_no_try(server: MediaServer, tmp_path, video):
    settings = SETTINGS.model_copy(update={"retries": 0, "cooldown_s": 0.05})
    url = server.add("/a.mp4", video, failures=[(429, {})] * 3)
    assert get(url, tmp_path, settings)["num_bytes"] == len(video)


def test_a_lockout_without_end_fails_as_rate_limited(server: MediaServer, tmp_path):
    settings = SETTINGS.model_copy(update={"cooldown_s": 0.01, "lockout_retries": 2})
    error = failure(server.add("/a.mp4", b"", failures=[(429, {})] * 50), tmp_path, settings)
    assert (error.error_class, error.transient) == ("rate-limited", True)
    assert len(server.requests_for("/a.mp4")) == 3


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "text/html"),
        (b"  <html><head></head></html>" * 500, "video/mp4"),
        (b'{"error": "no such video"}', "application/json"),
        (b"moved", "text/plain"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "video/mp4"),
    ],
)
def test_a_page_never_becomes_a_video(server: MediaServer, tmp_path, body, content_type):
    error = failure(server.add("/a.mp4", body, content_type=content_type), tmp_path)
    assert (error.error_class, error.transient) == ("not-a-video", False)


def test_a_page_sent_in_small_pieces_is_recognised(server: MediaServer, tmp_path):
    url = server.add("/a.mp4", b"<html>" + b"x" * 400, bytes_per_s=4000)
    assert failure(url, tmp_path).error_class == "not-a-video"


def test_binary_rubbish_is_not_a_video(server: MediaServer, tmp_path):
    assert failure(server.add("/a.mp4", bytes(range(256)) * 40), tmp_path).error_class == "not-a-video"


def test_sound_alone_has_no_video_stream(server: MediaServer, tmp_path):
    body = make_video(tmp_path / "a.m4a", audio_only=True)
    assert failure(server.add("/a.mp4", body), tmp_path).error_class == "no-video-stream"


def test_an_empty_body(server: MediaServer, tmp_path):
    assert failure(server.add("/a.mp4", b""), tmp_path).error_class == "empty-file"


def test_too_large_by_its_header_is_not_fetched(server: MediaServer, tmp_path, video):
    settings = SETTINGS.model_copy(update={"max_bytes": 10_000})
    assert failure(server.add("/a.mp4", video), tmp_path, settings).error_class == "too-large"


def test_too_large_by_count_when_no_length_is_given(server: MediaServer, tmp_path, video):
    settings = SETTINGS.model_copy(update={"max_bytes": 10_000})
    url = server.add("/a.mp4", video, announce=False)
    assert failure(url, tmp_path, settings).error_class == "too-large"


def test_a_compressed_body_is_unpacked_and_counted_unpacked(server: MediaServer, tmp_path, video):
    row = get(server.add("/a.mp4", video, gzipped=True), tmp_path)
    assert (tmp_path / row["path"]).read_bytes() == video
    bomb = server.add("/bomb.mp4", b"\0" * 30_000_000, gzipped=True)
    settings = SETTINGS.model_copy(update={"max_bytes": 1_000_000})
    assert failure(bomb, tmp_path / "other", settings).error_class == "too-large"


def test_a_compressed_body_that_breaks_is_never_continued(server: MediaServer, tmp_path, video):
    row = get(server.add("/a.mp4", video, gzipped=True, drops=[50_000]), tmp_path)
    assert (tmp_path / row["path"]).read_bytes() == video
    assert "Range" not in server.requests_for("/a.mp4")[1]


def test_redirects_are_followed_but_not_for_ever(server: MediaServer, tmp_path, video):
    server.add("/there.mp4", video)
    row = get(server.add("/here.mp4", b"", status=302, headers={"Location": "/there.mp4"}), tmp_path)
    assert json.loads(row["meta"])["final_url"] == server.url("/there.mp4")
    loop = server.add("/loop.mp4", b"", status=301, headers={"Location": "/loop.mp4"})
    assert failure(loop, tmp_path / "other").error_class == "redirect-loop"


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1:70/_x"])
def test_redirects_to_other_schemes_are_refused(server: MediaServer, tmp_path, target):
    url = server.add("/a.mp4", b"", status=302, headers={"Location": target})
    assert failure(url, tmp_path).error_class == "unsupported-url"


def test_a_stall_ends(server: MediaServer, tmp_path, video):
    settings = SETTINGS.model_copy(update={"stall_timeout_s": 0.3, "retries": 1})
    error = failure(server.add("/a.mp4", video, stall_after=20_000), tmp_path, settings)
    assert (error.error_class, error.transient) == ("stalled", True)


def test_a_trickle_ends_at_the_whole_timeout(server: MediaServer, tmp_path, video):
    settings = SETTINGS.model_copy(update={"timeout_s": 0.6})
    error = failure(server.add("/a.mp4", video, bytes_per_s=20), tmp_path, settings)  # the whole would take hours
    assert (error.error_class, error.transient) == ("timeout", True)


def test_headers_that_never_end_end_at_the_whole_timeout(tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not stop.wait(0.05):
                connection.sendall(b"y")

    thread = threading.Thread(target=drip)
    thread.start()
    settings = SETTINGS.model_copy(update={"timeout_s": 0.5, "retries": 0})
    try:
        error = failure(f"http://127.0.0.1:{listener.getsockname()[1]}/a.mp4", tmp_path, settings)
    finally:
        stop.set()
        socket.create_connection(listener.getsockname()).close()  # if the time ended before there was a connection
        thread.join()
        listener.close()
    assert error.error_class == "timeout"


def test_a_refused_connection(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = failure(f"http://127.0.0.1:{port}/a.mp4", tmp_path)
    assert (error.error_class, error.transient) == ("connection", True)


def test_an_unknown_host(tmp_path):
    settings = SETTINGS.model_copy(update={"retries": 0})
    assert failure("http://no-such-host.invalid/a.mp4", tmp_path, settings).error_class == "unknown-host"


@pytest.mark.parametrize("url", ["gopher://example.com/a", "s3://bucket::file:///etc/passwd", "http://a b/"])
def test_unsupported_urls(tmp_path, url):
    assert failure(url, tmp_path).error_class == "unsupported-url"


def test_a_transient_failure_is_continued_by_the_next_build(server: MediaServer, tmp_path, video):
    url = server.add("/a.mp4", video, drops=[10_000] * (SETTINGS.retries + 1))
    assert failure(url, tmp_path).transient
    row = get(url, tmp_path)
    assert (tmp_path / row["path"]).read_bytes() == video
    assert server.requests_for("/a.mp4")[-1]["Range"] == f"bytes={10_000 * (SETTINGS.retries + 1)}-"


def test_a_file_that_was_whole_already_keeps_the_type_it_came_with(server: MediaServer, tmp_path, video):
    row = get(server.add("/a.mp4", video, content_type="video/mp4", length_delta=7), tmp_path)
    assert server.requests_for("/a.mp4")[1]["Range"] == f"bytes={len(video)}-"
    assert json.loads(row["meta"])["content_type"] == "video/mp4"


def test_another_container_leaves_no_old_file_behind(server: MediaServer, tmp_path, video):
    url = server.add("/a", video, content_type="video/mp4")
    get(url, tmp_path)
    server.add("/a", make_video(tmp_path / "v.mkv", duration_s=0.3))
    get(url, tmp_path)
    assert os.listdir(tmp_path / "sources") == ["clip1.mkv"]


def test_cookies_go_to_their_host(server: MediaServer, tmp_path, video):
    jar = tmp_path / "cookies.txt"
    jar.write_text("# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tsession\tsecret\n")
    get(server.add("/a.mp4", video), tmp_path, SETTINGS.model_copy(update={"cookies_file": str(jar)}))
    assert server.requests_for("/a.mp4")[0]["Cookie"] == "session=secret"


# --- subtitles that the list names


def test_a_subtitle_link_is_fetched_with_the_video(server: MediaServer, tmp_path, video):
    text = b"WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n"
    subtitle = server.add("/a.vtt", text, content_type="text/vtt")
    row = get(server.add("/a.mp4", video), tmp_path, subtitle=subtitle, language="en")
    (entry,) = row["subtitles"]
    assert (entry["kind"], entry["format"], entry["language"]) == ("given", "vtt", "en")
    assert (tmp_path / entry["path"]).read_bytes() == text
    assert sorted(os.listdir(tmp_path / "sources")) == ["clip1.en.vtt", "clip1.mp4"]


@pytest.mark.parametrize(
    ("route", "error_class"),
    [({"status": 404}, "not-found"), ({"body": b"<html>no</html>"}, "bad-subtitle"), ({}, "empty-file")],
)
def test_a_missing_subtitle_is_noted_and_the_video_kept(server: MediaServer, tmp_path, video, route, error_class):
    subtitle = server.add("/a.vtt", **route)
    row = get(server.add("/a.mp4", video), tmp_path, subtitle=subtitle)
    assert row["subtitles"] == []
    (note,) = json.loads(row["meta"])["subtitle_errors"]
    assert note["error_class"] == error_class


def test_a_subtitle_that_fails_for_now_is_waited_for(server: MediaServer, tmp_path, video):
    subtitle = server.add("/a.vtt", status=503)
    error = failure(server.add("/a.mp4", video), tmp_path, subtitle=subtitle)
    assert (error.error_class, error.transient) == ("server-error", True)


# --- faults of this machine

_CHILD = """
import sys, json
from pathlib import Path
from pipeline.stages.download.fetch import DownloadSettings, fetch
settings = DownloadSettings(allow_private_addresses=True, backoff_s=0.01, stall_timeout_s=600, retries=0)
url, root = sys.argv[1:3]
if len(sys.argv) > 3:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    fetch({"video_id": "clip1", "url": url, "kind": "url"}, Path(root) / "sources", settings)
    print("done")
except Exception as error:
    print(error.error_class, error.transient)
"""


def run_child(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", _CHILD, *arguments]
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)


def test_a_full_disk_is_one_error(server: MediaServer, tmp_path, video):
    child = run_child(server.add("/a.mp4", video), str(tmp_path), "50000")
    assert child.communicate(timeout=600)[0].split() == ["disk-full", "True"]


@pytest.mark.parametrize("begun", ["after it is dead", "while it lives"])
def test_a_killed_download_resumes(server: MediaServer, tmp_path, video, begun, monkeypatch):
    """The next build may begin while a worker of the killed one still downloads: two never write into one folder."""
    url = server.add("/a.mp4", video, stall_after=80_000)
    child = run_child(url, str(tmp_path))
    part = tmp_path / "sources" / "clip1.part" / "media"
    while not (part.exists() and part.stat().st_size > 20_000):
        assert child.poll() is None
        time.sleep(0.01)
    waits = threading.Event()
    sleep = SimpleNamespace(monotonic=time.monotonic, sleep=lambda pause_s: waits.set() or time.sleep(pause_s))
    monkeypatch.setattr("clipmill.base.file_lock.time", sleep)
    with ThreadPoolExecutor(1) as pool:
        if begun == "while it lives":
            second = pool.submit(get, url, tmp_path)
            assert waits.wait(600) and len(server.requests_for("/a.mp4")) == 1, "the second must wait"
        server.routes["/a.mp4"].stall_after = None
        child.send_signal(signal.SIGKILL)
        child.wait()
        if begun == "after it is dead":
            assert sorted(os.listdir(tmp_path / "sources")) == ["clip1.part", "clip1.part.lock"]
            second = pool.submit(get, url, tmp_path)
        row = second.result(timeout=600)
    assert (tmp_path / row["path"]).read_bytes() == video
    assert 20_000 < int(server.requests_for("/a.mp4")[1]["Range"].removeprefix("bytes=").removesuffix("-")) < len(video)
    assert os.listdir(tmp_path / "sources") == ["clip1.mp4"]


def test_a_download_held_by_another_process_is_a_retryable_failure(server, tmp_path, video, monkeypatch):
    monkeypatch.setattr("pipeline.stages.download.fetch.WORKER_ENDS_WITHIN_S", 0.1)
    (tmp_path / "sources").mkdir()
    held = lock_file(tmp_path / "sources" / "clip1.part.lock", 0, remove=True)
    with held, pytest.raises(ItemError, match="still held") as caught:
        get(server.add("/a.mp4", video), tmp_path)
    assert caught.value.error_class == "in-use" and caught.value.transient
    assert os.listdir(tmp_path / "sources") == []
    assert get(server.url("/a.mp4"), tmp_path)["num_bytes"] == len(video)


def test_a_corpus_that_cannot_be_written(server: MediaServer, tmp_path, video):
    (tmp_path / "sources").write_text("a file where the folder should be")
    with pytest.raises(ItemError) as caught:
        get(server.add("/a.mp4", video), tmp_path)
    assert caught.value.error_class == "not-writable"


# --- many at once


def test_no_more_than_per_host_at_once(server: MediaServer, tmp_path, video):
    limiter, pairs = HostRateLimiter(per_host=2, poll_s=0.02), threading.Barrier(2)
    urls = [server.add(f"/{i}.mp4", video, bytes_per_s=1_500_000, together=pairs) for i in range(6)]
    rows: list[dict] = []

    def work(i: int) -> None:
        rows.append(fetch(source(urls[i], video_id=f"v{i}"), tmp_path, SETTINGS, rate_limiter=limiter))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rows) == 6 and len({row["sha256"] for row in rows}) == 1
    assert server.max_active == 2


def test_back_off_grows_and_depends_on_the_url_alone():
    pauses = [backoff_s(1.0, n, "http://h/a") for n in range(1, 12)]
    assert pauses == [backoff_s(1.0, n, "http://h/a") for n in range(1, 12)]
    assert all(0.5 * min(60, 2**n) <= pause <= 1.5 * min(60, 2**n) for n, pause in enumerate(pauses))
    assert pauses != [backoff_s(1.0, n, "http://h/b") for n in range(1, 12)]
