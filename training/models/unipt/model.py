"""UniPT: small networks beside a frozen CLIP that read every layer's hidden states at once (docs/methods/unipt.md).

Only the two side networks train. The backbone runs without gradients, and its hidden states are plain inputs. Shape
letters, besides those of `training.models.clip_vip.attention`:
    N items (videos, frames or texts)   S tokens of an item   C embed_dim   I inner width   Y layers that are read
Tokens of a layer are used only in sums over tokens, so the map to the inner width is applied to the query and to the
sums instead of the tokens: the same numbers without an [N, S, I] tensor and with S times fewer products.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.base.errors import UserError
from training.models.clip4clip.heads import pooled
from training.models.clip_vip.model import ClipVip, ModelConfig, cut_texts
from training.models.model import VideoTextModel
from training.models.unipt.settings import UniPtSettings

PREFIXES = ("image_adapter.", "text_adapter.")  # as published, beside CLIP's own tensors under `clip.`
INIT_STD = 0.02
_LOWEST_SUM = 1e-6  # of similarities; if all are negative, only the anchor's own token counts


class Adapted(NamedTuple):
    """Output of one side network."""

    features_NC: Tensor  # the guide plus the correction, not normalised
    confidence_NY: Tensor  # share of each layer; sums to 1
    mixed_NI: Tensor  # weighted sum of the layers' features, before the last map


class Adapter(nn.Module):
    """One side network. Its tensors have the published names (member 0 of each pair is a ReLU)."""

    def __init__(self, widths: Sequence[int], embed_dim: int, reduction: int = 1):
        super().__init__()
        if embed_dim % reduction:
            raise UserError(f"unipt.reduction is {reduction}; allowed: divisors of embed_dim {embed_dim}")
        inner = embed_dim // reduction
        self.downsample_layers = nn.ModuleList(_relu_linear(width, inner) for width in widths)
        self.downsample_layer = _relu_linear(embed_dim, inner)
        self.upsample_layer = _relu_linear(inner, embed_dim)
        self.gate_layer = nn.Linear(inner, 1)
        self.mean_confidence_Y: Tensor | None = None  # of the last forward pass, for logs

    def forward(
        self,
        states: Iterable[Tensor],
        guide_NC: Tensor,
        mask_NS: Tensor | None = None,
        position_N: Tensor | None = None,
    ) -> Adapted:
        """Run steps 1 to 7 of docs/methods/unipt.md section 3, in the wider dtype of guide and weights.

        states    Y hidden states [N, S, D]
        guide     last feature of the backbone, projected and not normalised
        mask      1 where a token is read; None: everywhere
        position  of the anchor, the token whose own feature is added; None: token 0
        """
        guide_NC = guide_NC.to(torch.promote_types(guide_NC.dtype, self.gate_layer.weight.dtype))
        query_NI = _map(self.downsample_layer, guide_NC)
        rows = torch.arange(len(guide_NC), device=guide_NC.device)
        anchor = rows, torch.zeros_like(rows) if position_N is None else position_N
        read = [
            _read_layer(layer[1], state, query_NI, mask_NS, anchor)
            for layer, state in zip(self.downsample_layers, states, strict=True)
        ]
        layers_NYI, pooled_NYI = (torch.stack(parts, dim=1) for parts in zip(*read, strict=True))
        gate_NY = _linear(self.gate_layer, query_NI.unsqueeze(1) * pooled_NYI).squeeze(2)
        confidence_NY = gate_NY.softmax(dim=1)
        self.mean_confidence_Y = confidence_NY.detach().mean(dim=0)
        mixed_NI = (confidence_NY.unsqueeze(2) * layers_NYI).sum(dim=1)
        return Adapted(guide_NC + _map(self.upsample_layer, mixed_NI), confidence_NY, mixed_NI)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, zero_start: bool = False) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or (zero_start and name.startswith("upsample_layer")):
                parameter.zero_()
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, INIT_STD, generator=generator))


def _read_layer(
    linear: nn.Linear,
    state_NSD: Tensor,
    query_NI: Tensor,
    mask_NS: Tensor | None,
    anchor: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the query's weighted sum of a layer plus the anchor's feature, and the mean over tokens, each [N, I]."""
    kind = state_NSD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query_NI.dtype
    tokens_NSD = F.relu(state_NSD).to(dtype)  # narrowed once, so that all products keep this one copy
    weight_ID, bias_I = (parameter.to(query_NI.dtype) for parameter in (linear.weight, linear.bias))
    scores_NS = torch.bmm(tokens_NSD, (query_NI @ weight_ID).to(tokens_NSD.dtype).unsqueeze(2)).squeeze(2)
    scores_NS = F.relu(scores_NS.to(query_NI.dtype) + (query_NI @ bias_I).unsqueeze(1))
    counts_NS = torch.ones_like(scores_NS) if mask_NS is None else mask_NS.to(scores_NS.dtype)
    scores_NS = scores_NS * counts_NS
    shares_NS = scores_NS / scores_NS.sum(dim=1, keepdim=True).clamp(min=_LOWEST_SUM)
    mean_NS = counts_NS / counts_NS.sum(dim=1, keepdim=True).clamp(min=1)
    weights_N2S = torch.stack((shares_NS, mean_NS), dim=1)
    gathered_ND, mean_ND = torch.bmm(weights_N2S.to(dtype), tokens_NSD).to(weights_N2S.dtype).unbind(dim=1)
    feature_NI = (gathered_ND + tokens_NSD[anchor]) @ weight_ID.T + (shares_NS.sum(dim=1, keepdim=True) + 1) * bias_I
    return feature_NI, F.linear(mean_ND, weight_ID, bias_I)


def _relu_linear(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Linear(in_features, out_features))


def _map(layer: nn.Sequential, x: Tensor) -> Tensor:
    return _linear(layer[1], layer[0](x))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class UniPtClip(VideoTextModel):
    """A frozen backbone with a side network on each tower.

    On a backbone with pooling "mean" this is UniPT's CLIP4Clip with meanP; with pooling "proxy" the video's class token
    is the guide (docs/methods/unipt.md section 7). The log scale is frozen with the backbone.
    """

    method = "unipt"
    saves_only_trained = True
    reads_hidden_states = True

    def __init__(self, backbone: ClipVip, settings: UniPtSettings | None = None, seed: int = 0):
        super().__init__()
        self.settings = settings or UniPtSettings()
        self.backbone = backbone.requires_grad_(False).eval()
        self.image_adapter = _adapter(backbone.config, "vision", self.settings)
        self.text_adapter = _adapter(backbone.config, "text", self.settings)
        generator = torch.Generator().manual_seed(seed)
        for adapter in (self.image_adapter, self.text_adapter):
            adapter.initialise(generator, self.settings.zero_start)

    @property
    def config(self) -> ModelConfig:
        return self.backbone.config

    @property
    def logit_scale(self) -> Tensor:
        return self.backbone.logit_scale

    @property
    def new_tensors(self) -> tuple[str, ...]:
        return self.backbone.new_tensors

    def train(self, mode: bool = True) -> "UniPtClip":
        """Set the side networks' mode; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @property
    def takes_frame_mask(self) -> bool:
        return self.config.pooling == "mean"

    def encode_video(self, pixels: Tensor, video_mask: Tensor | None = None) -> Tensor:
        """Encode normalised pixels [B, T, 3, H, W] to unit vectors [B, embed_dim]; dtypes as in `ClipVip.encode_video`.

        video_mask  [B, T], only for pooling "mean": false for padding frames; None: all frames are real
        """
        if self.config.pooling == "proxy":
            return F.normalize(self._video_features(pixels), dim=-1)
        frames_BTC = self.frame_features(pixels)
        return pooled(frames_BTC, frames_BTC.new_ones(frames_BTC.shape[:2]) if video_mask is None else video_mask)

    def frame_features(self, pixels: Tensor) -> Tensor:
        """Encode every frame as a video of one frame: [B, T, embed_dim], not normalised."""
        self.backbone.check_pixels(pixels)
        return self._video_features(pixels.flatten(0, 1).unsqueeze(1)).unflatten(0, pixels.shape[:2])

    def encode_text(self, ids: Tensor, mask: Tensor | None = None, *, cut: bool = True) -> Tensor:
        """Encode token ids [B, L] to unit vectors [B, embed_dim]; arguments as in `ClipVip.encode_text`."""
        return F.normalize(self.text_features(ids, mask, cut=cut), dim=-1)

    def text_features(self, ids: Tensor, mask: Tensor | None = None, *, cut: bool = True) -> Tensor:
        """Encode token ids to [B, embed_dim], not normalised. Start and end tokens are read like words.

        The published code leaves out tokens of id 0, which is padding but also "!".
        """
        if cut:
            ids, mask = cut_texts(ids, mask)
        self.backbone.check_texts(ids)
        ends_B = ids.argmax(dim=1)
        read_BL = torch.arange(ids.shape[1], device=ids.device) <= ends_B.unsqueeze(1)
        if mask is not None:
            read_BL = read_BL & mask.bool()
        guide_BC, states = self._text_states(ids, mask)
        return self.text_adapter(states, guide_BC, read_BL, ends_B).features_NC

    def log_values(self) -> dict[str, Tensor]:
        """Return each network's mean share of every layer it reads, in the last forward pass, still on the device."""
        adapters = {"image": self.image_adapter, "text": self.text_adapter}
        return {
            f"{name}_layer_{layer}": share
            for name, adapter in adapters.items()
            if adapter.mean_confidence_Y is not None
            for layer, share in enumerate(adapter.mean_confidence_Y.unbind())
        }

    @property
    def num_frozen_blocks(self) -> int:
        """Count all blocks, because the side networks add less than a hundredth of the backbone's FLOPs."""
        return self.config.vision.num_layers

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        if enabled:
            raise UserError("train.activation_checkpointing has no effect on UniPT's frozen backbone: set it false")

    def _video_features(self, pixels_BT3HW: Tensor) -> Tensor:
        guide_BC, states = self._video_states(pixels_BT3HW)
        return self.image_adapter(states, guide_BC).features_NC

    @torch.no_grad()
    def _video_states(self, pixels_BT3HW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the projected class token [B, C] and the hidden states to read, in float64 for float64 pixels."""
        self.backbone.check_pixels(pixels_BT3HW)
        dtype, own = pixels_BT3HW.dtype, self.logit_scale.dtype
        dtype = torch.float64 if torch.float64 in (dtype, own) else own
        vision, projection = self.backbone.vision, self.backbone.visual_projection
        weights = {} if dtype == own else {name: p.to(dtype) for name, p in vision.named_parameters()}
        states: list[Tensor] = []
        pooled_BD = torch.func.functional_call(vision, weights, (pixels_BT3HW.to(dtype), states))
        states = [self._video_tokens(state, pixels_BT3HW.shape[1]) for state in self._layers(states)]
        return F.linear(pooled_BD, projection.weight.to(pooled_BD.dtype)), states

    @torch.no_grad()
    def _text_states(self, ids_BL: Tensor, mask_BL: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        states: list[Tensor] = []
        guide_BC = self.backbone.text_projection(self.backbone.text(ids_BL, mask_BL, states))
        return guide_BC, self._layers(states)

    def _layers(self, states: list[Tensor]) -> list[Tensor]:
        return states[:: -self.settings.every][::-1]

    def _video_tokens(self, state_BSD: Tensor, num_frames: int) -> Tensor:
        """Select the tokens of one layer that `settings.tokens` names."""
        if self.settings.tokens == "all":
            return state_BSD
        num_proxies = self.config.num_proxies
        proxies_BMD = state_BSD[:, :num_proxies]
        if self.settings.tokens == "proxies":
            return proxies_BMD.clone()  # a view would keep the whole layer in memory
        frames_BTD = state_BSD[:, num_proxies:].unflatten(1, (num_frames, -1)).mean(dim=2)
        return torch.cat([proxies_BMD, frames_BTD], dim=1)


def _adapter(config: ModelConfig, tower: str, settings: UniPtSettings) -> Adapter:
    sizes = getattr(config, tower)
    num_read = -(-(1 + sizes.num_layers) // settings.every)
    return Adapter([sizes.width] * num_read, config.embed_dim, settings.reduction)


def side_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors of the side networks from a model's state; their names are the published ones."""
    return {name: tensor for name, tensor in state.items() if name.startswith(PREFIXES)}
