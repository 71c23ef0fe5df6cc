"""The driver: asks the ledger what is missing, gives it to Ray in pieces, loads what comes back, publishes.

One loop, one thread, one writer. A unit moves through the stages by itself: when nothing of it is in flight the ledger
is asked again what it lacks, so downloads, cutting and captioning of different units overlap, and nothing but unit
names is kept in memory. Ray's own retries are off: work whose worker dies is given again here, in single items if it
dies again, and becomes a failure row of the item. When all else is done such items get one last round, since workers
that died in a row (memory that ran out) say little of the item, and packing waits for its rows. Where
the node that carries this process is gone, nothing comes back but errors: it joins the cluster again by another one.
"""

import heapq
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from clipmill.base.errors import ItemError, UserError
from pipeline.engine.registry import STAGES, Stage, fingerprints
from pipeline.engine.settings import CorpusSettings
from pipeline.runtime.task import GOVERNOR, Outcome, Work, commit
from pipeline.runtime.watchdog import take_report
from shards.corpus.folder import Corpus
from shards.corpus.fragments import Commit
from shards.corpus.ledger import Ledger
from shards.corpus.manifest import publish

JOIN_ATTEMPTS = 4  # at joining a cluster
LOOK_EVERY_S = 3.0  # at the cluster's size
MAX_LOST = 12  # times that a piece of work may be lost with this process's node before that counts as a death
MAX_DEATHS = 3  # a piece of work whose worker died this often is split, and failed when it is a single item


@dataclass
class StageProgress:
    """Numbers of one stage in this run, as `status` and the progress display show them."""

    done: int = 0
    failed: int = 0
    in_flight: int = 0
    seconds: float = 0.0  # wall seconds of its finished tasks


@dataclass(eq=False)  # one is not another, though it carries the same
class Flight:
    work: Work
    deaths: int = 0
    num_lost: int = 0
    actor: object | None = None


@dataclass(frozen=True)
class Death:
    """What there is instead of a commit when a worker died."""

    message: str
    innocent: bool = False  # the work had not begun: it waited for an actor that another work killed
    lost: bool = False  # nobody knows: the node by which this process belongs to the cluster is gone


@dataclass
class EngineReport:
    num_done: int = 0
    num_failed: int = 0
    by_stage: dict[str, StageProgress] = field(default_factory=dict)
    loop_s: float = 0.0  # of the driver's own work: ledger, publishing


class Engine:
    """Runs stages over a corpus whose lock the caller holds."""

    def __init__(self, corpus: Corpus, settings: CorpusSettings, ledger: Ledger, run_id: str, stages: Sequence[str]):
        self.corpus, self.settings, self.ledger, self.run_id = corpus, settings, ledger, run_id
        self.fingerprints = fingerprints(settings)
        self.stages = [stage for stage in STAGES if stage.name in stages and self.fingerprints[stage.name]]
        self.report = EngineReport(by_stage={stage.name: StageProgress() for stage in self.stages})
        self.flights: dict[object, Flight] = {}
        self.queues: dict[str, list] = {"io": [], "cpu": [], "model": []}  # heaps: later stages first, then longest
        self.busy: dict[str, int] = {}  # unit → pieces queued or in flight
        self.order = 0
        self.published_at, self.publish_cost_s = -math.inf, 0.0
        self.given_up: list[tuple[str, str, int]] = []  # (stage, item, attempts) of those whose workers died too often

    def derive(self, units: Sequence[str] | None = None) -> None:
        self.ledger.derive(
            self.fingerprints, units=units, run_id=self.run_id, max_attempts=self.settings.engine.max_attempts
        )

    def publish(self) -> None:
        started = time.perf_counter()
        self.derive()
        publish(self.ledger, groups=False)
        self.publish_cost_s = time.perf_counter() - started
        self.published_at = time.perf_counter()

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self, on_tick: Callable[["Engine"], None]) -> EngineReport:
        """Work until nothing is pending. The ledger must have been derived for all units just before."""
        waiting = deque(self.ledger.units_with_work(stage.name for stage in self.stages))
        if not waiting:
            return self.report
        self._publish_when_due()  # before Ray starts: whoever asks sees the sources from now on
        self._join()
        try:
            self._work_off(waiting, on_tick)
            if self.given_up:
                self._work_off(self._last_round(), on_tick)
        finally:
            self.pools.close()
        return self.report

    def _join(self) -> None:
        self.pools = Pools(self.settings)
        models = [stage for stage in self.stages if stage.pool == "model"]
        if models:
            self.pools.warm_up({s.name: (s.settings(self.settings), self.fingerprints[s.name]) for s in models})

    def _join_again(self) -> None:
        """By another node. The cluster ends what a process sent that is gone for it, so all of it is sent again."""
        for flight in self.flights.values():
            self.report.by_stage[flight.work.stage].in_flight -= len(flight.work.items)
            self._enqueue(self._stage_of(flight.work), flight.work, flight.deaths, flight.num_lost + 1)
            self.busy[flight.work.unit] -= 1
        self.flights.clear()
        self.pools.leave()
        self._join()

    def _work_off(self, waiting: deque[str], on_tick: Callable[["Engine"], None]) -> None:
        """Work until these units lack nothing that can be had."""
        examine: list[str] = []
        while waiting or examine or self.flights or any(self.queues.values()):
            room = self.pools.active_units - len(self.busy) - len(examine)
            examine += [waiting.popleft() for _ in range(min(max(room, 0), len(waiting)))]
            self._examine(examine)
            self._submit()
            examine = self._collect()
            self._publish_when_due()
            on_tick(self)

    def _last_round(self) -> deque[str]:
        """The units of items that were given up, which may be tried once more, as far as their attempts go."""
        self.ledger.try_again(self.given_up)
        self.derive()
        counts = self.ledger.counts()
        for stage in self.stages:
            num_again = counts[stage.name].get("retry", 0)
            self.report.by_stage[stage.name].failed -= num_again
            self.report.num_failed -= num_again
        return deque(self.ledger.units_with_work(stage.name for stage in self.stages))

    def _examine(self, units: list[str]) -> None:
        """Ask what these units lack; queue the first stage of each that lacks something."""
        if not units:
            return
        started = time.perf_counter()
        self.derive(units)
        if self._fetch_lost_sources():
            self.derive(units)
        taken: set[str] = set()
        for stage in self.stages:
            by_unit: dict[str, list[dict]] = {}
            for item in self._work_of(stage, taken):
                by_unit.setdefault(item.pop("unit"), []).append(item)
            for unit, items in by_unit.items():
                taken.add(unit)
                for batch in self._batches(stage, items):
                    self._enqueue(stage, self._piece(stage, unit, batch))
        self.report.loop_s += time.perf_counter() - started

    def _fetch_lost_sources(self) -> bool:
        """Sources may have been deleted after cutting: what is to be read again is downloaded again first."""
        names = {stage.name for stage in self.stages}
        if "download" not in names:
            return False
        readers = [name for name in ("transcribe", "segment", "cut") if name in names]
        lost = [video_id for video_id, path in self.ledger.sources_of(readers) if not self.corpus.files.has(path)]
        self.ledger.force("download", lost)
        return bool(lost)

    def _work_of(self, stage: Stage, taken: set[str]) -> Iterator[dict]:
        """Items of a stage in the derived units that are not busy with a stage before it."""
        if not self.ledger.has_work(stage.name):
            return
        units = self.ledger.unit_of_work(stage.name)
        for item in self.ledger.work(stage.name):
            unit = units[item["item_id"]]
            if unit not in taken:
                yield {**item, "unit": unit}

    def _batches(self, stage: Stage, items: list[dict]) -> Iterator[list[dict]]:
        """Pieces of bounded cost, in item order, so that the same pending items make the same pieces."""
        engine = self.settings.engine
        limit = {"io": float("inf"), "cpu": engine.batch_video_s, "model": engine.batch_clips}[stage.pool]
        batch, cost = [], 0.0
        for item in items:
            if batch and cost + item["cost"] > limit:
                yield batch
                batch, cost = [], 0.0
            batch.append(item)
            cost += item["cost"]
        if batch:
            yield batch

    def _piece(self, stage: Stage, unit: str, items: list[dict]) -> Work:
        return Work(
            stage=stage.name,
            unit=unit,
            items=items,
            settings=stage.settings(self.settings),
            fingerprint=self.fingerprints[stage.name],
            root=str(self.corpus.root),
            run_id=self.run_id,
            store=self.corpus.store,
            holder=self.corpus.holder,
        )

    def _enqueue(self, stage: Stage, work: Work, deaths: int = 0, num_lost: int = 0) -> None:
        self.order += 1
        rank = -next(i for i, candidate in enumerate(STAGES) if candidate.name == stage.name)
        heapq.heappush(self.queues[stage.pool], (rank, -work.cost, self.order, Flight(work, deaths, num_lost)))
        self.busy[work.unit] = self.busy.get(work.unit, 0) + 1

    def _submit(self) -> None:
        for pool, queue in self.queues.items():
            while queue and self.pools.has_room(pool):
                flight = heapq.heappop(queue)[-1]
                self.flights[self.pools.start(pool, flight)] = flight
                self.report.by_stage[flight.work.stage].in_flight += len(flight.work.items)

    def _collect(self) -> list[str]:
        """Wait for something to finish, load it, and return the units that have nothing in flight any more."""
        commits, free = [], []
        for reference in self.pools.wait(list(self.flights)):
            flight = self.flights.pop(reference)
            self.report.by_stage[flight.work.stage].in_flight -= len(flight.work.items)
            result = self.pools.result(reference, flight)
            if isinstance(result, Commit):
                commits.append(result)
            else:
                commits += self._after_death(flight, result)
            self.busy[flight.work.unit] -= 1
            if not self.busy[flight.work.unit]:
                del self.busy[flight.work.unit]
                free.append(flight.work.unit)
        self._load(commits)
        if self.pools.cut_off:
            self._join_again()
        return free

    def _stage_of(self, work: Work) -> Stage:
        return next(stage for stage in self.stages if stage.name == work.stage)

    def _after_death(self, flight: Flight, death: Death) -> list[Commit]:
        """The worker died under this work: give it again, then item by item, and at last as a failure.

        What hung would hang again, so it is not given a second time as it was. What only waited for a worker that
        another work killed has no part in it.
        """
        lost = death.lost and flight.num_lost < MAX_LOST
        work, deaths = flight.work, flight.deaths + (not death.innocent and not lost)
        hung = take_report(self.corpus.root, work.name)
        stage = self._stage_of(work)
        if lost:
            self._enqueue(stage, work, deaths, flight.num_lost + 1)
        elif len(work.items) > 1 and (hung or deaths >= MAX_DEATHS - 1):
            for item in work.items:
                self._enqueue(stage, self._piece(stage, work.unit, [item]), deaths)
        elif deaths < MAX_DEATHS and not hung:
            self._enqueue(stage, work, deaths)
        else:
            error = ItemError("timeout" if hung else "worker-died", hung or death.message, transient=True)
            if not hung:
                self.given_up += [(work.stage, item["item_id"], item["attempts"] + 1) for item in work.items]
            return [commit(work, [Outcome(item["item_id"], failure=error) for item in work.items], [])]
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


class Pools:
    """Ray: one pool of small tasks that wait, one task per core, and actors that hold models, started when needed."""

    def __init__(self, settings: CorpusSettings):
        import ray

        self.ray, self.settings = ray, settings.engine
        self.started_ray = start_ray(settings)
        self.cut_off = False  # the node is gone by which this process belongs to the cluster
        self.running = {"io": 0, "cpu": 0}
        self._look()
        self.actors: dict[object, list[Flight]] = {}  # actor → pieces it has, the first of them running
        self.dead: dict[object, list[Flight]] = {}  # and those it had when it died
        self.governor = None
        self.task = ray.remote(max_retries=0)(_execute)

    def _look(self) -> None:
        """What the cluster has: nodes may have joined or left since the last look."""
        resources = self.ray.cluster_resources()
        nodes = sum(key.startswith("node:") and key != "node:__internal_head__" for key in resources)
        cpus, self.gpus = max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))
        self.limits = {
            "io": self.settings.downloads_per_node * max(1, nodes),
            "cpu": cpus + max(1, cpus // 4),  # a little more than runs, so that no core waits for the driver
        }
        self.active_units = self.settings.active_units or 4 * cpus + self.limits["io"]
        self.num_actors = self.settings.model_workers or self._num_actors(resources) or max(1, cpus // 8)
        self.looked_at = time.monotonic()

    def _num_actors(self, resources: dict[str, float]) -> int:
        """As many model actors as what they need is there for; 0 where they need nothing special."""
        needs = self.settings.model_resources or ({"GPU": 1} if self.gpus else {})
        return min((int(resources.get(name, 0) / amount) for name, amount in needs.items()), default=0)

    def has_room(self, pool: str) -> bool:
        if pool != "model":
            return self.running[pool] < self.limits[pool]
        self._start_actors()  # again where one has died
        return min(map(len, self.actors.values())) < 2  # one running, one waiting beside it

    def warm_up(self, settings: dict) -> None:
        """Start the actors at once, all of them: importing and loading their models takes as long as the first cuts."""
        self._start_actors()
        for actor in self.actors:
            actor.warm_up.remote(settings)

    def start(self, pool: str, flight: Flight):
        if pool == "model":
            actor = min(self.actors, key=lambda actor: len(self.actors[actor]))
            self.actors[actor].append(flight)
            flight.actor = actor
            return actor.execute.remote(flight.work)
        self.running[pool] += 1
        if pool == "io" and self.governor is None and any(item["kind"] == "url" for item in flight.work.items):
            self._start_governor(flight.work.settings)
        options = {"num_cpus": 1} if pool == "cpu" else {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        return self.task.options(**options, name=f"{flight.work.stage} {flight.work.unit}").remote(flight.work)

    def wait(self, references: list) -> list:
        if time.monotonic() - self.looked_at > LOOK_EVERY_S:
            self._look()
        if not references:
            return []
        ready, _ = self.ray.wait(references, num_returns=len(references), timeout=0.05)
        if ready:
            return ready
        ready, _ = self.ray.wait(references, num_returns=1, timeout=0.5)
        return ready

    def result(self, reference, flight: Flight) -> Commit | Death:
        """The commit, or what killed the worker."""
        if flight.actor is None:
            self.running[next(stage.pool for stage in STAGES if stage.name == flight.work.stage)] -= 1
        try:
            result = self.ray.get(reference)
            self._leave(flight)
            return result
        except self.ray.exceptions.RayActorError as error:
            if flight.actor in self.actors:
                self.dead[flight.actor] = self.actors.pop(flight.actor)
            return Death(str(error), innocent=self.dead[flight.actor][0] is not flight)
        except self.ray.exceptions.RayError as error:
            self._leave(flight)
            cause = getattr(error, "cause", None)
            if isinstance(cause, (UserError, OSError)):
                raise cause from None  # a setting that only the worker could check; a disk that takes no more
            lost = self.started_ray and isinstance(error, self.ray.exceptions.LocalRayletDiedError)
            self.cut_off = self.cut_off or lost
            return Death(str(error), lost=lost)

    def _leave(self, flight: Flight) -> None:
        if flight.actor is not None:
            (self.actors.get(flight.actor) or self.dead[flight.actor]).remove(flight)

    def _start_governor(self, settings) -> None:
        from pipeline.stages.download.host_limiter import HostRateLimiter

        remote = self.ray.remote(num_cpus=0)(HostRateLimiter)
        actor = remote.options(name=GOVERNOR, max_restarts=-1, max_task_retries=-1)
        self.governor = actor.remote(settings.per_host, settings.min_interval_s, patience_s=settings.lockout_patience_s)

    def _start_actors(self) -> None:
        options = {"num_cpus": self.settings.model_cpus, "num_gpus": 1 if self.gpus else 0, "max_restarts": 0}
        options["resources"] = self.settings.model_resources
        while len(self.actors) < self.num_actors:
            self.actors[self.ray.remote(**options)(ModelWorker).remote()] = []

    def leave(self) -> None:
        """A cluster that has lost this process already."""
        self.ray.shutdown()

    def close(self) -> None:
        for actor in [*self.actors, *([self.governor] if self.governor else [])]:
            self.ray.kill(actor)
        if self.started_ray:
            self.ray.shutdown()


class ModelWorker:
    """An actor: keeps its models between pieces of work (`captioning` caches them per process)."""

    def warm_up(self, settings: dict) -> None:
        from pipeline.runtime.task import limit_threads

        limit_threads()
        from pipeline.stages.model_workers import warm_up

        warm_up(settings)

    def execute(self, work: Work) -> Commit:
        return _execute(work)


def _execute(work: Work) -> Commit:
    from pipeline.runtime.task import execute, limit_threads

    limit_threads()
    return execute(work)


def start_ray(settings: CorpusSettings) -> bool:
    """Join the cluster that the settings or the environment name, else start Ray here. True when we started it."""
    import ray

    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    quiet = {"logging_level": "ERROR", "log_to_driver": False, "ignore_reinit_error": True}
    address = settings.engine.address or os.environ.get("RAY_ADDRESS")
    if address:
        _join(address, quiet)
    else:
        ray.init(num_cpus=settings.engine.cpus, include_dashboard=False, **quiet)
    return True


def _join(address: str, quiet: dict) -> None:
    """Raises UserError where no cluster answers. A node that has just died may be asked first: then the next one is."""
    import ray

    for attempt in range(JOIN_ATTEMPTS):
        try:
            ray.init(address=address, **quiet)
            return
        except ConnectionError as error:
            if attempt == JOIN_ATTEMPTS - 1:
                raise UserError(
                    f"engine.address or RAY_ADDRESS: the Ray cluster at {address} cannot be joined ({error})."
                ) from error
            time.sleep(3)
