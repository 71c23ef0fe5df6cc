"""First clips from single timestamps: midpoints, fixed lengths, and timestamps that cannot become a clip."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.base.errors import ItemError, UserError
from clipmill.base.settings import validate_settings
from training.editing.boundaries import fixed_spans, midpoint_spans, video_clips
from training.editing.settings import EditSettings

SETTINGS = EditSettings()


@pytest.mark.parametrize(
    "times, duration, expected",
    [
        ([10, 20, 40], 100, [[2.5, 15], [15, 30], [30, 47.5]]),  # outwards: half the median gap, 15
        ([3, 20, 40], 45, [[0, 11.5], [11.5, 30], [30, 45]]),  # cut at both ends of the video
        ([0, 50], 50, [[0, 25], [25, 50]]),
        ([50], 100, [[40, 60]]),  # one alone: the fixed half length
        ([4], 9, [[0, 9]]),
        ([10, 10, 20], 100, [[5, 10], [10, 15], [15, 25]]),
        ([10, 10], 100, [[0, 10], [10, 20]]),  # no gap that says how far outwards
        ([30, 30, 30], 100, [[20, 30], [29, 31], [30, 40]]),
        ([5, 5.5], 100, [[4, 6], [4.5, 6.5]]),  # widened to the least length about their middles
        ([0.2], 1.5, [[0, 1.5]]),  # a video shorter than the least length
        ([], 10, np.zeros((0, 2))),
    ],
)
def test_midpoint_clips_are_these(times: list[float], duration: float, expected: list[list[float]]) -> None:
    spans = midpoint_spans(np.array(times, dtype=float), duration, SETTINGS)
    np.testing.assert_allclose(spans, expected, atol=1e-12)


@pytest.mark.parametrize(
    "times, duration, expected",
    [
        ([10, 20, 40], 100, [[0, 20], [10, 30], [30, 50]]),
        ([3, 95], 100, [[0, 13], [85, 100]]),
        ([0.2], 1.5, [[0, 1.5]]),
    ],
)
def test_fixed_clips_are_these(times: list[float], duration: float, expected: list[list[float]]) -> None:
    np.testing.assert_allclose(fixed_spans(np.array(times, dtype=float), duration, SETTINGS), expected, atol=1e-12)


@st.composite
def timestamped_videos(draw: st.DrawFn) -> tuple[list[float], float]:
    duration = draw(st.floats(0.1, 600))
    return draw(st.lists(st.floats(0, duration), max_size=12)), duration


@pytest.mark.parametrize("initial", ["midpoint", "fixed"])
@settings(deadline=None)
@given(video=timestamped_videos())
def test_clips_hold_their_timestamp_inside_the_video_in_order(video: tuple[list[float], float], initial: str) -> None:
    times, duration = video
    chosen = EditSettings(initial=initial)
    clips = video_clips("v", duration, [f"v.{n}" for n in range(len(times))], times, chosen)
    starts, ends = clips.base_N2.T
    assert [times[int(clip_id[2:])] for clip_id in clips.clip_ids] == clips.timestamps_N.tolist() == sorted(times)
    assert (starts >= 0).all() and (ends <= duration).all()
    assert (starts <= clips.timestamps_N).all() and (clips.timestamps_N <= ends).all()
    assert (ends - starts >= min(chosen.min_length_s, duration) - 1e-9).all()
    assert (np.diff(starts) >= -1e-9).all() and (np.diff(ends) >= -1e-9).all()


def test_given_spans_are_kept_as_they_are() -> None:
    clips = video_clips("v", 60, ["b", "a"], [30, 10], SETTINGS, spans_s=[[25, 31], [8.5, 14]])
    assert clips.clip_ids == ("a", "b")
    assert clips.base_N2.tolist() == [[8.5, 14], [25, 31]]
    with pytest.raises(ValueError, match="read-only"):
        clips.base_N2[0, 0] = 0


@pytest.mark.parametrize(
    "error_class, duration, times, spans",
    [
        ("bad-duration", 0, [], None),
        ("bad-duration", float("nan"), [1], None),
        ("bad-timestamp", 10, [10.1], None),
        ("bad-timestamp", 10, [float("nan")], None),
        ("bad-timestamp", 10, [-1], None),
        ("bad-span", 10, [5], [[6, 8]]),
        ("bad-span", 10, [5], [[4, 11]]),
        ("bad-span", 10, [5], [[5, 5]]),
    ],
)
def test_what_cannot_be_a_clip_is_a_failure_of_its_video(error_class, duration, times, spans) -> None:
    with pytest.raises(ItemError) as caught:
        video_clips("v", duration, [f"v.{n}" for n in range(len(times))], times, SETTINGS, spans)
    assert caught.value.error_class == error_class


def test_settings_that_contradict_each_other_are_named() -> None:
    with pytest.raises(UserError, match="min_length_s 70.0 is above max_length_s 60.0"):
        validate_settings(EditSettings, {"min_length_s": 70})
