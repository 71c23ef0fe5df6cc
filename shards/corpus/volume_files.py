"""The DuckDB files of the working database: an index, and a file for each volume, of which one is active.

`.clipmill/ledger.duckdb` is the index, with the sources of all volumes; `.clipmill/volumes/NNNNNN.duckdb` has the rows
of a volume. Unqualified names in SQL are the tables of the active volume, and `sources` are its sources. All of it is a
cache of the fragments: a file that is lost, torn or of another index is filled again.
"""

import bisect
import fcntl
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb
import pyarrow as pa

from clipmill.base.errors import UserError
from clipmill.base.settings import digest
from clipmill.base.text import sql_literal
from shards.corpus.fragments import table_schema, unit_in
from shards.corpus.schema import LEDGER, TABLES
from shards.storage.mirror import files_of

INDEX = "ledger.main"  # catalog and schema of the index; `ledger` is the stem of its file
MOST_ATTACHED = 16  # volumes whose files are open


class VolumeFiles:
    """The connection to the files. `memory_limit` bounds DuckDB; no rows are kept in Python.

    A subclass fills the file of a volume (`_fill_file`).

    cache: folder of the files of a process without the corpus lock, which removes nothing from the corpus.
    """

    def __init__(self, root: Path, *, memory_limit: str = "1GB", cache: Path | None = None):
        self.root, self.files, self.owns_corpus = root, files_of(root), cache is None
        self.path = (cache or root / ".clipmill") / "ledger.duckdb"
        self.volumes_folder = self.path.with_name("volumes")
        self.volumes_folder.mkdir(parents=True, exist_ok=True)
        self.connection = _connect(self.path, memory_limit)
        self.active: int | None = None
        self._attached: dict[int, None] = {}  # the volume that was active last comes last
        self._create_index()
        self._first_units: list[tuple[int, int]] = []  # (number of the volume's first unit, volume), in order
        self._note_volumes()

    def close(self) -> None:
        self.connection.close()

    def volumes(self) -> list[int]:
        """Return the numbers of all volumes, in order; a corpus without sources has volume 0."""
        return sorted(volume for _, volume in self._first_units) or [0]

    def volume_of(self, unit: str) -> int:
        """Return the volume of a unit; rows without a unit belong to volume 0."""
        number = unit_number(unit)
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
        name = catalog_of(volume)
        if volume in self._attached:
            del self._attached[volume]
        else:
            if len(self._attached) >= MOST_ATTACHED:
                oldest = next(iter(self._attached))
                self.connection.execute("USE ledger")
                self.connection.execute(f"DETACH {catalog_of(oldest)}")
                del self._attached[oldest]
            self._attach(volume)
        self._attached[volume] = None
        self.connection.execute(f"USE {name}")

    def _attach(self, volume: int, tries: int = 3) -> None:
        """Open the file of a volume. One that is torn, or of another index, is filled again."""
        path, name = self.volumes_folder / f"{volume:06d}.duckdb", catalog_of(volume)
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
            if tries == 1 or not self._mend(volume, error):
                raise
            self._attach(volume, tries - 1)
            return
        self._execute(f"INSERT INTO {INDEX}.volume_files VALUES (?, ?)", [volume, token])  # last: it is complete

    def _load_sources(self) -> None:
        """Copy the sources of the active volume, in which the stages look for items."""
        self.connection.execute(
            f"CREATE OR REPLACE TEMP TABLE sources AS SELECT * FROM {INDEX}.all_sources WHERE volume = {self.active}"
        )

    def _note_volumes(self) -> None:
        rows = self._rows(f"SELECT first_unit, volume FROM {INDEX}.volumes ORDER BY 1")
        self._first_units = [(first, volume) for first, volume in rows]

    def _fill_file(self, volume: int, token: str) -> None:
        """Create the tables of the empty file of a volume, with the rows of its commits and the token."""
        raise NotImplementedError

    def _mend(self, volume: int, error: BaseException) -> bool:
        """Remove the reason why the file of a volume could not be filled; return whether it is worth another try."""
        return False

    def _discard_file(self, volume: int) -> None:
        """Make the file of a volume begin empty when it is opened next, with the rows of the commits in the index."""
        if volume in self._attached:
            self.connection.execute("USE ledger")
            self.connection.execute(f"DETACH {catalog_of(volume)}")
            del self._attached[volume]
        if self.active == volume:
            self.active = None
        self._execute(f"DELETE FROM {INDEX}.volume_files WHERE volume = ?", [volume])

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


def unit_number(unit: str) -> int | None:
    return int(unit[1:]) if re.fullmatch(r"u\d+", unit) else None


def catalog_of(volume: int) -> str:
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


def row_schemas() -> dict[str, pa.Schema]:
    """Return the columns of the tables that hold the rows of fragments, each with the fragment it came from."""
    schemas = {"ledger": LEDGER, **{table: table_schema(table) for table in TABLES if table != "sources"}}
    return {table: schema.append(_FRAGMENT) for table, schema in schemas.items()}


def _all_sources() -> pa.Schema:
    return table_schema("sources").append(_FRAGMENT)


def _layout() -> str:
    """Hash the columns of the working database. A file with another hash is rebuilt from the fragments."""
    schemas = {**row_schemas(), "sources": _all_sources()}
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
