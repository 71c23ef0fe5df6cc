"""A state saved by one process is resumed by many and vice versa, with plain, compiled, DDP and FSDP2 models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from tests.helpers.clip_vip import random_pixels, random_texts, tiny_model
from tests.helpers.ranks import run_ranks
from training.models.clip_vip.model import ClipVip
from training.optim.ema import Ema
from training.optim.optimizers import PublishedAdamW, parameter_groups, set_learning_rate
from training.parallel.state_dict import (
    OptimiserState,
    State,
    bare_name,
    deal,
    full_state,
    random_state,
    restore_optimiser,
    set_random_state,
)

DECAY = 0.5


def restore(model: nn.Module, optimiser: Optimizer | None, tensors: State, state: OptimiserState) -> None:
    """Put a full state, which every process has read, into a model and an optimiser, in place."""
    current = {bare_name(name): tensor for name, tensor in model.state_dict().items()}
    assert current.keys() == tensors.keys(), f"another model's state: {sorted(current.keys() ^ tensors.keys())[:6]}"
    for name, tensor in current.items():
        deal(tensors[name], tensor)
    if optimiser is not None:
        restore_optimiser(model, optimiser, state)


def plain(model: ClipVip) -> nn.Module:
    return model


def compiled(model: ClipVip) -> nn.Module:
    return torch.compile(model, backend="eager")


def copied(model: ClipVip) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: ClipVip) -> nn.Module:
    """Shard as training does: block by block, with the temperature replicated on every process."""
    for block in [*model.vision.blocks, *model.text.blocks]:
        fully_shard(block)
        register_fsdp_forward_method(block, "first_token")
    return fully_shard(model, ignored_params={model.logit_scale})


class Training:
    """Train a model on one fixed batch shared by all processes, so that their number has no effect.

    Double precision is needed because the gradients of the keys' biases are rounding noise, which Adam would amplify.
    """

    def __init__(self, wrap: Callable[[ClipVip], nn.Module], published_update: bool, seed: int = 0):
        model = tiny_model(seed).double()
        self.scale = model.logit_scale
        self.module = wrap(model)
        groups = parameter_groups(self.module.named_parameters(), weight_decay=0.1)
        self.optimiser: Optimizer = PublishedAdamW(groups, lr=0) if published_update else AdamW(groups, fused=True)
        self.ema = Ema(self.module, DECAY)
        set_learning_rate(self.optimiser, 0.01)

    def forward(self) -> Tensor:
        video, text = self.module(random_pixels(3, 2).double(), random_texts(3))
        logits = self.scale.exp() * video @ text.T
        return nn.functional.cross_entropy(logits, torch.arange(3))

    def step(self) -> None:
        self.optimiser.zero_grad()
        self.forward().backward()
        self.optimiser.step()
        self.ema.update()

    def state(self) -> dict[str, Any]:
        tensors, optimiser = full_state(self.module, self.optimiser)
        return {"tensors": tensors, "optimiser": optimiser, "ema": self.ema.full_state()}

    def restore(self, state: dict[str, Any]) -> None:
        restore(self.module, self.optimiser, state["tensors"], state["optimiser"])
        self.ema.restore(state["ema"])


def assert_same_state(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours["optimiser"].keys() == expected["optimiser"].keys() == expected["tensors"].keys()
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)


def after_steps(num_steps: int, published_update: bool) -> dict[str, Any]:
    training = Training(plain, published_update)
    for _ in range(num_steps):
        training.step()
    return training.state()


@pytest.mark.parametrize("published_update", [False, True])
@pytest.mark.parametrize("wrap", [plain, compiled])
def test_a_restored_training_continues_bit_for_bit(wrap: Any, published_update: bool) -> None:
    first = Training(wrap, published_update)
    for _ in range(2):
        first.step()
    saved = first.state()
    first.step()
    second = Training(wrap, published_update, seed=1)
    second.restore(saved)
    second.step()
    torch.testing.assert_close(second.state(), first.state(), rtol=0, atol=0)
    assert saved["tensors"].keys() == dict(tiny_model().named_parameters()).keys()


def test_a_saved_state_does_not_follow_the_training() -> None:
    training = Training(plain, False)
    training.step()
    saved = training.state()
    copy = {name: tensor.clone() for name, tensor in saved["tensors"].items()}
    training.step()
    assert all(torch.equal(saved["tensors"][name], tensor) for name, tensor in copy.items())
    moment = saved["optimiser"]["vision.class_embedding"]["exp_avg"]
    assert not torch.equal(moment, training.optimiser.state[training.module.vision.class_embedding]["exp_avg"])


def test_an_optimiser_that_has_not_stepped_has_an_empty_state() -> None:
    training = Training(plain, False)
    saved = training.state()
    assert saved["optimiser"] == {}
    training.step()
    training.restore(saved)
    assert not training.optimiser.state


def test_a_state_of_another_model_is_refused() -> None:
    with pytest.raises(AssertionError, match="another model's state"):
        restore(tiny_model(num_added=0), None, *full_state(tiny_model()))


def test_a_restored_random_state_draws_the_same_numbers() -> None:
    state = random_state()
    drawn = torch.rand(3)
    set_random_state(state)
    assert torch.equal(torch.rand(3), drawn)


# -- many processes ----------------------------------------------------------------------------------------------------


def run_rank(rank: int, folder: Path) -> None:
    for published_update in (False, True):
        saved = torch.load(folder / f"saved.{published_update}.pt", weights_only=True)
        for wrap in (copied, sharded):
            training = Training(wrap, published_update, seed=1)
            training.restore(saved)
            training.step()
            torch.save(training.state(), folder / f"{wrap.__name__}.{published_update}.{rank}.pt")
            assert any(isinstance(p, DTensor) for p in training.module.parameters()) == (wrap is sharded)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the results of two processes that resumed one process's state after two steps."""
    folder = tmp_path_factory.mktemp("two")
    for published_update in (False, True):
        torch.save(after_steps(2, published_update), folder / f"saved.{published_update}.pt")
    run_ranks(2, run_rank, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("published_update", [False, True])
@pytest.mark.parametrize("wrap", ["copied", "sharded"])
def test_two_processes_resume_from_one_and_one_from_two(wrap: str, published_update: bool, two_processes: Path) -> None:
    state = torch.load(two_processes / f"{wrap}.{published_update}.0.pt", weights_only=True)
    assert_same_state(state, after_steps(3, published_update))
    others = torch.load(two_processes / f"{wrap}.{published_update}.1.pt", weights_only=True)
    assert others == {"tensors": {}, "optimiser": {}, "ema": {}}, "only the first process holds the whole"
    training = Training(plain, published_update, seed=2)
    training.restore(state)
    training.step()
    assert_same_state(training.state(), after_steps(4, published_update))
