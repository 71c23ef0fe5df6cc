"""UniPT equals the reference: each side network alone, and both on CLIP4Clip's chain."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.clip_vip import max_difference, numbers, tensors
from training.models.unipt.model import Adapted, Adapter, UniPtClip
from training.models.unipt.weights import load_unipt

DTYPES = {"f32": torch.float32, "f64": torch.float64}
PRECISIONS = pytest.mark.parametrize("precision, limit", [("f32", 2e-6), ("f64", 1e-12)])


def adapter(name: str, precision: str) -> Adapter:
    """Build the side network from the sizes in the JSON, and load the reference's weights."""
    sizes = numbers("unipt", "unipt.json")[name]
    made = Adapter([sizes["hidden"]] * sizes["num_layer"], sizes["embed"], sizes["downsample_D_factor"])
    made.load_state_dict(tensors("unipt", f"{name}.weights.safetensors"), strict=True)
    return made.to(DTYPES[precision])


def run(made: Adapter, case: dict[str, Tensor], dtype: torch.dtype) -> Adapted:
    states = case["in/hidden"].to(dtype).unbind(0)
    return made(states, case["in/anchor"].squeeze(1).to(dtype), case.get("in/mask"), case.get("in/position"))


@PRECISIONS
@pytest.mark.parametrize("name", ["image", "text"])
def test_outputs_equal_the_reference(name: str, precision: str, limit: float) -> None:
    case = tensors("unipt", f"{name}.cases.safetensors")
    result = run(adapter(name, precision), case, DTYPES[precision])
    assert result.features_NC.dtype == DTYPES[precision]
    assert max_difference(result.features_NC, case[f"{precision}/output"]) <= limit
    assert max_difference(result.confidence_NY, case[f"{precision}/layer_confidence"]) <= limit
    assert max_difference(result.mixed_NI, case[f"{precision}/aggregated_before_upsample"].squeeze(1)) <= limit
    torch.testing.assert_close(result.confidence_NY.sum(1), torch.ones(len(case["in/anchor"]), dtype=DTYPES[precision]))


@pytest.mark.parametrize("precision, limit", [("f32", 2e-5), ("f64", 1e-7)])
@pytest.mark.parametrize("name", ["image", "text"])
def test_gradients_equal_the_reference(name: str, precision: str, limit: float) -> None:
    case = tensors("unipt", f"{name}.cases.safetensors")
    made = adapter(name, precision)
    (run(made, case, DTYPES[precision]).features_NC * case["in/cotangent"]).sum().backward()
    expected = {key.removeprefix("f64/grad/"): g for key, g in case.items() if key.startswith("f64/grad/")}
    assert set(expected) == {key for key, _ in made.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for key, parameter in made.named_parameters():
        assert max_difference(parameter.grad, expected[key]) <= limit * largest, key


@pytest.mark.parametrize("name", ["image", "text"])
def test_float64_inputs_are_computed_in_float64_whatever_the_weights(name: str) -> None:
    case = tensors("unipt", f"{name}.cases.safetensors")
    result = run(adapter(name, "f32"), case, torch.float64)
    assert max_difference(result.features_NC, case["f64/output"]) <= 1e-12


def chain(precision: str, folder: Path) -> tuple[UniPtClip, dict[str, Tensor]]:
    """Load the whole model from one file, as released; return it with its outputs on the reference's inputs."""
    dtype, case = DTYPES[precision], tensors("clip4clip", "meanP.cases.safetensors")
    weights = tensors("clip4clip", "clip.weights.safetensors") | tensors("unipt", "chain.weights.safetensors")
    save_file(weights, folder / "released.safetensors")
    model = load_unipt(folder / "released.safetensors")
    assert model.settings.reduction == numbers("unipt", "unipt.json")["chain"]["downsample_D_factor"]
    model.to(dtype)
    ids, mask = case["in/input_ids"].squeeze(1), case["in/attention_mask"].squeeze(1)
    texts_BC = model.text_features(ids, mask)
    frames_BTC = model.frame_features(case["in/video"].squeeze(3).squeeze(1).to(dtype))
    present_BT1 = case["in/video_mask"].squeeze(1).unsqueeze(2)
    videos_BC = (F.normalize(frames_BTC, dim=-1) * present_BT1).sum(1) / present_BT1.sum(1)
    similarity = model.logit_scale.exp() * F.normalize(texts_BC, dim=-1) @ F.normalize(videos_BC, dim=-1).T
    target = torch.arange(len(ids))
    loss = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    outputs = {"sequence_output": texts_BC.unsqueeze(1), "visual_output": frames_BTC}
    return model, outputs | {"similarity": similarity, "loss_symmetric": loss}


def test_the_clip4clip_chain_equals_the_reference(tmp_path: Path) -> None:
    case = tensors("unipt", "chain.cases.safetensors")
    model, outputs = chain("f32", tmp_path)
    for name, limit in {"sequence_output": 5e-6, "visual_output": 5e-6, "similarity": 2e-5}.items():
        assert max_difference(outputs[name], case[f"f32/{name}"]) <= limit, name
    assert max_difference(outputs["loss_symmetric"], case["f32/loss_symmetric"]) <= 5e-6
    outputs["loss_symmetric"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(name.startswith(("image_adapter.", "text_adapter.")) for name in gradients)
    expected = {key.removeprefix("f32/grad/"): g for key, g in case.items() if key.startswith("f32/grad/")}
    assert len(expected) > 10
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert max_difference(gradients[name], gradient) <= 2e-5 * largest, name


def test_the_chain_in_float64_differs_by_rounding_alone(tmp_path: Path) -> None:
    case, (_, outputs) = tensors("unipt", "chain.cases.safetensors"), chain("f64", tmp_path)
    assert outputs["similarity"].dtype == torch.float64
    assert max_difference(outputs["similarity"], case["f32/similarity"]) <= 2e-5
