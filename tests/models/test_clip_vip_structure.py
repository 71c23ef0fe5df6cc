"""Properties of CLIP-ViP for any weights: attention pattern, time, the plain CLIP inside, dtypes, FLOPs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipmill.base.errors import UserError
from tests.helpers.clip_vip import random_pixels, random_texts, tiny_config, tiny_model
from training.models.clip_vip.attention import proxy_attention
from training.models.clip_vip.model import ModelConfig, TowerConfig, cut_texts, resample_times, sample_flops


def dense_attention(qkv: Tensor, num_proxies: int, num_frames: int) -> Tensor:
    """Compute the pattern as one softmax under a boolean mask (docs/methods/clip_vip.md section 2.2)."""
    num_tokens = qkv.shape[1]
    frame = (torch.arange(num_tokens) - num_proxies).div(
        (num_tokens - num_proxies) // num_frames, rounding_mode="floor"
    )
    frame[:num_proxies] = -1
    allowed = (frame[:, None] == frame) | (frame[:, None] == -1) | (frame == -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("num_proxies, num_frames", [(4, 3), (1, 2), (4, 1), (2, 5)])
def test_factorised_attention_equals_dense_masked_attention(num_proxies: int, num_frames: int) -> None:
    shape = (2, num_proxies + num_frames * 6, 3, 2, 8)
    qkv = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cotangent = torch.randn(2, shape[1], 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, dense = proxy_attention(qkv, num_proxies, num_frames), dense_attention(qkv, num_proxies, num_frames)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad((out * cotangent).sum(), qkv)[0] for out in (ours, dense)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_a_patch_reaches_other_frames_only_through_the_proxies_one_layer_later() -> None:
    model = tiny_model()
    changed = random_pixels(1, 2)
    before: list[Tensor] = []
    after: list[Tensor] = []
    model.vision(changed, before)
    changed[:, 0, :, :16, :16] += 1  # one patch of frame 0
    model.vision(changed, after)
    frame1 = slice(4 + 4, 4 + 8)
    assert torch.equal(before[1][:, frame1], after[1][:, frame1])
    assert not torch.allclose(before[1][:, :4], after[1][:, :4])
    assert not torch.allclose(before[2][:, frame1], after[2][:, frame1])


def test_order_of_frames_matters_only_through_the_temporal_table() -> None:
    model, pixels = tiny_model().double(), random_pixels(2, 4).double()
    permuted = pixels[:, [2, 0, 3, 1]]
    assert not torch.allclose(model.encode_video(pixels), model.encode_video(permuted), atol=1e-3)
    with torch.no_grad():
        model.vision.time_embedding.zero_()
    torch.testing.assert_close(model.encode_video(pixels), model.encode_video(permuted), rtol=0, atol=1e-13)


def test_temporal_table_is_resampled_with_half_pixel_centres() -> None:
    table = torch.arange(12, dtype=torch.float64)[:, None]
    assert resample_times(table, 12) is table
    assert resample_times(table, 1).tolist() == [[5.5]]
    assert resample_times(table, 32)[:4, 0].tolist() == pytest.approx([0, 0.0625, 0.4375, 0.8125])
    for num_frames in (1, 2, 5, 8, 11, 13, 32):
        expected = F.interpolate(table.T[None], size=num_frames, mode="linear", align_corners=False)[0].T
        torch.testing.assert_close(resample_times(table, num_frames), expected, rtol=0, atol=1e-12)


def test_an_image_is_a_video_of_one_frame_with_the_mean_time() -> None:
    model, pixels = tiny_model(), random_pixels(3, 1)
    with_times = model.encode_video(pixels)
    with torch.no_grad():
        model.vision.time_embedding.copy_(model.vision.time_embedding[1:3].mean(0).expand(4, -1))
    torch.testing.assert_close(model.encode_video(pixels), with_times, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_without_proxies_and_with_one_frame_it_is_open_clips_vit_b_32(quick_gelu: bool) -> None:
    import open_clip

    from training.models.clip_vip.weights import from_open_clip_model

    name = "ViT-B-32-quickgelu" if quick_gelu else "ViT-B-32"
    torch.manual_seed(0)
    theirs = open_clip.create_model(name, pretrained=None).eval()
    ours = from_open_clip_model(theirs, open_clip.get_model_config(name), num_added=0, num_times=0)
    assert ours.config.vision.activation == ("quick_gelu" if quick_gelu else "gelu")
    assert ours.new_tensors == ()
    pixels, texts = random_pixels(2, 1, size=224), open_clip.tokenize(["a dog", "two cats on a red sofa"])
    with torch.no_grad():
        image = theirs.encode_image(pixels[:, 0], normalize=True)
        text = theirs.encode_text(texts, normalize=True)
        assert (ours.encode_video(pixels) - image).abs().max() <= 1e-5
        assert (ours.encode_text(texts) - text).abs().max() <= 1e-5


def test_float64_pixels_are_computed_in_float64_whatever_the_model() -> None:
    model, pixels = tiny_model(), random_pixels(2, 3)
    video = model.encode_video(pixels.double())
    assert video.dtype == torch.float64
    assert (video.norm(dim=1) - 1).abs().max() < 1e-14
    video.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.vision.parameters())
    torch.testing.assert_close(video, tiny_model().double().encode_video(pixels.double()), rtol=0, atol=1e-14)
    assert model.encode_video(pixels).dtype == torch.float32


def test_activation_checkpointing_changes_no_number() -> None:
    results = []
    for enabled in (False, True):
        model = tiny_model()
        model.set_activation_checkpointing(enabled)
        loss = model.encode_video(random_pixels(2, 3))[:, 0].sum() + model.encode_text(random_texts(2))[:, 0].sum()
        loss.backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(list(model.parameters())) - 1  # all but logit_scale
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_texts_are_cut_to_the_longest_of_the_batch_without_changing_a_number() -> None:
    model, ids = tiny_model().double(), random_texts(5, length=10)
    ids = F.pad(ids, (0, 2))
    assert cut_texts(ids)[0].shape == (5, 10)
    torch.testing.assert_close(model.encode_text(ids), model.encode_text(ids, cut=False), rtol=0, atol=1e-14)
    padding_mask = (torch.arange(12) <= ids.argmax(1)[:, None]).long()
    assert cut_texts(ids, padding_mask)[1] is None
    masked = model.encode_text(ids, padding_mask, cut=False)
    torch.testing.assert_close(model.encode_text(ids), masked, rtol=0, atol=1e-14)


def test_a_text_whose_start_is_masked_is_defined_and_not_cut() -> None:
    model, ids = tiny_model().double(), F.pad(random_texts(4, length=10), (0, 2))
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    assert cut_texts(ids, mask)[0].shape == ids.shape
    with_cut = model.encode_text(ids, mask)
    assert with_cut.isfinite().all()
    torch.testing.assert_close(with_cut, model.encode_text(ids, mask, cut=False), rtol=0, atol=0)


def test_padding_with_the_end_token_pools_at_the_first_of_them() -> None:
    model, ids = tiny_model(), random_texts(4)
    ends = ids.argmax(1)
    repeated = torch.where(torch.arange(ids.shape[1]) > ends[:, None], 49, ids)
    torch.testing.assert_close(model.encode_text(ids), model.encode_text(repeated), rtol=0, atol=1e-6)


def test_wrong_pixels_and_sizes_are_named() -> None:
    model = tiny_model()
    for wrong in (random_pixels(1, 2, size=48), random_pixels(1, 2)[0], random_pixels(1, 2).to(torch.uint8)):
        with pytest.raises(UserError, match=r"B, T, 3, 32, 32"):
            model.encode_video(wrong)
    with pytest.raises(UserError, match="context_length"):
        model.encode_text(random_texts(1, length=13), cut=False)
    with pytest.raises(UserError, match="num_heads"):
        TowerConfig(width=10, num_layers=1, num_heads=3, mlp_width=4)
    with pytest.raises(UserError, match="patch_size"):
        tiny_config(image_size=33)


def test_log_scale_stays_within_its_bounds() -> None:
    model = tiny_model()
    for value, expected in ((9.0, 5.298317366548036), (-1.0, 0.0), (3.0, 3.0)):
        with torch.no_grad():
            model.logit_scale.fill_(value)
        model.clamp_log_scale()
        assert model.logit_scale.item() == pytest.approx(expected)


def test_flop_estimate_is_that_of_the_published_sizes() -> None:
    b32 = ModelConfig(
        vision=TowerConfig(width=768, num_layers=12, num_heads=12, mlp_width=3072),
        text=TowerConfig(width=512, num_layers=12, num_heads=8, mlp_width=2048),
        embed_dim=512,
    )
    assert sample_flops(b32) / 1e9 == pytest.approx(374.2, abs=0.1)
    assert sample_flops(replace(b32, patch_size=16)) / 1e9 == pytest.approx(1401.5, abs=0.5)


def test_flop_estimate_equals_counted_flops() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from training.models.clip_vip.model import text_flops, video_flops

    model = tiny_model()
    with FlopCounterMode(display=False) as video, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.visual_projection(model.vision(random_pixels(1, 3), []))
    with FlopCounterMode(display=False) as text, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.encode_text(random_texts(1, length=10), cut=False)
    assert video.get_total_flops() == video_flops(model.config, 3)
    assert text.get_total_flops() == text_flops(model.config, 10)


def test_bfloat16_autocast_stays_near_float32_and_trains() -> None:
    model, pixels, ids = tiny_model(), random_pixels(2, 3), random_texts(2)
    with torch.autocast("cpu", torch.bfloat16):
        video, text = model.encode_video(pixels), model.encode_text(ids)
    assert (video.float() - model.encode_video(pixels)).abs().max() < 0.05
    (video.sum() + text.sum()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == ["logit_scale"]


def test_features_have_length_one_under_bf16_too():
    model = tiny_model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = torch.cat([model.encode_video(random_pixels(6, 2)), model.encode_text(random_texts(6))])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(12), rtol=0, atol=1e-5)
