"""MIL-NCE with one video for several texts equals the published loss, in chunks and on any number of processes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.helpers.clip_vip import random_texts
from tests.helpers.pair_losses import mil_nce
from tests.helpers.updates import BATCH, alone, assert_same, settings, together, whole_batch
from training.data.batch import Batch
from training.losses.mil_nce import mil_nce_loss

NUM, DIM = 6, 8


def vectors(num_neighbours: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((NUM, DIM), (NUM, DIM), (NUM, num_neighbours, DIM))
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(normalize(vector, dim=-1).requires_grad_() for vector in drawn)


def loss_of(
    video: Tensor, subtitle: Tensor, near: Tensor, scale: Tensor, missing: dict[str, Any] | None = None
) -> Tensor:
    there = {"video": torch.ones(NUM).bool(), "subtitle": torch.ones(NUM).bool(), "near": torch.ones(near.shape[:2])}
    masks = {name: mask.bool().clone() for name, mask in there.items()}
    for name, place in (missing or {}).items():
        masks[name][place] = False
    return mil_nce_loss(video, subtitle, near, scale, masks["video"], masks["subtitle"], masks["near"]).total


def as_published(video: Tensor, subtitle: Tensor, near: Tensor, scale: Tensor) -> Tensor:
    """Compute the loss on the matrix of pairs, with a video's own text in the middle of its block."""
    half = near.shape[1] // 2
    texts = torch.cat([near[:, :half], subtitle[:, None], near[:, half:]], dim=1).flatten(0, 1)
    num_pairs = near.shape[1] + 1
    columns = torch.full((len(texts), NUM, num_pairs), -torch.inf, dtype=texts.dtype)
    columns[:, :, num_pairs // 2] = scale.exp() * texts @ video.T
    return mil_nce(columns.flatten(1), num_pairs)


@pytest.mark.parametrize("num_neighbours", [0, 2, 4])
def test_it_is_the_published_loss_with_its_gradients(num_neighbours: int) -> None:
    """tests/models/test_clip4clip_reference.py compares `pair_losses.mil_nce` with the reference's numbers."""
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    inputs = (*vectors(num_neighbours), scale)
    ours, theirs = loss_of(*inputs), as_published(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    used = inputs if num_neighbours else (*inputs[:2], scale)
    for mine, expected in zip(torch.autograd.grad(ours, used), torch.autograd.grad(theirs, used), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_missing_items_are_neither_positives_nor_negatives() -> None:
    """A missing text may have any values; a clip without text makes no query and remains a negative of others."""
    video, subtitle, near = vectors(2)
    scale = torch.tensor(1.0, dtype=torch.float64)
    whole = loss_of(video, subtitle, near, scale)
    without = loss_of(video, subtitle, near, scale, {"near": (1, 0)})
    odd = near.detach().clone()
    odd[1, 0] = torch.nan
    assert without != whole and loss_of(video, subtitle, odd, scale, {"near": (1, 0)}) == without
    kept = [n for n in range(NUM) if n != 2]
    unreadable = mil_nce_loss(video[kept], subtitle[kept], near[kept], scale, *masks_of(NUM - 1)).total
    torch.testing.assert_close(loss_of(video, subtitle, near, scale, {"video": 2}), unreadable)
    mute = loss_of(video, subtitle, near, scale, {"subtitle": 2})
    assert mute.isfinite() and mute != unreadable
    assert loss_of(video, subtitle, near, scale, {"video": slice(None)}) == 0


def masks_of(num: int) -> tuple[Tensor, Tensor, Tensor]:
    there = torch.ones(num, dtype=torch.bool)
    return there, there, there[:, None].expand(num, 2)


def with_neighbours(step: int) -> Batch:
    """Return `whole_batch` with three texts per clip, some of them missing."""
    batch, generator = whole_batch(step), torch.Generator().manual_seed(50 + step)
    batch.neighbour_BNL = random_texts(2 * BATCH, seed=30 + step).unflatten(0, (BATCH, 2))
    batch.neighbour_mask_BN = (torch.rand(BATCH, 2, generator=generator) < 0.7) & batch.video_mask_B[:, None]
    return batch


def test_chunks_change_no_update() -> None:
    chunked = settings(loss="mil_nce", chunk_size=3)
    assert_same(alone(chunked, with_neighbours), alone(settings(loss="mil_nce"), with_neighbours))


@pytest.mark.slow
def test_processes_change_no_update() -> None:
    expected = alone(settings(loss="mil_nce"), with_neighbours)
    ways = [settings(loss="mil_nce"), settings(loss="mil_nce", parallel="fsdp", chunk_size=2)]
    for outcomes in together(2, ways, with_neighbours):
        for outcome in outcomes:
            assert_same(outcome, expected)
