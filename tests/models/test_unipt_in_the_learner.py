"""The trainer's update of a UniPT model is the same whole and in chunks, and changes the side networks only."""

import math

import pytest
import torch

from tests.helpers.clip_vip import tiny_model
from tests.helpers.updates import settings, whole_batch
from training.learner import Learner
from training.models.unipt.model import UniPtClip
from training.models.unipt.settings import UniPtSettings
from training.parallel.distributed import Process
from training.settings import TrainSettings


def learn(train: TrainSettings, dtype: torch.dtype = torch.float64) -> tuple[UniPtClip, list[float]]:
    model = UniPtClip(tiny_model(), UniPtSettings(tokens="frames")).to(dtype)
    learner = Learner(model, train, 10, Process(torch.device("cpu")))
    losses = [float(learner.train_step(whole_batch(step))["loss"]) for step in range(3)]
    return model, losses


@pytest.mark.parametrize("loss", ["vs", "vsc_fc"])
def test_chunks_change_no_weight(loss: str) -> None:
    (whole, losses), (chunked, other) = learn(settings(loss=loss)), learn(settings(loss=loss, chunk_size=3))
    assert other == pytest.approx(losses, rel=1e-9)
    for (name, one), two in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        if not name.endswith("gate_layer.bias"):  # its gradient is rounding noise, which Adam amplifies
            torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"ema": 0.9}, {"update": "clip4clip"}])
def test_an_update_leaves_the_backbone_as_it_was(changes: dict) -> None:
    model, losses = learn(settings(loss="vs", **changes), torch.float32)
    before = tiny_model().state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    start = UniPtClip(tiny_model(), UniPtSettings(tokens="frames"))
    assert not torch.equal(model.image_adapter.gate_layer.weight, start.image_adapter.gate_layer.weight)
    assert all(math.isfinite(value) for value in losses)


def test_an_update_reports_the_weight_of_each_layer() -> None:
    model = UniPtClip(tiny_model(), UniPtSettings(tokens="frames"))
    values = Learner(model, settings(loss="vs"), 10, Process(torch.device("cpu"))).train_step(whole_batch(0))
    for side, tower in (("image", model.config.vision), ("text", model.config.text)):
        shares = [float(values[f"{side}_layer_{n}"]) for n in range(1 + tower.num_layers)]
        assert sum(shares) == pytest.approx(1) and min(shares) > 0
