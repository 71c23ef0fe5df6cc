"""Updates give the same weights on one, two or four processes, replicated or sharded, in chunks or whole."""

import shutil

import pytest
import torch

from tests.helpers.clip_vip import tiny_model
from tests.helpers.updates import alone, assert_same, settings, together, whole_batch
from training.models.clip_vip.model import TowerConfig


@pytest.mark.parametrize("changes", [{"chunk_size": 3}, {"activation_checkpointing": True}], ids=str)
def test_chunks_and_recomputed_activations_change_nothing(changes):
    assert_same(alone(settings(**changes)), alone(settings()))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs a C++ compiler")
def test_a_compiled_model_learns_the_same():
    assert_same(alone(settings(compile=True), whole_batch, flat_model), alone(settings(), whole_batch, flat_model))


def flat_model() -> torch.nn.Module:
    """Make a model of one layer, since each layer takes the C++ compiler ten seconds of two cores."""
    vision, text = (TowerConfig(width=width, num_layers=1, num_heads=2, mlp_width=2 * width) for width in (32, 24))
    return tiny_model(vision=vision, text=text)


def test_bf16_stays_near():
    _, losses = alone(settings(precision="bf16"))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone(settings())[1]), rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_are_one(world_size):
    expected = alone(settings())
    ways = [settings(parallel=parallel, chunk_size=size) for parallel in ("ddp", "fsdp") for size in (None, 1)]
    for outcomes in together(world_size, ways):
        for outcome in outcomes:
            assert_same(outcome, expected)
