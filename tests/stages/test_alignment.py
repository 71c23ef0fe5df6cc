"""Alignment of a text with timed words: the cheapest path within the band, despite omissions and repeats."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.stages.segment.sentences import SentenceSettings, split_sentences
from pipeline.stages.transcribe import alignment as alignment_module
from pipeline.stages.transcribe.alignment import (
    MAX_BAND,
    SCALE,
    align,
    band_of,
    normalise,
    pair_costs,
    retime,
)
from pipeline.stages.transcribe.words import Word
from tests.helpers.call_count import count_calls

words_of_few_letters = st.text("ab", max_size=4)
sequences = st.lists(
    st.sampled_from(["red", "reed", "blue", "circle", "circles", "a", "the", "42"]), min_size=1, max_size=9
)


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def cost(a: str, b: str) -> int:
    return round(SCALE * levenshtein(a, b) / max(len(a), len(b), 1))


def cheapest_by_trying_all(u: list[str], w: list[str], band: int) -> int:
    """Compute the recurrence of the specification cell by cell."""
    known: dict[tuple[int, int], float] = {}
    for i in range(len(u)):
        centre = i * (len(w) - 1) // (len(u) - 1) if len(u) > 1 else 0
        for j in range(len(w)):
            if abs(j - centre) > band:
                continue
            steps = [known.get(cell, float("inf")) for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1))]
            known[i, j] = cost(u[i], w[j]) + (min(steps) if i or j else 0)
    return int(known[len(u) - 1, len(w) - 1])


@given(st.lists(words_of_few_letters, min_size=1, max_size=6), st.lists(words_of_few_letters, min_size=1, max_size=6))
def test_pair_costs_equal_the_textbook_s(patterns, targets):
    assert pair_costs(patterns, targets).tolist() == [[cost(a, b) for b in targets] for a in patterns]


@given(sequences, sequences)
def test_alignment_equals_brute_force(u, w):
    alignment = align(u, w)
    assert round(alignment.total * SCALE) == cheapest_by_trying_all(u, w, band_of(len(u), len(w)))
    path = list(zip(alignment.rows.tolist(), alignment.columns.tolist(), strict=True))
    assert path[0] == (0, 0) and path[-1] == (len(u) - 1, len(w) - 1)
    assert {(b[0] - a[0], b[1] - a[1]) for a, b in zip(path, path[1:], strict=False)} <= {(1, 1), (1, 0), (0, 1)}
    assert alignment.costs.tolist() == [cost(u[i], w[j]) / SCALE for i, j in path]


@pytest.mark.parametrize(("num_text", "num_timed"), [(300, 300), (260, 330), (330, 260), (1, 400), (400, 1), (3, 500)])
def test_alignment_equals_brute_force_where_the_band_binds(num_text, num_timed):
    rng = random.Random(num_text)
    vocabulary = ["red", "blue", "circle", "square", "moves", "past", "the"]
    u, w = rng.choices(vocabulary, k=num_text), rng.choices(vocabulary, k=num_timed)
    assert round(align(u, w).total * SCALE) == cheapest_by_trying_all(u, w, band_of(num_text, num_timed))


def test_the_band_is_that_of_the_specification():
    assert band_of(100, 100) == 50 and band_of(4000, 4000) == 200
    assert band_of(100_000, 100_000) == 1000  # memory is limited
    assert band_of(2, 500) == 250  # the ends can always be joined


def test_case_punctuation_and_unicode_form_do_not_count():
    assert normalise("“Don't!”") == normalise("don’t") == "dont"
    assert normalise("Ｆｕｌｌ") == "full" and normalise("É") == normalise("e\u0301")
    assert normalise("...") == "..."
    assert pair_costs(["red"], ["red", "bed", "redder"]).tolist() == [[0, 3333, 5000]]


def narrated(seed: int, num_words: int) -> list[Word]:
    rng, at, words = random.Random(seed), 0.0, []
    vocabulary = ["".join(rng.choices("aeiounstrl", k=rng.randint(2, 9))) for _ in range(400)]
    for _ in range(num_words):
        length = rng.uniform(0.15, 0.5)
        words.append(Word(rng.choice(vocabulary), round(at, 3), round(at + length, 3)))
        at += length + (0.6 if rng.random() < 0.08 else 0.02)
    return words


def damaged(
    words: list[Word], seed: int, dropped: float = 0.0, repeated: float = 0.0, misheard: float = 0.0
) -> list[Word]:
    rng, result = random.Random(seed), []
    for word in words:
        if rng.random() < dropped:
            continue
        text = word.text[:-1] + "x" if rng.random() < misheard and len(word.text) > 3 else word.text
        result.append(Word(text, word.start_s, word.end_s))
        if rng.random() < repeated:
            result.append(Word(text, word.end_s, word.end_s))
    return result


def rolled(words: list[Word]) -> list[Word]:
    """Repeat every line of six words at the time of the next line, as roll-up captions do."""
    result = []
    for first in range(0, len(words), 6):
        line = words[first : first + 6]
        result += line + [Word(word.text, line[-1].end_s, line[-1].end_s) for word in line]
    return result


@pytest.mark.parametrize(
    "damage",
    [
        lambda words: words,
        lambda words: damaged(words, 1, dropped=0.1),
        lambda words: damaged(words, 2, repeated=0.1),
        lambda words: damaged(words, 3, misheard=0.1),
        lambda words: damaged(words, 4, dropped=0.1, repeated=0.1, misheard=0.1),
        rolled,
    ],
    ids=["clean", "drops", "repeats", "misheard", "all", "rolling"],
)
def test_sentence_boundaries_are_within_a_fifth_of_a_second(damage):
    truth = narrated(7, 900)
    punctuated = [Word(word.text + ("." if k % 17 == 16 else ""), 0.0, 0.0) for k, word in enumerate(truth)]
    found, costs = retime(punctuated, damage(truth))
    sentences = split_sentences(punctuated, SentenceSettings())
    assert len(sentences) == 53
    errors = [abs(found[s.first_word].start_s - truth[s.first_word].start_s) for s in sentences]
    errors += [abs(found[s.last_word].end_s - truth[s.last_word].end_s) for s in sentences]
    assert np.median(errors) <= 0.2
    assert all(a.end_s <= b.start_s and a.start_s <= a.end_s for a, b in zip(found, found[1:], strict=False))
    assert costs.shape == (900,) and costs.mean() < 0.5


def test_words_that_were_not_heard_keep_their_own_time_between_those_that_were():
    text = [Word("red", 0.0, 1.0), Word("gigantic", 1.0, 2.0), Word("circle", 2.0, 3.0)]
    found, costs = retime(text, [Word("red", 10.0, 10.5), Word("circle", 13.0, 13.5)])
    assert [(word.start_s, word.end_s) for word in (found[0], found[2])] == [(10.0, 10.5), (13.0, 13.5)]
    assert 10.5 <= found[1].start_s <= found[1].end_s <= 13.0
    assert costs[0] == costs[2] == 0 and costs[1] > 0.5


@pytest.mark.slow
def test_a_long_transcript_is_aligned_in_seconds(monkeypatch):
    """A word is compared only with those in the band, by numpy, so there are far fewer calls than pairs."""
    cells, step = [], alignment_module._step
    monkeypatch.setattr(
        alignment_module, "_step", lambda buffer, cost, *a: cells.append(len(cost)) or step(buffer, cost, *a)
    )
    truth = narrated(3, 20_000)
    heard = damaged(truth, 5, dropped=0.1, misheard=0.05)
    words = ([word.text for word in truth], [word.text for word in heard])
    alignment, num_calls = count_calls(align, *words)
    assert len(cells) == 20_000 and max(cells) <= 2 * MAX_BAND + 1
    assert num_calls < 10_000_000  # of 40 million pairs
    assert alignment.word_costs(len(truth)).mean() < 0.2
