"""A word-level tokenizer for models of a small world: every word of a fixed vocabulary is one token.

It stands in for CLIP's tokenizer (same call, same attributes), whose 49,408 entries would be most of a tiny model.
As in CLIP, padding is 0 and the end token has the highest id, so pooling by argmax finds it.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

PAD, UNKNOWN = 0, 1
_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")


class WordTokenizer:
    """ids: 0 padding, 1 any unknown word, then the words as given, then start, then end."""

    def __init__(self, words: Sequence[str], context_length: int):
        assert len(set(words)) == len(words), "a word appears twice in the vocabulary"
        self.words = tuple(words)
        self.context_length = context_length
        self.sot_token_id = len(words) + 2
        self.eot_token_id = len(words) + 3
        self.vocab_size = len(words) + 4

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words, 2)}

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, UNKNOWN) for word in split_words(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The words, joined by spaces; ids that stand for no word are left out."""
        return " ".join(self.words[i - 2] for i in ids if 2 <= i < self.sot_token_id)

    def __call__(self, texts: str | list[str], context_length: int | None = None):
        """ids [len(texts), context_length], int64; longer texts are cut, their last id is the end token."""
        import torch

        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        ids_BL = torch.full((len(texts), length), PAD, dtype=torch.long)
        for row, text in zip(ids_BL, texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text)[: length - 2], self.eot_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return ids_BL


def split_words(text: str) -> list[str]:
    """Lower-case words; inner apostrophes and hyphens stay, punctuation goes, as in automatic subtitles."""
    return _WORD.findall(text.lower())
