"""Texts to token ids: CLIP's byte-pair vocabulary, or the word list of a small world's model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clipmill.base.errors import UserError

if TYPE_CHECKING:  # loader processes import this file and need no model
    from training.models.clip_vip.model import ModelConfig


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


def text_encoder(config: "ModelConfig", max_tokens: int) -> TextEncoder:
    """Return the encoder of a model's texts. Raises UserError where the model reads no text of that length."""
    if max_tokens > config.context_length:
        raise UserError(
            f"data.max_text_tokens = {max_tokens}: the model reads at most {config.context_length}, "
            "both end tokens included."
        )
    return TextEncoder(config.words, max_tokens)
