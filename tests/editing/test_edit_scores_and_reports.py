"""Editing on plain numbers: rescoring of candidates, limits of a clip's room, rounds without a student, reports."""

import numpy as np
import pytest

from pipeline.editing.frames import stretches_of
from pipeline.editing.report import SHIFT_EDGES, histogram, report_lines
from tests.helpers.boundaries import Oracle, make_truths, mean_iou
from training.editing.boundaries import EDITS, candidates, edit_videos, video_clips
from training.editing.rounds import State, base_spans, rounds
from training.editing.scores import FrameFeatures, FrameScorer, VideoScorer
from training.editing.settings import EditSettings

SETTINGS = EditSettings()
DIM = 8


def one_clip():
    """Return a clip of 10 to 14 s in a video of 30 s whose frames match its text from 12 s on."""
    video = video_clips("v", 30.0, ["v.0"], [12.0], SETTINGS, [(10.0, 14.0)])
    times = np.arange(0, 30, 0.5)
    features = np.tile(np.eye(DIM)[1], (len(times), 1))
    features[times >= 12] = np.eye(DIM)[0]
    frames = FrameScorer({"v": FrameFeatures(times, features)}, {"v.0": np.eye(DIM)[0]}, None, 0.0)
    return video, frames


def test_the_best_candidates_by_frames_are_looked_at_again_as_videos():
    video, frames = one_clip()
    offered = [candidates(video, video.base_N2, 0, SETTINGS)]
    by_frames = frames(video, offered)[0]
    order = [0, *(1 + np.argsort(-by_frames[1:], kind="stable"))]
    asked = []

    def encode(spans_K2):
        asked.append(spans_K2)
        return np.eye(DIM)[[1, 1, 0]]  # the second of the best looks like the text, the others do not

    [scores] = VideoScorer(frames, encode, 2)(video, offered)
    np.testing.assert_array_equal(asked[0], offered[0][order[:3]])
    assert scores[order[2]] == 1 and scores[0] == scores[order[1]] == 0
    assert (scores[order[3:]] <= scores[0] - 2).all()
    edited = edit_videos(
        [video], base_spans([video]), VideoScorer(frames, encode, 2), SETTINGS, round_number=1, teacher="t"
    )
    assert edited.spans["v"].tolist() == [offered[0][order[2]].tolist()]


def test_a_clip_never_leaves_its_room():
    draw = np.random.default_rng(0)
    for number in range(30):
        start = float(draw.uniform(5, 20))
        span = (start, start + float(draw.uniform(2, 9)))
        frames = [span] if number % 2 else None
        video = video_clips("v", 40.0, ["v.0"], [sum(span) / 2], SETTINGS, [span], frames)
        low, high = (span[0], span[1]) if frames else (span[0] - SETTINGS.margin_s, span[1] + SETTINGS.margin_s)
        spans = base_spans([video])
        score = lambda video, offered: [draw.uniform(size=len(spans_K2)) for spans_K2 in offered]  # noqa: E731
        for turn in range(12):
            edited = edit_videos([video], spans, score, EditSettings(rings=2), round_number=turn, teacher="t")
            spans = edited.spans
            assert low - 1e-9 <= spans["v"][0, 0] and spans["v"][0, 1] <= high + 1e-9
            assert edited.rows["reason"][0].as_py().endswith("-without-source") == bool(frames)


def test_stretches_are_the_union_of_rooms():
    rooms = np.array([[5.0, 9.0], [0.0, 4.0], [3.0, 5.0], [20.0, 22.0]])
    assert stretches_of(rooms) == [(0.0, 9.0), (20.0, 22.0)]


def test_without_a_student_rounds_continue_until_nothing_moves():
    truths = make_truths(6, SETTINGS)
    videos = [truth.clips for truth in truths]

    class Alone:
        score = Oracle(truths)

        def teacher(self):
            return "one"

        def train(self, spans):
            return None

        def promote(self):
            raise AssertionError("no training may start")

        restore = promote

    settings = EditSettings(max_rounds=60, max_median_change=None, max_share_at_limit=None)
    played = list(rounds(videos, Alone(), settings, State(1, -np.inf, 1.0, 0, base_spans(videos))))
    assert 3 < len(played) < 60
    assert {round_.row["outcome"][0].as_py() for round_ in played} == {"untrained"}
    accepted = [round_.row["num_accepted"][0].as_py() for round_ in played]
    assert accepted[-1] == 0 and all(accepted[:-1])
    assert mean_iou(truths, played[-1].state.spans) > mean_iou(truths, base_spans(videos)) + 0.15
    assert {round_.row["step_scale"][0].as_py() for round_ in played} == {1.0}


def test_histograms_count_every_clip_once():
    values = np.array([-9.0, -4.0, -0.01, 0.0, 0.009, 0.01, 3.9, 4.0, 100.0])
    bins = histogram(values, SHIFT_EDGES)
    assert [bin_["from"] for bin_ in bins] == [-np.inf, *SHIFT_EDGES]
    assert {bin_["from"]: bin_["num_clips"] for bin_ in bins if bin_["num_clips"]} == {
        -np.inf: 1, -4.0: 1, -0.01: 3, 0.01: 1, 2.0: 1, 4.0: 2,
    }  # fmt: skip
    assert sum(bin_["num_clips"] for bin_ in histogram(EDITS.empty_table()["start_s"].to_numpy(), SHIFT_EDGES)) == 0


@pytest.mark.parametrize(("validation", "said"), [(0.25, "validation R@1 25.0 %"), (None, "not validated")])
def test_the_first_report_line_names_the_teacher_and_its_validation(validation, said):
    row = {"outcome": "warm-up", "teacher": "abc", "validation": validation, "num_clips": 1200}
    assert report_lines(row) == [f"teacher abc: {said}; 1,200 clips to edit"]
