"""A method from another package, `model.method=MODULE:ATTRIBUTE`, is trained, resumed, evaluated and estimated."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipmill.base.errors import UserError
from clipmill.base.settings import Settings
from clipmill.cli.evaluate import run_eval
from tests.helpers.training import SMALL, losses, small_corpus, train_here
from training.cost.estimate import estimate
from training.models import registry as models
from training.models.clip_vip import build as clip_vip
from training.models.clip_vip.model import ClipVip
from training.models.clip_vip.weights import read_tensors
from training.models.method import Method
from training.models.model import VideoTextModel
from training.run.folder import RunFolder
from training.run.settings import resolve

NAME = f"{__name__}:METHOD"


class TurnedSettings(Settings):
    scale: float = 1.0  # of the identity that the map starts from


class Turned(VideoTextModel):
    """Combine a frozen CLIP with a trainable linear map of its text features."""

    method = NAME
    saves_only_trained = True

    def __init__(self, backbone: ClipVip, settings: TurnedSettings):
        super().__init__()
        self.backbone, self.settings = backbone.requires_grad_(False), settings
        self.turn = nn.Linear(backbone.config.embed_dim, backbone.config.embed_dim)
        with torch.no_grad():
            self.turn.weight.copy_(settings.scale * torch.eye(backbone.config.embed_dim))
            self.turn.bias.zero_()

    config = property(lambda self: self.backbone.config)
    logit_scale = property(lambda self: self.backbone.logit_scale)
    num_frozen_blocks = property(lambda self: self.config.vision.num_layers)

    def encode_video(self, pixels, video_mask=None):
        return self.backbone.encode_video(pixels)

    def encode_text(self, ids, mask=None, *, cut=True):
        return F.normalize(self.turn(self.backbone.encode_text(ids, mask, cut=cut)), dim=-1)


config_of = clip_vip.config_of


def load(settings, seed):
    return Turned(clip_vip.load(settings, seed), settings.turned)


def read(weights, settings, seed):
    model = load(settings, seed)
    model.turn.load_state_dict(read_tensors(weights))
    return model


def file_header(model):
    return {"model_type": "turned"}


def file_tensors(model, tensors):
    return {name.removeprefix("turn."): tensor for name, tensor in tensors.items() if name.startswith("turn.")}


def skeleton(config, settings):
    return Turned(ClipVip(config), settings.turned)


METHOD = Method("turned", code_in=__name__, settings=TurnedSettings)
SETTINGS = [f"model.method={NAME}", "model.turned.scale=0.5", "model.pooling=mean", "train.loss=vs"]


def test_it_trains_resumes_and_is_searched(tmp_path):
    corpus = small_corpus(tmp_path / "corpus", 24)
    settings = [*SETTINGS, "train.lr=0.01", "train.warmup_ratio=0", "train.ema=0.9", "train.checkpoint_every=2"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_here(corpus, whole, *settings, "train.max_steps=4")
    assert losses(whole)[-1] < losses(whole)[0]
    train_here(corpus, run, *settings, "train.max_steps=4")
    latest = RunFolder(run).checkpoints.path(4)
    assert set(read_tensors(latest / "model.safetensors")) == {"weight", "bias"}
    (latest / "state.json").write_text("torn")
    train_here(None, run)
    assert losses(run)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-4)
    assert run_eval(run=run, corpus=corpus, where="true", format="json")["num_videos"] == 24


def test_its_costs_are_estimated(tmp_path):
    corpus = small_corpus(tmp_path / "corpus", 12)
    found = estimate(corpus, resolve(None, "demo", [*SMALL, *SETTINGS, "train.batch_size=4"]), gpus=[])
    model = models.load(resolve(None, "demo", SETTINGS).model)
    assert found.step.num_trained == sum(p.numel() for p in model.turn.parameters())
    assert found.step.num_parameters == sum(p.numel() for p in model.parameters())


def test_its_settings_are_checked_and_kept():
    settings = resolve(None, None, SETTINGS)
    assert settings.model.turned == TurnedSettings(scale=0.5)
    saved = settings.model_dump(mode="json")
    assert saved["model"]["turned"] == {"scale": 0.5}
    assert resolve(saved, None, []) == settings
    with pytest.raises(UserError, match="setting model.turned.* = 'much': input should be a valid number"):
        resolve(None, None, [*SETTINGS, "model.turned.scale=much"])
    with pytest.raises(UserError, match="setting model.turned: there is no such setting"):
        resolve(None, None, ["model.turned.scale=0.5"])


@pytest.mark.parametrize(
    "method, said",
    [
        ("nonsense", "setting model.method = 'nonsense': input should be 'clip_vip'"),
        ("no_such_module:METHOD", "setting model.method = no_such_module:METHOD: No module named"),
        (f"{__name__}:load", "it is a function, not a training.models.method.Method"),
    ],
)
def test_an_invalid_method_is_refused_by_name(method, said):
    with pytest.raises(UserError, match=said):
        resolve(None, None, [f"model.method={method}"])


def test_settings_of_another_method_are_refused():
    settings = resolve(None, None, [*SETTINGS, "model.init=demo", "model.unipt.reduction=2"])
    with pytest.raises(UserError, match="model.unipt is for model.method = 'unipt'"):
        models.load(settings.model)


@pytest.mark.parametrize("name", models.METHODS)
def test_every_built_in_method_is_where_the_registry_says(name):
    method = models.load_method(name)
    assert method.name == name
    for function in ("load", "read", "file_header", "file_tensors", "config_of", "skeleton"):
        assert callable(getattr(method.code, function))
