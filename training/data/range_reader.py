"""Read byte ranges of shards, from local files or from any store that fsspec supports.

`ShardReader.read` takes many ranges at once. Neighbouring ranges of one shard become one read; reads of a remote store
are requested together. A range that is missing or too short gives an ItemError in its place, so that a broken shard
loses only its own samples. With a cache (`training.data.shard_cache`), shards of which a run reads most are fetched
whole, once, and then read locally.
"""

import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from clipmill.base.errors import ItemError
from training.data.remote_files import as_item_error, read_ranges, scheme_of
from training.data.shard_cache import ShardCache

# The kernel reads ahead anyway, so a gap in a local file costs only the copy of its bytes.
LOCAL_GAP_BYTES = 16_384
# A store takes some 30 ms to the first byte of a request, in which a connection of 50 MB/s sends 1.5 MB.
REMOTE_GAP_BYTES = 1_000_000
_OPEN_FILES = 128
_PAUSES_S = (0.5, 2.0, 8.0)  # before each retry


class Range(NamedTuple):
    shard: str  # path relative to the reader's root, or a whole path or URL
    offset: int
    num_bytes: int


@dataclass
class _Read:
    """One read for several ranges."""

    shard: str
    start: int
    end: int
    members: list[int]  # indices of the ranges


class ShardReader:
    """Reader of shards, for one process and one thread.

    root    folder or URL that shards are relative to
    wanted  returns the number of a shard's bytes that the run reads; None: all. Called only with a cache
    """

    def __init__(self, root: str, cache: ShardCache | None = None, wanted: Callable[[str], int] | None = None):
        self.root, self.cache, self.wanted = root, cache, wanted
        self._files = _OpenFiles()

    def read(self, ranges: Sequence[Range]) -> list[memoryview | ItemError]:
        """Read ranges in order; return an ItemError in the place of a range that cannot be read.

        Its class is "shard-missing", "truncated-shard" or "shard-unreadable".
        """
        found: list[memoryview | ItemError] = [_UNREAD] * len(ranges)
        remote: list[int] = []
        local: dict[str, list[int]] = {}
        for number, wanted in enumerate(ranges):
            path = self._local_path(wanted.shard)
            if path is None:
                remote.append(number)
            else:
                local.setdefault(path, []).append(number)
        for path, numbers in local.items():
            self._read_local(path, ranges, numbers, found)
        if remote:
            self._read_remote(ranges, remote, found)
        return found

    def address(self, shard: str) -> str:
        """Return the whole path or URL of a shard."""
        if "://" in shard or os.path.isabs(shard):
            return shard
        return f"{self.root.rstrip('/')}/{shard}"

    def reopen(self, shard: str) -> None:
        """Reopen a local shard by its name at the next read."""
        path = self._local_path(shard)
        if path in self._files.descriptors:
            self._files.forget(path)

    def close(self) -> None:
        self._files.close()

    # --- Local files

    def _local_path(self, shard: str) -> str | None:
        """Return a path to read the shard with `pread`, None if it has no local file."""
        address = self.address(shard)
        if "://" not in address:
            return address
        if address.startswith("file://"):
            return address.removeprefix("file://")
        if self.cache is None:
            return None
        path = self.cache.local(address, lambda: self.wanted(shard) if self.wanted else sys.maxsize)
        return path if path is not None and self._opens_copy(path) else None

    def _opens_copy(self, path: str) -> bool:
        """Open a cached copy; return False if another process has removed it."""
        try:
            if not os.path.samestat(os.fstat(self._files.open(path)), os.stat(path)):
                self._files.forget(path)
                self._files.open(path)
        except OSError:
            return False
        return True

    def _read_local(self, path: str, ranges: Sequence[Range], numbers: list[int], found: list) -> None:
        reads = _merged(ranges, numbers, LOCAL_GAP_BYTES)
        try:
            descriptor = self._files.open(path)
        except OSError as error:
            failure = as_item_error(error, path)
            for number in numbers:
                found[number] = failure
            return
        for read in reads if hasattr(os, "posix_fadvise") else ():  # announced first, so the disk serves them together
            os.posix_fadvise(descriptor, read.start, read.end - read.start, os.POSIX_FADV_WILLNEED)
        for read in reads:
            try:
                data: bytes | ItemError = _pread(descriptor, read.start, read.end)
            except OSError as error:
                data = as_item_error(error, path)
            _hand_out(read, data, ranges, found, path)

    # --- Stores

    def _read_remote(self, ranges: Sequence[Range], numbers: list[int], found: list) -> None:
        by_shard: dict[str, list[int]] = {}
        for number in numbers:
            by_shard.setdefault(ranges[number].shard, []).append(number)
        reads = [read for shard in by_shard.values() for read in _merged(ranges, shard, REMOTE_GAP_BYTES)]
        for scheme in dict.fromkeys(scheme_of(self.address(read.shard)) for read in reads):
            ours = [read for read in reads if scheme_of(self.address(read.shard)) == scheme]
            for read, data in zip(ours, self._fetched(ours), strict=True):
                _hand_out(read, data, ranges, found, self.address(read.shard))

    def _fetched(self, reads: list[_Read]) -> list[bytes | ItemError]:
        """Fetch reads of one store together; retry those with a transient error."""
        results: list[bytes | ItemError] = [_UNREAD] * len(reads)
        left = list(range(len(reads)))
        for pause_s in (0.0, *_PAUSES_S):
            time.sleep(pause_s)
            addresses = [self.address(reads[number].shard) for number in left]
            answers = read_ranges(addresses, [reads[n].start for n in left], [reads[n].end for n in left])
            for number, answer in zip(left, answers, strict=True):
                results[number] = answer
            left = [n for n in left if isinstance(results[n], ItemError) and results[n].transient]
            if not left:
                break
        return results


_UNREAD = ItemError("shard-unreadable", "not read")


def _merged(ranges: Sequence[Range], numbers: list[int], gap_bytes: int) -> list[_Read]:
    """Merge ranges of one shard into reads, in file order; overlapping and repeated ranges share one."""
    reads: list[_Read] = []
    for number in sorted(numbers, key=lambda n: ranges[n].offset):
        shard, start, num_bytes = ranges[number]
        if reads and start <= reads[-1].end + gap_bytes:
            reads[-1].end = max(reads[-1].end, start + num_bytes)
            reads[-1].members.append(number)
        else:
            reads.append(_Read(shard, start, start + num_bytes, [number]))
    return reads


def _hand_out(read: _Read, data: bytes | ItemError, ranges: Sequence[Range], found: list, path: str) -> None:
    """Slice a read into its ranges; a short read still serves the ranges before its end."""
    if isinstance(data, ItemError):
        for number in read.members:
            found[number] = data
        return
    view = memoryview(data)
    for number in read.members:
        start = ranges[number].offset - read.start
        piece = view[start : start + ranges[number].num_bytes]
        found[number] = piece
        if len(piece) < ranges[number].num_bytes:
            missing = f"{path} ends before {ranges[number].num_bytes} bytes at {ranges[number].offset} do"
            found[number] = ItemError("truncated-shard", missing)


def _pread(descriptor: int, start: int, end: int) -> bytes:
    data = os.pread(descriptor, end - start, start)
    while len(data) < end - start:  # one call returns at most 2 GiB, and less when interrupted
        more = os.pread(descriptor, end - start - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


class _OpenFiles:
    """Descriptors of the most recently read files, which stay open."""

    def __init__(self):
        self.descriptors: OrderedDict[str, int] = OrderedDict()

    def open(self, path: str) -> int:
        if path not in self.descriptors:
            self.descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self.descriptors) > _OPEN_FILES:
                os.close(self.descriptors.popitem(last=False)[1])
        self.descriptors.move_to_end(path)
        return self.descriptors[path]

    def forget(self, path: str) -> None:
        os.close(self.descriptors.pop(path))

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])
