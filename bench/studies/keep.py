"""Make what several arms share once per machine, in whichever process needs it first."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """Return `path`, a complete file or folder; `make(temporary path)` writes it where it does not exist."""
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
