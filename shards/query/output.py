"""Answers of SQL queries, written as a table for people, as CSV, JSON or Parquet.

Values come from any video's title: none of them can control a terminal or become a formula in a spreadsheet.
"""

import csv
import json
import math
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Literal, TextIO

import pyarrow as pa
from pyarrow.types import is_decimal, is_floating, is_integer

from clipmill.base.text import CONTROL, escaped, visible

Format = Literal["table", "csv", "json", "parquet"]
FORMATS = ("table", "csv", "json", "parquet")
MAX_TABLE_ROWS = 50  # rows that a table shows; the other formats have all
WRAPPED = 16  # characters to which a text column of a table may shrink before each value gets its own line
_FORMULA = ("=", "+", "-", "@", "\t")  # first characters of formulas in spreadsheets


def write_answer(reader: pa.RecordBatchReader, format: Format, out: TextIO) -> int:
    """Write the rows of an answer in one of FORMATS; return their number."""
    writers = {"table": _write_table, "csv": _write_csv, "json": _write_json, "parquet": _write_parquet}
    return writers[format](reader, out)


def _write_table(reader: pa.RecordBatchReader, out: TextIO) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows, num_rows = _first_rows(reader)
    cells = [[_cell(value) for value in row] for row in rows]
    names = [visible(name) for name in reader.schema.names]
    console = Console(file=out, highlight=False)
    columns = zip(*([names, *cells]), strict=True)  # long texts may wrap, to no less than WRAPPED characters
    width = sum(min(max(map(len, column)), max(WRAPPED, len(column[0]))) + 3 for column in columns)
    if names == ["explain_key", "explain_value"]:
        table = Text("\n".join(row[1].replace("\\x0a", "\n") for row in cells))
    elif width > console.width:
        table = _records(names, cells)
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, field in zip(names, reader.schema, strict=True):
            number = is_integer(field.type) or is_floating(field.type) or is_decimal(field.type)
            table.add_column(Text(name), justify="right" if number else "left", no_wrap=number, overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    shown = f"first {len(rows):,} of " if num_rows > len(rows) else ""
    console.print(Text(f"{shown}{num_rows:,} row{'' if num_rows == 1 else 's'}", style="dim"))
    return num_rows


def _records(names: list[str], cells: list[list[str]]):
    """Return a table with one line per value, for rows that are too wide for one line."""
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
    """Return the rows that a table shows, and the number of all rows."""
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
        plain = [value is None or isinstance(value, bool | int | float | Decimal) for value in row]
        writer.writerow([value if p else _csv_text(_text(value)) for value, p in zip(row, plain, strict=True)])
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

    names = _distinct(reader.schema.names)
    schema = pa.schema([field.with_name(name) for field, name in zip(reader.schema, names, strict=True)])
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
    return visible(_text(value))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _json_text(value, plain=True)


def _csv_text(value: str) -> str:
    """Escape control characters, a lone carriage return too: readers would begin a new row there."""
    text = CONTROL.sub(lambda found: found.group() if found.group() in "\t\n" else escaped(found.group()), value)
    return "'" + text if text.startswith(_FORMULA) else text


def _json_text(value: Any, plain: bool = False) -> str:
    """Return a value as JSON; with `plain`, times and the like without quotes, as in a table or a CSV field."""
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
            return str(value)  # UUIDs, and types that DuckDB may add


def _distinct(names: list[str]) -> list[str]:
    """Make repeated column names distinct: n, n_1, n_2."""
    distinct: dict[str, None] = {}
    for name in names:
        candidate, count = name, 0
        while candidate in distinct:
            count += 1
            candidate = f"{name}_{count}"
        distinct[candidate] = None
    return list(distinct)
