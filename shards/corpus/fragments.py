"""Fragments: the immutable Parquet files that workers write and from which everything else can be rebuilt.

A task makes one *commit*: a fragment per table it wrote, media files if any, and last a ledger fragment that names
them. A commit without its ledger fragment does not count; its files are overwritten or deleted. Names come from
the task (stage, unit, items and their keys), so a task that runs twice writes the same files.
"""

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipmill.base.atomic_file import TEMPORARY, sync
from clipmill.base.errors import ItemError
from shards.corpus.schema import LEDGER, LEDGER_COLUMNS, TABLES
from shards.storage.mirror import files_of
from shards.storage.sealed_parquet import DamagedFile, read_metadata, write_parquet

OF_UNIT = r".+-(u\d{6,})-[0-9a-f]+"  # names of commits with items of a unit


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


def is_list(commit: str) -> bool:
    """Return whether a commit holds sources, which only the lists of the user can make again."""
    return commit.startswith("ingest-") and not commit.startswith("ingest-problems-")


def table_of(relative: str) -> str | None:
    """Return the table of a fragment, None for another file of a commit."""
    folder, *rest = Path(relative).parts
    return rest[0] if folder == "fragments" and len(rest) == 2 else None


def unit_in(commit: str) -> str:
    """Return the unit that a commit's name holds, "" if it holds none."""
    found = re.fullmatch(OF_UNIT, commit)
    return found[1] if found else ""


def table_schema(table: str) -> pa.Schema:
    """Return the columns of a table's fragments: its own and those that name the task."""
    return pa.schema([*LEDGER_COLUMNS, *TABLES[table]])


def write_commit(
    root: Path,
    name: str,
    rows: dict[str, pa.Table],
    ledger: pa.Table,
    media: list[str],
    replaces: str | None = None,
    *,
    fsync: bool = False,
    released: dict[str, int] | None = None,
) -> None:
    """Write the fragments of one commit, the ledger's last.

    Args:
        media: paths below root of the files that the rows point into.
        replaces: name of a commit that this one supersedes; it stops counting when this one is complete.
        fsync: flush all that the commit rests on to the disk before the ledger fragment appears, and then that one, so
            that a power cut leaves the whole commit or none.
        released: path → bytes of media that were deleted because shards hold their clips.
    """
    ledger_path, outputs = fragment_path(root, "ledger", name), {}
    ledger_path.parent.mkdir(parents=True, exist_ok=True)
    for table, data in sorted(rows.items()):
        path = fragment_path(root, table, name)
        write_parquet(path, data)
        outputs[str(path.relative_to(root))] = path.stat().st_size
    for relative in media:
        outputs[relative] = (root / relative).stat().st_size
    if fsync:
        sync_files(root, outputs)
    files_of(root).upload(*outputs)
    outputs |= released or {}
    metadata = {"clipmill.outputs": json.dumps(outputs, sort_keys=True)}
    metadata |= {"clipmill.replaces": replaces} if replaces else {}
    write_parquet(ledger_path, ledger.cast(LEDGER).replace_schema_metadata(metadata), fsync=fsync)
    files_of(root).upload(str(ledger_path.relative_to(root)))


def sync_files(root: Path, relatives: Iterable[str]) -> None:
    """Flush files below root to the disk, and then their names and those of the folders that hold them."""
    paths = [root / relative for relative in relatives]
    for path in paths:
        sync(path)
    folders = {parent for path in paths for parent in path.parents if parent.is_relative_to(root)}
    for folder in sorted(folders, reverse=True):
        sync(folder)


def outputs_of(ledger_fragment: Path) -> dict[str, int]:
    """Return path → size of every file of the commit. Raises DamagedFile."""
    try:
        outputs = json.loads(read_metadata(ledger_fragment).get(b"clipmill.outputs", b"{}"))
    except ValueError as error:
        raise DamagedFile(ledger_fragment, f"its list of files: {error}") from error
    if not isinstance(outputs, dict):
        raise DamagedFile(ledger_fragment, "its list of files is not one")
    return outputs


def replaced_by(ledger_fragment: Path) -> list[str]:
    """Return the name of the commit that this one superseded, if any. Raises DamagedFile."""
    metadata = read_metadata(ledger_fragment)
    return [metadata[b"clipmill.replaces"].decode(errors="replace")] if b"clipmill.replaces" in metadata else []


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
