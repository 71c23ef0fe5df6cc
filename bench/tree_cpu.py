"""CPU seconds of a command and of all that it started, orphans included, by looking at them ten times a second.

The kernel's own sum (RUSAGE_CHILDREN) leaves out processes whose parent ignores SIGCHLD, as Ray's raylet does with its
workers. Here each process counts with the CPU time it was last seen with. The measuring process becomes the reaper of
all descendants (Linux), so that what outlives its parent is still found.

Trap: up to a tenth of a second at a process's end is missed, and processes that live shorter altogether. Where the
kernel's sum is larger, that is the figure.
"""

import ctypes
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import psutil

PR_SET_CHILD_SUBREAPER = 36
INTERVAL_S = 0.1


@dataclass(frozen=True)
class Cost:
    cpu_s: float
    wall_s: float
    peak_mb: float  # of the largest single process
    exit_code: int
    output: str


def measure(command: list[str], environment: dict[str, str] | None = None) -> Cost:
    """Run a command and wait for its whole tree."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with _Watch() as watch:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
        wall_s = time.perf_counter() - started
        _reap_orphans()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    kernel_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cpu_s = max(kernel_s, sum(watch.cpu_s.values()))
    return Cost(cpu_s, wall_s, watch.peak_bytes / 1e6, done.returncode, done.stdout + done.stderr)


class _Watch:
    """A thread that keeps, for every descendant there has been, the CPU time it was last seen with."""

    def __init__(self) -> None:
        self.cpu_s: dict[tuple[int, float], float] = {}
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(INTERVAL_S):
            for process in me.children(recursive=True):
                try:
                    times = process.cpu_times()
                    self.cpu_s[process.pid, process.create_time()] = times.user + times.system
                    self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)
                except psutil.Error:
                    continue  # it has just ended


def _reap_orphans(patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            time.sleep(0.05)
    print("bench: processes outlived the command; their CPU is not counted to the end", file=sys.stderr)
