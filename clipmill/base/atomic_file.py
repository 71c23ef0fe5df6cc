"""Files that appear under their name whole or not at all: written beside it, then renamed.

A writer that is killed leaves a file whose name begins with TEMPORARY, which the owner of the folder may delete.
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp-"  # prefix of every file that is being written
FICLONE = 0x40049409  # the call of Linux that clones a file


@contextmanager
def atomic_path(path: str | Path, *, fsync: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` where the block writes a file or a folder; rename it to `path` at the end.

    Nothing is left when the block raises. The parent folder is made if it is missing.

    fsync  flush the file and the rename to the disk, so that it survives a power cut; of a folder only the rename
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")  # hosts may share the folder
    try:
        yield temporary
        if fsync and temporary.is_file():
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
    if fsync:
        sync(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file: where the file system can, both share the bytes until one is changed, which takes no time."""
    with open(source, "rb") as old, open(target, "wb") as new:
        try:
            fcntl.ioctl(new, FICLONE, old.fileno())
            return
        except OSError:  # another file system
            pass
    shutil.copyfile(source, target)


@contextmanager
def atomic_file(path: str | Path, *, fsync: bool = False) -> Iterator[IO[bytes]]:
    """Yield a binary file whose content takes the place of `path` at the end of the block; see `atomic_path`."""
    with atomic_path(path, fsync=fsync) as temporary, open(temporary, "xb") as file:
        yield file


def write_text(path: str | Path, text: str, *, fsync: bool = False) -> None:
    """Write a whole text file in UTF-8; see `atomic_path`."""
    with atomic_file(path, fsync=fsync) as file:
        file.write(text.encode())


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
