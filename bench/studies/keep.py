"""Things that several arms need, made once on this machine, whichever process asks first."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, which `make(temporary path)` wrote as a file or folder, now or on an earlier call. Never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            temporary = path.with_name(f".making-{path.name}")
            _remove(temporary)
            make(temporary)
            temporary.rename(path)
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
