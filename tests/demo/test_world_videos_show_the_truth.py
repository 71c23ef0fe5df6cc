"""Pixels read back from encoded files agree with the truth file: colours, places, directions, cut times, file facts."""

from pathlib import Path

import numpy as np
import pytest

from clipmill.media.probe import probe
from pipeline.demo.render import locate
from pipeline.demo.world import WorldSettings, make_world, read_truth, scene_at
from tests.helpers.worlds import box, decode, main_colour, mask_of, scene_from_dict

FORMATS = WorldSettings().formats
SHORT = dict(num_videos=1, min_video_s=9.0, max_video_s=10.0, fade_fraction=0.0, workers=1)
CASES = {name: dict(formats=(name,), rates=("15",), sizes=("320x240",)) for name in FORMATS}
CASES |= {
    "portrait-29.97": dict(formats=("h264-mp4",), rates=("29.97",), sizes=("240x320",)),
    "variable-mp4": dict(formats=("h264-mp4",), rates=("variable",), sizes=("426x240",)),
    "variable-mkv": dict(formats=("h264-mkv",), rates=("variable",), sizes=("320x240",)),
    "large-with-audio": dict(formats=("h264-b-mp4",), rates=("24",), sizes=("640x360",), audio_fraction=1.0),
    "rotated": dict(num_videos=4, formats=("h264-mp4",), rates=("12.5",), sizes=("426x240",)),
}


@pytest.fixture(scope="module", params=list(CASES))
def video(request, tmp_path_factory) -> tuple[Path, dict, np.ndarray, list[np.ndarray]]:
    """Return (file, truth, frame times, pictures) of the last video of a small world."""
    folder = tmp_path_factory.mktemp(request.param)
    make_world(folder, WorldSettings(**SHORT | {"seed": list(CASES).index(request.param)} | CASES[request.param]))
    truth = read_truth(folder)[-1]
    return folder / truth["file"], truth, *decode(folder / truth["file"])


def frames_of(truth: dict, times: np.ndarray, num_per_scene: int = 5):
    """Yield (frame index, scene, seconds into it) of a few frames of every scene."""
    for scene in truth["scenes"]:
        inside = np.flatnonzero((times >= scene["start_s"] - 1e-3) & (times < scene["end_s"] - 2e-3))
        for k in inside[np.linspace(0, len(inside) - 1, num_per_scene).astype(int)]:
            yield k, scene_from_dict(scene["scene"]), times[k] - scene["start_s"]


def test_every_object_has_its_colour_at_its_place(video):
    _, truth, times, pictures = video
    for k, scene, t_s in frames_of(truth, times):
        for thing in scene.objects:
            x, y, radius = locate(thing, t_s, truth["width"], truth["height"])
            assert main_colour(box(pictures[k], x, y, radius)) == thing.colour, (thing, k)


def test_objects_move_as_their_motion_says(video):
    """Compare centroids (areas, for growing) half a second apart in the pictures, within one pass of the path."""
    _, truth, times, pictures = video
    for row in truth["scenes"]:
        scene = scene_from_dict(row["scene"])
        for thing in scene.objects:
            earlier, later = _moments(thing, row, times)
            x0, y0, area0 = _measure(pictures[earlier], thing, truth)
            x1, y1, area1 = _measure(pictures[later], thing, truth)
            dx, dy = x1 - x0, y1 - y0
            assert {
                "left": dx < -5 and abs(dy) < 4,
                "right": dx > 5 and abs(dy) < 4,
                "up": dy < -5 and abs(dx) < 4,
                "down": dy > 5 and abs(dx) < 4,
                "circling": np.hypot(dx, dy) > 5,
                "bouncing": abs(dy) > 5 and abs(dx) < 4,
                "growing": area1 > 1.1 * area0,
                "shrinking": area1 < 0.9 * area0,
                "still": np.hypot(dx, dy) < 1.5 and 0.93 < area1 / area0 < 1.07,
            }[thing.motion], (thing, dx, dy, area0, area1)


def _moments(thing, row: dict, times: np.ndarray) -> tuple[int, int]:
    """Return two frames about half a second apart in the same pass (for bouncing: on the way down)."""
    for start_s in np.arange(row["start_s"] + 0.05, row["end_s"] - 0.7, 0.05):
        phase = (thing.phase + (start_s - row["start_s"]) / thing.period_s) % 1.0
        last = phase + 0.55 / thing.period_s
        if last < 0.99 and (thing.motion != "bouncing" or phase > 0.5):
            return int(np.searchsorted(times, start_s)), int(np.searchsorted(times, start_s + 0.5))
    pytest.fail(f"no half second of one pass in a scene of {row['end_s'] - row['start_s']} s")


def _measure(picture: np.ndarray, thing, truth: dict) -> tuple[float, float, float]:
    """Return the centroid and area of the object's colour in its part of the frame."""
    x0, y0, x1, y1 = (round(v * truth[side]) for v, side in zip(thing.cell, ("width", "height") * 2, strict=True))
    rows, columns = np.nonzero(mask_of(picture[y0:y1, x0:x1], thing.colour))
    return columns.mean(), rows.mean(), float(len(rows))


def test_cuts_are_where_the_truth_says_to_the_frame(video):
    _, truth, times, pictures = video
    changes = np.array([np.abs(a.astype(int) - b).mean() for a, b in zip(pictures, pictures[1:], strict=False)])
    cuts = {int(np.argmin(np.abs(times - scene["start_s"]))) for scene in truth["scenes"][1:]}
    largest = {int(k) + 1 for k in np.argsort(changes)[len(changes) - len(cuts) :]}
    assert largest == cuts
    for scene in truth["scenes"][1:]:
        assert np.abs(times - scene["start_s"]).min() < 0.002  # a frame begins there, container rounding aside


def test_file_facts_are_true(video):
    path, truth, times, pictures = video
    info = probe(path)
    assert (info.width, info.height, info.rotation) == (truth["width"], truth["height"], truth["rotation"])
    assert len(pictures) == truth["num_frames"]
    assert (info.audio_codec is not None) == truth["has_audio"]
    assert truth["codec"] in (info.video_codec, "av1")  # the decoder of AV1 has another name
    assert times[-1] < truth["duration_s"] <= times[-1] + 0.2
    assert path.stat().st_size == truth["num_bytes"]
    gaps = np.diff(times)
    if truth["fps"]:
        assert np.abs(gaps - 1 / truth["fps"]).max() < 0.0021
    else:
        assert gaps.max() > 2 * gaps.min()


def test_the_scenes_fill_the_video(video):
    _, truth, _, _ = video
    scenes = truth["scenes"]
    assert scenes[0]["start_s"] == 0.0
    assert scenes[-1]["end_s"] == pytest.approx(truth["duration_s"])
    assert [scene["end_s"] for scene in scenes[:-1]] == pytest.approx([scene["start_s"] for scene in scenes[1:]])


def test_the_rotated_video_is_stored_on_its_side(tmp_path):
    make_world(tmp_path, WorldSettings(**SHORT | CASES["rotated"]))
    import av

    truth = read_truth(tmp_path)
    assert [row["rotation"] for row in truth] == [0, 0, 0, 90]
    with av.open(str(tmp_path / truth[3]["file"])) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (truth[3]["height"], truth[3]["width"])


def test_b_frames_and_late_starts_are_really_there(tmp_path):
    import av

    make_world(tmp_path, WorldSettings(**SHORT | dict(formats=("h264-b-mp4",), rates=("15",))))
    with av.open(str(tmp_path / read_truth(tmp_path)[0]["file"])) as container:
        assert av.video.frame.PictureType.B in {frame.pict_type for frame in container.decode(video=0)}
    make_world(tmp_path / "ts", WorldSettings(**SHORT | dict(formats=("h264-ts",), rates=("15",))))
    with av.open(str(tmp_path / "ts" / read_truth(tmp_path / "ts")[0]["file"])) as container:
        assert container.start_time / av.time_base >= 9.9


def test_a_cross_fade_shows_both_scenes(tmp_path):
    plain = dict(formats=("h264-mp4",), rates=("25",), sizes=("320x240",))
    make_world(tmp_path, WorldSettings(**SHORT | plain | {"fade_fraction": 1.0, "max_scene_s": 6.0}))
    (truth,) = read_truth(tmp_path)
    times, pictures = decode(tmp_path / truth["file"])
    scene = truth["scenes"][1]
    assert scene["fade_s"] == 0.5 and truth["scenes"][0]["fade_s"] == 0.0
    before, middle, after = (
        pictures[int(np.argmin(np.abs(times - scene["start_s"] - dt)))].astype(float) for dt in (-0.1, 0.25, 0.6)
    )
    assert np.abs(middle - (before + after) / 2).mean() < 0.35 * np.abs(after - before).mean()


def test_scene_at_finds_the_scene_a_span_shows_most_of():
    video = {"scenes": [dict(n=n, start_s=4.0 * n, end_s=4.0 * n + 4.0) for n in range(3)]}
    assert scene_at(video, 3.0, 7.0)["n"] == 1
    assert scene_at(video, 2.0, 5.0)["n"] == 0
