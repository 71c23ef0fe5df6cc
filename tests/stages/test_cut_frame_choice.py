"""The choice of source frames for a clip: properties of the rule on arbitrary frame times."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clipmill.base.errors import ItemError
from clipmill.media.frame_times import FrameTimes, caption_frames, choose_frames, frame_times
from tests.helpers.media import expected_numbers

RATES = st.sampled_from([0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 12.5, 24.0, 30.0, 60.0])
# Frame distances in milliseconds: constant rates, variable rates, gaps.
DISTANCES = st.one_of(
    st.tuples(st.sampled_from([17, 20, 33, 40, 100, 500]), st.integers(1, 150)).map(lambda c: [c[0]] * c[1]),
    st.lists(st.integers(1, 3000), min_size=1, max_size=60),
)
SPANS = st.tuples(st.integers(0, 9000), st.integers(1, 9000)).map(lambda span: (span[0] / 1000, sum(span) / 1000))


def timeline(distances: list[int]) -> tuple[FrameTimes, list[Fraction], Fraction]:
    """Return frame times from distances in milliseconds; the last is the duration of the last frame."""
    ticks = np.cumsum([0, *distances[:-1]])
    exact = [Fraction(int(tick), 1000) for tick in ticks]
    return frame_times(ticks, 0.001, distances[-1]), exact, exact[-1] + Fraction(distances[-1], 1000)


def exactly(moment_s: float) -> Fraction:
    return Fraction(moment_s).limit_denominator(10**6)


@given(DISTANCES, SPANS, RATES)
def test_every_output_frame_is_the_nearest_source_frame(distances, span, rate):
    frames, exact, end_s = timeline(distances)
    assume(exactly(span[0]) < end_s)
    expected = expected_numbers(exact, end_s, *span, rate)
    assert choose_frames(frames, *span, rate).tolist() == expected


@given(DISTANCES, SPANS)
def test_at_the_source_rate_every_frame_of_the_span_is_kept_once(distances, span):
    frames, exact, end_s = timeline(distances)
    assume(exactly(span[0]) < end_s)
    chosen = choose_frames(frames, *span, None).tolist()
    assert chosen == expected_numbers(exact, end_s, *span, None)
    ends = [*exact[1:], end_s]
    inside = [i for i, t in enumerate(exact) if exactly(span[0]) <= t and ends[i] <= exactly(span[1])]
    assert set(inside) <= set(chosen) and len(chosen) <= len(inside) + 2


@given(DISTANCES, st.lists(st.integers(0, 12_000), min_size=2, max_size=6, unique=True))
def test_spans_that_follow_each_other_share_and_lose_no_frame_at_the_source_rate(distances, edges):
    frames, _, end_s = timeline(distances)
    edges = [edge / 1000 for edge in sorted(edges) if edge / 1000 < end_s]
    cut = [choose_frames(frames, *span, None).tolist() for span in itertools.pairwise(edges)]
    for before, after in itertools.pairwise(cut):
        # A span too short for a frame has one all the same, which is its neighbour's, too.
        assert after[0] == before[-1] + 1 or min(len(before), len(after)) == 1


@given(st.lists(st.integers(5, 300), min_size=3, max_size=40), st.integers(0, 10**6), st.data())
def test_rounding_a_scene_to_milliseconds_neither_adds_nor_loses_a_frame(distances, fraction, data):
    """Scenes lie between frames, whose times are no milliseconds."""
    ticks = np.cumsum([0, *distances]) * 1_000_003 + fraction
    frames = frame_times(ticks[:-1], 1e-9, distances[-1] * 1_000_003)
    first = data.draw(st.integers(0, len(frames) - 1))
    stop = data.draw(st.integers(first + 1, len(frames)))
    edges = np.append(frames.times_s, frames.end_s)
    assert choose_frames(frames, round(edges[first], 3), round(edges[stop], 3), None).tolist() == [*range(first, stop)]


@given(DISTANCES, SPANS, st.one_of(RATES, st.none()))
def test_no_frame_at_or_after_the_end_and_the_first_within_half_a_frame(distances, span, rate):
    frames, _, end_s = timeline(distances)
    assume(exactly(span[0]) < end_s)
    chosen = choose_frames(frames, *span, rate)
    times = frames.times_s[chosen]
    assert (times < span[1]).all() and (np.diff(chosen) >= 0).all()
    around = [t for t in frames.times_s[max(0, chosen[0] - 1) : chosen[0] + 2] if t < span[1] - 1e-6]
    assert all(abs(times[0] - span[0]) <= abs(t - span[0]) + 2e-6 for t in around)


@given(st.lists(st.integers(-(10**9), 10**9), min_size=1, max_size=50), st.integers(0, 10**6))
def test_times_start_at_zero_whatever_the_order_origin_and_duplicates(ticks, last):
    frames = frame_times(np.array(ticks), 1 / 90000, last)
    assert frames.times_s[0] == 0 and (np.diff(frames.times_s) > 0).all()
    assert len(frames) == len(set(ticks)) and frames.end_s > frames.times_s[-1]
    again = frame_times(np.array(sorted(ticks + ticks)) + 12345, 1 / 90000, last)
    assert np.array_equal(again.times_s, frames.times_s)


@pytest.mark.parametrize(
    "span, min_frames, error_class",
    [
        ((10.0, 12.0), 1, "span-past-end"),
        ((50.0, 52.0), 1, "span-past-end"),
        ((9.9, 14.0), 2, "span-past-end"),
        ((3.0, 3.5), 5, "span-too-short"),
        ((3.0, 3.0), 1, "bad-span"),
        ((3.0, 2.0), 1, "bad-span"),
        ((-1.0, 2.0), 1, "bad-span"),
        ((float("nan"), 2.0), 1, "bad-span"),
        ((1.0, float("inf")), 1, "bad-span"),
    ],
)
def test_spans_that_cannot_be_cut_say_why(span, min_frames, error_class):
    frames, _, _ = timeline([40] * 250)  # 10 s
    with pytest.raises(ItemError) as caught:
        choose_frames(frames, *span, 3.0, min_frames)
    assert caught.value.error_class == error_class


def test_a_span_over_the_end_is_cut_to_what_exists():
    frames, exact, end_s = timeline([40] * 250)
    assert choose_frames(frames, 8.0, 20.0, 3.0).tolist() == expected_numbers(exact, end_s, 8.0, 20.0, 3.0)
    assert len(choose_frames(frames, 8.0, 20.0, 3.0)) == 6


def test_no_frames_at_all_is_an_error():
    with pytest.raises(ItemError, match="undecodable"):
        frame_times(np.array([], np.int64), 0.001)


@given(st.integers(1, 500), st.integers(1, 64))
def test_stills_are_the_middle_frame_and_others_spread_evenly(num_frames, count):
    stills = caption_frames(num_frames, count)
    assert stills[0] == num_frames // 2 and len(set(stills)) == len(stills) == min(count, num_frames)
    assert all(0 <= k < num_frames for k in stills) and stills[1:] == sorted(stills[1:])
    if count % 2 and count <= num_frames:
        gaps = np.diff(sorted(stills))
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
