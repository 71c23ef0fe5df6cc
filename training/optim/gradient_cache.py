"""Compute the gradient of a large contrastive batch in small chunks (GradCache, arXiv 2101.06983).

The encoders run twice: once without a graph for the features, and once per chunk with a graph and the same random
state.
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
    """Accumulate the gradient of `loss` over all chunks into the parameters, and return the loss.

    encode        encodes a chunk: a tuple of [b, D] tensors, None for a source that is absent in every chunk. It enters
                  autocast itself, because a cast cached from the first pass would have no gradient
    loss          computes the loss from the whole batch's features and from copies of `used_by_loss`; returns a tensor,
                  or a tuple with the loss first
    used_by_loss  parameters that the loss reads directly (logit_scale)
    no_sync       DDP's context that keeps gradients local; used for every chunk but the last, which adds up all
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
            # by the chain rule the gradient of this sum is that of the loss
            sum((value * gradient).sum() for value, gradient in pairs if gradient is not None).backward()
    return result


def _feature_gradients(
    parts: list[FeatureSets], loss: Callable[[FeatureSets, list[Tensor]], Any], used_by_loss: Sequence[Tensor]
) -> tuple[Any, list[tuple[Tensor | None, ...]], Sequence[Tensor | None]]:
    """Compute the loss and its gradients for every chunk's features and for the tensors it reads directly."""
    columns = [None if column[0] is None else torch.cat(column).requires_grad_() for column in zip(*parts, strict=True)]
    copies = [parameter.detach().requires_grad_() for parameter in used_by_loss]
    result = loss(tuple(columns), copies)
    total = result if isinstance(result, Tensor) else result[0]
    leaves = [column for column in columns if column is not None] + copies
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
    """Repeat the dropout of the first pass; restore the generators afterwards, as if only one pass had drawn."""
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
