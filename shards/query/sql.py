"""Asking a corpus: the manifest opened read-only and shut in, one statement run, its answer written in four formats.

The SQL may come from anybody and the values from any video's title: a statement can neither read another file, write
one, load code nor change a setting, and no value can move a terminal's cursor or start a spreadsheet's formula.
"""

import csv
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TextIO

import duckdb
import pyarrow as pa

from clipmill.base.errors import UserError
from clipmill.base.text import CONTROL, escaped, sql_identifier, sql_literal, visible
from shards.storage.local import MANIFEST_NAME
from shards.storage.mirror import for_reading
from shards.storage.s3 import is_url

Format = Literal["table", "csv", "json", "parquet"]
FORMATS = ("table", "csv", "json", "parquet")
MAX_TABLE_ROWS = 50  # what a terminal shows; the other formats write all
BATCH_ROWS = 10_000
WRAPPED = 16  # a text column of a table may be made this narrow before its rows are shown one value a line

HINT = """Give a query, for instance
  clipmill sql DIR "SELECT * FROM funnel"
  clipmill sql DIR "SELECT clip_id, caption, text FROM catalog LIMIT 10" --format csv
  clipmill sql DIR "SHOW TABLES"
or run `clipmill sql DIR` on a terminal for a prompt."""

_ALLOWED = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI}  # MULTI: PIVOT
_FORMULA = ("=", "+", "-", "@", "\t")


def open_manifest(corpus: str | Path, tables: Mapping[str, str | Path] | None = None) -> duckdb.DuckDBPyConnection:
    """The manifest as it is now, for reading. A build may publish a newer one meanwhile: this keeps what it opened.

    `corpus` is the corpus's folder or URL, or the manifest itself. Raises UserError where there is none.
    tables  further tables, by name: Parquet, JSON lines, CSV or Arrow files, copied into memory before the door shuts
    """
    path = for_reading(corpus, MANIFEST_NAME) if is_url(corpus) else Path(corpus)
    path = path / MANIFEST_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{corpus} has no manifest.duckdb: is it a corpus, and has its build got that far?")
    connection = private_connection()
    try:
        # Attached, not opened: opening a path twice in one process gives the file that was there the first time.
        connection.execute(f"ATTACH {sql_literal(str(path))} AS manifest (READ_ONLY)")
        connection.execute("USE manifest")
        add_tables(connection, tables or {})
    except duckdb.Error as error:
        connection.close()
        raise UserError(f"{path} cannot be opened: {error}") from error
    except UserError:
        connection.close()
        raise
    shut_in(connection)
    return connection


def private_connection() -> duckdb.DuckDBPyConnection:
    """An empty database in memory that loads no code, sees no variable of this program and spills to no disk."""
    settings = {
        "allow_community_extensions": "false",
        "autoload_known_extensions": "false",
        "temp_directory": "",  # DuckDB would let SQL read and write there
        "python_enable_replacements": "false",  # SQL must not see this program's variables
        "memory_limit": f"{_memory_limit_bytes()}B",
    }
    return duckdb.connect(":memory:", config=settings)


def shut_in(connection: duckdb.DuckDBPyConnection) -> None:
    """From here on no other file, no network, no ATTACH, COPY, INSTALL, LOAD, and no way back."""
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def add_tables(connection: duckdb.DuckDBPyConnection, tables: Mapping[str, str | Path]) -> None:
    """Loads files as tables under names that the database does not have yet. Raises UserError."""
    taken = {row[0].lower() for row in connection.execute("SHOW TABLES").fetchall()}
    for name, path in tables.items():
        given = f"--table {name}={path}"
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise UserError(f"{given}: write it as NAME=FILE, the name a letter and then letters, digits, underscores.")
        if name.lower() in taken:
            raise UserError(f"{given}: there is a table {name} already, choose another name.")
        if not Path(path).is_file():
            raise UserError(f"{given}: no such file.")
        taken.add(name.lower())
        try:
            _add_table(connection, name, Path(path))
        except (duckdb.Error, pa.ArrowException) as error:
            raise UserError(f"{given} cannot be read as a table: {error}") from error


def named_tables(values: Iterable[str]) -> dict[str, Path]:
    """The files of `--table NAME=FILE` options. Raises UserError."""
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
    """Runs one statement and writes its answer; returns its number of rows.

    table    for people: at most MAX_TABLE_ROWS rows, then how many more there are; control characters made visible
    csv      as a spreadsheet reads it: text that begins like a formula gets a ' before it; NULL is an empty field
    json     an array of one object a row, exact
    parquet  exact, types kept; refuses to write to a terminal
    Raises UserError with DuckDB's message for SQL that does not run.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose one of {', '.join(FORMATS)}.")
    out = out or sys.stdout
    if format == "parquet" and out.isatty():
        raise UserError("--format parquet writes binary data: send it to a file with `> rows.parquet`.")
    reader = _execute(connection, sql)
    try:
        return {"table": _write_table, "csv": _write_csv, "json": _write_json, "parquet": _write_parquet}[format](
            reader, out
        )
    except duckdb.Error as error:  # found while rows were being made
        raise UserError(str(error)) from error
    except BrokenPipeError:  # the reader, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return 0


def rows_of(connection: duckdb.DuckDBPyConnection, sql: str) -> list[Any]:
    """The first column of an answer. Raises UserError with DuckDB's message for SQL that does not run."""
    try:
        return [row[0] for row in connection.execute(_single_statement(connection, sql)).fetchall()]
    except duckdb.Error as error:
        raise UserError(str(error)) from error


def selection(where: str) -> str:
    """SQL for the rows of `catalog` that a condition, or a whole SELECT with a clip_id column, picks."""
    where = where.strip().rstrip(";").strip()
    if not where:
        return "SELECT * FROM catalog"
    if re.match(r"(select|with|from)\b", where, re.IGNORECASE):
        return f"SELECT * FROM catalog WHERE clip_id IN (SELECT picked.clip_id FROM (\n{where}\n) picked)"
    return f"SELECT * FROM catalog WHERE (\n{where}\n)"


def check_selection(connection: duckdb.DuckDBPyConnection, where: str, setting: str) -> None:
    """Raises UserError that names the setting when its SQL does not select clips."""
    try:
        statement = _single_statement(connection, selection(where))
        connection.execute(f"EXPLAIN {statement.query}")
    except (duckdb.Error, UserError) as error:
        columns = [row[0] for row in connection.execute("DESCRIBE catalog").fetchall()]
        raise UserError(
            f"{setting}: {error}\nGive a condition on the columns of `catalog` ({', '.join(columns)}) or a SELECT "
            "that returns clip_id."
        ) from error


def prompt(connection: duckdb.DuckDBPyConnection) -> None:
    """Reads statements (ended by `;` or an empty line) until Ctrl-D; it sees the corpus as it was at the start.

    Raises UserError that says what to type where nobody sits at the terminal.
    """
    if not sys.stdin.isatty():
        raise UserError(HINT)
    _start_history()
    print("Statements end with ; or an empty line. .tables  .schema [NAME]  .help  .quit or Ctrl-D")
    for statement in _statements():
        try:
            if statement.startswith("."):
                if statement.split()[0] in (".quit", ".exit"):
                    return
                _command(connection, statement)
            else:
                run_query(connection, statement)
        except UserError as error:
            print(visible(str(error), keep="\n"), file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)


# -- running --------------------------------------------------------------------------------------------------------


def _execute(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.RecordBatchReader:
    statement = _single_statement(connection, sql)
    try:
        return connection.sql(statement).to_arrow_reader(BATCH_ROWS)
    except (duckdb.Error, pa.ArrowException) as error:
        raise UserError(str(error)) from error


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
    """A temporary table: those are found without naming a database, whichever one is in use."""
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


def _memory_limit_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


# -- writing --------------------------------------------------------------------------------------------------------


def _write_table(reader: pa.RecordBatchReader, out: TextIO) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows, num_rows = _first_rows(reader)
    cells = [[_cell(value) for value in row] for row in rows]
    names = [visible(name) for name in reader.schema.names]
    console = Console(file=out, highlight=False)
    if names == ["explain_key", "explain_value"]:
        table = Text("\n".join(row[1].replace("\\x0a", "\n") for row in cells))
    elif _needed_width(names, cells) > console.width:
        table = _records(names, cells)
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, field in zip(names, reader.schema, strict=True):
            number = _is_number(field.type)
            table.add_column(Text(name), justify="right" if number else "left", no_wrap=number, overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    shown = f"first {len(rows):,} of {num_rows:,} rows" if num_rows > len(rows) else _counted(num_rows)
    console.print(Text(shown, style="dim"))
    return num_rows


def _needed_width(names: list[str], cells: list[list[str]]) -> int:
    """Characters for all columns side by side, if long texts are wrapped to WRAPPED characters."""
    columns = zip(*([names, *cells]), strict=True)
    return sum(min(max(map(len, column)), max(WRAPPED, len(column[0]))) + 3 for column in columns)


def _records(names: list[str], cells: list[list[str]]):
    """One line per value: for rows that are too wide to stand side by side."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for number, row in enumerate(cells, 1):
        table.add_row("", Text(f"── row {number} ──", style="dim"))
        for name, cell in zip(names, row, strict=True):
            table.add_row(Text(name), Text(cell))
    return table


def _first_rows(reader: pa.RecordBatchReader) -> tuple[list[tuple], int]:
    """The rows that a table shows, and how many there are; the rest streams by unseen."""
    rows: list[tuple] = []
    num_rows = 0
    for batch in reader:
        head = batch.slice(0, MAX_TABLE_ROWS - len(rows))
        rows += zip(*(column.to_pylist() for column in head.columns), strict=True)
        num_rows += batch.num_rows
    return rows, num_rows


def _write_csv(reader: pa.RecordBatchReader, out: TextIO) -> int:
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_csv_text(name) for name in reader.schema.names])
    num_rows = 0
    for row in _rows(reader):
        writer.writerow([_csv_field(value) for value in row])
        num_rows += 1
    return num_rows


def _write_json(reader: pa.RecordBatchReader, out: TextIO) -> int:
    names = _distinct(reader.schema.names)
    num_rows = 0
    for row in _rows(reader):
        out.write(",\n" if num_rows else "[\n")
        out.write(_json_text(dict(zip(names, row, strict=True))))
        num_rows += 1
    out.write("\n]\n" if num_rows else "[]\n")
    return num_rows


def _write_parquet(reader: pa.RecordBatchReader, out: TextIO) -> int:
    import pyarrow.parquet as pq

    schema = pa.schema(
        [field.with_name(name) for field, name in zip(reader.schema, _distinct(reader.schema.names), strict=True)]
    )
    num_rows = 0
    with pq.ParquetWriter(out.buffer, schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
            num_rows += batch.num_rows
    out.buffer.flush()
    return num_rows


def _rows(reader: pa.RecordBatchReader) -> Iterator[tuple]:
    for batch in reader:
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | Decimal) and value == int(value):
        return f"{int(value):,}"
    if isinstance(value, float | Decimal):
        value = float(value)
        return f"{value:,.1f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return visible(value if isinstance(value, str) else _json_text(value, plain=True))


def _csv_field(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | Decimal):
        return value
    return _csv_text(value if isinstance(value, str) else _json_text(value, plain=True))


def _csv_text(value: str) -> str:
    """A lone carriage return is escaped too: csv.writer leaves it bare, and readers begin a new row there."""
    text = CONTROL.sub(lambda found: found.group() if found.group() in "\t\n" else escaped(found.group()), value)
    return "'" + text if text.startswith(_FORMULA) else text


def _json_text(value: Any, plain: bool = False) -> str:
    """One value as JSON; with `plain`, times and the like bare, as they stand in a table or a CSV field."""
    value = _jsonable(value)
    if plain and isinstance(value, str):
        return value
    return CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", json.dumps(value, ensure_ascii=False))


def _jsonable(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _jsonable(item) for key, item in value.items()}
        case list() | tuple():
            return [_jsonable(item) for item in value]
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case float():
            return value if math.isfinite(value) else None
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes():
            return value.hex()
        case None | str() | bool() | int():
            return value
        case _:
            return str(value)  # uuid and whatever types DuckDB learns


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _distinct(names: list[str]) -> list[str]:
    """Column names made different where a query gave the same one twice: n, n_1, n_2."""
    distinct: dict[str, None] = {}
    for name in names:
        candidate, count = name, 0
        while candidate in distinct:
            count += 1
            candidate = f"{name}_{count}"
        distinct[candidate] = None
    return list(distinct)


def _counted(num_rows: int) -> str:
    return "1 row" if num_rows == 1 else f"{num_rows:,} rows"


# -- the prompt -----------------------------------------------------------------------------------------------------


def _start_history() -> None:
    """Line editing with a history that lasts, where Python has readline and the home folder can be written."""
    import atexit
    from contextlib import suppress

    with suppress(ImportError):
        import readline

        path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "clipmill" / "sql_history"
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.read_history_file(path)
            readline.set_history_length(1000)
            atexit.register(readline.write_history_file, path)


def _statements() -> Iterator[str]:
    """Whole statements as they are typed; Ctrl-C drops what was begun, Ctrl-D ends."""
    lines: list[str] = []
    while True:
        try:
            line = input("clipmill> " if not lines else "     ...> ").rstrip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            lines = []
            continue
        if line:
            lines.append(line)
        if lines and (not line or line.endswith(";") or lines[0].startswith(".")):
            yield "\n".join(lines).strip()
            lines = []


def _command(connection: duckdb.DuckDBPyConnection, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == ".tables":
        run_query(connection, "SHOW TABLES")
    elif name == ".schema":
        wanted = argument.strip()
        run_query(connection, f"DESCRIBE {sql_identifier(wanted)}" if wanted else "SHOW ALL TABLES")
    elif name == ".help":
        print(".tables        the tables and views\n.schema NAME   columns of one\n.quit          leave (or Ctrl-D)")
    else:
        raise UserError(f"{name} is not a command: .tables, .schema [NAME], .help, .quit are.")
