"""Find the present place of bytes: a corpus may be packed again or compacted while a run trains on it.

Bytes are found by their SHA-256, so a result is what was frozen. The index is read only when other bytes lie at the
frozen place; it then takes 28 bytes of memory per member of the corpus.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.storage.mirror import files_of, for_reading
from training.data.range_reader import Range

LOOK_EVERY_S = 5.0  # at most so often, where bytes are simply damaged


class RelocationIndex:
    """Index of one corpus's members by hash, for one process. From a store, indexes are fetched when needed."""

    def __init__(self, corpus: str | Path):
        self.root = for_reading(corpus)
        self._looked_at, self._state = -LOOK_EVERY_S, ()
        self._paths: list[str] = []
        self._keys_N = np.zeros(0, np.uint64)  # the first 64 bits of hashes, ascending
        self._places_N3 = np.zeros((0, 3), np.int64)  # number of the path, offset, size

    def find(self, hashes: Sequence[bytes]) -> list[Range | None]:
        """Return the present place of each hash, None if the corpus lacks it. Readers compare the whole hash."""
        self._look()
        keys = np.array([int.from_bytes(digest[:8], "big") for digest in hashes], np.uint64)
        rows = np.searchsorted(self._keys_N, keys)
        return [self._range(int(row), key) for row, key in zip(rows, keys, strict=True)]

    def _range(self, row: int, key: np.uint64) -> Range | None:
        if row == len(self._keys_N) or self._keys_N[row] != key:
            return None
        path, offset, num_bytes = self._places_N3[row].tolist()
        return Range(self._paths[path], offset, num_bytes)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        for folder in ("shards", "fragments/edited_clips"):
            files_of(self.root).look(folder)
        indexes = sorted((self.root / "shards").glob("[0-9]*.parquet"))
        edited = sorted((self.root / "fragments" / "edited_clips").glob("[!.]*.parquet"))
        state = tuple((path.name, path.stat().st_mtime_ns) for path in [*indexes, *edited])
        if state == self._state:
            return
        members = [part for path in indexes for part in _members_of_index(path)]
        members += [part for path in edited for part in _members_of_edits(path)]
        self._fill(members)
        self._state = state

    def _fill(self, members: list[tuple[str, pa.Table]]) -> None:
        self._paths = sorted({path for path, _ in members})
        numbers = {path: number for number, path in enumerate(self._paths)}
        keys = [np.zeros(0, np.uint64), *(_keys(table["sha256"]) for _, table in members)]
        places = [np.zeros((0, 3), np.int64)]
        for path, table in members:
            offsets, sizes = (table[name].to_numpy() for name in ("offset", "num_bytes"))
            places.append(np.stack([np.full(len(offsets), numbers[path]), offsets, sizes], axis=1))
        keys_N = np.concatenate(keys)
        order = np.argsort(keys_N, kind="stable")
        self._keys_N, self._places_N3 = keys_N[order], np.concatenate(places)[order]


def _keys(hashes: pa.ChunkedArray) -> NDArray[np.uint64]:
    return np.fromiter((int(digest[:16], 16) for digest in hashes.to_pylist()), np.uint64, count=len(hashes))


def _members_of_index(path: Path) -> list[tuple[str, pa.Table]]:
    """Return (path from the root, members) of a shard's clips and of its stills."""
    return [
        (f"shards/{path.stem}.tar", _members(path, f"{kind}_sha256", f"{kind}_offset", f"{kind}_bytes"))
        for kind in ("mp4", "jpg")
    ]


def _members_of_edits(path: Path) -> list[tuple[str, pa.Table]]:
    table = pq.read_table(path, columns=["tar", "sha256", "mp4_offset", "num_bytes", "frames"])
    return [part for tar in table["tar"].unique().to_pylist() for part in _members_of_edit(tar, table)]


def _members_of_edit(tar: str, table: pa.Table) -> list[tuple[str, pa.Table]]:
    rows = [row for row in table.to_pylist() if row["tar"] == tar]
    clips = [{"sha256": row["sha256"], "offset": row["mp4_offset"], "num_bytes": row["num_bytes"]} for row in rows]
    frames = [{name: frame[name] for name in _MEMBER.names} for row in rows for frame in row["frames"] or ()]
    return [(tar, pa.Table.from_pylist([*clips, *frames], _MEMBER))]


_MEMBER = pa.schema([("sha256", pa.string()), ("offset", pa.int64()), ("num_bytes", pa.int64())])


def _members(path: Path, *columns: str) -> pa.Table:
    return pq.read_table(path, columns=list(columns)).select(columns).rename_columns(_MEMBER.names).drop_null()
