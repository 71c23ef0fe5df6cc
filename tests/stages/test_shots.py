"""Shot detection finds abrupt changes of picture, at the real time of the frame."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from pydantic import ValidationError

from clipmill.base.errors import ItemError
from pipeline.stages.segment.segment import SegmentSettings, segment_video
from pipeline.stages.segment.shots import ShotSettings, detect_shots

COLOURS = [(200, 40, 40), (40, 180, 60), (40, 60, 200), (220, 200, 50), (120, 30, 140)]


def picture(shot: int, k: int, size: tuple[int, int]) -> np.ndarray:
    """Draw a square moving over a patterned background, which differs between shots."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    stripes = ((x * (shot + 1) + y * (4 - shot % 4)) // 16 % 2)[..., None]
    image = (np.array(COLOURS[shot % 5]) * (0.6 + 0.4 * stripes)).astype(np.uint8)
    left, top = (7 * k) % (width - 24), (3 * k) % (height - 24)
    image[top : top + 24, left : left + 24] = 255 - np.array(COLOURS[shot % 5])
    return image


def video(
    path: Path,
    lengths: list[int],
    *,
    b_frames: int = 0,
    first_pts: int = 0,
    steps: tuple[int, ...] = (40,),
    size: tuple[int, int] = (320, 180),
) -> list[float]:
    """Write shots of the given lengths, frames `steps` ms apart in turn; return the times of the cuts and the end."""
    cuts, pts, number = [], first_pts, 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.gop_size = 60
        stream.options = {
            "bf": str(b_frames),
            "b-adapt": "0",
            "threads": "1",
            "preset": "veryfast",
            "sc_threshold": "0",
        }
        for shot, length in enumerate(lengths):
            cuts.append((pts - first_pts) / 1000)
            for k in range(length):
                frame = av.VideoFrame.from_ndarray(picture(shot, k, size), format="rgb24")
                frame.pts, frame.time_base = pts, Fraction(1, 1000)
                container.mux(stream.encode(frame))
                pts += steps[number % len(steps)]
                number += 1
        container.mux(stream.encode(None))
    return [*cuts[1:], (pts - first_pts) / 1000]


def cuts_of(shots: list[tuple[float, float]]) -> list[float]:
    assert shots[0][0] == 0.0
    assert all(a[1] == b[0] for a, b in zip(shots, shots[1:], strict=False))
    return [end for _, end in shots]


@pytest.mark.parametrize("detector", ["adaptive", "content"])
@pytest.mark.parametrize("b_frames", [0, 3])
def test_hard_cuts_are_found_to_the_frame(tmp_path, detector, b_frames):
    truth = video(tmp_path / "a.mp4", [40, 61, 33, 50], b_frames=b_frames)
    found = cuts_of(detect_shots(tmp_path / "a.mp4", ShotSettings(detector=detector)))
    assert found == pytest.approx(truth, abs=0.001)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_times_count_from_the_first_frame_and_frame_rates_may_vary(tmp_path, name):
    truth = video(tmp_path / name, [40, 50, 45], first_pts=5000, steps=(20, 40, 90))
    assert cuts_of(detect_shots(tmp_path / name))[:-1] == pytest.approx(truth[:-1], abs=0.002)


@pytest.mark.parametrize("rate", [-1.0, 1e9])
def test_a_header_whose_frame_rate_cannot_be_moves_no_cut(tmp_path, rate):
    path = tmp_path / "a.flv"
    truth = video(path, [40, 50, 45])
    data = path.read_bytes()
    at = data.index(b"framerate\0") + len(b"framerate\0")  # a number in AMF0: a type and eight bytes
    path.write_bytes(data[:at] + struct.pack(">d", rate) + data[at + 8 :])
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate != 25
    assert cuts_of(detect_shots(path))[:-1] == pytest.approx(truth[:-1], abs=0.002)


def test_fast_is_at_most_one_reference_distance_late_and_never_early(tmp_path):
    truth = video(tmp_path / "a.mp4", [41, 62, 47, 50], b_frames=3)
    found = cuts_of(detect_shots(tmp_path / "a.mp4", ShotSettings(precision="fast")))
    assert len(found) == len(truth)
    late = [b - a for a, b in zip(truth[:-1], found[:-1], strict=True)]
    assert all(-0.001 <= seconds < 4 * 0.04 for seconds in late)
    assert any(seconds > 0.001 for seconds in late), "the test's cuts should not all fall on reference frames"


def test_motion_alone_is_no_cut_nor_is_a_keyframe_on_a_red_ground(tmp_path):
    truth = video(tmp_path / "a.mp4", [120])
    assert detect_shots(tmp_path / "a.mp4") == [(0.0, pytest.approx(truth[-1]))]


def test_cuts_close_together_are_flashes(tmp_path):
    video(tmp_path / "a.mp4", [50, 5, 50])
    assert len(detect_shots(tmp_path / "a.mp4", ShotSettings(min_shot_s=1.0))) == 2
    assert len(detect_shots(tmp_path / "a.mp4", ShotSettings(min_shot_s=0.0))) == 3


def test_the_same_file_gives_the_same_shots(tmp_path):
    video(tmp_path / "a.mp4", [30, 40])
    assert detect_shots(tmp_path / "a.mp4") == detect_shots(tmp_path / "a.mp4")


def test_a_single_frame_is_one_shot(tmp_path):
    video(tmp_path / "a.mp4", [1], size=(64, 64))
    [(start_s, end_s)] = detect_shots(tmp_path / "a.mp4")
    assert start_s == 0.0 < end_s


def test_a_file_that_breaks_off_has_the_shots_that_are_there(tmp_path):
    truth = video(tmp_path / "a.mkv", [40, 60, 50])
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "b.mkv").write_bytes(data[: len(data) * 6 // 10])
    found = cuts_of(detect_shots(tmp_path / "b.mkv"))
    assert found[0] == pytest.approx(truth[0], abs=0.002) and found[-1] < truth[-1]


def test_a_file_that_is_not_a_video_fails_with_its_class(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"<html>404</html>" * 50)
    with pytest.raises(ItemError, match="not-a-video"):
        detect_shots(tmp_path / "a.mp4")
    with pytest.raises(ItemError, match="source-missing"):
        detect_shots(tmp_path / "b.mp4")


def test_wrong_settings_name_the_field():
    with pytest.raises(ValidationError, match="detector"):
        ShotSettings(detector="neural")


def test_shots_become_spans(tmp_path):
    truth = video(tmp_path / "a.mp4", [75, 100])
    shots = detect_shots(tmp_path / "a.mp4")
    result = segment_video("vid", [], truth[-1], None, shots, SegmentSettings(mode="shots"))
    assert [(span["start_s"], span["end_s"]) for span in result.spans] == [(0.0, 3.0), (3.0, pytest.approx(7.0))]


def test_a_film_trailer(footage):
    """The expected cuts were read from the film frame by frame; fades between titles are not included."""
    shots = detect_shots(footage / "cosmos_test_video_30s.mp4")
    found = cuts_of(shots)
    assert found[-1] == pytest.approx(30.0, abs=0.05)
    for cut in (7.333, 11.917, 14.5, 15.5, 21.792, 23.875, 25.417):
        assert min(abs(cut - other) for other in found) < 0.03
    assert len(found) < 16
