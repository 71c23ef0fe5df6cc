"""Merged commits: those of a volume whose work is done, in one Parquet file per table instead of many fragments.

    fragments/TABLE/merged-000003-HASH.parquet    rows of a table, in the order of their commits, named in `commit`
    fragments/merged/merged-000003.parquet        head of volume 3: a row per commit, and which files hold their rows

Files of rows are named after their content, and count when the head names them. The head is replaced atomically; the
fragments of its commits are removed after that. So a killed process leaves fragments whose commits are merged already,
or files that no head names. Readers list fragments first and heads after them, because a commit moves only that way.

A loose commit may have the name of a merged one. It is either such a leftover, or the same task done again: then its
rows differ, and it counts. The content of a volume's files depends on the rows of its commits and on nothing else.

Lists of sources are not merged: nothing could make them again, so damage to one file must not reach others. Commits
whose content changes under their name (failures of packing and of lists) are not merged either, nor are those with rows
of a stage that is not installed.
"""

import heapq
import json
import os
import re
import uuid
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipmill.base.atomic_file import TEMPORARY, sync
from shards.corpus.fragments import fragment_path, is_list, outputs_of, replaced_by, table_of, table_schema, unit_in
from shards.corpus.schema import LEDGER, TABLES
from shards.storage.mirror import files_of
from shards.storage.sealed_parquet import DamagedFile, check_parquet, read_parquet, write_parquet, write_row_groups

FOLDER = "fragments/merged"
ROWS = 2048  # in a row group; of `transcripts`, whose rows are the largest, some 100 MB
MEDIA = pa.map_(pa.string(), pa.int64())
HEAD = pa.schema(
    [("commit", pa.string()), ("tables", pa.list_(pa.string())), ("media", MEDIA), ("replaces", pa.string())]
)


@dataclass(frozen=True)
class MergedCommit:
    tables: tuple[str, ...]  # that it has rows of, the ledger included
    media: dict[str, int]  # path → bytes
    replaces: str | None = None


@dataclass(frozen=True)
class Head:
    """The merged commits of a volume. `files`: path → bytes of the files of rows.

    num_removed  commits whose rows are still in the files and do not count
    """

    commits: dict[str, MergedCommit]
    files: dict[str, int]
    num_removed: int = 0


def head_name(volume: int) -> str:
    return f"{FOLDER}/merged-{volume:06d}.parquet"


def merged_volume_of(name: str) -> int | None:
    """Return the volume of a head or of a file of rows by its name, None for a fragment."""
    found = re.fullmatch(r"merged-(\d{6,})(-[0-9a-f]{12})?", Path(name).name.removesuffix(".parquet"))
    return int(found[1]) if found else None


def merged_volumes(root: Path) -> list[int]:
    """Return the volumes with a head, in order."""
    names = [path.name for path in (root / FOLDER).glob("[!.]*.parquet")]
    return sorted(volume for name in names if (volume := merged_volume_of(name)) is not None)


def file_of(files: Iterable[str], table: str) -> str | None:
    """Return the file that holds the rows of a table."""
    return next((relative for relative in files if table_of(relative) == table), None)


def can_be_merged(name: str, outputs: Iterable[str]) -> bool:
    tables = {table for relative in outputs if (table := table_of(relative))}
    return bool(unit_in(name)) and not is_list(name) and tables <= set(TABLES)


# -- reading --------------------------------------------------------------------------------------------------------


def read_head(root: Path, volume: int) -> Head:
    """Read the head of a volume. Raises DamagedFile, FileNotFoundError."""
    path = root / head_name(volume)
    table = read_parquet(path)
    try:
        metadata = table.schema.metadata or {}
        files = json.loads(metadata[b"clipmill.files"])
        num_removed = int(metadata.get(b"clipmill.removed", b"0"))
        commits = {
            row["commit"]: MergedCommit(tuple(row["tables"]), dict(row["media"]), row["replaces"])
            for row in table.select(HEAD.names).to_pylist()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(path, f"its list of files: {error}") from error
    return Head(commits, files, num_removed)


def read_rows(root: Path, head: Head, table: str, names: Collection[str]) -> pa.Table:
    """Return the rows of a table of some merged commits, each with its `commit`. Raises DamagedFile."""
    names = sorted(name for name in names if name in head.commits and table in head.commits[name].tables)
    relative = file_of(head.files, table)
    if relative is None or not names:
        return _with_commit(_schema_of(table)).empty_table()
    check_parquet(root / relative)
    return pq.read_table(root / relative, filters=pc.field("commit").isin(names))


def is_same_commit(root: Path, name: str, merged: pa.Table) -> bool:
    """Return whether a loose commit is one of these merged ones, by the rows of their ledgers: a leftover."""
    loose = _shaped(read_parquet(fragment_path(root, "ledger", name)), LEDGER)
    return loose.equals(_shaped(merged.filter(pc.field("commit") == name), LEDGER))


def rows_of_head(head: Head) -> pa.Table:
    rows = [
        {
            "commit": name,
            "tables": list(commit.tables),
            "media": list(commit.media.items()),
            "replaces": commit.replaces,
        }
        for name, commit in sorted(head.commits.items())
    ]
    return pa.Table.from_pylist(rows, HEAD)


# -- writing --------------------------------------------------------------------------------------------------------


def merge(
    root: Path, volume: int, loose: Collection[str], without: Collection[str] = (), *, fsync: bool = False
) -> Head | None:
    """Merge loose commits of a volume with those merged before, and remove their fragments; return the new head.

    Memory is bounded by a few row groups and the list of commits. None: no commit is left, so there is no head.

    loose    names of whole commits; one that was merged before counts as it is now
    without  names of merged commits that count no more
    fsync    flush the files to the disk before the fragments are removed

    Raises DamagedFile for a fragment or a file of rows; then nothing has changed.
    """
    files, old = files_of(root), _head_or_none(root, volume) or Head({}, {})
    commits = {name: commit for name, commit in old.commits.items() if name not in loose and name not in without}
    fragments: list[str] = []
    for name in loose:
        path = fragment_path(root, "ledger", name)
        outputs = outputs_of(path)
        tables = {table for relative in outputs if (table := table_of(relative))}
        media = {relative: size for relative, size in sorted(outputs.items()) if table_of(relative) is None}
        commits[name] = MergedCommit(("ledger", *sorted(tables)), media, next(iter(replaced_by(path)), None))
        fragments += [relative for relative in outputs if table_of(relative)]
    rows: dict[str, int] = {}
    for table in sorted({table for commit in commits.values() for table in commit.tables}):
        names = {name for name, commit in commits.items() if table in commit.tables}
        before = {name for name, commit in old.commits.items() if table in commit.tables}
        relative = file_of(old.files, table)
        if relative is None or old.num_removed or names != before or names & set(loose):
            path = _merge_rows(root, volume, table, names, set(loose), relative, fsync)
            relative = str(path.relative_to(root))
            files.upload(relative)
        rows[relative] = (root / relative).stat().st_size
    head = Head(dict(sorted(commits.items())), rows) if commits else None
    write_head(root, volume, head, fsync=fsync)
    files.remove(*(f"fragments/ledger/{name}.parquet" for name in loose))
    files.remove(*fragments, *(relative for relative in old.files if relative not in rows))
    return head


def remove_merged(root: Path, volume: int, names: Collection[str], *, fsync: bool = False) -> Head | None:
    """Make merged commits of a volume count no more; return the new head.

    Only the head is written. The rows stay in the files until the volume is merged again.
    """
    old = read_head(root, volume)
    commits = {name: commit for name, commit in old.commits.items() if name not in names}
    tables = {table for commit in commits.values() for table in commit.tables}
    kept = {relative: size for relative, size in old.files.items() if table_of(relative) in tables}
    num_removed = old.num_removed + len(old.commits) - len(commits)
    head = Head(commits, kept, num_removed) if commits else None
    write_head(root, volume, head, fsync=fsync)
    files_of(root).remove(*(relative for relative in old.files if relative not in kept))
    return head


def write_head(root: Path, volume: int, head: Head | None, *, fsync: bool = False) -> None:
    """Replace the head of a volume; None: remove it."""
    relative = head_name(volume)
    if head is None:
        files_of(root).remove(relative)
        return
    metadata = {"clipmill.files": json.dumps(head.files, sort_keys=True)}
    metadata |= {"clipmill.removed": str(head.num_removed)} if head.num_removed else {}
    write_parquet(root / relative, rows_of_head(head).replace_schema_metadata(metadata), fsync=fsync)
    files_of(root).upload(relative)


def write_rows(
    root: Path,
    volume: int,
    table: str,
    pieces: Iterable[tuple[str, pa.Table]],
    schema: pa.Schema,
    *,
    fsync: bool = False,
) -> Path:
    """Write (commit, rows) pairs, in order of commits, to a file named after its content; return its path."""
    folder = root / "fragments" / table
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY}{uuid.uuid4().hex[:8]}-merged"
    try:
        content = write_row_groups(temporary, _with_commit(schema), _row_groups(pieces, schema))
        path = folder / f"merged-{volume:06d}-{content[:12]}.parquet"
        if fsync:
            sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if fsync:
        sync(folder)
    return path


def _merge_rows(
    root: Path, volume: int, table: str, names: set[str], loose: set[str], merged: str | None, fsync: bool
) -> Path:
    schema = _schema_of(table) if table in TABLES or table == "ledger" else None
    sources: list[Iterator[tuple[str, pa.Table]]] = []
    if merged and (kept := names - loose):
        check_parquet(root / merged)
        schema = schema or pq.read_schema(root / merged).remove_metadata().remove(-1)
        batches = pq.ParquetFile(root / merged, page_checksum_verification=True).iter_batches(batch_size=ROWS)
        sources.append((name, rows) for name, rows in by_commit(batches) if name in kept)
    sources.append((name, read_parquet(fragment_path(root, table, name))) for name in sorted(names & loose))
    return write_rows(root, volume, table, heapq.merge(*sources, key=itemgetter(0)), schema, fsync=fsync)


def by_commit(batches: Iterable[pa.RecordBatch], column: str = "commit") -> Iterator[tuple[str, pa.Table]]:
    """Yield (commit, rows) of batches in the order of their commits; a commit may come in parts."""
    for batch in batches:
        rows, start = pa.Table.from_batches([batch]), 0
        for name, of_commit in groupby(rows[column].to_pylist()):
            num_rows = sum(1 for _ in of_commit)
            yield name, rows.slice(start, num_rows).drop_columns(column)
            start += num_rows


def _row_groups(pieces: Iterable[tuple[str, pa.Table]], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield tables of ROWS rows and a last one of fewer, however the rows were divided before."""
    waiting, num_rows = [], 0
    for name, rows in pieces:
        waiting.append(_shaped(rows, schema).append_column("commit", pa.repeat(pa.scalar(name), rows.num_rows)))
        num_rows += rows.num_rows
        while num_rows >= ROWS:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, ROWS).combine_chunks()
            waiting, num_rows = [whole.slice(ROWS)], num_rows - ROWS
    if num_rows:
        yield pa.concat_tables(waiting).combine_chunks()


def _shaped(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Give rows of any version the columns of this one."""
    if rows.schema.equals(schema):
        return rows.replace_schema_metadata(None)
    both = pa.concat_tables([schema.empty_table(), rows.replace_schema_metadata(None)], promote_options="permissive")
    return both.select(schema.names).cast(schema)


def _schema_of(table: str) -> pa.Schema:
    return LEDGER if table == "ledger" else table_schema(table)


def _with_commit(schema: pa.Schema) -> pa.Schema:
    return schema.append(pa.field("commit", pa.string()))


def _head_or_none(root: Path, volume: int) -> Head | None:
    return read_head(root, volume) if (root / head_name(volume)).exists() else None
