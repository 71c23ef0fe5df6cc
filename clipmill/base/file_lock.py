"""File locks of the kernel (flock): a lock is free again as soon as the process that holds it ends."""

import fcntl
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO


def take_lock(file: IO | int, patience_s: float = 1.0) -> bool:
    """Lock an open file; return False when another process or thread still holds it after `patience_s`.

    Some patience is always needed where `is_locked` is used: it holds the lock for a moment.
    """
    if patience_s == math.inf:
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)


def is_locked(path: str | Path) -> bool:
    """Return whether a process holds the lock of a file."""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def lock_file(path: Path, patience_s: float = math.inf, *, remove: bool = False) -> Iterator[None]:
    """Let one process, and one thread of it, at a time run the block.

    remove  delete the lock file at the end of the block; it stays if the owner was killed, which does no harm
    Raises TimeoutError when another owner does not release the lock within `patience_s`.
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
                if remove:
                    path.unlink(missing_ok=True)
            return


def take_named_lock(path: Path, name: str) -> IO[str] | None:
    """Open and lock a file and write the owner's name into it; the lock is held while the returned file is open.

    name  of `process_name`
    Returns None when another process holds the lock. The lock of a dead process may be kept by a child that it
    forked: then the file is replaced.
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
        else:
            # A new owner writes its name at once, and has had a second for it.
            with lock_file(path.with_name("lock.takeover")):
                owner_is_dead = owner_has_died(path)
                if owner_is_dead:
                    path.unlink()
            if not owner_is_dead:
                file.close()
                return None
        file.close()


def _is_at(path: Path, file: IO[str]) -> bool:
    """Return whether an open file still has this name: it may have been removed while we waited for its lock."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def process_name() -> str:
    """Return the name of this process as owner of a lock: a line for people, and a line with its system."""
    since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return f"process {os.getpid()} on {socket.gethostname()} since {since}\nsystem {system_name()}".strip()


def system_name() -> str:
    """Return a name of the system whose process ids are ours: boot, pid namespace, host and machine.

    Host names alone repeat among containers, and pid namespaces among machines. "" if it is not known.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        name = f"{boot} {os.readlink('/proc/self/ns/pid')} {socket.gethostname()}"
    except OSError:
        return ""
    try:
        return f"{name} {Path('/etc/machine-id').read_text().strip()}".strip()
    except OSError:
        return name  # many containers have no machine id


def is_this_system(name: str) -> bool:
    """Return whether a `system_name` is ours; locks of earlier versions have no machine in it."""
    theirs, ours = name.split(), system_name().split()
    return len(theirs) >= 3 and len(ours) >= 3 and all(a == b for a, b in zip(theirs, ours, strict=False))


def owner_of(lock: Path) -> str:
    """Return the name for people of a lock's owner, "" if the file does not exist any more."""
    return next(iter(owner_lines(lock)), "")


def owner_lines(lock: Path) -> list[str]:
    """Return the lines that the owner of a lock wrote into it; locks of earlier versions have one."""
    try:
        return lock.read_text().strip().splitlines()
    except OSError:
        return []


def owner_has_died(lock: Path) -> bool:
    """Return whether a lock names a process of this system that has ended. Those of others cannot be checked.

    Locks of earlier versions name the host alone: theirs must also be held by a process that is visible here, the dead
    owner's child, because the owner may live in another container of this host name.
    """
    first, *more = [*owner_lines(lock), ""]
    named = re.match(r"process (\d+) on (\S+) since", first)
    if not named or named[2] != socket.gethostname() or not process_has_ended(int(named[1])):
        return False
    system = next((line.removeprefix("system ") for line in more if line.startswith("system ")), None)
    return _is_held_here(lock) if system is None else is_this_system(system)


def _is_held_here(path: Path) -> bool:
    """Return whether a process of our pid namespace holds a file's lock; True on systems that cannot tell."""
    if not system_name():
        return True
    namespace = os.readlink("/proc/self/ns/pid")
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        process = link.parents[1]
        with suppress(OSError):  # it has ended, or belongs to another user
            if os.readlink(process / "ns/pid") == namespace and os.path.samestat(link.stat(), path.stat()):
                if "lock:" in (process / "fdinfo" / link.name).read_text():
                    return True
    return False


def process_has_ended(pid: int) -> bool:
    """Return whether this host has no such process, or only a zombie of it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # alive, and another user's
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False  # a system without /proc, or the process has just ended
