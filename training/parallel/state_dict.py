"""A run's tensors as one process would have them: gathered from sharded or wrapped models, and dealt back to them.

States are dicts by the parameters' bare names in `ClipVip`, whatever surrounds the model, of whole tensors on the CPU.
So what W processes wrote any other number of processes reads. Every process of a group calls these functions together.

torch.distributed.checkpoint.state_dict is not used: its setter puts the saved groups (weight decay, rate factors) back,
which a resumed run may have changed, refuses parameters that have no state yet, and has nothing for averaged weights.
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
    """Remove from a parameter's name what `torch.compile`, DDP and the like put before it."""
    for prefix in _WRAPPERS:
        name = name.replace(prefix, "")
    return name


def full_state(model: nn.Module, optimiser: Optimizer | None = None) -> tuple[State, OptimiserState]:
    """Gather model and optimiser on the first process; return empty dicts on the others, which lend their shards."""
    tensors = gather({bare_name(name): tensor for name, tensor in model.state_dict().items()})
    if optimiser is None:
        return tensors, {}
    names = _names_of_parameters(model)
    state = {}
    for parameter, values in optimiser.state.items():
        flat = gather(values)
        if flat:
            state[names[parameter]] = flat
    return tensors, state


def gather(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy whole tensors to the CPU of the first process; return an empty dict on the others. Other values stay."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    gathered = {}
    for name, value in values.items():
        if isinstance(value, DTensor):
            value = value.detach().full_tensor()
        if is_first:
            gathered[name] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
    return gathered


def restore(model: nn.Module, optimiser: Optimizer | None, tensors: State, state: OptimiserState) -> None:
    """Put a full state, which every process has read, into a model and an optimiser, in place.

    Groups and their settings stay the optimiser's own. The names must be those of the model.
    """
    current = {bare_name(name): tensor for name, tensor in model.state_dict().items()}
    assert current.keys() == tensors.keys(), f"another model's state: {sorted(current.keys() ^ tensors.keys())[:6]}"
    for name, tensor in current.items():
        deal(tensors[name], tensor)
    if optimiser is not None:
        restore_optimiser(model, optimiser, state)


@torch.no_grad()
def deal(full: Tensor, target: Tensor) -> None:
    """Copy a whole tensor into one of its shape, or into this process's shard of it."""
    assert full.shape == target.shape, f"{list(full.shape)} is no state for {list(target.shape)}"
    local = target.to_local() if isinstance(target, DTensor) else target
    local.copy_(_like(full, target).to_local() if isinstance(target, DTensor) else full)


def _like(full: Tensor, parameter: Tensor) -> Tensor:
    """Move a tensor to the parameter's device, sharded as it is; nothing is sent, since every process has all."""
    full = full.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return full.clone()
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def restore_optimiser(model: nn.Module, optimiser: Optimizer, state: OptimiserState) -> None:
    """Do the optimiser's part of `restore`, for a model that has its weights already."""
    names = _names_of_parameters(model)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    unknown = state.keys() - {names[parameter] for parameter in parameters}
    assert not unknown, f"optimiser state of parameters that are not trained: {sorted(unknown)[:6]}"
    packed = optimiser.state_dict()
    packed["state"] = {
        number: {key: _dealt_value(value, parameter) for key, value in state[names[parameter]].items()}
        for number, parameter in enumerate(parameters)
        if names[parameter] in state
    }
    optimiser.load_state_dict(packed)


def _dealt_value(value: Any, parameter: Tensor) -> Any:
    """Shard moments as their parameter is; a count is the same everywhere."""
    if isinstance(value, Tensor):
        return _like(value, parameter) if value.shape == parameter.shape and value.ndim else value.clone()
    return value


def _names_of_parameters(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: bare_name(name) for name, parameter in model.named_parameters()}


# -- random numbers ----------------------------------------------------------------------------------------------------


def random_state() -> State:
    """Save torch's generators of this process: nothing else draws, since order and frames depend on the seed alone."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: State) -> None:
    """Restore torch's generators; one that this machine or the state lacks is left alone."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
