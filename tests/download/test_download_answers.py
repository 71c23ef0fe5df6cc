"""Answers of servers as RFC 9110 allows them, and as they come: no two files in one, no good answer refused."""

import itertools
import json
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.base.errors import ItemError
from pipeline.stages.download.address_guard import EgressGuard, LeastRate
from pipeline.stages.download.errors import ERROR_CLASSES, DownloadError
from pipeline.stages.download.fetch import DownloadSettings, GivenBack, fetch
from pipeline.stages.download.host_limiter import HostRateLimiter
from pipeline.stages.download.http_fetch import (
    MAX_RETRY_AFTER_S,
    Validators,
    download_http,
    redirect_target,
    request_url,
    retry_after_s,
)
from tests.helpers.http import http_answer, make_video, media_server, scripted_server

SETTINGS = DownloadSettings(
    allow_private_addresses=True, backoff_s=0.001, stall_timeout_s=600, retries=3, cooldown_s=0.001, generic_pages=False
)
HALF = 40_000


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> bytes:
    return make_video(tmp_path_factory.mktemp("video") / "noise.mp4")


def get(url: str, folder: Path, **changes) -> dict:
    source = {"video_id": "v", "url": url, "kind": "url"}
    return fetch(source, folder / "sources", SETTINGS.model_copy(update=changes), corpus_root=folder)


def content(url: str, folder: Path, **changes) -> bytes:
    return (folder / get(url, folder, **changes)["path"]).read_bytes()


def failure(url: str, folder: Path, **changes) -> ItemError:
    with pytest.raises(ItemError) as caught:
        get(url, folder, **changes)
    assert caught.value.error_class in ERROR_CLASSES
    return caught.value


# --- resuming


def other_file(video: bytes) -> bytes:
    """Return another video of the same size: with an equal beginning only the whole tells them apart."""
    return video[:-1000] + bytes(byte ^ 0x55 for byte in video[-1000:])


OLD = {"ETag": '"old"', "Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
CHANGED = {
    "another ETag": {"ETag": '"new"'},
    "another date": {"ETag": None, "Last_Modified": "Mon, 01 Jan 2024 00:00:05 GMT"},
    "the same date, another ETag": {"ETag": '"new"', "Last_Modified": OLD["Last_Modified"]},
    "no validator": {"ETag": None, "Last_Modified": None},
    "another size": {**OLD, "size": 7},
    "the ETag has become weak": {"ETag": 'W/"old"', "Last_Modified": None},
    "compressed": {**OLD, "Content_Encoding": "gzip"},
    "several ranges": {**OLD, "Content_Type": "multipart/byteranges; boundary=x", "Content_Range": None},
    "another offset": {**OLD, "from": -10},
    "a range in other digits": {**OLD, "Content_Range": "bytes ²-³/⁴"},
}


@pytest.mark.parametrize("change", CHANGED)
def test_halves_of_two_files_are_never_joined(tmp_path, video, change):
    """The server breaks off, the file changes, and it answers 206 without looking at If-Range."""
    new, broken = other_file(video), iter([True])
    headers = dict(CHANGED[change])
    size, offset = len(video) + headers.pop("size", 0), headers.pop("from", 0)

    def answer(_target, asked, send):
        if "range" not in asked:
            body, cut = (video, HALF) if next(broken, False) else (new, None)
            send(http_answer("200 OK", body, cut, **(OLD if cut else {"ETag": '"new"'})))
            return
        start = int(asked["range"][6:].rstrip("-")) + offset
        span = {"Content_Range": f"bytes {start}-{size - 1}/{size}"}
        send(http_answer("206 Partial Content", new[start:], **(span | headers)))

    with scripted_server(answer) as server:
        row = download(server.url("/v.mp4"), tmp_path)
        assert row == new
    ranges = [headers.get("range") for _, headers in server.requests]
    assert ranges == [None, f"bytes={HALF}-", None]
    assert server.requests[1][1]["if-range"] == '"old"'


def download(url: str, work: Path) -> bytes:
    """Download with retries, without looking at what the file is."""
    work.mkdir(exist_ok=True)
    for last in (False, False, True):
        try:
            with EgressGuard(True, 600) as guard:
                return download_http(url, work, SETTINGS, guard, max_bytes=1 << 30).path.read_bytes()
        except DownloadError as error:
            if last or error.error_class != "truncated":
                raise
    raise AssertionError


@pytest.mark.parametrize(
    "validators",
    [OLD, {"ETag": '"old"'}, {"Last_Modified": OLD["Last_Modified"]}, {**OLD, "ETag": 'W/"old"'}],
    ids=["both", "ETag", "date", "weak ETag and date"],
)
def test_the_rest_of_the_same_file_is_appended(tmp_path, video, validators):
    def answer(_target, asked, send):
        start = int(asked["range"][6:].rstrip("-")) if "range" in asked else 0
        span = {"Content_Range": f"bytes {start}-{len(video) - 1}/{len(video)}"} if start else {}
        status, cut = ("206 Partial Content", None) if start else ("200 OK", HALF)
        send(http_answer(status, video[start:], cut, **validators, **span))

    with scripted_server(answer) as server:
        assert download(server.url("/v.mp4"), tmp_path) == video
    assert [headers.get("range") for _, headers in server.requests] == [None, f"bytes={HALF}-"]


def test_a_date_of_the_same_second_proves_nothing(tmp_path, video):
    """A file may change twice in a second, so its date is no validator until the second is over."""
    lines = iter([HALF, None])

    def answer(_target, _asked, send):
        send(http_answer("200 OK", video, next(lines), Last_Modified="Tue, 02 Jan 2024 00:00:00 GMT"))

    with scripted_server(answer) as server:
        assert download(server.url("/v.mp4"), tmp_path) == video
    assert [headers.get("range") for _, headers in server.requests] == [None, None]


texts = st.sampled_from(["", '"a"', '"b"', 'W/"a"', "Mon, 01 Jan 2024 00:00:00 GMT"])
validators = st.builds(Validators, texts, texts, st.sampled_from([None, 1, 2]))


@given(validators, validators)
def test_validators_prove_a_file_only_if_one_agrees_and_none_differs(one, other):
    proven = one.prove_same_file(other)
    assert proven == other.prove_same_file(one)
    same = [a == b for a, b in zip(vars(one).values(), vars(other).values(), strict=True) if a and b]
    named = (one.etag and one.etag == other.etag) or (one.last_modified and one.last_modified == other.last_modified)
    assert proven == bool(named and all(same))


# --- statuses


@pytest.mark.parametrize(
    "status",
    [
        "200 OK",
        "200",
        "203 Non-Authoritative Information",
        "201 Created",
        "206 Partial Content",
        "226 IM Used",
        "299 x",
    ],
)
def test_every_status_that_comes_with_the_file_is_accepted(tmp_path, video, status):
    with scripted_server(lambda target, asked, send: send(http_answer(status, video))) as server:
        assert content(server.url("/v.mp4"), tmp_path) == video


@pytest.mark.parametrize("interim", ["103 Early Hints", "100 Continue", "102 Processing", "199 Whatever"])
def test_interim_answers_are_skipped(tmp_path, video, interim):
    hint = f"HTTP/1.1 {interim}\r\nLink: </s.css>; rel=preload\r\n\r\n".encode()
    with scripted_server(lambda target, asked, send: send(hint * 3 + http_answer("200 OK", video))) as server:
        assert content(server.url("/v.mp4"), tmp_path) == video


def test_interim_answers_without_end_are_an_error(tmp_path):
    hint = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    with scripted_server(lambda target, asked, send: send(hint * 5000)) as server:
        assert failure(server.url("/v.mp4"), tmp_path).error_class == "connection"


def test_a_206_nobody_asked_for_is_continued_when_it_is_a_part(tmp_path, video):
    """Some servers send a file in pieces of their own size."""

    def answer(_target, asked, send):
        start = int(asked.get("range", "bytes=0-")[6:].rstrip("-"))
        piece = video[start : start + HALF]
        span = f"bytes {start}-{start + len(piece) - 1}/{len(video)}"
        send(http_answer("206 Partial Content", piece, ETag='"one"', Content_Range=span))

    with scripted_server(answer) as server:
        assert content(server.url("/v.mp4"), tmp_path, retries=0) == video
    assert len(server.requests) == -(-len(video) // HALF)


@pytest.mark.parametrize("span", ["bytes 500-999/200000", "bytes 0-39999/200000"])
def test_a_part_that_cannot_be_completed_is_truncated(tmp_path, video, span):
    answer = http_answer("206 Partial Content", video[:HALF], Content_Range=span)
    with scripted_server(lambda target, asked, send: send(answer)) as server:
        error = failure(server.url("/v.mp4"), tmp_path)
    assert (error.error_class, error.transient) == ("truncated", True)


@pytest.mark.parametrize(
    ("status", "error_class", "transient"),
    [(202, "server-error", True), (204, "empty-file", False), (300, "http-error", False), (304, "http-error", False),
     (420, "rate-limited", True), (425, "server-error", True), (529, "server-error", True), (999, "http-error", False),
     (101, "http-error", False)],
)  # fmt: skip
def test_other_statuses_have_a_class(tmp_path, status, error_class, transient):
    with scripted_server(lambda target, asked, send: send(http_answer(f"{status} x", b"page" * 100))) as server:
        error = failure(server.url("/v.mp4"), tmp_path, retries=0, lockout_retries=0)
    assert (error.error_class, error.transient) == (error_class, transient)


@pytest.mark.parametrize("length", ["²", "١٢", "-5", "1e9", "12, 12", "99999999999999999999999", ""])
def test_silly_lengths_cost_no_more_than_the_check(tmp_path, video, length):
    raw = http_answer("200 OK", video, Content_Length=None).replace(b"\r\n\r\n", b"\r\nContent-Length: %s\r\n\r\n", 1)
    head, _, body = raw.partition(b"\r\n\r\n")
    raw = head.replace(b"%s", length.encode("utf-8")) + b"\r\n\r\n" + body
    with scripted_server(lambda target, asked, send: send(raw)) as server:
        try:
            assert content(server.url("/v.mp4"), tmp_path, retries=0) == video
        except ItemError as error:
            assert error.error_class in ("truncated", "connection", "not-a-video", "no-video-stream", "too-large")


# --- addresses


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/café/видео.mp4".encode(), "/caf%C3%A9/%D0%B2%D0%B8%D0%B4%D0%B5%D0%BE.mp4"),
        ("/café.mp4".encode("latin-1"), "/caf%E9.mp4"),
        ("/動画.mp4?q=ü&r=%20#части".encode(), "/%E5%8B%95%E7%94%BB.mp4?q=%C3%BC&r=%20"),
        (b"/a b<c>.mp4", "/a%20b%3Cc%3E.mp4"),
        (b"/100%_fun%20x.mp4", "/100%25_fun%20x.mp4"),
        (b"v2/../w.mp4", "/dir/w.mp4"),
        (b"?only=query", "/dir/start?only=query"),
    ],
)
def test_redirects_lead_where_a_browser_goes(tmp_path, video, location, target):
    def answer(asked_for, _asked, send):
        if asked_for == "/dir/start":
            head = http_answer("302 Found", Location="LOCATION")
            send(head.replace(b"LOCATION", location))
        else:
            send(http_answer("200 OK" if asked_for == target else "404 Not Found", video))

    with scripted_server(answer) as server:
        assert content(server.url("/dir/start"), tmp_path) == video


def test_a_redirect_to_an_impossible_address_is_an_error_of_the_url(tmp_path):
    for location in ("http://[::1", "http://a b/", "http://h:99999/", "http://\udce9.example/"):
        raw = http_answer("302 Found", Location="LOCATION").replace(
            b"LOCATION", location.encode("utf-8", "surrogateescape")
        )
        with scripted_server(lambda target, asked, send, raw=raw: send(raw)) as server:
            error = failure(server.url("/v.mp4"), tmp_path, retries=0)
        assert error.error_class in ("unsupported-url", "unknown-host"), location


@pytest.mark.parametrize(
    "path", ["/100%_fun%20%D0%B2.mp4", "/%.mp4", "/a%2.mp4", "/%zz%41", "/a%%20b", "/x?q=50%&r=%2B"]
)
def test_stray_percent_signs_change_no_other_escape(tmp_path, video, path):
    """Servers decode %25 as the sign itself; an escape that was escaped once more would lead elsewhere."""
    stray = path.replace("%_", "%25_").replace("%.", "%25.").replace("%2.", "%252.").replace("%zz", "%25zz")
    stray = stray.replace("a%%20b", "a%25%20b").replace("50%&", "50%25&")
    with scripted_server(lambda target, asked, send: send(http_answer("200 OK", video))) as server:
        content(server.url(path), tmp_path)
    assert server.requests[0][0].replace("%41", "A") == stray.replace("%41", "A")


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_an_escaped_url_stays_as_it_is(text):
    once = request_url(f"http://h.example/{text}")
    assert once.isascii() and request_url(once) == once


@given(st.binary(max_size=60))
def test_any_location_is_a_url_or_an_error(raw):
    try:
        assert isinstance(redirect_target("http://h.example/dir/file", raw.decode("latin-1")), str)
    except ValueError:
        pass


# --- Retry-After

NOW = datetime(2024, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120), (" 7 ", 7), ("1.5", 1.5), ("Tue, 02 Jan 2024 00:01:00 GMT", 60),
        ("Tue, 02 Jan 2024 00:01:00 -0000", 60), ("Tuesday, 02-Jan-24 00:01:00 GMT", 60),
        ("999999999999999999999999", MAX_RETRY_AFTER_S), ("9" * 5000, MAX_RETRY_AFTER_S),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_AFTER_S),
        ("²", None), ("-5", None), ("0", None), ("", None), ("soon", None), ("1e9", None), ("nan", None), ("inf", None),
        ("٣", None), ("0x10", None), ("1_000", None), ("Mon, 01 Jan 1990 00:00:00 GMT", None),
        ("Tue, 99 Foo 2024 00:00:00 GMT", None), ("Tue, 02 Jan 99999999999 00:00:00 GMT", None),
    ],
)  # fmt: skip
def test_retry_after_is_a_pause_or_nothing(value, seconds):
    assert retry_after_s({"Retry-After": value}, NOW) == seconds


@given(st.text(max_size=30))
def test_any_retry_after_is_a_pause_or_nothing(value):
    pause = retry_after_s({"Retry-After": value}, NOW)
    assert pause is None or 0 < pause <= MAX_RETRY_AFTER_S


@pytest.mark.parametrize("value", ["²", "-1", "soon", "0", "Mon, 01 Jan 1990 00:00:00 GMT"])
def test_a_lockout_with_a_silly_pause_heals(tmp_path, video, value):
    answers = itertools.chain([http_answer("429 x", Retry_After="PAUSE")] * 2, itertools.repeat(None))

    def answer(_target, _asked, send):
        raw = next(answers)
        send(raw.replace(b"PAUSE", value.encode()) if raw else http_answer("200 OK", video))

    with scripted_server(answer) as server:
        assert content(server.url("/v.mp4"), tmp_path) == video


# --- trickles


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def trickle(rate: LeastRate, clock: Clock, *parts: tuple[float, int]) -> None:
    for seconds, num_bytes in parts:

        def read(seconds=seconds, num_bytes=num_bytes) -> bytes:
            clock.now += seconds
            return bytes(num_bytes)

        rate.measure(read)
        clock.now += 1000  # of the reader's own


def test_a_trickle_ends_after_a_window_and_a_pause_does_not():
    clock = Clock()
    rate = LeastRate(1000, 60, clock)
    trickle(rate, clock, (59, 10), (2, 61_000), (30, 1), (29, 1))
    with pytest.raises(DownloadError, match=r"stalled: .* fewer than download.min_bytes_per_s"):
        trickle(rate, clock, (2, 50_000), (0, 0))
    trickle(LeastRate(0, 60, clock), clock, (100, 1), (100, 1))


def test_the_end_of_a_body_is_no_trickle():
    clock = Clock()
    trickle(LeastRate(1000, 60, clock), clock, (59, 10), (2, 0))  # nobody reads after the end


def test_a_download_that_trickles_ends_and_is_continued(tmp_path, video):
    """The window is so short that any wait ends it; a server that waits for the client's end cannot be too fast."""
    with media_server() as server:
        url = server.add("/v.mp4", video, bytes_per_s=2000)
        error = failure(url, tmp_path, retries=1, min_bytes_per_s=1e12, rate_window_s=1e-9)
        assert (error.error_class, error.transient) == ("stalled", True)
        server.routes["/v.mp4"].bytes_per_s = None
        assert content(url, tmp_path) == video
        assert "Range" in server.requests_for("/v.mp4")[-1], "what had arrived is kept"


def test_headers_that_trickle_end(tmp_path):
    stop = threading.Event()

    def answer(_target, _asked, send):
        send(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not stop.wait(0.02):
            send(b"y")

    with scripted_server(answer) as server:
        try:
            error = failure(server.url("/v.mp4"), tmp_path, answer_timeout_s=0.3, retries=0)
        finally:
            stop.set()
    assert error.error_class == "stalled" and "answer_timeout_s" in error.message


def test_what_a_redirect_led_to_is_recorded(tmp_path, video):
    def answer(target, _asked, send):
        send(http_answer("200 OK", video) if target != "/a" else http_answer("301 x", Location="/b%20c.mp4"))

    with scripted_server(answer) as server:
        assert json.loads(get(server.url("/a"), tmp_path)["meta"])["final_url"] == server.url("/b%20c.mp4")


def test_a_redirect_to_a_forgotten_address_is_refused(tmp_path, video):
    def answer(target, _asked, send):
        send(http_answer("200 OK", video) if target != "/a" else http_answer("301 x", Location="/b.mp4"))

    def refuse(spellings: list[str]) -> None:
        if any(spelling.endswith("/b.mp4") for spelling in spellings):
            raise ItemError("forgotten", "it was forgotten")

    with scripted_server(answer) as server, pytest.raises(ItemError, match="it was forgotten"):
        source = {"video_id": "v", "url": server.url("/a"), "kind": "url"}
        fetch(source, tmp_path / "sources", SETTINGS, refuse=refuse)
    assert list((tmp_path / "sources").iterdir()) == []


def test_a_download_gives_its_place_back_to_wait_and_goes_on_later(tmp_path, video):
    """The driver waits for the host; what had arrived and the counts are kept."""
    answers = iter([http_answer("200 OK", video, HALF, **OLD), http_answer("429 x", Retry_After=3600)])
    span = f"bytes {HALF}-{len(video) - 1}/{len(video)}"
    rest = http_answer("206 Partial Content", video[HALF:], Content_Range=span, **OLD)
    limiter, now = HostRateLimiter(clock=lambda: now[0]), [0.0]
    source = {"video_id": "v", "url": "", "kind": "url"}
    with scripted_server(lambda target, asked, send: send(next(answers, rest))) as server:
        source["url"] = server.url("/v.mp4")
        options = {"rate_limiter": limiter, "client": "run:v", "longest_wait_s": 5.0, "corpus_root": tmp_path}
        with pytest.raises(GivenBack) as given_back:
            fetch(source, tmp_path / "sources", SETTINGS, **options)
        assert given_back.value.wait_s > 5 and given_back.value.so_far["link"] == {"failures": 1, "lockouts": 1}
        assert limiter.state()["127.0.0.1"]["num_active"] == 0
        now[0] += 3600
        row = fetch({**source, "so_far": given_back.value.so_far}, tmp_path / "sources", SETTINGS, **options)
    assert (tmp_path / row["path"]).read_bytes() == video
    assert [headers.get("range") for _, headers in server.requests] == [None, *[f"bytes={HALF}-"] * 2]


def test_lockouts_are_counted_over_all_the_places_a_download_has_had(tmp_path):
    limiter, now, so_far = HostRateLimiter(clock=lambda: now[0]), [0.0], None
    options = {"rate_limiter": limiter, "client": "run:v", "longest_wait_s": 5.0}
    settings = SETTINGS.model_copy(update={"lockout_retries": 2})
    with scripted_server(lambda target, asked, send: send(http_answer("429 x", Retry_After=60))) as server:
        source = {"video_id": "v", "url": server.url("/v.mp4"), "kind": "url"}
        for _ in range(2):
            with pytest.raises(GivenBack) as given_back:
                fetch({**source, "so_far": so_far}, tmp_path / "sources", settings, **options)
            so_far = given_back.value.so_far
            now[0] += 3600
        with pytest.raises(ItemError, match="rate-limited"):
            fetch({**source, "so_far": so_far}, tmp_path / "sources", settings, **options)
    assert len(server.requests) == 3
