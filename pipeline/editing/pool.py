"""Edit units in this process or in Ray actors side by side, with the same rows either way."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from clipmill.base.errors import UserError
from clipmill.base.ray_cluster import ray_cluster
from pipeline.editing.worker import Editor, Job, Plan, Texts
from shards.corpus.fragments import Commit
from training.editing.scores import Bank


class Editors(Protocol):
    """Some `Editor`s, used as one."""

    def banks(self, weights: Sequence[str], texts: Texts) -> list[Bank | None]: ...
    def scores(self, jobs: Sequence[Job]) -> Iterator[list[float]]: ...
    def edit(self, jobs: Sequence[Job]) -> Iterator[Commit]: ...


@contextmanager
def pool(plan: Plan, num_workers: int, device: str, *, allow_open: bool = False) -> Iterator[Editors]:
    """Open editors: this process or Ray actors. Raises UserError if actors keep dying.

    allow_open  see `clipmill.base.ray_cluster.start_ray`
    """
    if num_workers == 1:
        yield _Here(plan)
        return
    import ray

    cpus = max(num_workers, os.cpu_count() or 1)
    with ray_cluster(cpus=cpus, allow_open=allow_open, show_output=True):
        use_gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) >= num_workers
        actor = ray.remote(Editor).options(num_gpus=int(use_gpu), max_restarts=2, max_task_retries=2)
        actors = [actor.remote(plan) for _ in range(num_workers)]
        try:
            yield _Actors(actors)
        except ray.exceptions.ActorDiedError as error:
            raise UserError(
                f"--workers {num_workers}: workers keep dying ({error}). Committed edits are kept: repeat the command, "
                "with fewer workers if memory runs out."
            ) from error
        finally:
            for one in actors:
                ray.kill(one)


class _Here:
    def __init__(self, plan: Plan):
        self.editor = Editor(plan)

    def banks(self, weights: Sequence[str], texts: Texts) -> list[Bank | None]:
        return self.editor.banks(weights, texts)

    def scores(self, jobs: Sequence[Job]) -> Iterator[list[float]]:
        return map(self.editor.present_scores, jobs)

    def edit(self, jobs: Sequence[Job]) -> Iterator[Commit]:
        return map(self.editor.edit, jobs)


class _Actors:
    def __init__(self, actors: list[Any]):
        self.actors = actors

    def banks(self, weights: Sequence[str], texts: Texts) -> list[Bank | None]:
        import ray

        return ray.get(self.actors[0].banks.remote(list(weights), texts))

    def scores(self, jobs: Sequence[Job]) -> Iterator[list[float]]:
        return self._map("present_scores", jobs)

    def edit(self, jobs: Sequence[Job]) -> Iterator[Commit]:
        return self._map("edit", jobs)

    def _map(self, method: str, jobs: Sequence[Job]) -> Iterator[Any]:
        """Map over jobs in order, each run by the first actor that is free."""
        from ray.util import ActorPool

        return ActorPool(self.actors).map(lambda actor, job: getattr(actor, method).remote(job), list(jobs))
