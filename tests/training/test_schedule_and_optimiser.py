"""Learning rates, decay groups and updates equal the reference."""

import pytest
import torch

from tests.helpers.clip_vip import numbers, tensors, tiny_model
from training.optim.optimizers import PublishedAdamW, build_optimiser, parameter_groups, set_learning_rate
from training.optim.schedule import learning_rate, rate_factor


def test_every_tabulated_rate_equals_the_reference() -> None:
    tables = numbers("schedule", "lr.json")["tables"]
    assert len(tables) == 5
    for table in tables:
        for step, expected in enumerate(table["multiplier"]):
            rate = learning_rate(
                step, 1.0, total_steps=table["total_steps"], warmup_ratio=table["warmup_ratio"], decay=table["decay"]
            )
            assert rate == pytest.approx(expected, rel=1e-9, abs=1e-15), (table["decay"], step)


def test_absolute_rates_equal_the_reference_with_its_floor() -> None:
    for base, rates in numbers("schedule", "lr.json")["absolute_cosine_1000_warmup_0.01"].items():
        for step, expected in rates.items():
            assert learning_rate(int(step), float(base), total_steps=1000) == pytest.approx(expected, rel=1e-9)


def test_rates_rise_to_the_base_and_fall_to_the_floor() -> None:
    rates = [learning_rate(step, 5e-6, total_steps=200, warmup_ratio=0.1) for step in range(1, 201)]
    assert max(rates) == rates[19] == 5e-6
    assert rates[:20] == sorted(rates[:20]) and rates[19:-1] == sorted(rates[19:-1], reverse=True)
    assert rates[-1] == 1e-8
    assert learning_rate(500, 5e-6, total_steps=200) == 1e-8
    assert rate_factor(1, total_steps=1) == 0.0 or rate_factor(1, total_steps=1) < 1e-16


def names_by_decay(published: bool) -> tuple[set[str], set[str]]:
    groups = parameter_groups(tiny_model().named_parameters(), weight_decay=0.05, published_decay=published)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    return decayed, {name for group in groups if not group["weight_decay"] for name in group["names"]}


def test_only_matrices_decay_by_default() -> None:
    model = tiny_model()
    decayed, spared = names_by_decay(published=False)
    assert decayed | spared == {name for name, _ in model.named_parameters()}
    assert all(model.get_parameter(name).ndim >= 2 and "norm" not in name for name in decayed)
    assert decayed == {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and ("embedding" not in name or "patch" in name)
    }
    for name in ("logit_scale", "vision.time_embedding", "vision.added_embedding", "text.token_embedding.weight"):
        assert name in spared


def test_published_grouping_spares_biases_and_the_log_scale_only() -> None:
    _, spared = names_by_decay(published=True)
    assert spared == {name for name, _ in tiny_model().named_parameters() if "bias" in name or "logit_scale" in name}


def test_groups_keep_their_factor_through_every_rate() -> None:
    named = [(f"module._orig_mod.{name}", p) for name, p in tiny_model().named_parameters()]
    groups = parameter_groups(
        named, weight_decay=0.1, rate_factors={"logit_scale": 10.0, "vision": 0.5, "vision.time": 2}
    )
    optimiser = build_optimiser(groups)
    set_learning_rate(optimiser, 1e-3)
    rates = {name: group["lr"] for group in optimiser.param_groups for name in group["names"]}
    assert rates["logit_scale"] == 1e-2 and rates["vision.time_embedding"] == 2e-3
    assert rates["vision.class_embedding"] == 5e-4 and rates["text.blocks.0.fc1.weight"] == 1e-3
    assert optimiser.defaults["betas"] == (0.9, 0.98) and optimiser.defaults["fused"]


def test_frozen_parameters_are_in_no_group() -> None:
    model = tiny_model()
    model.text.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1)
    assert not any(name.startswith("text.") for group in groups for name in group["names"])


@pytest.mark.parametrize("precision, dtype, limit", [("f32", torch.float32, 1e-6), ("f64", torch.float64, 1e-14)])
def test_published_update_equals_the_reference(precision: str, dtype: torch.dtype, limit: float) -> None:
    settings = numbers("schedule", "optim.json")["adamw"]
    case = tensors("schedule", "optim.safetensors")
    expected = [case[f"adamw/{precision}/param{i}"] for i in (0, 1)]
    parameters = [torch.nn.Parameter(path[0].clone().to(dtype)) for path in expected]
    optimiser = PublishedAdamW(
        [{"params": parameters[:1], "weight_decay": settings["wd"]}, {"params": parameters[1:]}],
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
    )
    for step in range(settings["steps"]):
        for i, parameter in enumerate(parameters):
            parameter.grad = case[f"in/grad{i}"][step].to(dtype)
        optimiser.step()
        for parameter, path in zip(parameters, expected, strict=True):
            assert (parameter - path[step + 1]).abs().max() <= limit


def test_fused_adamw_is_the_published_update_but_for_epsilon_and_order() -> None:
    """They agree for gradients far above epsilon, since the order of decay differs in second order only."""
    results = []
    for published in (True, False):
        model = tiny_model(seed=5)
        optimiser = build_optimiser(
            parameter_groups(model.named_parameters(), weight_decay=0.1), "clip_vip" if published else "adamw"
        )
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            set_learning_rate(optimiser, 1e-3)
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.grad = noise + noise.sign()
            optimiser.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (results[0] - results[1]).abs().max() < 5e-6
    assert (results[0] - torch.cat([p.detach().flatten() for p in tiny_model(seed=5).parameters()])).abs().max() > 1e-3
