"""Averaged weights follow their formula, are evaluated, and survive a checkpoint."""

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.clip_vip import tiny_model
from training.models.clip_vip.model import MAX_LOG_SCALE, ClipVip
from training.models.registry import ModelSettings, load, read, writer
from training.optim.ema import Ema
from training.parallel.state_dict import full_state

HEADS = product(("meanP", "seqLSTM", "seqTransf", "tightTransf"), ("2d", "3d"))
MODELS = {
    "clip_vip": {},
    "unipt": {"method": "unipt", "pooling": "mean"},
    **{f"{head}-{stem}": {"method": "clip4clip", "clip4clip": {"head": head, "stem": stem}} for head, stem in HEADS},
    "frozen": {"method": "clip4clip", "clip4clip": {"head": "seqLSTM", "frozen_layers": 1}},
}


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


def averaged(settings: ModelSettings, folder: Path) -> tuple[Ema, dict[str, torch.Tensor]]:
    """Write weights and averages as a checkpoint does; return the averages and the state that they are part of."""
    model = load(settings)
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.25)
    ema.update()
    tensors = full_state(model)[0]
    state = tensors | ema.full_state()
    folder.mkdir()
    writer(model)(tensors, folder)
    writer(model)(state, folder / "ema.safetensors")
    return ema, state


@pytest.mark.parametrize("model", MODELS)
def test_the_averages_of_every_model_can_be_read_again(model, tmp_path):
    settings = ModelSettings(init="demo", **MODELS[model])
    ema, state = averaged(settings, tmp_path / "step")
    again = read(tmp_path / "step" / "ema.safetensors", settings)
    torch.testing.assert_close(dict(again.state_dict()), state)
    resumed = Ema(again, decay=0.5)
    resumed.restore(again.state_dict())
    torch.testing.assert_close(resumed.full_state(), ema.full_state())


@pytest.mark.parametrize("model", ["seqLSTM-2d", "meanP-3d", "seqLSTM-3d"])
def test_averages_that_an_earlier_version_saved_without_buffers_are_read(model, tmp_path):
    settings = ModelSettings(init="demo", **MODELS[model])
    _, state = averaged(settings, tmp_path / "step")
    path = tmp_path / "step" / "ema.safetensors"
    left_out = {"frame_position_embeddings.weight", "clip.visual.conv1.weight" if "3d" in model else ""}
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in left_out}
    save_file(tensors, path)
    torch.testing.assert_close(dict(read(path, settings).state_dict()), state)


@pytest.mark.parametrize("model", ["unipt", "frozen", "tightTransf-2d"])
def test_frozen_weights_have_no_average(model):
    built = load(ModelSettings(init="demo", **MODELS[model]))
    built.logit_scale.requires_grad_(False)
    trained = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert Ema(built, decay=0.5).full_state().keys() == trained
    assert len(trained) < len(list(built.parameters()))
