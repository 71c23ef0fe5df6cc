"""Freeze the clips that a run trains on into one Arrow file that its processes share.

`training.data.clip_query` finds the clips. `write` streams them, a few shards at a time, in order of (shard, offset)
into `selection.arrow`. Plan, loader and checkpoints identify a clip by its row number there. `Selection` opens the file
memory-mapped, so any process reads some rows without loading the rest. Freezing needs a byte a clip and a constant: the
selection is a mask, DuckDB keeps to `data.select_memory` and uses the disk beside the file beyond it, and rows pass in
pieces.

The file holds the texts of the time it was written, so a resumed run sees the same texts even if the corpus has grown
or was recaptioned; a new run sees the new ones.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipmill.base.atomic_file import atomic_file
from clipmill.base.errors import UserError
from clipmill.base.text import sql_literal
from training.data.clip_query import SPILL, ClipQuery, Samples, Tables, open_samples, select_clips
from training.data.edited_clips import edited_rows
from training.data.epoch_plan import hash_selection
from training.data.run_selection import choose_run
from training.data.selection_schema import EVAL_FILE, HASHES, SELECTION, SELECTION_FILE, complete, is_selection
from training.settings import DataSettings, EvalSettings, Group

_GROUP_COLUMNS: dict[Group, str] = {"video": "video_id", "duplicate": "duplicate_group"}
_SHARD_ROWS = 200_000  # rows of `samples` that are read together
_BATCH_ROWS = 65_536  # of the file


# --- Freezing


def freeze(
    path: str | Path,
    corpus: str | Path,
    where: str = "",
    *,
    setting: str = "data.where",
    tables: Tables | None = None,
    pack: str = "",
) -> ClipQuery:
    """Select clips of a corpus, or of one of its named packs, into one file. Raises UserError that names the setting.

    Example: `freeze("clips.arrow", "corpus", "duration_s > 5")`
    """
    with open_samples(corpus, tables, pack=pack, spill_in=Path(path).absolute().parent) as samples:
        clips = select_clips(samples, where, setting)
        write(samples, clips, Path(path))
        return replace(clips, problems=samples.problems)


def freeze_run(
    folder: str | Path, corpus: str | Path, data: DataSettings, evaluation: EvalSettings, tables: Tables | None = None
) -> tuple[ClipQuery, ClipQuery | None]:
    """Write a run's selections from one state of the corpus: `selection.arrow`, and `eval.arrow` for eval.where.

    `selection.arrow` is written last, so that if it exists, both are complete. The caller holds the run's lock. Raises
    UserError.
    """
    for left in Path(folder).glob(f"{SPILL}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    limits = {"memory": data.select_memory, "spill_in": Path(folder).absolute()}
    with open_samples(corpus, tables, data.neighbours, pack=data.pack, **limits) as samples:
        training, held_out = choose_run(samples, data, evaluation)
        if held_out:
            write(samples, held_out, Path(folder) / EVAL_FILE)
        write(samples, training, Path(folder) / SELECTION_FILE)
    return training, held_out


def write(samples: Samples, clips: ClipQuery, path: Path) -> None:
    """Write the selected rows in order, as an uncompressed Arrow file, whole or not at all.

    Reads `samples` three times, a few shards at a time: for the snapshot, the hash and the rows, because snapshot and
    hash come before the rows in the file.
    """
    snapshot = _snapshot(samples, clips)
    # ids are joined in the way of `hash_selection`, so its digest is the same as of single ids
    ids = (_lines(table["clip_id"]) for table in rows_in_order(samples, clips, "clip_id"))
    metadata = {"root": samples.root, "snapshot": snapshot, "hash": hash_selection(snapshot, ids)}
    with atomic_file(path, fsync=True) as file:
        with pa.ipc.new_file(file, SELECTION.with_metadata(metadata)) as writer:
            for batch in selected_rows(samples, clips):
                writer.write_batch(batch)


def _snapshot(samples: Samples, clips: ClipQuery) -> str:
    """Hash the media that training reads; the hash changes with the set of clips and with any clip's bytes.

    It does not depend on texts, the corpus's path or its packing. Plain tars have no hashes of their members, so the
    place and size of a member stand for its bytes.
    """
    member = "coalesce({0}_sha256, concat({0}_offset, ' ', {0}_bytes), '')"
    content = f"concat_ws(' ', clip_id, {member.format('mp4')}, {member.format('jpg')}) AS content"
    digest = hashlib.blake2b(digest_size=16)
    for table in rows_in_order(samples, clips, content):
        digest.update(_lines(table["content"]).encode() + b"\0")
    return digest.hexdigest()


def _lines(column: pa.ChunkedArray) -> str:
    """Join all values with zero bytes, in Arrow."""
    values = column.combine_chunks()
    return pc.binary_join(pa.ListArray.from_arrays([0, len(values)], values), "\0")[0].as_py()


def selected_rows(samples: Samples, clips: ClipQuery) -> Iterator[pa.RecordBatch]:
    """Yield the file's record batches."""
    kept_apart = ("shard", "texts", "duplicate_group", "neighbours", *HASHES)
    plain = [name for name in SELECTION.names if name not in kept_apart]
    columns = ", ".join([*plain, *(f"if(length({name}) = 64, TRY(unhex({name})), NULL) AS {name}" for name in HASHES)])
    columns += ", path AS shard, t.texts, duplicate_group, neighbours"
    for table in rows_in_order(samples, clips, columns, joined=True):
        yield from table.select(SELECTION.names).cast(SELECTION).to_batches(max_chunksize=_BATCH_ROWS)
        del table  # before the next piece is made, so that only one is in memory


def rows_in_order(samples: Samples, clips: ClipQuery, columns: str, joined: bool = False) -> Iterator[pa.Table]:
    """Yield the selected rows by (path, mp4_offset), a few shards at a time to bound memory.

    columns  of `samples`, and `path`, which is the shard's from the root
    joined   also of `_groups`, `_texts` and `_neighbours`
    Edited clips come first, because the paths of their tars do.
    """
    mask = clips.mask
    if clips.edited is not None:
        mask = mask & ~clips.edited
        yield from edited_rows(samples, clips, columns)
    prefix = sql_literal(samples.shard_prefix)
    ranges = """
        SELECT min(shard), max(shard), min(low), max(high) FROM (
            SELECT shard, min(rowid) AS low, max(rowid) AS high, sum(count(*)) OVER (ORDER BY shard) AS total
            FROM samples GROUP BY shard
        ) GROUP BY (total - 1) // $num_rows ORDER BY 1
    """
    for first, last, low, high in samples.connection.sql(ranges, params={"num_rows": _SHARD_ROWS}).fetchall():
        if not mask[low : high + 1].any():
            continue
        tables = f"""
            LEFT JOIN (SELECT * FROM _groups WHERE row BETWEEN {low} AND {high}) g ON g.row = s.row
            LEFT JOIN (SELECT row, list(text ORDER BY n) AS texts FROM _texts
                       WHERE row BETWEEN {low} AND {high} GROUP BY row) t ON t.row = s.row
            LEFT JOIN (SELECT * FROM _neighbours WHERE row BETWEEN {low} AND {high}) b ON b.row = s.row
        """
        table = samples.arrow(
            f"""
            SELECT s.row, {columns}
            FROM (SELECT *, rowid AS row, {prefix} || shard AS path FROM samples
                  WHERE shard BETWEEN ? AND ? AND rowid BETWEEN {low} AND {high}) s
            {tables if joined else ""}
            ORDER BY s.shard, s.mp4_offset
            """,
            [first, last],
        )
        table = table.filter(pa.array(mask[table["row"].to_numpy()])).drop_columns("row")
        yield table
        del table


# --- Reading


class Selection:
    """A frozen selection, memory-mapped; its pickle is its path.

    Example: `Selection("run/selection.arrow").take([0, 5])["clip_id"].to_pylist()`
    """

    def __init__(self, path: str | Path):
        """Open a file. Raises UserError if it is missing, torn or not a selection."""
        self.path = Path(path)
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path} cannot be read as a selection: {error}") from error
        schema = self._reader.schema
        if not is_selection(schema) or not schema.metadata:
            columns = ", ".join(schema.names)
            raise UserError(f"{self.path} is not a selection that this clipmill reads: its columns are {columns}")
        self.root, self.snapshot, self.hash = (schema.metadata[key].decode() for key in (b"root", b"snapshot", b"hash"))

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Selection, (self.path.absolute(),)

    @property
    def num_clips(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, rows: Sequence[int] | NDArray[np.integer]) -> pa.Table:
        """Return rows in the given order, repeats included; the cost depends on their number, not on the file."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.num_clips:
            raise IndexError(f"rows {rows.min()} … {rows.max()} of a selection of {self.num_clips}")
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        numbers = np.searchsorted(self._ends, ascending, side="right")  # of the batch that each row is in
        pieces = []
        for number in np.unique(numbers).tolist():
            batch = self._batches[number]
            start = int(self._ends[number]) - batch.num_rows
            pieces.append(batch.take(_int64_array(ascending[numbers == number] - start)))
        table = pa.Table.from_batches(pieces, SELECTION)
        return table.combine_chunks().take(_int64_array(np.argsort(order)))

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column of all rows, without a copy."""
        return pa.chunked_array([batch[name] for batch in self._batches], SELECTION.field(name).type)

    def groups(self, exclusive_groups: Sequence[Group]) -> list[NDArray[np.int32]]:
        """Return for each kind of group [num_clips] codes, numbered by first appearance; -1: in no group."""
        found = []
        for kind in exclusive_groups:
            codes, numbers = pc.dictionary_encode(self.column(_GROUP_COLUMNS[kind])), np.empty(self.num_clips, np.int32)
            for chunk, end in zip(codes.iterchunks(), self._ends.tolist(), strict=True):
                numbers[end - len(chunk) : end] = chunk.indices.fill_null(-1).to_numpy()
            found.append(numbers)
        return found

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        """Map all batches; their headers are read now, their data when used."""
        return [complete(self._reader.get_batch(number)) for number in range(self._reader.num_record_batches)]

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)


def _int64_array(numbers: NDArray[np.int64]) -> pa.Array:
    """Convert without a copy and without `pa.array`, which spends a second on importing pandas in every process."""
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(np.ascontiguousarray(numbers))])
