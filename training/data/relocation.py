"""Find the current place of clips, because a corpus may be packed again or compacted while a run trains on it.

Clips are found by the SHA-256 of their bytes, so they are those that were selected. The index is read only when other
bytes are at the frozen place; it takes 28 bytes of memory per member of the corpus.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.corpus.packs import MAIN, index_files, named_packs
from shards.storage.mirror import files_of, for_reading
from shards.storage.sealed_parquet import DamagedFile, read_parquet
from training.data.range_reader import Range

LOOK_EVERY_S = 5.0  # least time between two updates of the index, in case bytes are damaged, not moved

_MEMBER = pa.schema([("sha256", pa.string()), ("offset", pa.int64()), ("num_bytes", pa.int64())])


class RelocationIndex:
    """Index of one corpus's members by hash, for one process; a remote corpus's indexes are fetched when needed."""

    def __init__(self, corpus: str | Path):
        self.root = for_reading(corpus)
        self._refreshed_at, self._state = -LOOK_EVERY_S, ()
        self._paths: list[str] = []
        self._keys_N = np.zeros(0, np.uint64)  # the first 64 bits of hashes, ascending
        self._places_N3 = np.zeros((0, 3), np.int64)  # number of the path, offset, size

    def find(self, hashes: Sequence[bytes]) -> list[Range | None]:
        """Return the current place of each hash, None if the corpus lacks it. Callers compare the whole hash."""
        self._refresh()
        keys = np.array([int.from_bytes(digest[:8], "big") for digest in hashes], np.uint64)
        places: list[Range | None] = []
        for row, key in zip(np.searchsorted(self._keys_N, keys).tolist(), keys, strict=True):
            if row == len(self._keys_N) or self._keys_N[row] != key:
                places.append(None)
            else:
                path, offset, num_bytes = self._places_N3[row].tolist()
                places.append(Range(self._paths[path], offset, num_bytes))
        return places

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._refreshed_at < LOOK_EVERY_S:
            return
        self._refreshed_at = now
        for folder in ("shards", "fragments/edited_clips"):
            files_of(self.root).refresh(folder)
        indexes = [path for pack in (MAIN, *named_packs(self.root)) for path in index_files(self.root, pack)]
        edited = sorted((self.root / "fragments" / "edited_clips").glob("[!.]*.parquet"))
        state = tuple((str(path), path.stat().st_mtime_ns) for path in [*indexes, *edited])
        if state == self._state:
            return
        members: list[tuple[str, pa.Table]] = []  # (path from the root, members)
        for path in indexes:  # of a shard's clips and of its stills
            for kind in ("mp4", "jpg"):
                columns = [f"{kind}_sha256", f"{kind}_offset", f"{kind}_bytes"]
                with suppress(DamagedFile):  # the clips of this shard count as lost until it is packed again
                    table = read_parquet(path, columns).select(columns).rename_columns(_MEMBER.names)
                    tar = str(path.relative_to(self.root).with_suffix(".tar"))
                    members.append((tar, table.drop_null()))
        for path in edited:
            try:
                rows = read_parquet(path, ["tar", "sha256", "mp4_offset", "num_bytes", "frames"]).to_pylist()
            except (DamagedFile, FileNotFoundError):  # merged since
                continue
            for tar in dict.fromkeys(row["tar"] for row in rows):
                of_tar = [row for row in rows if row["tar"] == tar]
                found = [row | {"offset": row["mp4_offset"]} for row in of_tar]
                found += [frame for row in of_tar for frame in row["frames"] or ()]
                found = [{name: member[name] for name in _MEMBER.names} for member in found]
                members.append((tar, pa.Table.from_pylist(found, _MEMBER)))
        self._fill(members)
        self._state = state

    def _fill(self, members: list[tuple[str, pa.Table]]) -> None:
        self._paths = sorted({path for path, _ in members})
        numbers = {path: number for number, path in enumerate(self._paths)}
        keys, places = [np.zeros(0, np.uint64)], [np.zeros((0, 3), np.int64)]
        for path, table in members:
            hashes = table["sha256"].to_pylist()
            keys.append(np.fromiter((int(digest[:16], 16) for digest in hashes), np.uint64, count=len(hashes)))
            offsets, sizes = (table[name].to_numpy() for name in ("offset", "num_bytes"))
            places.append(np.stack([np.full(len(offsets), numbers[path]), offsets, sizes], axis=1))
        keys_N = np.concatenate(keys)
        order = np.argsort(keys_N, kind="stable")
        self._keys_N, self._places_N3 = keys_N[order], np.concatenate(places)[order]
