"""The working database: the rows of all fragments, and an index of the commits they came from.

It is private to the process that holds the corpus lock, and a cache of the fragments that can be deleted at any time.
Its files hold a volume each (`shards.corpus.volume_files`), so the cost of a question depends on the size of a volume
and not on that of the corpus. Merged volumes are read as `shards.corpus.merged_commits` says.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from clipmill.base.errors import UserError
from clipmill.base.text import sql_identifier
from shards.corpus.fragments import (
    fragment_path,
    is_list,
    outputs_of,
    replaced_by,
    table_of,
    table_schema,
    write_commit,
)
from shards.corpus.merged import FOLDER, merged_volume_of
from shards.corpus.merged_commits import MergedCommits
from shards.corpus.released_clips import kept_tars, sizes_with_released
from shards.corpus.rows import insert_rows
from shards.corpus.schema import LEDGER, TABLES
from shards.corpus.tombstones import read_tombstones, tombstone_files
from shards.corpus.volume_files import INDEX, VolumeFiles, catalog_of, row_schemas, unit_number
from shards.storage.local import Files
from shards.storage.sealed_parquet import DamagedFile, check_parquet


@dataclass(frozen=True)
class FragmentFile:
    name: str
    num_bytes: int
    mtime_ns: int


class WorkingDatabase(VolumeFiles):
    """The files, filled from the fragments."""

    def __init__(self, root: Path, *, memory_limit: str = "1GB", cache: Path | None = None):
        super().__init__(root, memory_limit=memory_limit, cache=cache)
        self.damaged: dict[str, str] = {}  # file → what is wrong with it, of the commits that `sync` removed for it
        self.merged = MergedCommits(self)

    def changed(self, volume: int) -> None:
        """Note that the rows of a volume have changed. The ledger derives its items again."""

    def _fill_file(self, volume: int, token: str) -> None:
        """Create the tables of an empty file of a volume, with the rows of its commits."""
        name = catalog_of(volume)
        loose = f"SELECT name FROM {INDEX}.fragments WHERE volume = ? AND num_bytes IS NOT NULL"
        names = [row[0] for row in self._rows(loose, [volume])]
        names = [name for name in names if fragment_path(self.root, "ledger", name).is_file()]
        for table, schema in row_schemas().items():
            self.connection.register("columns", schema.empty_table())
            self.connection.execute(f"CREATE TABLE {name}.{table} AS SELECT * FROM columns")
            self.connection.unregister("columns")
        self._execute(f"CREATE TABLE {name}.token AS SELECT ? AS token", [token])
        self.connection.execute(f"USE {name}")
        if names:
            self._load_rows(names)
        self.merged.load_rows(volume)

    def _mend(self, volume: int, error: BaseException) -> bool:
        """Check the merged files of a volume, which may be damaged, or merged again by the corpus's writer."""
        is_merged = self._rows(f"SELECT 1 FROM {INDEX}.merged WHERE volume = ?", [volume])
        if not (is_merged and isinstance(error, duckdb.Error)) or volume in self.merged.mending:
            return False
        self.merged.check(volume)
        return True

    def sync(self, *, replace_sources: bool = False) -> tuple[int, int]:
        """Load new fragments; forget those that are deleted, damaged or lack an output; return (loaded, forgotten).

        Raises UserError for a damaged commit of sources, which only their list can make again. With `replace_sources`
        it is removed like any other, because the caller is about to read lists.
        """
        active = self.active
        # Fragments before heads: while a writer merges a volume, each commit is in one of the two lists or in both.
        present = {
            file.name: file for file in _scan(self.root / "fragments" / "ledger") if merged_volume_of(file.name) is None
        }
        loose = f"SELECT name, num_bytes, mtime_ns, outputs FROM {INDEX}.fragments WHERE num_bytes IS NOT NULL"
        rows = self._rows(loose)
        known = {name: (size, mtime) for name, size, mtime, _ in rows}
        outputs = {name: named for name, _, _, named in rows}
        listing = Listing(self.files)
        whole, vanished = {}, set()
        for name, file in present.items():
            unchanged = known.get(name) == (file.num_bytes, file.mtime_ns)
            try:
                named = outputs[name] if unchanged else self._checked_outputs(name)
            except FileNotFoundError:  # merged or removed by the corpus's writer since
                vanished.add(name)
                continue
            except DamagedFile as error:  # torn by a crash, or rotten
                self._note_damage(error)
                if not (name in known and is_list(name) and listing.has_all(outputs[name])):
                    continue
                self.rewrite(name)  # no stage can make it again
                named, unchanged = outputs[name], True
            if listing.has_all(named):
                whole[name] = (file, named, unchanged)
        num_merged, num_not_merged, replaced_in_heads = self.merged.sync(listing)
        leftovers, done_again = self.merged.twins_of(whole)
        for name in leftovers:
            del whole[name]
        deleted = [name for name, *_ in self._rows(loose) if name not in whole]
        new = [name for name, (_, _, unchanged) in whole.items() if not unchanged or name in done_again]
        lost = set(present) - set(whole) - vanished - leftovers  # a commit that lacks one of its files was never made
        if not replace_sources:
            self._refuse_to_lose_sources(lost)
        # A writer that was killed before it cleaned up leaves the commits that it superseded.
        replaced = {old for name in new for old in replaced_by(fragment_path(self.root, "ledger", name))}
        replaced_loose = (replaced | replaced_in_heads) & set(whole)
        if self.owns_corpus:
            self.files.remove(*(f"fragments/ledger/{name}.parquet" for name in sorted(lost | replaced_loose)))
            self.merged.remove_leftovers(leftovers)
        self.merged.remove([*replaced, *done_again])
        self.forget([*deleted, *replaced_loose])
        self.load([name for name in new if name not in replaced_loose])
        if self.active is None and active is not None:
            self.activate(active)
        return len(new) + num_merged, len(deleted) + num_not_merged

    def _checked_outputs(self, name: str) -> dict[str, int]:
        """Return path → size of the files of a commit after checking its fragments. Raises DamagedFile."""
        path = fragment_path(self.root, "ledger", name)
        outputs = outputs_of(path)
        check_parquet(path, LEDGER)
        for relative in outputs:
            table = table_of(relative)
            if table in TABLES and (self.root / relative).is_file():
                check_parquet(self.root / relative, table_schema(table))
        return outputs

    def _refuse_to_lose_sources(self, lost: Iterable[str]) -> None:
        """Raise UserError if a commit of sources is among these: without it the next packing would remove clips."""
        for name in sorted(lost):
            if is_list(name):
                of_it = [f"{path}: {why}" for path, why in self.damaged.items() if Path(path).stem == name]
                what = "".join(of_it) or f"a file of fragments/ledger/{name}.parquet is missing"
                raise UserError(
                    f"{self.root}: a record of sources is damaged ({what}). "
                    "Put a copy of the file back, or give `clipmill build` all lists of this corpus again."
                )

    def remove_orphans(self) -> int:
        """Delete files that no commit names, left by workers that were killed; return how many.

        Call it right after `sync`, while no worker is writing.
        """
        owned = {
            relative for (outputs,) in self._rows(f"SELECT outputs FROM {INDEX}.fragments") for relative in outputs
        }
        owned |= {relative for (files,) in self._rows(f"SELECT files FROM {INDEX}.merged") for relative in files}
        owned |= kept_tars(self.root)
        folders = [*(f"fragments/{table}" for table in TABLES), "clips"]
        there = [f"{folder}/{name}" for folder in folders for name in self.files.sizes(folder)]
        ledgers = self.files.sizes("fragments/ledger")
        there += [f"fragments/ledger/{name}" for name in ledgers if merged_volume_of(name) is not None]
        orphans = [relative for relative in there if relative not in owned]
        self.files.remove(*orphans)
        return len(orphans)

    def rewrite(self, name: str) -> None:
        """Write the fragments of a commit again from the rows in this database, which were checked when loaded.

        name: the stem of a damaged file; of a merged volume its files are checked and written again.
        """
        merged = merged_volume_of(name)
        if merged is not None:
            self.merged.check(merged)
            return
        found = self._rows(f"SELECT outputs, volume FROM {INDEX}.fragments WHERE name = ?", [name])
        if not found:
            return  # not loaded: `sync` has removed it
        ((outputs, volume),) = found
        self.activate(volume)
        ((num_rows, written),) = self._rows(
            f"SELECT (SELECT count(*) FROM {INDEX}.all_sources WHERE fragment = $1), sum(num_rows) "
            "FROM ledger WHERE fragment = $1",
            [name],
        )
        if is_list(name) and num_rows != written:  # forgotten sources are not in this database any more
            self._refuse_to_lose_sources([name])
        tables = {
            table: self._rows_of(name, table, table_schema(table))
            for table in sorted({table_of(relative) for relative in outputs} & set(TABLES))
        }
        media = [relative for relative in outputs if table_of(relative) is None]
        released = {relative: outputs[relative] for relative in media if not (self.root / relative).exists()}
        rows, media = self._rows_of(name, "ledger", LEDGER), [each for each in media if each not in released]
        write_commit(self.root, name, tables, rows, media, fsync=True, released=released)
        self.load([name])

    def _rows_of(self, commit: str, table: str, schema: pa.Schema) -> pa.Table:
        columns = ", ".join(sql_identifier(column) for column in schema.names)
        place = f"{INDEX}.all_sources" if table == "sources" else table
        sql = f"SELECT {columns} FROM {place} WHERE fragment = $name ORDER BY rowid"
        return self.connection.sql(sql, params={"name": commit}).to_arrow_table().cast(schema)

    def drawn_files(self, seed: str, most: int) -> list[tuple[str, int]]:
        """Return (path, bytes) of fragments in an order that depends on the seed."""
        return self._rows(
            "WITH files AS (SELECT 'fragments/ledger/' || name || '.parquet' AS path, num_bytes "
            f"FROM {INDEX}.fragments WHERE num_bytes IS NOT NULL "
            f"UNION ALL SELECT printf('{FOLDER}/merged-%06d.parquet', volume), num_bytes FROM {INDEX}.merged "
            "UNION ALL SELECT o.key, o.value "
            f"FROM (SELECT unnest(map_entries(outputs)) AS o FROM {INDEX}.fragments "
            f"UNION ALL SELECT unnest(map_entries(files)) FROM {INDEX}.merged)) "
            "SELECT path, num_bytes FROM files WHERE path LIKE 'fragments/%' ORDER BY hash(path || ?) LIMIT ?",
            [seed, most],
        )

    def has_commit(self, name: str) -> bool:
        return bool(self._rows(f"SELECT 1 FROM {INDEX}.fragments WHERE name = ?", [name]))

    def remove_commits(self, names: Sequence[str]) -> None:
        """Delete commits with their files. The ledger fragment is deleted first: a kill leaves orphans, not half."""
        with self._as_table("named_commits", names):
            rows = self._rows(f"SELECT outputs FROM {INDEX}.fragments WHERE name IN (SELECT name FROM named_commits)")
        self.merged.remove(names)
        self.files.remove(*(f"fragments/ledger/{name}.parquet" for name in names))
        self.files.remove(*(relative for (outputs,) in rows for relative in outputs))
        self.forget(names)

    def forget(self, names: Sequence[str]) -> None:
        """Delete the rows of these commits. The index is changed last, so that a kill only makes this run again."""
        if not names:
            return
        lists = any(map(is_list, names))
        of_them = "name IN (SELECT name FROM removed)"
        if not lists:  # else the names do not say which volumes, so all of the index is read
            numbers = [self.volume_of_commit(name) for name in names]
            of_them += f" AND volume BETWEEN {min(numbers)} AND {max(numbers)}"
        with self._as_table("removed", names):
            volumes = self._rows(f"SELECT DISTINCT volume FROM {INDEX}.fragments WHERE {of_them} ORDER BY 1")
        for (volume,) in volumes:
            self.changed(volume)  # first, so that a kill leaves no summary of rows that are gone
            self._use(volume)
            with self._as_table("removed", names):
                self._delete_rows()
        with self._as_table("removed", names):
            if lists:
                self._execute(f"DELETE FROM {INDEX}.all_sources WHERE fragment IN (SELECT name FROM removed)")
            if volumes:
                self._execute(f"DELETE FROM {INDEX}.fragments WHERE {of_them}")
        self._back(volumes[-1][0] if volumes else self.active)

    def _delete_rows(self) -> None:
        """Delete the rows of the commits in `removed` from the volume in use."""
        for table in ["ledger", *(table for table in TABLES if table != "sources")]:
            self.connection.execute(f"DELETE FROM {table} WHERE fragment IN (SELECT name FROM removed)")

    def load(self, names: Sequence[str]) -> None:
        """Load the rows of whole commits, replacing those loaded before."""
        if not names:
            return
        self.forget(names)
        files: dict[int, list[tuple]] = {}
        for name in sorted(names, key=lambda name: not is_list(name)):  # lists first: they say which units there are
            path = fragment_path(self.root, "ledger", name)
            named, stat = outputs_of(path), path.stat()
            volume = self._load_list(name) if is_list(name) else self.volume_of_commit(name)
            files.setdefault(volume, []).append((name, stat.st_size, stat.st_mtime_ns, named, volume))
        for volume, rows in files.items():
            self.changed(volume)  # first, so that a kill leaves no summary of fewer rows
            self._use(volume)
            self._load_rows([name for name, *_ in rows])
            insert_rows(self.connection, f"{INDEX}.fragments", _LOOSE, rows)
        self._back(volume)

    def _back(self, volume: int | None) -> None:
        """Activate a volume again, with the sources that it has now."""
        self.active = None
        if volume is not None:
            self.activate(volume)

    def _load_list(self, name: str) -> int:
        """Load the sources of a commit and return their volume."""
        path = fragment_path(self.root, "sources", name)
        self._insert(f"{INDEX}.all_sources", [str(path)])
        self._execute(f"UPDATE {INDEX}.all_sources SET volume = 0 WHERE fragment = ? AND volume IS NULL", [name])
        rows = pq.read_table(path, columns=["unit"])["unit"].unique().to_pylist()
        of_commit = self._rows(f"SELECT volume FROM {INDEX}.all_sources WHERE fragment = ? LIMIT 1", [name])
        volume = of_commit[0][0] if of_commit else 0
        first = min((number for unit in rows if (number := unit_number(unit)) is not None), default=0)
        self._execute(
            f"INSERT INTO {INDEX}.volumes VALUES (?, ?) ON CONFLICT DO UPDATE SET first_unit = least(first_unit, ?)",
            [volume, first, first],
        )
        self._execute(f"DELETE FROM {INDEX}.applied_tombstones")  # the new sources may have been forgotten
        self._note_volumes()
        return volume

    def _load_rows(self, names: Sequence[str]) -> None:
        """Insert the rows of commits into the volume in use, after what a killed load of them may have left."""
        by_table: dict[str, list[str]] = {"ledger": []}
        for name in names:
            path = fragment_path(self.root, "ledger", name)
            by_table["ledger"].append(str(path))
            for relative in outputs_of(path):
                table = table_of(relative)
                if table in TABLES and table != "sources":  # else of a stage whose package is not installed
                    by_table.setdefault(table, []).append(str(self.root / relative))
        with self._as_table("removed", names):
            self.connection.execute("BEGIN")
            try:
                self._delete_rows()
                for table, paths in by_table.items():
                    self._insert(table, paths)
            except duckdb.Error as error:
                self.connection.execute("ROLLBACK")
                if isinstance(error, duckdb.BinderException):
                    raise self._newer_columns(error) from error
                raise
            self.connection.execute("COMMIT")

    def _newer_columns(self, error: duckdb.BinderException) -> UserError:
        return UserError(f"{self.root} has columns of a newer clipmill: {error}")

    def _insert(self, table: str, paths: list[str]) -> None:
        self.connection.execute(
            f"INSERT INTO {table} BY NAME SELECT * EXCLUDE (filename), parse_filename(filename, true) AS fragment "
            "FROM read_parquet(?, filename = true, hive_partitioning = false, union_by_name = true)",
            [paths],
        )

    def _note_damage(self, error: DamagedFile) -> None:
        self.damaged[str(error.path.relative_to(self.root))] = error.reason

    def leave_out_forgotten(self) -> None:
        """Delete the sources that have a tombstone; every query but that for failures of lists starts from sources.

        Their other rows stay in this cache until `clipmill compact` rebuilds it.
        """
        files = tombstone_files(self.root)
        if files == tuple(name for (name,) in self._rows(f"SELECT name FROM {INDEX}.applied_tombstones ORDER BY 1")):
            return
        self.connection.register("to_forget", read_tombstones(self.root))
        forgotten = "sha256(video_id) IN (SELECT video_hash FROM to_forget)"
        volumes = self._rows(f"SELECT DISTINCT volume FROM {INDEX}.all_sources WHERE {forgotten}")
        active = self.active
        for volume in {0, *(volume for (volume,) in volumes)}:
            self.changed(volume)
            self._use(volume)
            self.connection.execute(
                "DELETE FROM ledger WHERE stage = 'pack' "
                "AND sha256(split_part(item_id, '.', 1)) IN (SELECT video_hash FROM to_forget)"
            )
        self._execute(f"DELETE FROM {INDEX}.all_sources WHERE {forgotten}")  # after all summaries that name them
        self.connection.unregister("to_forget")
        self._execute(f"DELETE FROM {INDEX}.applied_tombstones")
        if files:
            insert_rows(self.connection, f"{INDEX}.applied_tombstones", _NAMES, [[name] for name in files])
        self._back(active)


class Listing:
    """The sizes of files, found by one listing per folder instead of one stat per file."""

    def __init__(self, files: Files):
        self.files, self.folders = files, {}

    def has_all(self, outputs: dict[str, int]) -> bool:
        return all(self._size(relative) == num_bytes for relative, num_bytes in outputs.items())

    def _size(self, relative: str) -> int | None:
        folder, _, name = relative.rpartition("/")
        if folder not in self.folders:
            self.folders[folder] = sizes_with_released(self.files, folder)
        return self.folders[folder].get(name)


def _scan(folder: Path) -> list[FragmentFile]:
    if not folder.is_dir():
        return []
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.is_file():
                continue
            stat = entry.stat()
            files.append(FragmentFile(entry.name.removesuffix(".parquet"), stat.st_size, stat.st_mtime_ns))
    return sorted(files, key=lambda file: file.name)


# Columns that are inserted: of `fragments` for loose commits, and of `applied_tombstones`.
_LOOSE = pa.schema(
    [
        ("name", pa.string()),
        ("num_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("outputs", pa.map_(pa.string(), pa.int64())),
        ("volume", pa.int32()),
    ]
)
_NAMES = pa.schema([("name", pa.string())])
