"""Build UniPT models from settings: side networks beside the CLIP-ViP of the same settings."""

from pathlib import Path
from typing import Any

from torch import Tensor

from clipmill.base.errors import UserError
from training.models.clip_vip import build as clip_vip
from training.models.clip_vip.model import ClipVip, ModelConfig
from training.models.registry import ModelSettings
from training.models.unipt.model import UniPtClip, side_tensors
from training.models.unipt.weights import load_unipt, unipt_header

config_of = clip_vip.config_of


def load(settings: ModelSettings, seed: int = 0) -> UniPtClip:
    """Load the backbone and draw the side networks."""
    backbone = clip_vip.load(settings, seed)
    if "vision.added_embedding" in backbone.new_tensors:
        raise UserError(
            f"model.method = 'unipt' on {settings.init}: a plain CLIP has no trained proxies, and a frozen backbone "
            "cannot learn them. Start from a post-pretrained model, or set model.pooling=mean."
        )
    return UniPtClip(backbone, settings.unipt, seed)


def read(weights: Path, settings: ModelSettings, seed: int = 0) -> UniPtClip:
    return load_unipt(weights, clip_vip.load(settings, seed))


def file_header(model: UniPtClip) -> dict[str, Any]:
    return unipt_header(model)


def file_tensors(model: UniPtClip, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return side_tensors(tensors)


def skeleton(config: ModelConfig, settings: ModelSettings) -> UniPtClip:
    return UniPtClip(ClipVip(config), settings.unipt)
