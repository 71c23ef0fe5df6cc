"""Simulate a build of two weeks on 200 nodes through the real driver, ledger, publishing, packing plans and merging.

    python -m bench.scale.two_weeks [--sources 100000] [--nodes 200] [--folder DIR]

Workers are made up: a task ends after a realistic time on a clock of the simulation, and then its commit is really
written, with made-up rows. Some downloads fail, some for good, and some workers die. The driver runs as it is; the
seconds that it takes pass on the clock, too, those of writing commits do not. So the simulation tells how busy the
driver of such a cluster is, and whether it is busier at the end than at the beginning. Every twentieth of
the sources prints a line.

    busy     share of the time in which the driver worked. Gate: below 20 %
    per unit driver's seconds for a unit of 8 videos. Gate: in the last third at most 1.5 times those of the second
    idle     share of the cluster's cores that had no task
"""

import argparse
import hashlib
import heapq
import itertools
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pyarrow as pa

from clipmill.base.errors import ItemError
from pipeline.engine import driver, registry
from pipeline.engine.driver import Engine
from pipeline.engine.host_queue import HostQueue
from pipeline.engine.pools import WorkerFailure
from pipeline.engine.settings import resolve
from pipeline.runtime.task import Outcome, commit
from pipeline.stages.pack import planned
from pipeline.stages.pack_notes import Pack, PackFiles
from shards.corpus.folder import Corpus
from shards.corpus.fragments import table_schema, write_commit
from shards.corpus.ledger import Ledger
from shards.corpus.manifest import publish
from shards.corpus.schema import LEDGER
from shards.query.sql import open_manifest

UNIT_VIDEOS, VOLUME_UNITS, CLIPS = 8, 250, 10
CORES, GPUS, DOWNLOADS = 16, 1, 4  # of a node
# Seconds of a video in each stage: together some 380 core seconds, with which 200 nodes take two weeks for 10 million.
SECONDS = {"download": 40.0, "transcribe": 2.0, "segment": 0.5, "cut": 375.0, "caption": 12.0, "score": 6.0}
FAILS, FAILS_ONCE, DIES = 0.05, 0.02, 0.001  # shares of downloads, of downloads, of tasks
BUSY, GROWTH = 0.2, 1.5


@dataclass
class Clock:
    """The time of the simulation: it passes with that of the driver, and jumps when the driver waits."""

    jumped: float = 0.0
    paused: float = 0.0  # seconds in which the workers' commits were written here
    began: float = field(default_factory=time.perf_counter)

    @property
    def driver_s(self) -> float:
        return time.perf_counter() - self.began - self.paused

    def perf_counter(self) -> float:
        return self.driver_s + self.jumped

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        self.jumped += seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began


class SimulatedPools:
    """Stand in for `pipeline.engine.pools.Pools`, for a cluster that does not exist."""

    cut_off = False

    def __init__(self, clock: Clock, num_nodes: int, settings):
        self.clock, self.random = clock, random.Random(0)
        self.places = {"io": DOWNLOADS * num_nodes, "cpu": CORES * num_nodes, "model": GPUS * num_nodes}
        self.limits = {"io": self.places["io"], "cpu": self.places["cpu"] * 5 // 4, "model": 2 * self.places["model"]}
        self.sources = 32 * DOWNLOADS * num_nodes
        self.active_units = settings.active_units or 4 * self.places["cpu"] + self.limits["io"]
        self.num_shards = 1
        self.running = dict.fromkeys(self.limits, 0)
        self.num_sources = 0
        self.free = {pool: [0.0] * places for pool, places in self.places.items()}  # heaps: when each place is free
        self.ends: list[tuple[float, int]] = []  # a heap
        self.numbers = itertools.count()
        self.worked_s = 0.0  # of cores
        self.failed_once: set[str] = set()

    def warm_up(self, models: list) -> None: ...

    def close(self) -> None: ...

    @property
    def num_free_sources(self) -> int:
        return self.sources - self.num_sources

    def turns(self, flights: list) -> list[float]:
        return [0.0] * len(flights)

    def has_room(self, pool: str) -> bool:
        return self.running[pool] < self.limits[pool]

    def start(self, flight):
        stage, number = flight.task.stage, next(self.numbers)
        videos = len(flight.task.items) / (CLIPS if stage in ("caption", "score") else 1)
        seconds = SECONDS[stage] * videos * self.random.uniform(0.5, 1.5)
        begins = self.clock.perf_counter()
        if flight.host is not None:
            self.num_sources += 1
        else:
            pool = flight.stage.pool
            self.running[pool] += 1
            begins = max(begins, heapq.heappop(self.free[pool]))
            heapq.heappush(self.free[pool], begins + seconds)
            self.worked_s += seconds * (pool == "cpu")
        heapq.heappush(self.ends, (begins + seconds, number))
        return number

    def wait(self, references: list) -> list:
        """Return what has ended by now, else wait for the next end, at most half a second."""
        now = self.clock.perf_counter()
        if self.ends and self.ends[0][0] > now:
            self.clock.sleep(min(0.5, self.ends[0][0] - now))
            now = self.clock.perf_counter()
        ended = []
        while self.ends and self.ends[0][0] <= now:
            ended.append(heapq.heappop(self.ends)[1])
        return ended

    def result(self, reference, flight):
        if flight.host is not None:
            self.num_sources -= 1
        else:
            self.running[flight.stage.pool] -= 1
        if self.random.random() < DIES:
            return WorkerFailure("a node of the spot market went away")
        with self.clock.stopped():
            return commit(flight.task, [self._outcome(flight.task.stage, item) for item in flight.task.items], [])

    def _outcome(self, stage: str, item: dict) -> Outcome:
        item_id = item["item_id"]
        if stage == "download":
            share = int(_sha(item_id)[:8], 16) / 2**32
            if share < FAILS:
                return Outcome(item_id, failure=ItemError("unavailable", "This video is private", transient=False))
            if share < FAILS + FAILS_ONCE and item_id not in self.failed_once:
                self.failed_once.add(item_id)
                return Outcome(item_id, failure=ItemError("server-error", "503", transient=True))
        return Outcome(item_id, _ROWS[stage](item))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _download(item: dict) -> dict:
    video_id = item["item_id"]
    row = {"video_id": video_id, "path": f"sources/{video_id}.mp4", "sha256": _sha(video_id), "duration_s": 400.0}
    return {"downloads": [row | {"extractor": "youtube", "num_bytes": 20_000_000, "subtitles": []}]}


def _transcribe(item: dict) -> dict:
    row = {"video_id": item["item_id"], "language": "en", "origin": "manual", "words": [], "digest": item["item_id"]}
    return {"transcripts": [row]}


def _segment(item: dict) -> dict:
    video_id = item["item_id"]
    spans = [
        {"video_id": video_id, "clip_id": f"{video_id}.{n}", "n": n, "start_s": 40.0 * n, "end_s": 40.0 * n + 12.5}
        | {"text": _sha(f"{video_id} {n}"), "num_words": 12}
        for n in range(CLIPS)
    ]
    return {"spans": [span | {"origin": "sentences"} for span in spans], "sentences": spans}


def _cut(item: dict) -> dict:
    def clip(span: dict) -> dict:
        picture = _sha(f"{item['item_id']} {span['start_s']}")
        hashes = [int(picture[n : n + 16], 16) for n in (0, 16, 32)]
        times = {"span_start_s": span["start_s"], "span_end_s": span["end_s"], "duration_s": 12.5}
        frames = [{"time_s": 1.0, "sha256": picture, "offset": 0, "num_bytes": 20_000}]
        names = {"video_id": item["item_id"], "clip_id": span["clip_id"], "n": span["n"]}
        return names | times | {"frames": frames, "frame_sha256": picture, "phash": hashes, "num_bytes": 200_000}

    return {"clips": [clip(span) | {"sha256": _sha(span["clip_id"]), "tar": "clips/x.tar"} for span in item["spans"]]}


def _caption(item: dict) -> dict:
    row = {"clip_id": item["item_id"], "frame_index": 0, "frame_sha256": item["frames"][0]["sha256"], "score": -0.5}
    return {"captions": [row | {"captioner": "coca", "fingerprint": "1", "text": _sha(item["item_id"])}]}


def _score(item: dict) -> dict:
    row = {"clip_id": item["item_id"], "model": "clip", "frame_sha256": item["frame_sha256"]}
    return {"scores": [row | {"caption_similarity": 0.25}]}


_ROWS = {
    "download": _download,
    "transcribe": _transcribe,
    "segment": _segment,
    "cut": _cut,
    "caption": _caption,
    "score": _score,
}


class PlannedDelivery:
    """Plan each volume that is complete, as `pipeline.engine.delivery.Delivery` does; there are no media to write."""

    def __init__(self, engine: Engine, pack: Pack, num_at_once: int):
        self.engine, self.pack, self.waiting, self.offered, self.num_written = engine, pack, [], set(), 0

    def offer(self, volumes: list[int]) -> None:
        self.waiting += [volume for volume in volumes if volume not in self.offered]
        self.offered.update(volumes)

    def step(self) -> None:
        if self.waiting:
            root = self.engine.corpus.root
            with open_manifest(root) as connection:
                [(_, plans)] = planned(root, connection, self.pack, PackFiles({}, {}), [self.waiting.pop(0)])
            self.num_written += len(plans)

    def finish(self) -> None:
        while self.waiting:
            self.step()

    def close(self) -> None: ...


def list_sources(ledger: Ledger, num_sources: int) -> None:
    """Commit the sources, a volume at a time."""
    per_volume = UNIT_VIDEOS * VOLUME_UNITS
    for first in range(0, num_sources, per_volume):
        numbers = range(first, min(first + per_volume, num_sources))
        rows = [
            {
                "item_id": f"v{n:08d}",
                "video_id": f"v{n:08d}",
                "unit": f"u{n // UNIT_VIDEOS:06d}",
                "key": "i",
                "ordinal": n,
            }
            | {"url": f"https://video.example/watch?v=v{n:08d}", "kind": "url", "volume": first // per_volume}
            for n in numbers
        ]
        name = f"ingest-u{first // UNIT_VIDEOS:06d}-{first}"
        sources = pa.Table.from_pylist(rows, table_schema("sources"))
        write_commit(ledger.root, name, {"sources": sources}, LEDGER.empty_table(), [])
        ledger.load([name])


def simulate(root: Path, num_sources: int, num_nodes: int) -> dict[str, float]:
    """Run the build; return its figures."""
    Corpus(root).create()
    settings = resolve(None, None, ["engine.fsync=false"])
    ledger = Ledger(root, registry.stages(), memory_limit=settings.engine.driver_memory)
    list_sources(ledger, num_sources)
    clock, pools = Clock(), []

    def make_pools(engine_settings) -> SimulatedPools:
        pools.append(SimulatedPools(clock, num_nodes, engine_settings))
        return pools[0]

    marks: list[tuple[int, float, float]] = [(0, 0.0, 0.0)]  # videos scored, driver's seconds, seconds of the build

    def note(engine: Engine) -> None:
        num_videos = engine.report.by_stage["score"].done // CLIPS
        if num_videos >= (len(marks)) * num_sources // 20:
            marks.append((num_videos, clock.driver_s, clock.perf_counter()))
            print(
                f"{num_videos:9,} videos {clock.perf_counter() / 3600:8.2f} h, driver {clock.driver_s:8.1f} s",
                flush=True,
            )

    with (
        mock.patch.object(driver, "time", clock),
        mock.patch.object(driver, "Pools", make_pools),
        mock.patch.object(driver, "HostQueue", lambda: HostQueue(clock.monotonic)),
        mock.patch.object(driver, "Delivery", PlannedDelivery),
    ):
        clock.began = time.perf_counter()
        stages = [stage.name for stage in registry.stages()]
        engine = Engine(Corpus(root), settings, ledger, "simulated", stages, Pack("", settings.pack))
        engine.refresh_state()
        engine.run(note)
        in_loop = clock.driver_s
        ledger.merge_finished(settings.engine.merge_commits)
        engine.refresh_state()
        publish(ledger)
    hours, driver_s = clock.perf_counter() / 3600, clock.driver_s
    counts = ledger.counts()
    ledger.close()
    assert not any({"pending", "retry"} & set(of_stage) for of_stage in counts.values()), counts
    thirds = [marks[len(marks) * n // 3] for n in range(3)] + [marks[-1]]
    rates = [(b[1] - a[1]) / ((b[0] - a[0]) / UNIT_VIDEOS) for a, b in itertools.pairwise(thirds)]
    cores = CORES * num_nodes
    return {
        "hours": hours,
        "busy": in_loop / clock.perf_counter(),
        "per_unit": rates,
        "at_the_end_s": driver_s - in_loop,
        "idle": 1 - pools[0].worked_s / (clock.perf_counter() * cores),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the corpus is made; by default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        got = simulate(Path(folder) / "corpus", options.sources, options.nodes)
    first, second, last = got["per_unit"]
    growth = last / second
    print(
        f"{got['hours']:.1f} hours, driver busy {got['busy']:.0%}, cores idle {got['idle']:.0%}, "
        f"peak memory of this process {got['peak_mb']:,.0f} MB\n"
        f"driver's seconds per unit, by third: {first:.3f}, {second:.3f}, {last:.3f}; "
        f"merging and publishing at the end: {got['at_the_end_s']:.0f} s\n"
        f"by these, 10 million sources: {last * 10e6 / UNIT_VIDEOS / 3600:.0f} driver's hours in "
        f"{got['hours'] * 10e6 / options.sources / 24:.1f} days"
    )
    met = got["busy"] < BUSY and growth <= GROWTH
    print(
        f"gate {'met' if met else 'missed'}: busy below {BUSY:.0%}, a unit of the last third {growth:.2f} times as dear"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
