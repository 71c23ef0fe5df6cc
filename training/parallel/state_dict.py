"""Gather a run's tensors from sharded or wrapped models to one process, and distribute them again.

States are dicts of whole tensors on the CPU, by the parameters' bare names in `ClipVip` without wrappers, so any number
of processes reads the state that any other number wrote. All processes of a group call these functions together.

torch.distributed.checkpoint.state_dict is not used: its setter restores the saved groups (weight decay, rate factors),
which a resumed run may have changed, refuses parameters without state, and does not handle averaged weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

State = dict[str, Tensor]
OptimiserState = dict[str, dict[str, Any]]  # by parameter: "step", "exp_avg", …

_WRAPPERS = ("_orig_mod.", "module.", "_checkpoint_wrapped_module.")


def bare_name(name: str) -> str:
    """Remove the prefixes of `torch.compile`, DDP and the like from a parameter's name."""
    for prefix in _WRAPPERS:
        name = name.replace(prefix, "")
    return name


def full_state(model: nn.Module, optimiser: Optimizer | None = None) -> tuple[State, OptimiserState]:
    """Gather model and optimiser on the first process; return empty dicts on the others."""
    tensors = gather({bare_name(name): tensor for name, tensor in model.state_dict().items()})
    if optimiser is None:
        return tensors, {}
    names = _names_of_parameters(model)
    state = {names[parameter]: gather(values) for parameter, values in optimiser.state.items()}
    return tensors, {name: values for name, values in state.items() if values}


def gather(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy whole tensors, and other values as they are, to the first process's CPU; return {} on the others."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    gathered = {}
    for name, value in values.items():
        if isinstance(value, DTensor):
            value = value.detach().full_tensor()
        if is_first:
            gathered[name] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
    return gathered


@torch.no_grad()
def deal(full: Tensor, target: Tensor) -> None:
    """Copy a whole tensor into one of its shape, or into this process's shard of it."""
    assert full.shape == target.shape, f"a tensor {list(full.shape)} does not fit {list(target.shape)}"
    local = target.to_local() if isinstance(target, DTensor) else target
    local.copy_(_like(full, target).to_local() if isinstance(target, DTensor) else full)


def _like(full: Tensor, parameter: Tensor) -> Tensor:
    """Move a tensor to the parameter's device and shard it alike, without exchange, because every process has it."""
    full = full.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return full.clone()
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def restore_optimiser(model: nn.Module, optimiser: Optimizer, state: OptimiserState) -> None:
    """Restore an optimiser's state, which every process has read, for a model that already has its weights.

    Groups and their settings stay the optimiser's own.
    """
    names = _names_of_parameters(model)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    unknown = state.keys() - {names[parameter] for parameter in parameters}
    assert not unknown, f"optimiser state of parameters that are not trained: {sorted(unknown)[:6]}"
    packed = optimiser.state_dict()
    packed["state"] = {}
    for number, parameter in enumerate(parameters):
        if names[parameter] in state:
            values = packed["state"][number] = dict(state[names[parameter]])
            for key, value in values.items():
                if isinstance(value, Tensor):  # moments are sharded like their parameter, counts are copied
                    is_moment = value.ndim and value.shape == parameter.shape
                    values[key] = _like(value, parameter) if is_moment else value.clone()
    optimiser.load_state_dict(packed)


def _names_of_parameters(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: bare_name(name) for name, parameter in model.named_parameters()}


# -- random numbers ----------------------------------------------------------------------------------------------------


def random_state() -> State:
    """Return the state of torch's generators; other random choices (order, frames) are functions of the seed."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: State) -> None:
    """Restore torch's generators; skip one that this machine or the state lacks."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
