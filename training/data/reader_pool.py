"""A pool of processes that read samples, and its recovery when one of them dies.

1. The pool owns a few slots of shared memory, each for the pixels of one part. A request (rows, epoch) gets a ticket
   and a free slot and goes to the process with the fewest tickets.
2. The process reads the part, its pixels straight into the slot, and sends the other arrays through its pipe.
3. Parts are handed out in the order of their requests; a slot is free again when the next part is requested. So the
   slots bound the memory, even if one process is slow.
4. A process writes the number of its current sample into shared memory. When it dies (a decoder's crash, out of memory,
   `kill`), its tickets go to the others and a new process replaces it. A process without progress for minutes is
   killed. A sample at which two processes died is not read again: it is the failure "decoder-died".

torch's DataLoader ends when a worker dies, without naming the sample, and allocates shared memory for each batch.

Processes are forked from a fork server, which has no threads or devices of the training process and has imported
everything, so that starting one takes milliseconds.
"""

import ctypes
import multiprocessing
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipmill.base.errors import ItemError, UserError
from training.data.epoch_plan import Rows
from training.data.sample_reader import PartialBatch, SampleReader

_AHEAD = 2  # requests a process holds: the current and the next
_MAX_LOST = 10  # consecutive deaths outside of any sample, without a part read between, after which reading fails
_DEADLY = 2  # deaths at one sample that make it a failure
_STUCK_S = 300.0  # longer than the slowest sample, or a part's bytes with all retries


class LoaderError(UserError):
    """An error of one training process alone; the others wait for it and must be ended."""


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class Request(NamedTuple):
    """One part of a step."""

    rows: Rows
    epoch: int


@dataclass
class _Ticket:
    request: Request
    slot: int
    deaths: Counter[int] = field(default_factory=Counter)  # by slot of the part
    lost: dict[int, ItemError] = field(default_factory=dict)
    part: PartialBatch | None = None


@dataclass
class _Worker:
    process: Any  # multiprocessing's Process
    connection: Connection
    at: Any  # shared: (ticket, position) of the sample being decoded
    tickets: list[int] = field(default_factory=list)
    moved: tuple[int, int] = (-1, -1)  # last known value of `at`
    moved_s: float = 0.0  # time of its last change, or of the first ticket after idling

    def give(self, number: int, *request: Any) -> None:
        """Send a ticket. Raises OSError if the process has died."""
        if not self.tickets:
            self.moved_s = time.monotonic()
        self.tickets.append(number)
        self.connection.send((number, *request))

    def is_stuck(self) -> bool:
        """Return True if the process has a ticket and has made no progress for `_STUCK_S`."""
        now, at = time.monotonic(), (self.at[0], self.at[1])
        if at != self.moved:
            self.moved, self.moved_s = at, now
        return bool(self.tickets) and now - self.moved_s > _STUCK_S


class Pool:
    """A context manager of processes that read parts into shared memory."""

    def __init__(self, reader: SampleReader, num_processes: int, part_size: int, num_slots: int, stop: threading.Event):
        self.reader, self.num_processes, self.part_size = reader, num_processes, part_size
        self.context = warm_up(reader)
        num_bytes = part_size * reader.sample_bytes
        self.slots = [self.context.RawArray(ctypes.c_uint8, num_bytes) for _ in range(max(num_slots, num_processes))]
        self.workers: list[_Worker] = []
        self.tickets: dict[int, _Ticket] = {}
        self.waiting: deque[int] = deque()  # tickets not given to a process
        self.num_deaths = 0
        self._num_lost = 0  # consecutive deaths outside of any sample
        self.stop = stop

    def __enter__(self) -> "Pool":
        self.workers = [self._start() for _ in range(self.num_processes)]
        return self

    def __exit__(self, *error: Any) -> None:
        for worker in self.workers:
            self._end(worker)
        self.workers = []

    def parts(self, requests: Iterable[Request]) -> Iterator[PartialBatch]:
        """Yield the parts in order. A part's pixels are in its slot: copy them before requesting the next one.

        Raises LoaderError if processes keep dying, and any other error of a process.
        """
        requests, order = iter(requests), deque()
        free = list(range(len(self.slots)))
        number, more = 0, True
        while not self.stop.is_set():
            while free and more:
                request = next(requests, None)
                more = request is not None
                if more:
                    self.tickets[number] = _Ticket(request, free.pop())
                    self.waiting.append(number)
                    order.append(number)
                    number += 1
            if not order:
                return
            self._deal()
            if self.tickets[order[0]].part is None:
                self._listen()
                continue
            ticket = self.tickets.pop(order.popleft())
            yield ticket.part
            free.append(ticket.slot)

    def _deal(self) -> None:
        """Hand waiting tickets to the processes with the fewest."""
        while self.waiting:
            worker = min(self.workers, key=lambda worker: len(worker.tickets))
            if len(worker.tickets) >= _AHEAD:
                return
            number = self.waiting.popleft()
            ticket = self.tickets[number]
            try:
                worker.give(number, ticket.slot, *ticket.request, ticket.lost)
            except OSError:
                self._bury(worker)

    def _listen(self) -> None:
        """Wait at most a second, so that a stop is noticed, until a process answers or dies."""
        by_channel = {worker.connection: worker for worker in self.workers}
        by_channel |= {worker.process.sentinel: worker for worker in self.workers}
        for worker in {id(worker): worker for worker in map(by_channel.get, wait(list(by_channel), 1.0))}.values():
            try:
                while worker.connection.poll():
                    self._take(worker, *worker.connection.recv())
            except (EOFError, OSError):
                self._bury(worker)
            else:
                if not worker.process.is_alive() and not worker.connection.poll():
                    self._bury(worker)
        for worker in [worker for worker in self.workers if worker.is_stuck()]:
            worker.process.kill()
            self._bury(worker)

    def _take(self, worker: _Worker, number: int, answer: PartialBatch | Exception) -> None:
        if isinstance(answer, Exception):
            raise answer
        worker.tickets.remove(number)
        ticket = self.tickets[number]
        answer.pixels = self.reader.pixel_buffer(len(ticket.request.rows), _memory(self.slots[ticket.slot]))
        ticket.part = answer
        self._num_lost = 0

    # --- Processes

    def _start(self) -> _Worker:
        ours, theirs = self.context.Pipe()
        at = self.context.RawArray(ctypes.c_int64, [-1, -1])
        process = self.context.Process(
            target=_work, args=(theirs, self.reader, self.slots, at), daemon=True, name="clipmill-loader"
        )
        process.start()
        theirs.close()
        return _Worker(process, ours, at)

    def _end(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.kill()
        worker.process.join()
        worker.process.close()

    def _bury(self, worker: _Worker) -> None:
        """Replace a dead process and queue its tickets first."""
        worker.process.join()
        code = worker.process.exitcode
        ended = f"with exit code {code}" if code is None or code >= 0 else f"by {signal.Signals(-code).name}"
        self.num_deaths += 1
        number, position = worker.at
        if number in worker.tickets and position >= 0:
            ticket = self.tickets[number]
            ticket.deaths[position] += 1
            if ticket.deaths[position] == _DEADLY:
                message = f"{_DEADLY} processes died while decoding it, the last one {ended}"
                ticket.lost[position] = ItemError("decoder-died", message)
        else:
            self._num_lost += 1
        if self._num_lost > _MAX_LOST:
            raise LoaderError(
                f"loader processes keep dying, the last one {ended}. If memory runs out, lower "
                "data.loader_processes or data.prefetch_samples. data.loader_processes = 0 reads in this process."
            )
        self.waiting.extendleft(reversed(worker.tickets))
        self._end(worker)
        self.workers[self.workers.index(worker)] = self._start()


def warm_up(reader: SampleReader) -> Any:
    """Start the fork server if needed, and return without waiting for its imports, which take seconds."""
    context = multiprocessing.get_context("forkserver")
    tokenizer = "training.data.clip_tokenizer" if reader.texts.words is None else "captioning.word_tokenizer"
    context.set_forkserver_preload([__name__, tokenizer])
    forkserver.ensure_running()
    return context


def _memory(slot: Any) -> Tensor:
    return torch.frombuffer(slot, dtype=torch.uint8)


def keep_freed_memory() -> None:
    """Set glibc to keep the freed memory of pictures for the next ones.

    By default it returns memory to the kernel; getting it back costs page faults, a tenth of the reading time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value allowed: all but the largest pictures
        libc.mallopt(_M_TRIM_THRESHOLD, 512 << 20)


# --- In the process


def _work(connection: Connection, reader: SampleReader, slots: list[Any], at: Any) -> None:
    """Read requests until the pool closes the pipe or dies."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to the process group for the trainer
    torch.set_num_threads(1)
    keep_freed_memory()
    while True:
        try:
            number, slot, rows, epoch, lost = connection.recv()
        except (EOFError, OSError):
            return

        def watch(position: int, number: int = number) -> None:
            at[0], at[1] = number, position

        try:
            pixels = reader.pixel_buffer(len(rows), _memory(slots[slot]))
            answer: PartialBatch | Exception = reader.read(rows, epoch, pixels=pixels, lost=lost, watch=watch)
            answer.pixels = None
        except UserError as error:
            answer = error
        except Exception:  # a bug: raised in the training process
            answer = RuntimeError(f"a loader process failed:\n{traceback.format_exc()}")
        try:
            connection.send((number, answer))
        except OSError:
            return
