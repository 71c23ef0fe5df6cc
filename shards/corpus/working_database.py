"""The rows of all fragments, in DuckDB files that hold a volume each, and an index of the commits they came from.

It is private to the process that holds the corpus lock, and a cache of the fragments that can be deleted at any time:
`.clipmill/ledger.duckdb`, the index with the sources of all volumes, and `.clipmill/volumes/NNNNNN.duckdb`. One volume
is active: unqualified names in SQL are its tables, and `sources` are its sources. So the cost of a question depends on
the size of a volume and not on that of the corpus.
"""

import bisect
import fcntl
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from clipmill.base.errors import UserError
from clipmill.base.settings import digest
from clipmill.base.text import sql_identifier, sql_literal
from shards.corpus.fragments import (
    OF_UNIT,
    fragment_path,
    is_list,
    outputs_of,
    replaced_by,
    table_of,
    table_schema,
    unit_in,
    write_commit,
)
from shards.corpus.merged import (
    FOLDER,
    ROWS,
    Head,
    MergedCommit,
    by_commit,
    can_be_merged,
    head_name,
    is_same_commit,
    merge,
    merged_volume_of,
    merged_volumes,
    read_head,
    read_rows,
    remove_merged,
    rows_of_head,
    write_head,
    write_rows,
)
from shards.corpus.released_clips import kept_tars, sizes_with_released
from shards.corpus.rows import insert_rows
from shards.corpus.schema import LEDGER, TABLES
from shards.corpus.tombstones import read_tombstones, tombstone_files
from shards.storage.local import Files
from shards.storage.mirror import files_of
from shards.storage.sealed_parquet import DamagedFile, check_parquet

INDEX = "ledger.main"  # catalog and schema of the index; `ledger` is the stem of its file
MOST_ATTACHED = 16  # volumes whose files are open
AGAIN = 20  # a volume is merged again when one twentieth of its commits is new, because all of it is written again


@dataclass(frozen=True)
class FragmentFile:
    name: str
    num_bytes: int
    mtime_ns: int


class WorkingDatabase:
    """The connection to the files of the working database. `memory_limit` bounds DuckDB; no rows are kept in Python.

    cache: folder of the database of a process without the corpus lock, which removes nothing from the corpus.
    """

    def __init__(self, root: Path, *, memory_limit: str = "1GB", cache: Path | None = None):
        self.root, self.files, self.owns_corpus = root, files_of(root), cache is None
        self.path = (cache or root / ".clipmill") / "ledger.duckdb"
        self.volumes_folder = self.path.with_name("volumes")
        self.volumes_folder.mkdir(parents=True, exist_ok=True)
        self.connection = _connect(self.path, memory_limit)
        self.damaged: dict[str, str] = {}  # file → what is wrong with it, of the commits that `sync` removed for it
        self.active: int | None = None
        self._attached: dict[int, None] = {}  # the volume that was active last comes last
        self._create_index()
        self._mending: set[int] = set()  # volumes whose merged files are being checked
        self._first_units: list[tuple[int, int]] = []  # (number of the volume's first unit, volume), in order
        self._note_volumes()

    def close(self) -> None:
        self.connection.close()

    # -- volumes --------------------------------------------------------------------------------------------------

    def volumes(self) -> list[int]:
        """Return the numbers of all volumes, in order; a corpus without sources has volume 0."""
        return sorted(volume for _, volume in self._first_units) or [0]

    def volume_of(self, unit: str) -> int:
        """Return the volume of a unit; rows without a unit belong to volume 0."""
        number = _unit_number(unit)
        if number is None:
            return 0
        at = bisect.bisect_right(self._first_units, (number, 1 << 62)) - 1
        return self._first_units[max(at, 0)][1] if self._first_units else 0

    def volume_of_commit(self, name: str) -> int:
        """Return the volume of the unit that a commit's name holds."""
        return self.volume_of(unit_in(name))

    def volumes_of(self, video_ids: Iterable[str]) -> list[int]:
        """Return the volumes of these videos, in order."""
        with self._as_table("named_videos", list(video_ids)):
            of_them = "video_id IN (SELECT name FROM named_videos)"
            rows = self._rows(f"SELECT DISTINCT volume FROM {INDEX}.all_sources WHERE {of_them} ORDER BY 1")
        return [volume for (volume,) in rows]

    def each_volume(self) -> Iterator[int]:
        """Activate one volume after another and yield its number."""
        for volume in self.volumes():
            self.activate(volume)
            yield volume

    def rows_of_volumes(self, sql: str, parameters: Sequence = ()) -> pa.Table:
        """Return the rows of a SELECT over the tables of one volume, of all volumes together."""
        return pa.concat_tables(
            self.connection.sql(sql, params=list(parameters)).to_arrow_table() for _ in self.each_volume()
        )

    def activate(self, volume: int) -> None:
        """Make SQL work on the tables of this volume."""
        if self.active == volume:
            return
        self._use(volume)
        self.active = volume
        self._load_sources()

    def _use(self, volume: int) -> None:
        """Attach the file of a volume and direct unqualified names to it."""
        self.active = None
        name = _catalog(volume)
        if volume in self._attached:
            del self._attached[volume]
        else:
            if len(self._attached) >= MOST_ATTACHED:
                oldest = next(iter(self._attached))
                self.connection.execute("USE ledger")
                self.connection.execute(f"DETACH {_catalog(oldest)}")
                del self._attached[oldest]
            self._attach(volume)
        self._attached[volume] = None
        self.connection.execute(f"USE {name}")

    def _attach(self, volume: int, tries: int = 3) -> None:
        """Open the file of a volume. One that is torn, or of another index, is filled again."""
        path, name = self.volumes_folder / f"{volume:06d}.duckdb", _catalog(volume)
        expected = dict(self._rows(f"SELECT volume, token FROM {INDEX}.volume_files")).get(volume)
        if expected and path.is_file():
            try:
                self.connection.execute(f"ATTACH {sql_literal(path)} AS {name}")
                if self._rows(f"SELECT token FROM {name}.token") == [(expected,)]:
                    return
                self.connection.execute(f"DETACH {name}")
            except duckdb.Error:
                with suppress(duckdb.Error):
                    self.connection.execute(f"DETACH {name}")
        _remove(path)
        token = uuid.uuid4().hex
        self._execute(f"DELETE FROM {INDEX}.volume_files WHERE volume = ?", [volume])
        self.connection.execute(f"ATTACH {sql_literal(path)} AS {name}")
        try:
            self._fill_file(volume, token)
        except BaseException as error:
            self.connection.execute("USE ledger")
            self.connection.execute(f"DETACH {name}")
            merged = self._rows(f"SELECT 1 FROM {INDEX}.merged WHERE volume = ?", [volume])
            if not (merged and isinstance(error, duckdb.Error)) or volume in self._mending or tries == 1:
                raise
            self._load_head(volume)  # its files may be damaged, or merged again by the corpus's writer
            self._attach(volume, tries - 1)
            return
        self._execute(f"INSERT INTO {INDEX}.volume_files VALUES (?, ?)", [volume, token])  # last: it is complete

    def _fill_file(self, volume: int, token: str) -> None:
        """Create the tables of an empty file of a volume, with the rows of its commits."""
        name = _catalog(volume)
        loose = f"SELECT name FROM {INDEX}.fragments WHERE volume = ? AND num_bytes IS NOT NULL"
        names = [row[0] for row in self._rows(loose, [volume])]
        names = [name for name in names if fragment_path(self.root, "ledger", name).is_file()]
        for table, schema in _schemas().items():
            self.connection.register("columns", schema.empty_table())
            self.connection.execute(f"CREATE TABLE {name}.{table} AS SELECT * FROM columns")
            self.connection.unregister("columns")
        self._execute(f"CREATE TABLE {name}.token AS SELECT ? AS token", [token])
        self.connection.execute(f"USE {name}")
        if names:
            self._load_rows(names)
        self._load_merged_rows(volume)

    def _load_sources(self) -> None:
        """Copy the sources of the active volume, in which the stages look for items."""
        self.connection.execute(
            f"CREATE OR REPLACE TEMP TABLE sources AS SELECT * FROM {INDEX}.all_sources WHERE volume = {self.active}"
        )

    def _note_volumes(self) -> None:
        rows = self._rows(f"SELECT first_unit, volume FROM {INDEX}.volumes ORDER BY 1")
        self._first_units = [(first, volume) for first, volume in rows]

    def changed(self, volume: int) -> None:
        """Note that the rows of a volume have changed. The ledger derives its items again."""

    # -- commits --------------------------------------------------------------------------------------------------

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
        listing = _Listing(self.files)
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
        num_merged, num_not_merged, replaced_in_heads = self._sync_merged(listing)
        leftovers, done_again = self._merged_too(whole)
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
            self._remove_leftovers(leftovers)
        self._remove_merged([*replaced, *done_again])
        self.forget([*deleted, *replaced_loose])
        self.load([name for name in new if name not in replaced_loose])
        if self.active is None and active is not None:
            self.activate(active)
        return len(new) + num_merged, len(deleted) + num_not_merged

    def _merged_too(self, whole: Iterable[str]) -> tuple[set[str], set[str]]:
        """Return which of these loose commits were merged too: as they are, and before they were made again."""
        leftovers: set[str] = set()
        done_again: set[str] = set()
        with self._as_table("named_commits", list(whole)):
            rows = self._rows(
                f"SELECT volume, name FROM {INDEX}.fragments WHERE num_bytes IS NULL "
                "AND name IN (SELECT name FROM named_commits) ORDER BY ALL"
            )
        for volume, of_volume in groupby(rows, key=lambda row: row[0]):
            names = [name for _, name in of_volume]
            merged = read_rows(self.root, read_head(self.root, volume), "ledger", names)
            for name in names:
                (leftovers if is_same_commit(self.root, name, merged) else done_again).add(name)
        return leftovers, done_again

    def _remove_leftovers(self, names: Iterable[str]) -> None:
        """Delete the fragments of merged commits, which a killed writer left."""
        outputs = {name: outputs_of(fragment_path(self.root, "ledger", name)) for name in sorted(names)}
        self.files.remove(*(f"fragments/ledger/{name}.parquet" for name in outputs))
        self.files.remove(*(relative for named in outputs.values() for relative in named if table_of(relative)))

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
            self._load_head(merged)
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

    def remove_commits(self, names: Sequence[str]) -> None:
        """Delete commits with their files. The ledger fragment is deleted first: a kill leaves orphans, not half."""
        with self._as_table("named_commits", names):
            rows = self._rows(f"SELECT outputs FROM {INDEX}.fragments WHERE name IN (SELECT name FROM named_commits)")
        self._remove_merged(names)
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
        first = min((number for unit in rows if (number := _unit_number(unit)) is not None), default=0)
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
                    raise self._is_newer(error) from error
                raise
            self.connection.execute("COMMIT")

    def _is_newer(self, error: duckdb.BinderException) -> UserError:
        return UserError(f"{self.root} has columns of a newer clipmill: {error}")

    def _insert(self, table: str, paths: list[str]) -> None:
        self.connection.execute(
            f"INSERT INTO {table} BY NAME SELECT * EXCLUDE (filename), parse_filename(filename, true) AS fragment "
            "FROM read_parquet(?, filename = true, hive_partitioning = false, union_by_name = true)",
            [paths],
        )

    # -- merged commits -------------------------------------------------------------------------------------------

    def volumes_to_merge(self, least: int) -> list[int]:
        """Return the volumes with at least so many commits that are not merged, or that were removed since."""
        return [
            volume
            for (volume,) in self._rows(
                f"SELECT volume FROM {INDEX}.fragments LEFT JOIN {INDEX}.merged m USING (volume) GROUP BY volume "
                "HAVING count(*) FILTER (fragments.num_bytes IS NOT NULL AND regexp_full_match(name, ?) "
                "AND NOT starts_with(name, 'ingest-')) + coalesce(any_value(num_removed), 0) "
                ">= greatest(?, count(*) FILTER (fragments.num_bytes IS NULL) // ?) ORDER BY 1",
                [OF_UNIT, least, AGAIN],
            )
        ]

    def merge(self, volume: int, *, fsync: bool = False) -> None:
        """Merge the commits of a volume into one file per table, see `shards.corpus.merged`. No task may be running."""
        for _ in range(2):
            rows = self._rows(
                f"SELECT name, outputs FROM {INDEX}.fragments WHERE volume = ? AND num_bytes IS NOT NULL", [volume]
            )
            names = sorted(name for name, outputs in rows if can_be_merged(name, outputs))
            try:
                head = merge(self.root, volume, names, fsync=fsync)
            except DamagedFile as error:
                self._note_damage(error)
                self.rewrite(error.path.stem)
            except FileNotFoundError:
                return  # the next `sync` finds out what else the commit has lost
            else:
                self._note_head(volume, head)
                return

    def has_commit(self, name: str) -> bool:
        return bool(self._rows(f"SELECT 1 FROM {INDEX}.fragments WHERE name = ?", [name]))

    def _sync_merged(self, listing: "_Listing") -> tuple[int, int, set[str]]:
        """Bring the index up to date with the heads.

        Returns the numbers of commits that are new and lost, and the names of those that the new ones replace.
        Rows are loaded when their volume is activated.
        """
        known = {
            volume: row for volume, *row in self._rows(f"SELECT volume, num_bytes, mtime_ns, files FROM {INDEX}.merged")
        }
        num_loaded = num_forgotten = 0
        replaced: set[str] = set()
        for volume in sorted({*known, *merged_volumes(self.root)}):
            *stamp, files = known.get(volume, (None, None, {}))
            if stamp == _stamp(self.root / head_name(volume)) and listing.has_all(files):
                continue
            before = self._merged_in(volume)
            self._load_head(volume)
            after = self._merged_in(volume)
            num_loaded += len(after.keys() - before.keys())
            num_forgotten += len(before.keys() - after.keys())
            replaced |= {old for old in after.values() if old}
        with_media = f"SELECT name, outputs FROM {INDEX}.fragments WHERE num_bytes IS NULL AND cardinality(outputs) > 0"
        lost = [name for name, outputs in self._rows(with_media) if not listing.has_all(outputs)]
        self._remove_merged(lost)
        return num_loaded, num_forgotten + len(lost), replaced

    def _merged_in(self, volume: int) -> dict[str, str | None]:
        """Return commit → the one that it replaces, of the merged commits of a volume."""
        sql = f"SELECT name, replaces FROM {INDEX}.fragments WHERE volume = ? AND num_bytes IS NULL"
        return dict(self._rows(sql, [volume]))

    def _load_head(self, volume: int) -> None:
        """Check the merged files of a volume and put its commits into the index.

        A damaged file is written again from this database if it has the rows; else the commits with rows in that file
        never happened.
        """
        self._mending.add(volume)
        try:
            self._check_head(volume)
        finally:
            self._mending.discard(volume)

    def _check_head(self, volume: int) -> None:
        path, lost = self.root / head_name(volume), set()
        stamp = _stamp(path)
        try:
            head = read_head(self.root, volume)
        except FileNotFoundError:
            head = None
        except DamagedFile as error:
            self._note_damage(error)
            head = self._head_in_index(volume)
            if self.owns_corpus:
                write_head(self.root, volume, head, fsync=True)
        written: dict[str, str] = {}  # damaged file → the one in its place
        for relative, num_bytes in head.files.items() if head else ():
            try:
                _check_rows(self.root / relative, num_bytes)
            except DamagedFile as error:
                if not self.owns_corpus and stamp != _stamp(path):  # merged again since
                    return self._check_head(volume)
                self._note_damage(error)
                again = self._write_rows_again(volume, relative) if self.owns_corpus else None
                if again is None:
                    lost.add(table_of(relative))
                elif again != relative:
                    written[relative] = again
        if written:
            head = self._head_with(volume, head, written)
            write_head(self.root, volume, head, fsync=True)
        if lost:
            names = [name for name, commit in head.commits.items() if lost & set(commit.tables)]
            if self.owns_corpus:
                head = remove_merged(self.root, volume, names, fsync=True)
            else:
                commits = {name: commit for name, commit in head.commits.items() if name not in names}
                files = {each: size for each, size in head.files.items() if table_of(each) not in lost}
                head = Head(commits, files)
        if lost or head is None or head != self._head_in_index(volume):
            self.changed(volume)
            self._discard_file(volume)
        self._note_head(volume, head)

    def _head_with(self, volume: int, head: Head, written: dict[str, str]) -> Head:
        """Return the head with these files in place of others, and without the commits that do not count any more."""
        known = self._merged_in(volume)
        files = {written.get(path, path): size for path, size in head.files.items()}
        files |= {path: (self.root / path).stat().st_size for path in written.values()}
        commits = {name: commit for name, commit in head.commits.items() if name in known}
        return Head(commits, files, head.num_removed + len(head.commits) - len(commits))

    def _note_damage(self, error: DamagedFile) -> None:
        self.damaged[str(error.path.relative_to(self.root))] = error.reason

    def _head_in_index(self, volume: int) -> Head | None:
        """Return the head as it was loaded; None if it was not."""
        found = self._rows(f"SELECT files, num_removed FROM {INDEX}.merged WHERE volume = ?", [volume])
        rows = self._rows(
            f"SELECT name, tables, outputs, replaces FROM {INDEX}.fragments WHERE volume = ? AND num_bytes IS NULL "
            "ORDER BY 1",
            [volume],
        )
        if not (found and rows):
            return None
        return Head({name: MergedCommit(tuple(tables), media, old) for name, tables, media, old in rows}, *found[0])

    def _write_rows_again(self, volume: int, relative: str) -> str | None:
        """Write a damaged file of merged rows from this database; return its path, None if the rows are not here.

        Its content, and with it its name, is another one if commits in it do not count any more.
        """
        table = table_of(relative)
        known = self._rows(f"SELECT files FROM {INDEX}.merged WHERE volume = ?", [volume])
        if not known or relative not in known[0][0] or table not in _schemas():
            return None
        schema = LEDGER if table == "ledger" else table_schema(table)
        columns = ", ".join(sql_identifier(column) for column in [*schema.names, "fragment"])
        try:
            self._use(volume)
            rows = self.connection.sql(
                f"SELECT {columns} FROM {table} WHERE fragment IN (SELECT name FROM {INDEX}.fragments "
                f"WHERE volume = {volume} AND num_bytes IS NULL) ORDER BY fragment, rowid"
            ).to_arrow_reader(ROWS)
            path = write_rows(self.root, volume, table, by_commit(rows, "fragment"), schema, fsync=True)
        except duckdb.Error:  # it was to be loaded from the damaged file
            return None
        written = str(path.relative_to(self.root))
        self.files.upload(written)
        return written

    def _discard_file(self, volume: int) -> None:
        """Make the file of a volume begin empty when it is opened next, with the rows of the commits in the index."""
        if volume in self._attached:
            self.connection.execute("USE ledger")
            self.connection.execute(f"DETACH {_catalog(volume)}")
            del self._attached[volume]
        if self.active == volume:
            self.active = None
        self._execute(f"DELETE FROM {INDEX}.volume_files WHERE volume = ?", [volume])

    def _note_head(self, volume: int, head: Head | None) -> None:
        """Put the merged commits of a volume into the index, in place of loose ones of the same names."""
        self.connection.register("head_commits", rows_of_head(head or Head({}, {})))
        self.connection.execute("BEGIN")
        self._execute(
            f"DELETE FROM {INDEX}.fragments WHERE volume = ? "
            "AND (num_bytes IS NULL OR name IN (SELECT commit FROM head_commits))",
            [volume],
        )
        self._execute(f"DELETE FROM {INDEX}.merged WHERE volume = ?", [volume])
        if head:
            self._execute(
                f"INSERT INTO {INDEX}.fragments "
                "SELECT commit, NULL, NULL, media, ?, tables, replaces FROM head_commits",
                [volume],
            )
            stamp = _stamp(self.root / head_name(volume))
            row = [volume, *stamp, head.files, head.num_removed]
            self._execute(f"INSERT INTO {INDEX}.merged VALUES (?, ?, ?, ?, ?)", row)
        self.connection.execute("COMMIT")
        self.connection.unregister("head_commits")

    def _remove_merged(self, names: Sequence[str]) -> None:
        """Make merged commits count no more; others among the names stay as they are."""
        with self._as_table("named_commits", names):
            rows = self._rows(
                f"SELECT f.volume, f.name, f.num_bytes IS NULL FROM {INDEX}.fragments f "
                f"JOIN {INDEX}.merged USING (volume) WHERE f.name IN (SELECT name FROM named_commits) ORDER BY ALL"
            )
        for volume, of_volume in groupby(rows, key=lambda row: row[0]):
            of_volume = list(of_volume)
            head = None
            if self.owns_corpus:  # a loose commit may have an older twin in the head
                head = remove_merged(self.root, volume, [name for _, name, _ in of_volume], fsync=True)
            self.forget([name for _, name, is_merged in of_volume if is_merged])
            if self.owns_corpus:
                self._note_head(volume, head)

    def _load_merged_rows(self, volume: int) -> None:
        """Insert the rows of the merged commits of a volume into its file, which is in use and has none of them."""
        for (files,) in self._rows(f"SELECT files FROM {INDEX}.merged WHERE volume = ?", [volume]):
            for relative in files:
                table = table_of(relative)
                if table not in _schemas():  # of a stage whose package is not installed
                    continue
                try:
                    self._execute(
                        f"INSERT INTO {table} BY NAME SELECT * EXCLUDE (commit), commit AS fragment "
                        "FROM read_parquet(?, hive_partitioning = false) WHERE commit IN "
                        f"(SELECT name FROM {INDEX}.fragments WHERE volume = ? AND num_bytes IS NULL)",
                        [str(self.root / relative), volume],
                    )
                except duckdb.BinderException as error:
                    raise self._is_newer(error) from error

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

    # -- plumbing -------------------------------------------------------------------------------------------------

    def _rows(self, sql: str, parameters: Sequence = ()) -> list[tuple]:
        return self.connection.execute(sql, list(parameters)).fetchall()

    def _execute(self, sql: str, parameters: Sequence = ()) -> None:
        self.connection.execute(sql, list(parameters))

    @contextmanager
    def _as_table(self, table: str, names: Sequence[str]) -> Iterator[None]:
        self.connection.register(table, pa.table({"name": pa.array(list(names), pa.string())}))
        try:
            yield
        finally:
            self.connection.unregister(table)

    def _create_index(self) -> None:
        self.connection.register("columns", _all_sources().empty_table())
        self.connection.execute(f"CREATE TABLE IF NOT EXISTS {INDEX}.all_sources AS SELECT * FROM columns")
        self.connection.unregister("columns")
        for table, columns in INDEX_TABLES.items():
            self.connection.execute(f"CREATE TABLE IF NOT EXISTS {INDEX}.{table} ({columns})")


def _stamp(path: Path) -> list[int] | None:
    """Return size and time of a file, by which a change is noticed; None if it does not exist."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _check_rows(path: Path, num_bytes: int) -> None:
    """Raise DamagedFile if a file of merged rows is not as its head says."""
    stamp = _stamp(path)
    if stamp is None or stamp[0] != num_bytes:
        raise DamagedFile(path, "it does not exist" if stamp is None else f"it has {stamp[0]:,} bytes")
    try:
        check_parquet(path)
    except FileNotFoundError as error:
        raise DamagedFile(path, "it does not exist") from error


class _Listing:
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


def _unit_number(unit: str) -> int | None:
    return int(unit[1:]) if re.fullmatch(r"u\d+", unit) else None


def _catalog(volume: int) -> str:
    return f"v{volume:06d}"


_SPANS = "STRUCT(n INTEGER, start_s DOUBLE, end_s DOUBLE)[]"
_FRAGMENT = pa.field("fragment", pa.string())

# Of the index, beside `all_sources`.
INDEX_TABLES = {
    # num_bytes, mtime_ns: of the ledger fragment; null: the commit is merged, and `outputs` has its media alone
    "fragments": "name VARCHAR, num_bytes BIGINT, mtime_ns BIGINT, outputs MAP(VARCHAR, BIGINT), volume INTEGER, "
    "tables VARCHAR[], replaces VARCHAR",
    # Of the heads of merged volumes.
    "merged": "volume INTEGER, num_bytes BIGINT, mtime_ns BIGINT, files MAP(VARCHAR, BIGINT), num_removed BIGINT",
    "volumes": "volume INTEGER PRIMARY KEY, first_unit BIGINT",
    "volume_files": "volume INTEGER, token VARCHAR",  # a file with another token does not belong to this index
    "applied_tombstones": "name VARCHAR",  # files of tombstones whose sources are deleted from `all_sources`
    # Of `shards.corpus.copies`. contents: of each volume's videos; copies: what other volumes have of them.
    "contents": f"volume INTEGER, video_id VARCHAR, ordinal BIGINT, content VARCHAR, spans {_SPANS}",
    "copies": f"volume INTEGER, video_id VARCHAR, ordinal BIGINT, content VARCHAR, spans {_SPANS}",
    # Of `shards.corpus.ledger`: what the last derivation of a volume for all units found.
    "counts": "volume INTEGER, stage VARCHAR, status VARCHAR, num BIGINT",
    "standing": "volume INTEGER, stage VARCHAR, failed_id VARCHAR, failed_key VARCHAR, unit VARCHAR, "
    'error_class VARCHAR, message VARCHAR, transient BOOLEAN, attempts INTEGER, "at" TIMESTAMPTZ, run_id VARCHAR, '
    "quarantined BOOLEAN",
    "without_clips": "volume INTEGER, video_id VARCHAR, reason VARCHAR, message VARCHAR",
    # made_with: hash of the settings and of the statements; run_id: the only run for which it holds, null: for every
    # one; tidied: what `Ledger.tidy` has removed since
    "derived": "volume INTEGER, made_with VARCHAR, run_id VARCHAR, rows_hash VARCHAR, tidied VARCHAR",
}


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


def _schemas() -> dict[str, pa.Schema]:
    """Return the columns of the tables that hold the rows of fragments, each with the fragment it came from."""
    schemas = {"ledger": LEDGER, **{table: table_schema(table) for table in TABLES if table != "sources"}}
    return {table: schema.append(_FRAGMENT) for table, schema in schemas.items()}


def _all_sources() -> pa.Schema:
    return table_schema("sources").append(_FRAGMENT)


def _layout() -> str:
    """Hash the columns of the working database. A file with another hash is rebuilt from the fragments."""
    schemas = {**_schemas(), "sources": _all_sources()}
    columns = {table: [f"{field.name} {field.type}" for field in schema] for table, schema in schemas.items()}
    return digest([columns, INDEX_TABLES])


def _connect(path: Path, memory_limit: str) -> duckdb.DuckDBPyConnection:
    config = {"memory_limit": memory_limit, "threads": 1, "preserve_insertion_order": False}
    for attempt in (1, 2):
        try:
            connection = duckdb.connect(str(path), config=config)
            connection.execute("CREATE TABLE IF NOT EXISTS layout AS SELECT ? AS version", [_layout()])
            if connection.execute("SELECT version FROM layout").fetchall() == [(_layout(),)]:
                connection.execute("SET TimeZone = 'UTC'")
                return connection
            connection.close()
        except duckdb.Error:
            if attempt == 2:
                raise
        _remove_all(path)  # a cache: of another layout or torn, it is rebuilt from the fragments
    raise AssertionError("unreachable")


def remove_cache(root: Path) -> None:
    """Delete the working database of a corpus. Raises UserError if a process has it open."""
    _remove_all(root / ".clipmill" / "ledger.duckdb")


def _remove_all(index: Path) -> None:
    """Delete the index, whose lock guards the files of volumes, and then those."""
    _remove(index)
    for path in index.with_name("volumes").glob("*.duckdb"):
        _remove(path)


def _remove(path: Path) -> None:
    """Delete a database that no process has open: one that cannot be opened may be another process's and whole.

    Raises UserError if a process holds DuckDB's lock on it.
    """
    with suppress(FileNotFoundError), open(path, "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{path} is in use by another process, which may be writing this corpus from another container or "
                "host. Stop it, or wait for its end, and run the command again."
            ) from error
        path.unlink()
    path.with_name(path.name + ".wal").unlink(missing_ok=True)
