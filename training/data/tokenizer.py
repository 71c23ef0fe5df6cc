"""Convert texts to token ids, with CLIP's byte-pair vocabulary or a model's own word list."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizer with a small pickle; each process reads the vocabulary at first use.

    words       a model's own word list (`captioning.word_tokenizer`); None: CLIP's
    max_tokens  of a text, both ends included; a longer text is cut and keeps its end token
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
