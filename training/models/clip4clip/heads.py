"""CLIP4Clip's four heads, which compare texts with frames (docs/methods/clip4clip.md section 3).

The first three map frames to frames, which `pooled` turns into one unit vector per video; the fourth scores pairs.

Shape letters, used as suffixes here and in `training.models.clip4clip.model`:
    N texts   B videos   F frames of a video   P pairs of text and video   S tokens of a sequence
    C size of CLIP's features, which is the width of every head
Masks [B, F] are 1 where a frame is real. Input and output features are not normalised.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.base.errors import UserError
from training.models.clip_vip.attention import biased_attention
from training.models.clip_vip.model import Block, TowerConfig

NORM_EPS = 1e-12  # of every norm in a head; CLIP's own are 1e-5
MASKED_SCORE = -1e6  # added to the attention scores of padding frames
DROPOUT = 0.1  # of tightTransf's input, in training
_GOLDEN, _MIX1, _MIX2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def pooled(frames_BFC: Tensor, mask_BF: Tensor) -> Tensor:
    """Average unit frames over the mask and normalise: [B, C], zeros for a video without any real frame.

    The published model divides 0 by 0 there, and its NaN spreads to every gradient of the batch.
    """
    weights_BF1 = mask_BF.to(frames_BFC.dtype).unsqueeze(2)
    sum_BC = (F.normalize(frames_BFC, dim=2) * weights_BF1).sum(dim=1)
    return F.normalize(sum_BC / weights_BF1.sum(dim=1).clamp(min=1), dim=1)


class MeanHead(nn.Module):
    """meanP: the frames, unchanged."""

    def forward(self, frames_BFC: Tensor, mask_BF: Tensor) -> Tensor:
        return frames_BFC


class LstmHead(nn.Module):
    """seqLSTM: frames plus the LSTM's state at each, for as many frames as the mask counts.

    The table of frame positions is not used; it is a buffer because every published file has it.
    """

    def __init__(self, width: int, num_positions: int):
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.register_buffer("position_embedding", torch.zeros(num_positions, width))

    def forward(self, frames_BFC: Tensor, mask_BF: Tensor) -> Tensor:
        # the LSTM runs forward only, so frames beyond a video's end change no earlier state and need no packing
        if frames_BFC.is_cpu and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):  # few processors have an LSTM of half precision
                states_BFC, _ = self.lstm(frames_BFC.to(self.lstm.weight_ih_l0.dtype))
        else:
            states_BFC, _ = self.lstm(frames_BFC)
        places_F = torch.arange(frames_BFC.shape[1], device=frames_BFC.device)
        before_end_BF = places_F < mask_BF.sum(dim=1, keepdim=True)
        return frames_BFC + states_BFC * before_end_BF.unsqueeze(2)


class _MaskedTransformer(nn.Module):
    """Pre-norm blocks over tokens with positions; masked tokens are not attended to."""

    def __init__(self, config: TowerConfig, num_positions: int):
        super().__init__()
        self.position_embedding = nn.Parameter(torch.empty(num_positions, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def positioned(self, tokens_BSC: Tensor) -> Tensor:
        num_tokens, num_positions = tokens_BSC.shape[1], len(self.position_embedding)
        if num_tokens > num_positions:
            raise UserError(
                f"a sequence of {num_tokens} frames and texts; the head's table has {num_positions} rows: "
                "lower data.num_frames"
            )
        return tokens_BSC + self.position_embedding[:num_tokens]

    def run(self, tokens_BSC: Tensor, mask_BS: Tensor) -> Tensor:
        bias_B11S = ((1 - mask_BS.to(tokens_BSC.dtype)) * MASKED_SCORE)[:, None, None, :]
        for block in self.blocks:
            tokens_BSC = block(tokens_BSC, lambda qkv: biased_attention(qkv, bias_B11S))
        return tokens_BSC


class TransformerHead(_MaskedTransformer):
    """seqTransf: frames plus the output of a transformer over frames with positions."""

    def forward(self, frames_BFC: Tensor, mask_BF: Tensor) -> Tensor:
        return frames_BFC + self.run(self.positioned(frames_BFC), mask_BF)


def pair_keys(seed: int, texts_P: Tensor, videos_P: Tensor) -> Tensor:
    """Hash a seed and the places of a pair's text and video in the whole batch, [P] int64, for its dropout."""
    return _mixed(_mixed(texts_P + seed) + videos_P)


class PairDropout(nn.Module):
    """Dropout that is a function of a pair's key, so that it is the same whichever process or chunk scores the pair."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, tokens_PSC: Tensor, key_P: Tensor | None) -> Tensor:
        if not self.training or self.p == 0 or key_P is None:
            return tokens_PSC
        places_SC = torch.arange(tokens_PSC[0].numel(), device=tokens_PSC.device).view(tokens_PSC.shape[1:])
        bits_PSC = _mixed(key_P[:, None, None] + places_SC * _GOLDEN)
        is_kept_PSC = _shifted(bits_PSC, 40) >= int(self.p * 2**24)
        return torch.where(is_kept_PSC, tokens_PSC / (1 - self.p), 0)


def _mixed(values: Tensor) -> Tensor:
    """Hash int64 values (splitmix64's finaliser; torch's int64 wraps around)."""
    values = (values ^ _shifted(values, 30)) * _MIX1
    values = (values ^ _shifted(values, 27)) * _MIX2
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned numbers."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


class PairHead(_MaskedTransformer):
    """tightTransf: a transformer over [text, frames] of a pair; its output at the text gives the score."""

    def __init__(self, config: TowerConfig, num_positions: int):
        super().__init__(config, num_positions)
        self.dropout = PairDropout(DROPOUT)
        self.pool_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.pool_dense = nn.Linear(config.width, config.width)
        self.score = nn.Linear(config.width, 1)

    def forward(self, text_PC: Tensor, frames_PFC: Tensor, mask_PF: Tensor, key_P: Tensor | None = None) -> Tensor:
        """Score pairs, [P], without temperature; without keys there is no dropout."""
        tokens_PSC = torch.cat([text_PC.unsqueeze(1), frames_PFC], dim=1)
        mask_PS = F.pad(mask_PF, (1, 0), value=1)
        tokens_PSC = self.run(self.dropout(self.positioned(tokens_PSC), key_P), mask_PS)
        hidden_PC = self.pool_dense(self.pool_norm(tokens_PSC[:, 0]))
        return self.score(hidden_PC * torch.sigmoid(1.702 * hidden_PC)).squeeze(1)


def build_head(kind: str, config: TowerConfig, num_positions: int) -> nn.Module:
    """Build a head; `config` and `num_positions` size its blocks and its position table."""
    if kind == "meanP":
        return MeanHead()
    if kind == "seqLSTM":
        return LstmHead(config.width, num_positions)
    return (TransformerHead if kind == "seqTransf" else PairHead)(config, num_positions)
