"""Cache whole shards of a remote store in a local folder of limited size that several processes share.

1. A reader looks for a shard's local copy at every read, and reads from the store while there is none.
2. A thread decides, once per shard, if the run needs most of it, and then fetches it. So no read waits for a gigabyte
   because of one clip.
3. A copy's name holds the hash of the shard's address and version, and its size. It gets this name when it is complete
   and on disk, so a torn copy, or one of an older version, is never served.
4. If room is short, the least recently used copies are removed, but none that a process still reads: in a shuffled
   order every shard is needed again soon, and replacing copies would fetch the corpus again and again. A shard that
   does not fit is read by ranges. A process that has a removed file open keeps reading it.
"""

import contextlib
import hashlib
import math
import os
import queue
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from clipmill.base.errors import ItemError
from clipmill.base.file_lock import is_locked, lock_file, take_lock
from training.data.remote_files import describe, filesystem_of

MOST_SHARE = 0.5  # share of its bytes that the run must need for a shard to be fetched whole
IDLE_S = 600.0  # time without a read after which a copy may be removed
_TOUCH_S = 60.0  # time between updates of a copy's modification time, which records its last read
_CHUNK_BYTES = 8_000_000
_TEMPORARY = "fetching-"


@dataclass
class _Copy:
    path: Path | None = None  # None: not fetched (yet)
    num_bytes: int = 0
    asked: bool = False  # given to the thread
    touched_s: float = 0.0


class ShardCache:
    """One process's view of the cache. `idle_s`: see IDLE_S."""

    def __init__(self, folder: str | Path, max_bytes: int, idle_s: float = IDLE_S):
        self.folder, self.max_bytes, self.idle_s = Path(folder), max_bytes, idle_s
        self.num_fetched = 0
        self._copies: dict[str, _Copy] = {}
        self._asked: queue.Queue[tuple[str, Callable[[], int]]] = queue.Queue()
        self._thread: threading.Thread | None = None

    def local(self, address: str, wanted_bytes: Callable[[], int]) -> str | None:
        """Return the path of a whole copy, None if there is none (yet).

        wanted_bytes  returns the number of its bytes that the run needs; called at most once, in the thread
        """
        copy = self._copies.setdefault(address, _Copy())
        if copy.path is not None:
            if _is_whole(copy.path, copy.num_bytes):
                now = time.monotonic()
                if now - copy.touched_s > min(_TOUCH_S, self.idle_s / 2):
                    copy.touched_s = now
                    with contextlib.suppress(FileNotFoundError):
                        os.utime(copy.path)
                return str(copy.path)
            copy.path, copy.asked = None, False
        if not copy.asked:
            copy.asked = True
            self._asked.put((address, wanted_bytes))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="clipmill-cache", daemon=True)
                self._thread.start()
        return None

    # --- In the thread

    def _work(self) -> None:
        while True:
            address, wanted_bytes = self._asked.get()
            try:
                self._fetch(address, self._copies[address], wanted_bytes)
            except Exception as error:  # a full disk, any error class of any store: the reader does without a copy
                reason = error if isinstance(error, ItemError) else f"{type(error).__name__}: {error}"
                warnings.warn(f"{address} is not kept in {self.folder}: {reason}", stacklevel=1)
            finally:
                self._asked.task_done()

    def _fetch(self, address: str, copy: _Copy, wanted_bytes: Callable[[], int]) -> None:
        num_bytes, version = describe(address)
        if wanted_bytes() <= MOST_SHARE * num_bytes or num_bytes > self.max_bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.blake2b(f"{address}\0{version}".encode(), digest_size=16).hexdigest()
        path = self.folder / f"{digest}-{num_bytes}.tar"
        with lock_file(self.folder / f"{digest[:2]}.lock"):  # one process fetches, the others find it
            if _is_whole(path, num_bytes) or self._store(address, path, num_bytes):
                copy.path, copy.num_bytes = path, num_bytes

    def _store(self, address: str, path: Path, num_bytes: int) -> bool:
        """Fetch a shard into the folder; return False if there is no room."""
        temporary = self.folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            with contextlib.ExitStack() as stack:
                with lock_file(self.folder / "room.lock"):
                    if not self._make_room(num_bytes):
                        return False
                    file = stack.enter_context(open(temporary, "wb"))
                    take_lock(file, math.inf)  # held while this process writes
                    file.truncate(num_bytes)  # reserves the room
                _stream(address, file, num_bytes)
                os.replace(temporary, path)
            self.num_fetched += 1
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> bool:
        """Remove copies that no process uses until `num_bytes` more fit; return False if that is not enough."""
        copies = []
        total = 0
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # its writer has renamed it
                if entry.name.startswith(_TEMPORARY) and not is_locked(entry.path):
                    os.unlink(entry.path)
                    continue
                state = entry.stat()
                total += state.st_size
                if entry.name.endswith(".tar"):
                    copies.append((state.st_mtime, state.st_size, entry.path))
        idle = sorted(copy for copy in copies if copy[0] < time.time() - self.idle_s)
        while total + num_bytes > self.max_bytes and idle:
            _, size, path = idle.pop(0)
            os.unlink(path)
            total -= size
        return total + num_bytes <= self.max_bytes


def _is_whole(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


def _stream(address: str, file: IO[bytes], num_bytes: int) -> None:
    """Copy a remote file. Raises ItemError "truncated-shard" if the store sends another length than announced."""
    filesystem, remote = filesystem_of(address)
    num_copied = 0
    with filesystem.open(remote, "rb", block_size=_CHUNK_BYTES, cache_type="readahead") as source:
        while chunk := source.read(_CHUNK_BYTES):
            num_copied += file.write(chunk)
    if num_copied != num_bytes:
        raise ItemError("truncated-shard", f"the store sent {num_copied} bytes and had announced {num_bytes}")
    file.flush()
    os.fsync(file.fileno())
