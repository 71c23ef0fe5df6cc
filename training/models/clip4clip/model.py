"""CLIP4Clip (docs/methods/clip4clip.md): CLIP frame by frame, and a head that compares texts with a video's frames.

The CLIP inside is `training.models.clip_vip.model.ClipVip` without proxies. Shape letters are those of
`training.models.clip4clip.heads`, and
    L tokens of a text   T = F frames   H, W pixels
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clipmill.base.errors import UserError
from training.models.clip4clip.heads import NORM_EPS, PairHead, build_head, pair_keys, pooled
from training.models.clip4clip.settings import Clip4ClipSettings
from training.models.clip4clip.weight_names import stem_of
from training.models.clip_vip.model import (
    ClipVip,
    ModelConfig,
    TextTower,
    TowerConfig,
    VisionTower,
    cut_texts,
    tower_flops,
)
from training.models.model import VideoTextModel

MAX_LOG_SCALE = math.log(100)
INIT_STD = 0.02
# CLIP's last layers, which always train
_ALWAYS_TRAINED = ("logit_scale", "text.final_norm.", "text_projection.", "vision.post_norm.", "visual_projection.")


class Clip4Clip(VideoTextModel):
    """A CLIP with a head that starts from the CLIP's weights.

    clip         a plain CLIP, without added tokens or temporal table; it becomes part of this model
    new_tensors  names of the tensors that were not read from a file but drawn, copied or set to 0

    Every head has `frame_features`, `text_features` and `similarity`. Every head except tightTransf, which scores pairs
    (`needs_pairs`), also has one vector per item: `encode_video` and `encode_text`.
    """

    method = "clip4clip"

    def __init__(self, clip: ClipVip, settings: Clip4ClipSettings | None = None, seed: int = 0):
        super().__init__()
        if clip.config.num_added or clip.config.num_times:
            raise UserError("CLIP4Clip is built on a plain CLIP: model.num_added and model.num_times must be 0")
        self.settings = settings or Clip4ClipSettings()
        self.clip = clip
        self.head = build_head(self.settings.head, _head_config(clip.config, self.settings), clip.config.context_length)
        self.head.to(clip.logit_scale)
        self.pairs_at_a_time = 1024  # affects the memory of tightTransf, not its numbers
        self._start_head(torch.Generator().manual_seed(seed))
        if self.settings.stem == "3d":
            self._start_stem()
        self.new_tensors = tuple(name for name in self.state_dict() if self.is_added(name))
        self.freeze(self.settings.frozen_layers)

    # -- features, then scores ----------------------------------------------------------------------------------------

    def frame_features(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels [B, F, 3, H, W] or, as published, [B, 1, F, 1, 3, H, W] to frames [B, F, C].

        Frames are not normalised. They are computed in the model's dtype, or in float64 for float64 pixels.
        """
        if pixels.ndim == 7:
            pixels = pixels.flatten(2, 3).flatten(0, 1)
        self.clip.check_pixels(pixels)
        num_frames = pixels.shape[1]
        pixels = pixels.to(torch.float64 if pixels.dtype == torch.float64 else self.logit_scale.dtype)
        if self.settings.stem == "3d":
            pixels = with_neighbours(pixels)
        tokens = _in_dtype(pixels.dtype, self.clip.vision, pixels.flatten(0, 1).unsqueeze(1))
        return _in_dtype(pixels.dtype, self.clip.visual_projection, tokens).unflatten(0, (-1, num_frames))

    def text_features(self, ids: Tensor, *, cut: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """Encode token ids [N, L] or, as published, [N, 1, L] to [N, C], not normalised.

        cut    as in `ClipVip.encode_text`
        dtype  to compute in; None: the model's
        """
        ids = ids.flatten(0, -2)
        if cut:
            ids, _ = cut_texts(ids)
        self.clip.check_texts(ids)
        dtype = dtype or self.logit_scale.dtype
        return _in_dtype(dtype, self.clip.text_projection, _in_dtype(dtype, self.clip.text, ids))

    def similarity(self, text_features: Tensor, visual_output: Tensor, video_mask: Tensor | None = None) -> Tensor:
        """Score every text with every video, [N, B], multiplied by the temperature (tightTransf has none).

        text_features  [N, C] or [N, 1, C], from `text_features`
        visual_output  [B, F, C], from `frame_features`
        video_mask     [B, F] or [B, 1, F], 1 where a frame is real; None: all are. A video without real frames scores
                       0, under tightTransf the score of the text alone
        The result has the widest dtype of the inputs and the model.
        """
        dtype = torch.promote_types(
            self.logit_scale.dtype, torch.promote_types(text_features.dtype, visual_output.dtype)
        )
        text_NC, frames_BFC = text_features.flatten(0, -2).to(dtype), visual_output.to(dtype)
        mask_BF = self._mask(video_mask, frames_BFC)
        if self.needs_pairs:
            return self._score_pairs(text_NC, frames_BFC, mask_BF).to(dtype)
        video_BC = self._pool(frames_BFC, mask_BF)
        with torch.autocast(text_NC.device.type, enabled=False):
            text_NC, video_BC = F.normalize(text_NC, dim=1), video_BC.to(dtype)
            return self.logit_scale.to(dtype).exp() * (text_NC @ video_BC.T)

    def forward(self, ids: Tensor, mask: Tensor | None, video: Tensor, video_mask: Tensor | None = None) -> Tensor:
        """Score N texts with B videos, [N, B]; shapes as in the methods above.

        mask  not used: a text is pooled at its end token, which does not attend to padding
        """
        frames_BFC = self.frame_features(video)
        return self.similarity(self.text_features(ids, dtype=frames_BFC.dtype), frames_BFC, video_mask)

    # -- a vector per item --------------------------------------------------------------------------------------------

    takes_frame_mask = True

    @property
    def needs_pairs(self) -> bool:
        return isinstance(self.head, PairHead)

    def encode_video(self, pixels: Tensor, video_mask: Tensor | None = None) -> Tensor:
        """Encode pixels and mask as above to unit vectors [B, C]: logits are exp(logit_scale) times their cosines."""
        if self.needs_pairs:
            raise UserError(
                "model.clip4clip.head = 'tightTransf' scores pairs and has no vector per video; choose another head"
            )
        frames_BFC = self.frame_features(pixels)
        return self._pool(frames_BFC, self._mask(video_mask, frames_BFC))

    def encode_text(self, ids: Tensor, mask: Tensor | None = None, *, cut: bool = True) -> Tensor:
        """Encode token ids [N, L] to unit vectors [N, C]; `mask` is not used, as in `forward`."""
        return F.normalize(self.text_features(ids, cut=cut), dim=1)

    def encode_frames(self, pixels_F3HW: Tensor) -> Tensor:
        return self.frame_features(pixels_F3HW.unsqueeze(0))[0]

    @property
    def mixes_frames(self) -> bool:
        return self.settings.head in ("seqLSTM", "seqTransf")

    # -- what the trainer needs ---------------------------------------------------------------------------------------

    @property
    def called(self) -> str:
        return f"model.clip4clip.head = {self.settings.head!r}" if self.needs_pairs else super().called

    @property
    def config(self) -> ModelConfig:
        return self.clip.config

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.clip.logit_scale

    @property
    def vision(self) -> VisionTower:
        return self.clip.vision

    @property
    def text(self) -> TextTower:
        return self.clip.text

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Set it for the CLIP; tightTransf always recomputes its chunks of pairs if there is more than one."""
        self.clip.set_activation_checkpointing(enabled)

    @torch.no_grad()
    def clamp_log_scale(self) -> None:
        """Clamp to at most ln 100, in place, after every update."""
        self.logit_scale.clamp_(max=MAX_LOG_SCALE)

    def freeze(self, num_layers: int | None) -> None:
        """Freeze parameters as `model.clip4clip.frozen_layers` says; a 3-D stem always trains."""
        deepest = max(len(self.vision.blocks), len(self.text.blocks))
        if num_layers is not None and num_layers > deepest:
            raise UserError(f"model.clip4clip.frozen_layers is {num_layers}; allowed: at most this CLIP's {deepest}")
        for name, parameter in self.clip.named_parameters():
            parts = name.split(".")
            layer = int(parts[2]) if parts[1:2] == ["blocks"] else -1
            always = name.startswith(_ALWAYS_TRAINED) or self.is_added(f"clip.{name}")
            parameter.requires_grad_(num_layers is None or always or layer >= num_layers)

    def is_added(self, name: str) -> bool:
        """Return True if a tensor is part of CLIP4Clip but not of CLIP."""
        stem = self.settings.stem == "3d" and name == "clip.vision.patch_embedding.weight"
        return stem or name.startswith("head.")

    # -- what it costs ------------------------------------------------------------------------------------------------

    @property
    def num_frozen_blocks(self) -> int:
        return 0 if self.settings.stem == "3d" else self.settings.frozen_layers or 0

    def pair_flops(self, num_frames: int) -> float:
        """Count forward and backward FLOPs of tightTransf's blocks for one pair; 0 for heads that score none."""
        if not self.needs_pairs:
            return 0.0
        num_tokens = 1 + num_frames
        return 3 * tower_flops(_head_config(self.config, self.settings), num_tokens, num_tokens**2)

    def head_activations(self, num_frames: int) -> int:
        return num_frames * self._head_values_per_token if self.settings.head == "seqTransf" else 0

    def pair_activations(self, num_frames: int, num_pairs: int) -> int:
        """Count those of one chunk of pairs, because other chunks are recomputed."""
        if not self.needs_pairs:
            return 0
        return min(num_pairs, self.pairs_at_a_time) * (1 + num_frames) * self._head_values_per_token

    @property
    def _head_values_per_token(self) -> int:
        return self.config.embed_dim * self.settings.num_layers

    # -- inside -------------------------------------------------------------------------------------------------------

    def _mask(self, mask: Tensor | None, frames_BFC: Tensor) -> Tensor:
        if mask is None:
            return torch.ones(frames_BFC.shape[:2], dtype=torch.long, device=frames_BFC.device)
        mask_BF = mask.flatten(0, -2)
        if mask_BF.shape != frames_BFC.shape[:2]:
            raise UserError(f"video_mask is {list(mask.shape)} for frames {list(frames_BFC.shape[:2])}")
        return mask_BF.to(torch.long)

    def _pool(self, frames_BFC: Tensor, mask_BF: Tensor) -> Tensor:
        return pooled(_in_dtype(frames_BFC.dtype, self.head, frames_BFC, mask_BF), mask_BF)

    def _score_pairs(self, text_NC: Tensor, frames_BFC: Tensor, mask_BF: Tensor) -> Tensor:
        seed = int(torch.randint(2**62, (), device="cpu")) if self.training else 0

        def score(pairs_P: Tensor) -> Tensor:
            texts_P, videos_P = pairs_P // len(frames_BFC), pairs_P % len(frames_BFC)
            key_P = pair_keys(seed, texts_P + self.first_text, videos_P) if self.training else None
            return _in_dtype(text_NC.dtype, self.head, text_NC[texts_P], frames_BFC[videos_P], mask_BF[videos_P], key_P)

        chunks = torch.arange(len(text_NC) * len(frames_BFC), device=text_NC.device).split(self.pairs_at_a_time)
        if len(chunks) > 1 and torch.is_grad_enabled():
            scores = [checkpoint(score, pairs_P, use_reentrant=False) for pairs_P in chunks]
        else:
            scores = [score(pairs_P) for pairs_P in chunks]
        return torch.cat(scores).unflatten(0, (len(text_NC), len(frames_BFC)))

    @torch.no_grad()
    def _start_head(self, generator: torch.Generator) -> None:
        """Copy position table and blocks from the text tower where shapes agree; draw everything else."""
        theirs = dict(self.clip.text.named_parameters())
        for name, tensor in self.head.state_dict().items():
            like = theirs.get(name)
            if like is not None and like.shape == tensor.shape:
                tensor.copy_(like)
            else:
                _draw(name, tensor, generator)

    @torch.no_grad()
    def _start_stem(self) -> None:
        """Replace the stem by a convolution over three frames whose outer weights are 0: CLIP's own at the start.

        CLIP's 2-D weight stays as a buffer, because released files hold both.
        """
        flat_D3PP = self.clip.vision.patch_embedding.weight
        width, _, patch, _ = flat_D3PP.shape
        self.register_buffer("flat_stem", flat_D3PP.detach().clone())
        stem = nn.Conv2d(9, width, kernel_size=patch, stride=patch, bias=False).to(flat_D3PP)
        stem.weight.copy_(stem_of(F.pad(flat_D3PP.unsqueeze(2), (0, 0, 0, 0, 1, 1))))
        self.clip.vision.patch_embedding = stem


def with_neighbours(pixels_BT3HW: Tensor) -> Tensor:
    """Concatenate the previous, the own and the next frame's channels: [B, T, 9, H, W], zeros beyond either end.

    A 2-D convolution over them is the published 3-D one with kernel 3 along time.
    """
    padded = F.pad(pixels_BT3HW, (0, 0, 0, 0, 0, 0, 1, 1))
    return torch.cat([padded[:, :-2], pixels_BT3HW, padded[:, 2:]], dim=2)


def _head_config(config: ModelConfig, settings: Clip4ClipSettings) -> TowerConfig:
    """Return the text tower's sizes if features have its width, as in OpenAI's CLIPs; else OpenAI's proportions."""
    sizes: dict[str, Any] = {"num_layers": settings.num_layers, "norm_eps": NORM_EPS}
    width = config.embed_dim
    if width == config.text.width:
        return replace(config.text, **sizes)
    num_heads = width // 64 if width >= 64 and width % 64 == 0 else 1
    return TowerConfig(width=width, num_heads=num_heads, mlp_width=4 * width, **sizes)


def _draw(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if name.startswith("lstm."):
        bound = tensor.shape[-1] ** -0.5 if tensor.ndim == 2 else (len(tensor) // 4) ** -0.5
        tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))
    elif name.endswith("bias"):
        tensor.zero_()
    elif "norm" in name:
        tensor.fill_(1)
    else:
        tensor.copy_(torch.empty(tensor.shape).normal_(0, INIT_STD, generator=generator))


def _in_dtype(dtype: torch.dtype, module: nn.Module, *inputs: Tensor) -> Tensor:
    """Call the module, with its weights widened to float64 if `dtype` is float64."""
    parameters = dict(module.named_parameters())
    if dtype != torch.float64 or all(p.dtype == dtype for p in parameters.values()):
        return module(*inputs)
    return torch.func.functional_call(module, {name: p.double() for name, p in parameters.items()}, inputs)
