"""CLIP's vocabulary is read without importing open_clip, and gives the ids that open_clip gives."""

import pickle
import random
import sys

import pytest
import torch

from tests.helpers.ranks import run_ranks
from training.data.tokenizer import TextEncoder

TEXTS = [
    "",
    "A photo of a cat.",
    "  two\n\nlines\t",
    "don't &amp; won't &lt;b&gt;",
    "naïve café 😀",
    "日本語",
    "1234 + 56%",
]


@pytest.mark.parametrize("max_tokens", [8, 77])
def test_it_gives_the_same_ids(max_tokens: int) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    drawn = random.Random(0)
    texts = [*TEXTS, *("".join(chr(drawn.randrange(32, 0x2FF)) for _ in range(60)) for _ in range(200))]
    ids = TextEncoder(None, max_tokens)(texts)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, SimpleTokenizer(context_length=max_tokens)(texts))


def test_it_travels_to_other_processes_after_its_first_use() -> None:
    texts = TextEncoder(None, 16)
    ids = texts(TEXTS)
    assert len(pickle.dumps(texts)) < 200 and torch.equal(pickle.loads(pickle.dumps(texts))(TEXTS), ids)


def _encode(rank: int) -> None:
    TextEncoder(None, 8)(TEXTS)
    assert not {"open_clip", "torchvision", "timm"} & sys.modules.keys()


@pytest.mark.slow
def test_nothing_else_of_open_clip_is_imported() -> None:
    run_ranks(1, _encode)
