"""Run tasks with Ray: two pools of small tasks, actors that hold models, and actors that download."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from clipmill.base.errors import UserError
from clipmill.base.ray_cluster import start_ray
from pipeline.runtime.task import HOST_LIMITER, NotNow, Result, Task, execute, limit_threads, load_model, sandbox
from pipeline.stages.download.host_limiter import HostRateLimiter
from pipeline.stages.stage import Stage
from shards.corpus.fragments import Commit

CHECK_CLUSTER_EVERY_S = 3.0  # for nodes that joined or left
SOURCES_PER_PROCESS = 32  # downloads at a time in a process, in which they mostly wait
FEW_SOURCES = 8  # in every process, before another one is started


@dataclass(eq=False)  # compared by identity: two of them may hold equal tasks
class InFlightTask:
    stage: Stage
    task: Task
    num_failures: int = 0  # workers that died while they ran it
    num_lost: int = 0
    actor: object | None = None
    host: str | None = None  # whose turn its one item has to wait for


@dataclass(frozen=True)
class WorkerFailure:
    """Result returned when a worker died."""

    message: str
    not_started: bool = False  # the task was waiting for an actor that died while it ran another task
    lost: bool = False  # the node that connects this process to the cluster died, so the task's fate is unknown


class Pools:
    """Ray: one pool of small tasks that wait, one task per core, and actors that hold models, started when needed.

    settings: `EngineSettings`.
    """

    def __init__(self, settings):
        import ray

        self.ray, self.settings = ray, settings
        self.started_ray = start_ray(
            settings.address, settings.cpus, setting="engine.address", allow_open=settings.allow_open_cluster
        )
        self.cut_off = False  # the node that connects this process to the cluster died
        self.running = {"io": 0, "cpu": 0}
        self._check_cluster()
        self.actors: dict[object, list[InFlightTask]] = {}  # actor → its tasks, of which the first is running
        self.dead: dict[object, list[InFlightTask]] = {}  # actor that died → its tasks
        self.downloaders: dict[object, set[InFlightTask]] = {}  # actor → its tasks, all of which are running
        self.num_sources = 0  # tasks of one source that are running, here or alone
        self.host_limiter = None
        self.remote_run = ray.remote(max_retries=0)(_run)

    def _check_cluster(self) -> None:
        resources = self.ray.cluster_resources()
        nodes = sum(key.startswith("node:") and key != "node:__internal_head__" for key in resources)
        cpus, self.gpus = max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))
        self.limits = {
            "io": self.settings.downloads_per_node * max(1, nodes),
            "source": self.settings.downloads_per_node * max(1, nodes) * SOURCES_PER_PROCESS,
            "cpu": cpus + max(1, cpus // 4),  # a few more than run at once, so that no core waits for the driver
        }
        self.num_shards = max(1, cpus // 8)  # written at a time: their tasks mostly copy
        self.active_units = self.settings.active_units or 4 * cpus + self.limits["io"]
        needs = self.settings.model_resources or ({"GPU": 1} if self.gpus else {})
        available = min((int(resources.get(name, 0) / amount) for name, amount in needs.items()), default=0)
        self.num_actors = self.settings.model_workers or available or max(1, cpus // 8)
        self.checked_at = time.monotonic()

    @property
    def num_free_sources(self) -> int:
        return self.limits["source"] - self.num_sources

    def turns(self, flights: Sequence[InFlightTask]) -> list[float]:
        """Ask for the turn of each task: 0.0 if it is given, else the seconds after which to ask again, or LOCKED_OUT.

        A turn that is given must be used by `start` at once.
        """
        if self.host_limiter is None:
            limits, actor = flights[0].task.settings, self.ray.remote(num_cpus=0)(HostRateLimiter)
            actor = actor.options(name=HOST_LIMITER, max_restarts=-1, max_task_retries=-1)
            patience_s = limits.lockout_patience_s
            self.host_limiter = actor.remote(limits.per_host, limits.min_interval_s, patience_s=patience_s)
        wanted = [(flight.host, flight.task.client) for flight in flights]
        try:
            return self.ray.get(self.host_limiter.acquire_all.remote(wanted))
        except self.ray.exceptions.RayError as error:
            self.cut_off = self.cut_off or self._is_lost(error)
            return [CHECK_CLUSTER_EVERY_S] * len(wanted)  # it is restarted by then

    def has_room(self, pool: str) -> bool:
        if pool != "model":
            return self.running[pool] < self.limits[pool]
        self._start_actors()  # replaces those that died
        return min(map(len, self.actors.values())) < 2  # one running, one waiting

    def warm_up(self, models: list[tuple[Callable, Any, str]]) -> None:
        """Start all actors now and let them load these models (load, settings, fingerprint of a stage).

        Importing and loading takes about as long as cutting the first clips.
        """
        self._start_actors()
        for actor in self.actors:
            actor.warm_up.remote(models)

    def start(self, flight: InFlightTask):
        """Submit a task; return Ray's reference to its result."""
        pool, task = flight.stage.pool, flight.task
        if pool == "model":
            actor = min(self.actors, key=lambda actor: len(self.actors[actor]))
            self.actors[actor].append(flight)
            flight.actor = actor
            return actor.run.remote(flight.stage.run, task)
        if flight.host is not None:
            self.num_sources += 1
            if not flight.num_failures:  # a task whose worker died runs in a process of its own, to endanger no other
                flight.actor = self._downloader()
                self.downloaders[flight.actor].add(flight)
                return flight.actor.run.remote(flight.stage.run, task)
            flight.actor = None
        else:
            self.running[pool] += 1
        options = {"num_cpus": 1} if pool == "cpu" else {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        return self.remote_run.options(**options, name=f"{task.stage} {task.unit}").remote(flight.stage.run, task)

    def wait(self, references: list) -> list:
        """Wait up to half a second for one of the tasks to finish; return all that have finished."""
        if time.monotonic() - self.checked_at > CHECK_CLUSTER_EVERY_S:
            self._check_cluster()
        if not references:
            return []
        ready, _ = self.ray.wait(references, num_returns=len(references), timeout=0.05)
        if ready:
            return ready
        ready, _ = self.ray.wait(references, num_returns=1, timeout=0.5)
        return ready

    def _downloader(self):
        """Return the download process with the fewest tasks; start another one if all have a few."""
        fewest = min(self.downloaders, key=lambda actor: len(self.downloaders[actor]), default=None)
        num_allowed = self.limits["source"] // SOURCES_PER_PROCESS
        if fewest is None or (len(self.downloaders[fewest]) >= FEW_SOURCES and len(self.downloaders) < num_allowed):
            options = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": SOURCES_PER_PROCESS}
            fewest = self.ray.remote(**options, scheduling_strategy="SPREAD")(DownloadWorker).remote()
            self.downloaders[fewest] = set()
        return fewest

    def result(self, reference, flight: InFlightTask) -> Commit | NotNow | WorkerFailure:
        """Return a finished task's commit, the wait for its host, or the failure of its worker.

        Raises UserError or OSError of the worker: a setting that only it could check, a disk that is full.
        """
        if flight.host is not None:
            self.num_sources -= 1
        elif flight.actor is None:
            self.running[flight.stage.pool] -= 1
        try:
            result = self.ray.get(reference)
            self._remove_from_actor(flight)
            return result
        except self.ray.exceptions.RayActorError as error:
            if flight.host is not None:
                self.downloaders.pop(flight.actor, None)
                return WorkerFailure(str(error))
            if flight.actor in self.actors:
                self.dead[flight.actor] = self.actors.pop(flight.actor)
            return WorkerFailure(str(error), not_started=self.dead[flight.actor][0] is not flight)
        except self.ray.exceptions.RayError as error:
            self._remove_from_actor(flight)
            cause = getattr(error, "cause", None)
            if isinstance(cause, (UserError, OSError)):
                raise cause from None
            lost = self._is_lost(error)
            self.cut_off = self.cut_off or lost
            return WorkerFailure(str(error), lost=lost)

    def _is_lost(self, error: Exception) -> bool:
        return self.started_ray and isinstance(error, self.ray.exceptions.LocalRayletDiedError)

    def _remove_from_actor(self, flight: InFlightTask) -> None:
        if flight.host is not None:
            self.downloaders.get(flight.actor, set()).discard(flight)
        elif flight.actor is not None:
            (self.actors.get(flight.actor) or self.dead[flight.actor]).remove(flight)

    def _start_actors(self) -> None:
        options = {"num_cpus": self.settings.model_cpus, "num_gpus": 1 if self.gpus else 0, "max_restarts": 0}
        options["resources"] = self.settings.model_resources
        while len(self.actors) < self.num_actors:
            self.actors[self.ray.remote(**options)(ModelWorker).remote()] = []

    def leave(self) -> None:
        """Disconnect from a cluster that has lost this process already."""
        self.ray.shutdown()

    def close(self) -> None:
        for actor in [*self.actors, *self.downloaders, *([self.host_limiter] if self.host_limiter else [])]:
            self.ray.kill(actor)
        if self.started_ray:
            self.ray.shutdown()


class ModelWorker:
    """An actor: models stay loaded between tasks, because `captioning` caches them per process."""

    def warm_up(self, models: list[tuple[Callable, Any, str]]) -> None:
        limit_threads()
        for load, settings, fingerprint in models:
            load_model(load, settings, fingerprint)

    def run(self, run: Callable[[Task], Result], task: Task) -> Commit:
        return _run(run, task)


class DownloadWorker:
    """An actor: downloads many sources at a time, each in a thread and as a task of its own."""

    def __init__(self):
        sandbox()  # before the threads start, so that they share one

    def run(self, run: Callable[[Task], Result | NotNow], task: Task) -> Commit | NotNow:
        return _run(run, task)


def _run(run: Callable[[Task], Result | NotNow], task: Task) -> Commit | NotNow:
    limit_threads()
    return execute(run, task)
