"""Spans of speech hold whole sentences in a length range, with each word once and at its time."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.stages.segment.segment import ROUNDING_S, Segmented, SegmentSettings, needs_shots, segment_video
from pipeline.stages.segment.sentences import split_sentences
from pipeline.stages.transcribe.words import Word, join_words
from shards.corpus.schema import TABLES


def speech(seed: int, num_sentences: int = 60, punctuation: bool = True, words_per_s: float = 2.4) -> list[Word]:
    """Simulate speech: sentences of 8 to 40 words with commas, short pauses between them, and some long ones."""
    rng, words = random.Random(seed), []
    at = rng.uniform(0, 5)
    for _ in range(num_sentences):
        count = rng.randint(8, 40)
        for k in range(count):
            length = max(0.1, rng.gauss(1 / words_per_s, 0.08))
            text = rng.choice(["we", "go", "to", "the", "building", "is", "something"])
            if punctuation:
                text += "." if k == count - 1 else "," if rng.random() < 0.08 else ""
            words.append(Word(text, round(at, 3), round(at + 0.9 * length, 3)))
            at += length
        at += rng.uniform(2, 8) if rng.random() < 0.05 else rng.choice([0.1, 0.2, 0.3, 0.5, 0.8, 1.5])
    return words


def segmented(
    words: list[Word], duration_s: float | None = None, given_spans=None, shots=None, **settings
) -> Segmented:
    if duration_s is None:
        duration_s = words[-1].end_s + 2 if words else 0.0
    return segment_video("vid", words, duration_s, given_spans, shots, SegmentSettings(**settings))


def lengths(result: Segmented) -> list[float]:
    return [span["end_s"] - span["start_s"] for span in result.spans]


def test_defaults_reproduce_hd_vila_s_means_on_realistic_speech():
    results = [segmented(speech(seed, punctuation=punctuation)) for seed in range(10) for punctuation in (True, False)]
    assert statistics.mean(length for result in results for length in lengths(result)) == pytest.approx(13.4, abs=0.8)
    words_per_clip = statistics.mean(span["num_words"] for result in results for span in result.spans)
    assert words_per_clip == pytest.approx(32.5, abs=2)
    assert not any(result.dropped for result in results)


def test_rows_have_the_columns_of_the_tables_and_agree_with_each_other():
    result = segmented(speech(1))
    for table, rows in (("sentences", result.sentences), ("spans", result.spans)):
        assert list(rows[0]) == [name for name in TABLES[table].names if name != "source_sha256"]  # the worker's stamp
    for n, span in enumerate(result.spans):
        own = [sentence for sentence in result.sentences if sentence["clip_id"] == span["clip_id"]]
        assert span["clip_id"] == f"vid.{n}" and span["n"] == n and span["origin"] == "sentences"
        assert span["text"] == join_words(sentence["text"] for sentence in own)
        assert span["num_words"] == sum(sentence["num_words"] for sentence in own)
        assert span["num_sentences"] == len(own)
        assert span["start_s"] == own[0]["start_s"] and span["end_s"] == own[-1]["end_s"]
        assert span["align_cost"] == 0.0


def test_sentences_stay_whole_where_they_fit():
    words = speech(2)
    result = segmented(words)
    assert [s["text"] for s in result.sentences] == [s.text for s in split_sentences(words)]
    assert all(span["text"].endswith(".") for span in result.spans)


def test_a_sentence_that_is_too_long_is_cut_at_its_pauses():
    words, at = [], 0.0
    for k in range(90):
        words.append(Word(f"w{k}", at, at + 0.4))
        at += 1.4 if k % 30 == 29 else 0.45
    result = segmented(words, max_words=200, pause_s=2.0)
    assert [span["text"].split()[0] for span in result.spans] == ["w0", "w30", "w60"]
    assert len(result.sentences) == 3


def test_no_span_reaches_across_a_long_silence():
    words = [Word("one.", 0.0, 4.0), Word("two.", 4.5, 9.0), Word("three.", 15.0, 20.0), Word("four.", 20.1, 24.0)]
    result = segmented(words)
    assert [span["text"] for span in result.spans] == ["one. two.", "three. four."]
    assert [(span["start_s"], span["end_s"]) for span in result.spans] == [(0.0, 9.0), (15.0, 24.0)]


def test_short_speech_takes_silence_along_or_is_dropped_and_counted():
    words = [Word("Hello.", 10.0, 10.4), Word("Bye.", 20.0, 20.4)]
    wide = segmented(words, 30.0)
    assert lengths(wide) == pytest.approx([2.0, 2.0])
    assert [(span["start_s"], span["text"]) for span in wide.spans] == [(pytest.approx(9.2), "Hello."), (19.2, "Bye.")]
    none = segmented(words, 30.0, short="drop")
    assert none.spans == [] and none.dropped == {"too-short": 2}
    assert [sentence["clip_id"] for sentence in none.sentences] == [None, None]


def test_a_short_rest_beside_a_full_span_is_evened_out_between_words():
    words = [Word(f"w{k}", k * 0.5, k * 0.5 + 0.5) for k in range(59)]  # 29.5 s
    words = [*words[:-1], Word("stop.", 29.0, 29.5), Word("Yes.", 29.5, 30.5)]
    result = segmented(words, 30.5, max_words=200)
    assert min(lengths(result)) >= 2.0 and max(lengths(result)) <= 30.0
    assert join_words(span["text"] for span in result.spans) == join_words(word.text for word in words)
    assert result.dropped == {}


def test_a_video_shorter_than_the_range_has_no_spans():
    result = segmented([Word("Hello.", 0.2, 0.9)], 1.0)
    assert result.spans == [] and result.dropped == {"too-short": 1}


def test_padding_takes_silence_but_never_a_neighbour_s_half():
    words = [Word("one.", 5.0, 10.0), Word("two.", 14.0, 20.0), Word("three.", 20.6, 33.0)]
    result = segmented(words, 33.5, pad_s=1.0, max_gap_s=0.5)
    assert [(span["start_s"], span["end_s"]) for span in result.spans] == [
        (4.0, 11.0),
        (13.0, pytest.approx(20.3)),
        (pytest.approx(20.3), 33.5),
    ]


def test_words_past_the_end_have_sentences_but_no_span_and_are_counted():
    words = [Word("In", 0.0, 3.0), Word("time.", 3.0, 6.5), Word("Too", 6.6, 7.0), Word("late.", 7.0, 8.0)]
    result = segmented(words, 6.0)
    assert [(span["text"], span["end_s"]) for span in result.spans] == [("In time.", 6.0)]
    assert [(s["text"], s["clip_id"]) for s in result.sentences] == [("In time.", "vid.0"), ("Too late.", None)]
    assert result.dropped == {"past-the-end": 2}


def test_min_words_merges_first_and_leaves_out_what_stays_below():
    words = [Word("One.", 0.0, 6.0), Word("Two.", 6.0, 20.0), Word("Three.", 60.0, 70.0)]
    result = segmented(words, 80.0, min_words=2)
    assert [span["text"] for span in result.spans] == ["One. Two."]
    assert result.dropped == {"too-few-words": 1}


@pytest.mark.parametrize("settings", [{"max_s": 3.0}, {"target_s": 40}, {"min_s": 14.0}, {"min_s": 10, "max_s": 19}])
def test_a_range_that_cannot_be_kept_is_refused(settings):
    with pytest.raises(ValidationError, match="must"):
        SegmentSettings(**settings)


# --- properties ----------------------------------------------------------------------------------------------------

tokens = st.sampled_from(["red", "circle", "moves.", "and,", "why?", "圆"])
gaps = st.one_of(st.just(0.0), st.floats(0, 0.5), st.floats(0, 8))
transcripts = st.lists(st.tuples(tokens, st.floats(0.02, 1.2) | st.floats(0.02, 40), gaps), min_size=1, max_size=120)
ranges = st.tuples(st.floats(0.5, 6), st.floats(2, 6), st.floats(0, 1)).map(
    lambda x: {"min_s": x[0], "max_s": x[0] * x[1], "target_s": x[0] + x[2] * (x[0] * x[1] - x[0])}
)


@given(transcripts, ranges, st.floats(0, 2), st.floats(0.3, 5), st.sampled_from(["extend", "drop"]), st.floats(0, 1.2))
def test_spans_are_ordered_inside_the_video_in_range_and_hold_exactly_what_is_said_in_them(
    spoken, length_range, pad_s, max_gap_s, short, known
):
    words, at = [], 0.0
    for text, length, gap in spoken:
        at += gap
        words.append(Word(text, at, at + length))
        at += length
    duration_s = at * known
    settings = SegmentSettings(**length_range, pad_s=pad_s, max_gap_s=max_gap_s, short=short)
    result = segment_video("vid", words, duration_s, None, None, settings)

    assert join_words(s["text"] for s in result.sentences) == join_words(word.text for word in words)
    assert sum(s["num_words"] for s in result.sentences) == len(words)
    assert sum(span["num_words"] for span in result.spans) + sum(result.dropped.values()) == len(words)
    for before, after in zip(result.spans, result.spans[1:], strict=False):
        assert before["end_s"] <= after["start_s"]
    for span in result.spans:
        assert 0 <= span["start_s"] < span["end_s"] <= (duration_s or math.inf)
        assert settings.min_s - ROUNDING_S <= span["end_s"] - span["start_s"] <= settings.max_s + ROUNDING_S
        held = [n for n, sentence in enumerate(result.sentences) if sentence["clip_id"] == span["clip_id"]]
        start = sum(sentence["num_words"] for sentence in result.sentences[: min(held, default=0)])
        for k, word in enumerate(words):
            end_s = min(word.end_s, word.start_s + settings.max_s, duration_s or math.inf)
            if start <= k < start + span["num_words"]:
                assert span["start_s"] <= word.start_s + ROUNDING_S and end_s <= span["end_s"] + ROUNDING_S
            else:
                assert end_s <= span["start_s"] + ROUNDING_S or word.start_s >= span["end_s"] - ROUNDING_S
        assert span["text"] == join_words(word.text for word in words[start : start + span["num_words"]])


@given(transcripts)
def test_the_same_words_give_the_same_rows(spoken):
    words = [Word(text, float(k), k + 0.5) for k, (text, _, _) in enumerate(spoken)]
    assert segmented(words) == segmented(list(words))


# --- other origins -------------------------------------------------------------------------------------------------


def span(n, start_s, end_s):
    return {"n": n, "start_s": start_s, "end_s": end_s}


def test_given_spans_are_kept_as_they_are_with_what_is_said_in_them():
    words = [Word(f"w{k}", float(k), k + 1.0) for k in range(10)]
    given_spans = [span(7, 0.0, 2.4), span(3, 2.6, 5.0), span(9, 4.0, 6.0), span(12, 500.0, 510.25)]
    result = segmented(words, 10.0, given_spans)
    assert [(s["clip_id"], s["start_s"], s["end_s"], s["text"], s["origin"]) for s in result.spans] == [
        ("vid.7", 0.0, 2.4, "w0 w1", "given"),
        ("vid.3", 2.6, 5.0, "w3 w4", "given"),  # w2 is spoken across the border of the spans, half outside both
        ("vid.9", 4.0, 6.0, "w4 w5", "given"),  # given spans may overlap
        ("vid.12", 500.0, 510.25, "", "given"),  # past the end: kept, and reported by the cutter
    ]
    assert result.dropped == {"outside-given-spans": 5}
    assert segmented(words, 10.0, given_spans, mode="sentences").spans[0]["origin"] == "sentences"


def test_given_spans_without_numbers_are_numbered_by_position():
    result = segmented([], 10.0, [span(None, 0, 1), span(0, 1, 2), span(None, 2, 3)])
    assert [s["clip_id"] for s in result.spans] == ["vid.1", "vid.0", "vid.2"]


def test_two_given_spans_with_one_number_fail():
    from clipmill.base.errors import ItemError

    with pytest.raises(ItemError, match="duplicate-clip-id"):
        segmented([], 10.0, [span(1, 0, 1), span(1, 1, 2)])


@given(st.floats(0.1, 500), ranges)
def test_a_video_without_words_is_cut_evenly_in_range(duration_s, length_range):
    result = segmented([], duration_s, **length_range)
    assert bool(result.spans) == (duration_s >= length_range["min_s"])
    for length in lengths(result):
        assert length_range["min_s"] - ROUNDING_S <= length <= length_range["max_s"] + ROUNDING_S
    if result.spans:
        assert result.spans[0]["start_s"] == 0.0 and result.spans[-1]["end_s"] == duration_s
        assert {s["origin"] for s in result.spans} == {"fixed"} and {s["text"] for s in result.spans} == {""}


def test_a_video_without_words_follows_the_setting():
    assert segmented([], 60.0, wordless="skip").spans == []
    by_shot = segmented([], 60.0, shots=[(0.0, 9.0), (9.0, 60.0)], wordless="shots")
    assert by_shot.spans[0]["end_s"] == 9.0 and {s["origin"] for s in by_shot.spans} == {"shots"}
    assert segmented([], 0.0).spans == []  # no words are known there


def test_shots_are_spans_with_what_is_said_in_them():
    words = [Word(f"w{k}", float(k), k + 1.0) for k in range(60)]
    result = segmented(words, 60.0, shots=[(0.0, 8.0), (8.0, 9.5), (9.5, 60.0)], mode="shots")
    assert [(s["start_s"], s["end_s"]) for s in result.spans][0] == (0.0, 8.0)
    assert len(result.spans) == 5 and max(lengths(result)) == pytest.approx(50.5 / 4)
    assert result.spans[0]["text"] == join_words(f"w{k}" for k in range(8))
    assert result.dropped == {"outside-shots": 1, "short-shot": 1}  # w8; w9's middle is at 9.5
    assert sum(s["num_words"] for s in result.spans) == 59


def test_shots_are_asked_for_only_where_they_are_needed():
    word = [Word("a", 0.0, 1.0)]
    assert not needs_shots([], None, SegmentSettings())
    assert needs_shots([], None, SegmentSettings(wordless="shots"))
    assert not needs_shots(word, None, SegmentSettings(wordless="shots"))
    assert needs_shots(word, [span(0, 0, 1)], SegmentSettings(mode="shots"))
    assert not needs_shots([], [span(0, 0, 1)], SegmentSettings(wordless="shots"))


def test_restored_punctuation_costs_show_in_sentences_and_spans():
    words = [Word(text, float(k), k + 0.9) for k, text in enumerate("red circles move on past seven squares".split())]
    result = segmented(words, 8.0, punctuate=f"{__name__}:with_a_changed_word")
    assert [s["text"] for s in result.sentences] == ["Red circles move on.", "Past 7 squares."]
    assert [s["align_cost"] for s in result.sentences] == [0.0, pytest.approx(1 / 3, abs=0.01)]
    assert result.spans[0]["align_cost"] == pytest.approx(1 / 7, abs=0.01)


def with_a_changed_word(words: list[str]) -> str:
    return "Red circles move on. Past 7 squares."
