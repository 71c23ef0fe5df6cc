"""The demo's loopback server: ranges, HEAD, ETags, content types, scripted faults, and no access outside its folder."""

import http.client
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.demo.server import serve

CONTENT = bytes(range(256)) * 1000
FAULTS = {
    "videos/busy.mp4": {"status": 503, "times": 2},
    "videos/gone.mp4": {"status": 410},
    "videos/cut.mp4": {"cut_after_bytes": 100_000, "times": 1},
    "videos/page.mp4": {"content_type": "text/html; charset=utf-8"},
    "videos/slow.mp4": {"delay_s": 0.3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "videos").mkdir()
    for name in ("a.mp4", "busy.mp4", "gone.mp4", "cut.mp4", "page.mp4", "slow.mp4", "a b%.webm"):
        (folder / "videos" / name).write_bytes(CONTENT)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "talk.en.vtt").write_text("WEBVTT\n")
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    with serve(folder, faults=FAULTS) as url:
        yield url


def raw(base: str, method: str, path: str, headers: dict | None = None) -> tuple[int, dict, bytes]:
    """Send a request whose path no client library has normalised."""
    connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=600)
    connection.request(method, path, headers=headers or {})
    answer = connection.getresponse()
    result = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return result


def test_a_whole_file_comes_with_its_type_and_tag(base):
    answer = requests.get(f"{base}/videos/a.mp4", timeout=600)
    assert answer.status_code == 200 and answer.content == CONTENT
    assert answer.headers["Content-Type"] == "video/mp4"
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["ETag"].startswith('"')
    assert requests.get(f"{base}/talk.en.vtt", timeout=600).headers["Content-Type"].startswith("text/vtt")


@given(st.integers(0, len(CONTENT) + 10), st.one_of(st.none(), st.integers(0, len(CONTENT) + 10)))
@settings(max_examples=60, deadline=None)
def test_byte_ranges_are_what_was_asked(base, first, last):
    status, headers, body = raw(
        base, "GET", "/videos/a.mp4", {"Range": f"bytes={first}-{'' if last is None else last}"}
    )
    if last is not None and last < first:
        assert (status, body) == (200, CONTENT)  # a malformed range is ignored
    elif first >= len(CONTENT):
        assert status == 416 and headers["Content-Range"] == f"bytes */{len(CONTENT)}"
    else:
        stop = len(CONTENT) if last is None else min(last + 1, len(CONTENT))
        assert status == 206 and body == CONTENT[first:stop]
        assert headers["Content-Range"] == f"bytes {first}-{stop - 1}/{len(CONTENT)}"


def test_the_last_bytes_can_be_asked_for(base):
    assert raw(base, "GET", "/videos/a.mp4", {"Range": "bytes=-100"})[2] == CONTENT[-100:]
    assert raw(base, "GET", "/videos/a.mp4", {"Range": "bytes=-0"})[0] == 416
    assert raw(base, "GET", "/videos/a.mp4", {"Range": "bytes=-9999999"})[2] == CONTENT


@pytest.mark.parametrize("header", ["bytes=0-1,5-6", "lines=1-2", "bytes=-", "nonsense"])
def test_ranges_that_are_not_understood_get_the_whole_file(base, header):
    assert raw(base, "GET", "/videos/a.mp4", {"Range": header})[::2] == (200, CONTENT)


def test_a_stale_if_range_gets_the_whole_file(base):
    etag = requests.head(f"{base}/videos/a.mp4", timeout=600).headers["ETag"]
    asked = {"Range": "bytes=5-"}
    assert raw(base, "GET", "/videos/a.mp4", asked | {"If-Range": etag})[0] == 206
    assert raw(base, "GET", "/videos/a.mp4", asked | {"If-Range": '"other"'})[0] == 200


def test_a_known_tag_is_not_sent_again(base):
    etag = requests.head(f"{base}/videos/a.mp4", timeout=600).headers["ETag"]
    assert raw(base, "GET", "/videos/a.mp4", {"If-None-Match": etag})[::2] == (304, b"")


def test_head_has_the_headers_and_no_body(base):
    status, headers, body = raw(base, "HEAD", "/videos/a.mp4")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(CONTENT)))
    assert raw(base, "HEAD", "/nothing.mp4")[::2] == (404, b"")
    assert raw(base, "HEAD", "/videos/a.mp4", {"Range": "bytes=0-9"})[1]["Content-Length"] == "10"


def test_an_empty_file_is_empty(base):
    assert raw(base, "GET", "/empty.mp4")[::2] == (200, b"")
    assert raw(base, "GET", "/empty.mp4", {"Range": "bytes=0-"})[0] == 416


def test_names_are_decoded(base):
    assert raw(base, "GET", "/videos/a%20b%25.webm?x=1")[0] == 200


@pytest.mark.parametrize(
    "path",
    ["/../secret.txt", "/videos/../../secret.txt", "/%2e%2e/secret.txt", "//secret.txt", "/link.txt", "/", "/videos"]
    + ["/a%00b", "/" + "x" * 5000, "/..%2fsecret.txt", "/nothing.mp4"],
)
def test_nothing_outside_the_folder_and_no_listing(base, path):
    status, _, body = raw(base, "GET", path)
    assert status == 404 and b"secret" not in body


def test_a_fault_lasts_as_long_as_ordered(base):
    assert [raw(base, "GET", "/videos/busy.mp4")[0] for _ in range(4)] == [503, 503, 200, 200]
    assert [raw(base, "GET", "/videos/gone.mp4")[0] for _ in range(3)] == [410] * 3
    assert raw(base, "GET", "/videos/page.mp4")[1]["Content-Type"].startswith("text/html")
    assert requests.get(f"{base}/videos/slow.mp4", timeout=600).elapsed.total_seconds() >= 0.3


def test_a_cut_off_download_can_be_resumed(base):
    connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=600)
    connection.request("GET", "/videos/cut.mp4")
    with pytest.raises(http.client.IncompleteRead) as cut:
        connection.getresponse().read()
    got = cut.value.partial
    assert got == CONTENT[:100_000]
    status, _, rest = raw(base, "GET", "/videos/cut.mp4", {"Range": f"bytes={len(got)}-"})
    assert status == 206 and got + rest == CONTENT


def test_many_clients_at_once(base):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: raw(base, "GET", "/videos/a.mp4")[2], range(64)))
    assert all(answer == CONTENT for answer in answers)


def test_a_connection_serves_several_requests(base):
    connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=600)
    for path, status in [("/videos/a.mp4", 200), ("/nothing", 404), ("/videos/a.mp4", 200)]:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
    connection.close()


def test_the_server_stops_after_its_block(tmp_path):
    before = threading.active_count()
    with serve(tmp_path) as url:
        assert url.startswith("http://127.0.0.1:")
        assert requests.get(url, timeout=600).status_code == 404
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=600)
    assert threading.active_count() <= before + 1


def test_faults_are_read_from_the_folder(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"12345")
    (tmp_path / "faults.json").write_text('{"x.mp4": {"status": 403}}')
    with serve(tmp_path) as url:
        assert requests.get(f"{url}/x.mp4", timeout=600).status_code == 403
