"""CLIP-ViP: CLIP's two towers, the vision tower with video proxies (docs/methods/clip_vip.md, sections 2 and 3).

Shape letters are those of `training.models.clip_vip.attention`. `ClipVip` maps pixels or token ids to unit vectors. An
image is a video of one frame; without added proxies and with one frame this is plain CLIP.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clipmill.base.errors import UserError
from training.models.clip_vip.attention import causal_attention, causal_bias, first_token_attention, proxy_attention
from training.models.model import VideoTextModel

MAX_LOG_SCALE = math.log(200)


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of one transformer."""

    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"  # x·sigmoid(1.702 x) in OpenAI's, exact in most others
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise UserError(f"num_heads {self.num_heads} does not divide the width {self.width}")
        if self.activation not in ("quick_gelu", "gelu"):
            raise UserError(f"activation is {self.activation!r}; allowed: quick_gelu, gelu")


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and arithmetic of a model."""

    vision: TowerConfig
    text: TowerConfig
    embed_dim: int

    image_size: int = 224
    patch_size: int = 32
    vocab_size: int = 49408
    context_length: int = 77

    pooling: Literal["proxy", "mean"] = "proxy"  # "mean": frames through plain CLIP, unit vectors averaged
    num_added: int = 3  # proxies besides CLIP's class token
    num_times: int = 12  # rows of the temporal table, 0: none

    log_scale_init: float = 4.6  # used only if the checkpoint has no logit_scale
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    words: tuple[str, ...] | None = None  # the vocabulary of a small world's model; None: CLIP's

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise UserError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.pooling == "mean" and (self.num_added or self.num_times):
            raise UserError("pooling 'mean' is plain CLIP frame by frame: set num_added and num_times to 0")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_proxies(self) -> int:
        return 1 + self.num_added


class Block(nn.Module):
    """Pre-norm transformer block with one matrix for query, key and value."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        width = config.width
        self.config = config
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.fc1 = nn.Linear(width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, width)

    def forward(self, x_BSD: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        qkv_BS3HE = self._heads(self.qkv(self.norm1(x_BSD)), 3)
        x_BSD = x_BSD + self.out(attend(qkv_BS3HE))
        return x_BSD + self.mlp(self.norm2(x_BSD))

    def first_token(self, x_BSD: Tensor) -> Tensor:
        """Compute the block's output for token 0 alone, [B, 1, D]; the other tokens give only keys and values."""
        width = self.config.width
        (q_weight, kv_weight), (q_bias, kv_bias) = (p.split([width, 2 * width]) for p in self.qkv.parameters())
        normed_BSD = self.norm1(x_BSD)
        q_B1HE = self._heads(F.linear(normed_BSD[:, :1], q_weight, q_bias), 1).squeeze(2)
        kv_BS2HE = self._heads(F.linear(normed_BSD, kv_weight, kv_bias), 2)
        x_B1D = x_BSD[:, :1] + self.out(first_token_attention(q_B1HE, kv_BS2HE))
        return x_B1D + self.mlp(self.norm2(x_B1D))

    def mlp(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if self.config.activation == "gelu":
            return self.fc2(F.gelu(hidden))
        # x·sigmoid(1.702 x) = silu(1.702 x)/1.702 is one fused activation; autograd keeps neither overwritten tensor
        return self.fc2(F.silu(hidden.mul_(1.702)).mul_(1 / 1.702))

    def _heads(self, x_BSF: Tensor, num_parts: int) -> Tensor:
        return x_BSF.unflatten(2, (num_parts, self.config.num_heads, -1))


class Tower(nn.Module):
    """Stack of blocks with optional activation checkpointing: the base of both towers."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.activation_checkpointing = False

    def _run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _stack(
        self, x_BSD: Tensor, attend: Callable[[Tensor], Tensor], num_blocks: int, states: list[Tensor] | None
    ) -> Tensor:
        """Run the first `num_blocks` blocks; append their input and every block's output to `states`, if given."""
        if states is not None:
            states.append(x_BSD)
        for block in self.blocks[:num_blocks]:
            x_BSD = self._run(block, x_BSD, attend)
            if states is not None:
                states.append(x_BSD)
        return x_BSD


class VisionTower(Tower):
    """Map pixels to the class token after the last norm, before the projection."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.vision)
        width, patch = config.vision.width, config.patch_size
        self.config = config
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.added_embedding = nn.Parameter(torch.empty(config.num_added, width)) if config.num_added else None
        self.position_embedding = nn.Parameter(torch.empty(1 + config.num_patches, width))
        self.time_embedding = nn.Parameter(torch.empty(config.num_times, width)) if config.num_times else None
        self.pre_norm = nn.LayerNorm(width, eps=config.vision.norm_eps)
        self.post_norm = nn.LayerNorm(width, eps=config.vision.norm_eps)

    def forward(self, pixels_BT3HW: Tensor, states: list[Tensor] | None = None) -> Tensor:
        """Run the tower, [B, D]. If `states` is given, every block runs in full and appends its output [B, S, D]."""
        num_frames, num_blocks = pixels_BT3HW.shape[1], len(self.blocks)

        def attend(qkv_BS3HE: Tensor) -> Tensor:
            return proxy_attention(qkv_BS3HE, self.config.num_proxies, num_frames)

        x_BSD = self.pre_norm(self.tokens(pixels_BT3HW))
        if states is not None:
            return self.post_norm(self._stack(x_BSD, attend, num_blocks, states)[:, 0])
        x_BSD = self._stack(x_BSD, attend, num_blocks - 1, None)
        return self.post_norm(self._run(self.blocks[-1].first_token, x_BSD)[:, 0])

    def tokens(self, pixels_BT3HW: Tensor) -> Tensor:
        """Embed pixels, [B, S, D] (docs/methods/clip_vip.md 2.1).

        The order is: class token, added proxies, frame 0's patches, frame 1's patches, …
        """
        batch, num_frames = pixels_BT3HW.shape[:2]
        patches = self.patch_embedding(pixels_BT3HW.flatten(0, 1)).flatten(2).transpose(1, 2)
        proxy_position, patch_position_LD = self.position_embedding.split([1, self.config.num_patches])
        position_TLD = patch_position_LD.unsqueeze(0)
        if self.time_embedding is not None:
            position_TLD = position_TLD + resample_times(self.time_embedding, num_frames).unsqueeze(1)
        patches = patches.unflatten(0, (batch, num_frames)) + position_TLD
        proxies_MD = self.class_embedding.unsqueeze(0)
        if self.added_embedding is not None:
            proxies_MD = torch.cat([proxies_MD, self.added_embedding])
        proxies_BMD = (proxies_MD + proxy_position).expand(batch, -1, -1)
        return torch.cat([proxies_BMD.to(patches.dtype), patches.flatten(1, 2)], dim=1)


class TextTower(Tower):
    """Map token ids to the end-of-text token after the last norm, before the projection."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.text)
        width = config.text.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.final_norm = nn.LayerNorm(width, eps=config.text.norm_eps)

    def forward(self, ids_BS: Tensor, mask_BS: Tensor | None = None, states: list[Tensor] | None = None) -> Tensor:
        """Run the tower, [B, D], pooled at the first position of the largest id. `states` as in the vision tower."""
        x_BSD = self.token_embedding(ids_BS) + self.position_embedding[: ids_BS.shape[1]]
        bias = None if mask_BS is None else causal_bias(mask_BS, x_BSD.dtype)
        x_BSD = self._stack(x_BSD, lambda qkv: causal_attention(qkv, bias), len(self.blocks), states)
        rows = torch.arange(len(ids_BS), device=ids_BS.device)
        return self.final_norm(x_BSD[rows, ids_BS.argmax(dim=1)])


class ClipVip(VideoTextModel):
    """The whole model. `new_tensors` names the tensors that were initialised because a plain image CLIP lacks them."""

    method = "clip_vip"
    can_be_sharded = True

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config)
        self.text = TextTower(config)
        self.visual_projection = nn.Linear(config.vision.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.log_scale_init))
        self.new_tensors: tuple[str, ...] = ()

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels [B, T, 3, H, W] to unit vectors [B, embed_dim].

        They are computed in the model's dtype, or in float64 for float64 pixels.
        """
        self.check_pixels(pixels)
        if pixels.dtype == torch.float64 and self.logit_scale.dtype != torch.float64:
            widened = {name: p.double() for name, p in self.named_parameters()}
            return torch.func.functional_call(self, widened, (pixels,))
        pixels = pixels.to(self.logit_scale.dtype)
        if self.config.pooling == "proxy":
            return self._unit(self.visual_projection(self.vision(pixels)))
        frames = self._unit(self.visual_projection(self.vision(pixels.flatten(0, 1).unsqueeze(1))))
        return F.normalize(frames.unflatten(0, pixels.shape[:2]).mean(dim=1), dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor | None = None, *, cut: bool = True) -> Tensor:
        """Encode token ids [B, L] to unit vectors; positions whose `mask` [B, L] is 0 are not attended to.

        cut  drop the positions after the batch's last end of text, which changes no result but waits for the device;
             False if the caller has called `cut_texts` already
        """
        if cut:
            ids, mask = cut_texts(ids, mask)
        self.check_texts(ids)
        return self._unit(self.text_projection(self.text(ids, mask)))

    def _unit(self, features: Tensor) -> Tensor:
        """Normalise in the weights' dtype, because in autocast's bf16 lengths are up to 0.4 % off."""
        return F.normalize(features.to(self.logit_scale.dtype), dim=-1)

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        self.vision.activation_checkpointing = self.text.activation_checkpointing = enabled

    def shard(self) -> None:
        for block in [*self.vision.blocks, *self.text.blocks]:
            fully_shard(block)
            register_fsdp_forward_method(block, "first_token")

    def without_weights(self) -> "ClipVip":
        with torch.device("meta"):
            return ClipVip(self.config)

    @torch.no_grad()
    def clamp_log_scale(self) -> None:
        """Clamp the optimiser's own parameter to [0, ln 200] after every update (docs/methods/clip_vip.md 5)."""
        self.logit_scale.clamp_(0, MAX_LOG_SCALE)

    def initialise(self, seed: int = 0) -> None:
        """Draw all weights with OpenAI's standard deviations, as a function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            initialise_tensor(self.config, name, parameter, generator)

    def check_pixels(self, pixels: Tensor) -> None:
        size = self.config.image_size
        if pixels.ndim != 5 or pixels.shape[2:] != (3, size, size) or not pixels.is_floating_point():
            raise UserError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}; allowed: normalised floats [B, T, 3, {size}, {size}]"
            )

    def check_texts(self, ids: Tensor) -> None:
        if ids.shape[1] > self.config.context_length:
            raise UserError(f"texts have {ids.shape[1]} tokens; allowed: context_length {self.config.context_length}")


def resample_times(table_ND: Tensor, num_frames: int) -> Tensor:
    """Resample the temporal table linearly at T half-pixel centres, [T, D] (docs/methods/clip_vip.md 2.1)."""
    num_times = len(table_ND)
    if num_times == num_frames:
        return table_ND
    source = ((torch.arange(num_frames, dtype=torch.float64) + 0.5) * (num_times / num_frames) - 0.5).clamp(min=0)
    low = source.long()
    weight_T1 = (source - low).to(table_ND).unsqueeze(1)
    low = low.to(table_ND.device)
    return torch.lerp(table_ND[low], table_ND[(low + 1).clamp(max=num_times - 1)], weight_T1)


def cut_texts(ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Drop the positions after the batch's last end of text, and a mask without effect.

    If a text's first position is masked, nothing is cut: that row averages over later positions.
    """
    ends = ids.argmax(dim=1)
    length = int(ends.max()) + 1
    if mask is None:
        return ids[:, :length], None
    before_end = torch.arange(ids.shape[1], device=ids.device) <= ends[:, None]
    if bool((mask.bool() | ~before_end).all()):
        return ids[:, :length], None
    return (ids[:, :length], mask[:, :length]) if bool(mask[:, 0].all()) else (ids, mask)


@torch.no_grad()
def initialise_tensor(config: ModelConfig, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Fill one parameter by its name in `ClipVip`. CLIP lacks two: the time table, 0, and added tokens, N(0, 1)."""
    if name.endswith("time_embedding") or name.endswith("bias"):
        tensor.zero_()
    elif name == "logit_scale":
        tensor.fill_(config.log_scale_init)
    elif "norm" in name:
        tensor.fill_(1)
    else:
        tensor.copy_(
            torch.empty(tensor.shape, dtype=torch.float32).normal_(0, _init_std(config, name), generator=generator)
        )


def _init_std(config: ModelConfig, name: str) -> float:
    tower = config.text if name.startswith("text") else config.vision
    if name == "vision.added_embedding":
        return 1.0
    if name.startswith("text.") and "embedding" in name:
        return 0.02 if "token" in name else 0.01
    if name.endswith("qkv.weight") or name.endswith("out.weight") or name.endswith("fc2.weight"):
        return tower.width**-0.5 * (1 if "qkv" in name else (2 * tower.num_layers) ** -0.5)
    if name.endswith("fc1.weight"):
        return (2 * tower.width) ** -0.5
    return tower.width**-0.5


# FLOPs of the published arithmetic, two per multiply-add. The savings of the last block and of cut texts are not
# subtracted, so that MFU compares a step with the cost of the method.


def video_flops(config: ModelConfig, num_frames: int) -> float:
    """Count forward FLOPs of one video (or image: one frame) through the vision tower and its projection."""
    if config.pooling == "mean" and num_frames > 1:
        return num_frames * video_flops(config, 1)
    num_proxies, num_patches = config.num_proxies, config.num_patches
    num_tokens = num_proxies + num_frames * num_patches
    pairs = num_frames * num_patches * (num_proxies + num_patches) + num_proxies * num_tokens
    embedding = 2 * num_frames * num_patches * 3 * config.patch_size**2 * config.vision.width
    return embedding + tower_flops(config.vision, num_tokens, pairs) + 2 * config.vision.width * config.embed_dim


def text_flops(config: ModelConfig, num_tokens: int) -> float:
    """Count forward FLOPs of one text of `num_tokens` tokens; the masked half of attention is not subtracted."""
    return tower_flops(config.text, num_tokens, num_tokens**2) + 2 * config.text.width * config.embed_dim


def sample_flops(
    config: ModelConfig, num_frames: int = 12, num_images: int = 1, text_lengths: tuple[int, ...] = (70, 70)
) -> float:
    """Count forward and backward FLOPs of one training sample: in pre-training 374e9 for B/32, 1,402e9 for B/16."""
    forward = video_flops(config, num_frames) + num_images * video_flops(config, 1)
    return 3 * (forward + sum(text_flops(config, length) for length in text_lengths))


def tower_flops(config: TowerConfig, num_tokens: int, num_pairs: int) -> float:
    per_token = 8 * config.width**2 + 4 * config.width * config.mlp_width
    return config.num_layers * (num_tokens * per_token + 4 * config.width * num_pairs)
