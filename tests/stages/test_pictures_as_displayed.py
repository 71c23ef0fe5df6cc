"""Clips show the pictures that a player shows: the right track, upright, unmirrored, in the shape of their own part."""

import io
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from clipmill.media.probe import FrameOrientations, Orientation, orientation_of, probe
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_video
from pipeline.stages.transcribe.speech import extract_speech
from tests.helpers.media import SHORT_GOP, Shape, decoded, ffmpeg, make_video, numbers_in, piece
from training.data.clip_frames import Picture, decode_clip

ULTRAFAST = {"preset": "ultrafast", "crf": "20", "g": "20"}
VP8 = {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8", "b": "800k", "g": "20"}}


def numbered(folder: Path, name: str, numbers: range, **settings) -> Path:
    shape = Shape(name, num_frames=len(numbers), fps=10, **{"options": ULTRAFAST, **settings})
    return make_video(folder, shape, first_number=numbers[0])


def cut(path: Path, folder: Path, *spans: tuple[float, float], **settings) -> list[tuple[dict, bytes]]:
    """Return the row and the file of each span's clip."""
    requests = [SpanRequest(f"v.{n}", n, *span) for n, span in enumerate(spans)]
    result = cut_video(path, requests, CutSettings(**{"fps": "source", **settings}), folder / "out")
    assert not result.failures
    return [(row, piece(folder / "out", row["mp4_offset"], row["num_bytes"])) for row in result.rows]


# --- the display matrix -----------------------------------------------------------------------------------------------

# The corners clockwise from the top left, stored as red, green, white, blue, for each a, b, c, d of the matrix.
MATRICES = {
    (1, 0, 0, 1): "RGWB",
    (0, 1, -1, 0): "BRGW",
    (-1, 0, 0, -1): "WBRG",
    (0, -1, 1, 0): "GWBR",
    (-1, 0, 0, 1): "GRBW",
    (1, 0, 0, -1): "BWGR",
    (0, 1, 1, 0): "RBWG",
    (0, -1, -1, 0): "WGRB",
}
COLOURS = {"R": (230, 20, 20), "G": (20, 200, 20), "W": (240, 240, 240), "B": (20, 20, 230)}


def corners_video(path: Path, matrix: tuple[int, ...], codec: str = "libx264", scale: tuple[float, float] = (1, 1)):
    """Write 1 s of a picture with four coloured corners, whose MP4 or MOV track has a display matrix."""
    picture = np.full((120, 200, 3), 128, np.uint8)
    for colour, rows, columns in zip(
        "RGWB",
        (slice(0, 40), slice(0, 40), slice(80, 120), slice(80, 120)),
        (slice(0, 60), slice(140, 200), slice(140, 200), slice(0, 60)),
        strict=True,
    ):
        picture[rows, columns] = COLOURS[colour]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 200, 120, "yuv420p"
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    a, b, c, d = matrix
    values = [round(65536 * v) for v in (a * scale[0], b * scale[1], 0, c * scale[0], d * scale[1], 0, 0, 0)]
    at = data.index(b"tkhd") + 4 + 40  # of version 0
    struct.pack_into(">9i", data, at, *values, 1 << 30)
    path.write_bytes(data)
    return path


def corners(rgb: np.ndarray) -> str:
    height, width = rgb.shape[0] // 6, rgb.shape[1] // 6
    parts = rgb[:height, :width], rgb[:height, -width:], rgb[-height:, -width:], rgb[-height:, :width]
    means = [part.reshape(-1, 3).mean(0) for part in parts]
    return "".join(min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - mean).sum()) for mean in means)


@pytest.mark.parametrize("matrix, expected", MATRICES.items(), ids=str)
def test_every_display_matrix_is_applied_whole(tmp_path, matrix, expected):
    path = corners_video(tmp_path / "v.mp4", matrix)
    upright = (120, 200) if matrix[0] == 0 else (200, 120)
    for fps in ("source", 3.0):
        ((row, clip),) = cut(path, tmp_path, (0.0, 1.0), fps=fps)
        assert corners(decoded(clip)[0].to_ndarray(format="rgb24")) == expected
        assert (row["width"], row["height"]) == upright
    info = probe(path)
    assert (info.width, info.height) == upright
    # The trainer reads plain tars, whose clips may have a matrix, too.
    (pixels,) = decode_clip(path.read_bytes(), lambda count: [0], Picture(size=96))
    assert corners(pixels) == expected


def test_a_matrix_may_scale_and_may_be_nonsense(tmp_path):
    ((row, _),) = cut(corners_video(tmp_path / "wide.mp4", (1, 0, 0, 1), scale=(2, 1)), tmp_path, (0.0, 1.0))
    assert row["width"] / row["height"] == pytest.approx(2 * 200 / 120, rel=0.02)
    for matrix in ((0, 0, 0, 0), (0.7, 0.7, -0.7, 0.7)):
        ((row, clip),) = cut(corners_video(tmp_path / "odd.mp4", matrix), tmp_path, (0.0, 1.0))
        assert corners(decoded(clip)[0].to_ndarray(format="rgb24")) == "RGWB"


def test_reading_a_matrix_keeps_no_frame_in_memory(tmp_path):
    """PyAV's side data refer to their frame, and the frame to them."""
    path, orientations = corners_video(tmp_path / "v.mp4", (-1, 0, 0, 1)), FrameOrientations()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            before = sys.getrefcount(frame)
            assert orientations.of(frame) == orientation_of(frame) == Orientation(mirrored=True)
            assert sys.getrefcount(frame) == before


# --- sizes and shapes that change -------------------------------------------------------------------------------------


def joined(folder: Path, name: str, *parts: Path) -> Path:
    (folder / name).write_bytes(b"".join(part.read_bytes() for part in parts))
    return folder / name


@pytest.mark.parametrize("suffix, settings", [("webm", VP8), ("mkv", VP8), ("ts", {})])
def test_each_clip_has_the_size_of_its_own_part(tmp_path, suffix, settings):
    """A phone is turned in a call."""
    first = numbered(tmp_path, f"a.{suffix}", range(50), size=(320, 240), **settings)
    second = numbered(tmp_path, f"b.{suffix}", range(50, 100), size=(240, 320), **settings)
    path = joined(tmp_path, f"turn.{suffix}", first, second)
    clips = cut(path, tmp_path, (1.0, 3.0), (6.0, 9.0))
    assert [(row["width"], row["height"]) for row, _ in clips] == [(320, 240), (240, 320)]
    assert [numbers_in(clip) for _, clip in clips] == [[*range(10, 30)], [*range(60, 90)]]


@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4"])
def test_each_clip_has_the_pixel_aspect_of_its_own_part(tmp_path, suffix):
    """A broadcast goes from 4:3 to 16:9; B-frames come out of the decoder later than they go in."""
    parts = [
        numbered(
            tmp_path,
            f"{first}.ts",
            range(first, first + 50),
            size=(360, 288),
            pixel_aspect=aspect,
            start_s=first / 10,
            options=SHORT_GOP,
        )
        for first, aspect in ((0, Fraction(16, 15)), (50, Fraction(64, 45)))
    ]
    path = joined(tmp_path, "shape.ts", *parts)
    if suffix != "ts":
        ffmpeg("-i", path, "-c", "copy", tmp_path / f"shape.{suffix}")
        path = tmp_path / f"shape.{suffix}"
    clips = cut(path, tmp_path, (0.5, 3.0), (4.0, 4.9), (5.0, 9.0), (6.0, 9.0))
    assert [(row["width"], row["height"]) for row, _ in clips] == [(342, 256), (342, 256), (456, 256), (456, 256)]


def test_a_clip_across_a_change_is_not_squeezed(tmp_path):
    """It keeps the shape it begins with; what follows is fitted into it, with black bars."""
    first = numbered(tmp_path, "a.webm", range(50), size=(320, 240), **VP8)
    second = numbered(tmp_path, "b.webm", range(50, 100), size=(240, 320), **VP8)
    path = joined(tmp_path, "turn.webm", first, second)
    ((row, clip),) = cut(path, tmp_path, (4.0, 6.0))
    frames = [frame.to_ndarray(format="gray") for frame in decoded(clip)]
    assert len(frames) == 20 and {frame.shape for frame in frames} == {(240, 320)}
    assert frames[5][:, :60].mean() > 40 and frames[15][:, :60].mean() < 20 and frames[15][:, 80:240].mean() > 40
    assert (row["width"], row["height"]) == (320, 240)


# --- the right track --------------------------------------------------------------------------------------------------


def two_tracks(folder: Path, name: str, first: Path, second: Path, *options: str) -> Path:
    ffmpeg("-i", first, "-i", second, "-map", "0:v", "-map", "1:v", "-c", "copy", *options, folder / name)
    return folder / name


OFF_ON = ("-disposition:v:0", "0", "-disposition:v:1", "default")
ON_OFF = ("-disposition:v:0", "default", "-disposition:v:1", "0")
BOTH = ("-disposition:v:0", "default", "-disposition:v:1", "default")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("case", ["still first", "still is default", "disabled first", "short first", "same length"])
def test_the_track_that_players_show_is_taken(tmp_path, suffix, case):
    video = numbered(tmp_path, "video.mp4", range(50))
    still, short, other = (
        numbered(tmp_path, f"{name}.mp4", range(100, 100 + count))
        for name, count in (("still", 1), ("short", 10), ("other", 50))
    )
    first, second, options = {
        "still first": (still, video, BOTH),
        "still is default": (still, video, ON_OFF),
        "disabled first": (other, video, OFF_ON),
        "short first": (short, video, BOTH),
        "same length": (video, other, BOTH),
    }[case]
    if suffix == "ts" and case == "disabled first":
        pytest.skip("a transport stream disables no track")
    path = two_tracks(tmp_path, f"two.{suffix}", first, second, *options)
    assert [numbers_in(clip) for _, clip in cut(path, tmp_path, (2.0, 4.0))] == [[*range(20, 40)]]
    assert probe(path).duration_s == pytest.approx(5.0, abs=0.15)


def test_a_cover_picture_is_no_track(tmp_path):
    video, cover = numbered(tmp_path, "video.mp4", range(50)), tmp_path / "cover.jpg"
    ffmpeg("-i", video, "-frames:v", "1", cover)
    path = two_tracks(tmp_path, "v.mp4", cover, video, "-disposition:v:0", "attached_pic")
    assert [numbers_in(clip) for _, clip in cut(path, tmp_path, (2.0, 4.0))] == [[*range(20, 40)]]


def test_the_default_sound_is_taken(tmp_path):
    """A commentary comes first and is off; the sound that is on is silent in this test."""
    video, path = numbered(tmp_path, "video.mp4", range(30)), tmp_path / "v.mkv"
    tones = [part for volume in (8, 0) for part in ("-f", "lavfi", "-i", f"sine=440:duration=3,volume={volume}")]
    maps = ("-map", "0:v", "-map", "1:a", "-map", "2:a", "-c:v", "copy", "-c:a", "aac")
    ffmpeg("-i", video, *tones, *maps, "-disposition:a:0", "0", "-disposition:a:1", "default", path)
    ((_, clip),) = cut(path, tmp_path, (0.0, 3.0), audio=True)
    with av.open(io.BytesIO(clip)) as container:
        assert max(np.abs(frame.to_ndarray()).max() for frame in container.decode(audio=0)) < 0.01


def test_the_sound_of_several_beside_several_videos_is_heard(tmp_path):
    first, second = numbered(tmp_path, "a.mp4", range(30)), numbered(tmp_path, "b.mp4", range(30))
    tone = ("-f", "lavfi", "-i", "sine=440:duration=3")
    maps = [part for source in ("0:v", "2:a", "1:v", "3:a") for part in ("-map", source)]
    path = tmp_path / "four.mp4"
    ffmpeg("-i", first, "-i", second, *tone, *tone, *maps, "-c:v", "copy", "-c:a", "aac", path)
    assert len(extract_speech(path)) == pytest.approx(3 * 16_000, rel=0.05)


# --- packets that are called corrupt ----------------------------------------------------------------------------------


def test_a_packet_called_corrupt_that_decodes_is_kept(tmp_path):
    """Keep the packet that FFmpeg flags where segments are joined: continuity counters jump there."""
    parts = [numbered(tmp_path, f"{first}.ts", range(first, first + 50), start_s=first / 10) for first in (0, 50)]
    path = joined(tmp_path, "cc.ts", *parts)
    with av.open(str(path)) as container:
        assert any(packet.is_corrupt for packet in container.demux(video=0))
    assert [numbers_in(clip) for _, clip in cut(path, tmp_path, (4.5, 5.5))] == [[*range(45, 55)]]


def test_a_packet_that_is_corrupt_costs_only_its_own_pictures(tmp_path):
    path = numbered(tmp_path, "v.ts", range(100))
    data = bytearray(path.read_bytes())
    packets = [at for at in range(0, len(data), 188) if data[at + 1] & 0x1F == 1 and data[at + 2] == 0]
    for at in packets[len(packets) // 2 : len(packets) // 2 + 4]:
        data[at + 4 : at + 188] = bytes(184)
    path.write_bytes(data)
    requests = [SpanRequest(f"v.{n}", n, float(n), n + 1.0) for n in range(10)]
    result = cut_video(path, requests, CutSettings(fps="source"), tmp_path / "out")
    assert len(result.rows) + len(result.failures) == 10 and len(result.rows) >= 7
    first = result.rows[0]
    assert numbers_in(piece(tmp_path / "out", first["mp4_offset"], first["num_bytes"])) == [*range(10)]
