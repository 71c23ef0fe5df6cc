"""Things that several arms need, made once on this machine, whichever process asks first."""

from collections.abc import Callable
from pathlib import Path

from clipmill.base.atomic_file import atomic_path
from clipmill.base.file_lock import lock_file


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, which `make(temporary path)` wrote as a file or folder, now or on an earlier call. Never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            with atomic_path(path) as temporary:
                make(temporary)
    return path
