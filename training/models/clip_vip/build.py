"""Make CLIP-ViP models from settings, and the CLIP that the other methods are built on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from training.models.clip_vip.config_formats import config_from_open_clip, config_to_dict
from training.models.clip_vip.model import MAX_LOG_SCALE, ClipVip, ModelConfig
from training.models.clip_vip.weight_names import to_published
from training.models.clip_vip.weights import from_open_clip_model, load_clip_vip, load_model, model_config, with_shape
from training.models.registry import ModelSettings

PLAIN = {"num_added": 0, "num_times": 0, "pooling": "mean"}  # shape of a plain CLIP


def load(settings: ModelSettings, seed: int = 0) -> ClipVip:
    """Load `settings.init` with the proxies and pooling of the settings."""
    shape = shape_of(settings)
    return demo_clip(seed, shape) if settings.init == "demo" else load_model(settings.init, seed=seed, **shape)


def read(weights: Path, settings: ModelSettings, seed: int = 0) -> ClipVip:
    return load_clip_vip(weights)


def file_header(model: ClipVip) -> dict[str, Any]:
    return config_to_dict(model.config)


def file_tensors(model: ClipVip, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_published(tensors | {"logit_scale": tensors["logit_scale"].clamp(0, MAX_LOG_SCALE)})


def config_of(settings: ModelSettings) -> ModelConfig:
    return config_in_shape(settings.init, shape_of(settings))


def skeleton(config: ModelConfig, settings: ModelSettings) -> ClipVip:
    return ClipVip(config)


# --- Shared with the methods that are built on a CLIP


def shape_of(settings: ModelSettings) -> dict[str, Any]:
    """Return the settings of proxies, time table and pooling that are not None."""
    return settings.model_dump(include={"num_added", "num_times", "pooling"}, exclude_none=True)


def config_in_shape(init: str, shape: dict[str, Any]) -> ModelConfig:
    """Return the configuration of a CLIP with the settings in `shape`; read no weights. Raises UserError."""
    if init != "demo":
        return model_config(init, **shape)
    clip, description = _random_demo_clip()
    config = with_shape(config_from_open_clip(clip, description["model"]), shape)
    return replace(config, words=tuple(description["words"]))


def demo_clip(seed: int, shape: dict[str, Any]) -> ClipVip:
    """Load the image-text model that ships with clipmill (`bench.demo_models.train`), with the settings in `shape`."""
    from captioning.model_identity import DEMO_WEIGHTS

    clip, description = _random_demo_clip()
    weights = load_file(DEMO_WEIGHTS / "demo_clip.safetensors")
    clip.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
    model = from_open_clip_model(clip, description["model"], seed=seed, **shape)
    model.config = replace(model.config, words=tuple(description["words"]))
    return model


def _random_demo_clip() -> tuple[Any, dict[str, Any]]:
    """Build the demo CLIP of open_clip with random weights; return it with its description."""
    from captioning.demo_models import build  # imports open_clip, which other models do without
    from captioning.model_identity import DEMO_WEIGHTS

    description = json.loads((DEMO_WEIGHTS / "demo_clip.json").read_text())
    return build("demo_clip", description).model, description
