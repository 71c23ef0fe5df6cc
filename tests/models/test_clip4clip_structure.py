"""Properties of CLIP4Clip's heads and stems beyond the published numbers."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipmill.base.errors import UserError
from tests.helpers.clip_vip import random_pixels, random_texts, tiny_model
from tests.helpers.pair_losses import mil_nce, symmetric_cross_entropy
from training.losses.omnisource import omnisource_loss
from training.models.clip4clip.model import Clip4Clip
from training.models.clip4clip.settings import Clip4ClipSettings
from training.optim.optimizers import parameter_groups

HEADS = ("meanP", "seqLSTM", "seqTransf", "tightTransf")
LOOSE = HEADS[:3]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


def tiny(head: str = "meanP", embed_dim: int = 24, seed: int = 0, **settings) -> Clip4Clip:
    """Make a small model in float64, with random weights in the head too."""
    clip = tiny_model(embed_dim=embed_dim, num_added=0, num_times=0)
    model = Clip4Clip(clip, Clip4ClipSettings(head=head, num_layers=2, **settings)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator) + float("norm" in name))
    return model


def random_features(num_texts: int = 3, num_frames: int = 4, width: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    text = torch.empty(num_texts, width, dtype=torch.float64).normal_(generator=generator)
    return text, torch.empty(3, num_frames, width, dtype=torch.float64).normal_(generator=generator)


def test_mean_pooling_is_the_computation_by_hand() -> None:
    model, (text, frames) = tiny(), random_features()
    scores = model.similarity(text, frames, MASK)
    for i in range(3):
        for j, length in enumerate((4, 2, 1)):
            mean = sum(frame / frame.norm() for frame in frames[j, :length]) / length
            expected = model.logit_scale.exp() * (text[i] / text[i].norm()) @ (mean / mean.norm())
            assert abs(scores[i, j] - expected) <= 1e-12


@pytest.mark.parametrize("head", HEADS)
def test_frames_that_are_not_there_change_no_score(head: str) -> None:
    model, (text, frames) = tiny(head), random_features()
    scores = model.similarity(text, frames, MASK)
    changed = torch.where(MASK.bool().unsqueeze(2), frames, 100 * torch.randn_like(frames))
    assert (model.similarity(text, changed, MASK) - scores).abs().max() <= 1e-12
    longer = model.similarity(text, F.pad(changed, (0, 0, 0, 3), value=5.0), F.pad(MASK, (0, 3)))
    assert (longer - scores).abs().max() <= 1e-12
    alone = model.similarity(text, frames[1:2, :2])
    assert (alone - scores[:, 1:2]).abs().max() <= 1e-12


@pytest.mark.parametrize("stem", ["2d", "3d"])
@pytest.mark.parametrize("head", HEADS)
def test_padding_a_video_changes_no_score(head: str, stem: str) -> None:
    model, ids = tiny(head, stem=stem), random_texts(3)
    pixels = random_pixels(2, 3).double()
    scores = model(ids, None, pixels)
    mask = torch.tensor([[1, 1, 1, 0, 0]]).repeat(2, 1)
    padded = model(ids, None, F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, 2)), mask)
    assert (padded - scores).abs().max() <= 1e-12


@pytest.mark.parametrize("head", HEADS)
def test_a_video_without_any_frame_is_finite_in_scores_and_gradients(head: str) -> None:
    """The published model gives NaN (0/0) for the whole batch."""
    model, (text, frames) = tiny(head), random_features()
    mask = MASK.clone()
    mask[2] = 0
    frames.requires_grad_()
    scores = model.similarity(text, frames, mask)
    assert scores.isfinite().all() and (model.needs_pairs or (scores[:, 2] == 0).all())
    symmetric_cross_entropy(scores).backward()
    assert frames.grad.isfinite().all() and (frames.grad[2] == 0).all()
    assert all(p.grad.isfinite().all() for p in model.head.parameters())
    rest = model.similarity(text, frames[:2], mask[:2])
    assert (scores[:, :2] - rest).abs().max() <= 1e-12


def test_sequence_heads_know_the_order_of_frames_and_mean_pooling_does_not() -> None:
    text, frames = random_features()
    for head, knows in {"meanP": False, "seqLSTM": True, "seqTransf": True, "tightTransf": True}.items():
        model = tiny(head)
        difference = (model.similarity(text, frames) - model.similarity(text, frames.flip(1))).abs().max()
        assert (difference > 1e-3) == knows, head


def test_a_sequence_head_learns_what_only_order_tells() -> None:
    first, second = torch.eye(24)[:2]
    frames = torch.stack([torch.stack([first, second]), torch.stack([second, first])])
    text = torch.eye(24)[2:4]
    losses = {}
    for head in ("meanP", "seqLSTM", "seqTransf"):
        model = Clip4Clip(tiny_model(embed_dim=24, num_added=0, num_times=0), Clip4ClipSettings(head=head))
        parameters = [text.clone().requires_grad_(), *model.head.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=3e-3)
        for _ in range(60):
            loss = symmetric_cross_entropy(model.similarity(parameters[0], frames))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses[head] = loss.item()
    assert losses["meanP"] > 0.69 and losses["seqLSTM"] < 0.1 and losses["seqTransf"] < 0.1


@pytest.mark.parametrize("head", LOOSE)
def test_vectors_per_item_give_the_same_scores(head: str) -> None:
    model, ids, pixels = tiny(head), random_texts(3), random_pixels(3, 4).double()
    video, text = model.encode_video(pixels, MASK), model.encode_text(ids)
    assert (video.norm(dim=1) - 1).abs().max() <= 1e-12 and (text.norm(dim=1) - 1).abs().max() <= 1e-12
    scores = model(ids, None, pixels, MASK)
    assert (model.logit_scale.exp() * text @ video.T - scores).abs().max() <= 1e-12
    loss = omnisource_loss(video, text, None, None, model.logit_scale, "vs").total
    assert abs(loss - 2 * symmetric_cross_entropy(scores)) <= 1e-12


def test_mean_pooling_is_the_plain_clip_inside() -> None:
    model, pixels, ids = tiny(), random_pixels(2, 4).double(), random_texts(2)
    plain = tiny_model(embed_dim=24, num_added=0, num_times=0, pooling="mean").double()
    assert (model.encode_video(pixels) - plain.encode_video(pixels)).abs().max() <= 1e-12
    assert (model.encode_text(ids) - plain.encode_text(ids)).abs().max() <= 1e-12


def test_published_shapes_are_taken_as_they_are() -> None:
    model, pixels, ids = tiny("seqTransf"), random_pixels(3, 4).double(), random_texts(3)
    published = model(ids[:, None], torch.ones(3, 1, 10), pixels[:, None, :, None], MASK[:, None])
    assert torch.equal(published, model(ids, None, pixels, MASK))
    text, frames = model.text_features(ids), model.frame_features(pixels)
    assert torch.equal(published, model.similarity(text[:, None], frames, MASK[:, None]))


def test_pairs_at_a_time_change_neither_scores_nor_gradients() -> None:
    model, (text, frames) = tiny("tightTransf"), random_features(num_texts=5)
    results = []
    for size in (1024, 7, 1):
        model.pairs_at_a_time = size
        inputs = text.clone().requires_grad_(), frames.clone().requires_grad_()
        model.zero_grad()
        scores = model.similarity(*inputs, MASK)
        assert scores.shape == (5, 3)
        scores.square().sum().backward()
        results.append([scores, *(x.grad for x in inputs), *(p.grad.clone() for p in model.head.parameters())])
    for other in results[1:]:
        for whole, chunked in zip(results[0], other, strict=True):
            assert (whole - chunked).abs().max() <= 1e-10 * whole.abs().max().clamp(min=1)


def test_pairs_are_kept_for_the_backward_pass_a_chunk_at_a_time() -> None:
    def saved_bytes(pairs_at_a_time: int) -> int:
        model, (text, frames) = tiny("tightTransf"), random_features(num_texts=16)
        model.pairs_at_a_time = pairs_at_a_time
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = model.similarity(text, frames)
        assert scores.requires_grad
        return sum(kept.values())

    assert saved_bytes(4) < 0.2 * saved_bytes(1024)


def test_dropout_is_the_pair_heads_and_only_in_training() -> None:
    text, frames = random_features()
    for head in HEADS:
        model = tiny(head).train()
        differs = not torch.equal(model.similarity(text, frames), model.similarity(text, frames))
        assert differs == (head == "tightTransf")
        model.eval()
        assert torch.equal(model.similarity(text, frames), model.similarity(text, frames))


@pytest.mark.parametrize("head", HEADS)
def test_a_3d_stem_is_the_2d_stem_until_it_trains(head: str) -> None:
    ids, pixels = random_texts(3), random_pixels(3, 4).double()
    flat, deep = tiny(head), tiny(head, stem="3d")
    assert (flat(ids, None, pixels) - deep(ids, None, pixels)).abs().max() <= 1e-12
    torch.nn.init.normal_(deep.vision.patch_embedding.weight)
    frames = deep.frame_features(pixels)
    changed = pixels.clone()
    changed[:, 0] += 1
    reach = (deep.frame_features(changed) - frames).abs().amax(dim=(0, 2))
    assert (reach[:2] > 1e-3).all() and (reach[2:] == 0).all()


def test_a_3d_stem_is_a_3d_convolution() -> None:
    model, pixels = tiny(stem="3d"), random_pixels(2, 4).double()
    weight = torch.randn(32, 3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        model.vision.patch_embedding.weight.copy_(weight.transpose(1, 2).flatten(1, 2))
    patches = F.conv3d(pixels.transpose(1, 2), weight, stride=(1, 16, 16), padding=(1, 0, 0)).transpose(1, 2)
    from training.models.clip4clip.model import with_neighbours

    ours = model.vision.patch_embedding(with_neighbours(pixels).flatten(0, 1)).unflatten(0, (2, 4))
    assert (ours - patches).abs().max() <= 1e-10


def trained(model: Clip4Clip) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_frozen_layers_are_the_first_ones_and_what_comes_before_them() -> None:
    ends = {"clip.logit_scale", "clip.text_projection.weight", "clip.visual_projection.weight"}
    ends |= {f"clip.{norm}.{part}" for norm in ("text.final_norm", "vision.post_norm") for part in ("weight", "bias")}
    everything = {name for name, _ in tiny().named_parameters()}
    blocks = {name for name in everything if ".blocks." in name}
    assert trained(tiny()) == everything
    assert trained(tiny(frozen_layers=0)) == ends | blocks
    assert trained(tiny(frozen_layers=1)) == ends | {name for name in blocks if ".blocks.1." in name}
    assert trained(tiny(frozen_layers=2)) == ends
    head = {f"head.{name}" for name, _ in tiny("seqTransf").head.named_parameters()}
    assert trained(tiny("seqTransf", frozen_layers=2)) == ends | head
    assert trained(tiny(frozen_layers=2, stem="3d")) == ends | {"clip.vision.patch_embedding.weight"}
    with pytest.raises(UserError, match="frozen_layers is 3"):
        tiny(frozen_layers=3)


def test_frozen_tensors_do_not_move_in_a_step() -> None:
    model = tiny("seqLSTM", frozen_layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = parameter_groups(model.named_parameters(), weight_decay=0.2)
    optimiser = torch.optim.SGD([parameter for group in groups for parameter in group["params"]], lr=0.1)
    scores = model(random_texts(3), None, random_pixels(3, 4).double(), MASK)
    symmetric_cross_entropy(scores).backward()
    optimiser.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    key_biases = {name for name in trained(model) if name.endswith("qkv.bias")}
    assert trained(model) - key_biases <= moved <= trained(model)


def test_clip_learns_at_a_fraction_of_the_heads_rate_and_biases_do_not_decay() -> None:
    model = tiny("seqLSTM")
    groups = parameter_groups(model.named_parameters(), weight_decay=0.2, rate_factors={"clip.": 1e-3})
    by_name = {name: group for group in groups for name in group["names"]}
    assert by_name.keys() == {name for name, _ in model.named_parameters()}
    for name, group in by_name.items():
        assert group["rate_factor"] == (1e-3 if name.startswith("clip.") else 1.0)
    decayed = {name for name, group in by_name.items() if group["weight_decay"] and name.startswith("head.")}
    assert decayed == {"head.lstm.weight_ih_l0", "head.lstm.weight_hh_l0"}


def test_the_log_scale_is_clamped_to_ln_100() -> None:
    model = tiny()
    for value, expected in ((9.0, 4.605170186), (-0.5, -0.5)):
        model.logit_scale.data.fill_(value)
        model.clamp_log_scale()
        assert model.logit_scale.item() == pytest.approx(expected, abs=1e-9)


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        model = tiny("seqTransf")
        model.set_activation_checkpointing(enabled)
        model(random_texts(3), None, random_pixels(3, 4).double(), MASK).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("head", HEADS)
def test_half_precision_products_stay_near_and_give_scores_in_float32(head: str) -> None:
    model, ids, pixels = tiny(head).float(), random_texts(3), random_pixels(3, 4)
    exact = model(ids, None, pixels, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(ids, None, pixels, MASK)
        scores.square().sum().backward()
    assert scores.dtype == torch.float32
    assert (scores - exact).abs().max() <= 0.1 * exact.abs().max()
    assert all(p.grad.isfinite().all() for p in model.head.parameters())


def test_features_of_another_width_than_the_text_tower_get_a_drawn_head() -> None:
    clip = tiny_model(num_added=0, num_times=0)
    drawn = Clip4Clip(clip, Clip4ClipSettings(head="seqTransf"), seed=3)
    again = Clip4Clip(clip, Clip4ClipSettings(head="seqTransf"), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(drawn.head.parameters(), again.head.parameters(), strict=True))
    assert drawn.head.position_embedding.std() < 0.03
    assert drawn.similarity(torch.randn(2, 16), torch.randn(2, 3, 16)).isfinite().all()


def test_blocks_beyond_the_text_towers_are_drawn() -> None:
    model = Clip4Clip(tiny_model(embed_dim=24, num_added=0, num_times=0), Clip4ClipSettings(head="seqTransf"))
    assert len(model.head.blocks) == 4
    assert torch.equal(model.head.blocks[1].fc1.weight, model.text.blocks[1].fc1.weight)
    assert model.head.blocks[2].fc1.weight.std() < 0.03 and (model.head.blocks[2].norm1.weight == 1).all()


def test_mil_nce_with_one_text_is_cross_entropy_over_both_directions_at_once() -> None:
    similarity = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for i in range(5):
        rivals = similarity[:, i].exp().sum() + similarity[i].exp().sum() - similarity[i, i].exp()
        expected -= (similarity[i, i].exp() / rivals).log() / 5
    assert abs(mil_nce(similarity) - expected) <= 1e-12


def test_what_does_not_fit_is_named() -> None:
    text, frames = random_features()
    with pytest.raises(UserError, match="num_added"):
        Clip4Clip(tiny_model())
    with pytest.raises(UserError, match="tightTransf"):
        tiny("tightTransf").encode_video(random_pixels(1, 2).double())
    with pytest.raises(UserError, match="video_mask"):
        tiny().similarity(text, frames, MASK[:, :3])
    with pytest.raises(UserError, match="13 frames and texts; the head's table has 12"):
        tiny("seqTransf").similarity(text, frames.repeat(1, 4, 1)[:, :13])
    with pytest.raises(UserError, match="pixels"):
        tiny()(random_texts(2), None, torch.zeros(2, 3, 3, 8, 8))
    with pytest.raises(UserError, match="num_pairs = 2"):
        mil_nce(torch.zeros(3, 3), 2)
