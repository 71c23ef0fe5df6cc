"""Files that make FFmpeg open other files or addresses are refused by every reader of sources, under any name.

Defence: `clipmill.media.probe` allows only demuxers that follow no references, files as the only protocol, and no data
references. The controls show that FFmpeg by itself does follow them.
"""

import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import pytest

from clipmill.base.errors import ItemError
from clipmill.media.probe import CONTAINERS, open_media, probe
from pipeline.maintenance.verify import count_frames
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_video
from pipeline.stages.segment.shots import detect_shots
from pipeline.stages.transcribe.speech import extract_speech
from tests.helpers.http import make_video, media_server
from training.data.clip_frames import Picture, decode_clip


@pytest.fixture(scope="module")
def server():
    with media_server() as server:
        yield server


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> Path:
    """Make a video outside of every source: a reader that opens it was tricked."""
    path = tmp_path_factory.mktemp("elsewhere") / "secret.mp4"
    make_video(path, duration_s=0.4)
    return path


def cut(path: Path) -> None:
    cut_video(path, [SpanRequest("v.0", 0, 0.0, 0.2)], CutSettings(), path.with_suffix(".out"))


READERS: dict[str, Callable[[Path], object]] = {
    "probe": probe,
    "cut": cut,
    "shots": detect_shots,
    "speech": extract_speech,
    "verify": lambda path: count_frames(path.read_bytes()),
    "training": lambda path: decode_clip(path.read_bytes(), lambda count: range(count), Picture(16)),
}


def playlists(target: str) -> dict[str, bytes]:
    hls = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n{}\n#EXT-X-ENDLIST\n"
    representation = f'<Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL></Representation>'
    mpd = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" mediaPresentationDuration="PT1S">'
        f'<Period><AdaptationSet mimeType="video/mp4">{representation}</AdaptationSet></Period></MPD>'
    )
    smooth = f'<SmoothStreamingMedia MajorVersion="2"><StreamIndex Url="{target}"/></SmoothStreamingMedia>'
    session = f"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=control:{target}\n"
    return {
        "hls": hls.format(target).encode(),
        "hls of a key": hls.format(f'{target}\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"').encode(),
        "hls of subfile": hls.format(f"subfile,,start,0,end,99,,:{target}").encode(),
        "hls of concat": hls.format(f"concat:{target}|{target}").encode(),
        "hls of crypto": hls.format(f"crypto+{target}").encode(),
        "hls of data": hls.format("data:video/mp4;base64,AAAA").encode(),
        "master of masters": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{target}\n".encode(),
        "concat script": f"ffconcat version 1.0\nfile '{target}'\n".encode(),
        "dash": mpd.encode(),
        "smooth streaming": smooth.encode(),
        "session description": session.encode(),
        "avisynth": f'Import("{target}")\n'.encode(),
        "asx": f'<asx version="3"><entry><ref href="{target}"/></entry></asx>'.encode(),
        "quicktime link": b"RTSPtext\n" + target.encode(),
        "filter graph": f"movie={target}".encode(),
    }


@pytest.mark.parametrize("extension", ["mp4", "m3u8", "mkv"])
def test_playlists_and_scripts_open_nothing(tmp_path, server, secret, extension):
    link = server.add("/segment.ts", secret.read_bytes())
    for target in (link, secret.as_uri(), str(secret)):
        for name, content in playlists(target).items():
            path = tmp_path / f"playlist.{extension}"
            path.write_bytes(content)
            for reader, read in READERS.items():
                with pytest.raises(ItemError) as caught:
                    read(path)
                assert caught.value.error_class in ("not-a-video", "undecodable", "no-video-stream"), (name, reader)
    assert server.requests == []


def test_a_name_that_is_a_pattern_or_an_address_is_a_name(tmp_path, secret, server):
    """image2 would expand %d and globs, and FFmpeg would take the text before a colon for a protocol."""
    server.add("/x.mp4", secret.read_bytes())
    names = [
        "frame%03d.mp4",
        "a*.mp4",
        "concat:a|b.mp4",
        "http:x.mp4",
        "-y.mp4",
        "line\nbreak.mp4",
        "quote'\".mp4",
        "$(id).mp4",
    ]
    for name in names:
        path = tmp_path / name
        path.write_bytes(secret.read_bytes())
        assert probe(path).width == 160
        cut(path)
        with pytest.raises(ItemError, match="no-audio"):
            extract_speech(path)
    assert server.requests == []


def with_reference(video: bytes, target: Path) -> bytes:
    """Return an MP4 whose samples are in another file, through an alias in "dref" (QuickTime file format)."""
    at = video.index(b"url \0\0\0\1") - 4
    length = struct.unpack_from(">I", video, at)[0]
    absolute = str(target).encode()
    fields = struct.pack(">hh", 2, len(absolute)) + absolute + b"\0" * (len(absolute) % 2) + struct.pack(">hh", -1, 0)
    alias = bytes(10) + b"\1x" + bytes(26) + bytes(12) + b"\1x" + bytes(62) + bytes(16) + bytes(4) + bytes(20)
    body = alias[:150] + fields
    entry = struct.pack(">I4sI", 12 + len(body), b"alis", 0) + body
    grown = len(entry) - length
    patched = video[:at] + entry + video[at + length :]
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = patched.index(kind) - 4
        size = struct.unpack_from(">I", patched, place)[0] + grown
        patched = patched[:place] + struct.pack(">I", size) + patched[place + 4 :]
    return patched


def opened_files(path: Path, options: str) -> str:
    """Return FFmpeg's debug log, which names the files it opens."""
    binary = imageio_ffmpeg.get_ffmpeg_exe()
    command = [binary, "-v", "debug", *options.split(), "-i", f"file:{path}", "-f", "null", "-"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL).stderr


def test_an_external_reference_inside_of_a_movie_is_not_followed(tmp_path, secret):
    """Control: FFmpeg opens the other file if asked to follow references, and neither by default nor when we run it."""
    hostile = tmp_path / "movie.mov"
    hostile.write_bytes(with_reference(secret.read_bytes(), secret))
    followed = opened_files(hostile, "-enable_drefs 1 -use_absolute_path 1")
    assert f"Opening '{secret}' for reading" in followed and "Skipped opening external track" not in followed
    with open_media(hostile) as container:
        assert container.format.name.startswith("mov")
    for reader in ("probe", "cut", "shots", "verify"):
        try:
            READERS[reader](hostile)
        except ItemError as error:
            assert error.error_class in ("not-a-video", "undecodable", "no-video-stream")
    shut_in = opened_files(hostile, "-protocol_whitelist file")
    assert f"Opening '{secret}'" not in shut_in and "Skipped opening external track" in shut_in


def test_ffmpeg_by_itself_would_follow_a_script(tmp_path, secret):
    """Control of this file: the attacks refused above work on FFmpeg itself."""
    (tmp_path / "neighbour.mp4").write_bytes(secret.read_bytes())
    path = tmp_path / "control.mp4"
    path.write_text("ffconcat version 1.0\nfile neighbour.mp4\n")
    assert "neighbour.mp4" in opened_files(path, "")
    assert "neighbour.mp4" not in opened_files(path, f"-format_whitelist {CONTAINERS}")
    with pytest.raises(ItemError, match="not-a-video"):
        probe(path)


def test_network_readers_are_never_tried(tmp_path):
    """A session description makes FFmpeg listen on UDP; our readers do not."""
    path = tmp_path / "stream.sdp"
    session = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    path.write_text(f"{session}m=video 45678 RTP/AVP 96\na=rtpmap:96 H264/90000\n")
    with pytest.raises(ItemError, match="not-a-video"):
        probe(path)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 45678))
