"""A teacher's edits stay within limits, find the true boundaries, and leave everything else unchanged."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from clipmill.base.errors import ItemError
from tests.helpers.boundaries import Oracle, Truth, frame_features, make_truths, mean_iou, topic_vectors
from training.editing.boundaries import (
    EDITS,
    Floats,
    VideoClips,
    candidates,
    drift,
    edit_videos,
    iou,
    lowest_threshold,
    overlap,
    overlapping,
    reach,
    video_clips,
)
from training.editing.rounds import base_spans
from training.editing.scores import Bank, FrameScorer, contrastive_score, draw_bank, mean_frames, running_sums
from training.editing.settings import EditSettings

SETTINGS = EditSettings()


def play(videos, score, settings=SETTINGS, num_rounds=10, step_scale=1.0):
    """Return the boundaries after each round, the first ones included, and every row."""
    spans, tables = [base_spans(videos)], []
    for number in range(1, num_rounds + 1):
        edited = edit_videos(
            videos, spans[-1], score, settings, round_number=number, teacher="t", step_scale=step_scale
        )
        assert not edited.failures
        spans.append(edited.spans)
        tables.append(edited.rows)
    return spans, pa.concat_tables(tables)


# -- candidates --------------------------------------------------------------------------------------------------------


def test_nine_candidates_move_one_boundary_both_or_the_clip() -> None:
    video = video_clips("v", 100, ["a"], [50], SETTINGS)
    offered = candidates(video, video.base_N2, 0, SETTINGS)  # 20 s long: steps of 2 s
    expected = [[40, 60], [38, 60], [42, 60], [40, 58], [40, 62], [38, 62], [42, 58], [38, 58], [42, 62]]
    assert offered.tolist() == expected
    assert len(candidates(video, video.base_N2, 0, EditSettings(rings=2))) == 17
    halved = candidates(video, video.base_N2, 0, SETTINGS, step_scale=0.5)
    assert halved[1].tolist() == [39, 60]
    short = video_clips("v", 100, ["a"], [50], SETTINGS, spans_s=[[49, 52]])
    assert candidates(short, short.base_N2, 0, SETTINGS)[1].tolist() == [48.5, 52]  # at least half a second


def test_neighbours_timestamps_are_those_that_differ() -> None:
    video = video_clips("v", 50, list("abcd"), [10, 20, 20, 40], SETTINGS)
    assert reach(video).tolist() == [[0, 20], [10, 40], [10, 40], [20, 50]]


class Random:
    """Score candidates by a hash of their numbers."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, video: VideoClips, offered: Sequence[Floats]) -> list[Floats]:
        return [np.sin(self.seed + 1e3 * spans_K2 @ np.array([1.0, 1.7])) for spans_K2 in offered]


@st.composite
def clips_of_a_video(draw: st.DrawFn) -> tuple[VideoClips, EditSettings]:
    duration = draw(st.floats(1, 200))
    times = draw(st.lists(st.floats(0, duration), min_size=1, max_size=8))
    settings = EditSettings(
        initial=draw(st.sampled_from(["midpoint", "fixed"])),
        rings=draw(st.sampled_from([1, 2])),
        max_overlap=draw(st.sampled_from([0.0, 0.3, 0.5])),
        max_length_s=draw(st.sampled_from([8.0, 60.0])),
        length_weight=0,
        min_gain=0,
    )
    return video_clips("v", duration, [f"v.{n}" for n in range(len(times))], times, settings), settings


@hypothesis_settings(deadline=None)
@given(made=clips_of_a_video(), seed=st.integers(0, 1000), step_scale=st.sampled_from([1.0, 0.5, 0.125]))
def test_edits_never_break_a_limit_nor_break_one_further(made, seed: int, step_scale: float) -> None:
    video, settings = made
    spans, rows = play([video], Random(seed), settings, num_rounds=4, step_scale=step_scale)
    for before, after in zip(spans, spans[1:], strict=False):
        before, after = before["v"], after["v"]
        times, (low, high) = video.timestamps_N, reach(video).T
        length, length_before = np.diff(after)[:, 0], np.diff(before)[:, 0]
        assert (after[:, 0] >= 0).all() and (after[:, 1] <= video.duration_s).all()
        assert (after[:, 0] <= times).all() and (times <= after[:, 1]).all()
        assert (after[:, 0] >= np.minimum(low, before[:, 0])).all()
        assert (after[:, 1] <= np.maximum(high, before[:, 1])).all()
        assert (length >= np.minimum(settings.min_length_s, length_before)).all()
        assert (length <= np.maximum(settings.max_length_s, length_before)).all()
        for left in range(len(video) - 1):
            share, share_before = (overlap(now[left], now[left + 1][None])[0] for now in (after, before))
            assert share <= max(settings.max_overlap, share_before) + 1e-12
    assert rows.schema == EDITS
    assert rows.num_rows == 4 * len(video)


# -- choice ------------------------------------------------------------------------------------------------------------


def test_an_oracle_recovers_the_true_boundaries_round_by_round() -> None:
    truths = make_truths(60, SETTINGS)
    spans, _ = play([truth.clips for truth in truths], Oracle(truths), num_rounds=12)
    quality = [mean_iou(truths, present) for present in spans]
    print([round(value, 3) for value in quality])
    assert all(later >= earlier for earlier, later in zip(quality, quality[1:], strict=False))
    assert quality[-1] >= quality[0] + 0.15
    assert quality[-1] > 0.9


def test_an_oracle_recovers_them_from_fixed_clips_too() -> None:
    settings = EditSettings(initial="fixed")
    truths = make_truths(60, settings)
    spans, _ = play([truth.clips for truth in truths], Oracle(truths), settings, num_rounds=20)
    assert mean_iou(truths, spans[-1]) >= mean_iou(truths, spans[0]) + 0.3


def test_true_boundaries_do_not_drift() -> None:
    truths = make_truths(30, SETTINGS)
    videos = [
        video_clips(t.clips.video_id, t.clips.duration_s, t.clips.clip_ids, t.clips.timestamps_N, SETTINGS, t.spans_N2)
        for t in truths
    ]
    spans, rows = play(videos, Oracle(truths), num_rounds=3)
    assert not any(rows["accepted"].to_pylist())
    for video in videos:
        assert np.array_equal(spans[-1][video.video_id], video.base_N2)


def from_frames(truths: list[Truth], **changes: Any) -> FrameScorer:
    """Return cosines of noisy frames and captions, as from a model; 40 topics recur in other videos."""
    topics = topic_vectors()
    frames = {t.clips.video_id: frame_features(t, topics, noise=3.0) for t in truths}
    named = [(t.clips.video_id, *pair) for t in truths for pair in zip(t.clips.clip_ids, t.topics_N, strict=True)]
    texts = {clip_id: topics[topic] for _, clip_id, topic in named}
    bank = draw_bank([video_id for video_id, _, _ in named], np.stack(list(texts.values())), SETTINGS.bank_size)
    return FrameScorer(frames, texts, **{"bank": bank, "log_scale": np.log(20)} | changes)


def test_frame_features_find_the_truth_without_an_oracle() -> None:
    truths = make_truths(60, SETTINGS)
    videos = [truth.clips for truth in truths]
    for changes in ({}, {"bank": None}):
        spans, _ = play(videos, from_frames(truths, **changes), num_rounds=8)
        quality = [mean_iou(truths, present) for present in spans]
        print(changes, [round(value, 3) for value in quality])
        assert quality[-1] >= quality[0] + 0.15


def test_a_caption_that_says_the_same_is_no_competitor() -> None:
    """Compared with captions of its own topic, no clip could improve."""
    truths = make_truths(60, SETTINGS)
    videos = [truth.clips for truth in truths]
    spans, _ = play(videos, from_frames(truths, same=1.1), num_rounds=8)
    assert mean_iou(truths, spans[-1]) < mean_iou(truths, spans[0]) + 0.05


def test_an_edit_needs_a_gain_above_the_least() -> None:
    video = video_clips("v", 100, ["a"], [50], SETTINGS)

    def score(_: VideoClips, offered: Sequence[Floats]) -> list[Floats]:
        return [np.where(spans_K2[:, 0] < 40, 0.5 + gain, 0.5) for spans_K2 in offered]

    settings = EditSettings(length_weight=0)
    for gain, accepted in ((0.009, False), (0.011, True)):
        rows = edit_videos([video], base_spans([video]), score, settings, round_number=1, teacher="t").rows
        assert rows["accepted"].to_pylist() == [accepted]
        assert rows["reason"].to_pylist() == ["better" if accepted else "no-better"]
        assert rows["score_before"].to_pylist() == [0.5]
        assert rows["score_after"].to_pylist() == [0.5 + gain if accepted else 0.5]


def test_a_change_of_length_has_its_price() -> None:
    video = video_clips("v", 100, ["a"], [50], SETTINGS)

    def flat(_: VideoClips, offered: Sequence[Floats]) -> list[Floats]:
        return [np.zeros(len(spans_K2)) for spans_K2 in offered]

    settings = EditSettings(length_weight=0.5, min_gain=0.01)
    long = {"v": np.array([[30.0, 60.0]])}  # from 20 s by earlier rounds: back is cheaper
    rows = edit_videos([video], long, flat, settings, round_number=2, teacher="t").rows.to_pylist()
    assert rows[0]["accepted"] and rows[0]["end_s"] - rows[0]["start_s"] == pytest.approx(24)
    assert rows[0]["score_before"] == pytest.approx(-0.5 * np.log(1.5))
    assert (rows[0]["base_start_s"], rows[0]["base_end_s"]) == (40, 60)


def test_overlap_with_a_neighbour_is_capped() -> None:
    video = video_clips("v", 40, ["a", "b"], [10, 20], EditSettings(), spans_s=[[8, 12], [13, 23]])

    def towards_each_other(_: VideoClips, offered: Sequence[Floats]) -> list[Floats]:
        return [offered[0][:, 1], -offered[1][:, 0]]

    for cap in (0.0, 0.5):
        settings = EditSettings(max_overlap=cap, length_weight=0, rings=2)
        spans, _ = play([video], towards_each_other, settings, num_rounds=15)
        share = overlap(spans[-1]["v"][0], spans[-1]["v"][1:])[0]
        assert share <= cap and (cap == 0 or share > 0.2)
        assert overlapping([video], spans[-1], share=0.1) == ([] if cap == 0 else [("a", "b", pytest.approx(share))])


def test_only_the_lowest_scoring_share_is_edited_when_asked_for() -> None:
    truths = make_truths(40, SETTINGS)
    videos, oracle, settings = [t.clips for t in truths], Oracle(truths), EditSettings(lowest_share=0.3)
    spans = base_spans(videos)
    threshold = lowest_threshold(videos, spans, oracle, settings)
    rows = edit_videos(
        videos, spans, oracle, settings, round_number=1, teacher="t", threshold=threshold
    ).rows.to_pylist()
    asked = [row for row in rows if row["reason"] != "not-lowest"]
    assert len(asked) == pytest.approx(0.3 * len(rows), abs=1)
    assert max(row["score_before"] for row in asked) <= threshold
    assert not any(row["accepted"] for row in rows if row["reason"] == "not-lowest")
    assert lowest_threshold(videos, spans, oracle, SETTINGS) == np.inf


# -- properties --------------------------------------------------------------------------------------------------------


def test_the_rows_do_not_depend_on_order_or_on_how_videos_are_dealt_to_workers() -> None:
    truths = make_truths(30, SETTINGS)
    videos, oracle = [t.clips for t in truths], Oracle(truths)
    spans = base_spans(videos)
    whole = edit_videos(videos, spans, oracle, SETTINGS, round_number=1, teacher="t").rows
    shuffled = edit_videos(videos[::-1], spans, oracle, SETTINGS, round_number=1, teacher="t").rows
    assert whole.equals(shuffled)
    for num_workers in (2, 7):
        parts = [
            edit_videos(videos[worker::num_workers], spans, oracle, SETTINGS, round_number=1, teacher="t").rows
            for worker in range(num_workers)
        ]
        dealt = pa.concat_tables(parts).to_pylist()
        assert sorted(dealt, key=lambda row: row["clip_id"]) == sorted(
            whole.to_pylist(), key=lambda row: row["clip_id"]
        )


def test_first_boundaries_and_given_ones_stay_as_they_were() -> None:
    truths = make_truths(10, SETTINGS)
    videos = [t.clips for t in truths]
    spans = base_spans(videos)
    kept = {name: value.tobytes() for name, value in spans.items()}
    bases = [video.base_N2.tobytes() for video in videos]
    edited = edit_videos(videos, spans, Oracle(truths), SETTINGS, round_number=1, teacher="t")
    assert any(edited.rows["accepted"].to_pylist())
    assert {name: value.tobytes() for name, value in spans.items()} == kept
    assert [video.base_N2.tobytes() for video in videos] == bases


def test_every_row_says_who_scored_what() -> None:
    truths = make_truths(10, SETTINGS)
    videos = [t.clips for t in truths]
    edited = edit_videos(videos, base_spans(videos), Oracle(truths), SETTINGS, round_number=3, teacher="abc")
    assert edited.rows.schema == EDITS
    present = {clip: span for v in videos for clip, span in zip(v.clip_ids, edited.spans[v.video_id], strict=True)}
    base = {clip: span for v in videos for clip, span in zip(v.clip_ids, v.base_N2, strict=True)}
    assert edited.rows.num_rows == len(present)
    for row in edited.rows.to_pylist():
        assert (row["round"], row["teacher"]) == (3, "abc")
        assert [row["start_s"], row["end_s"]] == present[row["clip_id"]].tolist()
        assert [row["base_start_s"], row["base_end_s"]] == base[row["clip_id"]].tolist()
        if row["accepted"]:
            assert row["score_after"] > row["score_before"] + SETTINGS.min_gain
        else:
            assert row["score_after"] == row["score_before"]


def test_a_video_that_cannot_be_scored_keeps_its_boundaries_and_is_reported() -> None:
    truths = make_truths(4, SETTINGS)
    videos, oracle = [t.clips for t in truths], Oracle(truths)

    def broken(video: VideoClips, offered: Sequence[Floats]) -> list[Floats]:
        scores = oracle(video, offered)
        return [np.full_like(s, np.nan) for s in scores] if video.video_id == "v002" else scores

    spans = base_spans(videos)
    edited = edit_videos(videos, spans, broken, SETTINGS, round_number=1, teacher="t")
    assert [(video_id, error.error_class) for video_id, error in edited.failures] == [("v002", "bad-score")]
    assert np.array_equal(edited.spans["v002"], spans["v002"])
    assert "v002" not in edited.rows["video_id"].to_pylist()
    assert np.isfinite(lowest_threshold(videos, spans, broken, EditSettings(lowest_share=0.5)))


def test_boundary_shifts_are_measured_from_the_first_boundaries() -> None:
    video = video_clips("v", 100, ["a", "b"], [10, 50], SETTINGS, spans_s=[[8, 18], [45, 55]])
    assert drift([video], base_spans([video]), SETTINGS) == drift([], {}, SETTINGS)
    shorter = drift([video], {"v": np.array([[9.0, 17.0], [48.0, 50.0]])}, SETTINGS)
    assert shorter.median_change == pytest.approx(-0.5)
    assert shorter.share_at_limit == 0.5


def test_iou_is_the_common_part_of_the_union() -> None:
    spans = np.array([[0, 10], [0, 10], [0, 10], [2, 4.0]])
    truth = np.array([[0, 10], [5, 15], [20, 30], [0, 10.0]])
    assert iou(spans, truth).tolist() == [1, pytest.approx(1 / 3), 0, pytest.approx(0.2)]


# -- scores from frame features ----------------------------------------------------------------------------------------


def test_a_caption_is_measured_against_the_mean_of_the_others_at_the_models_temperature() -> None:
    own, bank = np.array([0.8, 0.1]), np.array([[0.2, 0.3], [0.0, -0.5]])
    expected = own - np.log(np.exp(20 * bank).mean(axis=1)) / 20
    np.testing.assert_allclose(contrastive_score(own, bank, np.log(20)), expected, rtol=1e-12)
    far = contrastive_score(np.array([1.0]), np.array([[-1.0, 1.0]]), np.log(1e4))
    assert np.isfinite(far).all()


def test_running_sums_give_the_mean_of_the_frames_between() -> None:
    draw = np.random.default_rng(0)
    times, features = np.arange(0, 10, 0.5), draw.normal(size=(20, 4))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    spans = np.array([[1.0, 3.0], [0.2, 9.9], [4.1, 4.3], [0.0, 0.5], [9.7, 9.9]])
    picked = [slice(2, 6), slice(1, 20), slice(8, 9), slice(0, 1), slice(19, 20)]
    expected = np.stack([features[rows].mean(axis=0) for rows in picked])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(mean_frames(times, running_sums(7 * features), spans), expected, atol=1e-12)


def test_captions_of_the_same_video_are_no_competitors() -> None:
    bank = draw_bank(["a", "a", "b"], np.eye(3), size=512)
    own = np.array([0.0, 0.6, 0.8])
    assert bank.against("a", own, same=0.95).tolist() == [[0, 0, 1]]
    assert len(bank.against("c", own, same=0.95)) == 3
    assert bank.against("c", own, same=0.7).tolist() == [[1, 0, 0], [0, 1, 0]]
    with pytest.raises(ItemError, match="no-bank"):
        Bank(np.eye(1), np.array(["a"], dtype=object)).against("a", np.zeros(1), same=0.95)
    drawn = draw_bank([f"v{n}" for n in range(100)], np.eye(100), size=10, seed=3)
    again = draw_bank([f"v{n}" for n in range(100)], np.eye(100), size=10, seed=3)
    assert len(drawn.video_ids_J) == 10 and (drawn.video_ids_J == again.video_ids_J).all()
