"""UniPT trains its side networks only, keeps nothing for a backward pass through the backbone, and learns."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.clip_vip import random_pixels, random_texts, tiny_config, tiny_model
from training.cost.footprint import saved_bytes
from training.losses.omnisource import omnisource_loss
from training.models.clip_vip.model import ClipVip, ModelConfig, TowerConfig
from training.models.unipt.model import UniPtClip
from training.models.unipt.settings import UniPtSettings
from training.optim.gradient_cache import cached_backward
from training.optim.optimizers import build_optimiser, parameter_groups, set_learning_rate


def loss_of(model: nn.Module, pixels: Tensor, ids: Tensor) -> Tensor:
    video, text = model(pixels, ids)
    return omnisource_loss(video, text, None, None, model.logit_scale, "vs").total


def optimiser_for(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    optimiser = build_optimiser(parameter_groups(model.named_parameters(), weight_decay=0.2))
    set_learning_rate(optimiser, lr)
    return optimiser


@pytest.mark.parametrize("pooling", ["proxy", "mean"])
def test_a_step_changes_the_side_networks_and_not_a_bit_of_the_backbone(pooling: str) -> None:
    shape = {"pooling": "mean", "num_added": 0, "num_times": 0} if pooling == "mean" else {}
    model = UniPtClip(tiny_model(**shape))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = optimiser_for(model.train(), lr=1e-2)
    loss_of(model, random_pixels(4, 2), random_texts(4)).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    side = {name for name in before if name.startswith(("image_adapter.", "text_adapter."))}
    assert with_gradient == side
    optimiser.step()
    model.clamp_log_scale()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    unseen = {"image_adapter.gate_layer.bias", "text_adapter.gate_layer.bias"}  # a softmax over layers cancels it
    assert side - unseen <= changed <= side


def test_the_backbone_stays_in_eval_mode() -> None:
    model = UniPtClip(tiny_model()).train()
    assert model.training and model.image_adapter.training and not model.backbone.training
    assert not any(module.training for module in model.backbone.modules())


def test_gradient_caching_gives_the_whole_batchs_gradient() -> None:
    pixels, ids = random_pixels(6, 2).double(), random_texts(6)
    whole, cached = UniPtClip(tiny_model()).double(), UniPtClip(tiny_model()).double()
    loss_of(whole, pixels, ids).backward()
    cached_backward(
        lambda rows: cached(pixels[rows], ids[rows]),
        torch.arange(6).split(2),
        lambda features, used: omnisource_loss(*features, None, None, used[0], "vs").total,
        used_by_loss=[cached.logit_scale],
    )
    for one, other in zip(whole.parameters(), cached.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-10, atol=1e-12)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_nothing_is_kept_for_a_backward_pass_through_the_backbone() -> None:
    model, pixels, ids = UniPtClip(tiny_model()), random_pixels(2, 3), random_texts(2)
    assert saved_bytes(model, lambda: (model._video_states(pixels), model._text_states(ids, None))) == 0
    guide, states = model._video_states(pixels)
    assert not guide.requires_grad and not any(state.requires_grad for state in states)


def kept_by(config: ModelConfig, settings: UniPtSettings | None, num_frames: int) -> int:
    """Return the bytes kept for a batch of two; None trains the whole backbone."""
    model: nn.Module = ClipVip(config)
    if settings is None:
        assert isinstance(model, ClipVip)
        model.initialise()
    else:
        model = UniPtClip(tiny_filled(config), settings)
    pixels = torch.zeros(2, num_frames, 3, config.image_size, config.image_size)
    ids = torch.full((2, 8), config.vocab_size - 1)
    return saved_bytes(model, lambda: (model.encode_video(pixels), model.encode_text(ids, cut=False)))


def tiny_filled(config: ModelConfig) -> ClipVip:
    model = ClipVip(config)
    model.initialise()
    return model


SMALL = replace(
    tiny_config(),
    vision=TowerConfig(width=64, num_layers=4, num_heads=4, mlp_width=256),
    text=TowerConfig(width=64, num_layers=4, num_heads=4, mlp_width=256),
    embed_dim=64,
    image_size=64,
)


@pytest.mark.parametrize("pooling", ["proxy", "mean"])
def test_what_is_kept_is_a_small_part_of_full_fine_tuning(pooling: str) -> None:
    config = replace(SMALL, pooling=pooling, num_added=0, num_times=0) if pooling == "mean" else SMALL
    full, whole = kept_by(config, None, 4), kept_by(config, UniPtSettings(), 4)
    assert whole < 0.15 * full
    assert kept_by(config, UniPtSettings(tokens="frames"), 4) < 0.5 * whole
    assert kept_by(config, UniPtSettings(every=2), 4) < 0.7 * whole


def test_growth_per_frame_is_a_small_part_of_full_fine_tunings() -> None:
    full = kept_by(SMALL, None, 8) - kept_by(SMALL, None, 4)
    side = kept_by(SMALL, UniPtSettings(), 8) - kept_by(SMALL, UniPtSettings(), 4)
    pooled = kept_by(SMALL, UniPtSettings(tokens="frames"), 8) - kept_by(SMALL, UniPtSettings(tokens="frames"), 4)
    assert 0 < pooled < 0.1 * side and side < 0.15 * full


@pytest.mark.parametrize("pooling, least", [("proxy", 15), ("mean", 12)])
def test_at_the_published_size_full_fine_tuning_keeps_more_than_ten_times_as_much(pooling: str, least: int) -> None:
    """ViT-B/32, two clips of 12 frames and two texts of 32 tokens in float32, on fake tensors without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = ModelConfig(TowerConfig(768, 12, 12, 3072), TowerConfig(512, 12, 8, 2048), 512)
    if pooling == "mean":
        config = replace(config, pooling="mean", num_added=0, num_times=0)
    kept: dict[tuple[str, int], int] = {}
    with FakeTensorMode():
        for num_frames in (4, 12):
            pixels, ids = torch.empty(2, num_frames, 3, 224, 224), torch.zeros(2, 32, dtype=torch.long)
            for name, model in {"full": ClipVip(config), "unipt": UniPtClip(ClipVip(config))}.items():
                step = lambda m=model: (m.encode_video(pixels), m.encode_text(ids, cut=False))  # noqa: B023, E731
                kept[name, num_frames] = saved_bytes(model, step)
    print({f"{name} at {num_frames} frames": f"{value / 1e6:.1f} MB" for (name, num_frames), value in kept.items()})
    assert kept["full", 12] > least * kept["unipt", 12]
    growth = {name: kept[name, 12] - kept[name, 4] for name in ("full", "unipt")}
    assert growth["full"] > least * growth["unipt"]


# -- learning ----------------------------------------------------------------------------------------------------------


def colour_world() -> tuple[Tensor, Tensor]:
    """Make 81 clips of four patches, each in one of three colours, and texts that name the four colours."""
    generator = torch.Generator().manual_seed(0)
    names = torch.tensor(list(itertools.product(range(3), repeat=4)))[torch.randperm(81, generator=generator)]
    patches = (3 * torch.eye(3) - 1)[names].view(81, 1, 2, 2, 3).permute(0, 1, 4, 2, 3)
    pixels = patches.repeat_interleave(16, 3).repeat_interleave(16, 4).expand(-1, 2, -1, -1, -1)
    ids = torch.full((81, 6), 49)
    ids[:, 0], ids[:, 1:5] = 48, 1 + names + 3 * torch.arange(4)
    return pixels + 0.2 * torch.randn(pixels.shape, generator=generator), ids


def mean_rank(model: nn.Module, pixels: Tensor, ids: Tensor) -> float:
    with torch.no_grad():
        video, text = model(pixels, ids)
    similarity = text @ video.T
    return (similarity >= similarity.diagonal().unsqueeze(1)).sum(1).double().mean().item()


@pytest.mark.slow
def test_it_learns_what_the_frozen_backbone_cannot_tell() -> None:
    """With 21 held-out clips, chance is a mean rank of 11; the result of the last layer alone is printed too."""
    (pixels, ids), ranks = colour_world(), {}
    for name, settings in {"all layers": UniPtSettings(), "last layer": UniPtSettings(every=100)}.items():
        model = UniPtClip(tiny_model(1), settings)
        optimiser = optimiser_for(model, lr=3e-3)
        ranks["frozen"] = mean_rank(model.backbone, pixels[60:], ids[60:])
        for step in range(200):
            rows = torch.randperm(60, generator=torch.Generator().manual_seed(step))[:30]
            optimiser.zero_grad()
            loss_of(model, pixels[rows], ids[rows]).backward()
            optimiser.step()
        ranks[name] = mean_rank(model, pixels[60:], ids[60:])
    print(ranks)
    assert ranks["all layers"] < 0.6 * ranks["frozen"]
