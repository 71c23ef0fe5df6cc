"""Find processes and wait for their end."""

import time
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Return all current descendants of a process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = list(children.get(pid, []))
    for process in found:
        found += children.get(process, [])
    return found


def loader_processes() -> list[int]:
    """Return the loader processes of this process: children of its fork server, unlike Ray's of other tests."""
    import psutil  # not above: the sandbox's children import this module, and must start fast

    servers = [child for child in psutil.Process().children() if any("forkserver" in word for word in child.cmdline())]
    return [process.pid for server in servers for process in server.children()]


def wait_until_gone(processes: list[int], timeout_s: float = 600) -> bool:
    """Wait until all these processes have ended; return whether they have in time."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if not any(is_running(process) for process in processes):
            return True
        time.sleep(0.05)
    return False


def is_running(process: int) -> bool:
    """Return whether a process runs; a zombie counts as ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
