"""Downloads from sites through yt-dlp: one extraction, capped format, chosen subtitles, metadata, classified errors."""

import json
import os
import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest
import yt_dlp
from yt_dlp.extractor.common import InfoExtractor
from yt_dlp.utils import ExtractorError, GeoRestrictedError, UserNotLive

from clipmill.base.errors import ItemError, UserError
from pipeline.stages.download import site_fetch
from pipeline.stages.download.address_guard import EgressGuard, LeastRate
from pipeline.stages.download.errors import ERROR_CLASSES
from pipeline.stages.download.fetch import DownloadSettings, fetch
from pipeline.stages.download.site_fetch import (
    choose_subtitles,
    classify,
    download_site,
    metadata,
    site_extractor,
    user_options,
)
from pipeline.stages.download.ytdlp_options import ALLOWED
from tests.helpers.http import MediaServer, http_answer, make_video, media_server, scripted_server

SETTINGS = DownloadSettings(allow_private_addresses=True, backoff_s=0.01, stall_timeout_s=600, retries=0)
GUARDED = SETTINGS.model_copy(update={"allow_private_addresses": False})


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> dict[str, bytes]:
    """Make videos by height, a sound track, and a segment of a stream."""
    folder = tmp_path_factory.mktemp("media")
    found = {str(h): make_video(folder / f"{h}.mp4", duration_s=0.4, size=f"{h * 4 // 3}x{h}") for h in (60, 120, 240)}
    found["tall"] = make_video(folder / "tall.mp4", duration_s=0.4, size="120x200")
    found["sound"] = make_video(folder / "sound.m4a", duration_s=0.4, audio_only=True)
    found["segment"] = make_video(folder / "segment.ts", duration_s=0.4)
    return found


@pytest.fixture
def server():
    with media_server() as running:
        yield running


class FakeSiteIE(InfoExtractor):
    """Answer with the test's data in place of a site, and count the requests."""

    _VALID_URL = r"https?://fake\.example/(?P<id>\w+)"
    IE_NAME = "fakesite"

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.num_extractions = 0

    def _real_extract(self, url):
        self.num_extractions += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return {"id": "x1", "title": "A title", **self.answer}


def site(answer, work: Path, settings: DownloadSettings = SETTINGS) -> site_fetch.SiteVideo:
    work.mkdir(exist_ok=True)
    extractor = FakeSiteIE(answer)
    with EgressGuard(settings.allow_private_addresses, settings.timeout_s) as guard:
        try:
            return download_site("https://fake.example/x1", work, settings, guard, extractors=(extractor,))
        finally:
            assert extractor.num_extractions == 1


def site_failure(answer, work: Path, settings: DownloadSettings = SETTINGS) -> ItemError:
    with pytest.raises(ItemError) as caught:
        site(answer, work, settings)
    assert caught.value.error_class in ERROR_CLASSES
    return caught.value


def formats(server: MediaServer, media: dict[str, bytes], *names: str) -> list[dict]:
    return [
        {
            "format_id": name,
            "url": server.add(f"/{name}.mp4", media[name]),
            "ext": "mp4",
            "height": 200 if name == "tall" else int(name),
            "width": 120 if name == "tall" else int(name) * 4 // 3,
            "vcodec": "avc1",
            "acodec": "none",
        }
        for name in names
    ]


def test_the_format_is_the_best_below_the_cap(server, media, tmp_path):
    answer = {"formats": formats(server, media, "60", "120", "240")}
    video = site(answer, tmp_path / "w", SETTINGS.model_copy(update={"max_height": 130}))
    assert video.path.read_bytes() == media["120"]
    assert [path for path, _ in server.requests] == ["/120.mp4"], "nothing else is fetched"


def test_where_all_are_larger_the_smallest_is_taken(server, media, tmp_path):
    answer = {"formats": formats(server, media, "120", "240")}
    video = site(answer, tmp_path / "w", SETTINGS.model_copy(update={"max_height": 40}))
    assert video.path.read_bytes() == media["120"]


def test_the_cap_is_on_the_shorter_side(server, media, tmp_path):
    answer = {"formats": formats(server, media, "60", "tall")}
    video = site(answer, tmp_path / "w", SETTINGS.model_copy(update={"max_height": 120}))
    assert video.path.read_bytes() == media["tall"]


def test_separate_tracks_are_joined(server, media, tmp_path):
    sound = {"format_id": "s", "url": server.add("/s.m4a", media["sound"]), "ext": "m4a", "vcodec": "none"}
    answer = {"formats": [*formats(server, media, "120"), {**sound, "acodec": "mp4a"}]}
    video = site(answer, tmp_path / "w")
    listed = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(video.path)], capture_output=True, text=True
    ).stderr
    assert video.path.name == "media.mp4" and "Video: h264" in listed and "Audio: aac" in listed
    assert os.listdir(tmp_path / "w") == ["media.mp4"], "the single tracks are removed"


def test_a_track_that_is_a_playlist_in_disguise_opens_nothing(server, media, tmp_path):
    """FFmpeg joins the fetched tracks; a hostile track must not make it read local files."""
    secret = tmp_path / "secret.ts"
    make_video(secret, duration_s=0.4, audio_only=True)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    sound = {"format_id": "s", "url": server.add("/s.m4a", playlist), "ext": "m4a", "vcodec": "none", "acodec": "mp4a"}
    error = site_failure({"formats": [*formats(server, media, "120"), sound]}, tmp_path / "w")
    assert "Postprocessing" in error.message


def test_ffmpeg_joins_known_containers_only(server, media, tmp_path):
    """FFmpeg would join Core Audio silently; it stands for every demuxer that is not on the list."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "sine=d=0.4", "-c:a", "alac"]
    subprocess.run([*command, str(tmp_path / "a.caf")], check=True)
    sound = {"format_id": "s", "url": server.add("/s.m4a", (tmp_path / "a.caf").read_bytes()), "ext": "m4a"}
    answer = {"formats": [*formats(server, media, "120"), {**sound, "vcodec": "none", "acodec": "mp4a"}]}
    assert "Postprocessing" in site_failure(answer, tmp_path / "w").message


def test_subtitles_come_with_the_same_extraction(server, media, tmp_path):
    text = "WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n"
    answer = {
        "formats": formats(server, media, "60"),
        "subtitles": {
            "en-GB": [{"url": server.add("/en.vtt", text.encode()), "ext": "vtt"}],
            "fr": [{"data": "x", "ext": "vtt"}],
        },
        "automatic_captions": {"en": [{"data": "auto", "ext": "vtt"}], "de": [{"data": text, "ext": "vtt"}]},
    }
    settings = SETTINGS.model_copy(update={"subtitle_languages": ["en", "de"]})
    video = site(answer, tmp_path / "w", settings)
    assert [(language, kind) for _, language, kind in video.subtitles] == [("en-GB", "manual"), ("de", "auto")]
    assert video.subtitles[0][0].read_text() == text


def test_a_subtitle_that_fails_for_now_fails_the_source(server, media, tmp_path):
    entry = {"url": server.add("/en.vtt", b"", failures=[(429, {})] * 9), "ext": "vtt"}
    error = site_failure({"formats": formats(server, media, "60"), "subtitles": {"en": [entry]}}, tmp_path / "w")
    assert (error.error_class, error.transient) == ("rate-limited", True)


def test_a_stream_of_segments_becomes_one_file(server, media, tmp_path):
    server.add("/seg.ts", media["segment"])
    lines = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nseg.ts\n#EXTINF:1.0,\nseg.ts\n#EXT-X-ENDLIST\n"
    url = server.add("/a.m3u8", lines.encode(), content_type="application/vnd.apple.mpegurl")
    row = fetch({"video_id": "v", "url": url, "kind": "url"}, tmp_path / "sources", SETTINGS)
    assert len(server.requests_for("/seg.ts")) == 2
    assert row["width"] == 160 and row["extractor"] == "Generic"


def test_a_video_that_must_not_be_downloaded_is_known_by_its_extraction(server, media, tmp_path):
    """An address may show only after the extraction which video it leads to."""
    url, names = server.add("/120.mp4", media["120"]), []

    def refuse(spellings: list[str]) -> None:
        names.extend(spellings)
        if "fakesite:x1" in spellings:
            raise ItemError("forgotten", "it was forgotten")

    extractor, work = FakeSiteIE({"url": url, "ext": "mp4", "extractor_key": "FakeSite"}), tmp_path / "w"
    work.mkdir()
    with EgressGuard(True, 600) as guard, pytest.raises(ItemError, match="it was forgotten"):
        download_site("https://fake.example/x1", work, SETTINGS, guard, extractors=(extractor,), refuse=refuse)
    assert "https://fake.example/x1" in names and server.requests == [] and os.listdir(work) == []


def test_a_long_stream_of_segments_keeps_no_file_descriptors(server, media, tmp_path):
    """One that stays open for each segment ends the video at the process's limit."""
    urls = [server.add(f"/{n}.ts", media["segment"], headers={"Connection": "close"}) for n in range(60)]
    lines = "".join(f"#EXTINF:0.4,\n{url}\n" for url in urls)
    playlist = server.add("/p.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n{lines}#EXT-X-ENDLIST\n".encode())
    answer = {"formats": [{"format_id": "h", "url": playlist, "ext": "mp4", "protocol": "m3u8_native"}]}
    most, original = [0], site_fetch._LimitHook.__call__

    def count(hook, progress):
        most[0] = max(most[0], len(os.listdir("/proc/self/fd")))
        original(hook, progress)

    before = len(os.listdir("/proc/self/fd"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_fetch._LimitHook, "__call__", count)
        site(answer, tmp_path / "w")
    assert most[0] <= before + 15 and len(server.requests_for("/59.ts")) == 1


def test_halves_of_two_files_are_never_joined_by_an_extractor(media, tmp_path):
    """yt-dlp continues a partial file wherever the offset fits; the site has another file meanwhile."""
    old, new = media["120"], media["120"][:-500] + bytes(500)
    broken = iter([True])

    def answer(_target, asked, send):
        if "range" in asked:
            start = int(asked["range"][6:].rstrip("-"))
            span = f"bytes {start}-{len(new) - 1}/{len(new)}"
            send(http_answer("206 Partial Content", new[start:], ETag='"new"', Content_Range=span))
        elif next(broken, False):
            send(http_answer("200 OK", old, len(old) // 2, ETag='"old"', Accept_Ranges="bytes"))
        else:
            send(http_answer("200 OK", new, ETag='"new"'))

    with scripted_server(answer) as server:
        settings = SETTINGS.model_copy(update={"retries": 3})
        video = site({"url": server.url("/v.mp4"), "ext": "mp4"}, tmp_path / "w", settings)
        first, second, third = (headers.get("range") for _, headers in server.requests)
    assert first is None and second.startswith("bytes=") and third is None
    assert video.path.read_bytes() == new


@pytest.mark.parametrize("same", [True, False], ids=["the same file", "another file"])
def test_a_later_attempt_continues_the_same_file_only(media, tmp_path, same):
    """A later attempt has another URL: validators are compared, not addresses."""
    body = media["120"]
    half = len(body) // 2

    def answer(target, asked, send):
        etag = '"new"' if "second" in target and not same else '"old"'
        start = int(asked["range"][6:].rstrip("-")) if "range" in asked else 0
        span = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        status, cut = ("206 Partial Content" if start else "200 OK"), half if "first" in target else None
        send(http_answer(status, body[start:], cut, ETag=etag, **span))

    with scripted_server(answer) as server:
        site_failure({"url": server.url("/first.mp4"), "ext": "mp4"}, tmp_path / "w")
        server.requests.clear()
        video = site({"url": server.url("/second.mp4"), "ext": "mp4"}, tmp_path / "w")
        ranges = [headers.get("range") for _, headers in server.requests]
    assert video.path.read_bytes() == body
    assert len(ranges) == (1 if same else 2) and ranges[0].startswith("bytes=") and ranges[1:] in ([], [None])


def test_a_site_that_trickles_ends(server, media, tmp_path):
    url = server.add("/120.mp4", media["120"], bytes_per_s=2000)
    extractor, work = FakeSiteIE({"url": url, "ext": "mp4"}), tmp_path / "w"
    work.mkdir()
    with EgressGuard(True, 600, LeastRate(1e12, 1e-9)) as guard, pytest.raises(ItemError, match="min_bytes_per_s"):
        download_site("https://fake.example/x1", work, SETTINGS, guard, extractors=(extractor,))


@pytest.mark.parametrize("location", ["/caf\u00e9/\u0432.mp4".encode(), "/caf\u00e9.mp4".encode("latin-1")])
def test_a_site_may_redirect_to_letters_outside_ascii(media, tmp_path, location):
    def answer(target, _asked, send):
        found = (
            http_answer("200 OK", media["120"]) if target != "/100%25_a%20b" else http_answer("302 x", Location="TO")
        )
        send(found.replace(b"TO", location))

    with scripted_server(answer) as server:
        site({"url": server.url("/100%_a%20b"), "ext": "mp4"}, tmp_path / "w")
        wanted = "".join(f"%{byte:02X}" if byte > 127 else chr(byte) for byte in location)
        assert [target for target, _ in server.requests] == ["/100%25_a%20b", wanted]


def test_a_stream_with_a_hole_is_no_video(server, media, tmp_path):
    server.add("/seg.ts", media["segment"])
    lines = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nseg.ts\n#EXTINF:1.0,\ngone.ts\n#EXT-X-ENDLIST\n"
    url = server.add("/a.m3u8", lines.encode())
    with pytest.raises(ItemError) as caught:
        fetch({"video_id": "v", "url": url, "kind": "url"}, tmp_path / "sources", SETTINGS)
    assert caught.value.error_class == "not-found"


def test_a_video_in_a_page_is_found(server, media, tmp_path):
    server.add("/real.mp4", media["120"])
    page = b'<!doctype html><html><head><title>A page</title></head><body><video src="/real.mp4"></video></body></html>'
    url = server.add("/watch", page, content_type="text/html")
    row = fetch({"video_id": "v", "url": url, "kind": "url"}, tmp_path / "sources", SETTINGS)
    assert (tmp_path / row["path"]).read_bytes() == media["120"]
    assert row["extractor"] in ("Generic", "HTML5MediaEmbed")
    off = SETTINGS.model_copy(update={"generic_pages": False})
    with pytest.raises(ItemError) as caught:
        fetch({"video_id": "w", "url": url, "kind": "url"}, tmp_path / "sources", off)
    assert caught.value.error_class == "not-a-video"


def test_a_page_without_a_video(server, tmp_path):
    url = server.add("/about", b"<!doctype html><html><body>words</body></html>", content_type="text/html")
    with pytest.raises(ItemError) as caught:
        fetch({"video_id": "v", "url": url, "kind": "url"}, tmp_path / "sources", SETTINGS)
    assert (caught.value.error_class, caught.value.transient) == ("unsupported-url", False)
    assert os.listdir(tmp_path / "sources") == []


def test_a_media_link_that_answers_with_a_page_is_not_searched(server, media, tmp_path):
    server.add("/advert.mp4", media["120"])
    url = server.add("/gone.mp4", b'<html><video src="/advert.mp4"></video></html>', content_type="text/html")
    with pytest.raises(ItemError) as caught:
        fetch({"video_id": "v", "url": url, "kind": "url"}, tmp_path / "sources", SETTINGS)
    assert caught.value.error_class == "not-a-video"
    assert server.requests_for("/advert.mp4") == []


def test_a_list_of_videos_is_an_error_and_its_videos_stay_where_they_are(server, media, tmp_path):
    def entries():
        for i in range(1000):
            assert i < 3, "entries of a list must not be extracted"
            yield {"id": str(i), "title": "t", "formats": formats(server, media, "60")}

    error = site_failure({"_type": "playlist", "entries": entries()}, tmp_path / "w")
    assert error.error_class == "playlist" and server.requests == []


def test_a_list_of_one_video_is_that_video(server, media, tmp_path):
    entry = {"id": "1", "title": "t", "formats": formats(server, media, "60")}
    assert site({"_type": "playlist", "entries": [entry]}, tmp_path / "w").path.read_bytes() == media["60"]
    assert site_failure({"_type": "playlist", "entries": []}, tmp_path / "w2").error_class == "unsupported-url"


def test_live_streams_are_left_alone(server, media, tmp_path):
    for state in ({"is_live": True}, {"live_status": "is_upcoming"}):
        error = site_failure({"formats": formats(server, media, "60"), **state}, tmp_path / "w")
        assert (error.error_class, error.transient) == ("live-stream", True)
    assert server.requests == []


def test_an_oversized_download_is_stopped(server, media, tmp_path):
    settings = SETTINGS.model_copy(update={"max_bytes": 2000})
    assert site_failure({"formats": formats(server, media, "240")}, tmp_path / "w", settings).error_class == "too-large"


def test_a_trickle_ends_at_the_whole_timeout(server, media, tmp_path):
    settings = SETTINGS.model_copy(update={"timeout_s": 1.0})
    url = server.add("/slow.mp4", media["240"], bytes_per_s=20)
    error = site_failure({"url": url, "ext": "mp4"}, tmp_path / "w", settings)
    assert error.error_class == "timeout"


def test_metadata_becomes_columns():
    info = {
        "title": "T", "categories": ["Music"], "license": "CC BY", "uploader": "U", "upload_date": "20240131",
        "language": "en", "tags": ["b", "a"], "epoch": 123, "formats": [], "view_count": 7,
    }  # fmt: skip
    row = metadata(info)
    assert (row["licence"], row["channel"], row["upload_date"]) == ("CC BY", "U", "2024-01-31")
    assert json.loads(row["meta"]) == {"tags": ["b", "a"], "uploader": "U", "view_count": 7}
    assert metadata({"upload_date": "soon"})["upload_date"] is None


# Messages that extractors really raise, with their class.
REAL_MESSAGES = [
    ("[youtube] abc: Private video. Sign in if you've been granted access to this video", "private", False),
    ("[vimeo] 1: This video is private", "private", False),
    ("[youtube] abc: Video unavailable. This video has been removed by the uploader", "removed", False),
    ("[youtube] abc: Video unavailable", "removed", False),
    (
        "[youtube] abc: Video unavailable. This video is no longer available because the YouTube account "
        "associated with this video has been terminated.",
        "removed",
        False,
    ),
    ("[youtube] abc: This video is no longer available due to a copyright claim by X", "removed", False),
    ("[youtube] abc: This video has been removed for violating YouTube's Terms of Service", "removed", False),
    ("[youtube] abc: The uploader has not made this video available in your country", "geo-blocked", False),
    ("[bbc] x: this content is not available in your country.", "geo-blocked", False),
    (
        "[youtube] abc: Sign in to confirm you’re not a bot. Use --cookies-from-browser or --cookies for the "
        "authentication.",
        "rate-limited",
        True,
    ),
    (
        "[youtube] abc: Video unavailable. This content isn't available, try again later. The current "
        "session has been rate-limited by YouTube for up to an hour.",
        "rate-limited",
        True,
    ),
    ("[youtube] abc: Unable to download API page: HTTP Error 429: Too Many Requests", "rate-limited", True),
    (
        "[youtube] abc: Sign in to confirm your age. This video may be inappropriate for some users.",
        "age-restricted",
        False,
    ),
    (
        "[youtube] abc: Join this channel to get access to members-only content like this video, and other "
        "exclusive perks.",
        "login-required",
        False,
    ),
    ("[x] 1: This video is only available for registered users. Use --cookies-from-browser", "login-required", False),
    ("[vimeo] 1: This video is protected by a password, use the --video-password option", "login-required", False),
    ("[youtube] abc: This live event will begin in 3 hours.", "live-stream", True),
    ("[youtube] abc: Premieres in 20 hours", "live-stream", True),
    ("[x] 1: This video is DRM protected", "paid", False),
    ("[youtube] abc: This video requires payment to watch", "paid", False),
    ("[x] 1: Unable to download webpage: HTTP Error 404: Not Found", "not-found", False),
    ("unable to download video data: HTTP Error 403: Forbidden", "forbidden", False),
    ("[x] 1: Unable to download webpage: HTTP Error 503: Service Unavailable", "server-error", True),
    ("[x] 1: Unable to download webpage: The read operation timed out", "stalled", True),
    ("[x] 1: Unable to download webpage: <urlopen error [Errno -2] Name or service not known>", "unknown-host", False),
    ("unable to download video data: [Errno 28] No space left on device", "disk-full", True),
    ("Did not get any data blocks", "truncated", True),
    ("Unsupported URL: https://example.com/", "unsupported-url", False),
    ("[x] 1: Unable to extract title; please report this issue", "extractor", True),
]


@pytest.mark.parametrize(("message", "error_class", "transient"), REAL_MESSAGES)
def test_real_messages_have_a_class(tmp_path, message, error_class, transient):
    error = site_failure(ExtractorError(message, expected=True), tmp_path / "w")
    assert (error.error_class, error.transient) == (error_class, transient)
    assert message.split(": ")[-1][:60] in error.message, "the raw message is kept"


def test_exceptions_have_a_class(tmp_path):
    assert site_failure(GeoRestrictedError("no", countries=["DE"]), tmp_path / "w").error_class == "geo-blocked"
    assert site_failure(UserNotLive(video_id="x"), tmp_path / "w").error_class == "live-stream"
    assert site_failure(OSError(28, "No space left on device"), tmp_path / "w").error_class == "disk-full"
    assert classify(yt_dlp.utils.DownloadError("ERROR: something new")).error_class == "extractor"


@pytest.mark.parametrize(
    ("status", "error_class"),
    [
        (403, "forbidden"),
        (404, "not-found"),
        (410, "removed"),
        (429, "rate-limited"),
        (451, "geo-blocked"),
        (502, "server-error"),
    ],
)
def test_http_statuses_inside_an_extraction(server, tmp_path, status, error_class):
    url = server.add("/v.mp4", b"no", status=status)
    assert site_failure({"url": url, "ext": "mp4"}, tmp_path / "w").error_class == error_class


def test_a_lockout_during_extraction_pauses_the_host(tmp_path, monkeypatch):
    """The item is tried again after the cool-down instead of failing."""
    answers = [ExtractorError("Sign in to confirm you're not a bot", expected=True)] * 2
    calls = []

    def extract(url, work, settings, guard, **options):
        calls.append(url)
        if answers:
            raise classify(answers.pop())
        path = work / "media.mp4"
        make_video(path, duration_s=0.3)
        return site_fetch.SiteVideo(path, "Youtube", {"title": "T"})

    monkeypatch.setattr(site_fetch, "download_site", extract)
    settings = SETTINGS.model_copy(update={"cooldown_s": 0.05})
    source = {"video_id": "dQw4w9WgXcQ", "url": "https://www.youtube.com/watch?v=dQw4w9WgXcQ", "kind": "url"}
    row = fetch(source, tmp_path / "sources", settings)
    assert len(calls) == 3 and (row["title"], row["extractor"]) == ("T", "Youtube")


def test_known_sites_are_distinguished_from_direct_links():
    assert site_extractor("https://www.youtube.com/watch?v=dQw4w9WgXcQ") == "Youtube"
    assert site_extractor("https://vimeo.com/76979871") == "Vimeo"
    assert site_extractor("https://cdn.example.com/a/b.mp4?token=1") is None


# --- subtitles, options, addresses


def test_one_track_per_language_in_the_order_of_the_settings():
    def tracks(*codes: str) -> dict:
        return {code: [{"ext": "srt"}, {"ext": "vtt"}] for code in codes}

    def chosen(manual, auto, **options) -> dict:
        settings = SETTINGS.model_copy(update=options)
        return {code: (kind, entry["ext"]) for code, (kind, entry) in choose_subtitles(manual, auto, settings).items()}

    assert chosen(tracks("en-US", "en"), tracks("en")) == {"en": ("manual", "vtt")}
    assert chosen({}, tracks("en", "en-orig")) == {"en": ("auto", "vtt")}
    assert chosen({}, tracks("en-de", "en-orig")) == {"en-orig": ("auto", "vtt")}
    assert chosen(tracks("en"), tracks("en"), subtitle_kinds=["auto", "manual"]) == {"en": ("auto", "vtt")}
    assert chosen(tracks("en"), {}, subtitle_formats=["json3"]) == {}
    assert chosen(tracks("fr"), tracks("eng")) == {}
    assert chosen(tracks("en-/../../x", "en-\0"), {}) == {}, "codes become file names"
    assert chosen(tracks("en"), {}, subtitle_languages=[]) == {}


def test_harmless_options_of_yt_dlp_can_be_set():
    settings = SETTINGS.model_copy(
        update={
            "ytdlp_options": {
                "sleep-requests": 1.5,
                "geo_bypass": False,
                "--no-part": True,
                "extractor-args": ["youtube:player-client=web,tv;lang=en", "generic:is_live=false"],
            }
        }
    )
    arguments = {"youtube": {"player_client": ["web", "tv"], "lang": ["en"]}, "generic": {"is_live": ["false"]}}
    assert user_options(settings) == {"sleep_interval_requests": 1.5, "nopart": True, "extractor_args": arguments}


def test_every_option_of_yt_dlp_is_allowed_by_name_or_refused():
    """Refuse what a later yt-dlp adds; no allowed option takes a command, a path or an address."""
    from yt_dlp.options import create_parser

    known = {name[2:] for group in create_parser().option_groups for each in group.option_list
             for name in each._long_opts}  # fmt: skip
    assert ALLOWED < known
    words = (
        r"exec|netrc|ffmpeg|downloader|proxy|path|^output|(?<!no-cache)-dir|location|plugin|config|runtime|component"
    )
    words += r"|preset|alias|postprocessor|ppa|archive|sponsorblock|thumbnail|write|print|certificate$"
    assert [name for name in sorted(ALLOWED) if re.search(words, name)] == []


@pytest.mark.parametrize(
    "options",
    [
        {"exec": "touch RAN"},
        {"--exec": "touch RAN"},
        {"exec_before_download": "touch RAN"},
        {"exe": "touch RAN"},  # optparse takes abbreviations
        {"exec=touch RAN": True},
        {"netrc-cmd": "touch RAN"},
        {"netrc_cmd": "touch RAN"},
        {"ffmpeg-location": "/tmp/x"},
        {"ffmpeg_location": "/tmp/x"},
        {"js-runtimes": "deno:/tmp/x"},
        {"remote-components": "ejs:github"},
        {"geo-verification-proxy": "http://127.0.0.1:1"},
        {"external_downloader": {"default": "aria2c"}},
        {"downloader": "aria2c"},
        {"downloader-args": "ffmpeg:-i x"},
        {"postprocessor-args": "ffmpeg:-i x"},
        {"postprocessors": [{"key": "Exec", "exec_cmd": "touch RAN"}]},
        {"use-postprocessor": "Exec:exec_cmd=touch"},
        {"plugin-dirs": "/tmp/x"},
        {"cookiesfrombrowser": ["firefox"]},
        {"cookies-from-browser": "firefox"},
        {"cookiefile": "/etc/passwd"},
        {"config-locations": "/tmp/x"},
        {"load-info-json": "/etc/passwd"},
        {"batch-file": "/etc/passwd"},
        {"client-certificate": "/etc/passwd"},
        {"cache-dir": "/tmp/x"},
        {"print-to-file": ["title", "/tmp/x"]},
        {"write-info-json": True},
        {"bidi-workaround": True},
        {"alias": "x -j"},
        {"preset-alias": "mp3"},
        {"enable-file-urls": True},
        {"sponsorblock-api": "http://127.0.0.1"},
        {"compat-options": "allow-unsafe-ext"},
        {"output": "/etc/x"},
        {"proxy": "http://x"},
        {"no-such-option": 1},
        {"": "x"},
    ],
)
def test_options_that_run_programs_open_files_or_choose_addresses_are_refused(options, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (name,) = options
    for allow_private in (True, False):
        settings = SETTINGS.model_copy(
            update={"ytdlp_options": {"sleep-requests": 1, **options}, "allow_private_addresses": allow_private}
        )
        with pytest.raises(UserError, match=f"download.ytdlp_options: .*{re.escape(name)}"):
            user_options(settings)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    "value",
    ["youtube:innertube_host=evil.example", "youtube:lang=en;Innertube-Host=evil.example", "tiktok:api_hostname=evil"]
    + ["generic:hls_key=http://evil.example", "youtubepot-bgutilscript:script_path=/tmp/x"],
)
def test_arguments_of_extractors_are_allowed_by_name_too(value):
    for given in (value, ["youtube:lang=en", value]):
        with pytest.raises(UserError, match=r"download.ytdlp_options: extractor-args \S+:\w+ cannot be set"):
            user_options(SETTINGS.model_copy(update={"ytdlp_options": {"extractor-args": given}}))


def test_private_addresses_are_refused_in_every_request_of_a_site(server, media, tmp_path):
    error = site_failure({"formats": formats(server, media, "60")}, tmp_path / "w", GUARDED)
    assert (error.error_class, error.transient) == ("private-address", False)
    subtitle = {"en": [{"url": server.add("/en.vtt", b"WEBVTT"), "ext": "vtt"}]}
    public = [{"format_id": "a", "url": "http://no-such-host.invalid/a.mp4", "ext": "mp4"}]
    error = site_failure({"formats": public, "subtitles": subtitle}, tmp_path / "w", GUARDED)
    assert error.error_class == "private-address"
    assert server.requests == []


@pytest.mark.parametrize("protocol", ["rtmp", "rtsp", "m3u8", "mms", "websocket_frag"])
def test_nothing_that_opens_addresses_by_itself_is_started(tmp_path, protocol, server):
    scheme = "http" if protocol == "m3u8" else protocol
    answer = {
        "formats": [
            {"format_id": "a", "url": f"{scheme}://127.0.0.1:{server.port}/x", "ext": "mp4", "protocol": protocol}
        ]
    }
    error = site_failure(answer, tmp_path / "w", GUARDED)
    assert error.error_class in ("unsupported-url", "private-address")
    assert server.requests == []


def test_the_users_cookie_file_is_only_read(server, media, tmp_path):
    jar = tmp_path / "cookies.txt"
    text = "# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tsession\tsecret\n"
    jar.write_text(text)
    jar.chmod(0o444)
    settings = SETTINGS.model_copy(update={"cookies_file": str(jar)})
    site({"formats": formats(server, media, "60")}, tmp_path / "w", settings)
    assert server.requests_for("/60.mp4")[0]["Cookie"] == "session=secret"
    assert jar.read_text() == text
    missing = SETTINGS.model_copy(update={"cookies_file": str(tmp_path / "none")})
    with pytest.raises(UserError, match="download.cookies_file"), EgressGuard(True, 10) as guard:
        download_site("https://fake.example/x1", tmp_path / "w", missing, guard)
