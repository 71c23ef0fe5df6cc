"""Augment clips on the device (`train.augment`); the published methods do not.

The change is a function of (seed, step, row), so it does not depend on processes or chunks. All frames of a clip and
its still are changed alike. Pixels stay uint8; shape letters are those of `training.data.batch`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from training.data.batch import Batch
from training.data.stateless_random import key_of

Augmentation = Literal["flip", "brightness", "contrast"]

RANGE = 0.2  # largest change of brightness, as a share of white, and of contrast, as a factor
_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # splitmix64's, as signed


def augment(batch: Batch, kinds: Sequence[Augmentation], *, seed: int, step: int) -> Batch:
    """Change the pixels of a batch. "flip" mirrors half of the clips, which is wrong for texts with left or right."""
    video, frame = batch.video_BT3SS, batch.frame_B13SS
    for kind in kinds:
        draw_B = uniform(batch.rows_B, key_of(seed, step, kind))
        video, frame = (_apply(kind, pixels, draw_B) for pixels in (video, frame))
    return replace(batch, video_BT3SS=video, frame_B13SS=frame)


def uniform(rows_B: Tensor, key: int) -> Tensor:
    """Hash each row under a 64-bit key to float32 [B] in [0, 1), on the rows' device."""
    z = (rows_B + 1) * _GOLDEN + (key - (1 << 64) if key >= 1 << 63 else key)
    z = (z ^ _shifted(z, 30)) * _MIX1
    z = (z ^ _shifted(z, 27)) * _MIX2
    z = z ^ _shifted(z, 31)
    return _shifted(z, 40).float() / (1 << 24)


def _shifted(z: Tensor, num_bits: int) -> Tensor:
    """Shift to the right as unsigned numbers."""
    return (z >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _apply(kind: Augmentation, pixels: Tensor, draw_B: Tensor) -> Tensor:
    draw = draw_B[:, None, None, None, None]
    if kind == "flip":
        return torch.where(draw < 0.5, pixels.flip(-1), pixels)
    amount = (2 * draw - 1) * RANGE
    values = pixels.float()
    if kind == "brightness":
        values = values + 255 * amount
    else:
        mean = values.mean(dim=(1, 2, 3, 4), keepdim=True)
        values = mean + (values - mean) * (1 + amount)
    return values.round().clamp(0, 255).to(torch.uint8)
