"""Files of UniPT's side networks: published names, the backbone they belong to, and files that are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipmill.base.errors import UserError
from tests.helpers.clip_vip import random_pixels, random_texts, save, tiny_config, tiny_model
from training.models.clip4clip.weight_names import to_released
from training.models.unipt.model import UniPtClip, side_tensors
from training.models.unipt.settings import UniPtSettings
from training.models.unipt.weights import load_unipt

SETTINGS = UniPtSettings(reduction=2, every=2, tokens="frames")


def test_saving_and_loading_gives_the_same_model(tmp_path: Path) -> None:
    model = UniPtClip(tiny_model(), SETTINGS, seed=5)
    loaded = load_unipt(save(model, tmp_path / "side.safetensors"), tiny_model())
    assert loaded.settings == SETTINGS
    pixels, ids = random_pixels(2, 3), random_texts(2)
    for one, other in zip(model(pixels, ids), loaded(pixels, ids), strict=True):
        assert torch.equal(one, other)
    assert not any(parameter.requires_grad for parameter in loaded.backbone.parameters())


def test_a_file_holds_the_published_names_and_no_backbone(tmp_path: Path) -> None:
    path = save(UniPtClip(tiny_model()), tmp_path / "side.safetensors")
    names = set(load_file(path))
    for tower in ("image_adapter", "text_adapter"):
        layers = [f"downsample_layers.{number}.1" for number in range(3)]
        for layer in [*layers, "downsample_layer.1", "upsample_layer.1", "gate_layer"]:
            assert {f"{tower}.{layer}.weight", f"{tower}.{layer}.bias"} <= names
    assert len(names) == 2 * 2 * 6


def test_the_same_model_is_the_same_bytes(tmp_path: Path) -> None:
    model = UniPtClip(tiny_model())
    one, other = (save(model, tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin.4"])
def test_a_released_file_brings_its_own_clip(tmp_path: Path, suffix: str) -> None:
    one_head = {tower: replace(getattr(tiny_config(), tower), num_heads=1) for tower in ("vision", "text")}
    plain = tiny_model(pooling="mean", num_added=0, num_times=0, **one_head)
    model = UniPtClip(plain, UniPtSettings(reduction=4), seed=7)
    released = to_released({f"clip.{name}": t.clone() for name, t in plain.state_dict().items()}, "meanP", "2d")
    path = tmp_path / f"pytorch_model{suffix}"
    tensors = released | {name: tensor.clone() for name, tensor in side_tensors(model.state_dict()).items()}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    loaded = load_unipt(path)
    assert loaded.settings == UniPtSettings(reduction=4)
    assert loaded.config == plain.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(
        load_unipt(path, tiny_model()).text_adapter.gate_layer.weight, model.text_adapter.gate_layer.weight
    )


def test_side_networks_alone_ask_for_their_backbone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give their backbone"):
        load_unipt(save(UniPtClip(tiny_model()), tmp_path / "folder"))


def test_side_networks_of_another_backbone_are_refused(tmp_path: Path) -> None:
    path = save(UniPtClip(tiny_model(0)), tmp_path / "side.safetensors")
    with pytest.raises(UserError, match="trained on backbone"):
        load_unipt(path, tiny_model(1))


def test_missing_foreign_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    tensors = {name: t.clone() for name, t in side_tensors(UniPtClip(tiny_model()).state_dict()).items()}
    path = tmp_path / "side.safetensors"
    cases = {
        r"lacks 1 tensors, such as text_adapter.gate_layer.bias": lambda t: t.pop("text_adapter.gate_layer.bias"),
        r"holds 1 tensors that UniPT does not have, such as lstm.weight": lambda t: t.update(
            {"lstm.weight": torch.zeros(1)}
        ),
        r"has besides 1 tensors, such as text_adapter.more": lambda t: t.update({"text_adapter.more": torch.zeros(1)}),
        r"image_adapter.upsample_layer.1.bias is \[3\], but this model needs \[16\]": lambda t: t.update(
            {"image_adapter.upsample_layer.1.bias": torch.zeros(3)}
        ),
        r"holds no UniPT network": lambda t: t.clear() or t.update({"clip.logit_scale": torch.zeros(1)}),
    }
    for message, damage in cases.items():
        damaged = dict(tensors)
        damage(damaged)
        save_file(damaged, path)
        with pytest.raises(UserError, match=message):
            load_unipt(path, tiny_model())
    with pytest.raises(UserError, match="no such file"):
        load_unipt(tmp_path / "nowhere.safetensors", tiny_model())
