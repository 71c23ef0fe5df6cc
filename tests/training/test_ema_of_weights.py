"""Averaged weights follow their formula, are evaluated, and survive a checkpoint."""

import pytest
import torch

from tests.helpers.clip_vip import tiny_model
from training.models.clip_vip.model import MAX_LOG_SCALE, ClipVip
from training.optim.ema import Ema


def moved(model: ClipVip, seed: int) -> None:
    """Change the weights as an update does."""
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), tiny_model(seed).parameters(), strict=True):
            parameter.copy_(other)
        model.logit_scale.fill_(MAX_LOG_SCALE)


def test_the_average_is_what_its_formula_says() -> None:
    model = tiny_model(0)
    ema = Ema(model, decay=0.9)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed in (1, 2, 3):
        moved(model, seed)
        ema.update()
        expected = {name: 0.9 * expected[name] + 0.1 * tensor for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(ema.full_state(), expected)


def test_the_averaged_log_scale_stays_in_its_range() -> None:
    model = tiny_model(0)
    ema = Ema(model, decay=0.5)
    for seed in range(60):
        moved(model, seed)
        ema.update()
    assert 0 <= ema.full_state()["logit_scale"] <= MAX_LOG_SCALE


def test_a_restored_average_continues() -> None:
    first, model = Ema(tiny_model(0), decay=0.9), tiny_model(0)
    second = Ema(model, decay=0.9)
    moved(model, 1)
    second.update()
    saved = second.full_state()
    third = Ema(model, decay=0.9)
    third.restore(saved)
    moved(model, 2)
    second.update()
    third.update()
    torch.testing.assert_close(third.full_state(), second.full_state(), rtol=0, atol=0)
    with pytest.raises(AssertionError, match="another model's"):
        first.restore({})
