"""The word-level tokenizer: ids as CLIP lays them out, texts back from ids."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from captioning.word_tokenizer import UNKNOWN, WordTokenizer, split_words

WORDS = ("a", "red", "blue", "don't", "circle")
TOKENIZER = WordTokenizer(WORDS, context_length=8)


@given(st.lists(st.sampled_from(WORDS), max_size=6))
def test_known_words_come_back(words):
    ids = TOKENIZER([" ".join(words)])[0].tolist()
    assert ids[0] == TOKENIZER.sot_token_id
    assert ids[len(words) + 1] == TOKENIZER.eot_token_id == max(ids) == TOKENIZER.vocab_size - 1
    assert ids[len(words) + 2 :] == [0] * (6 - len(words))
    assert TOKENIZER.decode(ids) == " ".join(words)


@given(st.text())
def test_any_text_gives_one_row_that_starts_and_ends(text):
    ids = TOKENIZER(text)
    assert ids.shape == (1, 8) and ids.dtype == torch.int64
    assert ids[0, 0] == TOKENIZER.sot_token_id and (ids[0] == TOKENIZER.eot_token_id).sum() == 1
    assert 0 <= int(ids.min()) and int(ids.max()) < TOKENIZER.vocab_size


def test_case_and_punctuation_do_not_matter_and_unknown_words_are_marked():
    assert TOKENIZER.encode("A RED, red; Circle!") == TOKENIZER.encode("a red red circle")
    assert TOKENIZER.encode("a dog") == [2, UNKNOWN]
    assert split_words("Don't stop the round-trip, 4k.") == ["don't", "stop", "the", "round-trip", "4k"]


def test_a_long_text_is_cut_and_still_ends():
    ids = TOKENIZER(["red " * 50])[0].tolist()
    assert ids == [TOKENIZER.sot_token_id, *[3] * 6, TOKENIZER.eot_token_id]
    assert TOKENIZER(["red"], context_length=4).shape == (1, 4)
