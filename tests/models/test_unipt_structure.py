"""Properties of UniPT's side networks beyond the published numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.base.errors import UserError
from tests.helpers.clip_vip import random_pixels, random_texts, tiny_config, tiny_model
from training.models.clip_vip.model import ClipVip, ModelConfig, TowerConfig
from training.models.unipt.model import Adapter, UniPtClip, side_tensors
from training.models.unipt.settings import UniPtSettings


def tiny_unipt(seed: int = 0, pooling: str = "proxy", **settings) -> UniPtClip:
    """Make a small model in float64 with larger weights than at the published start, so that they matter."""
    shape = {"pooling": "mean", "num_added": 0, "num_times": 0} if pooling == "mean" else {}
    model = UniPtClip(tiny_model(seed, **shape), UniPtSettings(**settings), seed)
    with torch.no_grad():
        for tensor in side_tensors(model.state_dict()).values():
            tensor.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(tensor.shape)))
    return model.double()


def plain_loop(adapter: Adapter, states: list[Tensor], guide: Tensor, mask: Tensor, position: Tensor) -> Tensor:
    """Compute steps 1 to 7 of docs/methods/unipt.md section 3 item by item and token by token."""
    outputs = []
    for item in range(len(guide)):
        query = adapter.downsample_layer(guide[item])
        features, gates = [], []
        for down, state in zip(adapter.downsample_layers, states, strict=True):
            tokens = [down(token) for token in state[item]]
            weights = [F.relu(query @ token) * on for token, on in zip(tokens, mask[item], strict=True)]
            total = max(sum(weights).item(), 1e-6)
            feature = sum(weight / total * token for weight, token in zip(weights, tokens, strict=True))
            features.append(feature + tokens[int(position[item])])
            pooled = sum(token * on for token, on in zip(tokens, mask[item], strict=True)) / mask[item].sum()
            gates.append(adapter.gate_layer(query * pooled))
        shares = torch.cat(gates).softmax(0)
        mixed = sum(share * feature for share, feature in zip(shares, features, strict=True))
        outputs.append(guide[item] + adapter.upsample_layer(mixed))
    return torch.stack(outputs)


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_it_equals_a_plain_loop_over_items_layers_and_tokens(reduction: int) -> None:
    torch.manual_seed(0)
    adapter = Adapter([10, 6, 10], 8, reduction).double()
    states = [torch.randn(4, 7, width, dtype=torch.float64) for width in (10, 6, 10)]
    guide, position = torch.randn(4, 8, dtype=torch.float64), torch.tensor([0, 6, 3, 2])
    mask = (torch.rand(4, 7) < 0.6).double()
    mask[torch.arange(4), position] = 1
    expected = plain_loop(adapter, states, guide, mask, position)
    torch.testing.assert_close(adapter(states, guide, mask, position).features_NC, expected, rtol=0, atol=1e-13)


def test_without_any_positive_similarity_only_the_anchors_own_token_remains() -> None:
    torch.manual_seed(0)
    adapter = Adapter([6], 8).double()
    with torch.no_grad():
        adapter.downsample_layer[1].bias.fill_(1)
        adapter.downsample_layer[1].weight.zero_()  # the query is all ones …
        adapter.downsample_layers[0][1].weight.abs_().neg_()  # … and every token's feature negative
        adapter.downsample_layers[0][1].bias.fill_(-1)
    state, guide = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    result = adapter([state], guide)
    torch.testing.assert_close(result.mixed_NI, adapter.downsample_layers[0](state[:, 0]), rtol=0, atol=1e-14)
    result.features_NC.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


def test_confidences_of_the_layers_sum_to_one_and_are_logged() -> None:
    model = tiny_unipt()
    assert model.log_values() == {}
    model.encode_video(random_pixels(3, 2).double())
    model.encode_text(random_texts(3))
    logged = model.log_values()
    assert set(logged) == {f"{side}_layer_{n}" for side in ("image", "text") for n in range(3)}
    for side in ("image", "text"):
        shares = [float(logged[f"{side}_layer_{n}"]) for n in range(3)]
        assert min(shares) > 0 and sum(shares) == pytest.approx(1)


def formula(widths: list[int], embed_dim: int, reduction: int) -> int:
    """Return the parameter count of docs/methods/unipt.md section 3."""
    inner = embed_dim // reduction
    return sum((width + 1) * inner for width in widths) + (embed_dim + 1) * inner + (inner + 1) * embed_dim + inner + 1


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_parameter_count_is_the_published_one() -> None:
    vision, text = TowerConfig(768, 12, 12, 3072), TowerConfig(512, 12, 8, 2048)
    config = ModelConfig(vision, text, 512, pooling="mean", num_added=0, num_times=0)
    with torch.device("meta"):
        backbone = ClipVip(config)
    model = UniPtClip(backbone)
    assert num_parameters(model.image_adapter) == formula([768] * 13, 512, 1) == 5_644_289
    assert num_parameters(model.text_adapter) == formula([512] * 13, 512, 1) == 3_940_353
    assert num_parameters(model) == 9_584_642


@pytest.mark.parametrize("every, layers", [(1, 3), (2, 2), (3, 1), (100, 1)])
@pytest.mark.parametrize("reduction", [1, 2])
def test_parameter_count_follows_the_settings(every: int, layers: int, reduction: int) -> None:
    model = tiny_unipt(every=every, reduction=reduction)
    expected = formula([32] * layers, 16, reduction) + formula([24] * layers, 16, reduction)
    assert num_parameters(model) == expected


def test_every_second_layer_is_counted_from_the_last() -> None:
    model, seen = tiny_unipt(every=2), []
    model.image_adapter.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    pixels = random_pixels(2, 2).double()
    model.encode_video(pixels)
    states: list[Tensor] = []
    model.backbone.vision(pixels, states)
    assert len(seen) == 2 and torch.equal(seen[0], states[0]) and torch.equal(seen[1], states[2])


@pytest.mark.parametrize("tokens, count", [("all", 4 + 3 * 4), ("frames", 4 + 3), ("proxies", 4)])
def test_fewer_tokens_of_a_video_can_be_read(tokens: str, count: int) -> None:
    model, seen = tiny_unipt(tokens=tokens), []
    model.image_adapter.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    pixels = random_pixels(2, 3).double()
    assert model.encode_video(pixels).isfinite().all()
    states: list[Tensor] = []
    model.backbone.vision(pixels, states)
    assert [state.shape[1] for state in seen] == [count] * 3
    assert torch.equal(seen[1][:, :4], states[1][:, :4])
    assert all(state.untyped_storage().nbytes() == state.numel() * 8 for state in seen)
    if tokens == "frames":
        torch.testing.assert_close(seen[2][:, 5], states[2][:, 8:12].mean(1), rtol=0, atol=1e-14)


def test_padding_behind_a_text_never_changes_it() -> None:
    model, ids = tiny_unipt(), random_texts(4, length=8)
    texts = model.encode_text(ids, cut=False)
    for filler in (0, 7, 49):
        behind = torch.arange(12) > ids.argmax(1, keepdim=True)
        padded = torch.where(behind, filler, F.pad(ids, (0, 4)))
        torch.testing.assert_close(model.encode_text(padded, cut=False), texts, rtol=0, atol=1e-14)
    torch.testing.assert_close(model.encode_text(F.pad(ids, (0, 4))), texts, rtol=0, atol=1e-14)


def test_a_word_whose_id_is_0_is_read_like_any_other() -> None:
    """Id 0 is "!" in CLIP's vocabulary; the published code treats it as padding."""
    model = tiny_unipt()
    ids = torch.tensor([[48, 5, 0, 6, 49]])
    states: list[Tensor] = []
    guide = model.backbone.text_projection(model.backbone.text(ids, None, states))
    everywhere = model.text_adapter(states, guide, None, torch.tensor([4])).features_NC
    torch.testing.assert_close(model.text_features(ids), everywhere, rtol=0, atol=1e-14)
    without = model.text_adapter(states, guide, ids != 0, torch.tensor([4])).features_NC
    assert not torch.allclose(without, everywhere, atol=1e-3)


def test_a_masked_word_is_not_read() -> None:
    model, ids = tiny_unipt(), torch.tensor([[48, 5, 3, 6, 49]])
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    changed = torch.tensor([[48, 5, 9, 6, 49]])
    torch.testing.assert_close(model.encode_text(ids, mask), model.encode_text(changed, mask), rtol=0, atol=1e-14)
    assert not torch.allclose(model.encode_text(ids, mask), model.encode_text(ids), atol=1e-3)


def test_order_of_frames_does_not_matter_on_a_plain_clip() -> None:
    model, pixels = tiny_unipt(pooling="mean"), random_pixels(2, 4).double()
    permuted = pixels[:, [2, 0, 3, 1]]
    torch.testing.assert_close(model.encode_video(permuted), model.encode_video(pixels), rtol=0, atol=1e-14)
    frames = F.normalize(model.frame_features(pixels), dim=-1)
    torch.testing.assert_close(F.normalize(frames.mean(1), dim=-1), model.encode_video(pixels), rtol=0, atol=1e-14)


def test_a_zero_start_is_the_frozen_backbone_exactly() -> None:
    backbone, pixels, ids = tiny_model(), random_pixels(3, 2), random_texts(3)
    model = UniPtClip(backbone, UniPtSettings(zero_start=True))
    with torch.no_grad():
        whole = backbone.visual_projection(backbone.vision(pixels, []))  # as UniPT runs it: no block shortened
        assert torch.equal(model.encode_video(pixels), F.normalize(whole, dim=-1))
        assert torch.equal(model.encode_text(ids), backbone.encode_text(ids))
        torch.testing.assert_close(model.encode_video(pixels), backbone.encode_video(pixels), rtol=0, atol=1e-6)
        published = UniPtClip(backbone).encode_video(pixels)
        assert 1e-6 < (published - model.encode_video(pixels)).abs().max() < 0.1


def test_the_start_is_a_function_of_the_seed() -> None:
    one, same, other = (UniPtClip(tiny_model(), seed=seed) for seed in (3, 3, 4))
    for name, tensor in side_tensors(one.state_dict()).items():
        assert torch.equal(tensor, side_tensors(same.state_dict())[name])
        if name.endswith("bias"):
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, side_tensors(other.state_dict())[name])
            assert tensor.std().item() == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize("pooling", ["proxy", "mean"])
def test_float64_pixels_are_computed_in_float64_whatever_the_model(pooling: str) -> None:
    pixels = random_pixels(2, 3).double()
    wide = tiny_unipt(pooling=pooling)
    narrow = tiny_unipt(pooling=pooling).float()
    narrow_in_wide = tiny_unipt(pooling=pooling).float().double()
    video = narrow.encode_video(pixels)
    assert video.dtype == torch.float64 == wide.encode_video(pixels).dtype
    torch.testing.assert_close(video, narrow_in_wide.encode_video(pixels), rtol=0, atol=1e-13)
    assert narrow.encode_video(pixels.float()).dtype == torch.float32
    video.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in narrow.image_adapter.parameters())


def test_bfloat16_autocast_stays_near_float32_and_trains() -> None:
    model, pixels, ids = tiny_unipt().float(), random_pixels(2, 3), random_texts(2)
    with torch.autocast("cpu", torch.bfloat16):
        video, text = model(pixels, ids)
    assert (video.float() - model.encode_video(pixels)).abs().max() < 0.08
    assert (text.float() - model.encode_text(ids)).abs().max() < 0.08
    (video[:, 0].sum() + text[:, 0].sum()).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_wrong_inputs_and_settings_are_named() -> None:
    model = tiny_unipt()
    with pytest.raises(UserError, match=r"B, T, 3, 32, 32"):
        model.encode_video(random_pixels(1, 2, size=48))
    with pytest.raises(UserError, match="context_length"):
        model.encode_text(random_texts(1, length=13), cut=False)
    with pytest.raises(UserError, match="unipt.reduction is 3"):
        UniPtClip(tiny_model(), UniPtSettings(reduction=3))
    with pytest.raises(UserError, match="activation_checkpointing"):
        model.set_activation_checkpointing(True)


def test_the_backbones_config_is_the_models() -> None:
    backbone = tiny_model()
    assert UniPtClip(backbone).config == replace(tiny_config(), words=backbone.config.words)
