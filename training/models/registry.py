"""The model of a run's settings, and what its texts become."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from clipmill.base.errors import UserError
from training.data.tokenizer import TextEncoder
from training.models.clip4clip.model import Clip4Clip
from training.models.clip4clip.weights import file_contents, load_clip4clip
from training.models.clip_vip.config_formats import config_from_open_clip
from training.models.clip_vip.model import ClipVip, ModelConfig
from training.models.clip_vip.weights import (
    from_open_clip_model,
    load_clip_vip,
    load_model,
    model_config,
    save,
    with_shape,
    write_model,
)
from training.models.unipt.model import UniPtClip, side_tensors
from training.models.unipt.weights import load_unipt, unipt_header
from training.parallel.state_dict import State
from training.settings import ModelSettings

Model = ClipVip | Clip4Clip | UniPtClip

_PLAIN = {"num_added": 0, "num_times": 0, "pooling": "mean"}  # a CLIP that nothing was added to


def load(settings: ModelSettings, seed: int = 0) -> Model:
    """float32 on the CPU. `seed` draws what the method adds and a plain CLIP lacks. Raises UserError."""
    _refuse_settings_of_others(settings, _shape(settings))
    if settings.weights is not None:
        return read(Path(settings.weights), settings, seed)
    if settings.method == "clip4clip":
        return _clip4clip(settings, seed)
    model = _clip_vip(settings, seed)
    return _unipt(model, settings, seed) if settings.method == "unipt" else model


def read(weights: Path, settings: ModelSettings, seed: int = 0) -> Model:
    """The model of a checkpoint's weights, as its run's settings say what they are of. Raises UserError."""
    if settings.method == "clip4clip":
        frozen = settings.clip4clip.frozen_layers
        return load_clip4clip(weights, head=None, frozen_layers=frozen, seed=seed)
    if settings.method == "unipt":
        return load_unipt(weights, _clip_vip(settings, seed))
    return load_clip_vip(weights)


def writer(model: Model) -> Callable[[State, Path], Any]:
    """A function that writes such a model's state, whole and on the CPU, to a folder or a .safetensors file."""
    if isinstance(model, UniPtClip):
        header = unipt_header(model)
        return lambda tensors, path: write_model(side_tensors(tensors), header, path)
    if isinstance(model, Clip4Clip):
        return lambda tensors, path: write_model(*file_contents(tensors, model.config, model.settings), path)
    return lambda tensors, path: save(_with_tensors(model.config, tensors), path)


def config_of(settings: ModelSettings) -> ModelConfig:
    """The configuration of `load(settings)`, weights unread: that of the CLIP inside. Raises UserError."""
    shape = _shape(settings)
    _refuse_settings_of_others(settings, shape)
    if settings.method == "clip4clip":
        if Path(settings.init).exists():  # only the tensors themselves tell what such a file holds
            return _clip4clip(settings, seed=0).config
        shape = _PLAIN
    if settings.init == "demo":
        clip, description = _demo_clip()
        config = with_shape(config_from_open_clip(clip, description["model"]), shape)
        return replace(config, words=tuple(description["words"]))
    return model_config(settings.init, **shape)


def skeleton(config: ModelConfig, settings: ModelSettings) -> Model:
    """The model that `load(settings)` gives, of `config_of(settings)`, untouched by any weights: for meta or fake
    tensors, which have shapes and no contents.
    """
    clip = ClipVip(config)
    if settings.method == "clip4clip":
        return Clip4Clip(clip, settings.clip4clip)
    return UniPtClip(clip, settings.unipt) if settings.method == "unipt" else clip


def text_encoder(config: ModelConfig, max_tokens: int) -> TextEncoder:
    """Raises UserError where the model knows no text of that length."""
    if max_tokens > config.context_length:
        raise UserError(
            f"data.max_text_tokens = {max_tokens}: the model reads at most {config.context_length}, "
            "both end tokens included."
        )
    return TextEncoder(config.words, max_tokens)


def _refuse_settings_of_others(settings: ModelSettings, shape: dict) -> None:
    if settings.method == "clip4clip" and shape:
        raise UserError(f"model.{next(iter(shape))} is for model.method = 'clip_vip'; here it is 'clip4clip'")
    for name in ("clip4clip", "unipt"):
        if settings.method != name and getattr(settings, name) != ModelSettings.model_fields[name].default:
            raise UserError(f"model.{name} is for model.method = {name!r}; here it is {settings.method!r}")


def _shape(settings: ModelSettings) -> dict[str, Any]:
    return settings.model_dump(include={"num_added", "num_times", "pooling"}, exclude_none=True)


def _clip_vip(settings: ModelSettings, seed: int) -> ClipVip:
    shape = _shape(settings)
    return _demo_model(seed, shape) if settings.init == "demo" else load_model(settings.init, seed=seed, **shape)


def _with_tensors(config: ModelConfig, tensors: State) -> ClipVip:
    """The tensors as a model; nothing is copied or initialised."""
    with torch.device("meta"):
        model = ClipVip(config)
    model.load_state_dict(tensors, assign=True)
    return model


def _clip4clip(settings: ModelSettings, seed: int) -> Clip4Clip:
    if settings.init == "demo":
        plain = _demo_model(seed, _PLAIN)
        return Clip4Clip(plain, settings.clip4clip, seed)
    return load_clip4clip(settings.init, seed=seed, **settings.clip4clip.model_dump())


def _unipt(backbone: ClipVip, settings: ModelSettings, seed: int) -> UniPtClip:
    if "vision.added_embedding" in backbone.new_tensors:
        raise UserError(
            f"model.method = 'unipt' on {settings.init}: a plain CLIP has no trained proxies, and frozen it never gets "
            "any. Begin with a post-pretrained model, or set model.pooling=mean."
        )
    return UniPtClip(backbone, settings.unipt, seed)


def _demo_model(seed: int, shape: dict) -> ClipVip:
    """The image-text model that ships with clipmill (`bench.demo_models.train`)."""
    from captioning.model_identity import DEMO_WEIGHTS

    clip, description = _demo_clip()
    weights = load_file(DEMO_WEIGHTS / "demo_clip.safetensors")
    clip.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
    model = from_open_clip_model(clip, description["model"], seed=seed, **shape)
    model.config = replace(model.config, words=tuple(description["words"]))
    return model


def _demo_clip() -> tuple[Any, dict[str, Any]]:
    """Its open_clip model with random weights, and its description."""
    from captioning.demo_models import build
    from captioning.model_identity import DEMO_WEIGHTS

    description = json.loads((DEMO_WEIGHTS / "demo_clip.json").read_text())
    return build("demo_clip", description).model, description
