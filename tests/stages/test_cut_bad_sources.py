"""Damaged, hostile and odd sources fail with their class when cut, without losing other clips."""

import struct
from pathlib import Path

import pytest

from clipmill.base.errors import ItemError
from clipmill.media.probe import probe
from clipmill.media.sandbox import Sandbox
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_in_sandbox, cut_video
from tests.helpers.media import LONG_GOP, SHORT_GOP, Shape, make_video, numbers_in, piece

FASTSTART = {"movflags": "+faststart"}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


def request(start_s: float, end_s: float, n: int = 0) -> SpanRequest:
    return SpanRequest(f"v.{n}", n, start_s, end_s)


def cut(path: Path, tmp_path: Path, *spans: SpanRequest, **settings):
    return cut_video(path, list(spans), CutSettings(**settings), tmp_path / "out")


def numbers(result, tmp_path: Path) -> list[list[int]]:
    return [numbers_in(piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"])) for row in result.rows]


def error_class_of(path: Path, tmp_path: Path, **settings) -> str:
    with pytest.raises(ItemError) as caught:
        cut(path, tmp_path, request(0.0, 1.0), **settings)
    return caught.value.error_class


@pytest.mark.parametrize(
    "content, error_class",
    [
        (b"", "empty-file"),
        (b"<html><body>404 not found</body></html>" * 50, "not-a-video"),
        (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n", "not-a-video"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not-a-video"),
        (bytes(range(256)) * 40, "not-a-video"),
    ],
)
def test_a_file_that_is_not_a_video_fails_as_such(tmp_path, content, error_class):
    (tmp_path / "it.mp4").write_bytes(content)
    assert error_class_of(tmp_path / "it.mp4", tmp_path) == error_class


def test_a_missing_file_is_a_missing_source(tmp_path):
    assert error_class_of(tmp_path / "gone.mp4", tmp_path) == "source-missing"


def test_audio_only_and_cover_art_are_no_video(tmp_path):
    import ffmpeg
    import imageio_ffmpeg

    binary = imageio_ffmpeg.get_ffmpeg_exe()
    tone = ffmpeg.input("sine=frequency=440:duration=2", format="lavfi")
    cover = ffmpeg.input("color=red:size=64x64:duration=0.04", format="lavfi")
    tone.output(str(tmp_path / "tone.m4a")).run(binary, quiet=True)
    options = {"c:v": "mjpeg", "disposition:v:0": "attached_pic", "frames:v": 1}
    ffmpeg.output(tone, cover, str(tmp_path / "cover.m4a"), **options).run(binary, quiet=True)
    assert error_class_of(tmp_path / "tone.m4a", tmp_path) == "no-video-stream"
    assert error_class_of(tmp_path / "cover.m4a", tmp_path) == "no-video-stream"


def test_one_frame_is_a_clip_of_one_frame(tmp_path):
    path = make_video(tmp_path, Shape("one.mp4", num_frames=1))
    result = cut(path, tmp_path, request(0.0, 5.0), request(1.0, 5.0, 1))
    assert numbers(result, tmp_path) == [[0]]
    assert [error.error_class for _, error in result.failures] == ["span-past-end"]
    (row,) = result.rows
    assert (row["num_frames"], row["motion"], row["shot_score"]) == (1, 0.0, 0.0) and len(row["phash"]) == 3


@pytest.mark.parametrize("size, expected", [((1, 1), (2, 2)), ((3, 201), (2, 200)), ((2, 2), (2, 2))])
def test_tiny_pictures_become_even_and_are_never_enlarged(tmp_path, size, expected):
    options = {"preset": "ultrafast", "crf": "20"}
    path = make_video(tmp_path, Shape("tiny.mp4", num_frames=10, size=size, pix_fmt="yuv444p", options=options))
    (row,) = cut(path, tmp_path, request(0.0, 0.3), short_side=256, fps=10).rows
    assert (row["width"], row["height"], row["num_frames"]) == (*expected, 3)


@pytest.mark.parametrize("claimed_s", [0.5, 100_000.0])
def test_a_header_that_lies_about_its_duration_is_not_believed(tmp_path, claimed_s):
    path = make_video(tmp_path, Shape("liar.mkv", options=SHORT_GOP))
    data = bytearray(path.read_bytes())
    struct.pack_into(">d", data, data.index(b"\x44\x89\x88") + 3, claimed_s * 1000)  # the segment's Duration
    path.write_bytes(data)
    assert probe(path).duration_s == pytest.approx(3.0, abs=0.01)
    result = cut(path, tmp_path, request(0.0, 2.0), request(2.0, 9.0, 1), request(4.0, 9.0, 2))
    assert numbers(result, tmp_path) == [[0, 10, 20, 30, 40, 50], [60, 70, 80]]
    assert [(clip_id, error.error_class) for clip_id, error in result.failures] == [("v.2", "span-past-end")]
    assert result.duration_s == pytest.approx(3.0, abs=0.01)


def test_a_truncated_file_gives_what_it_has(tmp_path):
    path = make_video(tmp_path, Shape("whole.mp4", options=SHORT_GOP, muxer=FASTSTART))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    result = cut(path, tmp_path, request(0.0, 1.0), request(0.5, 3.0, 1), request(2.9, 3.0, 2))
    first, second = numbers(result, tmp_path)
    assert first == [0, 10, 20] and second == [15, 25, 35, 45, 55, 65, 75][: len(second)] and len(second) >= 2
    assert [(clip_id, error.error_class) for clip_id, error in result.failures] == [("v.2", "span-past-end")]


def test_a_video_without_its_index_is_not_a_video(tmp_path):
    path = make_video(tmp_path, Shape("whole.mp4"))  # its index is at the end
    path.write_bytes(path.read_bytes()[:-2000])
    assert error_class_of(path, tmp_path) == "not-a-video"


def test_damage_in_the_middle_costs_only_what_it_touches(tmp_path):
    """Every clip either has exactly the frames that decode or fails; the undamaged part is not affected."""
    path = make_video(tmp_path, Shape("damaged.mp4", num_frames=120, options=SHORT_GOP, muxer=FASTSTART))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 1500] = bytes(1500)
    path.write_bytes(data)
    spans = [request(n, n + 1.0, n) for n in range(4)]
    result = cut(path, tmp_path, *spans)
    assert len(result.rows) + len(result.failures) == 4
    by_id = dict(zip([row["clip_id"] for row in result.rows], [row["num_frames"] for row in result.rows], strict=True))
    assert by_id["v.0"] == by_id["v.3"] == 3
    data_of_first = piece(tmp_path / "out", result.rows[0]["mp4_offset"], result.rows[0]["num_bytes"])
    assert numbers_in(data_of_first) == [0, 10, 20]
    assert result.counts["num_passes"] <= 3


def test_a_stream_that_joins_in_the_middle_starts_at_its_first_keyframe(tmp_path):
    """In a recording that begins between keyframes, time 0 is the first picture that can be shown."""
    path = make_video(tmp_path, Shape("whole.ts", options=SHORT_GOP))
    data = path.read_bytes()
    head, packets = data[: 188 * 3], [data[i : i + 188] for i in range(188 * 3, len(data), 188)]
    path.write_bytes(head + b"".join(packets[len(packets) // 3 :]))
    result = cut(path, tmp_path, request(0.0, 1.0), fps=10.0)
    (shown,) = numbers(result, tmp_path)
    assert shown[0] in (24, 48) and shown == [shown[0] + 3 * k for k in range(10)]


def test_limits_on_picture_size_and_frame_count(tmp_path):
    path = make_video(tmp_path, Shape("big.mp4"))
    assert error_class_of(path, tmp_path, max_pixels=320 * 180 - 1) == "too-large"
    assert error_class_of(path, tmp_path, max_frames=89) == "too-many-frames"
    assert len(cut(path, tmp_path, request(0, 1), max_pixels=320 * 184, max_frames=90).rows) == 1


def test_spans_are_judged_one_by_one(tmp_path):
    path = make_video(tmp_path, Shape("good.mp4", options=LONG_GOP))
    spans = [request(0, 1), request(3.0, 4.0, 1), request(2.0, 1.0, 2), request(2.0, 3.0, 3), request(-1.0, 1.0, 4)]
    result = cut(path, tmp_path, *spans, min_frames=2)
    assert [row["clip_id"] for row in result.rows] == ["v.0", "v.3"]
    assert {clip_id: error.error_class for clip_id, error in result.failures} == {
        "v.1": "span-past-end",
        "v.2": "bad-span",
        "v.4": "bad-span",
    }
    nothing = cut(path, tmp_path, request(9.0, 10.0))
    assert not nothing.rows and (tmp_path / "out").stat().st_size == 0 and nothing.counts["num_passes"] == 0


def test_a_clip_whose_pictures_change_size_keeps_the_first_one(tmp_path):
    small = make_video(tmp_path, Shape("small.ts", num_frames=30, options=SHORT_GOP))
    large = make_video(tmp_path, Shape("large.ts", num_frames=60, size=(640, 360), options=SHORT_GOP, start_s=1.0))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    result = cut(joined, tmp_path, request(0.0, 2.9), fps=10.0)
    assert {(row["width"], row["height"]) for row in result.rows} == {(320, 180)} and not result.failures


# ---- in the sandbox --------------------------------------------------------------------------------------------------


def test_the_sandbox_gives_the_same_answer(tmp_path, sandbox):
    path = make_video(tmp_path, Shape("good.mp4"))
    spans = [request(0.0, 1.0), request(5.0, 6.0, 1)]
    inside = cut_in_sandbox(sandbox, path, spans, CutSettings(timeout_base_s=1000), tmp_path / "inside", duration_s=3.0)
    outside = cut_video(path, spans, CutSettings(), tmp_path / "outside")
    assert inside.rows == outside.rows and (tmp_path / "inside").read_bytes() == (tmp_path / "outside").read_bytes()
    assert [(c, e.error_class) for c, e in inside.failures] == [(c, e.error_class) for c, e in outside.failures]


def test_limits_of_the_settings_hold_in_the_sandbox(tmp_path, sandbox):
    path = make_video(tmp_path, Shape("good.mp4", num_frames=240, size=(1280, 720)))
    spans = [request(0.0, 8.0)]
    slow = CutSettings(timeout_base_s=0.001, timeout_per_second=0.001)
    with pytest.raises(ItemError, match="timeout"):
        cut_in_sandbox(sandbox, path, spans, slow, tmp_path / "out")
    patient = {"timeout_base_s": 1000}
    large = CutSettings(max_output_mb=1, short_side="source", fps="source", encoding="mjpeg", **patient)
    with pytest.raises(ItemError, match="output-too-large"):
        cut_in_sandbox(sandbox, path, spans, large, tmp_path / "out")
    assert len(cut_in_sandbox(sandbox, path, spans, CutSettings(**patient), tmp_path / "out").rows) == 1


def test_pictures_too_large_for_the_memory_are_out_of_memory(tmp_path, sandbox):
    options = {"preset": "ultrafast", "x264-params": "bframes=3:ref=8"}
    path = str(make_video(tmp_path, Shape("large.mp4", num_frames=30, size=(1920, 1080), options=options)))
    arguments = (path, [request(0.0, 1.0)], CutSettings(short_side="source", fps="source"), str(tmp_path / "out"))
    with pytest.raises(ItemError) as caught:
        sandbox.call(cut_video, *arguments, timeout_s=600, memory_bytes=150 * 2**20)
    assert caught.value.error_class == "out-of-memory"
    assert len(sandbox.call(cut_video, *arguments, timeout_s=600, memory_bytes=600 * 2**20).rows) == 1
