"""What a run trains on: the clips that SQL picks from a corpus, frozen into one Arrow file that processes share.

`training.data.clip_query` says which clips; `write` streams them, a few shards at a time, in order of (shard, offset) into
`selection.arrow`, where a clip is its row number: plan, loader and checkpoints know it by nothing else. `Selection`
opens the file memory-mapped: any process reads any rows of it without loading the rest.

The file holds the texts as the shard indexes had them when it was written, so a run that resumes sees what it saw
before, however the corpus has grown or been recaptioned meanwhile; a new run sees the new captions.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipmill.base.errors import UserError
from training.data.clip_query import Choice, Samples, Tables, add_neighbours, choose, choose_run, open_samples
from training.data.edited_clips import edited_rows
from training.data.epoch_plan import hash_selection
from training.settings import DataSettings, EvalSettings, Group

SELECTION = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video_id", pa.string()),
        ("shard", pa.string()),  # relative to `root`; of plain tars the full path or URL
        ("mp4_offset", pa.int64()),  # of the member's data
        ("mp4_bytes", pa.int64()),
        ("jpg_offset", pa.int64()),  # null where the sample has no still picture
        ("jpg_bytes", pa.int64()),
        ("num_frames", pa.int32()),  # null where nobody counted
        ("fps", pa.float64()),  # frames a second; null where nobody said
        ("subtitle", pa.string()),  # null or "": none
        ("caption", pa.string()),
        ("texts", pa.list_(pa.string())),  # reference texts of a benchmark; null: none
        ("duplicate_group", pa.string()),  # null: no near-duplicates
        ("mp4_sha256", pa.binary(32)),  # what is read has to have it; null: nobody took it
        ("jpg_sha256", pa.binary(32)),
        # What is said in the clips before and behind, whether selected or not: the one before, the one behind, the
        # second before, … as many as data.neighbours asks for; null within: no such clip, or nothing said
        ("neighbours", pa.list_(pa.string())),
    ]
)
_HASHES = ("mp4_sha256", "jpg_sha256")
_LATER = (
    ("neighbours", "fps"),
    (*_HASHES, "neighbours", "fps"),
)  # selections of before there were these are read as having nulls
SELECTION_FILE, EVAL_FILE = "selection.arrow", "eval.arrow"  # of a run folder

_GROUP_COLUMNS: dict[Group, str] = {"video": "video_id", "duplicate": "duplicate_group"}
_SHARD_ROWS = 200_000  # rows of `samples` that are looked at together
_BATCH_ROWS = 65_536  # of the file


# --- Freezing


def select(
    corpus: str | Path, where: str = "", *, setting: str = "data.where", tables: Tables | None = None
) -> pa.Table:
    """A selection in memory, columns and order of the file. Raises UserError."""
    with open_samples(corpus, tables) as samples:
        choice = choose(samples, where, setting)
        return pa.Table.from_batches(selected_rows(samples, choice), SELECTION)


def freeze(
    path: str | Path, corpus: str | Path, where: str = "", *, setting: str = "data.where", tables: Tables | None = None
) -> Choice:
    """One selection of a corpus into one file. Raises UserError that names the setting."""
    with open_samples(corpus, tables) as samples:
        choice = choose(samples, where, setting)
        write(samples, choice, Path(path))
        return replace(choice, problems=samples.problems)


def freeze_run(
    folder: str | Path, corpus: str | Path, data: DataSettings, evaluation: EvalSettings, tables: Tables | None = None
) -> tuple[Choice, Choice | None]:
    """A run's selections from one state of the corpus: `selection.arrow`, and `eval.arrow` where eval.where is given.

    `selection.arrow` is written last: where it is, both are complete. Raises UserError.
    """
    with open_samples(corpus, tables) as samples:
        training, held_out = choose_run(samples, data, evaluation)
        add_neighbours(samples, data.neighbours)
        if held_out:
            write(samples, held_out, Path(folder) / EVAL_FILE)
        write(samples, training, Path(folder) / SELECTION_FILE)
    return training, held_out


def write(samples: Samples, choice: Choice, path: Path) -> None:
    """The chosen rows in order, as an uncompressed Arrow file under `path`, whole or not at all.

    Reads `samples` three times, a few shards at a time: for the snapshot, for the hash, for the rows. Both are in the
    file's first bytes, so they have to be known before the rows.
    """
    from shards.packing.tar import replacing

    snapshot = _snapshot(samples, choice)
    metadata = {"root": samples.root, "snapshot": snapshot, "hash": hash_selection(snapshot, _ids(samples, choice))}
    with replacing(path, fsync=True) as file:
        with pa.ipc.new_file(file, SELECTION.with_metadata(metadata)) as writer:
            for batch in selected_rows(samples, choice):
                writer.write_batch(batch)


def _snapshot(samples: Samples, choice: Choice) -> str:
    """Hash of what training reads of the media: changes with the set of clips and with any clip's bytes.

    Not with texts, which do not decide the order, nor with where the corpus lies or how it is packed. Plain tars carry
    no hashes of their members; there a member is known by its place and size.
    """
    member = "coalesce({0}_sha256, concat({0}_offset, ' ', {0}_bytes), '')"
    content = f"concat_ws(' ', clip_id, {member.format('mp4')}, {member.format('jpg')}) AS content"
    digest = hashlib.blake2b(digest_size=16)
    for table in rows_in_order(samples, choice, content):
        digest.update(_lines(table["content"]).encode() + b"\0")
    return digest.hexdigest()


def _ids(samples: Samples, choice: Choice) -> Iterator[str]:
    """Many ids at a time, joined as `hash_selection` joins them: to its digest it makes no difference."""
    for table in rows_in_order(samples, choice, "clip_id"):
        yield _lines(table["clip_id"])


def _lines(column: pa.ChunkedArray) -> str:
    """All values as one string with zero bytes between them, made by Arrow."""
    values = column.combine_chunks()
    return pc.binary_join(pa.ListArray.from_arrays([0, len(values)], values), "\0")[0].as_py()


def selected_rows(samples: Samples, choice: Choice) -> Iterator[pa.RecordBatch]:
    """The file's record batches, one after the other."""
    joined = ("shard", "texts", "duplicate_group", "neighbours", *_HASHES)
    plain = [name for name in SELECTION.names if name not in joined]
    columns = ", ".join([*plain, *(f"if(length({name}) = 64, TRY(unhex({name})), NULL) AS {name}" for name in _HASHES)])
    for table in rows_in_order(samples, choice, f"{columns}, path AS shard, t.texts, duplicate_group, neighbours"):
        yield from table.select(SELECTION.names).cast(SELECTION).to_batches(max_chunksize=_BATCH_ROWS)


def rows_in_order(samples: Samples, choice: Choice, columns: str) -> Iterator[pa.Table]:
    """The chosen rows by (path, mp4_offset), a few shards at a time, so that memory does not grow with the corpus.

    `path` is the shard's, from the root. Edited clips, of which all rows are held, come first: so do their tars.
    """
    mask = choice.mask
    if choice.edited is not None:
        mask = mask & ~choice.edited
        yield edited_rows(samples, choice, columns)
    prefix = samples.shard_prefix.replace("'", "''")
    for first, last, low, high in _shard_ranges(samples):
        if not mask[low : high + 1].any():
            continue
        table = samples.arrow(
            f"""
            SELECT s.row, {columns}
            FROM (SELECT *, rowid AS row, '{prefix}' || shard AS path FROM samples
                  WHERE shard BETWEEN ? AND ? AND rowid BETWEEN {low} AND {high}) s
            LEFT JOIN (SELECT * FROM _groups WHERE row BETWEEN {low} AND {high}) g ON g.row = s.row
            LEFT JOIN (SELECT * FROM _texts WHERE row BETWEEN {low} AND {high}) t ON t.row = s.row
            LEFT JOIN (SELECT * FROM _neighbours WHERE row BETWEEN {low} AND {high}) b ON b.row = s.row
            ORDER BY s.shard, s.mp4_offset
            """,
            [first, last],
        )
        yield table.filter(pa.array(mask[table["row"].to_numpy()])).drop_columns("row")


def _shard_ranges(samples: Samples) -> Iterator[tuple[str, str, int, int]]:
    """(first shard, last shard, smallest row id, largest row id) of groups of about _SHARD_ROWS rows."""
    sql = """
        SELECT min(shard), max(shard), min(low), max(high) FROM (
            SELECT shard, min(rowid) AS low, max(rowid) AS high, sum(count(*)) OVER (ORDER BY shard) AS total
            FROM samples GROUP BY shard
        ) GROUP BY (total - 1) // $num_rows ORDER BY 1
    """
    yield from samples.connection.sql(sql, params={"num_rows": _SHARD_ROWS}).fetchall()


# --- Reading


class Selection:
    """A frozen selection, memory-mapped: opening it costs nothing, and it pickles as its path."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path} cannot be read as a selection: {error}") from error
        schema = self._reader.schema
        earlier = (pa.schema([field for field in SELECTION if field.name not in later]) for later in _LATER)
        if not any(schema.equals(known) for known in (SELECTION, *earlier)) or not schema.metadata:
            raise UserError(f"{self.path} is no selection of this clipmill: its columns are {', '.join(schema.names)}")
        self.root, self.snapshot, self.hash = (schema.metadata[key].decode() for key in (b"root", b"snapshot", b"hash"))

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Selection, (self.path.absolute(),)

    @property
    def num_clips(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __len__(self) -> int:
        return self.num_clips

    def take(self, rows: Sequence[int] | NDArray[np.integer]) -> pa.Table:
        """The rows in the order asked for, repeated ones too. Its cost depends on how many, not on the file's size."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.num_clips:
            raise IndexError(f"rows {rows.min()} … {rows.max()} of a selection of {self.num_clips}")
        order = np.argsort(rows, kind="stable")
        pieces = list(self._pieces(rows[order]))
        table = pa.Table.from_batches(pieces, SELECTION)
        return table.combine_chunks().take(_places(np.argsort(order)))

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all rows, without a copy."""
        return pa.chunked_array([batch[name] for batch in self._batches], SELECTION.field(name).type)

    def groups(self, apart: Sequence[Group]) -> list[NDArray[np.int32]]:
        """For each kind of group [num_clips] codes, numbered as they are first seen; -1: in none."""
        return [self._codes(_GROUP_COLUMNS[kind]) for kind in apart]

    def _codes(self, name: str) -> NDArray[np.int32]:
        codes = pc.dictionary_encode(self.column(name))
        chunks = [chunk.indices.fill_null(-1).to_numpy() for chunk in codes.chunks]
        return np.concatenate([np.zeros(0, np.int32), *chunks])

    def _pieces(self, rows: NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
        """The rows, which ascend, batch by batch."""
        numbers = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(numbers).tolist():
            batch = self._batches[number]
            start = int(self._ends[number]) - batch.num_rows
            yield batch.take(_places(rows[numbers == number] - start))

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        """Views of the file: their headers are read, their data only where somebody looks."""
        batches = [self._reader.get_batch(number) for number in range(self._reader.num_record_batches)]
        return [_complete(batch) for batch in batches]

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)


def _places(numbers: NDArray[np.int64]) -> pa.Array:
    """Without a copy, and without `pa.array`, which imports pandas: a second of every process that reads."""
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(np.ascontiguousarray(numbers))])


def _complete(batch: pa.RecordBatch) -> pa.RecordBatch:
    columns = [
        batch[field.name] if field.name in batch.schema.names else pa.nulls(batch.num_rows, field.type)
        for field in SELECTION
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SELECTION)
