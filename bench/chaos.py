"""Build the demo world under injected faults, and compare the corpus with that of an undisturbed build.

    python -m bench.chaos                       100 faults, 12 videos, three Ray nodes (10 minutes or so)
    python -m bench.chaos --faults 15 --videos 4 --seed 7

gate           shards, tables and failures equal those of the quiet build, to the byte · no orphan file · no more work
               was repeated than the faults explain
informational  repeated work, minutes

Faults come in a seeded order at seeded times; what they hit depends on timing, so two runs of one seed differ. A fault
counts only when it has an effect: a process was killed, an HTTP answer was spoilt, the disk was full while a build ran.
The disk is a tmpfs, which needs root to mount; without it that kind is left out, and the summary says so. Exit code 1
when a gate fails.
"""

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bench.same_corpus import differences, orphans
from clipmill.base.atomic_file import atomic_file
from clipmill.base.ray_cluster import own_token, use_token

STALL_S = 8.0  # what a busy machine's own server does not take for an answer

SETTINGS = (
    "ingest.unit_videos=2",
    "ingest.volume_units=1",  # several volumes, each of which is packed and merged as soon as it is complete
    "engine.merge_commits=6",
    "cut.short_side=96",
    "pack.shard_bytes=1000000",
    "engine.publish_every_s=0.5",
    "engine.max_attempts=1000",  # failures here come from faults, not from sources
    "engine.downloads_per_node=2",
    "engine.batch_video_s=40",
    "engine.batch_clips=16",
    "download.retries=5",
    "download.backoff_s=0.1",
    f"download.stall_timeout_s={STALL_S}",
    "download.cooldown_s=0.5",
)
PROCESS_KINDS = ("driver", "worker", "actor", "node")
HTTP_KINDS = ("http-drop", "http-stall", "http-length", "http-429", "http-503")
KINDS = (*PROCESS_KINDS, *HTTP_KINDS, "torn", "disk-full")
# Tasks that a death can cost: those in flight on two nodes of one CPU and the head (downloads, cuts, models).
MOST_IN_FLIGHT = 3 * 2 + 3 + 2
DISK_BYTES = 400 << 20


@dataclass
class Summary:
    """Faults, repeated work, and what is wrong with the result."""

    faults: Counter = field(default_factory=Counter)
    num_builds: int = 0  # commands started
    num_needed: int = 0  # commits of the quiet build
    num_made: int = 0  # commits of the build under faults, repeated ones included
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def num_explained(self) -> int:
        """Most commits that the faults may have cost."""
        deaths = sum(self.faults[kind] for kind in (*PROCESS_KINDS, "disk-full"))
        return deaths * MOST_IN_FLIGHT + self.faults["torn"] + sum(self.faults[kind] for kind in HTTP_KINDS)

    @property
    def num_unexplained(self) -> int:
        return max(0, self.num_made - self.num_needed - self.num_explained)

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.faults[kind]} {kind}" for kind in KINDS if self.faults[kind])
        lines = [
            f"{self.faults.total()} faults in {self.seconds / 60:.1f} minutes: {kinds}",
            f"{self.num_builds} builds; {self.num_needed} commits were needed, {self.num_made} were made; the faults "
            f"explain up to {self.num_explained} more: {self.num_unexplained} are not explained",
            *(f"left out: {reason}" for reason in self.left_out),
            *(f"WRONG: {problem}" for problem in self.wrong),
        ]
        return "\n".join([*lines, "FAILED" if self.wrong else "the same bytes as the quiet build"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it, with the builds' output")
    arguments = parser.parse_args()
    with _scratch(arguments.keep) as folder:
        summary = torment(folder, arguments.faults, arguments.videos, arguments.seed, partial(print, flush=True))
    print(summary)
    sys.exit(bool(summary.wrong))


def torment(
    folder: Path,
    num_faults: int,
    num_videos: int,
    seed: int,
    say: Callable[[str], Any],
    kinds: tuple[str, ...] = KINDS,
    *,
    num_kinds: int = 1,
    num_nodes: int = 2,
    settings: Sequence[str] = SETTINGS,
) -> Summary:
    """Build undisturbed, build under at least `num_faults` faults of `num_kinds` kinds, and compare (in `folder`)."""
    from pipeline.demo.server import serve
    from pipeline.demo.world import WorldSettings, make_world, write_sources

    world, summary = folder / "world", Summary()
    broken = ("not-found", "html", "truncated", "empty", "audio-only", "duplicate")
    make_world(world, WorldSettings(num_videos=num_videos, min_video_s=15, max_video_s=30, broken=broken, seed=seed))
    spoiler, started = Spoiler(random.Random(seed)), time.monotonic()
    with serve(world, faults=spoiler) as base_url:
        spoiler.always = _listed_faults(world)
        sources = folder / "sources.jsonl"
        write_sources(world, base_url, sources)
        with _small_disk(folder / "disk", summary) as disk, local_cluster(num_nodes) as cluster:
            quiet = Build(folder / "quiet", sources, cluster.address, settings)
            with CommitCount(quiet.corpus) as needed:
                say(f"quiet build of {num_videos} videos")
                _finish(quiet)
            tormented = Build(disk / "corpus", sources, cluster.address, settings)
            with CommitCount(tormented.corpus) as made:
                chaos = Chaos(tormented, made, cluster, spoiler, seed)
                wanted = [kind for kind in kinds if kind != "disk-full" or not summary.left_out]
                summary.faults = chaos.run(num_faults, num_kinds, wanted, say)
                say("no more faults: the last build")
                spoiler.stop()
                _finish(tormented)
                again = made.total()
                _finish(tormented)
            summary.num_builds = tormented.num_started
            summary.num_needed, summary.num_made = needed.total(), made.total()
            if made.total() != again:
                summary.wrong.append(f"a build of the finished corpus made {made.total() - again} commits")
            _compare(quiet.corpus, tormented.corpus, folder / "tormented", summary)
    summary.seconds = time.monotonic() - started
    return summary


def _compare(quiet: Path, tormented: Path, keep_in: Path, summary: Summary) -> None:
    """Add what is wrong to the summary; copy a wrong corpus from the small disk, which is unmounted later."""
    summary.wrong += differences(quiet, tormented)
    summary.wrong += [f"orphan: {name}" for name in orphans(tormented)]
    if summary.num_unexplained:
        summary.wrong.append("more work was repeated than the faults explain")
    if summary.wrong:
        shutil.copytree(tormented, keep_in)


# -- the faults -------------------------------------------------------------------------------------------------------


class Chaos:
    """A loop that keeps a build running and injects faults into it, its cluster, its server and its disk."""

    def __init__(self, build: "Build", made: "CommitCount", cluster: "RayNodes", spoiler: "Spoiler", seed: int):
        self.build, self.made, self.cluster, self.spoiler = build, made, cluster, spoiler
        self.rng, self.faults = random.Random(seed), Counter()

    def run(self, num_faults: int, num_kinds: int, kinds: list[str], say: Callable[[str], Any]) -> Counter:
        """Inject faults until enough have had an effect; return their number by kind."""
        queue: list[str] = []
        while self._num_hit() < num_faults or len(+self.faults) < num_kinds:
            self._keep_building()
            queue = queue or self.rng.sample(kinds, len(kinds))
            time.sleep(self.rng.uniform(0.1, 5))
            kind = queue.pop()
            if self._strike(kind):
                self.faults[kind] += 1
                say(f"{self._num_hit():4} {kind}")
        return self.faults

    def _keep_building(self) -> None:
        """Restart a build that has ended and wait for its first commit; give a finished one work by damaging files.

        A build that is killed again before it does anything would test nothing.
        """
        if not self.build.running():
            if self.build.finished():
                self.faults["torn"] += self._tear(1, ["fragments/downloads/[!.]*.parquet"]) + self._tear(2)
            made = self.made.total()
            self.build.start()
            self._wait_for_more_than(made)

    def _wait_for_more_than(self, num_commits: int, timeout_s: float = 20) -> None:
        until = time.monotonic() + timeout_s
        while self.build.running() and self.made.total() <= num_commits and time.monotonic() < until:
            time.sleep(0.1)

    def _num_hit(self) -> int:
        self.faults.update(self.spoiler.take_spoilt())
        return self.faults.total()

    def _strike(self, kind: str) -> bool:
        """Inject a fault; return whether it had an effect. The server counts spoilt answers when it gives them."""
        match kind:
            case "driver":
                return self.build.kill()
            case "worker":
                return self._kill_one(lambda title: title.startswith("ray::") and not _is_actor(title))
            case "actor":
                return self._kill_one(_is_actor)
            case "node":
                return self.cluster.replace_one(self.rng)
            case "torn":
                return self._tear(1) > 0
            case "disk-full":
                return self._fill_disk()
        self.spoiler.order(kind)
        return False

    def _kill_one(self, wanted: Callable[[str], bool]) -> bool:
        """Kill a random worker whose title is wanted; return whether there was one."""
        victims = sorted((p for p in self.cluster.workers() if wanted(title_of(p))), key=lambda p: p.pid)
        if not victims:
            return False
        with suppress(psutil.NoSuchProcess):
            self.rng.choice(victims).kill()
            return True
        return False

    def _tear(self, num_files: int, of: Sequence[str] = ("fragments/*/[!.]*.parquet", "clips/[!.]*.tar")) -> int:
        """Truncate files as a crash without sync may leave them; return how many.

        While a build runs, the truncated copy gets a temporary name; else it replaces the file, and the next build has
        to repair it.
        """
        files = sorted(path for pattern in of for path in self.build.corpus.glob(pattern))
        torn = 0
        for path in self.rng.sample(files, min(num_files, len(files))):
            with suppress(FileNotFoundError):
                data = path.read_bytes()
                half = data[: self.rng.randrange(len(data))]
                if self.build.running():  # the build may have read the file already and still need it
                    path.with_name(f".tmp-{path.name}").write_bytes(half)
                else:
                    with atomic_file(path) as file:
                        file.write(half)
                torn += 1
        return torn

    def _fill_disk(self) -> bool:
        """Fill the disk until the build fails, or for three seconds; return whether there was a build to disturb."""
        ballast, room = self.build.corpus.parent / "ballast", shutil.disk_usage(self.build.corpus.parent).free
        if not self.build.running() or room == 0:
            return False
        try:
            with ballast.open("wb") as file, suppress(OSError):
                while True:
                    file.write(b"\0" * (1 << 20))
        except OSError:  # closing flushes the last block, which does not fit either
            pass
        until = time.monotonic() + 3
        while self.build.running() and time.monotonic() < until:
            time.sleep(0.05)
        ballast.unlink()
        return True


class Spoiler(dict):
    """The server's faults: always those of bad sources, and one bad answer for each fault that was ordered."""

    def __init__(self, rng: random.Random):
        super().__init__()
        self.rng, self.always = rng, {}
        self._ordered: list[str] = []
        self._spoilt: Counter = Counter()
        self._lock = threading.Lock()

    def get(self, name: str, default: Any = None) -> Any:
        """Return the faults of an answer: those of a bad source, or the ordered ones."""
        with self._lock:
            if name in self.always or not name.startswith("videos/") or not self._ordered:
                return self.always.get(name, default)
            kind = self._ordered.pop()
            self._spoilt[kind] += 1
        return self._answer(kind)

    def _answer(self, kind: str) -> dict[str, Any]:
        """Return the server's options for a fault."""
        some_bytes = self.rng.randrange(1, 200_000)
        return {
            "http-drop": {"cut_after_bytes": some_bytes},
            "http-stall": {"delay_s": 2 * STALL_S},
            "http-length": {"extra_bytes": self.rng.choice((-1, 1)) * self.rng.randrange(1, 2000)},
            "http-429": {"status": 429},
            "http-503": {"status": 503},
        }[kind]

    def order(self, kind: str) -> None:
        """Order one bad answer; at most three wait."""
        with self._lock:
            if len(self._ordered) < 3:
                self._ordered.append(kind)

    def take_spoilt(self) -> Counter:
        """Return the bad answers given since the last call, by kind."""
        with self._lock:
            taken, self._spoilt = self._spoilt, Counter()
        return taken

    def stop(self) -> None:
        """Cancel the ordered faults."""
        with self._lock:
            self._ordered.clear()


def _listed_faults(world: Path) -> dict[str, Any]:
    listed = world / "faults.json"
    return json.loads(listed.read_text()) if listed.exists() else {}


# -- what is hit ------------------------------------------------------------------------------------------------------


class Build:
    """The build command, which can be killed and restarted; its output goes to a file beside the list of sources."""

    def __init__(self, corpus: Path, sources: Path, address: str, settings: Sequence[str] = SETTINGS):
        self.corpus, self.sources, self.settings = corpus, sources, settings
        self.log = sources.with_name(f"{corpus.name}.log")
        self.environment = {**os.environ, "RAY_ADDRESS": address}
        self.process: subprocess.Popen | None = None
        self.num_started = 0

    def start(self) -> None:
        """Start the command."""
        settings = [word for setting in self.settings for word in ("--set", setting)]
        words = ["build", str(self.sources), "--corpus", str(self.corpus), "--recipe", "demo", *settings]
        self.num_started += 1
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "clipmill", *words],
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def running(self) -> bool:
        """Return whether the command runs."""
        return self.process is not None and self.process.poll() is None

    def finished(self) -> bool:
        """Return whether the command ended by itself; bad sources make its exit code 1."""
        return self.process is not None and self.process.poll() in (0, 1)

    def said(self) -> str:
        """Return what the last command printed."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")

    def kill(self) -> bool:
        """Kill the command and its processes; return whether it ran."""
        if not self.running():
            return False
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return True


def _finish(build: Build, timeout_s: float = 900) -> None:
    """Let the build end undisturbed; start it again once where an earlier fault makes it fail."""
    if not build.running():
        build.start()
    code = build.process.wait(timeout_s)
    if code not in (0, 1):  # an earlier fault has its effect only now
        build.start()
        code = build.process.wait(timeout_s)
    assert code in (0, 1) and "Traceback" not in build.said(), (
        f"the build ended with exit code {code}; its output is in {build.log}"
    )


class RayNodes:
    """A Ray cluster on this machine: a head and other nodes of one CPU, each with its own raylet and workers."""

    def __init__(self, num_nodes: int) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.nodes: list[Any] = []
        for _ in range(num_nodes):
            self.add(num_cpus=1)

    @property
    def address(self) -> str:
        return self.cluster.address

    def workers(self, nodes: Sequence[Any] | None = None) -> Iterator[psutil.Process]:
        """Yield the processes that run tasks and actors on these nodes (None: on all): children of their raylets."""
        for node in [self.cluster.head_node, *self.nodes] if nodes is None else nodes:
            for raylet in node.all_processes.get("raylet", []):
                with suppress(psutil.NoSuchProcess):
                    yield from (
                        p for p in psutil.Process(raylet.process.pid).children() if title_of(p).startswith("ray::")
                    )

    def add(self, **resources: Any) -> None:
        """Add a node; `resources` are those of `ray start`."""
        self.nodes.append(self.cluster.add_node(**resources))

    def remove(self, node: Any) -> None:
        """Kill a node without notice."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def replace_one(self, rng: random.Random) -> bool:
        """Kill a random node without notice and add another."""
        self.remove(rng.choice(self.nodes))
        self.add(num_cpus=1)
        return True


def title_of(process: psutil.Process) -> str:
    """Return a process's command line, in which Ray names what a worker does; empty when it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _is_actor(title: str) -> bool:
    return title.startswith(("ray::ModelWorker", "ray::HostRateLimiter", "ray::DownloadWorker"))


class CommitCount:
    """Count commits, repeated ones included: each renames its ledger fragment into place, which a new inode shows."""

    def __init__(self, corpus: Path):
        self.folder = corpus / "fragments" / "ledger"
        self._seen: set[tuple[str, int, int]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "CommitCount":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def total(self) -> int:
        """Return the number of commits so far."""
        self._look()
        return len(self._seen)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._look()

    def _look(self) -> None:
        """Note the ledger fragments that are new."""
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    if not entry.name.startswith((".", "merged-")):
                        stat = entry.stat()
                        self._seen.add((entry.name, stat.st_ino, stat.st_mtime_ns))


# -- where it happens -------------------------------------------------------------------------------------------------


@contextmanager
def _scratch(keep: Path | None) -> Iterator[Path]:
    """Yield the folder to work in: `keep`, or a temporary one."""
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="clipmill-chaos-") as folder:
        yield Path(folder)


@contextmanager
def _small_disk(folder: Path, summary: Summary) -> Iterator[Path]:
    """Mount a small tmpfs at `folder`; where that fails, say so in the summary and use the folder itself."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        summary.left_out.append("disk-full (mounting a tmpfs failed; it needs root)")
    try:
        yield folder
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def local_cluster(num_nodes: int = 2) -> Iterator[RayNodes]:
    """Run a Ray cluster whose files have their own folder, so that no other process joins it by chance."""
    with tempfile.TemporaryDirectory(prefix="cmc-", ignore_cleanup_errors=True) as folder:
        before = os.environ.get("RAY_TMPDIR")
        os.environ.update(RAY_TMPDIR=folder, RAY_USAGE_STATS_ENABLED="0")
        if own_token() is None:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        use_token()
        nodes = RayNodes(num_nodes)
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()
            os.environ.pop("RAY_TMPDIR")
            if before is not None:
                os.environ["RAY_TMPDIR"] = before


if __name__ == "__main__":
    main()
