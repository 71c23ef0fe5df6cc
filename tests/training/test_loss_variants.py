"""Values and gradients of every omnisource variant equal the reference and brute force, with missing rows too."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipmill.base.errors import UserError
from tests.helpers.clip_vip import tensors
from training.losses.omnisource import TERMS, omnisource_loss

PUBLISHED = {
    "NCELearnableTempLoss": "vs",
    "VidImgDivideNCELearnableTempLoss": "vs_fc",
    "NCELearnableTempLoss_vs_vc": "vs_vc",
    "NCELearnableTempLoss_vs_vc_fc": "vs_vc_fc",
    "NCELearnableTempLoss_vsc": "vsc",
    "NCELearnableTempLoss_vsc_fc": "vsc_fc",
    "VidImgNCELearnableTempLoss": "joint",
}
MANY = {"VidImgDivideNCELearnableTempLoss+many": "vs_fc", "VidImgNCELearnableTempLoss+many": "joint"}
CASES = [("n5_scale14", key) for key in PUBLISHED] + [("n8_scale100", key) for key in PUBLISHED | MANY]
NAMES = ("video", "subtitle", "frame", "caption")


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("file, key", CASES)
def test_values_and_gradients_equal_the_reference(file: str, key: str, precision: str) -> None:
    case = tensors("losses", f"{file}.safetensors")
    dtype = torch.float32 if precision == "f32" else torch.float64
    many = "_many" if key.endswith("+many") else ""
    names = ["vis", "text", f"img{many}", f"cap{many}", "log_scale"]
    inputs = {name: case[f"in/{name}"].to(dtype).requires_grad_() for name in names}
    total = omnisource_loss(*inputs.values(), variant=(PUBLISHED | MANY)[key]).total
    assert total.dtype == dtype
    total.backward()
    # float32 is also compared with the float64 value: near 68, correct results differ by one step of 7.6e-6
    assert abs(total.item() - case[f"{key}/f64/loss"].item()) <= (6e-6 if precision == "f32" else 1e-12)
    for name, value in inputs.items():
        expected = case.get(f"{key}/{precision}/grad_{name}")
        if expected is None:
            assert value.grad is None or value.grad.abs().max() == 0, name
        else:
            limit = 2e-5 if precision == "f32" else 1e-12
            assert (value.grad - expected).abs().max() <= limit * expected.abs().max().clamp(min=1), name


def unit_rows(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = {name: torch.randn(count, 6, dtype=torch.float64, generator=generator) for name in NAMES}
    return {name: F.normalize(row, dim=1).requires_grad_() for name, row in rows.items()}


def brute_force(rows: dict[str, Tensor], masks: dict[str, list[bool]], scale: float, variant: str) -> dict[str, float]:
    """Compute the definition one row and one exponential at a time."""

    def e(a: str, i: int, b: str, j: int) -> float:
        return math.exp(scale * (rows[a][i] @ rows[b][j]).item())

    if variant == "joint":
        return joint_by_force(masks, e)
    means = {}
    for term in TERMS[variant]:
        losses = []
        for i, (asks, answers) in enumerate(zip(masks[term.query], masks[term.key], strict=True)):
            if asks and answers:
                below = sum(e(term.query, i, term.key, j) for j, there in enumerate(masks[term.key]) if there)
                if term.other:
                    below += sum(
                        e(term.query, i, term.other, j) for j, there in enumerate(masks[term.other]) if there and j != i
                    )
                losses.append(-math.log(e(term.query, i, term.key, i) / below))
        means[term.name] = sum(losses) / len(losses) if losses else 0.0
    return means


def joint_by_force(masks: dict[str, list[bool]], e: Any) -> dict[str, float]:
    visual = [(name, i) for name in ("video", "frame") for i, there in enumerate(masks[name]) if there]
    text = [(name, i) for name in ("subtitle", "caption") for i, there in enumerate(masks[name]) if there]
    partner = {"video": "subtitle", "frame": "caption", "subtitle": "video", "caption": "frame"}
    means = {}
    for term, queries, keys in (("visual_to_text", visual, text), ("text_to_visual", text, visual)):
        losses = [
            -math.log(e(name, i, partner[name], i) / sum(e(name, i, *key) for key in keys))
            for name, i in queries
            if (partner[name], i) in keys
        ]
        means[term] = sum(losses) / len(losses) if losses else 0.0
    return means


ALL = {name: [True] * 5 for name in NAMES}
HOLES = {
    "video": [True, True, True, True, True],
    "subtitle": [True, False, True, True, False],
    "frame": [True, True, False, True, True],
    "caption": [False, True, True, True, False],
}


@pytest.mark.parametrize("masks", [ALL, HOLES], ids=["all rows", "rows missing"])
@pytest.mark.parametrize("variant", TERMS)
def test_each_variant_equals_a_loop_over_its_definition(variant: str, masks: dict[str, list[bool]]) -> None:
    rows = unit_rows(5, seed=1)
    expected = brute_force(rows, masks, 7.0, variant)
    mask_arguments = {f"{name}_mask": torch.tensor(mask) for name, mask in masks.items()}
    loss = omnisource_loss(*rows.values(), torch.tensor(math.log(7.0), dtype=torch.float64), variant, **mask_arguments)
    assert {name: pytest.approx(value, abs=1e-12) for name, value in expected.items()} == {
        name: value.item() for name, value in loss.terms.items()
    }
    assert loss.total.item() == pytest.approx(sum(expected.values()), abs=1e-12)


def test_each_video_to_text_softmax_has_one_positive_and_all_others_of_both_texts() -> None:
    """With equal features, a softmax over k entries costs ln k; V to (S, C) has 2B-1 entries."""
    same = F.normalize(torch.ones(4, 3, dtype=torch.float64), dim=1)
    terms = omnisource_loss(same, same, same, same, torch.tensor(4.6, dtype=torch.float64), "vsc_fc").terms
    sizes = {name: round(math.exp(value.item())) for name, value in terms.items()}
    expected = {"video_to_subtitle": 7, "video_to_caption": 7, "subtitle_to_video": 4, "caption_to_video": 4}
    assert sizes == expected | {"frame_to_caption": 4, "caption_to_frame": 4}


@pytest.mark.parametrize("variant", TERMS)
def test_missing_rows_get_no_gradient_and_their_content_does_not_matter(variant: str) -> None:
    masks = {f"{name}_mask": torch.tensor(mask) for name, mask in HOLES.items()}
    scale = torch.tensor(2.0, dtype=torch.float64)
    results = []
    for filler in (0.0, float("nan")):
        rows = unit_rows(5, seed=2)
        filled = {
            name: torch.where(masks[f"{name}_mask"][:, None], row, filler).detach().requires_grad_()
            for name, row in rows.items()
        }
        total = omnisource_loss(*filled.values(), scale, variant, **masks).total
        total.backward()
        for name, row in filled.items():
            if row.grad is not None:
                assert row.grad.isfinite().all()
                assert (row.grad[~masks[f"{name}_mask"]] == 0).all()
        results.append(total.item())
    assert results[0] == results[1]


def test_a_clip_that_could_not_be_read_is_as_if_it_were_not_in_the_batch() -> None:
    rows, scale = unit_rows(5, seed=3), torch.tensor(2.0, dtype=torch.float64)
    readable = torch.tensor([True, False, True, True, False])
    for variant in TERMS:
        masked = omnisource_loss(*rows.values(), scale, variant, video_mask=readable).total
        shorter = omnisource_loss(*(row[readable] for row in rows.values()), scale, variant).total
        assert masked.item() == pytest.approx(shorter.item(), abs=1e-13)


def test_an_absent_source_drops_its_terms_and_nothing_else() -> None:
    rows, scale = unit_rows(4, seed=4), torch.tensor(1.5, dtype=torch.float64)
    video, subtitle, frame, caption = rows.values()
    plain = omnisource_loss(video, subtitle, None, None, scale, "vs").total
    for variant in ("vs_fc", "vs_vc", "vs_vc_fc", "vsc", "vsc_fc", "joint"):
        assert omnisource_loss(video, subtitle, None, None, scale, variant).total.item() == pytest.approx(plain.item())
    only_caption = omnisource_loss(video, None, frame, caption, scale, "vsc_fc")
    assert set(only_caption.terms) == {"video_to_caption", "caption_to_video", "frame_to_caption", "caption_to_frame"}
    swapped = omnisource_loss(video, caption, None, None, scale, "vs").total
    assert omnisource_loss(video, None, None, caption, scale, "vsc").total.item() == pytest.approx(swapped.item())


def test_a_batch_without_any_row_is_zero_with_a_gradient() -> None:
    rows, scale = unit_rows(3, seed=6), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    total = omnisource_loss(*rows.values(), scale, video_mask=torch.zeros(3)).total
    total.backward()
    assert total.item() == 0 and scale.grad.item() == 0
    assert all(row.grad is None or (row.grad == 0).all() for row in rows.values())


def test_half_precision_features_are_scored_in_float32_even_under_autocast() -> None:
    rows = {name: row.detach().bfloat16() for name, row in unit_rows(5, seed=7).items()}
    scale = torch.tensor(4.6)
    with torch.autocast("cpu", torch.bfloat16):
        total = omnisource_loss(*rows.values(), scale).total
    expected = omnisource_loss(*(row.float() for row in rows.values()), scale).total
    assert total.dtype == torch.float32 and total.item() == expected.item()


def test_wrong_arguments_are_named() -> None:
    rows, scale = unit_rows(4, seed=8), torch.tensor(2.0)
    video, subtitle, frame, caption = rows.values()
    for arguments, words in (
        ((video, subtitle, frame, caption, scale, "vcs"), "vsc_fc"),
        ((None, subtitle, frame, caption, scale), "video"),
        ((video, subtitle[:3], frame, caption, scale), "differ"),
        ((video, subtitle, frame[:3], caption[:3], scale, "vsc_fc"), "differ"),
    ):
        with pytest.raises(UserError, match=words):
            omnisource_loss(*arguments)
    with pytest.raises(UserError, match="subtitle"):
        omnisource_loss(video, subtitle, frame, caption, scale, subtitle_mask=torch.ones(3))
    for variant, name in itertools.product(("vs", "vs_fc"), ("frame", "caption")):
        assert omnisource_loss(*(None if key == name else row for key, row in rows.items()), scale, variant).total > 0
