"""Types of a study: arms, claims, rows, and the statistics of claims. Files do not belong here, nor heavy imports."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure

Values = Mapping[str, float]  # by metric
VERDICTS = ("yes", "no", "undecided")


@dataclass(frozen=True)
class Arm:
    """A treatment to compare, under one condition."""

    name: str
    condition: str = ""

    @property
    def label(self) -> str:
        """Name and condition."""
        return f"{self.name}, {self.condition}" if self.condition else self.name


@dataclass(frozen=True)
class Claim:
    """A claim that `better` is above `worse` by more than `by` on `metric`, both under `condition`.

    A negative `by` claims that `better` is at most that much below, which is how to claim a tie.
    """

    says: str  # in words, for the report
    metric: str
    better: str
    worse: str
    condition: str = ""
    worse_condition: str | None = None  # None: the same
    by: float = 0.0


@dataclass(frozen=True)
class Study:
    """A description of a study; its texts are Markdown for the report."""

    name: str  # as on the command line
    title: str
    question: str
    claimed: str  # the ordering in words, with its source
    setting: str  # data, model and scores of an arm
    arms: tuple[Arm, ...]
    metrics: Mapping[str, str]  # name in the rows → heading in tables; the first is the main one
    claims: tuple[Claim, ...]
    sizes: Mapping[str, Any]  # dataclass instances; "default" and "small" at least
    run: Callable[[Arm, int, Any, Path], Values]  # (arm, seed, size, cache)
    draw: Callable[["Table"], Figure]
    notes: str = ""  # what was tried, and what follows
    num_seeds: int = 3
    percent: bool = True  # tables show hundredths

    def __post_init__(self) -> None:
        assert len(set(self.arms)) == len(self.arms) and {"default", "small"} <= set(self.sizes)
        ends = [(c.better, c.condition) for c in self.claims]
        ends += [(c.worse, c.condition if c.worse_condition is None else c.worse_condition) for c in self.claims]
        assert {Arm(*end) for end in ends} <= set(self.arms), f"{self.name} has claims about arms that it does not have"
        assert {claim.metric for claim in self.claims} <= set(self.metrics)


class Cell(NamedTuple):
    """An arm with a seed: one call of `Study.run`."""

    arm: Arm
    seed: int


class Outcome(NamedTuple):
    """The outcome of a claim: mean of the differences within seeds, less `Claim.by`, its standard error, a verdict."""

    mean: float
    error: float
    num_seeds: int
    verdict: str


@dataclass(frozen=True)
class Table:
    """The values of a study, by cell, then by metric."""

    values: Mapping[Cell, Values] = field(default_factory=dict)

    def of(self, arm: Arm, metric: str) -> dict[int, float]:
        """Return the values of an arm by seed."""
        return {c.seed: values[metric] for c, values in self.values.items() if c.arm == arm and metric in values}

    def lacks(self, study: Study) -> list[Arm]:
        """Return the arms without any seed."""
        there = {cell.arm for cell in self.values}
        return [arm for arm in study.arms if arm not in there]

    def mean(self, arm: Arm, metric: str) -> tuple[float, float]:
        """Return mean and standard deviation (n - 1) over seeds."""
        values = list(self.of(arm, metric).values())
        return fmean(values), stdev(values) if len(values) > 1 else 0.0

    def outcome(self, claim: Claim) -> Outcome:
        """Test a claim: "yes" or "no" where the 95 % interval of Student's t lies beyond zero, else "undecided"."""
        other = claim.condition if claim.worse_condition is None else claim.worse_condition
        better = self.of(Arm(claim.better, claim.condition), claim.metric)
        worse = self.of(Arm(claim.worse, other), claim.metric)
        differences = [better[seed] - worse[seed] - claim.by for seed in sorted(better.keys() & worse.keys())]
        mean, num = fmean(differences), len(differences)
        error = stdev(differences) / math.sqrt(num) if num > 1 else math.inf
        return Outcome(mean, error, num, _verdict(mean, error * _student(num - 1)))


def _verdict(mean: float, half_width: float) -> str:
    if abs(mean) <= half_width:
        return "undecided"
    return "yes" if mean > 0 else "no"


def _student(freedom: int) -> float:
    """Return the quantile 0.975 of Student's t; beyond the table its last row, which is a little too large."""
    table = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    return table[min(freedom, len(table)) - 1] if freedom else 1.0
