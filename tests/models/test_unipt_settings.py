"""UniPT's settings: its recipes, the models they make, and the combinations they refuse."""

from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml

from clipmill.base.errors import UserError
from tests.helpers.clip_vip import random_pixels, random_texts, save, tiny_model
from training.models import registry as models
from training.models.registry import ModelSettings
from training.models.unipt.model import UniPtClip
from training.models.unipt.settings import UniPtSettings
from training.run.settings import resolve

RECIPES = ("unipt_msrvtt", "unipt_msvd", "unipt_clip_vip_msrvtt")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_have_the_published_optimisation(recipe: str) -> None:
    settings = resolve(None, recipe, [])
    assert settings.model.method == "unipt"
    train = settings.train
    assert (train.batch_size, train.lr, train.weight_decay, train.warmup_ratio) == (128, 1e-4, 0.2, 0.1)
    assert (train.update, train.decay, train.loss, train.grad_clip) == ("clip4clip", "clip4clip", "vs", 8.0)
    assert train.lr_factors == {} and settings.data.num_frames == 12
    assert "test" not in settings.data.where


def test_the_published_recipes_differ_from_clip4clips_in_what_trains_alone() -> None:
    for dataset in ("msrvtt", "msvd"):
        ours, theirs = (_recipe(f"{method}_{dataset}") for method in ("unipt", "clip4clip"))
        assert ours["data"] == theirs["data"] and ours["eval"] == theirs["eval"]
        one, other = ({key: str(value) for key, value in recipe["train"].items()} for recipe in (ours, theirs))
        assert {key for key, _ in one.items() ^ other.items()} == {"lr_factors", "published_decay"}


def _recipe(name: str) -> dict:
    return yaml.safe_load(resources.files("training").joinpath("recipes", f"{name}.yaml").read_text())


def saved(folder: Path, **shape) -> str:
    save(tiny_model(**shape), folder)
    return str(folder)


def test_settings_make_the_model_they_name(tmp_path: Path) -> None:
    chosen = UniPtSettings(reduction=2, tokens="frames")
    settings = ModelSettings(init=saved(tmp_path / "vip"), method="unipt", unipt=chosen)
    model = models.load(settings, seed=3)
    assert isinstance(model, UniPtClip) and model.settings == chosen
    assert model.config == models.config_of(settings)
    again = models.load(settings, seed=3)
    inputs = random_pixels(2, 2), random_texts(2)
    for one, other in zip(model(*inputs), again(*inputs), strict=True):
        assert torch.equal(one, other)


def test_a_plain_clip_is_a_backbone_frame_by_frame_only(tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain", num_added=0, num_times=0)
    with pytest.raises(UserError, match="no trained proxies.*model.pooling=mean"):
        models.load(ModelSettings(init=plain, method="unipt", num_added=3, num_times=12))
    model = models.load(ModelSettings(init=plain, method="unipt", pooling="mean"))
    assert model.config.pooling == "mean" and model.encode_video(random_pixels(2, 3)).shape == (2, 16)


def test_its_settings_need_its_method(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.unipt is for model.method = 'unipt'; here it is 'clip_vip'"):
        models.load(ModelSettings(init=saved(tmp_path / "vip"), unipt=UniPtSettings(reduction=2)))
    with pytest.raises(UserError, match="model.unipt.tokens"):
        resolve(None, None, ["model.unipt.tokens=some"])
