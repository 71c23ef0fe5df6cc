"""Insert rows of Python values into a DuckDB table at once; `executemany` takes milliseconds for each row."""

from collections.abc import Sequence

import duckdb
import pyarrow as pa


def insert_rows(connection: duckdb.DuckDBPyConnection, table: str, schema: pa.Schema, rows: Sequence[Sequence]) -> None:
    """Insert rows with the columns of `schema`; the table's other columns get nulls. No rows: nothing is done."""
    if not rows:
        return
    arrays = [pa.array(values, field.type) for values, field in zip(zip(*rows, strict=True), schema, strict=True)]
    connection.register("inserted_rows", pa.table(arrays, schema=schema))
    try:
        connection.execute(f"INSERT INTO {table} BY NAME FROM inserted_rows")
    finally:
        connection.unregister("inserted_rows")
