"""The bytes of a corpus by kind of file, and what settings that keep less would free. Listed, not read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb

from shards.corpus.packs import folder_of, pack_of
from shards.storage.local import MANIFEST_NAME, PRIVATE
from shards.storage.mirror import files_of, for_reading

CACHE = "cache"  # kind of the files of this machine alone


@dataclass(frozen=True)
class DiskUse:
    """Files of a corpus. `kinds`: kind → (number of files, bytes); `freed`: a setting → bytes that it would free."""

    kinds: dict[str, tuple[int, int]]
    freed: dict[str, int]

    @property
    def num_files(self) -> int:
        return sum(num_files for num_files, _ in self.kinds.values())

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self.kinds.values())


def disk_use(corpus: str | Path, connection: duckdb.DuckDBPyConnection) -> DiskUse:
    """List the files of a corpus in a folder or a store. `connection`: to its manifest."""
    root = for_reading(corpus)
    root = root if root.is_dir() else root.parent  # the manifest itself was given
    sizes = files_of(root).list_all()
    kinds: dict[str, tuple[int, int]] = {}
    for relative, num_bytes in sizes.items():
        kind = kind_of(relative)
        num_files, total = kinds.get(kind, (0, 0))
        kinds[kind] = num_files + 1, total + num_bytes
    kinds = {kind: kinds[kind] for kind in sorted(kinds, key=lambda kind: (_place(kind), kind))}
    freed = {
        "download.keep_sources=false": _sources_to_spare(connection, sizes),
        "pack.keep_clips=false": _clips_to_spare(connection, sizes),
    }
    return DiskUse(kinds, freed)


def kind_of(relative: str) -> str:
    """Return the kind of a corpus's file: sources, clips, shards, shards/NAME, fragments, manifest, cache or other."""
    folder, slash, _ = relative.partition("/")
    if relative == MANIFEST_NAME:
        return "manifest"
    if folder == PRIVATE:
        return CACHE
    if folder == "shards":
        return folder_of(pack_of(relative))
    return folder if slash and folder in _KINDS else "other"


_KINDS = ("sources", "clips", "shards", "fragments", "manifest", CACHE, "other")


def _place(kind: str) -> int:
    return _KINDS.index(kind.partition("/")[0])


def _sources_to_spare(connection: duckdb.DuckDBPyConnection, sizes: Mapping[str, int]) -> int:
    """Return the bytes of the copied videos whose clips are all cut."""
    rows = connection.execute("""
        SELECT path FROM videos
        WHERE path NOT LIKE '/%' AND video_id IN (SELECT video_id FROM clips)
          AND video_id NOT IN (SELECT item_id FROM failures WHERE stage = 'cut')
    """)
    return sum(sizes.get(path, 0) for (path,) in rows.fetchall())


def _clips_to_spare(connection: duckdb.DuckDBPyConnection, sizes: Mapping[str, int]) -> int:
    """Return the bytes of the tars whose clips are all whole in shards of the main pack."""
    rows = connection.execute("""
        SELECT c.tar FROM clips c
        LEFT JOIN samples s ON s.clip_id = c.clip_id AND s.mp4_offset IS NOT NULL AND s.mp4_sha256 = c.sha256
            AND (coalesce(len(c.frames), 0) = 0 OR (len(c.frames) = 1 AND s.jpg_sha256 = c.frames[1].sha256))
        WHERE starts_with(c.tar, 'clips/cut-') GROUP BY c.tar HAVING bool_and(s.clip_id IS NOT NULL)
    """)
    return sum(sizes.get(tar, 0) for (tar,) in rows.fetchall())
