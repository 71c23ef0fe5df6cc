"""Times are those that a player shows, whatever a file's timestamps and headers say."""

import struct
from pathlib import Path

import numpy as np
import pytest

from clipmill.media.clock import Untrusted, part_shifts, part_starts
from clipmill.media.matroska import joined_pieces
from clipmill.media.probe import probe
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_video
from pipeline.stages.segment.segment import SegmentSettings, segment_video
from pipeline.stages.segment.shots import detect_shots
from pipeline.stages.transcribe.speech import SPEECH_RATE, extract_speech
from pipeline.stages.transcribe.words import Word
from tests.helpers.media import OPEN_GOP, SHORT_GOP, Shape, ffmpeg, make_video, numbers_in, piece

FPS = 10
ULTRAFAST = {"preset": "ultrafast", "crf": "20", "g": "20"}
VP8 = {"deadline": "realtime", "cpu-used": "8", "b": "800k", "g": "20"}


def numbered(folder: Path, name: str, numbers: range, **settings) -> Path:
    """Encode pictures with these numbers at 10 frames per second; without B-frames unless the options say so."""
    shape = Shape(name, num_frames=len(numbers), fps=FPS, **{"options": ULTRAFAST, **settings})
    return make_video(folder, shape, first_number=numbers[0])


def shown(path: Path, folder: Path, *spans: tuple[float, float], **settings) -> list[list[int]]:
    """Return the numbers of the pictures of each span's clip."""
    requests = [SpanRequest(f"v.{n}", n, *span) for n, span in enumerate(spans)]
    result = cut_video(path, requests, CutSettings(fps="source", **settings), folder / "out")
    assert not result.failures
    return [numbers_in(piece(folder / "out", row["mp4_offset"], row["num_bytes"])) for row in result.rows]


def joined(folder: Path, name: str, *parts: Path) -> Path:
    (folder / name).write_bytes(b"".join(part.read_bytes() for part in parts))
    return folder / name


# --- pictures that begin late -----------------------------------------------------------------------------------------


def with_tone(video: Path, path: Path, *before_video: str, sound_s: float = 12.0, at_s: float = 0.0) -> Path:
    """Add a sound, of which only the fourth second is loud."""
    tone = f"sine=440:duration={sound_s},volume='8*between(t,3,4)':eval=frame"
    sound = ("-itsoffset", at_s, "-f", "lavfi", "-i", tone)
    ffmpeg(*before_video, "-i", video, *sound, "-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "aac", path)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return numbered(tmp_path_factory.mktemp("video"), "v.mp4", range(100))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv", "mov"])
def test_pictures_that_begin_after_the_sound_are_found_where_they_are_shown(tmp_path, video, suffix):
    path = with_tone(video, tmp_path / f"late.{suffix}", "-itsoffset", "2")
    first, second = shown(path, tmp_path, (5.0, 8.0), (0.0, 3.0))
    assert first == [*range(30, 60)] and second == [*range(10)]
    assert probe(path).duration_s == pytest.approx(12.0, abs=0.05)
    (start_s, _), *_, (_, end_s) = [(0.0, 0.0), *detect_shots(path)][1:] + [detect_shots(path)[-1]]
    assert (start_s, end_s) == pytest.approx((2.0, 12.0), abs=0.05)
    samples = extract_speech(path)
    loud = [np.abs(samples[round(k * SPEECH_RATE / 2) : round((k + 1) * SPEECH_RATE / 2)]).max() for k in range(20)]
    assert {k for k, volume in enumerate(loud) if volume > 0.3} in ({6, 7}, {6, 7, 8})


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_span_before_the_first_picture_has_no_clip_and_says_so(tmp_path, video, suffix):
    path = with_tone(video, tmp_path / f"late.{suffix}", "-itsoffset", "2")
    result = cut_video(path, [SpanRequest("v.0", 0, 0.5, 1.5)], CutSettings(), tmp_path / "out")
    assert [(clip_id, error.error_class) for clip_id, error in result.failures] == [("v.0", "span-before-start")]


def test_a_clip_that_begins_before_the_pictures_has_the_sound_of_its_pictures(tmp_path, video):
    import av

    path = with_tone(video, tmp_path / "late.mkv", "-itsoffset", "2")
    for fps in ("source", 5.0):
        settings = CutSettings(fps=fps, audio=True)
        (row,) = cut_video(path, [SpanRequest("v.0", 0, 1.0, 5.0)], settings, tmp_path / "out").rows
        assert (row["start_s"], row["duration_s"]) == pytest.approx((2.0, 3.0), abs=0.01)
        (tmp_path / "clip.mp4").write_bytes(piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"]))
        with av.open(str(tmp_path / "clip.mp4")) as container:
            samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        loud = [np.abs(samples[k * 24000 : (k + 1) * 24000]).max() > 0.3 for k in range(6)]
        assert loud[2:4] == [True, True] and not any([loud[0], loud[1], loud[5]])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_sound_that_begins_later_moves_no_picture(tmp_path, video, suffix):
    path = with_tone(video, tmp_path / f"v.{suffix}", at_s=2.0, sound_s=6.0)
    assert shown(path, tmp_path, (5.0, 8.0)) == [[*range(50, 80)]]
    samples = extract_speech(path)
    assert np.abs(samples[: 4 * SPEECH_RATE]).max() < 0.3 < np.abs(samples[5 * SPEECH_RATE : 6 * SPEECH_RATE]).max()


def test_all_streams_late_play_at_once(tmp_path, video):
    """A recording whose clock begins at an hour begins to play at 0."""
    path = with_tone(video, tmp_path / "v.mkv")
    ffmpeg("-i", path, "-c", "copy", "-output_ts_offset", "3600", tmp_path / "hour.mkv")
    assert shown(tmp_path / "hour.mkv", tmp_path, (5.0, 8.0)) == [[*range(50, 80)]]


# --- clocks that restart or leap --------------------------------------------------------------------------------------

FORMATS = [
    ("ts", {"options": ULTRAFAST}),
    ("ts", {"options": SHORT_GOP}),
    ("ts", {"options": OPEN_GOP}),
    ("webm", {"codec": "libvpx", "options": VP8}),
    ("mkv", {"options": SHORT_GOP}),
]


@pytest.mark.parametrize("suffix, settings", FORMATS)
@pytest.mark.parametrize("num_parts", [2, 3])
def test_pieces_put_one_behind_another_play_on(tmp_path, suffix, settings, num_parts):
    parts = [
        numbered(tmp_path, f"{k}.{suffix}", range(50 * k, 50 * k + 50 - 10 * (k == 1)), **settings)
        for k in range(num_parts)
    ]
    path = joined(tmp_path, f"all.{suffix}", *parts)
    numbers = [*range(90), *range(100, 150)][: 50 * num_parts - 10]
    assert shown(path, tmp_path, (1.0, 3.0), (4.0, 8.0)) == [numbers[10:30], numbers[40:80]]
    assert probe(path).duration_s == pytest.approx(len(numbers) / FPS, abs=0.15)
    assert detect_shots(path)[-1][1] == pytest.approx(len(numbers) / FPS, abs=0.15)
    if num_parts == 3:
        assert shown(path, tmp_path, (9.5, 13.0)) == [numbers[95:130]]


def test_pieces_of_a_recorder_that_wrote_no_sizes_play_on(tmp_path):
    """Segments of unknown size, as browsers record them."""
    for suffix, settings in (("webm", {"codec": "libvpx", "options": VP8}), ("mkv", {"options": SHORT_GOP})):
        parts = []
        for k in range(3):
            part = numbered(tmp_path, f"v{k}.{suffix}", range(50 * k, 50 * k + 50), **settings)
            parts.append(tmp_path / f"{k}.{suffix}")
            ffmpeg("-i", part, "-c", "copy", "-live", "1", parts[-1])
        path = joined(tmp_path, f"all.{suffix}", *parts)
        assert shown(path, tmp_path, (4.0, 8.0), (11.0, 14.0)) == [[*range(40, 80)], [*range(110, 140)]]
        assert probe(path).duration_s == pytest.approx(15.0, abs=0.15)


def test_one_matroska_file_is_read_as_it_is(tmp_path):
    path = numbered(tmp_path, "v.mkv", range(20))
    assert joined_pieces(path) is None
    path.write_bytes(path.read_bytes() + b"\x1a\x45\xdf\xa3" * 100)
    assert joined_pieces(path) is None
    assert shown(path, tmp_path, (0.0, 2.0)) == [[*range(20)]]
    for size in range(4, 60):
        (tmp_path / "short.mkv").write_bytes(path.read_bytes()[:size])
        assert joined_pieces(tmp_path / "short.mkv") is None


@pytest.mark.parametrize("second_s", [1000.0, 100.0, 3.0, 95_000.0])
@pytest.mark.parametrize("options", [ULTRAFAST, SHORT_GOP], ids=["plain", "b-frames"])
def test_a_clock_that_leaps_or_falls_back_plays_on(tmp_path, second_s, options):
    """A transport stream of two parts of 5 s; the first begins at 100 s of its clock."""
    parts = [
        numbered(tmp_path, f"{first}.ts", range(first, first + 50), start_s=start_s, options=options)
        for first, start_s in ((0, 100.0), (50, second_s))
    ]
    path = joined(tmp_path, "jump.ts", *parts)
    assert shown(path, tmp_path, (0.0, 2.0), (4.0, 8.0)) == [[*range(20)], [*range(40, 80)]]
    assert probe(path).duration_s == pytest.approx(10.0, abs=0.15)


def test_the_clock_of_a_transport_stream_may_overflow(tmp_path):
    """It counts to 2^33 in steps of 1/90,000 s: 26.5 hours."""
    path = numbered(tmp_path, "v.ts", range(100), start_s=2**33 / 90_000 - 5.03 - 1.4)
    assert shown(path, tmp_path, (4.0, 8.0)) == [[*range(40, 80)]]
    assert probe(path).duration_s == pytest.approx(10.0, abs=0.15)


@pytest.mark.parametrize("number", [1, 30, 59])
def test_a_single_wrong_time_costs_no_other_picture(tmp_path, number):
    """A damaged header dates one picture of a transport stream 23 hours ahead."""
    path = numbered(tmp_path, "v.ts", range(60))
    data = bytearray(path.read_bytes())
    headers = [at for at in range(len(data)) if data[at : at + 4] == b"\x00\x00\x01\xe0"]
    assert len(headers) == 60
    data[headers[number] + 9] |= 0x0E  # the three highest of the 33 bits
    path.write_bytes(data)
    ((*before, _), after) = shown(path, tmp_path, (0.0, 2.0), (4.0, 5.5))
    assert before == [*range(19)] and after == [*range(40, 55)]


def test_still_pictures_may_last_in_a_file_whose_clock_does_not_leap(tmp_path):
    """Slides of 15 s in an MP4 and a Matroska file keep their times."""
    for suffix in ("mp4", "mkv"):
        path = numbered(tmp_path, f"slides.{suffix}", range(5), ticks=[15_000 * k for k in range(5)])
        assert probe(path).duration_s == pytest.approx(75.0, abs=15.1)
        assert shown(path, tmp_path, (30.0, 45.0)) == [[2]]


def test_sound_follows_the_pictures_over_a_restart_and_a_leap(tmp_path):
    """Two pieces; in each only the fourth second is loud."""
    for suffix, offset_s in (("ts", 0), ("ts", 1000), ("mkv", 0)):
        parts = []
        for k in range(2):
            video = numbered(tmp_path, f"v{k}.mp4", range(50 * k, 50 * k + 50))
            part = with_tone(video, tmp_path / f"{k}.{suffix}", sound_s=5.0)
            if k and offset_s:
                ffmpeg("-i", part, "-c", "copy", "-output_ts_offset", offset_s, tmp_path / f"moved.{suffix}")
                part = tmp_path / f"moved.{suffix}"
            parts.append(part)
        path = joined(tmp_path, f"all.{suffix}", *parts)
        samples = extract_speech(path)
        assert len(samples) / SPEECH_RATE == pytest.approx(10.0, abs=0.15)
        loud = [np.abs(samples[k * SPEECH_RATE + 2000 : (k + 1) * SPEECH_RATE - 2000]).max() > 0.3 for k in range(9)]
        assert [k for k, is_loud in enumerate(loud) if is_loud] == [3, 8], (suffix, offset_s)
        assert shown(path, tmp_path, (4.0, 8.0), audio=True) == [[*range(40, 80)]]


def test_parts_begin_where_the_clock_falls_back_or_leaps_and_follow_each_other():
    ticks = np.array([0, 3, 1, 2, 6, 4, 5, 0, 3, 1, 2, 1000, 1001, 1002, 1003, 1004])
    keys = np.array([k in (0, 7, 11) for k in range(len(ticks))])
    starts = part_starts(ticks, keys, leap_ticks=100, restart_ticks=0.5)
    assert starts == [0, 7, 11] and part_shifts(ticks, starts) == [0, 7, 11 - 1000]
    assert part_starts(ticks, keys, leap_ticks=10_000, restart_ticks=0.5) == [0, 7]


def test_a_clock_that_falls_back_all_the_time_is_no_clock():
    ticks = np.tile(np.arange(3), 20)
    with pytest.raises(Untrusted):
        part_starts(ticks, ticks == 0, leap_ticks=100, restart_ticks=0.5)


# --- headers that are wrong about the duration ------------------------------------------------------------------------


def with_duration(path: Path, mark: bytes, skip: int, layout: str, value: float) -> Path:
    """Write another duration into a header: the number that comes `skip` bytes after a mark."""
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, data.index(mark) + len(mark) + skip, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("factor", [0.3, 3.0, 0.0])
@pytest.mark.parametrize("suffix", ["webm", "mkv", "flv", "mp4"])
def test_the_duration_is_that_of_the_pictures(tmp_path, suffix, factor):
    settings = {"codec": "libvpx", "options": VP8} if suffix == "webm" else {}
    path = numbered(tmp_path, f"v.{suffix}", range(100), **settings)
    if suffix == "flv":
        with_duration(path, b"duration\0", 0, ">d", 10.0 * factor)
    elif suffix == "mp4":  # of the movie in 1/1000 s, the track in the same, the media in its own unit
        with_duration(path, b"mvhd", 16, ">I", int(10_000 * factor))
        with_duration(path, b"tkhd", 20, ">I", int(10_000 * factor))
    else:
        with_duration(path, b"\x44\x89\x88", 0, ">d", 10_000 * factor)
    assert probe(path).duration_s == pytest.approx(10.0, abs=0.06)


def test_words_after_the_end_that_a_header_states_have_a_clip(tmp_path):
    path = numbered(tmp_path, "v.webm", range(100), codec="libvpx", options=VP8)
    with_duration(path, b"\x44\x89\x88", 0, ">d", 3000.0)
    words = [Word("Early.", 0.5, 2.5), Word("Late.", 6.0, 9.0)]
    segmented = segment_video("v", words, probe(path).duration_s, None, None, SegmentSettings())
    assert [span["text"] for span in segmented.spans] == ["Early.", "Late."] and not segmented.dropped
    spans = [(span["start_s"], span["end_s"]) for span in segmented.spans]
    assert [len(numbers) for numbers in shown(path, tmp_path, *spans)] == [20, 30]


def test_a_stream_without_any_duration_has_that_of_its_pictures(tmp_path):
    raw = numbered(tmp_path, "v.h264", range(100))
    ffmpeg(
        "-i", numbered(tmp_path, "v.mp4", range(100)), "-c", "copy", "-f", "matroska", "-live", "1", tmp_path / "l.mkv"
    )
    assert probe(tmp_path / "l.mkv").duration_s == pytest.approx(10.0, abs=0.06)
    assert probe(raw).duration_s == pytest.approx(10.0, rel=0.7) and probe(raw).duration_s > 0


def test_a_file_that_breaks_off_lasts_as_long_as_its_pictures(tmp_path):
    path = numbered(tmp_path, "v.mkv", range(100))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 2.0 < probe(path).duration_s < 8.0


# --- spans in milliseconds --------------------------------------------------------------------------------------------


def test_a_span_in_milliseconds_has_the_frames_of_its_scene(tmp_path):
    """At 30 frames per second a scene begins between milliseconds; its span is rounded to them."""
    path = make_video(tmp_path, Shape("v.mp4", num_frames=90, fps=30, options=SHORT_GOP))
    for first, stop in ((0, 10), (10, 20), (20, 40), (40, 41), (41, 90)):
        span = (round(first / 30, 3), round(stop / 30, 3))
        assert shown(path, tmp_path, span) == [[*range(first, stop)]]
        request = [SpanRequest("v.0", 0, *span)]
        (row,) = cut_video(path, request, CutSettings(fps=15.0), tmp_path / "out").rows
        numbers = numbers_in(piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"]))
        assert set(numbers) <= {*range(first, stop)}
