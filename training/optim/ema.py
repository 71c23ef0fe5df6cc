"""An exponential moving average of a model's weights, for evaluation: smoother than the weights of the last update.

The average of a sharded parameter (FSDP2) is sharded alike: an update touches this process's part and sends nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from training.parallel.state_dict import State, bare_name, deal, gather


class Ema:
    """Starts as the weights are when it is made: call it when the model is loaded and wrapped.

    decay  what an update keeps of the average. `logit_scale` needs no clamp: a mean of clamped values is in the range
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        named = {bare_name(name): parameter for name, parameter in model.named_parameters()}
        self._averages = {name: parameter.detach().clone() for name, parameter in named.items()}
        self._local_averages = [_local(average) for average in self._averages.values()]
        self._parameters = list(named.values())

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages, after every update of the weights."""
        torch._foreach_lerp_(self._local_averages, self._local_parameters(), 1 - self.decay)

    @contextmanager
    def apply(self, module: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights inside the context, and its own again afterwards.

        module  the outermost that holds the model: FSDP keeps gathered weights there, which must not outlive a change
        """
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        for average, parameter in zip(self._local_averages, self._local_parameters(), strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def full_state(self) -> State:
        """Gather whole averages on the CPU by bare name, on the first process: see `training.parallel.state_dict`."""
        return gather(self._averages)

    def restore(self, tensors: State) -> None:
        """Continue from a saved average, which every process has read."""
        assert tensors.keys() == self._averages.keys(), "another model's averages"
        for name, average in self._averages.items():
            deal(tensors[name], average)

    def _local_parameters(self) -> list[Tensor]:
        return [_local(parameter.detach()) for parameter in self._parameters]


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
