"""Gather the rows of all processes into one tensor with a gradient, to score rows against the whole batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_rows(local_ND: Tensor, group: dist.ProcessGroup, counts: list[int]) -> Tensor:
    """Gather all ranks' rows in rank order, [sum(counts), D]; a row's gradient is the sum over all ranks."""
    return _GatherRows.apply(local_ND, group, counts)


def gather_counts(numbers: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """Gather each of `numbers` from every rank of the group, in rank order: [numbers][ranks]."""
    table = torch.zeros(len(numbers), dist.get_world_size(group), dtype=torch.int64, device=device)
    table[:, dist.get_rank(group)] = torch.tensor(numbers, device=device)
    dist.all_reduce(table, group=group)
    return table.tolist()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_ND: Tensor, group: dist.ProcessGroup, counts: list[int]) -> Tensor:
        ctx.group, ctx.counts = group, counts
        padded = local_ND.new_zeros(max(counts), *local_ND.shape[1:])
        padded[: len(local_ND)] = local_ND
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        # all-reduce and slice, because gloo has no uneven reduce-scatter and features are small
        total_ND = grad_ND.contiguous().clone()
        dist.all_reduce(total_ND, group=ctx.group)
        return total_ND.split(ctx.counts)[dist.get_rank(ctx.group)], None, None
