"""Small runs of the real command, for tests of training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from shard_support import make_corpus, pack

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
    command = [sys.executable, "-m", "pipeline.cli", "train", "--run", str(run)]
    command += ["--corpus", str(corpus), "--recipe", "demo"] if corpus else []
    command += ["--workers", str(workers)] if workers > 1 else []
    for setting in (*(SMALL if corpus else ()), *settings):
        command += ["--set", setting]
    return [*command, *(options or [])]


def run_training(*arguments: Any, timeout_s: float = 240, **kwargs: Any) -> subprocess.CompletedProcess:
    command = train_command(*arguments, **kwargs)
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=quiet())


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


def kill_at_step(command: list[str], run: Path, step: int, signal_number: int = signal.SIGKILL) -> int:
    """Starts a training and sends it a signal once it has logged a step; returns its exit code."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=quiet(), start_new_session=True
    )
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        logged = lines_so_far(run)
        if logged and logged[-1] >= step:
            process.send_signal(signal_number)
            break
        time.sleep(0.02)
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 2, errors
    return process.returncode


def lines_so_far(run: Path) -> list[int]:
    """Steps logged, while the file is being written."""
    try:
        text = (run / "log.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]
