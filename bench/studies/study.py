"""What a study is, and what becomes of its rows. No files, nothing heavy."""

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
    """One of the things compared; under several conditions it is an arm of each."""

    name: str
    condition: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}, {self.condition}" if self.condition else self.name


@dataclass(frozen=True)
class Claim:
    """That `better` is above `worse` by more than `by` on `metric`, both under `condition`.

    A negative `by` claims that it is at most so much below: that is how a tie is claimed.
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
    name: str  # as on the command line
    title: str
    question: str
    claimed: str  # the ordering, in words, with where it is from
    setting: str  # what is done in an arm: data, model, scores; Markdown
    arms: tuple[Arm, ...]
    metrics: Mapping[str, str]  # by name in the rows: its heading in tables; the first is the main one
    claims: tuple[Claim, ...]
    sizes: Mapping[str, Any]  # dataclass instances; "default" and "small" at least
    run: Callable[[Arm, int, Any, Path], Values]  # (arm, seed, size, cache)
    draw: Callable[["Table"], Figure]
    notes: str = ""  # what was tried, and what to make of it; Markdown
    num_seeds: int = 3
    percent: bool = True  # tables show hundredths

    def __post_init__(self) -> None:
        assert len(set(self.arms)) == len(self.arms) and {"default", "small"} <= set(self.sizes)
        ends = [(c.better, c.condition) for c in self.claims]
        ends += [(c.worse, c.condition if c.worse_condition is None else c.worse_condition) for c in self.claims]
        assert {Arm(*end) for end in ends} <= set(self.arms), f"{self.name} claims something of arms it does not have"
        assert {claim.metric for claim in self.claims} <= set(self.metrics)


class Cell(NamedTuple):
    """One run of `Study.run`."""

    arm: Arm
    seed: int


class Outcome(NamedTuple):
    """A claim's differences within seeds, less `Claim.by`: their mean, its standard error, and in words."""

    mean: float
    error: float
    num_seeds: int
    verdict: str


@dataclass(frozen=True)
class Table:
    """All values there are: by cell, then by metric."""

    values: Mapping[Cell, Values] = field(default_factory=dict)

    def of(self, arm: Arm, metric: str) -> dict[int, float]:
        """By seed."""
        return {c.seed: values[metric] for c, values in self.values.items() if c.arm == arm and metric in values}

    def lacks(self, study: Study) -> list[Arm]:
        """Arms without a single seed."""
        there = {cell.arm for cell in self.values}
        return [arm for arm in study.arms if arm not in there]

    def mean(self, arm: Arm, metric: str) -> tuple[float, float]:
        """Mean and standard deviation (n - 1) over seeds."""
        values = list(self.of(arm, metric).values())
        return fmean(values), stdev(values) if len(values) > 1 else 0.0

    def outcome(self, claim: Claim) -> Outcome:
        """A claim came out where the mean difference's 95 % interval, by Student's t, is wholly above zero."""
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
    """The quantile 0.975 of Student's t; beyond the table that of its last row, which is a little more than exact."""
    table = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    return table[min(freedom, len(table)) - 1] if freedom else 1.0
