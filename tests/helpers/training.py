"""Run small trainings with the real command, and compare, signal and kill them."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from clipmill.cli.app import main
from tests.helpers.ranks import serve_imports
from tests.helpers.shards import make_corpus, pack
from training.run.log import RunLog
from training.run.setup import Request
from training.trainer import Report, train

ENOUGH_S = 1200.0  # for any command: one that takes longer hangs

# The demo recipe on a corpus of a few colourful clips: a step takes a tenth of a second.
SMALL = [
    "train.batch_size=8",
    "train.log_every=1",
    "train.checkpoint_every=5",
    "train.tensorboard=false",
    "train.threads=1",
    "data.num_frames=2",
    "data.loader_processes=1",
    "eval.where=",
]


def small_corpus(folder: Path, num_clips: int = 120) -> Path:
    """Make a packed corpus: 4 videos of 30 clips, 120 samples in 24 shards."""
    root = make_corpus(folder, num_clips)
    pack(root)
    return root


def train_command(corpus: Path | None, run: Path, *settings: str, workers: int = 1, options: list[str] | None = None):
    command = [sys.executable, "-m", "clipmill", "train", "--run", str(run)]
    command += ["--corpus", str(corpus), "--recipe", "demo"] if corpus else []
    command += ["--workers", str(workers)] if workers > 1 else []
    for setting in (*(SMALL if corpus else ()), *settings):
        command += ["--set", setting]
    return [*command, *(options or [])]


def train_here(corpus: Path | None, run: Path, *settings: str) -> Report:
    """Train in this process, which also reads the samples; without `corpus`, resume the run."""
    chosen = (*SMALL, "data.loader_processes=0", *settings) if corpus else settings
    return train(Request(str(run), corpus and str(corpus), corpus and "demo", chosen))


def quiet() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def lines(run: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    path = run / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


def curve(run: Path) -> list[tuple[int, str]]:
    """Return the batch of each step."""
    return [(line["step"], line["batch"]) for line in lines(run)]


def assert_same_run(run: Path, expected: Path) -> None:
    """Assert that two runs have the same batches, and the same fp32 losses up to rounding."""
    assert curve(run) == curve(expected)
    assert losses(run) == pytest.approx(losses(expected), rel=2e-4)


class Forked:
    """Run the command in a process forked after its imports, with the interface of subprocess's Popen.

    before  called in that process before the command starts
    """

    def __init__(self, command: list[str], output: Path, before: Callable[[], None] | None = None, **environment: str):
        serve_imports()
        arguments = (command[command.index("clipmill") + 1 :], output, before, environment)
        self._process = multiprocessing.get_context("forkserver").Process(target=_run_command, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"it has run for more than {timeout} s"
        return self._process.exitcode


def _run_command(
    arguments: list[str], output: Path, before: Callable[[], None] | None, environment: dict[str, str]
) -> None:
    os.environ |= environment
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["clipmill", *arguments]
    if before is not None:
        before()
    main()


def signal_at_step(step: int, number: int) -> None:
    """Send this process a signal as soon as its run has logged a step, so that timing does not matter."""
    write = RunLog._write

    def write_and_send(log: RunLog, row: dict[str, Any]) -> None:
        write(log, row)
        if row["step"] == step:
            os.kill(os.getpid(), number)

    RunLog._write = write_and_send


def die_at_rename(part: str, nth: int) -> None:
    """Kill this process before the nth rename of a file to a name that contains a part."""
    num_renames = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal num_renames
        if event == "os.rename" and part in str(arguments[1]):
            num_renames += 1
            if num_renames == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def kill_at_step(
    command: list[str], run: Path, step: int, signal_number: int = signal.SIGKILL, anew: bool = False
) -> int:
    """Start a training that gets a signal once it has logged a step; return its exit code.

    anew  start a new Python, as a shell does, instead of a fork
    """
    output = run.with_name(f"{run.name}-output")
    if anew:
        code = f"import sys; sys.path[:] = {sys.path}; import {__name__} as support; "
        code += f"support.signal_at_step({step}, {int(signal_number)}); support.main()"
        command = [sys.executable, "-c", code, *command[command.index("clipmill") + 1 :]]
        with output.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=file, env=quiet(), timeout=ENOUGH_S).returncode
    else:
        code = Forked(command, output, partial(signal_at_step, step, signal_number)).wait(timeout=ENOUGH_S)
    assert code != 2, output.read_text()
    return code


def lines_so_far(run: Path) -> list[int]:
    """Return the number of steps logged so far, while the file is being written."""
    try:
        text = (run / "log.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]
