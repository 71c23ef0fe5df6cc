"""Ends a worker that hangs, and leaves word of what it hung in.

Decoders hang in sandboxes, which have limits of their own. What runs in the worker itself (a site's extractor, speech
recognition, a captioner) stands under `time_limit`. When that is over, faulthandler's watching thread ends the process:
it is written in C and needs no interpreter lock, so that a library that never gives the lock back is ended too. It
writes where every thread stood into the work's report, which the driver finds and makes the item's failure.

Without a report (outside a worker) a limit does nothing: it would end the caller.
"""

import faulthandler
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = ".clipmill/hung"
GRACE_S = 60.0  # for what ends by itself at the same moment, a download for one
_EXPIRED = "Timeout ("  # how faulthandler begins


class _Limits:
    """All limits of this process; the one that is over first counts."""

    def __init__(self):
        self.lock = threading.Lock()
        self.report = None
        self.running: dict[int, tuple[float, str]] = {}  # number → (when it is over, what it limits)
        self.last = 0

    def begin(self, limit_s: float, what: str) -> int:
        with self.lock:
            self.last += 1
            self.running[self.last] = (time.monotonic() + limit_s, f"{what} took more than {limit_s:,.0f} s")
            self._arm()
            return self.last

    def end(self, number: int) -> None:
        with self.lock:
            del self.running[number]
            self._arm()

    def _arm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self.report is None or not self.running:
            return
        over_at, words = min(self.running.values())
        os.ftruncate(self.report, 0)
        os.pwrite(self.report, f"{words}\n".encode(), 0)
        os.lseek(self.report, 0, os.SEEK_END)
        faulthandler.dump_traceback_later(max(0.001, over_at - time.monotonic()), exit=True, file=self.report)


_limits = _Limits()


@contextmanager
def reporting(root: Path, name: str) -> Iterator[None]:
    """Limits inside end this process and are told in the report of the work `name`."""
    path = Path(root) / FOLDER / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    _limits.report = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.close(_limits.report)
        _limits.report = None
        path.unlink(missing_ok=True)


@contextmanager
def time_limit(limit_s: float, what: str) -> Iterator[None]:
    """The process ends when the block takes longer. From any thread; limits may overlap."""
    number = _limits.begin(limit_s, what)
    try:
        yield
    finally:
        _limits.end(number)


def take_report(root: Path, name: str) -> str | None:
    """What the work's worker hung in; None where it died of something else. The report is gone afterwards."""
    path = Path(root) / FOLDER / f"{name}.txt"
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    path.unlink(missing_ok=True)
    return text if _EXPIRED in text else None


def sweep_reports(root: Path) -> None:
    """Of workers that were killed with their driver; only for the holder of the corpus lock."""
    shutil.rmtree(Path(root) / FOLDER, ignore_errors=True)
