"""In-batch matching for models that score pairs: cross entropy of each own pair among all texts and videos.

The two terms are those of the loss "vs" (`training.losses.omnisource`), on scores instead of cosines; half their sum is
the published symmetric loss (docs/methods/clip4clip.md section 4). The released code compares the rows of one process;
here all rows of the batch are compared, as in the other losses. A process scores its own texts with all videos and the
scores are gathered, so that each of the K x K pairs is scored once. Missing rows are neither queries nor negatives.

Legend: B clips of this process, K of all processes, F frames, C the features' size.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from training.losses import LossInputs, LossValue
from training.losses.terms import gather_equal, own_rows, sum_of_means

Score = Callable[[Tensor, Tensor], Tensor]  # texts [B, C] and frames [K, F, C] to [B, K]


def matching_loss(
    score: Score,
    text_BC: Tensor,
    frames_BFC: Tensor,
    text_mask_B: Tensor,
    video_mask_B: Tensor,
    group: dist.ProcessGroup | None = None,
) -> LossValue:
    """Sum the mean cross entropies of both directions; masks are true where a row exists.

    group  as in `training.losses.omnisource.omnisource_loss`; every process has equally many clips
    """
    text_mask_B = text_mask_B & video_mask_B
    text_BC = torch.where(text_mask_B[:, None], text_BC, 0)
    frames_BFC = torch.where(video_mask_B[:, None, None], frames_BFC, 0)
    scores_BK = score(text_BC, gather_equal(frames_BFC, group))
    scores_BK = scores_BK.to(torch.promote_types(scores_BK.dtype, torch.float32))
    scores_KK = gather_equal(scores_BK, group)
    masks_K2 = gather_equal(torch.stack([text_mask_B, video_mask_B], dim=1).float(), group) > 0
    own_B = own_rows(text_BC, group)
    num_pairs = masks_K2[:, 0].sum().clamp(min=1)
    to_video_B = _cross_entropy(scores_BK, masks_K2[:, 1], own_B)
    to_text_B = _cross_entropy(scores_KK[:, own_B].T, masks_K2[:, 0], own_B)
    means = {
        name: torch.where(text_mask_B, losses_B, 0).sum() / num_pairs
        for name, losses_B in (("subtitle_to_video", to_video_B), ("video_to_subtitle", to_text_B))
    }
    return sum_of_means(means, group)


def _cross_entropy(scores_BK: Tensor, mask_K: Tensor, own_B: Tensor) -> Tensor:
    """Return the cross entropy [B] of the own column among existing ones; finite also for rows that do not count."""
    rows = torch.arange(len(own_B), device=own_B.device)
    blocked_BK = (~mask_K).repeat(len(own_B), 1)
    blocked_BK[rows, own_B] = False
    return scores_BK.masked_fill(blocked_BK, -torch.inf).logsumexp(dim=1) - scores_BK[rows, own_B]


def matching_on_pairs(inputs: LossInputs) -> LossValue:
    """Compute `matching_loss` of a process's inputs: `Loss.on_pairs` of "vs"."""
    masks = inputs.subtitle_mask, inputs.video_mask
    return matching_loss(inputs.score, inputs.subtitle, inputs.video, *masks, group=inputs.group)
