"""Kill a training run repeatedly, resume it by other processes, and compare it with an undisturbed one.

    python -m bench.train_chaos                       30 kills over 120 steps (10 minutes or so)
    python -m bench.train_chaos --kills 6 --steps 40
    python -m bench.train_chaos --ways ray            only under Ray Train

gate           the batches equal those of the quiet run, and the fp32 losses do up to the rounding of sums (2e-4) ·
               no attempt fails by itself
informational  kills by kind

Each attempt trains with 0 to 3 loader processes: alone, as two processes of torchrun, or as two workers of Ray Train on
a cluster of three nodes on this machine. It is killed at a seeded random time: anywhere, while a checkpoint is written,
or with SIGTERM, on which it may save. Loader processes, Ray's workers and a whole node are killed, too, which the
attempt has to survive. Exit code 1 when the gate fails.
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
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from bench.chaos import RayNodes, local_cluster, title_of

KINDS = ("anywhere", "saving", "SIGTERM", "loader", "ray-worker", "ray-node")
WAYS = {"alone": 0.5, "torchrun": 0.25, "ray": 0.25}  # how an attempt is started → share
RELATIVE = 2e-4
PATIENCE_S = 600  # without a step, after which an attempt counts as hung
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
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--corpus", type=Path, help="existing corpus; without it a small one is built")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipmill-chaos-") as scratch:
        corpus = arguments.corpus or _build(Path(scratch))
        report = torment(
            Path(scratch),
            corpus,
            arguments.kills,
            arguments.steps,
            arguments.seed,
            arguments.ways,
            partial(print, flush=True),
        )
    print(report)
    sys.exit(bool(report.wrong))


@dataclass
class Report:
    """The kills, and what is wrong with the result."""

    steps: int
    kills: Counter = field(default_factory=Counter)
    ways: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.kills[kind]} {kind}" for kind in KINDS if self.kills[kind])
        ways = ", ".join(f"{self.ways[way]} {way}" for way in WAYS if self.ways[way])
        lines = [
            f"{self.kills.total()} kills in {self.seconds / 60:.1f} minutes: {kinds}",
            f"{self.ways.total()} attempts: {ways}",
            *(f"WRONG: {problem}" for problem in self.wrong),
        ]
        return "\n".join([*lines, "FAILED" if self.wrong else f"the same {self.steps} batches and losses"])


def torment(
    folder: Path, corpus: Path, num_kills: int, steps: int, seed: int, ways: Sequence[str], say: Callable[[str], None]
) -> Report:
    """Train undisturbed, train under kills, and compare; work in `folder`."""
    quiet, run, rng = folder / "quiet", folder / "run", random.Random(seed)
    started, report = time.monotonic(), Report(steps)
    say(f"quiet training of {steps} steps")
    Attempt(corpus, quiet, steps, loaders=1).end_well()
    with ExitStack() as stack:
        cluster = stack.enter_context(local_cluster()) if "ray" in ways else None
        while report.kills.total() < num_kills and _last_step(run) < steps and not report.wrong:
            way = rng.choices(ways, [WAYS[way] for way in ways])[0]
            attempt = Attempt(corpus, run, steps, rng.randrange(4), way, cluster)
            hit, problem = attempt.strike(rng)
            report.kills.update(hit)
            report.ways[way] += 1
            report.wrong += [f"{way}: {problem}"] if problem else []
            say(f"{report.kills.total():4} {way} from step {attempt.begun_at} to {_last_step(run)}: {', '.join(hit)}")
    if not report.wrong:
        Attempt(corpus, run, steps, loaders=2).end_well()
        report.wrong += _differences(_lines(quiet), _lines(run), steps)
    report.seconds = time.monotonic() - started
    return report


def _build(folder: Path) -> Path:
    """Build a small corpus; return its folder."""
    from pipeline.demo.world import WorldSettings, make_world

    make_world(folder / "world", WorldSettings(num_videos=4, min_video_s=30, max_video_s=40, seed=1))
    build = [sys.executable, "-m", "clipmill", "build", str(folder / "world" / "videos")]
    build += ["--corpus", str(folder / "corpus"), "--recipe", "demo", "--set", "cut.short_side=64"]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    return folder / "corpus"


class Attempt:
    """A run of the command, in its own process group."""

    def __init__(
        self, corpus: Path, run: Path, steps: int, loaders: int, way: str = "alone", cluster: RayNodes | None = None
    ):
        self.run, self.way, self.cluster, self.begun_at = run, way, cluster, _last_step(run)
        words = ["train", "--corpus", str(corpus), "--run", str(run), "--recipe", "demo"]
        for setting in (*SETTINGS, f"train.max_steps={steps}", f"data.loader_processes={loaders}"):
            words += ["--set", setting]
        together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "clipmill", "--"]
        command = together if way == "torchrun" else ["-m", "clipmill"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if way == "ray":
            words += ["--workers", "2"]
            environment["RAY_ADDRESS"] = cluster.address
        self.output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, *command, *words],
            stdout=self.output,
            stderr=self.output,
            env=environment,
            start_new_session=True,
        )

    def end_well(self) -> None:
        """Wait for the end of the command and assert that it succeeded."""
        code = self.process.wait(timeout=1800)
        assert code == 0, self.said()

    def said(self) -> str:
        """Return the end of what the command printed."""
        self.output.seek(0)
        return self.output.read()[-3000:]

    def strike(self, rng: random.Random) -> tuple[list[str], str | None]:
        """Kill once the attempt trains; return what was hit, and the error where it failed for another reason."""
        try:
            return self._strike(rng)
        except TimeoutError as error:
            return [], f"{error}: {self.said()}"
        finally:
            self._kill_all()

    def _strike(self, rng: random.Random) -> tuple[list[str], str | None]:
        """Wait for a step and a random time, then kill a part or the attempt; return as `strike` does."""
        kinds = ("ray-worker", "ray-node") if self.way == "ray" else ("anywhere", "saving", "SIGTERM", "loader")
        kind = rng.choice(kinds)
        self._wait_for(lambda: _last_step(self.run) > self.begun_at)
        time.sleep(rng.uniform(0, 2))
        hit = self._hit_a_part(kind, rng)
        if kind == "saving":
            self._wait_for(lambda: any((self.run / "checkpoints").glob(".tmp-*")))
            time.sleep(rng.uniform(0, 0.02))
        code = self.process.poll()
        if code is None:
            hit.append(self._end(kind))
        return hit, f"ended with {code}: {self.said()}" if code else None

    def _hit_a_part(self, kind: str, rng: random.Random) -> list[str]:
        """Kill a part that the attempt has to survive; wait for its next step, or raise TimeoutError."""
        victims = {"loader": self._loaders, "ray-worker": self._ray_workers}
        if kind == "ray-node":
            self.cluster.replace_one(rng)
        elif kind not in victims or not _kill_one(victims[kind](), rng):
            return []
        made = _last_step(self.run)
        self._wait_for(lambda: _last_step(self.run) > made)
        return [kind]

    def _loaders(self) -> list[psutil.Process]:
        """Return the loader processes."""
        with suppress(psutil.Error):
            below = psutil.Process(self.process.pid).children(recursive=True)
            return [p for p in below if p.parent() and "forkserver" in title_of(p.parent())]
        return []

    def _ray_workers(self) -> list[psutil.Process]:
        return [p for p in self.cluster.workers() if "RayTrainWorker" in title_of(p)]

    def _end(self, kind: str) -> str:
        """End the whole attempt, with torchrun's processes (which have their own sessions) and Ray's workers."""
        if kind == "SIGTERM":
            os.killpg(self.process.pid, signal.SIGTERM)
            self._wait_for(lambda: False)
            return kind
        self._kill_all()
        return "saving" if kind == "saving" else "anywhere"

    def _kill_all(self) -> None:
        """Kill the attempt and everything it started."""
        if self.process.poll() is None:
            below = psutil.Process(self.process.pid).children(recursive=True)
            os.killpg(self.process.pid, signal.SIGKILL)
            for process in below:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()
        if self.way == "ray":
            _wait_until(lambda: not self._ray_workers())  # Ray ends the workers of a dead driver

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        _wait_until(lambda: self.process.poll() is not None or condition())


def _wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; raises TimeoutError."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"the attempt made no step for {PATIENCE_S} s")
        time.sleep(0.005)


def _kill_one(victims: list[psutil.Process], rng: random.Random) -> bool:
    """Kill a random process; return whether there was one."""
    with suppress(psutil.NoSuchProcess):
        if victims:
            rng.choice(sorted(victims, key=lambda p: p.pid)).kill()
            return True
    return False


def _lines(run: Path) -> list[dict]:
    """Read the complete lines of a run's log."""
    with suppress(FileNotFoundError):
        text = (run / "log.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return []


def _last_step(run: Path) -> int:
    return max((line["step"] for line in _lines(run)), default=0)


def _differences(expected: list[dict], found: list[dict], steps: int) -> list[str]:
    """Describe the differences between two logs."""
    if [line["step"] for line in found] != list(range(1, steps + 1)):
        return [f"{len(found)} lines for {steps} steps"]
    pairs = list(zip(expected, found, strict=True))
    wrong = [f"step {a['step']}: another batch" for a, b in pairs if a["batch"] != b["batch"]]
    far = [(a, b) for a, b in pairs if abs(a["loss"] - b["loss"]) > RELATIVE * abs(a["loss"])]
    return wrong + [f"step {a['step']}: loss {b['loss']} for {a['loss']}" for a, b in far]


if __name__ == "__main__":
    main()
