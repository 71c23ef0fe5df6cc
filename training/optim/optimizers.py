"""Group parameters by weight decay and learning rate, and update them with AdamW or a published rule.

Parameters are named as in `ClipVip.named_parameters()`; prefixes of wrappers (`module.`, `_orig_mod.`) are ignored.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from clipmill.base.errors import UserError
from training.settings import Update

BETAS = (0.9, 0.98)
EPS = 1e-6


def decays(name: str, published: bool = False) -> bool:
    """Return True if weight decay applies to a parameter: a matrix that is not an embedding.

    Norms, biases, `logit_scale`, class and added tokens, and position, temporal and token tables do not decay.

    published  the grouping of the released code, which exempts only names with `bias` or `logit_scale`: it looks for
               norms by a name that CLIP does not use
    """
    if "bias" in name.rsplit(".", 1)[-1] or name.endswith("logit_scale"):
        return False
    return published or not ("norm" in name or ("embedding" in name and "patch_embedding" not in name))


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    published_decay: bool = False,
    rate_factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Group parameters for an optimiser, at most two groups per rate factor, which `set_learning_rate` applies.

    rate_factors  by prefix of the parameter's name, e.g. {"logit_scale": 10.0}; the longest matching prefix counts
    Raises UserError for a prefix without parameters.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    named = {name.replace("_orig_mod.", "").removeprefix("module."): p for name, p in named_parameters}
    for prefix in rate_factors or {}:
        if not any(name.startswith(prefix) for name in named):
            raise UserError(f"train.lr_factors: no parameter's name begins with {prefix!r}; some are {list(named)[:5]}")
    for bare, parameter in named.items():
        if not parameter.requires_grad:
            continue
        fitting = [prefix for prefix in rate_factors or {} if bare.startswith(prefix)]
        factor = rate_factors[max(fitting, key=len)] if fitting else 1.0
        decayed = decays(bare, published_decay)
        group = {"params": [], "names": [], "rate_factor": factor, "weight_decay": weight_decay if decayed else 0.0}
        group = groups.setdefault((factor, decayed), group)
        group["params"].append(parameter)
        group["names"].append(bare)
    return list(groups.values())


def build_optimiser(groups: list[dict[str, Any]], update: Update = "adamw", parameter_clip: float = 1.0) -> Optimizer:
    """Build torch's fused AdamW, or a published update; `set_learning_rate` sets rates before every step.

    parameter_clip  of `BertAdam`
    """
    if update == "adamw":
        return AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, fused=True)
    optimiser = (PublishedAdamW if update == "clip_vip" else BertAdam)(groups, lr=0.0, betas=BETAS, eps=EPS)
    if isinstance(optimiser, BertAdam):
        optimiser.max_norm = parameter_clip
    return optimiser


def set_learning_rate(optimiser: Optimizer, rate: float) -> None:
    """Set each group's rate to `rate` times its factor; a tensor (of a compiled step) is filled in place."""
    for group in optimiser.param_groups:
        value = rate * group["rate_factor"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


class _Published(Optimizer):
    """Adam's two averages per parameter; subclasses compute the update."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    @abstractmethod
    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Count the parameter's step and change it."""

    def _averages(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Update the moving averages of the gradient and of its square, and return them."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        return mean, state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)


class PublishedAdamW(_Published):
    """CLIP-ViP's released AdamW: eps is added before the bias correction, decay takes lr·wd of the updated weight."""

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        mean, square = self._averages(parameter, gradient, group)
        step, (beta1, beta2) = self.state[parameter]["step"], group["betas"]
        corrected_rate = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-corrected_rate)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


class BertAdam(_Published):
    """CLIP4Clip's Adam (docs/methods/clip4clip.md section 6).

    It has no bias correction, clips each parameter's gradient alone, and adds the decay to the update.
    """

    max_norm = 1.0  # of one parameter's gradient

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        clipped = gradient * (self.max_norm / (gradient.norm() + 1e-6)).clamp(max=1)
        mean, square = self._averages(parameter, clipped, group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-group["lr"])
