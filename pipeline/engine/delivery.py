"""Pack each volume as soon as it is complete, so that a training can begin while the build goes on.

The driver calls `offer` after it has published, and `step` between its other work: a step plans the next volume, or
sends the shards of one to Ray, or collects those that are written. What goes wrong here ends no build: the packing at
its end makes what is missing, and says what it cannot make. Both write the same bytes, because the shards of a volume
depend on nothing else.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from clipmill.base.errors import UserError
from pipeline.stages.pack import VolumePacking, note_packed, planned, refresh_indexes, write_task
from pipeline.stages.pack_notes import Pack, PackFiles, current_notes, states_of
from shards.query.sql import open_manifest


class Delivery:
    """The volumes that wait to be packed, and the one that is being packed.

    session      has the corpus, the ledger and the run's id, as `pipeline.engine.build.Session` has
    num_at_once  shards that Ray writes at a time
    """

    def __init__(self, session, pack: Pack, num_at_once: int):
        import ray

        self.session, self.pack, self.num_at_once, self.ray = session, pack, num_at_once, ray
        self.write = ray.remote(num_cpus=1)(write_task)  # writing again gives the same bytes, so Ray may retry
        self.num_written = 0  # shards
        self.waiting: deque[int] = deque()
        self.offered: set[int] = set()  # a volume is packed once; what changes it later is for the end of the build
        self.manifest = ExitStack()  # of the volume that is being packed
        self.packing: VolumePacking | None = None
        self.tasks: Iterator[tuple] = iter(())
        self.in_flight: list[Any] = []  # Ray's references

    def offer(self, volumes: Iterable[int]) -> None:
        """Take volumes that are complete and published."""
        new = [volume for volume in volumes if volume not in self.offered]
        self.offered.update(new)
        if not new:
            return
        corpus = self.session.corpus
        with open_manifest(corpus.root) as connection:
            corpus.files.refresh("shards")
            states = states_of(corpus, connection, self.pack, PackFiles.of(corpus.root, self.pack))
        noted = current_notes(corpus, states, self.pack)
        self.waiting.extend(volume for volume in new if volume in states and volume not in noted)

    def step(self) -> None:
        """Do the next bit of work. Never waits for a shard."""
        if self.packing is None and self.waiting:
            self._begin(self.waiting.popleft())
        if self.packing is not None:
            self._advance(timeout_s=0)

    def finish(self) -> None:
        """Complete the volume whose shards are being written, and leave out the others."""
        while self.packing is not None:
            self._advance(timeout_s=None)

    def _begin(self, volume: int) -> None:
        root = self.session.corpus.root
        try:
            self.connection = self.manifest.enter_context(open_manifest(root))
            files = PackFiles.of(root, self.pack)
            [(_, plans)] = planned(root, self.connection, self.pack, files, [volume])
        except UserError:  # of pack.where: the packing at the end tells the user
            self.close()
            return
        self.packing = VolumePacking(self.session, self.pack, volume, plans, files=files)
        self.tasks = self.packing.tasks(self.connection)

    def _advance(self, timeout_s: float | None) -> None:
        assert self.packing is not None
        while len(self.in_flight) < self.num_at_once and (task := next(self.tasks, None)):
            self.in_flight.append(self.write.remote(*task))
        try:
            if self.in_flight:
                done, self.in_flight = self.ray.wait(self.in_flight, timeout=timeout_s)
                for failures in self.ray.get(done):
                    self.packing.add(failures)
            if self.packing.is_written:
                self._put_in_place()
        except self.ray.exceptions.RayError:
            self.close()

    def _put_in_place(self) -> None:
        assert self.packing is not None
        corpus, report = self.session.corpus, self.packing.commit()
        volumes = [volume for volume in report.planned if volume is not None]
        refresh_indexes(corpus.root, self.connection, self.pack, volumes, report.committed)
        # The note is of the manifest that the volume was planned from, not of one that was published since.
        note_packed(corpus, self.connection, self.pack, report)
        self.num_written += report.num_written
        self.close()

    def close(self) -> None:
        """Stop the tasks that are still writing."""
        for reference in self.in_flight:
            self.ray.cancel(reference)
        self.drop()

    def drop(self) -> None:
        """Leave out the volume that is being packed; the cluster has lost its tasks."""
        self.manifest.close()
        self.manifest, self.packing, self.tasks, self.in_flight = ExitStack(), None, iter(()), []
