"""A word-level tokenizer for the demo models: each word of a fixed vocabulary is a token.

It replaces CLIP's tokenizer (same call, same attributes), whose 49,408 embeddings would be most of a tiny model. As in
CLIP, padding is 0 and the end token has the highest id, so that pooling by argmax finds it. Any text may come in.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

PAD, UNKNOWN = 0, 1
_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")


class WordTokenizer:
    """A tokenizer with the ids 0 for padding, 1 for unknown words, then the words in order, start and end."""

    def __init__(self, words: Sequence[str], context_length: int):
        assert len(set(words)) == len(words), "the vocabulary has a word twice"
        self.words = tuple(words)
        self.context_length = context_length
        self.sot_token_id = len(words) + 2
        self.eot_token_id = len(words) + 3
        self.vocab_size = len(words) + 4

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words, 2)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text's words, without start and end."""
        return [self._ids.get(word, UNKNOWN) for word in split_words(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words of ids, joined by spaces; ids of no word are left out."""
        return " ".join(self.words[i - 2] for i in ids if 2 <= i < self.sot_token_id)

    def __call__(self, texts: str | list[str], context_length: int | None = None):
        """Tokenise texts to int64 [len(texts), context_length]; longer texts are cut before their end token."""
        import torch

        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        ids_BL = torch.full((len(texts), length), PAD, dtype=torch.long)
        for row, text in zip(ids_BL, texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text)[: length - 2], self.eot_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return ids_BL


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words without punctuation, as in automatic subtitles; keep inner ' and -."""
    return _WORD.findall(text.lower())
