"""Query a corpus: open its manifest read-only and isolated, and run one statement.

The SQL is untrusted: a statement can neither read another file nor write one, load code or change a setting.
"""

import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from clipmill.base.credentials import strip_url_credentials
from clipmill.base.errors import UserError
from clipmill.base.text import sql_identifier, sql_literal
from shards.corpus.source_ids import canonical_urls
from shards.query.output import FORMATS, Format, write_answer
from shards.storage.local import MANIFEST_NAME
from shards.storage.mirror import for_reading
from shards.storage.s3 import is_url

BATCH_ROWS = 10_000
MB_PER_THREAD = 200  # of a connection with a memory limit
_ALLOWED = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI}  # MULTI: PIVOT


def open_manifest(
    corpus: str | Path,
    tables: Mapping[str, str | Path] | None = None,
    *,
    memory: str | None = None,
    spill: Path | None = None,
) -> duckdb.DuckDBPyConnection:
    """Open the present manifest for reading; one that a build publishes later is not seen.

    corpus  the corpus's folder or URL, or the manifest itself
    tables  additional tables by name: Parquet, JSON lines, CSV or Arrow files, which are copied into memory
    memory, spill  see `private_connection`
    Raises UserError if the manifest does not exist or a table cannot be read.
    """
    path = for_reading(corpus, MANIFEST_NAME) if is_url(corpus) else Path(corpus)
    path = path / MANIFEST_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{corpus} has no manifest.duckdb: it is not a corpus, or its build has not published one yet.")
    connection = private_connection(memory, spill)
    try:
        # Attached, not opened: a second opening of a path in one process gives the file of the first.
        connection.execute(f"ATTACH {sql_literal(str(path))} AS manifest (READ_ONLY)")
        connection.execute("USE manifest")
        add_tables(connection, tables or {})
    except duckdb.Error as error:
        connection.close()
        raise UserError(f"{path} cannot be opened: {error}\n`clipmill build` publishes it again.") from error
    except UserError:
        connection.close()
        raise
    shut_in(connection)
    return connection


def private_connection(memory: str | None = None, spill: Path | None = None) -> duckdb.DuckDBPyConnection:
    """Return an empty database in memory that loads no code and sees no variables of this program.

    memory  DuckDB's limit, "100MB" or "1GB"; None: half of the machine's memory. Every thread needs a share, so a
            small limit means few threads
    spill   a private, empty folder for what exceeds the limit, which SQL can read; None: no disk is used
    """
    settings = {
        "allow_community_extensions": "false",
        "autoload_known_extensions": "false",
        "temp_directory": str(spill or ""),  # SQL can read and write files there, so only where the folder is private
        "python_enable_replacements": "false",
        "memory_limit": memory or f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2}B",
    }
    if memory is not None:
        megabytes = int(memory[:-2]) * (1000 if memory.endswith("GB") else 1)
        settings["threads"] = str(max(1, min(os.cpu_count() or 1, megabytes // MB_PER_THREAD)))
    return duckdb.connect(":memory:", config=settings)


def shut_in(connection: duckdb.DuckDBPyConnection) -> None:
    """Forbid for good: other files, the network, ATTACH, COPY, INSTALL, LOAD and changes of settings."""
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def add_tables(connection: duckdb.DuckDBPyConnection, tables: Mapping[str, str | Path]) -> None:
    """Load files as tables under names that the database does not have yet. Raises UserError."""
    taken = {row[0].lower() for row in connection.execute("SHOW TABLES").fetchall()}
    for name, path in tables.items():
        given = f"--table {name}={path}"
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise UserError(
                f"{given}: write it as NAME=FILE, where NAME is a letter followed by letters, digits, underscores."
            )
        if name.lower() in taken:
            raise UserError(f"{given}: the corpus has a table {name} already; choose another name.")
        if not Path(path).is_file():
            raise UserError(f"{given}: no such file.")
        taken.add(name.lower())
        try:
            _add_table(connection, name, Path(path))
        except (duckdb.Error, pa.ArrowException) as error:
            raise UserError(f"{given} cannot be read as a table: {error}") from error


def named_tables(values: Iterable[str]) -> dict[str, Path]:
    """Return the files of `--table NAME=FILE` options by name. Raises UserError."""
    tables: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not path:
            raise UserError(f"--table {value}: write it as NAME=FILE, for example feedback=run/feedback.parquet.")
        if name in tables:
            raise UserError(f"--table {value}: {name} is given twice.")
        tables[name] = Path(path)
    return tables


def run_query(
    connection: duckdb.DuckDBPyConnection, sql: str, format: Format = "table", out: TextIO | None = None
) -> int:
    """Run one statement and write its answer; return its number of rows.

    table    for people: at most MAX_TABLE_ROWS rows, then their number; control characters made visible
    csv      for spreadsheets: text that begins like a formula gets a ' before it; NULL is an empty field
    json     an array with one object per row, exact
    parquet  exact, with types; not written to a terminal
    Raises UserError with DuckDB's message for SQL that does not run.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose one of {', '.join(FORMATS)}.")
    out = out or sys.stdout
    if format == "parquet" and out.isatty():
        raise UserError("--format parquet writes binary data: send it to a file with `> rows.parquet`.")
    statement = _single_statement(connection, sql)
    try:
        return write_answer(connection.sql(statement).to_arrow_reader(BATCH_ROWS), format, out)
    except (duckdb.Error, pa.ArrowException) as error:
        raise UserError(str(error)) from error
    except BrokenPipeError:  # the reader, for example `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return 0


def rows_of(connection: duckdb.DuckDBPyConnection, sql: str) -> list[Any]:
    """Return the first column of an answer. Raises UserError with DuckDB's message for SQL that does not run."""
    try:
        return [row[0] for row in connection.execute(_single_statement(connection, sql)).fetchall()]
    except duckdb.Error as error:
        raise UserError(str(error)) from error


def selection(where: str, table: str = "catalog", key: str = "clip_id") -> str:
    """Return SQL for the rows of a table that a condition, or a SELECT with the column `key`, picks."""
    where = where.strip().rstrip(";").strip()
    if not where:
        return f"SELECT * FROM {table}"
    if re.match(r"(select|with|from)\b", where, re.IGNORECASE):
        return f"SELECT * FROM {table} WHERE {key} IN (SELECT picked.{key} FROM (\n{where}\n) picked)"
    return f"SELECT * FROM {table} WHERE (\n{where}\n)"


def video_of_url(connection: duckdb.DuckDBPyConnection, canonical: str) -> str | None:
    """Return the id of the video whose canonical URL or absolute path this is; None if the corpus lacks it."""
    videos = connection.sql("SELECT video_id, url FROM videos").to_arrow_table().combine_chunks()
    known = canonical_urls(pa.array(videos["url"].to_pylist(), pa.string()))
    row = pc.index(known, canonical).as_py()
    if row < 0:
        row = pc.index(known, strip_url_credentials(canonical)).as_py()
    return videos["video_id"][row].as_py() if row >= 0 else None


def looks_at_one_row(where: str, but_not: Collection[str]) -> bool:
    """Return whether a condition picks a clip by that clip alone: without a query in it, and none of these columns."""
    if not where.strip():
        return True
    with duckdb.connect() as connection:
        [(text,)] = connection.execute("SELECT json_serialize_sql(?)", [selection(where)]).fetchall()
    tree = json.loads(text)
    if tree["error"]:
        return False
    found: list[dict] = []
    waiting = [tree["statements"][0]["node"]["where_clause"]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            found.append(node)
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    paths = [[name.lower() for name in node["column_names"]] for node in found if node.get("column_names")]
    named = {name for path in paths for name in (path[1:] if path[0] == "catalog" and path[1:] else path)}
    kinds = {node.get("class") for node in found}
    return not (named & {"catalog", *but_not} or kinds & {"SUBQUERY", "WINDOW", "STAR"})


def check_selection(connection: duckdb.DuckDBPyConnection, where: str, setting: str) -> None:
    """Raise UserError that names the setting when its SQL does not select clips."""
    try:
        statement = _single_statement(connection, selection(where))
        connection.execute(f"EXPLAIN {statement.query}")
    except (duckdb.Error, UserError) as error:
        columns = [row[0] for row in connection.execute("DESCRIBE catalog").fetchall()]
        raise UserError(
            f"{setting}: {error}\nGive a condition on the columns of `catalog` ({', '.join(columns)}) or a SELECT "
            "that returns clip_id."
        ) from error


def _single_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise UserError(str(error)) from error
    if len(statements) != 1:
        raise UserError(f"One statement at a time: this has {len(statements)}.")
    if statements[0].type not in _ALLOWED:
        raise UserError(
            f"A corpus is read-only: {statements[0].type.name} is not allowed, SELECT, SHOW, DESCRIBE, SUMMARIZE and "
            "EXPLAIN are."
        )
    return statements[0]


def _add_table(connection: duckdb.DuckDBPyConnection, name: str, path: Path) -> None:
    """Load a file as a temporary table, which needs no database name in queries."""
    readers = {
        ".parquet": "read_parquet",
        ".jsonl": "read_ndjson",
        ".ndjson": "read_ndjson",
        ".json": "read_json",
        ".csv": "read_csv",
    }
    if path.suffix in (".arrow", ".feather"):
        connection.register("loaded", pa.ipc.open_file(pa.memory_map(str(path))).read_all())
        connection.execute(f"CREATE TEMP TABLE {sql_identifier(name)} AS SELECT * FROM loaded")
        connection.unregister("loaded")
    elif path.suffix in readers:
        source = f"{readers[path.suffix]}({sql_literal(path)})"
        connection.execute(f"CREATE TEMP TABLE {sql_identifier(name)} AS SELECT * FROM {source}")
    else:
        raise UserError(f"--table {name}={path}: allowed are files in {', '.join(readers)}, .arrow and .feather.")
