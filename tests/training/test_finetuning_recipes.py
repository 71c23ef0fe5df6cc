"""Recipes that ship: each resolves, and those that fine-tune carry the published settings."""

import pytest

from clipmill.base.errors import UserError
from clipmill.base.settings import recipe_names
from training.models.registry import ModelSettings, load
from training.run.settings import RECIPES, RunSettings, resolve

# (recipe, frames, text tokens, batch, epochs): docs/methods/clip_vip.md section 7. MSR-VTT draws one caption per epoch.
CLIP_VIP = [
    ("msrvtt", 12, (50, 50), (128, 128), 100),
    ("didemo", 12, (50, 70), (128, 128), 20),
    ("lsmdc", 12, (50, 50), (128, 128), 10),
    ("activitynet", 32, (70, 70), (128, 64), 20),
]
# (recipe, frames and text tokens): docs/methods/clip4clip.md section 5
CLIP4CLIP = [("msrvtt", 12, 32), ("msvd", 12, 32), ("lsmdc", 12, 32), ("activitynet", 64, 64), ("didemo", 64, 64)]


@pytest.mark.parametrize("recipe", recipe_names(RECIPES))
def test_every_recipe_resolves(recipe: str) -> None:
    settings = resolve(None, recipe, [])
    assert settings == RunSettings.model_validate(settings.model_dump(mode="json"))


@pytest.mark.parametrize("name, num_frames, tokens, batches, epochs", CLIP_VIP)
def test_clip_vip_fine_tuning_is_as_published(name, num_frames, tokens, batches, epochs) -> None:
    for size, num_tokens, batch in zip((32, 16), tokens, batches, strict=True):
        settings = resolve(None, f"{name}_b{size}", [])
        data, train = settings.data, settings.train
        assert settings.model.method == "clip_vip" and f"ViT-B-{size}" in settings.model.init
        assert (data.num_frames, data.max_text_tokens, data.fit, data.jitter) == (
            num_frames,
            num_tokens,
            "squash",
            True,
        )
        assert (train.loss, train.batch_size, train.epochs, train.lr) == ("vs", batch, epochs, 1e-6)
        assert (train.weight_decay, train.grad_clip, train.warmup_ratio, train.decay) == (0.2, 1.0, 0.01, "cosine")
        assert train.lr_factors == ({"logit_scale": 10} if (name, size) == ("didemo", 16) else {})


@pytest.mark.parametrize("name, num_frames, num_tokens", CLIP4CLIP)
def test_clip4clip_fine_tuning_is_as_published(name: str, num_frames: int, num_tokens: int) -> None:
    settings = resolve(None, f"clip4clip_{name}", [])
    data, train = settings.data, settings.train
    assert settings.model.method == "clip4clip" and settings.model.clip4clip.frozen_layers == 0
    assert (data.num_frames, data.max_text_tokens, data.fit, data.jitter) == (num_frames, num_tokens, "crop", False)
    assert data.frames_per_s == 1.0
    assert (train.loss, train.batch_size, train.lr, train.lr_factors) == ("vs", 128, 1e-4, {"clip.": 1e-3})
    assert (train.update, train.decay, train.warmup_ratio) == ("clip4clip", "clip4clip", 0.1)
    num_gpus = 8 if name in ("activitynet", "didemo") else 4  # each divides the gradient of half of our loss
    assert train.weight_decay == 0.2 and train.grad_clip == train.parameter_clip == 2 * num_gpus


def test_no_recipe_chooses_by_the_test_split() -> None:
    for recipe in recipe_names(RECIPES):
        evaluation = resolve(None, recipe, []).eval
        assert "test" not in evaluation.where or evaluation.every is None


@pytest.mark.parametrize("head", ["meanP", "seqLSTM", "seqTransf", "tightTransf"])
def test_one_setting_makes_a_clip4clip_of_the_demo_model(head: str) -> None:
    model = load(ModelSettings(init="demo", method="clip4clip", clip4clip={"head": head}))
    assert model.settings.head == head and model.config.words
    assert model.logit_scale.requires_grad


def test_settings_of_another_method_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="model.num_added"):
        load(ModelSettings(init="demo", method="clip4clip", num_added=3))
    with pytest.raises(UserError, match="model.clip4clip"):
        load(ModelSettings(init="demo", clip4clip={"head": "seqLSTM"}))
