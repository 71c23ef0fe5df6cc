"""Log a run: log.jsonl and eval.jsonl, TensorBoard, a progress bar or plain lines, with the run's speed.

Losses stay tensors on the device until a line is written, every `every` steps: only then does the process wait for the
device. The logged loss is that of the logged step, not a mean since the last line, so that a resumed run has the same
curve as an uninterrupted one. Losses in between are checked too: one that is not finite stops the run at the next line,
on every process.

Rates are means since the previous line, without the time of evaluating and saving (`paused`).
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from clipmill.base.atomic_file import write_text
from clipmill.base.errors import UserError
from training.run.throughput import Throughput

PLAIN_LINE_EVERY_S = 10.0  # least time between printed lines if the output is not a terminal


class RunLog:
    """A run's log from `start_step` on. Lines of later steps are removed, because a resumed run repeats these steps.

    A run that starts at step 0 removes all lines of earlier attempts, evaluations included.

    every   steps between lines; the run's first and last step also have one
    writes  False on all processes except the first: they only check that losses are finite
    """

    def __init__(
        self,
        root: str | Path,
        meter: Throughput,
        *,
        total_steps: int,
        start_step: int = 0,
        every: int = 10,
        tensorboard: bool = True,
        writes: bool = True,
        console: Console | None = None,
    ):
        self.root, self.meter, self.every, self.total_steps = Path(root), meter, every, total_steps
        self.writes, self.step_done = writes, start_step
        self.console = console or Console()
        if not console and not self.console.is_terminal:
            self.console = Console(width=200)  # rich would cut lines at 80 columns
        self.evaluations: list[dict[str, Any]] = []  # lines of eval.jsonl, where this process writes it
        self._unread: list[tuple[int, Mapping[str, Any]]] = []
        self._board = self._bar = self._log = self._evals = None
        self._wall_s, self._step_s = 0.0, None
        self._printed_at = -math.inf
        if not writes:
            return
        log_path, eval_path = self.root / "log.jsonl", self.root / "eval.jsonl"
        last_step = start_step or -1
        kept = cut_after(log_path, last_step)
        self._wall_s = kept[-1].get("wall_s", 0.0) if kept else 0.0
        self.evaluations = cut_after(eval_path, last_step)
        self._log, self._evals = open(log_path, "a"), open(eval_path, "a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.root / "tensorboard"), purge_step=last_step + 1)

    def __enter__(self) -> "RunLog":
        if self.writes and self.console.is_terminal:
            columns = (
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("train", total=self.total_steps, completed=self.step_done, note="")
        return self

    def __exit__(self, *exception: Any) -> None:
        for part in (self._log, self._evals, self._board):
            if part is not None:
                part.close()
        if self._bar is not None:
            self._bar.stop()

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(
        self,
        step: int,
        values: Mapping[str, Tensor | float | int | None],
        *,
        num_samples: int,
        flops: float = 0.0,
        labels: Mapping[str, str] | None = None,
    ) -> dict[str, Any] | None:
        """Log an update, number `step` counted from 1. Return the line if one was due.

        values  `loss`, its terms by name, `lr`, `logit_scale`, `grad_norm`, `epoch`, …: numbers, or tensors of one
                number that are not overwritten later
        labels  text values, for log.jsonl only
        Raises UserError if a value was not finite at any step since the last line.
        """
        self.meter.step(num_samples, flops)
        self._unread.append(
            (step, {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()})
        )
        self.step_done = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if step % self.every and step not in (1, self.total_steps):
            return None
        values = self._read()
        rates = self.meter.rates()
        self._wall_s += rates.pop("elapsed_s")
        step_s = rates.pop("step_s")
        self._step_s = step_s if self._step_s is None else 0.8 * self._step_s + 0.2 * step_s  # smoothed for eta_s
        eta_s = (self.total_steps - step) * self._step_s
        row = {"step": step, **values, **rates, "eta_s": eta_s, "wall_s": self._wall_s, **(labels or {})}
        if self.writes:
            self._write(row)
        return row

    def check(self) -> None:
        """Check the losses since the last line and flush the lines so far to disk. Call before every checkpoint.

        Raises UserError if a loss is not finite, so that no checkpoint of its result is written.
        """
        self._read()
        for file in (self._log, self._evals):
            if file is not None:
                os.fsync(file.fileno())

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self.meter.paused():
            yield

    def _read(self) -> dict[str, Any]:
        """Return the newest step's values as numbers, with one transfer for all steps since the last call."""
        unread, self._unread = self._unread, []
        if not unread:
            return {}
        tensors = [value for _, values in unread for value in values.values() if isinstance(value, Tensor)]
        stacked = [tensor.reshape(()).double() for tensor in tensors]
        numbers = iter(torch.stack(stacked).tolist() if stacked else [])
        rows = [
            (step, {name: next(numbers) if isinstance(value, Tensor) else value for name, value in values.items()})
            for step, values in unread
        ]
        for step, row in rows:
            for name, value in row.items():
                if value is not None and not math.isfinite(value):
                    raise UserError(_not_finite(self.root, name, value, step))
        return rows[-1][1]

    def _write(self, row: dict[str, Any]) -> None:
        self._log.write(json.dumps(row, allow_nan=False) + "\n")
        self._log.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(f"train/{name}", value, row["step"])
        self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        mfu = "" if row["mfu"] is None else f" · MFU {row['mfu']:.1%}"
        rate = f"{row['samples_per_s']:,.4g} samples/s · data wait {row['data_wait']:.1%}{mfu}"
        text = f"loss {row['loss']:.4f} · {rate}" if row.get("loss") is not None else rate
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, note=text)
        elif now - self._printed_at >= PLAIN_LINE_EVERY_S or row["step"] == self.total_steps:
            self._printed_at = now
            left = f"{timedelta(seconds=round(row['eta_s']))} left"
            self.console.print(f"step {row['step']:,}/{self.total_steps:,} · {text} · {left}", highlight=False)

    # -- evaluations --------------------------------------------------------------------------------------------------

    def has_evaluation(self, step: int) -> bool:
        """Return True if eval.jsonl has this step, so that a resumed run does not evaluate it again."""
        return any(row["step"] == step for row in self.evaluations)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a line of eval.jsonl, and the metrics that are numbers, also nested ones, to TensorBoard."""
        if not self.writes:
            return
        row = {"step": step, **metrics}
        self._evals.write(json.dumps(row) + "\n")
        self._evals.flush()
        self.evaluations.append(row)
        if self._board is not None:
            for name, value in _numbers(metrics):
                self._board.add_scalar(f"eval/{name}", value, step)
            self._board.flush()

    def say(self, text: str) -> None:
        """Print a line for the user, above the progress bar if there is one."""
        if self.writes:
            self.console.print(text, highlight=False)


def cut_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrite a JSONL file without the lines of later steps and without a torn last line; return the rest as rows."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not line.endswith("\n") or not isinstance(row, dict) or "step" not in row:
            row = None  # torn, or not a log line
        if row is None and number < len(lines) - 1:
            raise UserError(f"{path}, line {number + 1} is not a log line: repair it or move the file away.")
        if row is not None and row["step"] <= step:
            kept.append((line, row))
    if len(kept) < len(lines):
        write_text(path, "".join(line for line, _ in kept))
    return [row for _, row in kept]


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def _not_finite(root: Path, name: str, value: float, step: int) -> str:
    folders = sorted((root / "checkpoints").glob("step-*"))
    last = f"The last checkpoint is {folders[-1]}" if folders else "The run has no checkpoint yet"
    start = f"--set model.init={folders[-1]}" if folders else "the same weights"
    return (
        f"step {step}: {name} is {value}. {last}. Start a new run from {start} with a lower train.lr, a smaller "
        "train.grad_clip or train.precision=fp32."
    )
