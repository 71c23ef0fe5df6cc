"""CLIP4Clip files: released names are read and written, heads may be separate, and wrong files are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipmill.base.errors import UserError
from tests.helpers.clip_vip import random_pixels, random_texts, save, tiny_model
from training.models.clip4clip.model import Clip4Clip
from training.models.clip4clip.settings import Clip4ClipSettings
from training.models.clip4clip.weight_names import to_released
from training.models.clip4clip.weights import load_clip4clip
from training.models.clip_vip.model import ClipVip, ModelConfig, TowerConfig

HEADS = ("meanP", "seqLSTM", "seqTransf", "tightTransf")


def released_size(head: str = "meanP", stem: str = "2d") -> Clip4Clip:
    """Make a small model whose shapes reveal its config: heads of 64, and features as wide as the text tower."""
    towers = {
        "vision": TowerConfig(width=64, num_layers=2, num_heads=1, mlp_width=256),
        "text": TowerConfig(width=64, num_layers=3, num_heads=1, mlp_width=256),
    }
    clip = tiny_model(embed_dim=64, num_added=0, num_times=0, pooling="mean", **towers)
    model = Clip4Clip(clip, Clip4ClipSettings(head=head, stem=stem, num_layers=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if model.is_added(name) or name == "flat_stem":
                tensor.copy_(torch.empty(tensor.shape).normal_(0, 0.2, generator=generator) + float("norm" in name))
    return model.eval()


def scores(model: Clip4Clip) -> Tensor:
    with torch.no_grad():
        return model(random_texts(3), None, random_pixels(2, 4))


def bare_file(model: Clip4Clip, path: Path) -> dict[str, Tensor]:
    """Write only the tensors, without configuration, as in a released file."""
    tensors = load_file(save(model, path / "with_config.safetensors"))
    save_file(tensors, path / "bare.safetensors")
    return tensors


@pytest.mark.parametrize("stem", ["2d", "3d"])
@pytest.mark.parametrize("head", HEADS)
def test_a_file_of_ours_is_the_model_again_to_the_bit(head: str, stem: str, tmp_path: Path) -> None:
    model = released_size(head, stem)
    save(model, tmp_path)
    again = load_clip4clip(tmp_path, head=None)
    assert (again.settings.head, again.settings.stem, again.new_tensors) == (head, stem, ())
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(scores(again), scores(model))


EXPECTED = {
    "meanP": set(),
    "seqLSTM": {"frame_position_embeddings.weight"}
    | {f"lstm_visual.{part}_l0" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    "seqTransf": {"frame_position_embeddings.weight", "transformerClip.resblocks.1.attn.in_proj_weight"},
    "tightTransf": {"cross.embeddings.position_embeddings.weight", "cross.transformer.resblocks.0.mlp.c_proj.bias"}
    | {"cross.pooler.ln_pool.weight", "cross.pooler.dense.bias", "similarity_dense.weight"},
}


@pytest.mark.parametrize("head", HEADS)
def test_files_carry_released_names_and_shapes(head: str, tmp_path: Path) -> None:
    tensors = bare_file(released_size(head), tmp_path)
    assert EXPECTED[head] <= tensors.keys()
    num_head = {"meanP": 0, "seqLSTM": 5, "seqTransf": 1 + 2 * 12, "tightTransf": 1 + 2 * 12 + 6}[head]
    assert sum(not key.startswith("clip.") for key in tensors) == num_head
    shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    assert shapes["clip.logit_scale"] == []
    assert shapes["clip.visual.proj"] == [64, 64] and shapes["clip.text_projection"] == [64, 64]
    assert shapes["clip.visual.conv1.weight"] == [64, 3, 16, 16]
    assert shapes["clip.transformer.resblocks.2.attn.in_proj_weight"] == [192, 64]
    assert shapes["clip.visual.positional_embedding"] == [5, 64]


def published_shapes(head: str, stem: str = "2d") -> dict[str, list[int]]:
    """Return the tensor shapes of ViT-B/32, without values."""
    vision = TowerConfig(width=768, num_layers=12, num_heads=12, mlp_width=3072)
    text = TowerConfig(width=512, num_layers=12, num_heads=8, mlp_width=2048)
    with torch.device("meta"):
        clip = ClipVip(ModelConfig(vision=vision, text=text, embed_dim=512, num_added=0, num_times=0))
    model = Clip4Clip(clip, Clip4ClipSettings(head=head, stem=stem))
    return {key: list(tensor.shape) for key, tensor in to_released(model.state_dict(), head, stem).items()}


def test_published_sizes_have_the_published_shapes() -> None:
    """The shapes are listed in docs/methods/clip4clip.md section 10."""
    plain = published_shapes("meanP", "3d")
    assert plain.pop("clip.visual.conv2.weight") == [768, 3, 3, 32, 32]
    assert plain["clip.visual.positional_embedding"] == [50, 768] and plain["clip.visual.proj"] == [768, 512]
    assert plain["clip.visual.transformer.resblocks.11.attn.in_proj_weight"] == [2304, 768]
    assert plain["clip.token_embedding.weight"] == [49408, 512] and len(plain) == 302
    heads = {head: published_shapes(head) for head in HEADS}
    assert heads["meanP"] == plain
    lstm, transformer, pairs = ({k: v for k, v in heads[h].items() if k not in plain} for h in HEADS[1:])
    assert lstm["lstm_visual.weight_ih_l0"] == [2048, 512] and lstm["lstm_visual.bias_hh_l0"] == [2048]
    assert lstm["frame_position_embeddings.weight"] == transformer["frame_position_embeddings.weight"] == [77, 512]
    assert transformer["transformerClip.resblocks.3.mlp.c_fc.weight"] == [2048, 512] and len(transformer) == 49
    assert pairs["cross.pooler.dense.weight"] == [512, 512] and pairs["similarity_dense.weight"] == [1, 512]
    assert pairs["cross.embeddings.position_embeddings.weight"] == [77, 512] and len(pairs) == 55


@pytest.mark.parametrize("head", HEADS)
def test_a_bare_released_file_is_read_by_its_shapes(head: str, tmp_path: Path) -> None:
    model = released_size(head)
    tensors = bare_file(model, tmp_path)
    again = load_clip4clip(tmp_path / "bare.safetensors", head=head)
    assert torch.equal(scores(again), scores(model)) and again.new_tensors == ()
    assert load_clip4clip(tmp_path / "bare.safetensors", head=None).settings.head == head
    torch.save(tensors, tmp_path / "pytorch_model.bin.4")
    assert torch.equal(scores(load_clip4clip(tmp_path / "pytorch_model.bin.4", head=head)), scores(model))


def test_half_precision_files_are_widened_and_old_norm_names_understood(tmp_path: Path) -> None:
    model = released_size("tightTransf")
    tensors = bare_file(model, tmp_path)
    old = {key: tensor.half() if "mlp" in key else tensor for key, tensor in tensors.items()}
    for new_name, old_name in (("weight", "gamma"), ("bias", "beta")):
        old[f"module.cross.pooler.ln_pool.{old_name}"] = old.pop(f"cross.pooler.ln_pool.{new_name}")
    torch.save(old, tmp_path / "old.pt")
    again = load_clip4clip(tmp_path / "old.pt", head="tightTransf")
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert (scores(again) - scores(model)).abs().max() <= 1e-2
    assert torch.equal(again.head.pool_norm.weight, model.head.pool_norm.weight)


def test_openais_names_without_prefix_are_a_clip_to_start_from(tmp_path: Path) -> None:
    model = released_size()
    tensors = {key.removeprefix("clip."): tensor for key, tensor in bare_file(model, tmp_path).items()}
    tensors |= {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12)}
    save_file(tensors | {"vocab_size": torch.tensor(50)}, tmp_path / "openai.safetensors")
    again = load_clip4clip(tmp_path / "openai.safetensors", head="seqTransf")
    assert again.settings.num_layers == 4 and len(again.new_tensors) == 1 + 4 * 12
    assert torch.equal(again.clip.vision.class_embedding, model.clip.vision.class_embedding)


@pytest.mark.parametrize("head", HEADS)
def test_a_plain_clip_in_other_layouts_is_a_start_too(head: str, tmp_path: Path) -> None:
    model = released_size()
    save(model.clip, tmp_path)
    again = load_clip4clip(tmp_path, head=head)
    assert all(name.startswith("head.") for name in again.new_tensors)
    assert bool(again.new_tensors) == (head != "meanP")
    by_config = load_clip4clip(tmp_path / "model.safetensors", head=head, config=tmp_path / "config.json")
    assert torch.equal(scores(by_config), scores(again))
    if head == "meanP":
        assert torch.equal(scores(again), scores(model))


def test_a_head_may_lie_beside_the_clip_and_a_trained_clip_may_get_another_head(tmp_path: Path) -> None:
    model = released_size("seqTransf", "3d")
    tensors = bare_file(model, tmp_path)
    beside = {key: tensor for key, tensor in tensors.items() if not key.startswith("clip.")}
    beside["clip.visual.conv2.weight"] = tensors.pop("clip.visual.conv2.weight")
    save_file(beside, tmp_path / "head.safetensors")
    save_file({key: t for key, t in tensors.items() if key not in beside}, tmp_path / "clip.safetensors")
    again = load_clip4clip(tmp_path / "clip.safetensors", tmp_path / "head.safetensors", "seqTransf")
    assert again.settings.stem == "3d" and torch.equal(scores(again), scores(model))
    other = load_clip4clip(tmp_path / "clip.safetensors", head="tightTransf", num_layers=3)
    assert len(other.head.blocks) == 3
    assert all(name.startswith("head.") for name in other.new_tensors)


def test_a_2d_model_may_continue_with_a_3d_stem(tmp_path: Path) -> None:
    model = released_size("seqLSTM")
    bare_file(model, tmp_path)
    deep = load_clip4clip(tmp_path / "bare.safetensors", head="seqLSTM", stem="3d")
    assert deep.new_tensors == ("clip.vision.patch_embedding.weight",)
    assert (scores(deep) - scores(model)).abs().max() <= 1e-5


def test_the_log_scale_is_clamped_in_files(tmp_path: Path) -> None:
    model = released_size()
    model.logit_scale.data.fill_(9.0)
    assert load_file(save(model, tmp_path / "m.safetensors"))["clip.logit_scale"] <= 4.6052
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config["model_type"] == "clip4clip" and config["clip4clip"]["head"] == "meanP"
    assert json.loads((tmp_path / "m.json").read_text()) == config


def changed(tmp_path: Path, head: str, change) -> Path:
    tensors = bare_file(released_size(head), tmp_path)
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


@pytest.mark.parametrize(
    "head, change, words",
    [
        (
            "seqTransf",
            lambda t: t.pop("transformerClip.resblocks.1.ln_1.bias"),
            "lacks transformerClip.resblocks.1.ln_1",
        ),
        ("meanP", lambda t: t.pop("clip.ln_final.bias"), "lacks text.final_norm.bias"),
        ("meanP", lambda t: t.pop("clip.visual.conv1.weight"), "clip.visual.conv1.weight to infer it from is missing"),
        ("meanP", lambda t: t.update({"clip.surplus": torch.zeros(1)}), "surplus"),
        (
            "meanP",
            lambda t: t.update({"similarity_dense.bias": torch.zeros(1)}),
            "does not have: similarity_dense.bias",
        ),
        ("seqLSTM", lambda t: t.update({"lstm_visual.bias_ih_l0": torch.zeros(9)}), r"lstm_visual.bias_ih_l0 is \[9\]"),
        ("meanP", lambda t: t.update({"clip.visual.conv2.weight": torch.zeros(64, 3, 5, 16, 16)}), "conv2.weight is"),
        ("meanP", lambda t: t.update({"clip.ln_final.bias": torch.zeros(9)}), "text.final_norm.bias is"),
    ],
)
def test_what_is_missing_left_over_or_of_another_shape_is_named(head, change, words, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        load_clip4clip(changed(tmp_path, head, change), head=head)


def test_another_head_than_the_files_is_refused_by_name(tmp_path: Path) -> None:
    bare_file(released_size("seqTransf"), tmp_path)
    for head in ("meanP", "seqLSTM", "tightTransf"):
        with pytest.raises(UserError, match=f"head '{head}' .*transformerClip"):
            load_clip4clip(tmp_path / "bare.safetensors", head=head)
    with pytest.raises(UserError, match="lacks transformerClip.resblocks.2"):
        load_clip4clip(tmp_path / "bare.safetensors", head="seqTransf", num_layers=3)
    with pytest.raises(UserError, match="meanP.*seqLSTM.*seqTransf.*tightTransf"):
        load_clip4clip(tmp_path / "bare.safetensors", head="maxP")
    with pytest.raises(UserError, match="no such file"):
        load_clip4clip(tmp_path / "bare.safetensors", tmp_path / "nothing.safetensors", "seqTransf")


def test_a_clip_vip_is_not_a_clip4clip(tmp_path: Path) -> None:
    save(tiny_model(), tmp_path)
    with pytest.raises(UserError, match="num_added|pooling|num_times"):
        load_clip4clip(tmp_path)
