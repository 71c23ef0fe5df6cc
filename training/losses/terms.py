"""Sum the terms of a loss over all processes that share a batch."""

import torch
import torch.distributed as dist
from torch import Tensor

from training.losses import LossValue
from training.parallel.all_gather import gather_rows


def sum_of_means(means: dict[str, Tensor], group: dist.ProcessGroup | None) -> LossValue:
    """Sum the terms of a loss; return the value of the whole batch on every process.

    means  this process's part of each mean by name, 0-d; the part named "" is added but not listed among the terms

    Gradients are this process's part times the number of processes: DDP and FSDP average over the group, and that
    average is exactly the gradient of one process on the whole batch.
    """
    shares = torch.stack(list(means.values()))
    total, whole = shares.sum(), shares.detach().clone()
    if group is not None:
        dist.all_reduce(whole, group=group)
        share = total * dist.get_world_size(group)
        total = share + (whole.sum() - share).detach()  # value of the whole batch, gradient of this process's part
    return LossValue(total, {name: mean for name, mean in zip(means, whole, strict=True) if name})


def gather_equal(rows_B: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather [K, ...] rows of all processes, each with equally many; see `gather_rows` for the gradient."""
    return rows_B if group is None else gather_rows(rows_B, group, [len(rows_B)] * dist.get_world_size(group))


def own_rows(rows_B: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the indices [B] of this process's rows in the result of `gather_equal`."""
    start = 0 if group is None else len(rows_B) * dist.get_rank(group)
    return start + torch.arange(len(rows_B), device=rows_B.device)
