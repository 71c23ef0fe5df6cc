"""Choose a run's best checkpoint by its evaluations on held-out clips, or the checkpoint that a command names.

Only the lines of eval.jsonl decide. `checkpoints/best.json` repeats their result for users and commands, and is written
again whenever the run resumes. Released trainers also choose the best text-to-video R@1, but on their test set
(docs/methods/clip4clip.md section 9.4); here clips of a split "test" are refused (`training.data.run_selection`). The
earlier of equal evaluations counts. Step 0, before any training, is not a candidate.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clipmill.base.atomic_file import write_text
from clipmill.base.errors import UserError
from training.run.checkpoints import Checkpoints
from training.run.folder import RunFolder
from training.settings import Metric

BEST_FILE = "best.json"  # in the folder of checkpoints


@dataclass(frozen=True)
class Best:
    """Content of best.json: `value` is the metric at that step, `num_evaluations` the number of candidates."""

    step: int
    metric: str
    value: float
    num_evaluations: int


@dataclass(frozen=True)
class Chosen:
    step: int
    reason: str = ""  # text to print after "at step N"


def best_of(evaluations: Sequence[Mapping[str, Any]], metric: Metric) -> Best | None:
    """Return the best of eval.jsonl's lines, None if no step except 0 was evaluated."""
    way, _, recall = metric.partition("_")
    values = {row["step"]: float(row[way][recall]) for row in evaluations if row["step"] > 0}
    if not values:
        return None
    step = min(values, key=lambda step: (-values[step], step))
    return Best(step, metric, values[step], len(values))


def write_best(checkpoints: Checkpoints, best: Best | None) -> None:
    """Write best.json, or remove it for None."""
    path = checkpoints.folder / BEST_FILE
    if best is None:
        path.unlink(missing_ok=True)
    else:
        write_text(path, json.dumps(asdict(best), indent=1) + "\n")


def read_best(checkpoints: Checkpoints) -> Best | None:
    """Read best.json; return None if the run was not validated. Raises UserError if the file cannot be read."""
    path = checkpoints.folder / BEST_FILE
    try:
        return Best(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Resuming the run writes it again.") from error


def chosen_checkpoint(run: RunFolder, which: str | None = None) -> Chosen:
    """Find the checkpoint that `which` names. Raises UserError if it does not exist or is damaged.

    which  "best", "last" (the newest that is whole), or a step; None: "best" if the run was validated, else "last"
    """
    best = None if which == "last" else read_best(run.checkpoints)
    if which in (None, "best") and best is not None:
        reason = f" ({best.metric} {best.value:.3f}, the best of {best.num_evaluations})"
        return Chosen(_whole(run, best.step, "best"), reason)
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
    problem = run.checkpoints.problem(step) if step in known else "this checkpoint does not exist"
    if problem:
        allowed = ", ".join(["best", "last", *map(str, known)])
        raise UserError(f"--checkpoint {which}: {run.root}: {problem}. Allowed: {allowed}.")
    return step
