"""Measure the CPU seconds of a command and all its descendants, orphans included, by sampling ten times a second.

The kernel's own sum (RUSAGE_CHILDREN) leaves out processes whose parent ignores SIGCHLD, as Ray's raylet does with its
workers. Here each process counts with its last sample. The measuring process becomes the reaper of all descendants
(Linux), so that processes which outlive their parent are still found.

Trap: up to a tenth of a second at a process's end is missed, and processes that live for less time altogether. The
kernel's sum is used where it is larger.
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
    """The cost of a process tree, with the command's exit code and output."""

    cpu_s: float
    wall_s: float
    peak_mb: float  # of the largest single process
    exit_code: int
    output: str


def measure(command: list[str], environment: dict[str, str] | None = None) -> Cost:
    """Run a command and wait for its whole process tree."""
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
    """A thread that samples the CPU time of every descendant and keeps the last value."""

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
        """Sample until stopped."""
        me = psutil.Process()
        while not self._stop.wait(INTERVAL_S):
            for process in me.children(recursive=True):
                try:
                    times = process.cpu_times()
                    self.cpu_s[process.pid, process.create_time()] = times.user + times.system
                    self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)
                except psutil.Error:
                    continue  # the process has just ended


def _reap_orphans(patience_s: float = 60.0) -> None:
    """Wait for processes that outlive the command, at most `patience_s`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            time.sleep(0.05)
    print("bench: some processes outlived the command, and their CPU time is not complete", file=sys.stderr)
