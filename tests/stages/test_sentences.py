"""Words are split into sentences at punctuation, else at pauses, and each word is in exactly one sentence."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.base.errors import ItemError, UserError
from pipeline.stages.segment.sentences import SentenceSettings, restore_punctuation, split_sentences
from pipeline.stages.transcribe.words import Word, join_words, tokens


def timed(text: str, word_s: float = 0.3, gap_s: float = 0.05) -> list[Word]:
    return [
        Word(token, k * (word_s + gap_s), k * (word_s + gap_s) + word_s) for k, (_, _, token) in enumerate(tokens(text))
    ]


def sentences(text: str, **settings) -> list[str]:
    return [sentence.text for sentence in split_sentences(timed(text), SentenceSettings(**settings))]


@pytest.mark.parametrize(
    "parts",
    [
        ["It moves.", "It stops!", "Why?", "Nobody knows."],
        ["Dr. Smith met Mrs. J. R. Jones at 3.14 p.m. on Main St. today.", "They left."],
        ["The U.S. economy grew, e.g. in services.", "It did."],
        ["It costs $5.", "No. 5 is free.", "No.", "Really."],
        ["Well... maybe it does.", "Then...", "Who knows?"],
        ["He said “stop.”", "She left (quickly!)", "And then."],
        ["1. Open the box.", "Take it out.", "That was in 2024.", "Now it is late."],
        ["lower case speech.", "has stops too.", "see?"],
        ["他是谁？", "我不知道。", "走吧！"],
        ["Est-ce vrai ?", "Oui !", "Bon."],
        ["So it was I.", "You saw."],
    ],
)
def test_punctuation_ends_sentences_and_abbreviations_do_not(parts):
    assert sentences(" ".join(parts)) == [join_words(text for _, _, text in tokens(part)) for part in parts]


def test_without_punctuation_pauses_end_sentences():
    words = [*timed("red circle moves past")]
    later = words[-1].end_s + 0.9
    words += [Word(word.text, word.start_s + later, word.end_s + later) for word in timed("the blue square")]
    assert [s.text for s in split_sentences(words)] == ["red circle moves past", "the blue square"]
    assert len(split_sentences(words, SentenceSettings(pause_s=1.0))) == 1


def test_with_punctuation_a_pause_ends_nothing_but_a_long_silence_does():
    words = timed("It moves, and then it stops.")
    shifted = [*words[:2], *(Word(w.text, w.start_s + 1.5, w.end_s + 1.5) for w in words[2:])]
    assert len(split_sentences(shifted)) == 1
    shifted = [*words[:2], *(Word(w.text, w.start_s + 9, w.end_s + 9) for w in words[2:])]
    assert [s.text for s in split_sentences(shifted)] == ["It moves,", "and then it stops."]


def test_endless_speech_is_broken_at_commas_and_pauses():
    rng = random.Random(0)
    text = " ".join(rng.choice(["red", "blue", "green"]) + ("," if k % 9 == 8 else "") for k in range(200))
    found = split_sentences(timed(text), SentenceSettings(max_words=40))
    assert all(s.last_word - s.first_word < 40 for s in found)
    assert all(s.text.endswith(",") for s in found[:-1])


@given(
    st.lists(
        st.tuples(st.sampled_from(["red", "moves.", "a,", "Dr.", "why?", "圆", "..."]), st.floats(0, 5)), max_size=80
    ),
    st.integers(2, 20),
)
def test_every_word_is_in_exactly_one_sentence(spoken, max_words):
    at, words = 0.0, []
    for text, gap in spoken:
        words.append(Word(text, at, at + 0.3))
        at += 0.3 + gap
    found = split_sentences(words, SentenceSettings(max_words=max_words))
    covered = [k for s in found for k in range(s.first_word, s.last_word + 1)]
    assert covered == list(range(len(words)))
    assert [s.text for s in found] == [join_words(w.text for w in words[s.first_word : s.last_word + 1]) for s in found]
    assert all(s.last_word - s.first_word < max_words for s in found)


# --- punctuation restored ------------------------------------------------------------------------------------------


def capitalise(words: list[str]) -> str:
    """Restore punctuation: a stop after every fourth word, and numbers written differently."""
    return " ".join(("7" if word == "seven" else word) + ("." if k % 4 == 3 else "") for k, word in enumerate(words))


def broken(words: list[str]) -> str:
    raise RuntimeError("out of memory")


def silent(words: list[str]) -> str:
    return ""


def test_a_restorer_punctuates_and_the_word_times_stay():
    words = timed("red circles move on past seven blue squares")
    settings = SentenceSettings(punctuate=f"{__name__}:capitalise")
    restored, costs = restore_punctuation(words, settings)
    assert [word.text for word in restored] == "red circles move on. past 7 blue squares.".split()
    assert [word.start_s for word in restored] == pytest.approx([word.start_s for word in words], abs=0.11)
    assert len(split_sentences(restored, settings)) == 2
    assert [cost > 0 for cost in costs] == [k == 5 for k in range(8)]


def test_without_a_restorer_words_are_as_they_were():
    words = timed("red circles")
    assert restore_punctuation(words, SentenceSettings()) == (words, [0.0, 0.0])


@pytest.mark.parametrize(("name", "message"), [("broken", "out of memory"), ("silent", "without words")])
def test_a_failing_restorer_is_that_transcript_s_failure(name, message):
    with pytest.raises(ItemError, match=message) as failure:
        restore_punctuation(timed("red"), SentenceSettings(punctuate=f"{__name__}:{name}"))
    assert failure.value.error_class == "punctuation-failed"


@pytest.mark.parametrize(
    "path",
    [
        "no.such.module:f",
        "pipeline.stages.transcribe.words:no_such_function",
        "pipeline.stages.transcribe.words:__name__",
    ],
)
def test_a_restorer_that_is_not_there_is_the_user_s_mistake(path):
    with pytest.raises(UserError, match="segment.punctuate"):
        restore_punctuation(timed("red"), SentenceSettings(punctuate=path))
