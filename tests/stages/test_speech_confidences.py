"""Sentences, spans and clips say how sure speech recognition was of their words."""

import pytest

from pipeline.stages.segment.segment import SegmentSettings, segment_video
from pipeline.stages.transcribe.words import Word

WORDS = [Word(text, float(k), k + 0.9) for k, text in enumerate("One two three. Four five six seven.".split())]
SURE = {"avg_logprob": -0.1, "no_speech_prob": 0.0, "compression_ratio": 1.0}
UNSURE = {"avg_logprob": -1.1, "no_speech_prob": 0.8, "compression_ratio": 3.0}
SEGMENTS = [{"start_s": 0.0, "end_s": 2.9, **SURE}, {"start_s": 3.0, "end_s": 6.9, **UNSURE}]


def rows(segments, given=None, **settings):
    return segment_video("v", WORDS, 7.0, given, None, SegmentSettings(**settings), segments)


def confidences(row: dict) -> dict:
    return {name: row[name] for name in SURE}


def test_a_sentence_has_those_of_its_segment():
    assert [confidences(row) for row in rows(SEGMENTS).sentences] == [pytest.approx(SURE), pytest.approx(UNSURE)]


def test_a_span_has_the_mean_over_its_seconds_of_each():
    given = [{"n": 0, "start_s": 2.0, "end_s": 3.9}, {"n": 1, "start_s": 3.0, "end_s": 6.0}]
    both, second = rows(SEGMENTS, given).spans
    half = {name: (SURE[name] + UNSURE[name]) / 2 for name in SURE}
    assert confidences(both) == pytest.approx(half) and confidences(second) == pytest.approx(UNSURE)


@pytest.mark.parametrize("segments", [(), [{"start_s": 50.0, "end_s": 60.0, **SURE}]])
def test_words_of_subtitles_have_none(segments):
    found = rows(segments)
    assert {confidences(row)["avg_logprob"] for row in found.sentences + found.spans} == {None}
