"""Look at every file of a corpus that counts, besides its shards: fragments, tombstones, manifest, sources, clips.

Nothing is repaired here. Each problem names the command that does it.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import duckdb

from clipmill.base.errors import ItemError
from clipmill.base.text import sql_identifier
from shards.corpus.fragments import outputs_of
from shards.corpus.merged import FOLDER, merged_volume_of, read_head
from shards.corpus.packs import pack_of
from shards.corpus.released_clips import FOLDER as RELEASED
from shards.corpus.released_clips import sizes_with_released
from shards.corpus.tombstones import FORGOTTEN
from shards.packing.verify import Problem
from shards.storage.local import MANIFEST_NAME
from shards.storage.mirror import files_of
from shards.storage.sealed_parquet import DamagedFile, check_parquet, read_parquet

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Stored:
    """Bytes that a row names: a whole file, or a range of one. `item`: the id of their video or clip."""

    path: str  # relative to the corpus, or absolute
    item: str
    sha256: str
    offset: int = 0
    num_bytes: int | None = None  # None: to the end of the file


def deep_problems(root: Path, connection: duckdb.DuckDBPyConnection | None) -> Iterator[Problem]:
    """Yield the problems of all fragments, and of all files that the manifest names. None: it cannot be opened."""
    yield from fragment_problems(root)
    if connection is None:
        return
    try:
        yield from _manifest_problems(connection)
        yield from file_problems(root, video_files(connection), "changed-source")
        yield from file_problems(root, subtitle_files(root, connection), "changed-subtitle")
        not_in_shards = "WHERE NOT starts_with(tar, 'shards/') ORDER BY tar, mp4_offset"  # `verify` reads those
        yield from file_problems(root, clip_ranges(connection, rest=not_in_shards), "changed-clip")
    except duckdb.Error as error:
        yield _damaged(MANIFEST_NAME, str(error).splitlines()[0])


# -- fragments ------------------------------------------------------------------------------------------------------


def fragment_problems(root: Path, relatives: Iterable[str] | None = None) -> Iterator[Problem]:
    """Yield the problems of these fragments, of all if None; fragments without a checksum are counted in a warning."""
    paths = sorted((root / "fragments").glob("*/[!.]*.parquet"))
    num_unsealed = 0
    for path in paths if relatives is None else [root / relative for relative in relatives]:
        relative = str(path.relative_to(root))
        try:
            num_unsealed += not check_parquet(path)
            yield from _commit_problems(root, path)
        except DamagedFile as error:
            yield _damaged(relative, error.reason)
        except FileNotFoundError:  # merged or removed since: what a commit lacks is found at the file that names it
            continue
    if num_unsealed and relatives is None:
        message = f"{num_unsealed:,} fragments are of a version that wrote no checksums"
        yield Problem("fragments", "", "no-checksum", message)


def _commit_problems(root: Path, path: Path) -> Iterator[Problem]:
    """Yield the problems of the files that a ledger fragment or the head of a merged volume names."""
    volume, before = merged_volume_of(path.name), path.stat().st_mtime_ns
    if path.parent == root / FOLDER and volume is not None:
        head = read_head(root, volume)
        outputs = dict(head.files)
        for commit in head.commits.values():
            outputs |= commit.media
    elif path.parent.name == "ledger" and volume is None:
        outputs = outputs_of(path)
    else:
        return
    problems = list(_missing_outputs(root, outputs))
    if problems and path.stat().st_mtime_ns != before:  # merged again since
        yield from _commit_problems(root, path)
    elif problems:
        yield from problems


def _missing_outputs(root: Path, outputs: dict[str, int]) -> Iterator[Problem]:
    folders = {output.rpartition("/")[0] for output in outputs}
    sizes = {folder: sizes_with_released(files_of(root), folder) for folder in folders}
    for output, num_bytes in outputs.items():
        folder, _, name = output.rpartition("/")
        if (found := sizes[folder].get(name)) != num_bytes:
            state = "does not exist" if found is None else f"has {found:,} bytes"
            yield Problem(output, "", "missing-file", f"it {state}, its commit names one of {num_bytes:,} bytes")


def _damaged(relative: str, reason: str) -> Problem:
    return Problem(relative, "", "damaged", reason)


# -- the manifest, and the files that it names ----------------------------------------------------------------------


def _manifest_problems(connection: duckdb.DuckDBPyConnection) -> Iterator[Problem]:
    """Read every value of every table: the database has checksums of its blocks."""
    tables = "SELECT table_name FROM duckdb_tables() WHERE database_name = 'manifest' ORDER BY 1"
    for (table,) in connection.execute(tables).fetchall():
        name = sql_identifier(table)
        try:
            connection.execute(f"SELECT bit_xor(hash({name})) FROM {name}").fetchall()
        except duckdb.Error as error:
            yield _damaged(MANIFEST_NAME, f"table {table}: {str(error).splitlines()[0]}")


def video_files(connection: duckdb.DuckDBPyConnection, table: str = "videos", rest: str = "") -> Iterator[Stored]:
    """Yield the files of downloaded videos. `rest`: SQL after the condition."""
    sql = f"SELECT path, video_id, sha256 FROM {table} WHERE path IS NOT NULL AND sha256 IS NOT NULL {rest}"
    for row in connection.execute(sql).fetchall():
        yield Stored(*row)


def subtitle_files(root: Path, connection: duckdb.DuckDBPyConnection) -> Iterator[Stored]:
    """Yield the subtitles of the present downloads, which the manifest does not name."""
    present = dict(connection.execute("SELECT video_id, sha256 FROM videos").fetchall())
    for path in sorted((root / "fragments" / "downloads").glob("[!.]*.parquet")):
        try:
            rows = read_parquet(path, ["video_id", "sha256", "subtitles"]).to_pylist()
        except (DamagedFile, FileNotFoundError):
            continue  # a problem of its own
        for row in rows:
            if present.get(row["video_id"]) == row["sha256"]:
                for file in row["subtitles"] or ():
                    if file["sha256"]:
                        yield Stored(file["path"], row["video_id"], file["sha256"])


def clip_ranges(
    connection: duckdb.DuckDBPyConnection,
    tables: Iterable[str] = ("clips", "edited_clips"),
    rest: str = "ORDER BY tar, mp4_offset",
) -> Iterator[Stored]:
    """Yield the mp4 and the caption frames of every clip, by tar and offset. `rest`: SQL after the table's name."""
    for table in tables:
        found = connection.sql(f"SELECT tar, clip_id, sha256, mp4_offset, num_bytes, frames FROM {table} {rest}")
        for row in (row for batch in found.to_arrow_reader(1000) for row in batch.to_pylist()):
            yield Stored(row["tar"], row["clip_id"], row["sha256"], row["mp4_offset"], row["num_bytes"])
            for frame in row["frames"] or ():
                yield Stored(row["tar"], row["clip_id"], frame["sha256"], frame["offset"], frame["num_bytes"])


def file_problems(root: Path, stored: Iterable[Stored], kind: str) -> Iterator[Problem]:
    """Yield a problem of this kind for bytes without their hash; files that do not exist are warnings.

    Of a corpus in a store, a file that was fetched for this is removed again.
    """
    files = files_of(root)
    for relative, pieces in groupby(stored, key=lambda piece: piece.path):
        was_here = (root / relative).exists()
        try:
            path = files.local(relative)
            with open(path, "rb") as file:
                for piece in pieces:
                    if (found := _hash_of(file, piece)) != piece.sha256:
                        yield Problem(relative, piece.item, kind, f"its SHA-256 is {found}, not {piece.sha256}")
        except (FileNotFoundError, ItemError):
            yield Problem(relative, "", f"missing-{kind.partition('-')[2]}", "it does not exist")
        except OSError as error:
            yield Problem(relative, "", kind, f"it cannot be read: {error}")
        if files.store and not was_here and not Path(relative).is_absolute():
            (root / relative).unlink(missing_ok=True)


def _hash_of(file: Any, piece: Stored) -> str:
    """Hash a range of an open file; one that ends early has another hash."""
    file.seek(piece.offset)
    if piece.num_bytes is None:
        return hashlib.file_digest(file, "sha256").hexdigest()
    digest, left = hashlib.sha256(), piece.num_bytes
    while left and (chunk := file.read(min(left, CHUNK_BYTES))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


# -- repairs --------------------------------------------------------------------------------------------------------

_OF_SHARDS = (
    "missing-file", "bad-index", "bad-tar", "missing-member", "extra-member", "misplaced-member", "hash-mismatch",
    "text-mismatch", "bad-json", "sample-mismatch", "undecodable", "frame-count",
)  # fmt: skip


def is_bad_shard(problem: Problem) -> bool:
    """Return whether the shard has to be written again."""
    return problem.path.startswith("shards/") and problem.kind in _OF_SHARDS


def is_bad_fragment(problem: Problem) -> bool:
    """Return whether a fragment of a commit has to be written again."""
    folder, _, rest = problem.path.partition("/")
    return (
        problem.kind == "damaged"
        and folder == "fragments"
        and not rest.startswith((f"{FORGOTTEN}/", "runs/", f"{RELEASED.partition('/')[2]}/"))
    )


def repair_of(problem: Problem, corpus: str) -> str:
    """Return the command that repairs a problem, "" if none is needed."""
    if problem.path.startswith(f"fragments/{FORGOTTEN}/"):
        return f"clipmill forget {corpus} for the same videos, then remove the file"
    if problem.path.startswith("fragments/runs/"):
        return "none: it is the record of one run; remove the file"
    if problem.path.startswith(f"{RELEASED}/"):
        return f"put a copy of it back, or remove it and cut its clips again: clipmill build --corpus {corpus}"
    if problem.path == "corpus.yaml":
        return f"clipmill build --recipe NAME --corpus {corpus}, with the settings of before"
    if problem.kind in ("wrong-pair", "same-caption"):
        return f"clipmill run caption --redo --corpus {corpus}, or the stage that made the row"
    if problem.kind in ("no-checksum", "unknown-origin"):
        return ""
    if problem.kind == "forgotten":
        return f"clipmill compact {corpus}"
    if problem.kind == "outdated-pack":
        return f"clipmill run pack --name {Path(problem.path).name} --corpus {corpus}"
    if is_bad_shard(problem) and (pack := pack_of(problem.path)):
        build = f"clipmill build --corpus {corpus}"  # removes what is damaged, so that it is packed again
        return f"{build}, then clipmill run pack --name {pack} --corpus {corpus}"
    return f"clipmill build --corpus {corpus}"
