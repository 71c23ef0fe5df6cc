"""MIL-NCE: a clip has several right texts, its own and its neighbours' in time (docs/methods/clip4clip.md section 4).

The loss of a clip is -log of the share of its own block of texts among all its comparisons: all texts of the batch with
its video, and its own text (the middle one of the published block) with the other videos. Logits are exp(log_scale)
times cosines. With one video per block of texts this equals the published form on a matrix of pairs
(tests/training/test_mil_nce_across_processes.py).

Missing rows: an absent text is neither a positive nor a negative. A clip that could not be read has no text either. A
clip without its own text has no loss of its own, but its video and its neighbours' texts are negatives of other clips.

Legend: B clips of this process, K of all processes, n = 1 + N texts of a clip, its own first, D the features' size.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from training.losses import Loss, LossInputs, LossValue
from training.losses.terms import gather_equal, own_rows, sum_of_means


def mil_nce_loss(
    video_BD: Tensor,
    subtitle_BD: Tensor,
    neighbour_BND: Tensor | None,
    log_scale: Tensor,
    video_mask_B: Tensor,
    subtitle_mask_B: Tensor,
    neighbour_mask_BN: Tensor,
    group: dist.ProcessGroup | None = None,
) -> LossValue:
    """Compute MIL-NCE of unit vectors. Masks are true where a row exists; neighbour_BND None: no clip has neighbours.

    group  as in `training.losses.omnisource.omnisource_loss`; every process has equally many clips
    """
    text_BnD = subtitle_BD[:, None] if neighbour_BND is None else torch.cat([subtitle_BD[:, None], neighbour_BND], 1)
    text_mask_Bn = torch.cat([subtitle_mask_B[:, None], neighbour_mask_BN], dim=1) & video_mask_B[:, None]
    with torch.autocast(log_scale.device.type, enabled=False):
        # a masked row may hold anything, NaN included: zeros keep it out of every value and gradient
        vectors_BmD = torch.cat([video_BD[:, None], text_BnD], dim=1)
        mask_Bm = torch.cat([video_mask_B[:, None], text_mask_Bn], dim=1)
        vectors_BmD = torch.where(mask_Bm[..., None], vectors_BmD, 0)
        packed_K = gather_equal(torch.cat([vectors_BmD.flatten(1), mask_Bm], dim=1), group)
        vectors_KmD = packed_K[:, : -mask_Bm.shape[1]].unflatten(1, vectors_BmD.shape[1:])
        mask_Km = packed_K[:, -mask_Bm.shape[1] :].detach() > 0
        losses_B = _losses(vectors_BmD, vectors_KmD, mask_Km, own_rows(mask_Bm, group), log_scale.exp())
        counted_B, num_rows = mask_Bm[:, :2].all(dim=1), mask_Km[:, :2].all(dim=1).sum().clamp(min=1)
        mean = torch.where(counted_B, losses_B, 0).sum() / num_rows
        return sum_of_means({"": log_scale.sum() * 0, "video_and_texts": mean}, group)


def _losses(vectors_BmD: Tensor, vectors_KmD: Tensor, mask_Km: Tensor, own_B: Tensor, scale: Tensor) -> Tensor:
    """Return -log of each row's share, [B]; finite also for rows that do not count."""
    to_texts_BKn = scale * torch.einsum("bd,knd->bkn", vectors_BmD[:, 0], vectors_KmD[:, 1:])
    to_videos_BK = scale * vectors_BmD[:, 1] @ vectors_KmD[:, 0].T
    rows = torch.arange(len(own_B), device=own_B.device)
    blocked_BKn = (~mask_Km[:, 1:]).repeat(len(own_B), 1, 1)
    blocked_BKn[rows, own_B, 0] = False
    to_texts_BKn = to_texts_BKn.masked_fill(blocked_BKn, -torch.inf)
    blocked_BK = (~mask_Km[:, 0]).repeat(len(own_B), 1)
    blocked_BK[rows, own_B] = True  # the own pair is already counted in to_texts
    to_videos_BK = to_videos_BK.masked_fill(blocked_BK, -torch.inf)
    all_logits = torch.cat([to_texts_BKn.flatten(1), to_videos_BK], dim=1)
    return all_logits.logsumexp(dim=1) - to_texts_BKn[rows, own_B].logsumexp(dim=1)


def _of_inputs(inputs: LossInputs) -> LossValue:
    masks = inputs.video_mask, inputs.subtitle_mask, inputs.neighbour_mask
    return mil_nce_loss(inputs.video, inputs.subtitle, inputs.neighbours, inputs.log_scale, *masks, group=inputs.group)


MIL_NCE = Loss(_of_inputs, frozenset({"video", "subtitle"}), num_similarities=2, takes_neighbours=True)
