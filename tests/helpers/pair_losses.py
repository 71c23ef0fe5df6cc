"""The published losses of CLIP4Clip, on a matrix of similarities between texts (rows) and videos (columns).

A row or column is one pair of a text with its video; the diagonal holds the pairs' own similarities. With `num_pairs`
= k a video has k texts: rows and columns come in blocks of k, and everything within a block belongs together.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from clipmill.base.errors import UserError


def cross_entropy(similarity: Tensor) -> Tensor:
    """Average over rows the cross entropy with the diagonal as target."""
    _num_blocks(similarity, 1)
    return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device))


def symmetric_cross_entropy(similarity: Tensor) -> Tensor:
    """Return half the sum of both directions: on the same vectors the loss "vs" is twice this."""
    return (cross_entropy(similarity) + cross_entropy(similarity.T)) / 2


def mil_nce(similarity: Tensor, num_pairs: int = 1) -> Tensor:
    """Average -log of the own block's share, for the middle pair of each block (docs/methods/clip4clip.md section 4).

    The share is among all texts of the pair's video and the other blocks' videos of the pair's text.
    """
    blocks = torch.arange(_num_blocks(similarity, num_pairs), device=similarity.device).repeat_interleave(num_pairs)
    middle = slice(num_pairs // 2, None, num_pairs)
    own = blocks[middle, None] == blocks
    to_texts, to_videos = similarity.T[middle], similarity[middle]
    rivals = torch.cat([to_texts, to_videos.masked_fill(own, -torch.inf)], dim=1)
    positives = to_texts.masked_fill(~own, -torch.inf)
    return (rivals.logsumexp(dim=1) - positives.logsumexp(dim=1)).mean()


def max_margin(
    similarity: Tensor,
    num_pairs: int = 1,
    *,
    margin: float = 0.1,
    hard_negative_rate: float = 0.5,
    negative_weighting: bool = True,
) -> Tensor:
    """Average over all entries how far each is within `margin` of its row's and of its column's diagonal entry.

    negative_weighting  where videos have several texts, weigh entries within a block against those outside so that the
                        latter make up 1 - hard_negative_rate of the total weight; else every entry counts 1
    """
    num_blocks = _num_blocks(similarity, num_pairs)
    own = similarity.diagonal()
    violation = F.relu(margin + similarity - own[:, None]) + F.relu(margin + similarity - own[None, :])
    if negative_weighting and num_pairs > 1 and num_blocks > 1:
        blocks = torch.arange(num_blocks, device=similarity.device).repeat_interleave(num_pairs)
        outside = (1 - hard_negative_rate) / ((num_blocks - 1) * hard_negative_rate)
        weights = torch.where(blocks[:, None] == blocks, 1.0, outside) * (num_blocks * hard_negative_rate)
        violation = violation * weights.to(violation.dtype)
    return violation.mean()


def _num_blocks(similarity: Tensor, num_pairs: int) -> int:
    rows, columns = similarity.shape
    if num_pairs < 1 or rows != columns or rows % num_pairs:
        raise UserError(f"similarity is {rows} x {columns}; allowed: square, of blocks of num_pairs = {num_pairs}")
    return rows // num_pairs
