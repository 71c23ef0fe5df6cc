"""Locks of files, the kernel's: they end with the process that holds them."""

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def take_lock(file, patience_s: float = 1.0) -> bool:
    """Take the lock, waiting a moment for `status` of another process to look whether it is free."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


@contextmanager
def lock_file(path: Path, patience_s: float) -> Iterator[None]:
    """The block is one process's at a time, and one thread's; the file is there meanwhile, or where its holder died.

    Raises TimeoutError when it was not to be had for so long.
    """
    while True:
        with open(path, "w") as file:
            if not take_lock(file, patience_s):
                raise TimeoutError(f"{path} is still held after {patience_s:,.0f} s")
            if not _is_at(path, file):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def take_named(path: Path, name: str) -> IO[str] | None:
    """The lock's file with our name in it, locked while it is open; None where another process has it.

    The kernel frees a dead process's lock, but not while a child that it forked lives on: then the file is replaced.
    """
    while True:
        file = open(path, "a+")
        if take_lock(file):
            file.truncate(0)
            file.write(name)
            file.flush()
            os.fsync(file.fileno())  # hosts that share the folder read it
            if _is_at(path, file):
                return file
        elif not _remove_dead(path):
            file.close()
            return None
        file.close()


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether the file is still the one of that name: it may have been removed while we waited for its lock."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_dead(lock: Path) -> bool:
    """Removes the lock where a dead process left it. A new holder writes its name at once, and has had a second."""
    with open(lock.with_name("lock.takeover"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        dead = is_left_by_the_dead(lock)
        if dead:
            lock.unlink()
        return dead


def said_by(lock: Path) -> str:
    try:
        return lock.read_text().strip()
    except OSError:
        return ""  # it has been given back meanwhile


def is_left_by_the_dead(lock: Path) -> bool:
    """Whether the lock names a process of this host that is no more; of another host's nobody here can tell."""
    named = re.match(r"process (\d+) on (\S+) since", said_by(lock))
    if not named or named[2] != socket.gethostname():
        return False
    return is_gone(int(named[1]))


def is_gone(pid: int) -> bool:
    """Whether there is no such process of this host, or only what is left of it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # alive, and another user's
    return _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False  # a system without /proc, or it has just ended
