"""Put a loss together from its terms, over all processes that share a batch."""

import torch
import torch.distributed as dist
from torch import Tensor

from training.losses import LossValue
from training.parallel.all_gather import gather_rows


def sum_of_means(means: dict[str, Tensor], group: dist.ProcessGroup | None, mean_gradients: bool = True) -> LossValue:
    """Sum the terms of a loss, of which each process has its part, into the whole batch's value on every process.

    means           by name: this process's part of each mean, 0-d; "" is a part that is no term
    mean_gradients  True for wrappers that average gradients over the group (DDP, FSDP): their average is then exactly
                    one process's gradient. False where gradients are summed
    """
    shares = torch.stack(list(means.values()))
    share, whole = shares.sum(), shares.detach().clone()
    total = share
    if group is not None:
        dist.all_reduce(whole, group=group)
        share = share * dist.get_world_size(group) if mean_gradients else share
        # the value is the batch's, the gradient this process's part of it
        total = share + (whole.sum() - share).detach()
    return LossValue(total, {name: mean for name, mean in zip(means, whole, strict=True) if name})


def gather_equal(rows_B: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather [K, ...] rows of all processes, each with equally many; see `gather_rows` for the gradient."""
    return rows_B if group is None else gather_rows(rows_B, group, [len(rows_B)] * dist.get_world_size(group))


def own_rows(rows_B: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Number this process's rows [B] among those that `gather_equal` returns."""
    start = 0 if group is None else len(rows_B) * dist.get_rank(group)
    return start + torch.arange(len(rows_B), device=rows_B.device)
