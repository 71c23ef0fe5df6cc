"""Tombstones: hashes of forgotten videos, which recognise a video and reveal nothing else about it.

They are the files `fragments/forgotten/*.parquet`, written whole and never changed. Writing one takes no lock: a
running build, the loaders of a training run and every later build read the folder, and leave out videos with a
tombstone long before their bytes are removed (`shards.packing.compact`).
"""

import hashlib
import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipmill.base.errors import UserError
from shards.corpus.fragments import fragment_path
from shards.corpus.schema import MANIFEST
from shards.storage.mirror import REFRESH_EVERY_S as STORE_EVERY_S
from shards.storage.mirror import files_of, for_reading
from shards.storage.sealed_parquet import DamagedFile, read_parquet, write_parquet

TOMBSTONE = MANIFEST["forgotten"]
FORGOTTEN = "forgotten"  # error class of items left out because of a tombstone
LOOK_EVERY_S = 1.0  # for a folder; a store is asked only every STORE_EVERY_S


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_tombstones(root: Path, rows: list[dict[str, Any]]) -> Path:
    """Write one file, named after its videos: forgetting the same ones again replaces it. It survives a power cut."""
    named = "\n".join(sorted(row["video_hash"] for row in rows))
    path = fragment_path(root, FORGOTTEN, f"forget-{hash_of(named)[:12]}")
    write_parquet(path, pa.Table.from_pylist(rows, TOMBSTONE), fsync=True)
    files_of(root).upload(str(path.relative_to(root)))
    return path


def read_tombstones(root: Path) -> pa.Table:
    """Return all tombstones, in order of the files' names. Raises UserError for a damaged file."""
    paths = [_folder(root) / name for name in tombstone_files(root)]
    return pa.concat_tables([TOMBSTONE.empty_table(), *map(_read, paths)])


def all_hashes(tombstones: pa.Table) -> set[str]:
    """Return the hashes of every spelling of every forgotten video: ids, URLs, ids at sites."""
    others = [hash_ for hashes in tombstones["other_hashes"].to_pylist() for hash_ in hashes or ()]
    return {*tombstones["video_hash"].to_pylist(), *tombstones["url_hash"].to_pylist(), *others}


def is_forgotten(spellings: Iterable[str], hashes: Collection[str]) -> bool:
    """Return whether one of these spellings of a source is among the hashes of `all_hashes`."""
    return any(hash_of(spelling) in hashes for spelling in spellings)


def _read(path: Path) -> pa.Table:
    try:
        return read_parquet(path, schema=TOMBSTONE)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): it lists videos that this corpus has to forget.") from error
    except DamagedFile as error:
        raise UserError(
            f"{path} is damaged ({error.reason}): it lists videos that this corpus has to forget. Forget those videos "
            "again, then remove the file."
        ) from error


def tombstone_files(root: Path) -> tuple[str, ...]:
    """Return the files' names; equal names mean equal tombstones. A store is asked every STORE_EVERY_S at most."""
    files_of(root).refresh(f"fragments/{FORGOTTEN}", STORE_EVERY_S)
    try:
        names = os.listdir(_folder(root))
    except FileNotFoundError:
        return ()
    return tuple(sorted(name for name in names if name.endswith(".parquet") and not name.startswith(".")))


def _folder(root: Path) -> Path:
    return root / "fragments" / FORGOTTEN


class Tombstones:
    """Tombstones of a corpus for long-running readers: looks for new ones at most every LOOK_EVERY_S.

    Pickled as its folder. A root that is neither a local folder nor a corpus in a store has no tombstones.
    """

    def __init__(self, root: str | Path):
        self.corpus, self.root = root, for_reading(root)
        self._looked_at, self._files = -LOOK_EVERY_S, ()
        self.hashes: frozenset[str] = frozenset()

    def __reduce__(self):
        return Tombstones, (self.corpus,)

    def cover(self, video_ids: Iterable[str]) -> list[bool]:
        """Return for each video whether it has a tombstone."""
        self._look()
        if not self.hashes:
            return [False for _ in video_ids]
        return [hash_of(video_id) in self.hashes for video_id in video_ids]

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at, files = now, tombstone_files(self.root)
        if files != self._files:
            self.hashes = frozenset(read_tombstones(self.root)["video_hash"].to_pylist())
            self._files = files
