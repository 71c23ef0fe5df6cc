"""Measure a run's speed: samples per second, the share of time spent waiting for data, and MFU."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Throughput:
    """Rates of a run. `flops` and `num_samples` are totals over all processes.

    peak_flops  FLOP/s of all devices together, at the precision of the matrix products; None: unknown, no MFU
    """

    def __init__(self, device: torch.device, peak_flops: float | None = None):
        self.device, self.peak_flops = device, peak_flops
        self._start()

    def _start(self) -> None:
        self._began_at = time.perf_counter()
        self._waited_s = self._paused_s = self._flops = 0.0
        self._num_samples = self._num_steps = 0

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; count the time until each arrives as waiting for data.

        A GPU may be busy with queued work during that time, so the share is an upper bound of the cost of data.
        """
        iterator = iter(items)
        while True:
            before = time.perf_counter()
            item = next(iterator, iterator)
            self._waited_s += time.perf_counter() - before
            if item is iterator:
                return
            yield item

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the context's time (evaluating, saving) out of all rates; wait for queued work of the device first."""
        self._synchronise()
        before = time.perf_counter()
        try:
            yield
        finally:
            self._synchronise()
            self._paused_s += time.perf_counter() - before

    def step(self, num_samples: int, flops: float = 0.0) -> None:
        """Count one training step."""
        self._num_steps += 1
        self._num_samples += num_samples
        self._flops += flops

    def rates(self) -> dict[str, float | None]:
        """Return means since the last call and start anew; call it after the device has finished the counted steps.

        `elapsed_s` includes pauses, `step_s` is the time of one step, `mfu` is None if the peak is unknown.
        """
        elapsed_s = time.perf_counter() - self._began_at
        training_s = max(elapsed_s - self._paused_s, 1e-9)
        rates = {
            "samples_per_s": self._num_samples / training_s,
            "data_wait": min(1.0, self._waited_s / training_s),
            "mfu": self._flops / training_s / self.peak_flops if self.peak_flops else None,
            "step_s": training_s / max(1, self._num_steps),
            "elapsed_s": elapsed_s,
        }
        self._start()
        return rates

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
