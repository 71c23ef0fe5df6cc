"""Batches for one process, in step order, from any step to any step, read ahead by a few other processes.

1. The plan says which rows a step takes (`training.data.epoch_files`); this process takes its slots of them (`rank_slots`).
2. A step's slots are cut into parts, so that all loader processes work on the batch that is needed next.
3. `training.data.sample_reader` reads a part; `training.data.reader_pool` has that done in other processes, in order, within a fixed
   amount of memory. A thread puts parts together to batches: pixels copied into place, texts padded to the longest.
4. A sample is a pure function of (row, epoch), so batches depend neither on how many processes read nor on where
   reading began: resuming at a step is beginning there.

Unreadable samples are masked holes. They are counted against `data.max_failures`, and handed on for `failures.jsonl`.
"""

import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.corpus.tombstones import FORGOTTEN
from training.data.batch import Batch
from training.data.epoch_files import Epochs
from training.data.epoch_plan import locate
from training.data.reader_pool import LoaderError, Pool, Request, warm_up
from training.data.sample_reader import HOLE, Canvas, Failure, Part, SampleReader, join

__all__ = ["Loader", "LoaderTimes", "SampleReader", "default_processes", "requests_of"]

PART_SAMPLES = 16  # at most: large enough that a shard's neighbours are read together and messages cost nothing
_BATCHES_AHEAD = 1  # put together and waiting, besides the one in the making and what the slots hold
_JUDGED_AFTER = 100  # samples: before that, a share says nothing


@dataclass
class LoaderTimes:
    """Seconds since the loader began, summed over its processes but for `wait_s`."""

    read_s: float = 0.0  # waiting for bytes
    decode_s: float = 0.0  # from bytes to pixels
    wait_s: float = 0.0  # the consumer waited for the next batch


class Loader:
    """Use as a context: its processes end with it. One `read` at a time.

    num_processes     0: read in this process, when asked; None: see `default_processes`
    prefetch_samples  read ahead at most; each takes (T + 1) x 3 x S x S bytes of shared memory
    max_failures      share of unreadable samples above which reading stops with a UserError
    on_failures       called with every batch's failures, in the order of batches, before the batch is given out
    pin_memory        batches lie in page-locked memory, from which a GPU copies while it computes
    """

    def __init__(
        self,
        reader: SampleReader,
        *,
        num_processes: int | None = None,
        prefetch_samples: int = 256,
        max_failures: float = 1.0,
        on_failures: Callable[[list[Failure]], None] = lambda failures: None,
        pin_memory: bool = False,
    ):
        self.reader, self.on_failures = reader, on_failures
        self.num_processes = default_processes() if num_processes is None else num_processes
        self.prefetch_samples, self.max_failures = prefetch_samples, max_failures
        self._buffers = _Buffers(pin_memory)
        self.times = LoaderTimes()
        self.num_read = self.num_failed = 0
        self.reasons: Counter[str] = Counter()
        self._reading: Iterator[Batch] | None = None
        if self.num_processes:
            warm_up(reader)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        self._end_reading()
        self.reader.close()

    def _end_reading(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def batches(self, epochs: Epochs, slots: slice, start_step: int, end_step: int) -> Iterator[Batch]:
        """One batch for each step from `start_step` up to but not including `end_step`."""
        return self.read(requests_of(epochs, slots, start_step, end_step))

    def read(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """One batch for each request, in order. Raises UserError over too many failures."""
        self._end_reading()
        self._reading = self._read(requests)
        return self._reading

    def _read(self, requests: Iterable[Request]) -> Iterator[Batch]:
        loaded = self._alone(requests) if self.num_processes == 0 else self._together(requests)
        try:
            while True:
                began = time.perf_counter()
                item = next(loaded, None)
                self.times.wait_s += time.perf_counter() - began
                if item is None:
                    return
                self._count(item)
                yield item.batch()
        finally:
            loaded.close()

    # --- In this process

    def _alone(self, requests: Iterable[Request]) -> Iterator[Part]:
        for request in requests:
            maker = _BatchMaker(len(request.rows), self.reader, self._buffers)
            for piece in _pieces(request, PART_SAMPLES):
                maker.add(self.reader.read(piece.rows, piece.epoch, canvas=maker.room(len(piece.rows))))
            yield maker.joined()

    # --- With others

    def _together(self, requests: Iterable[Request]) -> Iterator[Part]:
        """A thread puts batches together while the consumer computes."""
        ready: queue.Queue[Any] = queue.Queue(_BATCHES_AHEAD)
        stop = threading.Event()

        def give(item: Any) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            try:
                for item in self._assembled(requests, stop):
                    if not give(item):
                        return
                give(None)
            except BaseException as error:  # raised again where the consumer sees it
                give(error)

        thread = threading.Thread(target=work, name="clipmill-loader", daemon=True)
        thread.start()

        def halt() -> None:
            stop.set()
            thread.join()

        # Also when the process ends while somebody is still reading: before multiprocessing ends its children.
        halted = Finalize(thread, halt, exitpriority=10)
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            halted()

    def _assembled(self, requests: Iterable[Request], stop: threading.Event) -> Iterator[Part]:
        requests = iter(requests)
        first = next(requests, None)
        if first is None:
            return
        part_size = self._part_size(len(first.rows))
        num_slots = max(1, self.prefetch_samples // part_size)
        with Pool(self.reader, self.num_processes, part_size, num_slots, stop) as pool:
            sizes: queue.SimpleQueue[int] = queue.SimpleQueue()

            def pieces() -> Iterator[Request]:
                for request in _chain(first, requests):
                    sizes.put(len(request.rows))
                    yield from _pieces(request, part_size)

            maker: _BatchMaker | None = None
            for part in pool.parts(pieces()):
                maker = maker or _BatchMaker(sizes.get(), self.reader, self._buffers)
                maker.room(len(part.rows_B)).copy(part.canvas)
                maker.add(part)
                if maker.complete:
                    yield maker.joined()
                    maker = None

    def _part_size(self, batch_size: int) -> int:
        """Small enough that every process has a share of each batch, and that a few parts for each fit into memory:
        they are handed out in order, so while one is late others wait in theirs.
        """
        share, room = -(-batch_size // self.num_processes), self.prefetch_samples // (4 * self.num_processes)
        return max(1, min(PART_SAMPLES, share, room))

    # --- Failures

    def _count(self, item: Part) -> None:
        """Raises UserError over the budget."""
        failures = item.failures
        self.times.read_s += item.read_s
        self.times.decode_s += item.decode_s
        self.num_read += int(np.count_nonzero(item.rows_B != HOLE))
        self.num_failed += sum(failure.error.error_class != FORGOTTEN for failure in failures)
        self.reasons.update(failure.error.error_class for failure in failures)
        if failures:
            self.on_failures(failures)
        if self.num_read >= _JUDGED_AFTER and self.num_failed > self.max_failures * self.num_read:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common(3))
            last = f" The last: {failures[-1].clip_id}: {failures[-1].error}." if failures else ""
            raise LoaderError(
                f"{self.num_failed} of {self.num_read} samples cannot be read ({reasons}); data.max_failures = "
                f"{self.max_failures:g} allows a share of so much.{last} Allowed: a data.where that leaves them out, "
                "or a higher data.max_failures."
            )


def requests_of(epochs: Epochs, slots: slice, start_step: int, end_step: int) -> Iterator[Request]:
    """What a process's batches of these steps are made of."""
    for step in range(start_step, end_step):
        yield Request(epochs.rows(step)[slots], locate(epochs.spec, step)[0])


def default_processes(local_world_size: int = 1) -> int:
    """One per core, shared among the training processes of a host."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def _chain(first: Request, rest: Iterator[Request]) -> Iterator[Request]:
    yield first
    yield from rest


def _pieces(request: Request, size: int) -> Iterator[Request]:
    for start in range(0, len(request.rows), size):
        yield Request(request.rows[start : start + size], request.epoch)


class _Buffers:
    """Memory for batches. What nobody looks at any more is used again: fresh memory costs a page fault every 4 KB.

    Page-locked memory is torch's to use again, which knows when a copy to a GPU has ended.
    """

    def __init__(self, pin_memory: bool):
        self.pin_memory = pin_memory
        self.buffers: list[NDArray[np.uint8]] = []

    def take(self, num_bytes: int) -> Tensor:
        if self.pin_memory:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.buffers = [buffer for buffer in self.buffers if len(buffer) == num_bytes]
        for number in range(len(self.buffers)):
            if sys.getrefcount(self.buffers[number]) == 2:  # the list's, and this call's: no tensor is on it
                return torch.from_numpy(self.buffers[number])
        self.buffers.append(np.empty(num_bytes, np.uint8))
        return torch.from_numpy(self.buffers[-1])


class _BatchMaker:
    """A batch in the making."""

    def __init__(self, num_samples: int, reader: SampleReader, buffers: _Buffers):
        self.canvas = reader.canvas(num_samples, buffers.take(num_samples * reader.sample_bytes))
        self.num_samples, self.num_done = num_samples, 0
        self.parts: list[Part] = []

    @property
    def complete(self) -> bool:
        return self.num_done == self.num_samples

    def room(self, num_samples: int) -> Canvas:
        """Where the next part's pixels belong."""
        return self.canvas.part(slice(self.num_done, self.num_done + num_samples))

    def add(self, part: Part) -> None:
        part.canvas = None  # of a slot that is about to be used again
        self.parts.append(part)
        self.num_done += len(part.rows_B)

    def joined(self) -> Part:
        return join(self.parts, self.canvas)
