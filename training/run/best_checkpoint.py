"""Which checkpoint of a run is the best, as its evaluations on held-out clips have it, and which one others take.

The lines of eval.jsonl decide, nothing else: `checkpoints/best.json` repeats what they say, for people and commands,
and is written anew from them whenever the run goes on. Choosing the evaluation with the best text to video R@1 is what
released trainers do, on their test set (spec/clip4clip.md section 9.4); here no clip of a split "test" may take part
(`training.data.clip_query`). Of equals the earlier counts. The model before its first step is no candidate: nothing was trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipmill.base.atomic_file import write_text
from clipmill.base.errors import UserError
from training.run.checkpoints import Checkpoints
from training.run.folder import RunFolder
from training.settings import Metric


@dataclass(frozen=True)
class Best:
    """What best.json holds: `value` is the metric's at that step, `num_evaluations` how many it was chosen from."""

    step: int
    metric: str
    value: float
    num_evaluations: int


@dataclass(frozen=True)
class Chosen:
    step: int
    reason: str = ""  # what to say behind "at step N"


def best_of(evaluations: Sequence[Mapping[str, Any]], metric: Metric) -> Best | None:
    """Of lines of eval.jsonl; None where no step has been evaluated but 0."""
    way, _, recall = metric.partition("_")
    values = {row["step"]: float(row[way][recall]) for row in evaluations if row["step"] > 0}
    if not values:
        return None
    step = min(values, key=lambda step: (-values[step], step))
    return Best(step, metric, values[step], len(values))


def write_best(checkpoints: Checkpoints, best: Best | None) -> None:
    """None: the file goes, if one is there."""
    if best is None:
        _path(checkpoints).unlink(missing_ok=True)
    else:
        write_text(_path(checkpoints), json.dumps(asdict(best), indent=1) + "\n")


def read_best(checkpoints: Checkpoints) -> Best | None:
    """None where the run was not validated. Raises UserError for a file that is none of ours."""
    path = _path(checkpoints)
    try:
        return Best(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Training on writes it anew.") from error


def chosen_checkpoint(run: RunFolder, which: str | None = None) -> Chosen:
    """The checkpoint of a run that is meant. Raises UserError where it is not there, or is damaged.

    which  "best", "last" (the newest that is whole), or a step; None: "best" where the run was validated, else "last"
    """
    best = None if which == "last" else read_best(run.checkpoints)
    if which in (None, "best") and best is not None:
        said = f"{best.metric} {best.value:.3f}, the best of {best.num_evaluations}"
        return Chosen(_whole(run, best.step, "best"), f" ({said})")
    if which == "best":
        raise UserError(f"--checkpoint best: {run.root} was not validated (eval.every). Allowed: last, or a step.")
    if which not in (None, "last"):
        return Chosen(_whole(run, int(which) if which.isdecimal() else -1, which))
    step = run.checkpoints.find_latest()
    if step is None:
        raise UserError(f"{run.root} has no checkpoint yet.")
    return Chosen(step)


def _whole(run: RunFolder, step: int, which: str) -> int:
    known = run.checkpoints.steps()
    problem = run.checkpoints.problem(step) if step in known else "there is no such checkpoint"
    if problem:
        allowed = ", ".join(["best", "last", *map(str, known)])
        raise UserError(f"--checkpoint {which}: {run.root}: {problem}. Allowed: {allowed}.")
    return step


def _path(checkpoints: Checkpoints) -> Path:
    return checkpoints.folder / "best.json"
