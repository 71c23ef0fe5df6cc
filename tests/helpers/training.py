"""Small runs of the real command, for tests of training."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clipmill.cli.app import main
from tests.helpers.ranks import serve_imports
from tests.helpers.shards import make_corpus, pack
from training.run.setup import Request
from training.trainer import Report, train

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
    """Packed: 4 videos of 30 clips, 120 samples in 24 shards."""
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
    """In this process, which also reads; `corpus` None goes on with the run."""
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
    """Which batch each step had."""
    return [(line["step"], line["batch"]) for line in lines(run)]


def assert_same_run(run: Path, expected: Path) -> None:
    """The same batches, and in fp32 the same losses but for the order in which sums are rounded."""
    assert curve(run) == curve(expected)
    assert losses(run) == pytest.approx(losses(expected), rel=2e-4)


class Forked:
    """The command in a process of its own that is forked with its imports done; else as subprocess's Popen."""

    def __init__(self, command: list[str], output: Path, **environment: str):
        serve_imports()
        arguments = (command[command.index("clipmill") + 1 :], output, environment)
        self._process = multiprocessing.get_context("forkserver").Process(target=_run_command, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"it runs for more than {timeout} s"
        return self._process.exitcode


def _run_command(arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["clipmill", *arguments]
    main()


def kill_at_step(
    command: list[str], run: Path, step: int, signal_number: int = signal.SIGKILL, anew: bool = False
) -> int:
    """Starts a training and sends it a signal once it has logged a step; returns its exit code.

    anew  in a new Python, as a shell starts it
    """
    output = run.with_name(f"{run.name}-output")
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=quiet()) if anew else Forked(command, output)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        logged = lines_so_far(run)
        if logged and logged[-1] >= step:
            process.send_signal(signal_number)
            break
        time.sleep(0.02)
    code = process.wait(timeout=100)
    assert code != 2, output.read_text()
    return code


def lines_so_far(run: Path) -> list[int]:
    """Steps logged, while the file is being written."""
    try:
        text = (run / "log.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]
