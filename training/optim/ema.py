"""Keep an exponential moving average of a model's trained weights (EMA), for evaluation.

Frozen weights and buffers have no average: a checkpoint's averaged weights hold the model's own instead. The average of
a sharded parameter (FSDP2) is sharded alike, so an update changes this process's part without exchange.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.parallel.state_dict import State, bare_name, deal, gather


class Ema:
    """Averages of the parameters that require gradients, which start as the weights of a loaded and wrapped model.

    decay  share of the average that an update keeps. A mean of clamped values of `logit_scale` needs no clamp
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        named = {bare_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: parameter.detach().clone() for name, parameter in named.items()}
        self._local_averages = [_local(average) for average in self._averages.values()]
        self._parameters = list(named.values())

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages, after every update of the weights."""
        parameters = [_local(parameter.detach()) for parameter in self._parameters]
        torch._foreach_lerp_(self._local_averages, parameters, 1 - self.decay)

    def full_state(self) -> State:
        """Gather whole averages on the first process's CPU, by bare name: see `training.parallel.state_dict`.

        They are part of a model's state; the rest of it is the model's own.
        """
        return gather(self._averages)

    def restore(self, tensors: State) -> None:
        """Copy the averages from the averaged model's state, which every process has read."""
        assert tensors.keys() >= self._averages.keys(), "another model's averages"
        for name, average in self._averages.items():
            deal(tensors[name], average)


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
