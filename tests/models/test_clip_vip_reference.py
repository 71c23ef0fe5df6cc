"""CLIP-ViP equals the reference: embeddings, hidden states, loss and gradients."""

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.clip_vip import from_recipe, max_difference, numbers, reference, tensors
from training.losses.omnisource import omnisource_loss
from training.models.clip_vip.model import ClipVip
from training.models.clip_vip.weight_names import to_published
from training.models.clip_vip.weights import load_clip_vip

CASES = {"p16": ("T4", "T7", "T2"), "p32": ("T4", "T6"), "p16_notemporal": ("T4", "T5")}
CASE_FRAMES = [(name, frames) for name, all_frames in CASES.items() for frames in all_frames]
VARIANTS = {"NCELearnableTempLoss_vsc_fc": "vsc_fc", "NCELearnableTempLoss_vs_vc_fc": "vs_vc_fc"}
DTYPES = {"f32": torch.float32, "f64": torch.float64}


def load(name: str, precision: str = "f32") -> ClipVip:
    weights = reference("clipvip", f"{name}.weights.safetensors")
    return load_clip_vip(weights, reference("clipvip", f"{name}.json")).to(DTYPES[precision])


def embed(model: ClipVip, case: dict[str, Tensor], frames: str) -> dict[str, Tensor]:
    dtype = model.logit_scale.dtype
    return {
        "video_embeds": model.encode_video(case[f"in/video_{frames}"].to(dtype)),
        "text_embeds": model.encode_text(case["in/text_ids"], case["in/text_mask"]),
        "image_embeds": model.encode_video(case["in/image"].to(dtype)),
        "caption_embeds": model.encode_text(case["in/caption_ids"].squeeze(1), case["in/caption_mask"].squeeze(1)),
    }


@pytest.mark.parametrize("precision, limit", [("f32", 2e-6), ("f64", 1e-12)])
@pytest.mark.parametrize("name, frames", CASE_FRAMES)
def test_embeddings_equal_the_reference(name: str, frames: str, precision: str, limit: float) -> None:
    case = tensors("clipvip", f"{name}.cases.safetensors")
    embeds = embed(load(name, precision), case, frames)
    for key, value in embeds.items():
        assert value.dtype == DTYPES[precision]
        assert max_difference(value, case[f"{frames}/{precision}/{key}"]) <= limit, key


@pytest.mark.parametrize("precision, limit", [("f32", 2e-6), ("f64", 1e-12)])
@pytest.mark.parametrize("name", CASES)
def test_text_mask_with_holes_is_honoured(name: str, precision: str, limit: float) -> None:
    case = tensors("clipvip", f"{name}.cases.safetensors")
    model = load(name, precision)
    for cut in (True, False):
        holes = model.encode_text(case["in/text_ids"], case["in/text_mask_holes"], cut=cut)
        assert max_difference(holes, case[f"{precision}/text_embeds_mask_holes"]) <= limit
    assert max_difference(holes, model.encode_text(case["in/text_ids"])) > 1e-3


@pytest.mark.parametrize("precision, limit", [("f32", 2e-6), ("f64", 1e-12)])
def test_mean_pooling_equals_the_reference(precision: str, limit: float) -> None:
    case = tensors("clipvip", "p16_meanpool.cases.safetensors")
    model = load("p16_meanpool", precision)
    video = model.encode_video(case["in/video"].to(DTYPES[precision]))
    assert max_difference(video, case[f"{precision}/video_embeds"]) <= limit
    text = model.encode_text(case["in/text_ids"], case["in/text_mask"])
    assert max_difference(text, case[f"{precision}/text_embeds"]) <= limit


@pytest.mark.parametrize("name, frames", [(name, f) for name, all_frames in CASES.items() for f in all_frames[:2]])
def test_vision_hidden_states_equal_the_reference(name: str, frames: str) -> None:
    case = tensors("clipvip", f"{name}.cases.safetensors")
    model = load(name)
    states: list[Tensor] = []
    pooled = model.vision(case[f"in/video_{frames}"], states)
    assert len(states) == 1 + len(model.vision.blocks)
    for number, state in enumerate(states):
        known = case[f"{frames}/f32/vision_hidden/{number}"]  # of other than the first T, the first video's alone
        assert max_difference(state[: len(known)], known) <= 3e-5
    assert max_difference(pooled, case[f"{frames}/f32/vision_pooled"]) <= 3e-5
    assert max_difference(pooled, model.vision(case[f"in/video_{frames}"])) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_text_hidden_states_equal_the_reference(name: str) -> None:
    case = tensors("clipvip", f"{name}.cases.safetensors")
    states: list[Tensor] = []
    load(name).text(case["in/text_ids"], case["in/text_mask"], states)
    for number, state in enumerate(states):
        assert max_difference(state, case[f"{CASES[name][0]}/f32/text_hidden/{number}"]) <= 3e-5


def backward(name: str, frames: str, precision: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the case's loss, and its gradients by published name."""
    case = tensors("clipvip", f"{name}.cases.safetensors")
    model = load(name, precision)
    variant = VARIANTS[numbers("clipvip", f"{name}.json")["cases"][frames]["loss"]]
    embeds = embed(model, case, frames)
    video, text, image, caption = embeds.values()
    loss = omnisource_loss(video, text, image, caption, model.logit_scale, variant).total
    loss.backward()
    return loss, to_published({key: p.grad for key, p in model.named_parameters()}, prefix="clipmodel.")


@pytest.mark.parametrize("precision, loss_limit, limit", [("f32", 3e-6, 2e-5), ("f64", 1e-12, 1e-7)])
@pytest.mark.parametrize("name, frames", CASE_FRAMES)
def test_loss_and_gradients_equal_the_reference(
    name: str, frames: str, precision: str, loss_limit: float, limit: float
) -> None:
    case = tensors("clipvip", f"{name}.cases.safetensors")
    loss, gradients = backward(name, frames, precision)
    expected = case[f"{frames}/{precision}/loss"]
    assert abs(loss.item() - expected.item()) <= loss_limit * expected.item()
    prefix = f"{frames}/{precision}/grad/"
    keys = [key for key in case if key.startswith(prefix)]
    assert len(keys) > 10
    for key in keys:
        largest = case[key].abs().max().item()
        assert max_difference(gradients[key.removeprefix(prefix)], case[key]) <= limit * largest, key


@pytest.mark.parametrize("name, frames", CASE_FRAMES)
def test_norm_and_sum_of_every_gradient_equal_the_reference(name: str, frames: str) -> None:
    _, gradients = backward(name, frames, "f64")
    expected = numbers("clipvip", f"{name}.json")["cases"][frames]["grad_norm_and_sum_f64"]
    assert set(expected) == set(gradients)
    for key, (norm, total) in expected.items():
        assert abs(gradients[key].norm().item() - norm) <= 1e-10 * max(1, norm), key
        assert abs(gradients[key].sum().item() - total) <= 1e-9 * max(1, norm), key


def mean_and_std(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    fan_in = float(np.prod(shape[1:])) ** -0.5
    if "norm" in name and name.endswith(".weight"):
        return 1, 0.1
    if name.endswith(".bias"):
        return 0, 0.05
    rules = {"token_embedding": 0.4, "position_embedding": 0.2, "temporal_embedding": 0.3, "class_embedding": 0.5}
    for part, std in (rules | {"added_cls": 0.5}).items():
        if part in name:
            return 0, std
    return 0, fan_in * (1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1)


def real_model(name: str, tmp_path) -> ClipVip:
    """Load a model of the published size with the recipe's weights from a file in published names."""
    from safetensors.torch import save_file

    from training.models.clip_vip.config_formats import config_from_dict

    info = numbers("clipvip", f"{name}.json")
    with torch.device("meta"):
        shapes = to_published(ClipVip(config_from_dict(info)).state_dict(), prefix="clipmodel.")
    state = {
        key: from_recipe(f"{info['seed']}:{key}", like.shape, *mean_and_std(key, tuple(like.shape)))
        for key, like in shapes.items()
        if key != "clipmodel.logit_scale"
    }
    for key, check in info["check"].items():
        if key in state:
            assert hashlib.sha256(state[key].numpy().tobytes()).hexdigest() == check["sha256"], key
    state["clipmodel.logit_scale"] = torch.tensor(info["vision_additional_config"]["logit_scale_init_value"])
    save_file(state, tmp_path / "real.safetensors")
    return load_clip_vip(tmp_path / "real.safetensors", info)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["real_b32", "real_b16"])
def test_published_sizes_equal_the_reference(name: str, tmp_path) -> None:
    outputs = tensors("clipvip", f"{name}.outputs.safetensors")
    info = numbers("clipvip", f"{name}.json")
    model = real_model(name, tmp_path).requires_grad_(False)
    for num_frames in info["frames"]:
        key = f"input:video_T{num_frames}"
        pixels = from_recipe(f"{info['seed']}:{key}", (info["batch"], num_frames, 3, 224, 224), 0, 1)
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == info["check"][key]["sha256"]
        assert max_difference(model.encode_video(pixels), outputs[f"f32/video_embeds_T{num_frames}"]) <= 2e-6
    assert max_difference(model.encode_video(pixels.double()), outputs[f"f64/video_embeds_T{num_frames}"]) <= 1e-12
    ids, mask = outputs["in/text_ids"], outputs["in/text_mask"]
    assert max_difference(model.encode_text(ids, mask), outputs["f32/text_embeds"]) <= 2e-6
    assert max_difference(model.double().encode_text(ids, mask), outputs["f64/text_embeds"]) <= 1e-12
