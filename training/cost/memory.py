"""What a training step keeps for its backward pass, in bytes: counted on any device, or from shapes alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, step: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of `step` for the backward pass, each storage once, without the model's own weights.

    Under `FakeTensorMode` shapes alone are enough: a model of any size costs no memory and no time.
    """
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
