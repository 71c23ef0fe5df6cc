"""End a worker that hangs, and report where it hung.

Decoders run in sandboxes, which have limits of their own. Code that runs in the worker itself (a site's extractor,
speech recognition, a captioner) runs under `time_limit`. At the end of the time, a thread of faulthandler ends
the process: it is written in C and does not need the interpreter lock, so it also ends a library that never releases
it. It writes the stack of every thread into the task's report, which the driver turns into the item's failure.

Outside a worker a limit has no effect, because it would end the caller. A worker may run several tasks at a time, each
in a thread of its own: the report is that of the task whose limit ended.
"""

import faulthandler
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

FOLDER = ".clipmill/hung"
GRACE_S = 60.0  # added to limits of code that has the same limit itself, such as a download
_EXPIRED = "Timeout ("  # start of faulthandler's report


_report: ContextVar[int | None] = ContextVar("report", default=None)  # descriptor of this task's report


class _Limits:
    """All limits of this process's tasks. The one that ends first is armed."""

    def __init__(self):
        self.lock = threading.Lock()
        self.running: dict[int, tuple[float, str, int]] = {}  # number → (when it ends, the message, the report)
        self.last = 0

    def begin(self, limit_s: float, what: str) -> int:
        with self.lock:
            self.last += 1
            report = _report.get()
            if report is not None:
                self.running[self.last] = time.monotonic() + limit_s, f"{what} took more than {limit_s:,.0f} s", report
                self._arm()
            return self.last

    def end(self, number: int) -> None:
        with self.lock:
            if self.running.pop(number, None):
                self._arm()

    def drop(self, report: int) -> None:
        """Forget the limits of a task that has ended, whose threads may still run."""
        with self.lock:
            self.running = {number: limit for number, limit in self.running.items() if limit[2] != report}
            self._arm()

    def _arm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if not self.running:
            return
        over_at, words, report = min(self.running.values())
        os.ftruncate(report, 0)
        os.pwrite(report, f"{words}\n".encode(), 0)
        os.lseek(report, 0, os.SEEK_END)
        faulthandler.dump_traceback_later(max(0.001, over_at - time.monotonic()), exit=True, file=report)


_limits = _Limits()


@contextmanager
def reporting(root: Path, name: str) -> Iterator[None]:
    """Let limits inside the block end this process and write the report of the task `name`.

    Threads that the block starts need a copy of its context (`contextvars.copy_context`).
    """
    path = Path(root) / FOLDER / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)
        _limits.drop(report)
        os.close(report)
        path.unlink(missing_ok=True)


@contextmanager
def time_limit(limit_s: float, what: str) -> Iterator[None]:
    """End the process if the block takes longer. Works in any thread; limits may overlap."""
    number = _limits.begin(limit_s, what)
    try:
        yield
    finally:
        _limits.end(number)


def take_report(root: Path, name: str) -> str | None:
    """Return and delete the report of a task whose worker hung; None for any other cause of death."""
    path = Path(root) / FOLDER / f"{name}.txt"
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    path.unlink(missing_ok=True)
    return text if _EXPIRED in text else None


def sweep_reports(root: Path) -> None:
    """Delete the reports of workers that were killed with their driver. Only for the owner of the corpus lock."""
    shutil.rmtree(Path(root) / FOLDER, ignore_errors=True)
