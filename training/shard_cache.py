"""Whole shards of a remote store, kept in a local folder that several processes share and that never outgrows its cap.

A file's name holds the hash of the shard's address and version and its size, and it gets this name when it is complete
and on disk: a fetch that was cut short, a full disk, a shard that was written anew under the old name are never served.
The least recently opened files go first. A process that has a file open keeps reading it when it is gone.
"""

import contextlib
import fcntl
import hashlib
import os
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 8_000_000
_TEMPORARY = "fetching-"


class ShardCache:
    def __init__(self, folder: str | Path, max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.num_fetched = 0

    def fetch(self, address: str, num_bytes: int, version: str) -> str | None:
        """The path of a local copy, fetched if need be; None where it does not fit or the store breaks off."""
        if num_bytes > self.max_bytes:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.blake2b(f"{address}\0{version}".encode(), digest_size=16).hexdigest()
        path = self.folder / f"{digest}-{num_bytes}.tar"
        with _locked(self.folder / f"{digest}.lock"):
            if not _whole(path, num_bytes) and not self._store(address, path, num_bytes):
                return None
            os.utime(path)
        return str(path)

    def _store(self, address: str, path: Path, num_bytes: int) -> bool:
        temporary = self.folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            with _locked(self.folder / "space.lock"):
                self._make_room(num_bytes)
                with open(temporary, "wb") as file:
                    os.truncate(file.fileno(), num_bytes)  # counted by whoever makes room next
            if not _copy(address, temporary, num_bytes):
                return False
            os.replace(temporary, path)
            self.num_fetched += 1
            return True
        except Exception as error:  # a full disk, or any error class of any store: reading goes on without the cache
            warnings.warn(f"{address} is not cached in {self.folder}: {type(error).__name__}: {error}", stacklevel=2)
            return False
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        entries = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process is faster
                entries.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total + num_bytes <= self.max_bytes:
                return
            if path.endswith(".tar"):
                Path(path).unlink(missing_ok=True)
                total -= size


def _whole(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


def _copy(address: str, path: Path, num_bytes: int) -> bool:
    """Streams the shard into the file; False when it had another length than announced."""
    from training.shard_reader import filesystem_of

    filesystem, remote = filesystem_of(address)
    num_copied = 0
    with filesystem.open(remote, "rb", block_size=CHUNK_BYTES, cache_type="readahead") as source:
        with open(path, "r+b") as file:
            while chunk := source.read(CHUNK_BYTES):
                file.write(chunk)
                num_copied += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    return num_copied == num_bytes


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; a process that dies lets go."""
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
