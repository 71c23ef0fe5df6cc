"""Where the time of a run goes: samples per second, the share that waits for data, the share of the devices' peak."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Meter:
    """Where the time of a run goes. `flops` and `num_samples` are those of all processes together.

    peak_flops  of all devices together, at the precision of the matrix products; None: unknown, so no MFU
    """

    def __init__(self, device: torch.device, peak_flops: float | None = None):
        self.device, self.peak_flops = device, peak_flops
        self._start()

    def _start(self) -> None:
        self._began_at = time.perf_counter()
        self._waited_s = self._paused_s = self._flops = 0.0
        self._num_samples = self._num_steps = 0

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with the time that the loop waits for each of them counted as waiting for data.

        On a GPU work that is still queued may hide some of it: the share is an upper bound of what data costs.
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
        """Evaluating or saving: time that no rate counts. Waits for the device first, whose work is training's."""
        self._synchronise()
        before = time.perf_counter()
        try:
            yield
        finally:
            self._synchronise()
            self._paused_s += time.perf_counter() - before

    def step(self, num_samples: int, flops: float = 0.0) -> None:
        self._num_steps += 1
        self._num_samples += num_samples
        self._flops += flops

    def rates(self) -> dict[str, float | None]:
        """Means since the last call, which ends there: call it when the device has done what was counted.

        `elapsed_s` is all the time, `step_s` that of a step, `mfu` None where the peak is unknown.
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
