"""Clips whose tar was deleted because shards hold them (`pack.keep_clips: false`), and where their bytes are now.

`fragments/released_clips/NNNNNN.parquet` is the record of volume NNNNNN. It names the deleted tars, so that their
commits count as whole, and the clips that were copied to a tar of their own (`clips/kept-…`) before the shards that
held them changed. All other places are in the indexes of shards: a shard that is written again changes no record.

Two temporary tables have the answer for the volume that the ledger shows:

packed_clips  the place of each clip of a deleted tar; `current_clips` names it, and with that every other reader
lost_cuts     the videos of which a clip is in no file any more: their rows do not count, so they are cut again
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from clipmill.base.errors import UserError
from shards.corpus.packs import MAIN, NEXT, folder_of, is_shard_file, named_packs, volume_of
from shards.corpus.schema import INT64, STRING
from shards.storage.local import Files
from shards.storage.mirror import files_of
from shards.storage.sealed_parquet import DamagedFile, check_parquet, read_metadata, read_parquet, write_parquet

if TYPE_CHECKING:
    from shards.corpus.ledger import Ledger

FOLDER = "fragments/released_clips"
KEPT = "clips/kept-"  # begins the paths of tars with clips that no shard holds any more
FOUND = "found"  # in the place of a plan's key: an index under `.next` that was made by reading a tar without one

_PLACES = pa.schema(
    [
        ("clip_id", STRING),
        ("mp4_offset", INT64),
        ("mp4_bytes", INT64),
        ("mp4_sha256", STRING),
        ("jpg_offset", INT64),
        ("jpg_bytes", INT64),
        ("jpg_sha256", STRING),
    ]
)
KEPT_CLIPS = _PLACES.append(pa.field("tar", STRING))  # rows of a record
_HELD = pa.schema([("path", STRING), ("tar", STRING), ("num_bytes", INT64), ("rank", INT64)])


@dataclass(frozen=True)
class Record:
    """The record of a volume. `shards`: those that held the clips when it was written, so that a loss is noticed."""

    tars: dict[str, int] = field(default_factory=dict)  # path → bytes
    shards: dict[str, int] = field(default_factory=dict)
    kept: pa.Table = field(default_factory=KEPT_CLIPS.empty_table)


@dataclass(frozen=True)
class PackedFile:
    """A tar of a pack with its index, in place or complete under `.next`. Paths are relative to the corpus."""

    pack: str
    volume: int | None
    index: str
    tar: str
    num_bytes: int  # of the tar

    @property
    def is_in_place(self) -> bool:
        return f"/{NEXT}/" not in self.index


def record_path(root: Path, volume: int) -> Path:
    return root / FOLDER / f"{volume:06d}.parquet"


def recorded_volumes(root: Path) -> list[int]:
    return sorted(int(path.stem) for path in (root / FOLDER).glob("[0-9]*.parquet"))


def read_record(root: Path, volume: int) -> Record:
    """Return the record of a volume, an empty one if there is none. Raises UserError if it is damaged."""
    path = record_path(root, volume)
    if not path.is_file():
        return Record()
    try:
        values = json.loads(read_metadata(path)[b"clipmill.released"])
        return Record(values["tars"], values["shards"], read_parquet(path).cast(KEPT_CLIPS))
    except (DamagedFile, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is damaged: it says which tars of clips were deleted because shards hold their clips. Put a copy "
            "of it back, or remove it: then these clips are cut again."
        ) from error


def write_record(root: Path, volume: int, record: Record) -> None:
    """Write the record of a volume, and flush it to the disk; without tars and clips it is removed."""
    path = record_path(root, volume)
    relative = str(path.relative_to(root))
    if not (record.tars or record.kept.num_rows):
        files_of(root).remove(relative)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    values = json.dumps({"tars": record.tars, "shards": record.shards}, sort_keys=True)
    write_parquet(path, record.kept.replace_schema_metadata({"clipmill.released": values}), fsync=True)
    files_of(root).upload(relative)


def sizes_with_released(files: Files, folder: str) -> dict[str, int]:
    """Return name → bytes of the files in a folder; the deleted tars of clips count as if they were there."""
    sizes = files.sizes(folder)
    if folder != "clips":
        return sizes
    records = [read_record(files.root, volume) for volume in recorded_volumes(files.root)]
    return {tar.removeprefix("clips/"): size for record in records for tar, size in record.tars.items()} | sizes


def kept_tars(root: Path) -> set[str]:
    """Return the paths of the tars with clips that no shard holds any more."""
    return {tar for volume in recorded_volumes(root) for tar in read_record(root, volume).kept["tar"].to_pylist()}


def packed_files(root: Path) -> list[PackedFile]:
    """Return the tars of all packs that have an index, those of the main pack first.

    An index under `.next` without its tar there belongs to the tar in place, if that has no index: it was just moved.
    """
    files, found = files_of(root), []
    for pack in (MAIN, *named_packs(root)):
        folder = folder_of(pack)
        sizes, waiting = files.sizes(folder), files.sizes(f"{folder}/{NEXT}")
        for name in sizes:
            tar = f"{Path(name).stem}.tar"
            if name.endswith(".parquet") and is_shard_file(name) and tar in sizes:
                found.append(PackedFile(pack, volume_of(name), f"{folder}/{name}", f"{folder}/{tar}", sizes[tar]))
        for name in sorted(waiting, key=lambda name: name.endswith(f"-{FOUND}.parquet")):
            shard = f"{name.rpartition('-')[0]}.tar"
            if not name.endswith(".parquet") or not is_shard_file(shard):
                continue
            index, tar = f"{folder}/{NEXT}/{name}", f"{Path(name).stem}.tar"
            if tar in waiting:
                path, size = f"{folder}/{NEXT}/{tar}", waiting[tar]
            elif shard in sizes and (f"{Path(shard).stem}.parquet" not in sizes or name.endswith(f"-{FOUND}.parquet")):
                path, size = f"{folder}/{shard}", sizes[shard]
            else:
                continue
            found.append(PackedFile(pack, volume_of(shard), index, path, size))
    return found


class ReleasedClips:
    """The places of the clips of deleted tars, for the volume that a ledger shows."""

    def __init__(self, ledger: "Ledger"):
        self.ledger = ledger
        self.loaded: int | None = None  # volume of the temporary tables
        self._looked = self._filled = False
        self.find("packed_clips", [], [])
        ledger.connection.execute("CREATE OR REPLACE TEMP TABLE lost_cuts (item_id VARCHAR, fragment VARCHAR)")

    def notice_changes(self) -> None:
        """Mark volumes as changed whose shards are not those of their record, once in a process."""
        if self._looked:
            return
        self._looked = True
        volumes = recorded_volumes(self.ledger.root)
        there = {file.tar: file.num_bytes for file in packed_files(self.ledger.root)} if volumes else {}
        for volume in volumes:
            shards = read_record(self.ledger.root, volume).shards
            if any(there.get(tar) != size for tar, size in shards.items()):
                self.ledger.relocated(volume)

    def load(self, volume: int) -> None:
        """Fill the temporary tables for the active volume."""
        if self.loaded == volume:
            return
        record = read_record(self.ledger.root, volume)
        if record.tars or self._filled:
            files = packed_files(self.ledger.root) if record.tars else []
            self.find("packed_clips", list(record.tars), self.of_volume(files, volume), record.kept)
            self._note_losses(record, files)
            self._filled = bool(record.tars)
        self.loaded = volume

    def made_again(self, commits: Collection[str]) -> None:
        """Drop the tars of these commits from the records if they exist: their clips were cut again.

        Only the writer does, and not while it releases: for a reader, such a tar is one that is about to be deleted.
        """
        for name in commits if self.ledger.owns_corpus else ():
            tar, volume = f"clips/{name}.tar", self.ledger.volume_of_commit(name)
            if name.startswith("cut-") and record_path(self.ledger.root, volume).is_file():
                record = read_record(self.ledger.root, volume)
                if tar in record.tars and self.ledger.files.has(tar):
                    rest = {path: size for path, size in record.tars.items() if path != tar}
                    write_record(self.ledger.root, volume, Record(rest, record.shards, record.kept))
                    self.ledger.relocated(volume)

    @staticmethod
    def of_volume(files: Sequence[PackedFile], volume: int) -> list[PackedFile]:
        """Return the files that may hold clips of a volume."""
        return [file for file in files if file.volume in (volume, None)]

    def find(self, table: str, tars: Sequence[str], files: Sequence[PackedFile], kept: pa.Table | None = None) -> None:
        """Make a temporary table of the places where the clips of these tars are: in these files, or kept."""
        connection, root = self.ledger.connection, self.ledger.root
        sound = [file for file in files if _is_sound(root / file.index)]
        held = [{"path": str(root / f.index), "tar": f.tar, "num_bytes": f.num_bytes, "rank": n} for n, f in
                enumerate(sound)]  # fmt: skip
        connection.register("held_in", pa.Table.from_pylist(held, _HELD))
        connection.register("named_tars", pa.table({"tar": pa.array(list(tars), STRING)}))
        connection.register("kept_clips", KEPT_CLIPS.empty_table() if kept is None else kept)
        columns = ", ".join(_PLACES.names)
        indexed = f"SELECT {columns}, filename FROM read_parquet($paths, filename = true, union_by_name = true)"
        none = f"SELECT {columns}, tar AS filename FROM kept_clips WHERE false"
        try:
            connection.execute(
                _FIND.replace("$table", table).replace("$indexed", indexed if sound and tars else none),
                {"paths": [each["path"] for each in held]} if sound and tars else None,
            )
        finally:
            for name in ("held_in", "named_tars", "kept_clips"):
                connection.unregister(name)

    def _note_losses(self, record: Record, files: Sequence[PackedFile]) -> None:
        """Fill `lost_cuts`, and say which shards are missing or shorter than they were."""
        connection, has = self.ledger.connection, self.ledger.files.has
        missing = connection.execute("SELECT DISTINCT own_tar FROM packed_clips WHERE tar IS NULL").fetchall()
        gone = [tar for (tar,) in missing if not has(tar)]
        with self.ledger._as_table("gone_tars", gone):
            connection.execute(
                "CREATE OR REPLACE TEMP TABLE lost_cuts AS SELECT DISTINCT item_id, fragment FROM packed_clips "
                "WHERE tar IS NULL AND own_tar IN (SELECT name FROM gone_tars)"
            )
        sql = "SELECT count(DISTINCT item_id) FROM lost_cuts WHERE item_id IN (SELECT video_id FROM sources)"
        ((num_videos,),) = connection.execute(sql).fetchall()
        there = {file.tar: file.num_bytes for file in files}
        for shard in [tar for tar, size in record.shards.items() if there.get(tar) != size] if num_videos else ():
            self.ledger.damaged[shard] = (
                f"it is missing or damaged, and it held the only copy of clips: they are cut again from their sources "
                f"({num_videos:,} videos of this volume)"
            )


# A clip counts as found with its mp4 and all its caption frames; a shard holds the first frame only.
_FIND = """
CREATE OR REPLACE TEMP TABLE $table AS
WITH places AS (
    SELECT i.* EXCLUDE (filename), h.tar, h.rank FROM ($indexed) i JOIN held_in h ON h.path = i.filename
    WHERE mp4_offset + mp4_bytes <= h.num_bytes AND coalesce(jpg_offset + jpg_bytes <= h.num_bytes, true)
    UNION ALL BY NAME SELECT *, 1_000_000_000 AS rank FROM kept_clips
)
SELECT c.item_id, c.clip_id, c.fragment, c.tar AS own_tar, p.tar, p.mp4_offset,
       list_transform(c.frames, lambda f: {time_s: f.time_s, sha256: f.sha256, "offset": p.jpg_offset,
                                           num_bytes: f.num_bytes}) AS frames
FROM clips c
LEFT JOIN places p ON p.clip_id = c.clip_id AND p.mp4_sha256 = c.sha256
    AND (coalesce(len(c.frames), 0) = 0 OR (len(c.frames) = 1 AND p.jpg_sha256 = c.frames[1].sha256))
WHERE c.tar IN (SELECT tar FROM named_tars)
QUALIFY row_number() OVER (PARTITION BY c.clip_id, c.fragment ORDER BY p.rank) = 1
"""


def _is_sound(path: Path) -> bool:
    try:
        check_parquet(path)
    except (DamagedFile, FileNotFoundError):
        return False
    return True
