"""A shard's index: the Parquet file beside the tar, one row per sample, columns `INDEX` of `shards.corpus.schema`.

It has the place of every member and the present text columns: a new caption rewrites this small file, not the tar. Its
metadata hold the key of the plan that made the tar, so that they alone identify an unchanged shard.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from shards.corpus.schema import INDEX
from shards.storage.sealed_parquet import DamagedFile, read_metadata, read_parquet, write_parquet

FORMAT = 1  # of index and tar; part of every plan's key
TEXT_COLUMNS = ("subtitle", "caption", "captioner", "caption_score", "language")


@dataclass(frozen=True)
class Stamp:
    """Facts of the tar in its index. `missing`: clips of the plan that could not be packed."""

    plan_key: str
    tar_bytes: int
    missing: tuple[str, ...] = ()


def write_index(path: Path, rows: pa.Table, stamp: Stamp, *, fsync: bool = False) -> None:
    """Write an index; the same rows and stamp give the same bytes."""
    values = {"format": FORMAT, "plan_key": stamp.plan_key, "tar_bytes": stamp.tar_bytes, "missing": stamp.missing}
    metadata = {"clipmill.shard": json.dumps(values, sort_keys=True)}
    write_parquet(path, rows.cast(INDEX).replace_schema_metadata(metadata), fsync=fsync)


def read_index(path: Path) -> pa.Table:
    """Read the rows in the tar's order. Raises DamagedFile for a damaged or foreign file."""
    try:
        return read_parquet(path).select(INDEX.names).cast(INDEX)
    except (KeyError, pa.ArrowException) as error:
        raise DamagedFile(path, f"not the rows of an index: {error}") from error


def read_stamp(path: Path) -> Stamp | None:
    """Read the stamp; None if the index is missing, torn or of another format: the shard is then written again."""
    try:
        values = json.loads(read_metadata(path)[b"clipmill.shard"])
        if values["format"] != FORMAT:
            return None
        return Stamp(values["plan_key"], values["tar_bytes"], tuple(values["missing"]))
    except (FileNotFoundError, DamagedFile, KeyError, TypeError, ValueError):
        return None


def refresh_index(path: Path, texts: pa.Table) -> bool:
    """Bring the text columns of an index up to date; return whether the index has changed.

    `texts`: clip_id and any of TEXT_COLUMNS; rows of other shards are ignored, clips that it lacks keep their text.
    """
    stamp = read_stamp(path)
    assert stamp is not None, f"{path} is not an index"
    old = read_index(path)
    names = [name for name in TEXT_COLUMNS if name in texts.column_names]
    rows = pc.index_in(old["clip_id"], texts["clip_id"])
    known = pc.is_valid(rows)
    new = old
    for name in names:
        served = pc.if_else(known, pc.take(texts[name], rows).cast(INDEX.field(name).type), old[name])
        new = new.set_column(new.column_names.index(name), name, served)
    if new.equals(old):
        return False
    write_index(path, new, stamp)
    return True
