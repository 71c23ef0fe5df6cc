"""Weights are read and written under published names, from Hugging Face folders and open_clip files, or refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipmill.base.errors import UserError
from tests.helpers.clip_vip import random_pixels, random_texts, reference, save, tiny_config, tiny_model
from tests.helpers.pickles import HostilePickle
from training.models.clip_vip import weights as checkpoint
from training.models.clip_vip.config_formats import config_from_dict, config_to_dict
from training.models.clip_vip.model import ClipVip
from training.models.clip_vip.weight_names import to_published
from training.models.clip_vip.weights import from_open_clip_model, load_clip_vip, load_model
from training.models.registry import ModelSettings, load


def published(model: ClipVip, prefix: str = "clipmodel.") -> dict[str, Tensor]:
    return to_published({name: tensor.detach() for name, tensor in model.state_dict().items()}, prefix)


def assert_same(one: ClipVip, other: ClipVip) -> None:
    assert one.config == other.config
    for (name, tensor), (other_name, other_tensor) in zip(
        one.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(tensor, other_tensor), name


@pytest.mark.parametrize("prefix", ["", "clipmodel."])
@pytest.mark.parametrize("target", ["folder", "file.safetensors"])
def test_saving_and_loading_gives_the_same_model(target: str, prefix: str, tmp_path: Path) -> None:
    model = tiny_model()
    weights = save(model, tmp_path / target, prefix=prefix)
    assert all(key.startswith(prefix) for key in load_file(weights))
    assert_same(load_model(tmp_path / target), model)
    assert_same(load_clip_vip(weights), model)
    assert load_clip_vip(weights).new_tensors == ()
    config_file = weights.with_name("config.json" if target == "folder" else "file.json")
    assert_same(load_clip_vip(weights, config_file), model)
    assert_same(load_clip_vip(weights, json.loads(config_file.read_text())), model)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [save(tiny_model(), tmp_path / name) for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_previous_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save(tiny_model(seed=1), path)

    def half_written(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        save(tiny_model(seed=2), path)
    assert_same(load_clip_vip(path), tiny_model(seed=1))
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_released_layout_is_read_with_prefix_buffers_and_half_precision(suffix: str, tmp_path: Path) -> None:
    model = tiny_model()
    state = {key: tensor.half() for key, tensor in published(model).items()}
    state["clipmodel.text_model.embeddings.position_ids"] = torch.arange(12)[None]
    path = tmp_path / f"released{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    loaded = load_clip_vip(path, config_to_dict(model.config))
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].half().float())


def test_a_bare_file_is_described_by_its_shapes(tmp_path: Path) -> None:
    model = tiny_model()  # its heads are 16 and 12 wide; the convention for bare files is 64, so one head
    torch.save(published(model), tmp_path / "bare.pt")
    loaded = load_clip_vip(tmp_path / "bare.pt")
    for field in ("embed_dim", "image_size", "patch_size", "vocab_size", "context_length", "num_added", "num_times"):
        assert getattr(loaded.config, field) == getattr(model.config, field), field
    assert loaded.config.vision.mlp_width == 64 and loaded.config.text.num_layers == 2


def test_reference_files_survive_a_round_trip(tmp_path: Path) -> None:
    for name in ("p16", "p32", "p16_notemporal", "p16_meanpool"):
        source = reference("clipvip", f"{name}.weights.safetensors")
        written = load_file(
            save(load_clip_vip(source, reference("clipvip", f"{name}.json")), tmp_path / name, prefix="clipmodel.")
        )
        original = {key: tensor for key, tensor in load_file(source).items() if not key.endswith("position_ids")}
        assert written.keys() == original.keys()
        assert all(torch.equal(written[key], original[key]) for key in original)


def test_plain_clip_becomes_clip_vip_with_exactly_two_new_tensors(tmp_path: Path) -> None:
    plain = ClipVip(tiny_config(num_added=0, num_times=0))
    plain.load_state_dict({k: v for k, v in tiny_model().state_dict().items() if k in plain.state_dict()})
    save_file(published(plain), tmp_path / "clip.safetensors")
    config = config_to_dict(tiny_config())
    model = load_clip_vip(tmp_path / "clip.safetensors", config, seed=3)
    assert set(model.new_tensors) == {"vision.added_embedding", "vision.time_embedding"}
    assert model.vision.time_embedding.abs().max() == 0
    assert torch.equal(
        model.vision.added_embedding,
        load_clip_vip(tmp_path / "clip.safetensors", config, seed=3).vision.added_embedding,
    )
    other = load_clip_vip(tmp_path / "clip.safetensors", config, seed=4).vision.added_embedding
    assert not torch.equal(model.vision.added_embedding, other)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_added_tokens_start_standard_normal(tmp_path: Path) -> None:
    plain = ClipVip(tiny_config(num_added=0, num_times=0))
    plain.initialise()
    save_file(published(plain), tmp_path / "clip.safetensors")
    added = load_clip_vip(
        tmp_path / "clip.safetensors", config_to_dict(tiny_config(num_added=200))
    ).vision.added_embedding
    assert abs(added.mean()) < 0.05 and abs(added.std() - 1) < 0.05


@pytest.mark.parametrize("missing", ["vision_model.embeddings.added_cls", "visual_projection.weight", "logit_scale"])
def test_a_missing_tensor_is_an_error(missing: str, tmp_path: Path) -> None:
    state = published(tiny_model(), prefix="")
    del state[missing]
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="lacks"):
        load_clip_vip(tmp_path / "m.safetensors", config_to_dict(tiny_config()))


def test_unexpected_tensors_and_other_shapes_are_errors(tmp_path: Path) -> None:
    state = published(tiny_model(), prefix="")
    save_file(state | {"visual_projection.bias": torch.zeros(16)}, tmp_path / "extra.safetensors")
    with pytest.raises(UserError, match="visual_projection.bias"):
        load_clip_vip(tmp_path / "extra.safetensors", config_to_dict(tiny_config()))
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="time_embedding"):
        load_clip_vip(tmp_path / "m.safetensors", config_to_dict(tiny_config(num_times=7)))


def test_log_scale_is_clamped_when_read_and_when_written(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    save_file(published(model), tmp_path / "m.safetensors")
    assert load_clip_vip(
        tmp_path / "m.safetensors", config_to_dict(model.config)
    ).logit_scale.exp().item() == pytest.approx(200)
    assert load_file(save(model, tmp_path / "out"))["logit_scale"].exp().item() == pytest.approx(200)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    torch.save({"logit_scale": HostilePickle(trace)}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"logit_scale": HostilePickle(trace)}, protocol=2))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(UserError, match="cannot be read as plain tensors"):
            load_clip_vip(tmp_path / name, config_to_dict(tiny_config()))
    assert not trace.exists()


def hf_clip(folder: Path, **save_options: Any) -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=16,
        vision_config=sizes | {"image_size": 32, "patch_size": 16, "hidden_act": "gelu"},
        text_config=sizes | {"vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 48, "eos_token_id": 49},
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **save_options)
    return model


def assert_equals_hf(ours: ClipVip, theirs: Any) -> None:
    pixels, ids = random_pixels(3, 1), random_texts(3)
    with torch.no_grad():
        image = theirs.get_image_features(pixels[:, 0]).pooler_output
        text = theirs.get_text_features(ids).pooler_output
        assert (ours.encode_video(pixels) - image / image.norm(dim=-1, keepdim=True)).abs().max() <= 1e-5
        assert (ours.encode_text(ids) - text / text.norm(dim=-1, keepdim=True)).abs().max() <= 1e-5


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}, {"max_shard_size": "20KB"}])
def test_a_hugging_face_folder_is_read_as_plain_clip_or_as_clip_vip(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = hf_clip(tmp_path, **options)
    plain = load_model(tmp_path, num_added=0, num_times=0)
    assert plain.new_tensors == ()
    assert plain.config.vision.activation == "gelu"  # and the text tower has HF's default
    assert plain.config.text.activation == "quick_gelu"
    assert_equals_hf(plain, theirs)
    proxies = load_model(tmp_path)
    assert (proxies.config.num_added, proxies.config.num_times) == (3, 12)
    assert set(proxies.new_tensors) == {"vision.added_embedding", "vision.time_embedding"}
    assert load_model(tmp_path, pooling="mean").config.num_proxies == 1


def test_what_is_saved_with_proxies_does_not_pass_for_a_clip_of_hugging_face(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoConfig, AutoModel, CLIPModel, CLIPVisionModel
    from transformers.utils import logging

    models = {
        "clip_vip": tiny_model(),
        "times alone": tiny_model(num_added=0),
        "clip4clip": load(ModelSettings(init="demo", method="clip4clip")),
        "unipt": load(ModelSettings(init="demo", method="unipt", pooling="mean")),
    }
    logging.enable_propagation()
    try:
        for name, model in models.items():
            save(model, tmp_path / name)
            for factory in (AutoConfig, AutoModel):
                with pytest.raises(ValueError, match="model type"):
                    factory.from_pretrained(tmp_path / name)
            for factory in (CLIPModel, CLIPVisionModel) if name in ("clip_vip", "times alone") else (CLIPModel,):
                caplog.clear()
                factory.from_pretrained(tmp_path / name)
                assert "You are using a model of type" in caplog.text, f"{factory.__name__} of {name} opens silently"
    finally:
        logging.disable_propagation()


def test_a_checkpoint_that_calls_itself_a_clip_as_those_of_earlier_versions_is_read(tmp_path: Path) -> None:
    model = tiny_model()
    save(model, tmp_path)
    old = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "clip", "architectures": ["CLIPModel"]}
    old["vision_config"]["model_type"] = "clip_vision_model"
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert_same(load_model(tmp_path), model)


def test_what_is_saved_without_proxies_opens_in_transformers(tmp_path: Path) -> None:
    from transformers import CLIPModel

    model = tiny_model(num_added=0, num_times=0)
    save(model, tmp_path)
    assert_equals_hf(model, CLIPModel.from_pretrained(tmp_path).eval())


def small_open_clip() -> tuple[torch.nn.Module, dict[str, Any]]:
    from open_clip.model import CLIP

    torch.manual_seed(0)
    model_cfg: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 16,
            "mlp_ratio": 2.0,
        },
        "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 2, "layers": 2},
    }
    return CLIP(**model_cfg).eval(), model_cfg


def test_open_clip_weights_are_mapped_exactly() -> None:
    theirs, model_cfg = small_open_clip()
    ours = from_open_clip_model(theirs, model_cfg, num_added=0, num_times=0)
    assert ours.config.vision.activation == "gelu"
    pixels, ids = random_pixels(3, 1), random_texts(3, length=12)
    with torch.no_grad():
        assert (ours.encode_video(pixels) - theirs.encode_image(pixels[:, 0], normalize=True)).abs().max() <= 1e-6
        assert (ours.encode_text(ids) - theirs.encode_text(ids, normalize=True)).abs().max() <= 1e-6
    assert from_open_clip_model(theirs, model_cfg).config.num_added == 3


@pytest.mark.parametrize(
    "where, setting",
    [
        ("vision_cfg", {"pool_type": "avg"}),
        ("text_cfg", {"no_causal_mask": True}),
        ("", {"multimodal_cfg": {"width": 1}}),
    ],
)
def test_open_clip_models_of_another_build_are_refused_by_name(where: str, setting: dict[str, Any]) -> None:
    theirs, model_cfg = small_open_clip()
    (model_cfg[where] if where else model_cfg).update(setting)
    with pytest.raises(UserError, match=next(iter(setting))):
        from_open_clip_model(theirs, model_cfg)


def test_open_clip_local_files_and_folders_are_sources(tmp_path: Path) -> None:
    theirs, model_cfg = small_open_clip()
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5] * 3}})
    )
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    model = load_model(f"open_clip:local-dir:{tmp_path}")
    assert model.config.image_mean == (0.5, 0.5, 0.5)
    import open_clip

    open_clip.add_model_config(write_config(tmp_path / "tiny-for-test.json", model_cfg))
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "weights.pt")
    assert_same(load_model(f"open_clip:tiny-for-test/{tmp_path}/weights.pt"), from_open_clip_model(theirs, model_cfg))


def write_config(path: Path, model_cfg: dict[str, Any]) -> Path:
    path.write_text(json.dumps(model_cfg))
    return path


def test_unknown_sources_are_named_with_what_is_allowed(tmp_path: Path) -> None:
    for source, words in {
        str(tmp_path / "nothing"): "open_clip:NAME/TAG",
        "open_clip:ViT-B-32": "NAME/TAG",
        "open_clip:No-Such-Model/tag": "No-Such-Model",
        str(tmp_path): "holds none of",
    }.items():
        with pytest.raises(UserError, match=words):
            load_model(source)


def test_asking_a_clip_vip_for_other_proxies_is_an_error(tmp_path: Path) -> None:
    save(tiny_model(), tmp_path)
    assert load_model(tmp_path, num_added=3).config.num_added == 3
    with pytest.raises(UserError, match="num_added"):
        load_model(tmp_path, num_added=5)


def test_configuration_survives_json() -> None:
    for config in (tiny_config(), tiny_config(num_times=0), tiny_config(num_added=0, num_times=0, pooling="mean")):
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
