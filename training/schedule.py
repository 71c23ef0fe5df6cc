"""Learning rate by step: warm-up, then one of four decays (spec section 7). Pure arithmetic."""

import math
from typing import Literal, get_args

from pipeline.errors import UserError

Decay = Literal["cosine", "linear", "invsqrt", "constant"]
LOWEST_RATE = 1e-8  # an absolute rate, not a factor: what a step gets whose formula gives nothing


def learning_rate(
    step: int, base_rate: float, *, total_steps: int, warmup_ratio: float = 0.01, decay: Decay = "cosine"
) -> float:
    """The rate of update number `step`, counted from 1: the last of `total_steps` gets `LOWEST_RATE` under cosine."""
    rate = base_rate * rate_factor(step, total_steps=total_steps, warmup_ratio=warmup_ratio, decay=decay)
    return rate if rate > 0 else LOWEST_RATE


def rate_factor(step: int, *, total_steps: int, warmup_ratio: float = 0.01, decay: Decay = "cosine") -> float:
    """What the base rate is multiplied with: step/warm-up steps, then the decay. "constant" knows no warm-up."""
    if decay not in get_args(Decay):
        raise UserError(f"decay is {decay!r}; allowed: {', '.join(get_args(Decay))}")
    warmup_steps = int(warmup_ratio * total_steps)
    if decay == "constant":
        return 1.0
    if step < warmup_steps:
        return step / warmup_steps
    if decay == "invsqrt":
        return math.sqrt(max(1, warmup_steps) / max(1, step))
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress
