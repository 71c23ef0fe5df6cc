"""Drive a build: find pending items in the ledger, submit them to Ray as tasks, load the commits, publish.

One loop, one thread, one writer. Units move through the stages independently: when no task of a unit is in flight, the
ledger is asked for the unit's next pending items. So downloads, cutting and captioning of different units overlap, and
only the names of units are kept in memory.

Ray's own retries are off. A task whose worker dies is submitted again here, item by item if its workers die again, and
then becomes a failure of the item. At the end such items get one last round: workers that died in a row, perhaps for
lack of memory, prove little about the item, and packing waits for its rows. If the node that connects this
process to the cluster dies, every task ends in an error: the driver then joins the cluster again through another node.
"""

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from clipmill.base.errors import ItemError
from pipeline.engine.pools import InFlightTask, Pools, WorkerFailure
from pipeline.engine.registry import fingerprints, stages
from pipeline.engine.settings import CorpusSettings
from pipeline.runtime.task import Outcome, Task, commit
from pipeline.runtime.watchdog import take_report
from pipeline.stages.ingest.private_urls import full_urls
from pipeline.stages.stage import Stage
from shards.corpus.folder import Corpus
from shards.corpus.fragments import Commit
from shards.corpus.ledger import Ledger
from shards.corpus.manifest import publish

MAX_LOST = 12  # times that a task may be lost with this process's node before that counts as a worker failure
MAX_WORKER_FAILURES = 3  # before the last of them a task is split into items; a task of one item then fails


@dataclass
class StageProgress:
    """Counts of one stage in this run, as `status` and the progress display show them."""

    done: int = 0
    failed: int = 0
    in_flight: int = 0
    seconds: float = 0.0  # wall seconds of its finished tasks


@dataclass
class EngineReport:
    num_done: int = 0
    num_failed: int = 0
    by_stage: dict[str, StageProgress] = field(default_factory=dict)
    loop_s: float = 0.0  # time of the driver's own work: ledger, publishing


class Engine:
    """Run stages over a corpus whose lock the caller holds."""

    def __init__(self, corpus: Corpus, settings: CorpusSettings, ledger: Ledger, run_id: str, names: Sequence[str]):
        self.corpus, self.settings, self.ledger, self.run_id = corpus, settings.revealed(), ledger, run_id
        self.fingerprints = fingerprints(settings)
        self.secrets = {stage.name: self._secrets_of(settings, stage.name) for stage in stages()}
        self.stages = [stage for stage in stages() if stage.name in names and self.fingerprints[stage.name]]
        self.report = EngineReport(by_stage={stage.name: StageProgress() for stage in self.stages})
        self.in_flight: dict[object, InFlightTask] = {}  # by Ray's reference to the result
        self.queues: dict[str, list] = {"io": [], "cpu": [], "model": []}  # heaps: later stages first, then longest
        self.busy: dict[str, int] = {}  # unit → number of its tasks that are queued or in flight
        self.order = 0
        self.published_at, self.publish_cost_s = -math.inf, 0.0
        self.exhausted: list[tuple[str, str, int]] = []  # (stage, item, attempts) whose workers died too often

    def _secrets_of(self, settings: CorpusSettings, stage: str) -> tuple[str, ...]:
        return tuple(getattr(self.settings, stage).known_secrets(getattr(settings, stage)))

    def refresh_state(self, units: Sequence[str] | None = None) -> None:
        self.ledger.refresh_state(
            self.fingerprints, units=units, run_id=self.run_id, max_attempts=self.settings.engine.max_attempts
        )

    def publish(self) -> None:
        started = time.perf_counter()
        self.refresh_state()
        publish(self.ledger, groups=False)
        self.publish_cost_s = time.perf_counter() - started
        self.published_at = time.perf_counter()

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self, on_tick: Callable[["Engine"], None]) -> EngineReport:
        """Run tasks until nothing is pending. Call `refresh_state` for all units just before."""
        waiting = deque(self.ledger.units_with_work(stage.name for stage in self.stages))
        if not waiting:
            return self.report
        self._publish_when_due()  # before Ray starts, so that queries see the new sources at once
        self._join()
        try:
            self._run_units(waiting, on_tick)
            if self.exhausted:
                self._run_units(self._last_round(), on_tick)
        finally:
            self.pools.close()
        return self.report

    def _join(self) -> None:
        self.pools = Pools(self.settings.engine)
        models = [
            (stage.load, getattr(self.settings, stage.name), self.fingerprints[stage.name])
            for stage in self.stages
            if stage.pool == "model" and stage.load
        ]
        if models:
            self.pools.warm_up(models)

    def _join_again(self) -> None:
        """Join through another node. The cluster ended all tasks of this process, so they are submitted again."""
        for flight in self.in_flight.values():
            self.report.by_stage[flight.task.stage].in_flight -= len(flight.task.items)
            self._enqueue(flight.stage, flight.task, flight.num_failures, flight.num_lost + 1)
            self.busy[flight.task.unit] -= 1
        self.in_flight.clear()
        self.pools.leave()
        self._join()

    def _run_units(self, waiting: deque[str], on_tick: Callable[["Engine"], None]) -> None:
        """Run tasks until nothing of these units is pending."""
        examine: list[str] = []
        while waiting or examine or self.in_flight or any(self.queues.values()):
            room = self.pools.active_units - len(self.busy) - len(examine)
            examine += [waiting.popleft() for _ in range(min(max(room, 0), len(waiting)))]
            self._examine(examine)
            for pool, queue in self.queues.items():
                while queue and self.pools.has_room(pool):
                    flight = heapq.heappop(queue)[-1]
                    self.in_flight[self.pools.start(flight)] = flight
                    self.report.by_stage[flight.task.stage].in_flight += len(flight.task.items)
            examine = self._collect()
            self._publish_when_due()
            on_tick(self)

    def _last_round(self) -> deque[str]:
        """Make the exhausted items pending once more, if they have attempts left; return their units."""
        self.ledger.try_again(self.exhausted)
        self.refresh_state()
        counts = self.ledger.counts()
        for stage in self.stages:
            num_again = counts[stage.name].get("retry", 0)
            self.report.by_stage[stage.name].failed -= num_again
            self.report.num_failed -= num_again
        return deque(self.ledger.units_with_work(stage.name for stage in self.stages))

    def _examine(self, units: list[str]) -> None:
        """Find the pending items of these units; queue tasks of the first stage with any, for each unit."""
        if not units:
            return
        started = time.perf_counter()
        self.refresh_state(units)
        if self._fetch_lost_sources():
            self.refresh_state(units)
        taken: set[str] = set()
        for stage in self.stages:
            by_unit: dict[str, list[dict]] = {}
            if self.ledger.has_work(stage.name):
                units = self.ledger.unit_of_work(stage.name)
                for item in self.ledger.work(stage.name):
                    by_unit.setdefault(units[item["item_id"]], []).append(item)
            for unit, items in by_unit.items():
                if unit not in taken:
                    taken.add(unit)
                    for batch in self._batches(stage, items):
                        self._enqueue(stage, self._task(stage, unit, batch))
        self.report.loop_s += time.perf_counter() - started

    def _fetch_lost_sources(self) -> bool:
        """Download again the sources that were deleted after cutting and that a pending item has to read."""
        if "download" not in (stage.name for stage in self.stages):
            return False
        readers = [stage.name for stage in self.stages if stage.reads_source]
        lost = [video_id for video_id, path in self.ledger.sources_of(readers) if not self.corpus.files.has(path)]
        self.ledger.mark_pending("download", lost)
        return bool(lost)

    def _batches(self, stage: Stage, items: list[dict]) -> Iterator[list[dict]]:
        """Split items into batches of bounded cost, in item order: the same pending items make the same batches."""
        engine = self.settings.engine
        limit = engine.batch_video_s if stage.item == "video" else engine.batch_clips
        limit = math.inf if stage.pool == "io" else limit
        batch, cost = [], 0.0
        for item in items:
            if batch and cost + item["cost"] > limit:
                yield batch
                batch, cost = [], 0.0
            batch.append(item)
            cost += item["cost"]
        if batch:
            yield batch

    def _task(self, stage: Stage, unit: str, items: list[dict]) -> Task:
        if stage.name == "download":
            items = _with_full_urls(items)
        return Task(
            stage=stage.name,
            unit=unit,
            items=items,
            settings=getattr(self.settings, stage.name),
            fingerprint=self.fingerprints[stage.name],
            root=str(self.corpus.root),
            run_id=self.run_id,
            store=self.corpus.store,
            lock_owner=self.corpus.lock_owner,
            secrets=self.secrets[stage.name],
        )

    def _enqueue(self, stage: Stage, task: Task, num_failures: int = 0, num_lost: int = 0) -> None:
        self.order += 1
        rank = -self.stages.index(stage)
        entry = (rank, -task.cost, self.order, InFlightTask(stage, task, num_failures, num_lost))
        heapq.heappush(self.queues[stage.pool], entry)
        self.busy[task.unit] = self.busy.get(task.unit, 0) + 1

    def _collect(self) -> list[str]:
        """Wait for tasks to finish, load their commits, return the units without further tasks."""
        commits, free = [], []
        for reference in self.pools.wait(list(self.in_flight)):
            flight = self.in_flight.pop(reference)
            unit = flight.task.unit
            self.report.by_stage[flight.task.stage].in_flight -= len(flight.task.items)
            result = self.pools.result(reference, flight)
            if isinstance(result, Commit):
                commits.append(result)
            else:
                commits += self._after_worker_failure(flight, result)
            self.busy[unit] -= 1
            if not self.busy[unit]:
                del self.busy[unit]
                free.append(unit)
        self._load(commits)
        if self.pools.cut_off:
            self._join_again()
        return free

    def _after_worker_failure(self, flight: InFlightTask, failure: WorkerFailure) -> list[Commit]:
        """Submit the task again, then item by item, and finally commit a failure of the item.

        A task that hung would hang again, so it is split at once. The failure does not count for a task that only
        waited for the worker.
        """
        lost = failure.lost and flight.num_lost < MAX_LOST
        stage, task = flight.stage, flight.task
        num_failures = flight.num_failures + (not failure.not_started and not lost)
        hung = take_report(self.corpus.root, task.name)
        if lost:
            self._enqueue(stage, task, num_failures, flight.num_lost + 1)
        elif len(task.items) > 1 and (hung or num_failures >= MAX_WORKER_FAILURES - 1):
            for item in task.items:
                self._enqueue(stage, self._task(stage, task.unit, [item]), num_failures)
        elif num_failures < MAX_WORKER_FAILURES and not hung:
            self._enqueue(stage, task, num_failures)
        else:
            error = ItemError("timeout" if hung else "worker-died", hung or failure.message, transient=True)
            if not hung:
                self.exhausted += [(task.stage, item["item_id"], item["attempts"] + 1) for item in task.items]
            return [commit(task, [Outcome(item["item_id"], failure=error) for item in task.items], [])]
        return []

    def _load(self, commits: list[Commit]) -> None:
        started = time.perf_counter()
        self.ledger.load([result.name for result in commits])
        for result in commits:
            progress = self.report.by_stage[result.stage]
            progress.done += result.num_done
            progress.failed += result.num_failed
            progress.seconds += result.wall_s
            self.report.num_done += result.num_done
            self.report.num_failed += result.num_failed
        self.report.loop_s += time.perf_counter() - started

    def _publish_when_due(self) -> None:
        wait_s = max(self.settings.engine.publish_every_s, 20 * self.publish_cost_s)
        if time.perf_counter() - self.published_at >= wait_s:
            self.publish()
            self.report.loop_s += self.publish_cost_s


def _with_full_urls(items: list[dict]) -> list[dict]:
    """Put the passwords and signatures of URLs back, which are in the user's state folder and not in the corpus."""
    full = full_urls(item["item_id"] for item in items)
    if not full:
        return items
    return [
        item | {name: full.get((item["item_id"], item[name]), item[name]) for name in ("url", "subtitle")}
        for item in items
    ]
