"""Any number of processes, chunks and accumulation gives the loss and gradient of one process on the whole batch."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.clip_vip import random_pixels, random_texts, tiny_model
from tests.helpers.ranks import run_ranks
from training.losses import LossValue
from training.losses.omnisource import TERMS, omnisource_loss
from training.models.clip_vip.model import ClipVip
from training.optim.gradient_cache import cached_backward

BATCH = 8
Batch = dict[str, Tensor]


def whole_batch() -> Batch:
    subtitles, captions = random_texts(BATCH, seed=5), random_texts(BATCH, seed=6)
    masks = {
        "video_mask": torch.tensor([1, 1, 1, 0, 1, 1, 1, 1]),
        "subtitle_mask": torch.tensor([1, 0, 1, 1, 1, 1, 0, 1]),
        "caption_mask": torch.tensor([1, 1, 1, 1, 0, 1, 0, 1]),
    }
    pixels = {"clips": random_pixels(BATCH, 2).double(), "frames": random_pixels(BATCH, 1, seed=7).double()}
    return pixels | masks | {"subtitles": subtitles, "captions": captions}


def rows(batch: Batch, start: int, end: int) -> Batch:
    return {name: tensor[start:end] for name, tensor in batch.items()}


def encode(model: ClipVip, batch: Batch) -> tuple[Tensor, ...]:
    return (
        model.encode_video(batch["clips"]),
        model.encode_text(batch["subtitles"]),
        model.encode_video(batch["frames"]),
        model.encode_text(batch["captions"]),
    )


def masks(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name.endswith("_mask")}


class Step(torch.nn.Module):
    """Run the whole step as one forward pass, as wrappers such as DDP require."""

    def __init__(self, model: ClipVip, variant: str, group: dist.ProcessGroup | None):
        super().__init__()
        self.model, self.variant, self.group = model, variant, group

    def forward(self, batch: Batch) -> LossValue:
        features = encode(self.model, batch)
        return omnisource_loss(*features, self.model.logit_scale, self.variant, group=self.group, **masks(batch))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_process(variant: str) -> tuple[LossValue, dict[str, Tensor]]:
    model = tiny_model().double()
    loss = Step(model, variant, None)(whole_batch())
    loss.total.backward()
    return loss, gradients(model)


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys() and "logit_scale" in ours
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def run_rank(rank: int, bounds: list[int], variants: list[str], use_ddp: bool, folder: Path) -> None:
    batch = rows(whole_batch(), bounds[rank], bounds[rank + 1])
    for variant in variants:
        model = tiny_model().double()
        step = Step(model, variant, dist.group.WORLD)
        wrapped = DistributedDataParallel(step) if use_ddp else step
        loss = wrapped(batch)
        loss.total.backward()
        result = {"total": loss.total.item(), "terms": {k: v.item() for k, v in loss.terms.items()}}
        torch.save(result | {"gradients": gradients(model)}, folder / f"{variant}.{rank}.pt")


SPLITS = [
    pytest.param([0, 8], id="1", marks=pytest.mark.slow),
    pytest.param([0, 4, 8], id="2"),
    pytest.param([0, 2, 4, 6, 8], id="4", marks=pytest.mark.slow),
    pytest.param([0, 1, 6, 8], id="uneven 3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    "use_ddp", [pytest.param(True, id="ddp", marks=pytest.mark.slow), pytest.param(False, id="mean")]
)
@pytest.mark.parametrize("bounds", SPLITS)
def test_many_processes_give_the_loss_and_gradients_of_one(bounds: list[int], use_ddp: bool, tmp_path: Path) -> None:
    variants = ["vsc_fc", "joint"] if use_ddp else list(TERMS)
    run_ranks(len(bounds) - 1, run_rank, bounds, variants, use_ddp, tmp_path)
    for variant in variants:
        expected, expected_gradients = one_process(variant)
        ranks = [torch.load(tmp_path / f"{variant}.{rank}.pt") for rank in range(len(bounds) - 1)]
        for result in ranks:
            assert result["total"] == pytest.approx(expected.total.item(), abs=1e-11)
            assert result["terms"] == pytest.approx({k: v.item() for k, v in expected.terms.items()}, abs=1e-12)
        means = {
            name: torch.stack([result["gradients"][name] for result in ranks]).mean(0) for name in expected_gradients
        }
        assert_same_gradients(means, expected_gradients)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_gradient_caching_gives_the_gradient_of_the_whole_batch(size: int) -> None:
    expected, expected_gradients = one_process("vsc_fc")
    model, batch = tiny_model().double(), whole_batch()
    chunks = [rows(batch, start, start + size) for start in range(0, BATCH, size)]
    unsynchronised = []

    @contextmanager
    def no_sync() -> Any:
        unsynchronised.append(True)
        yield

    loss = cached_backward(
        lambda chunk: encode(model, chunk),
        chunks,
        lambda features, direct: omnisource_loss(*features, direct[0], **masks(batch)),
        used_by_loss=[model.logit_scale],
        no_sync=no_sync,
    )
    assert loss.total.item() == pytest.approx(expected.total.item(), abs=1e-12)
    assert_same_gradients(gradients(model), expected_gradients)
    assert len(unsynchronised) == len(chunks) - 1


def test_gradient_caching_repeats_the_dropout_of_its_first_pass() -> None:
    """With dropout, both passes must draw the same masks and leave the generator in the state of one pass."""
    model, batch = tiny_model().double(), whole_batch()
    drop = torch.nn.Dropout(0.5)

    def dropped(chunk: Batch) -> tuple[Tensor, ...]:
        return drop(model.encode_video(chunk["clips"])), drop(model.encode_text(chunk["subtitles"])), None, None

    chunks = [rows(batch, 0, 3), rows(batch, 3, 8)]
    torch.manual_seed(0)
    cached_backward(dropped, chunks, lambda f, s: omnisource_loss(*f, s[0], "vs"), [model.logit_scale])
    after = torch.rand(1)
    cached = gradients(model)
    plain = tiny_model().double()
    model = plain
    torch.manual_seed(0)
    features = [torch.cat(column) for column in zip(*(dropped(chunk)[:2] for chunk in chunks), strict=True)]
    assert torch.equal(torch.rand(1), after)
    omnisource_loss(*features, None, None, plain.logit_scale, "vs").total.backward()
    assert_same_gradients(cached, gradients(plain))
