"""Fragments: the immutable Parquet files that workers write and from which everything else can be rebuilt.

A task makes one *commit*: a fragment per table it wrote, media files if any, and last a ledger fragment that names
them. A commit without its ledger fragment does not count; its files are overwritten or deleted. Names come from
the task (stage, unit, items and their keys), so a task that runs twice writes the same files.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipmill.base.atomic_file import TEMPORARY, atomic_path
from clipmill.base.errors import ItemError
from shards.corpus.schema import LEDGER, LEDGER_COLUMNS, TABLES
from shards.storage.mirror import files_of

PARQUET_END = b"PAR1"


@dataclass(frozen=True)
class Commit:
    """Result of a task: enough for the driver to load the fragments; its size does not grow with the media."""

    name: str
    stage: str
    unit: str
    num_done: int
    num_failed: int
    num_rows: int
    cpu_s: float
    wall_s: float


def commit_name(stage: str, unit: str, items: Iterable[tuple[str, str]]) -> str:
    """Name the commit of exactly these (item_id, key) pairs."""
    text = "\n".join(sorted(f"{item}\t{key}" for item, key in items))
    return f"{stage}-{unit}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def ledger_row(
    stage: str,
    item_id: str,
    key: str,
    *,
    run_id: str,
    unit: str = "",
    fingerprint: str = "",
    error: ItemError | None = None,
    attempts: int = 1,
    num_rows: int = 0,
    wall_s: float = 0.0,
    cpu_s: float = 0.0,
) -> dict[str, Any]:
    """Return the row of `LEDGER` for an item that was completed now, or that failed with `error`."""
    row = {
        "stage": stage,
        "item_id": item_id,
        "unit": unit,
        "key": key,
        "fingerprint": fingerprint,
        "status": "failed" if error else "done",
        "attempts": attempts,
        "num_rows": num_rows,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "at": datetime.now(UTC),
        "run_id": run_id,
    }
    if error:
        row |= {"error_class": error.error_class, "message": error.message, "transient": error.transient}
    return row


def fragment_path(root: Path, table: str, name: str) -> Path:
    return root / "fragments" / table / f"{name}.parquet"


def table_schema(table: str) -> pa.Schema:
    """Return the columns of a table's fragments: its own and those that name the task."""
    return pa.schema([*LEDGER_COLUMNS, *TABLES[table]])


def write_fragment(path: Path, table: pa.Table) -> None:
    """Write a Parquet file that appears whole or not at all."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def is_whole(path: Path) -> bool:
    """Return whether a Parquet file is complete, judged by its last four bytes."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(PARQUET_END)))
        return file.read() == PARQUET_END


def write_commit(
    root: Path, name: str, rows: dict[str, pa.Table], ledger: pa.Table, media: list[str], replaces: str | None = None
) -> None:
    """Write the fragments of one commit, the ledger's last.

    Args:
        media: paths below root of the files that the rows point into.
        replaces: name of a commit that this one supersedes; it stops counting when this one is complete.
    """
    outputs = {}
    for table, data in sorted(rows.items()):
        path = fragment_path(root, table, name)
        write_fragment(path, data)
        outputs[str(path.relative_to(root))] = path.stat().st_size
    for relative in media:
        outputs[relative] = (root / relative).stat().st_size
    files_of(root).upload(*outputs)
    metadata = {"clipmill.outputs": json.dumps(outputs, sort_keys=True)}
    metadata |= {"clipmill.replaces": replaces} if replaces else {}
    path = fragment_path(root, "ledger", name)
    write_fragment(path, ledger.cast(LEDGER).replace_schema_metadata(metadata))
    files_of(root).upload(str(path.relative_to(root)))


def outputs_of(ledger_fragment: Path) -> dict[str, int]:
    """Return path → size of every file of the commit. Raises pa.ArrowInvalid for a torn file."""
    metadata = pq.read_schema(ledger_fragment).metadata or {}
    return json.loads(metadata.get(b"clipmill.outputs", b"{}"))


def replaced_by(ledger_fragment: Path) -> list[str]:
    """Return the name of the commit that this one superseded, if any."""
    metadata = pq.read_schema(ledger_fragment).metadata or {}
    return [metadata[b"clipmill.replaces"].decode()] if b"clipmill.replaces" in metadata else []


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside `path` and delete it at the end. Another process with the same task gets another one."""
    folder = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_temporaries(root: Path) -> int:
    """Delete the temporary files of killed writers, as owner of the corpus lock; return how many."""
    leftovers = [p for folder in ("fragments", "clips", "shards") for p in (root / folder).glob(f"**/{TEMPORARY}*")]
    leftovers += [*root.glob(f"{TEMPORARY}*"), *(root / ".clipmill").glob(f"{TEMPORARY}*")]
    for path in leftovers:
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    return len(leftovers)
