"""Load batches for one process, in step order, from any step to any step, read ahead by other processes.

1. The plan has the rows of each step (`training.data.epoch_files`); this process reads its slots (`rank_slots`).
2. A step's slots are cut into parts, so that all loader processes work on the batch that is needed next.
3. `training.data.sample_reader` reads a part; `training.data.reader_pool` runs it in other processes, in order and
   within a fixed amount of memory. A thread joins parts to batches: it copies pixels into place and pads texts.
4. A sample is a pure function of (row, epoch), so batches depend neither on the number of processes nor on the first
   step: resuming at a step means starting there.

Unreadable samples are masked holes. They count against `data.max_failures` and are reported for `failures.jsonl`.
"""

import itertools
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
from training.data.sample_reader import HOLE, Failure, PartialBatch, PixelBuffer, SampleReader, join

__all__ = ["Loader", "LoaderTimes", "SampleReader", "default_processes", "requests_of"]

PART_SAMPLES = 16  # at most; enough that neighbours in a shard are one read and the cost of messages is negligible
_BATCHES_AHEAD = 1  # joined and waiting, besides the one being joined and the parts in slots
_MIN_JUDGED = 100  # samples read before the share of failures is checked


@dataclass
class LoaderTimes:
    """Seconds since the loader started, summed over its processes except for `wait_s`."""

    read_s: float = 0.0  # waiting for bytes
    decode_s: float = 0.0  # from bytes to pixels
    wait_s: float = 0.0  # the consumer waited for the next batch


class Loader:
    """A context manager of loader processes; it runs one `read` at a time.

    num_processes     0: read in this process, on demand; None: `default_processes()`
    prefetch_samples  samples read ahead at most; each takes (T + 1) x 3 x S x S bytes of shared memory
    max_failures      share of unreadable samples above which reading stops with a UserError
    on_failures       called with each batch's failures, in the order of batches, before the batch is yielded
    pin_memory        put batches into page-locked memory, from which a GPU copies while it computes

    Example: `with Loader(reader) as loader: for batch in loader.batches(epochs, slots, 0, 100): ...`
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
        """Yield one batch for each step from `start_step` up to but not including `end_step`."""
        return self.read(requests_of(epochs, slots, start_step, end_step))

    def read(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Yield one batch for each request, in order. Raises UserError if too many samples fail."""
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

    def _alone(self, requests: Iterable[Request]) -> Iterator[PartialBatch]:
        for rows, epoch in requests:
            parts, pixels = [], self._new_pixels(len(rows))
            for start in range(0, len(rows), PART_SAMPLES):
                slots = slice(start, min(start + PART_SAMPLES, len(rows)))
                parts.append(self.reader.read(rows[slots], epoch, pixels=pixels.part(slots)))
            yield join(parts, pixels)

    def _new_pixels(self, num_samples: int) -> PixelBuffer:
        return self.reader.pixel_buffer(num_samples, self._buffers.take(num_samples * self.reader.sample_bytes))

    # --- With others

    def _together(self, requests: Iterable[Request]) -> Iterator[PartialBatch]:
        """Join batches in a thread while the consumer computes."""
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
            except BaseException as error:  # raised again in the consumer's thread
                give(error)

        thread = threading.Thread(target=work, name="clipmill-loader", daemon=True)
        thread.start()

        def halt() -> None:
            stop.set()
            thread.join()

        # also runs if the process exits while reading, before multiprocessing ends its children
        halted = Finalize(thread, halt, exitpriority=10)
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            halted()

    def _assembled(self, requests: Iterable[Request], stop: threading.Event) -> Iterator[PartialBatch]:
        requests = iter(requests)
        first = next(requests, None)
        if first is None:
            return
        # Every process gets a share of each batch, and several parts per process fit into memory, because parts are
        # handed out in order and wait in their slots for a late one.
        share = -(-len(first.rows) // self.num_processes)
        part_size = max(1, min(PART_SAMPLES, share, self.prefetch_samples // (4 * self.num_processes)))
        num_slots = max(1, self.prefetch_samples // part_size)
        with Pool(self.reader, self.num_processes, part_size, num_slots, stop) as pool:
            sizes: queue.SimpleQueue[int] = queue.SimpleQueue()

            def split_requests() -> Iterator[Request]:
                for rows, epoch in itertools.chain([first], requests):
                    sizes.put(len(rows))
                    for start in range(0, len(rows), part_size):
                        yield Request(rows[start : start + part_size], epoch)

            parts: list[PartialBatch] = []
            for part in pool.parts(split_requests()):
                if not parts:
                    num_samples, num_done = sizes.get(), 0
                    pixels = self._new_pixels(num_samples)
                slots = slice(num_done, num_done + len(part.rows_B))
                pixels.part(slots).copy(part.pixels)
                part.pixels = None  # its slot is about to be reused
                parts.append(part)
                num_done = slots.stop
                if num_done == num_samples:
                    yield join(parts, pixels)
                    parts, pixels = [], None

    # --- Failures

    def _count(self, item: PartialBatch) -> None:
        """Count a batch's samples and failures. Raises LoaderError above `data.max_failures`."""
        failures = item.failures
        self.times.read_s += item.read_s
        self.times.decode_s += item.decode_s
        self.num_read += int(np.count_nonzero(item.rows_B != HOLE))
        self.num_failed += sum(failure.error.error_class != FORGOTTEN for failure in failures)
        self.reasons.update(failure.error.error_class for failure in failures)
        if failures:
            self.on_failures(failures)
        if self.num_read >= _MIN_JUDGED and self.num_failed > self.max_failures * self.num_read:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common(3))
            last = f" The last: {failures[-1].clip_id}: {failures[-1].error}." if failures else ""
            raise LoaderError(
                f"{self.num_failed} of {self.num_read} samples cannot be read ({reasons}), more than the share of "
                f"data.max_failures = {self.max_failures:g}.{last} Allowed: a data.where that leaves them out, or a "
                "higher data.max_failures."
            )


def requests_of(epochs: Epochs, slots: slice, start_step: int, end_step: int) -> Iterator[Request]:
    """Yield the rows and epoch of a process's batch for each of these steps."""
    for step in range(start_step, end_step):
        yield Request(epochs.rows(step)[slots], locate(epochs.spec, step)[0])


def default_processes(local_world_size: int = 1) -> int:
    """Return one process per core, shared among the training processes of a host."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


class _Buffers:
    """Memory for batches, reused once no tensor uses it, because fresh memory costs a page fault every 4 KB.

    torch reuses page-locked memory by itself, because it knows when a copy to a GPU has ended.
    """

    def __init__(self, pin_memory: bool):
        self.pin_memory = pin_memory
        self.buffers: list[NDArray[np.uint8]] = []

    def take(self, num_bytes: int) -> Tensor:
        if self.pin_memory:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.buffers = [buffer for buffer in self.buffers if len(buffer) == num_bytes]
        for number in range(len(self.buffers)):
            if sys.getrefcount(self.buffers[number]) == 2:  # only the list and this call refer to it, no tensor
                return torch.from_numpy(self.buffers[number])
        self.buffers.append(np.empty(num_bytes, np.uint8))
        return torch.from_numpy(self.buffers[-1])
