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
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from clipmill.base.errors import UserError
from clipmill.base.settings import digest
from clipmill.base.text import sql_identifier, sql_literal
from shards.corpus.fragments import fragment_path, outputs_of, replaced_by, table_schema, write_commit
from shards.corpus.released_clips import kept_tars, sizes_with_released
from shards.corpus.schema import LEDGER, TABLES
from shards.corpus.tombstones import read_tombstones, tombstone_files
from shards.storage.local import Files
from shards.storage.mirror import files_of
from shards.storage.sealed_parquet import DamagedFile, check_parquet

INDEX = "ledger.main"  # catalog and schema of the index; `ledger` is the stem of its file
MOST_ATTACHED = 16  # volumes whose files are open


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
        return self.volume_of(_unit_in(name))

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

    def _attach(self, volume: int) -> None:
        """Open the file of a volume. One that is torn, or of another index, begins empty and its commits are new."""
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
        names = [row[0] for row in self._rows(f"SELECT name FROM {INDEX}.fragments WHERE volume = ?", [volume])]
        names = [name for name in names if fragment_path(self.root, "ledger", name).is_file()]
        self.connection.execute(f"ATTACH {sql_literal(path)} AS {name}")
        for table, schema in _schemas().items():
            self.connection.register("columns", schema.empty_table())
            self.connection.execute(f"CREATE TABLE {name}.{table} AS SELECT * FROM columns")
            self.connection.unregister("columns")
        self._execute(f"CREATE TABLE {name}.token AS SELECT ? AS token", [token])
        self._execute(f"INSERT INTO {INDEX}.volume_files VALUES (?, ?)", [volume, token])
        if names:
            self.connection.execute(f"USE {name}")
            self._load_rows(names)

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
        present = {file.name: file for file in _scan(self.root / "fragments" / "ledger")}
        rows = self._rows(f"SELECT name, num_bytes, mtime_ns, outputs FROM {INDEX}.fragments")
        known = {name: (size, mtime) for name, size, mtime, _ in rows}
        outputs = {name: named for name, _, _, named in rows}
        listing = _Listing(self.files)
        whole = {}
        for name, file in present.items():
            unchanged = known.get(name) == (file.num_bytes, file.mtime_ns)
            try:
                named = outputs[name] if unchanged else self._checked_outputs(name)
            except DamagedFile as error:  # torn by a crash, or rotten
                self.damaged[str(error.path.relative_to(self.root))] = error.reason
                if not (name in known and is_list(name) and listing.has_all(outputs[name])):
                    continue
                self.rewrite(name)  # no stage can make it again
                named, unchanged = outputs[name], True
            if listing.has_all(named):
                whole[name] = (file, named, unchanged)
        deleted = [name for name in known if name not in whole]
        new = [name for name, (_, _, unchanged) in whole.items() if not unchanged]
        lost = set(present) - set(whole)  # a commit that lacks one of its files counts as never made
        if not replace_sources:
            self._refuse_to_lose_sources(lost)
        # A writer that was killed before it cleaned up leaves the commits that it superseded.
        replaced = {old for name in new for old in replaced_by(fragment_path(self.root, "ledger", name))} & set(whole)
        if self.owns_corpus:
            self.files.remove(*(f"fragments/ledger/{name}.parquet" for name in sorted(lost | replaced)))
        self.forget([*deleted, *replaced])
        self.load([name for name in new if name not in replaced])
        return len(new), len(deleted)

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
        owned |= kept_tars(self.root)
        folders = [*(f"fragments/{table}" for table in TABLES), "clips"]
        there = [f"{folder}/{name}" for folder in folders for name in self.files.sizes(folder)]
        orphans = [relative for relative in there if relative not in owned]
        self.files.remove(*orphans)
        return len(orphans)

    def rewrite(self, name: str) -> None:
        """Write the fragments of a commit again from the rows in this database, which were checked when loaded."""
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
            f"FROM {INDEX}.fragments UNION ALL SELECT o.key, o.value "
            f"FROM (SELECT unnest(map_entries(outputs)) AS o FROM {INDEX}.fragments)) "
            "SELECT path, num_bytes FROM files WHERE path LIKE 'fragments/%' ORDER BY hash(path || ?) LIMIT ?",
            [seed, most],
        )

    def remove_commits(self, names: Sequence[str]) -> None:
        """Delete commits with their files. The ledger fragment is deleted first: a kill leaves orphans, not half."""
        for name in names:
            outputs = self._rows(f"SELECT outputs FROM {INDEX}.fragments WHERE name = ?", [name])[0][0]
            self.files.remove(f"fragments/ledger/{name}.parquet")
            self.files.remove(*outputs)
        self.forget(names)

    def forget(self, names: Sequence[str]) -> None:
        """Delete the rows of these commits. The index is changed last, so that a kill only makes this run again."""
        if not names:
            return
        with self._as_table("removed", names):
            volumes = self._rows(
                f"SELECT DISTINCT volume FROM {INDEX}.fragments WHERE name IN (SELECT name FROM removed) ORDER BY 1"
            )
            for (volume,) in volumes:
                self.changed(volume)  # first, so that a kill leaves no summary of rows that are gone
                self._use(volume)
                self._delete_rows()
            self._execute(f"DELETE FROM {INDEX}.all_sources WHERE fragment IN (SELECT name FROM removed)")
            self._execute(f"DELETE FROM {INDEX}.fragments WHERE name IN (SELECT name FROM removed)")
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
            volume = self._load_list(name) if is_list(name) else self.volume_of(_unit_in(name))
            files.setdefault(volume, []).append((name, stat.st_size, stat.st_mtime_ns, named, volume))
        for volume, rows in files.items():
            self.changed(volume)  # first, so that a kill leaves no summary of fewer rows
            self._use(volume)
            self._load_rows([name for name, *_ in rows])
            self.connection.executemany(f"INSERT INTO {INDEX}.fragments VALUES (?, ?, ?, ?, ?)", rows)
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
            except duckdb.BinderException as error:
                self.connection.execute("ROLLBACK")
                raise UserError(f"{self.root} has columns of a newer clipmill: {error}") from error
            self.connection.execute("COMMIT")

    def _insert(self, table: str, paths: list[str]) -> None:
        self.connection.execute(
            f"INSERT INTO {table} BY NAME SELECT * EXCLUDE (filename), parse_filename(filename, true) AS fragment "
            "FROM read_parquet(?, filename = true, hive_partitioning = false, union_by_name = true)",
            [paths],
        )

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
            self.connection.executemany(
                f"INSERT INTO {INDEX}.applied_tombstones VALUES (?)", [[name] for name in files]
            )
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


def is_list(commit: str) -> bool:
    """Return whether a commit holds sources, which only the lists of the user can make again."""
    return commit.startswith("ingest-") and not commit.startswith("ingest-problems-")


def table_of(relative: str) -> str | None:
    """Return the table of a fragment, None for another file of a commit."""
    folder, *rest = Path(relative).parts
    return rest[0] if folder == "fragments" and len(rest) == 2 else None


def _unit_in(commit: str) -> str:
    """Return the unit that a commit's name holds, "" if it holds none."""
    found = re.fullmatch(r".+-(u\d{6,})-[0-9a-f]+", commit)
    return found[1] if found else ""


def _unit_number(unit: str) -> int | None:
    return int(unit[1:]) if re.fullmatch(r"u\d+", unit) else None


def _catalog(volume: int) -> str:
    return f"v{volume:06d}"


_SPANS = "STRUCT(n INTEGER, start_s DOUBLE, end_s DOUBLE)[]"
_FRAGMENT = pa.field("fragment", pa.string())

# Of the index, beside `all_sources`.
INDEX_TABLES = {
    "fragments": "name VARCHAR, num_bytes BIGINT, mtime_ns BIGINT, outputs MAP(VARCHAR, BIGINT), volume INTEGER",
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
