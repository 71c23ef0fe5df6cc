"""A large contrastive batch in small chunks, with the gradient of the whole batch (GradCache, arXiv 2101.06983).

The encoders run twice: once without a graph for the features, once per chunk with one, under the same random state.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")
FeatureSets = tuple[Tensor | None, ...]


def cached_backward(
    encode: Callable[[Chunk], FeatureSets],
    chunks: Sequence[Chunk],
    loss: Callable[[FeatureSets, list[Tensor]], Any],
    used_by_loss: Sequence[Tensor] = (),
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Any:
    """Accumulate the gradient of `loss` over all chunks into the parameters, and return what `loss` returned.

    encode        a chunk's features: a tuple of [b, D] tensors, None where a source is absent in every chunk. It enters
                  autocast itself: a cast made in the first pass and kept for the second would have no gradient
    loss          of the whole batch's features and of stand-ins for `used_by_loss`; a tensor, or a tuple led by one
    used_by_loss  parameters that the loss itself reads (logit_scale)
    no_sync       DDP's context that keeps gradients local; used for every chunk but the last, when all are added up
    """
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state())
            parts.append(encode(chunk))
    result, by_chunk, direct = _feature_gradients(parts, loss, used_by_loss)
    for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        is_last = number == len(chunks) - 1
        with nullcontext() if is_last else no_sync():
            with _under_random_state(state):
                features = encode(chunk)
            pairs = list(zip(features, by_chunk[number], strict=True))
            pairs += zip(used_by_loss, direct, strict=True) if is_last else []
            # its gradient in the parameters is the chain rule's
            sum((value * gradient).sum() for value, gradient in pairs if gradient is not None).backward()
    return result


def _feature_gradients(
    parts: list[FeatureSets], loss: Callable[[FeatureSets, list[Tensor]], Any], used_by_loss: Sequence[Tensor]
) -> tuple[Any, list[tuple[Tensor | None, ...]], Sequence[Tensor | None]]:
    """Compute the loss, its gradient in every chunk's features, and in what it reads directly."""
    columns = [None if column[0] is None else torch.cat(column).requires_grad_() for column in zip(*parts, strict=True)]
    stand_ins = [parameter.detach().requires_grad_() for parameter in used_by_loss]
    result = loss(tuple(columns), stand_ins)
    total = result if isinstance(result, Tensor) else result[0]
    leaves = [column for column in columns if column is not None] + stand_ins
    gradients = iter(torch.autograd.grad(total, leaves, allow_unused=True))
    by_source = []
    for number, column in enumerate(columns):
        gradient = None if column is None else next(gradients)
        sizes = [0 if gradient is None else len(part[number]) for part in parts]
        by_source.append([None] * len(parts) if gradient is None else gradient.split(sizes))
    return result, list(zip(*by_source, strict=True)), list(gradients)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


@contextmanager
def _under_random_state(state: tuple[Tensor, list[Tensor]]) -> Any:
    """Repeat the dropout of the first pass; afterwards the generators continue as if only one pass had drawn."""
    before = _random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(before)


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
