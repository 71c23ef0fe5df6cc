"""Make CLIP4Clip models from settings."""

from pathlib import Path
from typing import Any

from torch import Tensor

from training.models.clip4clip.model import MAX_LOG_SCALE, Clip4Clip
from training.models.clip4clip.weight_names import to_released
from training.models.clip4clip.weights import load_clip4clip
from training.models.clip_vip.build import PLAIN, config_in_shape, demo_clip
from training.models.clip_vip.config_formats import config_to_dict
from training.models.clip_vip.model import ClipVip, ModelConfig
from training.models.registry import ModelSettings


def load(settings: ModelSettings, seed: int = 0) -> Clip4Clip:
    """Load a plain CLIP, with or without a head; a head that the file lacks starts from CLIP's tensors."""
    if settings.init == "demo":
        return Clip4Clip(demo_clip(seed, PLAIN), settings.clip4clip, seed)
    return load_clip4clip(settings.init, seed=seed, **settings.clip4clip.model_dump())


def read(weights: Path, settings: ModelSettings, seed: int = 0) -> Clip4Clip:
    return load_clip4clip(weights, head=None, frozen_layers=settings.clip4clip.frozen_layers, seed=seed)


def file_header(model: Clip4Clip) -> dict[str, Any]:
    own = {"model_type": "clip4clip", "architectures": ["Clip4Clip"], "clip4clip": model.settings.model_dump()}
    return config_to_dict(model.config) | own


def file_tensors(model: Clip4Clip, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    released = to_released(tensors, model.settings.head, model.settings.stem)
    released["clip.logit_scale"] = released["clip.logit_scale"].clamp(max=MAX_LOG_SCALE)
    return released


def config_of(settings: ModelSettings) -> ModelConfig:
    if Path(settings.init).exists():  # the configuration of a released file follows from its tensors
        return load(settings).config
    return config_in_shape(settings.init, PLAIN)


def skeleton(config: ModelConfig, settings: ModelSettings) -> Clip4Clip:
    return Clip4Clip(ClipVip(config), settings.clip4clip)
