"""Pictures of clips: sizes, orientation, colours and frame statistics."""

from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.media.frame_stats import ClipStats, FrameStats, Thumbnailer, content_change, perceptual_hash
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_video
from pipeline.stages.cut.picture import PictureMaker, target_size
from tests.helpers.media import SHORT_GOP, Shape, decoded, make_video, piece

PQ, HLG, BT2020 = 16, 18, 9


def cut_one(path, tmp_path, **settings):
    (row,) = cut_video(path, [SpanRequest("v.0", 0, 0.0, 1.0)], CutSettings(**settings), tmp_path / "out").rows
    return row, decoded(piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"]))


@pytest.mark.parametrize(
    "size, aspect, short_side, expected",
    [
        ((1280, 720), 1, 256, (456, 256)),
        ((720, 1280), 1, 256, (256, 456)),
        ((640, 361), 1, None, (640, 360)),
        ((1920, 1080), 1, 256, (456, 256)),
        ((720, 576), Fraction(64, 45), 256, (456, 256)),
        ((320, 180), 1, 256, (320, 180)),
        ((1, 1), 1, 256, (2, 2)),
        ((320, 180), Fraction(1, 1000), 256, (320, 180)),  # invalid tags are ignored
    ],
)
def test_sizes(size, aspect, short_side, expected):
    assert target_size(*size, Fraction(aspect), short_side) == expected


@given(
    st.integers(1, 8192),
    st.integers(1, 8192),
    st.fractions(Fraction(1, 4), 4, max_denominator=50),
    st.one_of(st.none(), st.integers(8, 1000).map(lambda half: 2 * half)),
)
def test_sizes_are_even_and_keep_the_shape(width, height, aspect, short_side):
    new = target_size(width, height, aspect, short_side)
    shown = (width * aspect, Fraction(height))
    assert all(side >= 2 and side % 2 == 0 for side in new)
    if short_side is not None:
        assert min(new) <= short_side
        if min(shown) >= short_side:
            assert min(new) == short_side
    scale = min(Fraction(1), short_side / min(shown)) if short_side else Fraction(1)
    assert all(abs(a - b * scale) <= 1 or a == 2 for a, b in zip(new, shown, strict=True))


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_sources_become_upright(tmp_path, rotation):
    path = make_video(tmp_path, Shape("turned.mp4", rotation=rotation, size=(320, 180), options=SHORT_GOP))
    row, frames = cut_one(path, tmp_path)
    expected = (320, 180) if rotation == 180 else (180, 320)
    assert (row["width"], row["height"]) == (frames[0].width, frames[0].height) == expected
    assert frames[0].rotation == 0


def test_pixel_aspect_is_applied(tmp_path):
    path = make_video(tmp_path, Shape("wide.mp4", size=(240, 180), pixel_aspect=Fraction(4, 3), options=SHORT_GOP))
    row, _ = cut_one(path, tmp_path)
    assert (row["width"], row["height"]) == (320, 180)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_every_depth_and_sampling_becomes_the_same_8_bit_picture(tmp_path, pix_fmt):
    path = make_video(tmp_path, Shape("depth.mp4", pix_fmt=pix_fmt, options=SHORT_GOP))
    _, frames = cut_one(path, tmp_path)
    assert frames[0].format.name == "yuv420p" and frames[0].color_range == 1
    luma = frames[0].to_ndarray()[:180]
    assert int(luma[170, 300]) == pytest.approx((170 + 300) % 200 + 20, abs=4)
    assert frames[0].to_ndarray()[180:].mean() == pytest.approx(110, abs=2)


def test_colour_tags_say_which_matrix_the_pixels_use(tmp_path):
    small = make_video(tmp_path, Shape("sd.mp4", options=SHORT_GOP))
    large = make_video(tmp_path, Shape("hd.mp4", num_frames=31, size=(1280, 720), options=SHORT_GOP))
    tagged = make_video(tmp_path, Shape("tagged.mp4", colour={"colorspace": 1}, options=SHORT_GOP))
    assert [cut_one(path, tmp_path)[1][0].colorspace for path in (small, large, tagged)] == [6, 1, 1]


def test_full_range_becomes_limited(tmp_path):
    options = {"qscale": "2", "flags": "+frame_duration"}
    shape = Shape("full.avi", codec="mjpeg", pix_fmt="yuvj420p", num_frames=30, options=options)
    path = make_video(tmp_path, shape)
    with av.open(str(path)) as container:
        source = next(container.decode(video=0)).to_ndarray()
    _, frames = cut_one(path, tmp_path)
    result = frames[0].to_ndarray()
    expected = 16 + source[:180].astype(float) * 219 / 255
    assert frames[0].color_range == 1
    assert np.abs(result[60:180] - expected[60:180]).mean() < 2


def flat(level: float, curve: int) -> av.VideoFrame:
    """Return a grey 10-bit BT.2020 frame of one signal level in 0..1."""
    luma = np.full((32, 64), round(64 + 876 * level), np.uint16)
    frame = av.VideoFrame.from_ndarray(
        np.concatenate([luma.reshape(-1), np.full(32 * 32, 512, np.uint16)]).reshape(48, 64), format="yuv420p10le"
    )
    frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc = 9, 1, BT2020, curve
    return frame


def pq_level(nits: float) -> float:
    """Return the PQ signal level of a luminance (SMPTE ST 2084)."""
    y = (nits / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


@pytest.mark.parametrize("curve, white", [(PQ, pq_level(203)), (HLG, 0.75)])
def test_hdr_white_becomes_sdr_white_and_greys_keep_their_order(curve, white):
    maker = PictureMaker(None, 256)
    levels = [int(maker(flat(level, curve)).to_ndarray()[10, 20]) for level in (0.0, 0.25 * white, 0.6 * white, white)]
    assert levels == sorted(set(levels)) and abs(levels[0] - 16) <= 2
    picture = maker(flat(white, curve))
    assert 190 <= int(picture.to_ndarray()[10, 20]) <= 236
    assert (picture.colorspace, picture.color_primaries, picture.color_trc) == (1, 1, 1)
    assert np.abs(picture.to_ndarray()[32:].astype(int) - 128).max() <= 2  # grey stays grey


def test_an_hdr_video_is_cut_to_bt709(tmp_path):
    colour = {"colorspace": 9, "color_primaries": BT2020, "color_trc": PQ}
    path = make_video(tmp_path, Shape("hdr.mp4", pix_fmt="yuv420p10le", colour=colour, options=SHORT_GOP))
    row, frames = cut_one(path, tmp_path)
    assert frames[0].format.name == "yuv420p" and row["num_frames"] == 3
    assert (frames[0].colorspace, frames[0].color_primaries, frames[0].color_trc) == (1, 1, 1)


# ---- measures --------------------------------------------------------------------------------------------------------


def picture(luma: np.ndarray, blue: int = 128, red: int = 128) -> av.VideoFrame:
    height, width = luma.shape
    chroma = np.concatenate([np.full(width * height // 4, blue), np.full(width * height // 4, red)])
    packed = np.concatenate([luma.reshape(-1), chroma]).astype(np.uint8).reshape(height * 3 // 2, width)
    frame = av.VideoFrame.from_ndarray(packed, format="yuv420p")
    frame.colorspace, frame.color_range = 1, 1
    return frame


def measured(pictures: list[av.VideoFrame]) -> dict:
    views, measures = Thumbnailer(), ClipStats()
    for shown in pictures:
        measures.add(FrameStats.of(views.colour(shown)))
    return measures.columns()


def scene(seed: int, shift: int = 0) -> np.ndarray:
    import cv2

    noise = np.random.default_rng(seed).integers(20, 230, (9, 16)).astype(np.float32)
    return np.roll(cv2.resize(noise, (320, 180), interpolation=cv2.INTER_CUBIC).clip(16, 235), shift, axis=1)


def test_brightness_runs_from_black_to_white():
    levels = [measured([picture(np.full((180, 320), level))])["brightness"] for level in (16, 126, 235)]
    assert levels == pytest.approx([0.0, 0.5, 1.0], abs=0.01)


def test_motion_grows_with_movement_and_is_zero_in_a_still():
    still, slow, fast = (measured([picture(scene(1, step * k)) for k in range(5)])["motion"] for step in (0, 4, 16))
    assert still == 0 and 0 < slow < fast < 1
    flash = measured([picture(np.full((180, 320), level)) for level in (16, 235, 16)])
    assert flash["motion"] == pytest.approx(1.0, abs=0.01)


def test_the_shot_score_is_the_content_detectors(tmp_path):
    """The score equals PySceneDetect's: far above its threshold at a cut, far below it for movement."""
    from scenedetect import FrameTimecode
    from scenedetect.detectors import ContentDetector

    pictures = [picture(scene(1, 2 * k), 100, 140) for k in range(4)] + [
        picture(scene(2, 2 * k), 150, 90) for k in range(4)
    ]
    views = Thumbnailer()
    thumbnails = [views.colour(shown) for shown in pictures]
    detector, theirs = ContentDetector(), []
    for number, thumbnail in enumerate(thumbnails):
        detector.process_frame(FrameTimecode(number, 25.0), thumbnail)
        theirs.append(detector._frame_score)
    ours = [
        content_change(FrameStats.of(a), FrameStats.of(b)) for a, b in zip(thumbnails, thumbnails[1:], strict=False)
    ]
    assert ours == pytest.approx(theirs[1:], abs=1e-6)
    assert ours[3] > 27 > 2 * max(ours[:3] + ours[4:])
    assert measured(pictures)["shot_score"] == pytest.approx(max(ours))


def test_hashes_survive_coding_and_tell_scenes_apart(tmp_path):
    views = Thumbnailer()
    hashes = [perceptual_hash(views.grey(picture(scene(seed)))) for seed in range(12)]
    noisy = scene(0) + np.random.default_rng(5).normal(0, 6, (180, 320))
    dimmer = scene(0) * 0.8 + 10
    for variant in (noisy.clip(16, 235), dimmer):
        assert (perceptual_hash(views.grey(picture(variant))) ^ hashes[0]).bit_count() <= 6
    distances = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 12 and all(0 <= value < 2**64 for value in hashes)


def test_rows_hold_the_measures_of_first_middle_and_last_frame(tmp_path):
    path = make_video(tmp_path, Shape("moving.mp4", options=SHORT_GOP))
    row, frames = cut_one(path, tmp_path, fps=10.0, encoding="intra")
    views = Thumbnailer()
    own = [perceptual_hash(views.grey(frames[k])) for k in (0, len(frames) // 2, len(frames) - 1)]
    assert all((a ^ b).bit_count() <= 8 for a, b in zip(own, row["phash"], strict=True))
    assert row["motion"] > 0.01 and 0.2 < row["brightness"] < 0.8


# ---- real footage ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_videos_of_many_kinds_are_cut_whole(footage, tmp_path):
    for path in sorted(
        p for p in footage.iterdir() if p.suffix in (".mp4", ".webm", ".mkv") and not p.name.startswith("v2d")
    ):
        spans = [SpanRequest("v.0", 0, 0.0, 0.9), SpanRequest("v.1", 1, 0.4, 60.0)]
        result = cut_video(path, spans, CutSettings(), tmp_path / "out")
        assert not result.failures and result.counts["num_passes"] == 1, path.name
        for row in result.rows:
            frames = decoded(piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"]))
            assert len(frames) == row["num_frames"] and (frames[0].width, frames[0].height) == (
                row["width"],
                row["height"],
            )
            assert min(row["width"], row["height"]) <= 256
        assert result.duration_s - 0.5 < result.rows[1]["end_s"] <= result.duration_s
