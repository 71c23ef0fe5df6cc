"""CLIP4Clip equals the reference: features, similarities, losses, gradients, the update and its schedule."""

import pytest
import torch
from torch import Tensor

from tests.helpers.clip_vip import max_difference, numbers, reference, tensors
from tests.helpers.pair_losses import cross_entropy, max_margin, mil_nce, symmetric_cross_entropy
from training.models.clip4clip.model import Clip4Clip
from training.models.clip4clip.weight_names import to_released
from training.models.clip4clip.weights import load_clip4clip
from training.optim.optimizers import build_optimiser, set_learning_rate
from training.optim.schedule import learning_rate, rate_factor

CASES = ("meanP", "seqLSTM", "seqTransf", "tightTransf", "meanP_3d")
DTYPES = {"f32": torch.float32, "f64": torch.float64}


def load(case: str, precision: str = "f64") -> Clip4Clip:
    head = None if case == "meanP" else reference("clip4clip", f"{case}.weights.safetensors")
    clip = reference("clip4clip", "clip.weights.safetensors")
    model = load_clip4clip(clip, head, case.removesuffix("_3d"))
    assert model.new_tensors == ()
    return model.to(DTYPES[precision])


def inputs() -> dict[str, Tensor]:
    case = tensors("clip4clip", "meanP.cases.safetensors")
    return {key.removeprefix("in/"): tensor for key, tensor in case.items() if key.startswith("in/")}


def features(case: str, precision: str) -> tuple[Tensor, Tensor]:
    name = case if case == "meanP_3d" else "meanP"
    known = tensors("clip4clip", f"{name}.cases.safetensors")
    return known[f"{precision}/sequence_output"], known[f"{precision}/visual_output"]


@pytest.mark.parametrize("precision, limit", [("f32", 1e-5), ("f64", 1e-13)])
@pytest.mark.parametrize("case", ["meanP", "meanP_3d"])
def test_features_equal_the_reference(case: str, precision: str, limit: float) -> None:
    model, given = load(case, precision), inputs()
    text, frames = features(case, precision)
    assert max_difference(model.text_features(given["input_ids"]), text.squeeze(1)) <= limit
    assert max_difference(model.frame_features(given["video"].to(DTYPES[precision])), frames) <= limit


@pytest.mark.parametrize("precision, limit", [("f32", 1e-5), ("f64", 1e-12)])
@pytest.mark.parametrize("case", CASES)
def test_similarity_from_pixels_and_ids_equals_the_reference(case: str, precision: str, limit: float) -> None:
    given = inputs()
    video = given["video"].to(DTYPES[precision])
    with torch.no_grad():
        ours = load(case, precision)(given["input_ids"], given["attention_mask"], video, given["video_mask"])
    assert ours.dtype == DTYPES[precision]
    assert max_difference(ours, tensors("clip4clip", f"{case}.cases.safetensors")[f"{precision}/similarity"]) <= limit


def backward(case: str, precision: str) -> dict[str, Tensor]:
    """Compute a case's results from the reference's features, under the reference's names."""
    model = load(case, precision)
    text, frames = (feature.clone().requires_grad_() for feature in features(case, precision))
    similarity = model.similarity(text, frames, inputs()["video_mask"])
    loss = symmetric_cross_entropy(similarity)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    released = to_released(gradients, model.settings.head, model.settings.stem)
    ours = {"similarity": similarity, "loss_symmetric": loss}
    ours |= {"grad_sequence_output": text.grad, "grad_visual_output": frames.grad}
    return ours | {f"grad/{name}": gradient for name, gradient in released.items()}


@pytest.mark.parametrize("precision, limit", [("f32", 1e-5), ("f64", 1e-12)])
@pytest.mark.parametrize("case", CASES)
def test_similarity_loss_and_gradients_equal_the_reference(case: str, precision: str, limit: float) -> None:
    ours, known = backward(case, precision), tensors("clip4clip", f"{case}.cases.safetensors")
    for name in ("similarity", "loss_symmetric", "grad_sequence_output", "grad_visual_output"):
        assert max_difference(ours[name], known[f"{precision}/{name}"]) <= limit, name


@pytest.mark.parametrize("case, count", [("seqLSTM", 2), ("seqTransf", 19), ("tightTransf", 25)])
def test_gradients_of_the_heads_parameters_equal_the_reference(case: str, count: int) -> None:
    """The stored float32 is off by 6e-8 of the largest value; gradients that should be 0 are noise on both sides."""
    ours, known = backward(case, "f64"), tensors("clip4clip", f"{case}.cases.safetensors")
    names = [key.removeprefix("f64/") for key in known if key.startswith("f64/grad/")]
    assert len(names) == count
    for name in names:
        assert max_difference(ours[name], known[f"f64/{name}"]) <= 1e-7 * known[f"f64/{name}"].abs().max() + 1e-13, name


def test_training_mode_loss_equals_the_reference() -> None:
    given, model = inputs(), load("meanP", "f32").train()
    similarity = model(given["input_ids"], given["attention_mask"], given["video"], given["video_mask"])
    expected = numbers("clip4clip", "clip4clip.json")["train_mode_forward_loss_meanP_f32"]
    assert symmetric_cross_entropy(similarity).item() == pytest.approx(expected, rel=3e-6)


@pytest.mark.parametrize("case", CASES)
def test_float64_pixels_are_computed_in_float64_whatever_the_weights(case: str) -> None:
    given = inputs()
    arguments = given["input_ids"], given["attention_mask"], given["video"].double(), given["video_mask"]
    similarity = load(case, "f32")(*arguments)
    assert similarity.dtype == torch.float64
    assert max_difference(similarity, load(case, "f64")(*arguments)) <= 1e-12
    video_only = load(case, "f32").frame_features(given["video"].double())
    assert video_only.dtype == torch.float64


@pytest.mark.parametrize("case", ["seqLSTM", "seqTransf", "tightTransf"])
def test_a_head_starts_as_the_copy_that_the_reference_starts_as(case: str) -> None:
    clip = tensors("clip4clip", "clip.weights.safetensors")
    model = load_clip4clip(reference("clip4clip", "clip.weights.safetensors"), head=case, num_layers=2)
    released = to_released(model.state_dict(), case, "2d")
    copied_from = numbers("clip4clip", "clip4clip.json")["heads"][case]["head_tensor_starts_as_copy_of"]
    assert copied_from.keys() == {key for key in released if not key.startswith("clip.")}
    for key, source in copied_from.items():
        if source is None:
            assert released[key].shape == tensors("clip4clip", f"{case}.weights.safetensors")[key].shape
        else:
            assert torch.equal(released[key], clip[f"clip.{source}"]), key


def test_the_3d_stem_starts_as_the_reference_starts() -> None:
    model = load_clip4clip(reference("clip4clip", "clip.weights.safetensors"), stem="3d")
    start = tensors("clip4clip", "meanP_3d.cases.safetensors")["conv2_weight_at_start"]
    ours = to_released(model.state_dict(), "meanP", "3d")["clip.visual.conv2.weight"]
    assert torch.equal(ours.half().float(), start)  # the reference holds this weight in half precision


@pytest.mark.parametrize("precision, limit", [("f32", 1e-6), ("f64", 1e-14)])
@pytest.mark.parametrize("videos, pairs", [(6, 1), (4, 3)])
def test_losses_equal_the_reference(videos: int, pairs: int, precision: str, limit: float) -> None:
    known, case = tensors("clip4clip", "losses.safetensors"), f"b{videos}_p{pairs}"
    losses = {
        "CrossEn": lambda s: cross_entropy(s),
        "MILNCELoss": lambda s: mil_nce(s, pairs),
        "MaxMarginRankingLoss": lambda s: max_margin(s, pairs),
    }
    for name, function in losses.items():
        similarity = known[f"in/sim_{case}"].to(DTYPES[precision], copy=True).requires_grad_()
        loss = function(similarity)
        loss.backward()
        assert max_difference(loss, known[f"{name}_{case}/{precision}/loss"]) <= limit, name
        assert max_difference(similarity.grad, known[f"{name}_{case}/{precision}/grad"]) <= limit, name


@pytest.mark.parametrize("precision, limit", [("f32", 1e-6), ("f64", 1e-14)])
def test_the_update_equals_the_reference(precision: str, limit: float) -> None:
    settings, case = numbers("schedule", "optim.json")["bertadam"], tensors("schedule", "optim.safetensors")
    expected = [case[f"bertadam/{precision}/param{i}"] for i in (0, 1)]
    parameters = [torch.nn.Parameter(path[0].clone()) for path in expected]
    groups = [{"params": [parameters[0]], "weight_decay": settings["wd"]}, {"params": [parameters[1]]}]
    optimiser = build_optimiser([group | {"rate_factor": 1.0} for group in groups], "clip4clip")
    shape = {"total_steps": settings["t_total"], "warmup_ratio": settings["warmup"], "decay": "clip4clip"}
    for step in range(settings["steps"]):
        for i, parameter in enumerate(parameters):
            parameter.grad = case[f"in/grad{i}"][step].to(parameter.dtype)
        set_learning_rate(optimiser, learning_rate(step + 1, settings["lr"], **shape))
        optimiser.step()
        for parameter, path in zip(parameters, expected, strict=True):
            assert max_difference(parameter.detach(), path[step + 1]) <= limit


def test_the_schedule_equals_the_reference() -> None:
    table = numbers("schedule", "lr.json")["clip4clip_warmup_cosine"]
    shape = {"total_steps": table["total_steps"], "warmup_ratio": table["warmup_proportion"], "decay": "clip4clip"}
    for done, expected in enumerate(table["multiplier"]):
        assert rate_factor(done + 1, **shape) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert learning_rate(1, 1e-4, **shape) == 0
