"""Clips contain exactly the frames that the rule selects, for sources of every format."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from clipmill.media.decode import DecodeCounts, list_by_decoding, wanted_frames
from clipmill.media.packets import Limits, Untrusted, list_frames
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_video
from tests.helpers.media import (
    OPEN_GOP,
    SHORT_GOP,
    Shape,
    decoded,
    expected_numbers,
    make_video,
    numbers_in,
    piece,
    pixels_of,
)

UNEVEN = np.cumsum([0, *np.random.default_rng(3).integers(5, 120, 89)]).tolist()
FAST = {"preset": "ultrafast", "crf": "20"}

SHAPES = [
    Shape("long-gop.mp4"),
    Shape("short-gop.mp4", options=SHORT_GOP),
    Shape("open-gop.mp4", options=OPEN_GOP),
    Shape("no-b-frames.mp4", fps=25, options={**FAST, "bf": "0"}),
    Shape("every-frame-a-keyframe.mp4", options={**FAST, "g": "1"}),
    Shape("variable-rate.mp4", ticks=UNEVEN, options=SHORT_GOP),
    Shape("a-long-hole.mkv", ticks=[*range(0, 1000, 40), *range(5000, 7600, 40)], options=SHORT_GOP),
    Shape("starts-late.mp4", start_s=5.3),
    Shape("starts-late.mkv", start_s=2.0, options=OPEN_GOP),
    Shape("turned-90.mp4", rotation=90),
    Shape("turned-180.mp4", rotation=180),
    Shape("turned-270.mp4", rotation=270, options=SHORT_GOP),
    Shape("odd-size.mp4", size=(321, 181), pix_fmt="yuv444p"),
    Shape("ten-bit.mp4", pix_fmt="yuv420p10le"),
    Shape("wide-pixels.mp4", size=(240, 180), pixel_aspect=Fraction(4, 3)),
    Shape(
        "hevc.mp4",
        codec="libx265",
        options={"preset": "ultrafast", "x265-params": "log-level=none:bframes=3:keyint=24"},
    ),
    Shape("hevc-layers.mp4", codec="libx265", options={"x265-params": "log-level=none:temporal-layers=3:keyint=48"}),
    Shape("vp9.webm", codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8", "crf": "20"}),
    Shape(
        "vp8.webm",
        codec="libvpx",
        options={"deadline": "good", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"},
    ),
    Shape("av1.mkv", codec="libsvtav1", options={"preset": "12", "crf": "20"}),
    Shape("transport.ts", options=OPEN_GOP),
    Shape("mpeg4.avi", codec="mpeg4", options={"bf": "2", "qscale": "3"}),
    Shape("h264-with-b-frames.avi", fps=25, options=SHORT_GOP),
    Shape("flash.flv", options={**SHORT_GOP}),
    Shape("raw.h264", fps=25, options=SHORT_GOP),
    Shape("fields.ts", fps=25, options={**FAST, "flags": "+ildct+ilme", "x264-params": "interlaced=1"}),
]
# Sources whose packets have no presentation times: one decode to learn them, one to cut, and one that stops at the
# first frame where only that frame shows the format.
LISTED_BY_DECODING = {"raw.h264": 2, "fields.ts": 3}
RATES = [3.0, 10.0, "source"]
# Spans in thirds of the video: contiguous, overlapping, after a gap, and beyond the end.
SPANS = [(0.0, 0.31), (0.31, 0.52), (0.4, 0.6), (0.45, 0.5), (0.8, 0.9), (0.9, 1.2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("media")


def made(folder: Path, shape: Shape) -> Path:
    path = folder / shape.name
    return path if path.exists() else make_video(folder, shape)


def spans_for(shape: Shape) -> list[SpanRequest]:
    length = float(shape.end_s())
    return [SpanRequest(f"v.{n}", n, round(a * length, 3), round(b * length, 3)) for n, (a, b) in enumerate(SPANS)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_clip_shows_the_frames_of_the_rule(folder, tmp_path, shape):
    path, spans = made(folder, shape), spans_for(shape)
    times, end_s = shape.times_s(), shape.end_s()
    for rate in RATES:
        settings = CutSettings(fps=rate)
        result = cut_video(path, spans, settings, tmp_path / "out")
        assert not result.failures
        for span, row in zip(spans, result.rows, strict=True):
            data = piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"])
            wanted = expected_numbers(times, end_s, span.start_s, span.end_s, None if rate == "source" else rate)
            assert numbers_in(data) == wanted, (rate, span)
            assert row["num_frames"] == len(wanted) and row["clip_id"] == span.clip_id
            assert row["start_s"] == pytest.approx(float(times[wanted[0]]), abs=1e-4)
        assert result.counts["num_passes"] == LISTED_BY_DECODING.get(shape.name, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_wanted_frames_are_bit_identical_to_a_full_decode(folder, shape):
    path, limits = made(folder, shape), Limits()
    try:
        source = list_frames(path, limits)
        frames = _pixels(path, source, range(len(source.times)))
    except Untrusted:
        assert shape.name in LISTED_BY_DECODING
        source = list_by_decoding(path, limits, DecodeCounts())
        frames = _pixels(path, source, range(len(source.times)))
    everything = source.__class__(**{**vars(source), "may_drop": False, "may_skip": False})
    full = _pixels(path, everything, range(len(source.times)))
    assert len(full) == shape.num_frames and frames == full
    for first, step in ((0, 10), (3, 10), (5, 7), (40, 30), (1, 2), (89, 100)):
        chosen = range(first, shape.num_frames, step)
        assert _pixels(path, source, chosen) == {i: full[i] for i in chosen}


def _pixels(path, source, indices) -> dict[int, bytes]:
    found = wanted_frames(path, source, np.array(indices), Limits(), DecodeCounts())
    return {index: pixels_of(frame) for index, frame, _ in found}


def test_one_pass_and_no_more_work_than_needed(folder, tmp_path):
    """Overlapping spans share frames, unreferenced frames are skipped, and unneeded groups are not read."""
    shape = Shape("economy.mp4", num_frames=240, options=SHORT_GOP)
    path = made(folder, shape)
    overlapping = [SpanRequest(f"v.{n}", n, 0.1 * n, 8.0) for n in range(5)]
    result = cut_video(path, overlapping, CutSettings(), tmp_path / "out")
    assert result.counts["num_passes"] == 1 and result.counts["num_sent"] <= 240
    assert result.counts["num_frames"] < 200  # of 240: the others were skipped
    short = cut_video(path, [SpanRequest("v.0", 0, 4.9, 5.5)], CutSettings(), tmp_path / "out")
    assert short.counts["num_passes"] == 1 and short.counts["num_sent"] <= 48  # two groups of 24
    everything = cut_video(path, [SpanRequest("v.0", 0, 0.0, 8.0)], CutSettings(fps="source"), tmp_path / "out")
    assert everything.counts["num_frames"] == everything.counts["num_sent"] == 240


def test_the_still_is_the_middle_frame_of_the_clip(folder, tmp_path):
    import cv2

    from bench.frame_code import read_number

    path = made(folder, Shape("long-gop.mp4"))
    for count in (1, 3):
        settings = CutSettings(caption_frames=count, fps=10.0)
        (row,) = cut_video(path, [SpanRequest("v.0", 0, 0.5, 2.4)], settings, tmp_path / "out").rows
        data = piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"])
        numbers = numbers_in(data)
        stills = []
        for frame in row["frames"]:
            jpeg = np.frombuffer(piece(tmp_path / "out", frame["offset"], frame["num_bytes"]), np.uint8)
            stills.append(read_number(cv2.imdecode(jpeg, cv2.IMREAD_GRAYSCALE)))
            assert frame["time_s"] == pytest.approx(stills[-1] / 30)
        assert stills[0] == numbers[len(numbers) // 2] and len(stills) == count
        assert row["frame_time_s"] == row["frames"][0]["time_s"] and set(stills) <= set(numbers)


def test_frame_times_of_the_source_rate_are_kept(folder, tmp_path):
    """A clip at the source's rate plays each frame as long as the source does."""
    shape = Shape("variable-rate.mp4", ticks=UNEVEN, options=SHORT_GOP)
    path, times = made(folder, shape), shape.times_s()
    (row,) = cut_video(path, [SpanRequest("v.0", 0, 1.0, 3.0)], CutSettings(fps="source"), tmp_path / "out").rows
    frames = decoded(piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"]))
    shown = expected_numbers(times, shape.end_s(), 1.0, 3.0, None)
    offsets = [float(frame.pts * frame.time_base) for frame in frames]
    assert offsets == pytest.approx([float(times[i] - times[shown[0]]) for i in shown], abs=1e-4)
    assert row["duration_s"] == pytest.approx(float(times[shown[-1] + 1] - times[shown[0]]))
    assert float(frames[-1].duration * frames[-1].time_base) == pytest.approx(
        float(times[shown[-1] + 1] - times[shown[-1]]), abs=1e-4
    )
    assert row["num_frames"] / row["fps"] == pytest.approx(row["duration_s"])


def test_an_edit_list_moves_the_start(folder, tmp_path):
    """A stream copy that starts between keyframes: players show the edit's first frame at 0, and so do we."""
    import ffmpeg
    import imageio_ffmpeg

    path = made(folder, Shape("long-gop.mp4"))
    copy = folder / "edited.mp4"
    stream = ffmpeg.input(str(path), ss=1.0).output(str(copy), c="copy").overwrite_output()
    stream.run(imageio_ffmpeg.get_ffmpeg_exe(), quiet=True)
    (row,) = cut_video(copy, [SpanRequest("v.0", 0, 0.5, 1.5)], CutSettings(fps=10.0), tmp_path / "out").rows
    numbers = numbers_in(piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"]))
    assert numbers == [45 + 3 * k for k in range(10)]


def test_hidden_reference_frames_of_vp8_are_no_frames(folder, tmp_path):
    """Two-pass VP8 stores pictures that are never shown as separate packets, here with times of their own."""
    import av
    import ffmpeg
    import imageio_ffmpeg

    original, coded, path = made(folder, Shape("long-gop.mp4")), folder / "two-pass.webm", folder / "hidden.mkv"
    options = {
        "c:v": "libvpx",
        "b:v": "600k",
        "auto-alt-ref": 1,
        "lag-in-frames": 25,
        "passlogfile": str(folder / "log"),
    }
    for turn in (1, 2):
        output = ffmpeg.input(str(original)).output(str(coded), **options, **{"pass": turn}).overwrite_output()
        output.run(imageio_ffmpeg.get_ffmpeg_exe(), quiet=True)
    num_hidden = 0
    with av.open(str(coded)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                hidden = not memoryview(packet)[0] & 0x10
                num_hidden += hidden
                packet.pts = packet.dts = packet.pts - 12 * hidden
                packet.stream = stream
                target.mux(packet)
    assert num_hidden > 3 and len(list_frames(path, Limits()).times) == 90
    spans = [SpanRequest("v.0", 0, 0.0, 1.5), SpanRequest("v.1", 1, 1.5, 3.0)]
    result = cut_video(path, spans, CutSettings(fps=10.0), tmp_path / "out")
    shown = [numbers_in(piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"])) for row in result.rows]
    assert shown == [list(range(0, 45, 3)), list(range(45, 90, 3))] and result.counts["num_passes"] == 1


@pytest.mark.parametrize(
    "name, may_drop, may_skip",
    [
        ("long-gop.mp4", True, True),
        ("hevc.mp4", True, True),
        ("hevc-layers.mp4", True, False),  # unreferenced in one layer may be referenced by the next
        ("av1.mkv", True, False),  # the decoder takes no level per packet
        ("transport.ts", False, True),  # keyframe flags are guessed
        ("h264-with-b-frames.avi", False, False),  # no presentation times
    ],
)
def test_work_is_saved_only_where_that_is_safe(folder, name, may_drop, may_skip):
    (shape,) = (shape for shape in SHAPES if shape.name == name)
    source = list_frames(made(folder, shape), Limits())
    assert (source.may_drop, source.may_skip) == (may_drop, may_skip)
