"""Join the processes of a run, and exchange values other than gradients.

A run is one process, or as many as `torchrun` or Ray Train starts; other modules do not depend on the launcher.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clipmill.base.errors import UserError

Result = TypeVar("Result")

# While one rank plans a large epoch, evaluates or saves, the others wait for minutes.
TIMEOUT = timedelta(minutes=30)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass(frozen=True)
class Process:
    """One of `world_size` training processes. `group` is None if there is only one."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None  # a gloo group: short messages that must not wait for the accelerator

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first(self, function: Callable[[], Result]) -> Result:
        """Call `function` on the first process; return its result, or raise its error, on all of them."""
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:
                if self.group is None:
                    raise
                outcome[1] = error
        if self.group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def sum(self, *numbers: int) -> list[int]:
        """Sum each number over all processes, modulo 2^64 as a signed integer."""
        if self.group is None:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(totals, group=self.control)
        return totals.tolist()


@contextmanager
def join(device: str = "auto") -> Iterator[Process]:
    """Join the other processes: an existing group (Ray Train), torchrun's environment, or one process alone.

    device  "auto", "cpu" or "cuda". Raises UserError if this machine lacks it.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _device(device, local_rank)
    started = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if started:
        # SIGTERM when the thread that started this process (torchrun's main) ends: a run that can no longer be stopped
        # by torchrun saves and ends. Only Linux offers this.
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            yield Process(chosen)
        else:
            group = dist.group.WORLD
            control = group if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=TIMEOUT)
            local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
            yield Process(chosen, dist.get_rank(), dist.get_world_size(), local_world_size, group, control)
    finally:
        if started:
            dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("train.device = 'cuda': this machine has no usable GPU; allowed here: auto, cpu.")
    if name == "cpu" or not available:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())
