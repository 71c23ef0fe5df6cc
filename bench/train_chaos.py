"""A training that is killed again and again, each time gone on with by other processes, compared with a quiet one.

    python -m bench.train_chaos                       30 kills over 120 steps (10 minutes or so)
    python -m bench.train_chaos --kills 6 --steps 40

gate           the batches are those of the quiet run, and so are the fp32 losses, but for how sums are rounded (2e-4)
informational  kills by kind

Each attempt trains with 0 to 3 loader processes, alone or as two processes of torchrun, and is killed at a seeded
random moment: anywhere, while a checkpoint is being written, or with SIGTERM, which it may answer by saving. Loader
processes are killed, too, without ending the attempt. Exit code 1 when the gate fails.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

KINDS = ("anywhere", "saving", "SIGTERM", "loader")
RELATIVE = 2e-4
SETTINGS = (
    "train.batch_size=8",
    "train.log_every=1",
    "train.checkpoint_every=2",
    "train.tensorboard=false",
    "train.threads=1",
    "data.num_frames=2",
    "eval.where=",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="one that is there; else a small one is built")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipmill-chaos-") as scratch:
        corpus = arguments.corpus or _build(Path(scratch))
        sys.exit(_torment(Path(scratch), corpus, arguments))


def _torment(folder: Path, corpus: Path, arguments: argparse.Namespace) -> int:
    quiet, run, rng = folder / "quiet", folder / "run", random.Random(arguments.seed)
    started = time.monotonic()
    _wait(Attempt(corpus, quiet, arguments.steps, loaders=1, processes=1))
    kills: Counter = Counter()
    attempts = 0
    while kills.total() < arguments.kills and _last_step(run) < arguments.steps:
        attempts += 1
        attempt = Attempt(corpus, run, arguments.steps, rng.randrange(4), processes=1 + (rng.random() < 0.3))
        kills.update(attempt.strike(rng))
    _wait(Attempt(corpus, run, arguments.steps, loaders=2, processes=1))
    problems = _differences(_lines(quiet), _lines(run), arguments.steps)
    told = ", ".join(f"{kills[kind]} {kind}" for kind in KINDS)
    print(f"{kills.total()} kills in {attempts} attempts, {(time.monotonic() - started) / 60:.1f} minutes: {told}")
    print("\n".join(f"WRONG: {problem}" for problem in problems) or f"the same {arguments.steps} batches and losses")
    return bool(problems)


def _build(folder: Path) -> Path:
    from pipeline.demo.world import WorldSettings, make_world

    make_world(folder / "world", WorldSettings(num_videos=4, min_video_s=30, max_video_s=40, seed=1))
    build = [sys.executable, "-m", "pipeline.cli", "build", str(folder / "world" / "videos")]
    build += ["--corpus", str(folder / "corpus"), "--recipe", "demo", "--set", "cut.short_side=64"]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    return folder / "corpus"


class Attempt:
    """One start of the command, in a process group of its own."""

    def __init__(self, corpus: Path, run: Path, steps: int, loaders: int, processes: int):
        self.run, self.begun_at = run, _last_step(run)
        words = ["train", "--corpus", str(corpus), "--run", str(run), "--recipe", "demo"]
        for setting in (*SETTINGS, f"train.max_steps={steps}", f"data.loader_processes={loaders}"):
            words += ["--set", setting]
        together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*together, "-m", "pipeline.cli", "--"] if processes > 1 else ["-m", "pipeline.cli"]
        self.process = subprocess.Popen(
            [sys.executable, *command, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def strike(self, rng: random.Random) -> list[str]:
        """Kills once it trains; what has been hit. Nothing if it ends before."""
        hit, kind = [], rng.choice(KINDS)
        self._wait_for(lambda: _last_step(self.run) > self.begun_at)
        if kind == "loader":
            hit += self._kill_loaders(rng)
            kind = "anywhere"
        if kind == "saving":
            self._wait_for(lambda: any((self.run / "checkpoints").glob(".tmp-*")))
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(rng.uniform(0, 2))
        if self.process.poll() is None:
            hit.append(kind)
            os.killpg(self.process.pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        self.process.communicate(timeout=120)
        return hit

    def _kill_loaders(self, rng: random.Random) -> list[str]:
        with suppress(psutil.Error):
            below = psutil.Process(self.process.pid).children(recursive=True)
            loaders = [p for p in below if "forkserver" in " ".join(p.parent().cmdline())]
            if loaders:
                rng.choice(loaders).kill()
                return ["loader"]
        return []

    def _wait_for(self, condition) -> None:
        while self.process.poll() is None and not condition():
            time.sleep(0.005)


def _wait(attempt: Attempt) -> None:
    _, errors = attempt.process.communicate(timeout=600)
    assert attempt.process.returncode == 0, errors


def _lines(run: Path) -> list[dict]:
    with suppress(FileNotFoundError):
        text = (run / "log.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return []


def _last_step(run: Path) -> int:
    return max((line["step"] for line in _lines(run)), default=0)


def _differences(expected: list[dict], found: list[dict], steps: int) -> list[str]:
    if [line["step"] for line in found] != list(range(1, steps + 1)):
        return [f"{len(found)} lines for {steps} steps"]
    pairs = list(zip(expected, found, strict=True))
    wrong = [f"step {a['step']}: another batch" for a, b in pairs if a["batch"] != b["batch"]]
    far = [(a, b) for a, b in pairs if abs(a["loss"] - b["loss"]) > RELATIVE * abs(a["loss"])]
    return wrong + [f"step {a['step']}: loss {b['loss']} for {a['loss']}" for a, b in far]


if __name__ == "__main__":
    main()
