"""The editing study: boundaries of each arm, clips as means of frames, rounds with equal training."""

from pathlib import Path

import numpy as np
import pytest

from bench.studies.editing import STUDY, anywhere, clips_of, mean_iou, settings_of, shares_of
from bench.studies.study import Arm
from bench.studies.untrimmed import Untrimmed, untrimmed_videos
from training.editing.boundaries import VideoClips

SIZE = STUDY.sizes["small"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def videos(cache: Path) -> list[Untrimmed]:
    return untrimmed_videos(SIZE.num_videos + SIZE.num_validation + SIZE.num_test, 0, cache)


def spans(clips: list[VideoClips]) -> dict[str, np.ndarray]:
    return {clip.video_id: clip.base_N2 for clip in clips}


def test_videos_know_where_their_texts_are_true(videos: list[Untrimmed]) -> None:
    for video in videos:
        assert (video.spans_N2[:, 0] <= video.timestamps_N).all() and (video.timestamps_N < video.spans_N2[:, 1]).all()
        assert video.spans_N2.max() <= video.duration_s and len(video.frames_FC) == len(video.times_F)
        np.testing.assert_allclose(np.linalg.norm(video.frames_FC, axis=1), 1, rtol=1e-5)
    inside = [(v.times_F >= v.spans_N2[0, 0]) & (v.times_F < v.spans_N2[0, 1]) for v in videos]
    near = [v.frames_FC[i].mean(axis=0) @ v.frames_FC[i].T for v, i in zip(videos, inside, strict=True)]
    far = [v.frames_FC[i].mean(axis=0) @ v.frames_FC[~i].T for v, i in zip(videos, inside, strict=True)]
    assert np.concatenate(near).mean() > np.concatenate(far).mean() + 0.2  # a scene's frames look alike


def test_boundaries_are_as_their_arm_says(videos: list[Untrimmed]) -> None:
    quality = {}
    for kind in ("true", "midpoint", "fixed", "random"):
        quality[kind] = mean_iou(videos, spans(clips_of(videos, kind, settings_of(SIZE, kind), seed=0)))
    assert quality["true"] == 1 > quality["midpoint"] > quality["random"] and quality["fixed"] > quality["random"]


def test_random_boundaries_have_the_true_lengths_and_stay_in_the_video(videos: list[Untrimmed]) -> None:
    for video in videos:
        random = anywhere(video, seed=1)
        np.testing.assert_allclose(np.diff(random), np.diff(video.spans_N2))
        assert random.min() >= 0 and random.max() <= video.duration_s


def test_a_clip_is_the_mean_of_its_frames_or_the_nearest_one() -> None:
    shares = shares_of(np.array([0.25, 0.75, 1.25, 1.75]), np.array([[0.5, 1.5], [0.8, 0.9], [0, 9]]))
    np.testing.assert_array_equal(shares, [[0, 0.5, 0.5, 0], [0, 1, 0, 0], [0.25] * 4])


def test_an_arm_is_a_function_of_its_seed_and_edits_only_where_it_should(videos: list[Untrimmed], cache: Path) -> None:
    import torch

    def values(name: str) -> dict[str, float]:
        torch.manual_seed(0)
        return dict(STUDY.run(Arm(name), 0, SIZE, cache))

    edited = values("fixed, edited")
    assert edited == values("fixed, edited")
    first = mean_iou(
        videos[: SIZE.num_videos], spans(clips_of(videos[: SIZE.num_videos], "fixed", settings_of(SIZE, "fixed"), 0))
    )
    assert values("fixed")["iou"] == first
    assert all(0 <= value <= 1 for value in edited.values())
