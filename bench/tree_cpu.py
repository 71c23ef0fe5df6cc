"""CPU seconds of a command and of everything it started, orphans included: Ray's workers do not die with their parent's
bookkeeping. The measuring process becomes the reaper of all descendants (Linux), so the kernel adds them up for it.

Trap: a process whose parent ignores SIGCHLD is reaped without being added up. Ray's raylet seems to do so with workers:
where the peak of a process is below what a model takes, its actor was not counted and the figures are too low.
"""

import ctypes
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

PR_SET_CHILD_SUBREAPER = 36


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
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    wall_s = time.perf_counter() - started
    _reap_orphans()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu_s, wall_s, after.ru_maxrss / 1024, done.returncode, done.stdout + done.stderr)


def _reap_orphans(patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            time.sleep(0.05)
    print("bench: processes outlived the command; their CPU is not counted", file=sys.stderr)
