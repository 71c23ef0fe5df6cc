"""Compute the learning rate of a step (docs/methods/clip_vip.md section 7, clip4clip.md section 6)."""

import math

from training.settings import Decay

LOWEST_RATE = 1e-8  # rate of a step whose formula gives 0


def learning_rate(
    step: int, base_rate: float, *, total_steps: int, warmup_ratio: float = 0.01, decay: Decay = "cosine"
) -> float:
    """Compute the rate of update number `step`, from 1.

    With "cosine" the last of `total_steps` gets `LOWEST_RATE`; with "clip4clip" the first gets 0, as published.
    """
    rate = base_rate * rate_factor(step, total_steps=total_steps, warmup_ratio=warmup_ratio, decay=decay)
    return rate if rate > 0 or decay == "clip4clip" else LOWEST_RATE


def rate_factor(step: int, *, total_steps: int, warmup_ratio: float = 0.01, decay: Decay = "cosine") -> float:
    """Compute the factor of the base rate: step/warm-up steps, then the decay. "constant" has no warm-up.

    "clip4clip" is a cosine over the whole run, warm-up included, so that the rate drops when the warm-up ends; its
    argument is the number of updates done before this one.
    """
    if decay == "clip4clip":
        done = (step - 1) / total_steps
        return done / warmup_ratio if done < warmup_ratio else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    warmup_steps = int(warmup_ratio * total_steps)
    if decay == "constant":
        return 1.0
    if step < warmup_steps:
        return step / warmup_steps
    if decay == "invsqrt":
        return math.sqrt(max(1, warmup_steps) / max(1, step))
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress
