"""Source files that may change: a stage reads exactly the bytes whose hash its rows will carry, or fails.

The download records a file's *stamp* (size, and times of the last change in ns) with its hash. While the stamp is the
same, so are the bytes, and opening the file costs one stat. A file with another stamp was copied, touched or replaced:
it is hashed, and read only if the hash is right. The stamp is compared again after reading, for a file that is replaced
meanwhile.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipmill.base.errors import ItemError

CHANGED = "source-changed"  # error class; the next build downloads the source again, or reads a local file anew


def file_stamp(path: str | Path) -> str:
    """Return what a file system says of a file: another stamp may mean other bytes. Raises OSError.

    The time of the last change (ctime) cannot be set back, so a file that replaces another with the same size and
    modification time is noticed, too.
    """
    found = os.stat(path)
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


@contextmanager
def unchanged(path: str | Path, sha256: str | None, stamp: str | None = None) -> Iterator[None]:
    """Let the block read a file that has the bytes of this hash from the block's beginning to its end.

    stamp   of the file when it had this hash; None: unknown, so the file is hashed
    sha256  None: unknown, as in rows of early versions; then the file is only compared with itself
    Raises ItemError "source-changed" (retryable), "source-missing" if there is no such file.
    """
    path = Path(path)
    before = _stamp_of(path)
    if before != stamp and sha256 is not None and (found := _hash_of(path)) != sha256:
        raise _changed(path, f"it has the SHA-256 {found}, not {sha256}")
    try:
        yield
    except ItemError as error:
        if _stamp_of(path) != before:
            raise _changed(path, "it was changed while it was read") from error
        raise
    if _stamp_of(path) != before:
        raise _changed(path, "it was changed while it was read")


def _stamp_of(path: Path) -> str:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ItemError("source-missing", f"{path} is not a regular file")
        return file_stamp(path)
    except FileNotFoundError as error:
        raise ItemError("source-missing", f"{path} does not exist (was sources/ cleaned?)") from error


def _hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _changed(path: Path, how: str) -> ItemError:
    message = f"{path}: {how}. `clipmill build` downloads it again, or takes a local file as it is now"
    return ItemError(CHANGED, message, transient=True)
