"""The batch that the loader hands to the model: one process's share of one step.

B slots of this process, T frames, S pixels a side, L tokens, N texts of neighbours. Pixels stay uint8 until they are
normalised on the device.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Batch:
    """The slots of `training.data.epoch_plan.rank_slots` of one step, in slot order.

    An empty slot, or one whose clip could not be read, has `video_mask` false and zeros everywhere. For a clip without
    subtitle or caption only the mask of that text is false; its ids are a lone end token, which is not read.
    """

    rows_B: Tensor  # int64: the clip's row in the selection, -1 for an empty slot
    video_BT3SS: Tensor  # uint8
    frame_B13SS: Tensor  # uint8: the still frame F
    subtitle_BL: Tensor  # int64 ids, padded after the end token
    caption_BL: Tensor
    video_mask_B: Tensor  # bool: the clip could be read, and so its still frame
    subtitle_mask_B: Tensor
    caption_mask_B: Tensor
    # bool: false for frames of zeros that pad a short clip (data.frames_per_s); None: all are real
    frame_mask_BT: Tensor | None = None
    # Subtitles of the clips before and after, nearest first (data.neighbours); None: N = 0
    neighbour_BNL: Tensor | None = None
    neighbour_mask_BN: Tensor | None = None

    def __post_init__(self) -> None:
        if self.frame_mask_BT is None:
            self.frame_mask_BT = self.video_mask_B.new_ones(self.video_BT3SS.shape[:2])
        if self.neighbour_BNL is None:
            self.neighbour_BNL = self.rows_B.new_zeros(len(self), 0, 1)
            self.neighbour_mask_BN = self.video_mask_B.new_zeros(len(self), 0)

    def __len__(self) -> int:
        return len(self.rows_B)

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def split(self, size: int) -> list["Batch"]:
        """Split into chunks of at most `size` slots, as views."""
        columns = [getattr(self, f.name).split(size) for f in fields(self)]
        return [Batch(*parts) for parts in zip(*columns, strict=True)]
