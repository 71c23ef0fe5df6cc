"""Drive a build: find pending items in the ledger, submit them to Ray as tasks, load the commits, publish.

One loop, one thread, one writer. Units move through the stages independently: when no task of a unit is in flight, the
ledger is asked for the unit's next pending items. So downloads, cutting and captioning of different units overlap, and
only the names of units are kept in memory.

Downloads hold nothing up: each is a task and a commit of its own, waits for its host outside the pools, and what is
downloaded of a unit goes on while the rest of it is awaited.

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
from pipeline.engine.delivery import Delivery
from pipeline.engine.host_queue import HostQueue
from pipeline.engine.pools import InFlightTask, Pools, WorkerFailure
from pipeline.engine.registry import fingerprints, stages
from pipeline.engine.settings import CorpusSettings
from pipeline.runtime.source_file import file_stamp
from pipeline.runtime.task import NotNow, Outcome, Task, commit
from pipeline.runtime.watchdog import take_report
from pipeline.stages.download.host_limiter import LOCKED_OUT, locked_out
from pipeline.stages.ingest.private_urls import full_urls
from pipeline.stages.pack_notes import Pack
from pipeline.stages.stage import Stage
from shards.corpus.folder import Corpus
from shards.corpus.fragments import Commit
from shards.corpus.ledger import Ledger, SourceFile
from shards.corpus.manifest import publish

MAX_LOST = 12  # times that a task may be lost with this process's node before that counts as a worker failure
MAX_WAITING = 10_000  # sources that wait for their hosts before no further unit is looked at
UNIT_WAITS_S = 30.0  # that a unit's finished downloads wait for its other ones, so that they go on in one task
# Seconds between two questions to the ledger, in multiples of what the last one took: one about many units costs little
# more than one about a single unit. The first number holds while cores have nothing to do, the second while they have.
PATIENCE = (4, 20)
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
    loop_s: float = 0.0  # time of the driver's own work: ledger, publishing, planning shards
    num_delivered: int = 0  # shards of volumes that were packed while others were not complete


class Backlog:
    """The units with pending items in some stages, read from the ledger a volume at a time."""

    def __init__(self, ledger: Ledger, stages: Sequence[str]):
        self.ledger, self.stages = ledger, stages
        self.volumes, self.units = deque(ledger.volumes_with_work(stages)), deque()

    def __bool__(self) -> bool:
        return bool(self.volumes or self.units)

    def take(self, most: int) -> list[str]:
        """Return the next units, fewer at the end of a volume."""
        if most > 0 and not self.units and self.volumes:
            self.ledger.show(self.volumes.popleft())
            self.units.extend(self.ledger.units_with_work(self.stages))
        return [self.units.popleft() for _ in range(min(most, len(self.units)))]


class Engine:
    """Run stages over a corpus whose lock the caller holds.

    pack  the pack whose volumes are packed as soon as they are complete; None: none
    """

    def __init__(
        self,
        corpus: Corpus,
        settings: CorpusSettings,
        ledger: Ledger,
        run_id: str,
        names: Sequence[str],
        pack: Pack | None = None,
    ):
        self.corpus, self.settings, self.ledger, self.run_id = corpus, settings.revealed(), ledger, run_id
        self.fingerprints = fingerprints(settings)
        self.secrets = {stage.name: self._secrets_of(settings, stage.name) for stage in stages()}
        self.stages = [stage for stage in stages() if stage.name in names and self.fingerprints[stage.name]]
        self.report = EngineReport(by_stage={stage.name: StageProgress() for stage in self.stages})
        self.in_flight: dict[object, InFlightTask] = {}  # by Ray's reference to the result
        self.queues: dict[str, list] = {"io": [], "cpu": [], "model": []}  # heaps: later stages first, then longest
        self.busy: dict[str, int] = {}  # unit → number of its tasks that are queued or in flight
        self.waiting = HostQueue()  # downloads that wait for their hosts
        self.downloads: dict[str, set[str]] = {}  # unit → videos that wait or are being downloaded
        self.downloaded_at: dict[str, float] = {}  # unit → first of its downloads that the ledger was not asked about
        self.new_commits: list[str] = []  # that the ledger has not loaded
        self.order = 0
        self.published_at, self.publish_cost_s = -math.inf, 0.0
        self.examined_at, self.examine_cost_s = -math.inf, 0.0
        self.pack = pack if pack and pack.has_own_volumes else None
        self.delivery: Delivery | None = None
        self.exhausted: list[tuple[str, str, int]] = []  # (stage, item, attempts) whose workers died too often

    def _secrets_of(self, settings: CorpusSettings, stage: str) -> tuple[str, ...]:
        return tuple(getattr(self.settings, stage).known_secrets(getattr(settings, stage)))

    def refresh_state(self, units: Sequence[str] | None = None) -> None:
        """Derive the items of these units, None: of all, with the commits that have come since the last time."""
        self._load_commits()
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
        waiting = Backlog(self.ledger, [stage.name for stage in self.stages])
        if not waiting:
            return self.report
        self._publish_when_due()  # before Ray starts, so that queries see the new sources at once
        self._join()
        try:
            self._run_units(waiting, on_tick)
            # A copy that was downloaded after its video had been cut may bring spans for it.
            self.refresh_state()
            self._run_units(Backlog(self.ledger, waiting.stages), on_tick)
            if self.exhausted:
                self._run_units(self._last_round(), on_tick)
            self._deliver(to_the_end=True)
        finally:
            if self.delivery:
                self.delivery.close()
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
        if self.pack and not self.delivery:
            self.delivery = Delivery(self, self.pack, self.pools.num_shards)

    def _join_again(self) -> None:
        """Join through another node. The cluster ended all tasks of this process, so they are submitted again."""
        for flight in self.in_flight.values():
            self.report.by_stage[flight.task.stage].in_flight -= len(flight.task.items)
            self._enqueue(flight.stage, flight.task, flight.num_failures, flight.num_lost + 1)
            if flight.host is None:
                self.busy[flight.task.unit] -= 1
        self.in_flight.clear()
        if self.delivery:
            self.delivery.drop()
        self.pools.leave()
        self._join()

    def _run_units(self, waiting: Backlog, on_tick: Callable[["Engine"], None]) -> None:
        """Run tasks until nothing of these units is pending."""
        examine: list[str] = []
        while waiting or examine or self.in_flight or self.waiting or self.downloaded_at or any(self.queues.values()):
            examine += waiting.take(self._room(examine))
            if examine and self._is_time_to_examine():
                self._examine(examine)
                examine = []
            self._start_downloads()
            for pool, queue in self.queues.items():
                while queue and self.pools.has_room(pool):
                    flight = heapq.heappop(queue)[-1]
                    self._start(flight)
            if not self.in_flight and (self.waiting or self.downloaded_at):
                time.sleep(min(0.5, self.waiting.next_in_s()))
            examine = list(dict.fromkeys([*examine, *self._collect()]))
            self._publish_when_due()
            self._deliver()
            on_tick(self)
        self._load_commits()

    def _room(self, examine: Sequence[str]) -> int:
        """Return how many units may be looked at besides these. A unit that only waits for downloads takes no room.

        While there are places for downloads, all that wait do so for their hosts.
        """
        if self.pools.num_free_sources <= 0 or len(self.waiting) >= MAX_WAITING:
            return 0
        return max(0, self.pools.active_units - len({*self.busy, *self.downloaded_at, *examine}))

    def _start(self, flight: InFlightTask) -> None:
        self.in_flight[self.pools.start(flight)] = flight
        self.report.by_stage[flight.task.stage].in_flight += len(flight.task.items)

    def _start_downloads(self) -> None:
        """Start the downloads whose hosts give them their turn, as many as there are places for."""
        while due := self.waiting.due(self.pools.num_free_sources):
            for flight, wait_s in zip(due, self.pools.turns(due), strict=True):
                if wait_s > 0:
                    self.waiting.wait(flight, wait_s)
                    continue
                self.waiting.remove(flight)
                if wait_s == LOCKED_OUT:
                    error = locked_out(flight.host)
                    outcomes = [Outcome(item["item_id"], failure=error) for item in flight.task.items]
                    self._note_commits([commit(flight.task, outcomes, [])])
                    self._download_ended(flight.task)
                else:
                    self._start(flight)

    def _download_ended(self, task: Task) -> None:
        """Note that a download is committed, and that the ledger has to be asked about its unit."""
        videos = self.downloads[task.unit]
        videos.difference_update(item["item_id"] for item in task.items)
        if not videos:
            del self.downloads[task.unit]
        self.downloaded_at.setdefault(task.unit, time.monotonic())

    def _downloaded_units(self) -> list[str]:
        """Return the units whose finished downloads go on now: no other download of theirs ends within UNIT_WAITS_S."""
        now = time.monotonic()
        return [
            unit
            for unit, at in self.downloaded_at.items()
            if unit not in self.busy and (unit not in self.downloads or now - at >= UNIT_WAITS_S)
        ]

    def _last_round(self) -> Backlog:
        """Make the exhausted items pending once more, if they have attempts left; return their units."""
        self.ledger.try_again(self.exhausted)
        self.refresh_state()
        counts = self.ledger.counts()
        for stage in self.stages:
            num_again = counts[stage.name].get("retry", 0)
            self.report.by_stage[stage.name].failed -= num_again
            self.report.num_failed -= num_again
        return Backlog(self.ledger, [stage.name for stage in self.stages])

    def _is_time_to_examine(self) -> bool:
        """Return whether to ask the ledger now about the units that have no tasks, or to wait until they are more."""
        if not self.in_flight and not any(self.queues.values()):
            return True
        cores_wait = not self.queues["cpu"] and self.pools.has_room("cpu")
        return time.perf_counter() - self.examined_at >= PATIENCE[not cores_wait] * self.examine_cost_s

    def _examine(self, units: list[str]) -> None:
        """Find the pending items of these units; queue tasks of the first stage with any, for each unit."""
        started = time.perf_counter()
        by_volume: dict[int, list[str]] = {}
        for unit in units:
            by_volume.setdefault(self.ledger.volume_of(unit), []).append(unit)
        for of_volume in by_volume.values():
            self._examine_volume(of_volume)
        self.examined_at = time.perf_counter()
        self.examine_cost_s = self.examined_at - started
        self.report.loop_s += self.examined_at - started

    def _examine_volume(self, units: list[str]) -> None:
        self.refresh_state(units)
        if self._fetch_lost_sources():
            self.refresh_state(units)
        for unit in units:
            self.downloaded_at.pop(unit, None)
        taken: set[str] = set()
        for stage in self.stages:
            by_unit: dict[str, list[dict]] = {}
            if self.ledger.has_work(stage.name):
                units = self.ledger.unit_of_work(stage.name)
                for item in self.ledger.work(stage.name):
                    by_unit.setdefault(units[item["item_id"]], []).append(item)
            for unit, items in by_unit.items():
                if unit in taken:
                    continue
                if stage.host:
                    self._enqueue_downloads(stage, unit, items)
                downloading = self.downloads.get(unit, set())  # no stage may read a source that is being replaced
                items = [item for item in items if item["item_id"] not in downloading]
                if items:
                    taken.add(unit)
                for batch in self._batches(stage, items):
                    self._enqueue(stage, self._task(stage, unit, batch))

    def _enqueue_downloads(self, stage: Stage, unit: str, items: list[dict]) -> None:
        """Make a task of each item that waits for a host, unless there is one."""
        for item in items:
            if stage.host(item) is not None and item["item_id"] not in self.downloads.get(unit, set()):
                self._enqueue(stage, self._task(stage, unit, [item]))

    def _fetch_lost_sources(self) -> bool:
        """Download again the sources that a pending item has to read and that were deleted or changed.

        A local file that a list names is not copied: it is hashed again if its stamp is another. A copy that was only
        touched still has its bytes, so it is downloaded only after a stage has found other ones.
        """
        if "download" not in (stage.name for stage in self.stages):
            return False
        readers = [stage.name for stage in self.stages if stage.reads_source]
        lost = [source.video_id for source in self.ledger.sources_of(readers) if self._is_lost(source)]
        lost += self.ledger.retry_changed(readers, self.run_id)
        self.ledger.mark_pending("download", lost)
        return bool(lost)

    def _is_lost(self, source: SourceFile) -> bool:
        if not source.in_place and not self.corpus.files.has(source.path):
            return True
        path = self.corpus.root / source.path
        if self.corpus.store or not path.is_file():
            return False
        return path.stat().st_size != source.num_bytes or (source.in_place and file_stamp(path) != source.stamp)

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
            fsync=self.settings.engine.fsync and self.corpus.store is None,  # a store keeps what it has accepted
            secrets=self.secrets[stage.name],
        )

    def _enqueue(self, stage: Stage, task: Task, num_failures: int = 0, num_lost: int = 0, wait_s: float = 0.0) -> None:
        host = stage.host(task.items[0]) if stage.host else None
        if host is not None:
            self.downloads.setdefault(task.unit, set()).add(task.items[0]["item_id"])
            self.waiting.add(InFlightTask(stage, task, num_failures, num_lost, host=host), wait_s)
            return
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
            if isinstance(result, NotNow):
                item = flight.task.items[0] | {"so_far": result.so_far}
                task = self._task(flight.stage, unit, [item])
                self._enqueue(flight.stage, task, flight.num_failures, flight.num_lost, result.wait_s)
                continue
            made = [result] if isinstance(result, Commit) else self._after_worker_failure(flight, result)
            commits += made
            if flight.host is not None:
                self.waiting.ask_now(flight.host)
                if made:
                    self._download_ended(flight.task)
                continue
            self.busy[unit] -= 1
            if not self.busy[unit]:
                del self.busy[unit]
                free.append(unit)
        self._note_commits(commits)
        if self.pools.cut_off:
            self._join_again()
        return list(dict.fromkeys([*free, *self._downloaded_units()]))

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

    def _load_commits(self) -> None:
        names, self.new_commits = self.new_commits, []
        self.ledger.load(names)

    def _note_commits(self, commits: list[Commit]) -> None:
        """Count what was done, and let the ledger have it when it is asked next: all at once costs less."""
        self.new_commits += [result.name for result in commits]
        for result in commits:
            progress = self.report.by_stage[result.stage]
            progress.done += result.num_done
            progress.failed += result.num_failed
            progress.seconds += result.wall_s
            self.report.num_done += result.num_done
            self.report.num_failed += result.num_failed

    def _publish_when_due(self) -> None:
        wait_s = max(self.settings.engine.publish_every_s, 20 * self.publish_cost_s)
        if time.perf_counter() - self.published_at >= wait_s:
            self.publish()
            self.report.loop_s += self.publish_cost_s
            if self.delivery:
                self.delivery.offer(self._complete_volumes())

    def _deliver(self, *, to_the_end: bool = False) -> None:
        """Go on with packing the volumes that are complete."""
        if self.delivery:
            started = time.perf_counter()
            self.delivery.finish() if to_the_end else self.delivery.step()
            self.report.num_delivered = self.delivery.num_written
            self.report.loop_s += time.perf_counter() - started

    def _complete_volumes(self) -> list[int]:
        """Return the volumes without pending work, after `refresh_state` for all units."""
        pending = set(self.ledger.volumes_with_work([stage.name for stage in self.stages]))
        if self.exhausted:  # they are tried once more at the end
            pending.update(self.ledger.volumes_of({item_id.partition(".")[0] for _, item_id, _ in self.exhausted}))
        return [volume for volume in self.ledger.volumes() if volume not in pending]


def _with_full_urls(items: list[dict]) -> list[dict]:
    """Put the passwords and signatures of URLs back, which are in the user's state folder and not in the corpus."""
    full = full_urls(item["item_id"] for item in items)
    if not full:
        return items
    return [
        item | {name: full.get((item["item_id"], item[name]), item[name]) for name in ("url", "subtitle")}
        for item in items
    ]
