"""Make what several arms share once per machine, in whichever process needs it first."""

from collections.abc import Callable
from pathlib import Path

from clipmill.base.atomic_file import atomic_path
from clipmill.base.file_lock import lock_file


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """Return `path`, a complete file or folder; `make(temporary path)` writes it where it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            with atomic_path(path) as temporary:
                make(temporary)
    return path
