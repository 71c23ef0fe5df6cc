"""Texts to token ids: CLIP's byte-pair vocabulary, or the word list of a small world's model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TextEncoder:
    """Small enough to travel to every loader process; the vocabulary is read where it is first used.

    words       a model's own word list (`captioning.word_tokenizer`); None: CLIP's
    max_tokens  both ends included: longer texts are cut and still close with the end token
    """

    words: tuple[str, ...] | None
    max_tokens: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokenise texts: int64 ids [N, max_tokens]; the end token has the largest id, 0 follows it."""
        return self._tokenizer(list(texts), self.max_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the vocabulary, even if it has been read."""
        return TextEncoder, (self.words, self.max_tokens)

    @cached_property
    def _tokenizer(self) -> Any:
        if self.words is not None:
            from captioning.word_tokenizer import WordTokenizer

            return WordTokenizer(self.words, self.max_tokens)
        from training.data.clip_tokenizer import SimpleTokenizer

        return SimpleTokenizer(context_length=self.max_tokens)
