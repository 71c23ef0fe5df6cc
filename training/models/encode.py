"""Encode clips and texts and score pairs with the model of any method."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clipmill.base.errors import UserError
from training.data.tokenizer import TextEncoder

if TYPE_CHECKING:
    from training.models.clip_vip.model import ModelConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(
    frames: Tensor,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise uint8 (or float 0..255) pixels [..., 3, H, W] to (x/255 - mean)/std, on their device.

    dtype  None: that of float pixels, else float32
    """
    dtype = dtype or (frames.dtype if frames.is_floating_point() else torch.float32)
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=dtype, device=frames.device)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], dtype=dtype, device=frames.device)
    return frames.to(dtype) * scale[:, None, None] - shift[:, None, None]


def needs_pairs(model: nn.Module) -> bool:
    """Return True if a model scores pairs and has no vector per item (CLIP4Clip's tightTransf)."""
    return getattr(model, "needs_pairs", False)


def encode_clips(model: nn.Module, pixels_BT3SS: Tensor, mask_BT: Tensor) -> Tensor:
    """Encode uint8 pixels to unit vectors [B, D], or to frames [B, T, D] with zeros where masked if it scores pairs.

    mask_BT  false for padding frames, whose pixels are zeros (docs/methods/clip4clip.md section 5)
    """
    pixels = normalise(pixels_BT3SS, model.config.image_mean, model.config.image_std)
    if not getattr(model, "takes_frame_mask", False):
        return model.encode_video(pixels)
    pixels = torch.where(mask_BT[..., None, None, None], pixels, 0)
    if needs_pairs(model):
        return model.frame_features(pixels) * mask_BT.unsqueeze(2)
    return model.encode_video(pixels, mask_BT)


def encode_texts(model: nn.Module, ids_BL: Tensor, *, cut: bool = True) -> Tensor:
    """Encode token ids to unit vectors [B, D], or to the features [B, D] that `score_pairs` takes."""
    return (model.text_features if needs_pairs(model) else model.encode_text)(ids_BL, cut=cut)


def score_pairs(model: nn.Module, text_BC: Tensor, frames_KTC: Tensor) -> Tensor:
    """Score every text with every video, [B, K], from the results of `encode_texts` and `encode_clips`."""
    return model.similarity(text_BC, frames_KTC, frames_KTC.any(dim=2))


def text_encoder(config: "ModelConfig", max_tokens: int) -> TextEncoder:
    """Return the encoder of a model's texts. Raises UserError if `max_tokens` exceeds the model's context length."""
    if max_tokens > config.context_length:
        raise UserError(
            f"data.max_text_tokens = {max_tokens}: set at most {config.context_length}, the model's context length "
            "with both end tokens."
        )
    return TextEncoder(config.words, max_tokens)
