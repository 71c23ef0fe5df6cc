"""What a run trains on: the clips that SQL picks from a corpus, frozen into one Arrow file that processes share.

1. `open_samples` opens a corpus's manifest, or an index of plain tars, as the same few tables.
2. `choose` runs the user's condition and keeps which rows of `samples` it picks: one bit a row.
3. `apply_overlap` compares the training clips with the held-out ones: by video, by near-duplicate group.
4. `write` streams the chosen rows, a few shards at a time, in order of (shard, offset) into `selection.arrow`. A clip
   is its row number there; plan, loader and checkpoints know it by nothing else.
5. `Selection` opens the file memory-mapped: any process reads any rows of it without loading the rest.

The file holds the texts as the shard indexes had them when it was written, so a run that resumes sees what it saw
before, however the corpus has grown or been recaptioned meanwhile; a new run sees the new captions.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import UserError
from training.plan import hash_selection
from training.settings import EvalSettings, Group

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
        ("subtitle", pa.string()),  # null or "": none
        ("caption", pa.string()),
        ("duplicate_group", pa.string()),  # null: no near-duplicates
    ]
)
SELECTION_FILE, EVAL_FILE = "selection.arrow", "eval.arrow"  # of a run folder

Overlap = Literal["error", "exclude", "allow"]
Tables = Mapping[str, str | Path]  # further tables for conditions: name -> file

_GROUP_COLUMNS: dict[Group, str] = {"video": "video_id", "duplicate": "duplicate_group"}
_SHARD_ROWS = 200_000  # rows of `samples` that are looked at together
_BATCH_ROWS = 65_536  # of the file


# --- Opening


@dataclass(frozen=True)
class Samples:
    """A corpus as selecting sees it: the tables `samples` and `catalog`, near-duplicate groups, copies of videos."""

    connection: Any  # duckdb.DuckDBPyConnection
    name: str  # as the user gave it
    root: str  # folder that shards are relative to; "" where they are not
    shard_prefix: str  # what comes before `samples.shard` on the way from the root

    def arrow(self, sql: str, params: Sequence[Any] | None = None) -> pa.Table:
        return self.connection.sql(sql, params=params).to_arrow_table()

    def row(self, sql: str) -> tuple[Any, ...]:
        return self.connection.sql(sql).fetchall()[0]


@contextmanager
def open_samples(corpus: str | Path, tables: Tables | None = None) -> Iterator[Samples]:
    """A corpus folder, or a pattern of plain tars. Raises UserError.

    tables  further tables that conditions may use, by name, see `shards.sql.open_manifest`
    """
    from shards.sql import open_manifest

    path = Path(corpus).expanduser().absolute()
    with open_manifest(path, tables) as connection:
        yield _prepared(connection, str(corpus), str(path if path.is_dir() else path.parent), "shards/")


def _prepared(connection: Any, name: str, root: str, shard_prefix: str) -> Samples:
    """Adds `_groups` by row of `samples`, and `_copies`: videos with the bytes of an earlier one."""
    connection.execute("""
        CREATE TEMP TABLE _groups AS SELECT s.rowid AS row, g.duplicate_group
        FROM scores g JOIN samples s USING (clip_id) WHERE g.duplicate_group IS NOT NULL ORDER BY row
    """)
    connection.execute("""
        CREATE TEMP TABLE _copies AS SELECT video_id, duplicate_of FROM videos WHERE duplicate_of IS NOT NULL
    """)
    return Samples(connection, name, root, shard_prefix)


# --- Choosing


@dataclass(frozen=True)
class Choice:
    """Rows of `samples`, as a mask over their row ids, and what became of other clips that the SQL picked."""

    mask: NDArray[np.bool_]
    setting: str  # whose SQL chose them
    num_unpacked: int = 0  # in no shard
    num_excluded: int = 0  # left out of training because evaluation has their video or a near-duplicate
    num_shared: int = 0  # in both all the same, because eval.overlap is "allow"

    @cached_property
    def num_clips(self) -> int:
        return int(np.count_nonzero(self.mask))

    def notes(self) -> list[str]:
        """What a person should hear about the clips that are not simply in."""
        said = (
            (self.num_unpacked, "selected clips are in no shard and left out"),
            (self.num_excluded, "clips left out of training: evaluation has their video or a near-duplicate"),
            (self.num_shared, "training clips share a video or a near-duplicate group with evaluation"),
        )
        return [f"{count:,} {text}" for count, text in said if count]


def choose(samples: Samples, where: str, setting: str = "data.where") -> Choice:
    """What a condition on `catalog`, or a SELECT with clip_id, picks; "" picks every sample. Raises UserError."""
    import duckdb

    from shards.sql import check_selection, selection

    check_selection(samples.connection, where, setting)
    sql = "SELECT rowid AS row FROM samples WHERE mp4_offset IS NOT NULL"
    if where.strip():
        sql = f"""
            SELECT s.rowid AS row FROM (SELECT DISTINCT clip_id FROM ({selection(where)})) picked
            LEFT JOIN samples s ON s.clip_id = picked.clip_id AND s.mp4_offset IS NOT NULL
        """
    mask, num_unpacked = np.zeros(_num_row_ids(samples), bool), 0
    try:
        for batch in samples.connection.sql(sql).to_arrow_reader(1_000_000):
            num_unpacked += batch["row"].null_count
            mask[batch["row"].drop_null().to_numpy()] = True
    except (duckdb.Error, pa.ArrowException) as error:  # a value that does not convert, say: found row by row
        raise UserError(f"{setting}: {error}") from error
    choice = Choice(mask, setting, num_unpacked)
    if not choice.num_clips:
        raise UserError(_nothing_chosen(samples, where, choice))
    return choice


def _num_row_ids(samples: Samples) -> int:
    return samples.row("SELECT coalesce(max(rowid), -1) + 1 FROM samples")[0]


def _nothing_chosen(samples: Samples, where: str, choice: Choice) -> str:
    wanted = (
        f"{choice.setting} = {where!r}" if where.strip() else f"{choice.setting} is empty, which means every sample"
    )
    if choice.num_unpacked:
        return (
            f"{wanted}: it picks {choice.num_unpacked:,} clips of {samples.name}, but no shard holds any of them. "
            "`clipmill run pack` packs what pack.where picks."
        )
    return f"{wanted}: that is no clip at all of {samples.name}. Allowed: a condition that some clip meets."


# --- What training and evaluation share


@dataclass(frozen=True)
class Shared:
    """Training clips that evaluation has seen something of: their own video or a near-duplicate."""

    rows: NDArray[np.int64]  # row ids of `samples`
    num_videos: int
    num_groups: int
    examples: tuple[str, ...]  # a few clip ids


def overlap(samples: Samples, training: Choice, held_out: Choice) -> Shared:
    """Training clips of the held-out videos (or of copies of their files), and near-duplicates of held-out clips."""
    connection = samples.connection
    connection.register("training_rows", pa.table({"row": np.flatnonzero(training.mask)}))
    connection.register("held_out_rows", pa.table({"row": np.flatnonzero(held_out.mask)}))
    connection.execute("""
        CREATE OR REPLACE TEMP TABLE _shared AS
        WITH members AS (
            SELECT s.rowid AS row, s.clip_id, coalesce(c.duplicate_of, s.video_id) AS video, g.duplicate_group
            FROM samples s LEFT JOIN _copies c USING (video_id) LEFT JOIN _groups g ON g.row = s.rowid
        ), held_out AS (
            SELECT video, duplicate_group FROM members WHERE row IN (SELECT row FROM held_out_rows)
        )
        SELECT row, clip_id, video IN (SELECT video FROM held_out) AS by_video, video,
               coalesce(duplicate_group IN (SELECT duplicate_group FROM held_out WHERE duplicate_group IS NOT NULL),
                        false) AS by_group, duplicate_group
        FROM members WHERE row IN (SELECT row FROM training_rows) AND (by_video OR by_group)
    """)
    connection.unregister("training_rows")
    connection.unregister("held_out_rows")
    num_videos, num_groups, examples = samples.row("""
        SELECT count(DISTINCT video) FILTER (by_video), count(DISTINCT duplicate_group) FILTER (by_group),
               min(clip_id, 3) FROM _shared
    """)
    rows = samples.arrow("SELECT row FROM _shared ORDER BY row")["row"].to_numpy()
    connection.execute("DROP TABLE _shared")
    return Shared(rows, num_videos, num_groups, tuple(examples or ()))


def apply_overlap(samples: Samples, training: Choice, held_out: Choice, policy: Overlap) -> Choice:
    """The training clips that `eval.overlap` leaves. Raises UserError under "error", and where none is left."""
    found = overlap(samples, training, held_out)
    if not len(found.rows):
        return training
    if policy == "allow":
        return replace(training, num_shared=len(found.rows))
    if policy == "error":
        raise UserError(
            f"eval.overlap = error: {len(found.rows):,} of {training.num_clips:,} training clips share "
            f"{found.num_videos:,} videos or {found.num_groups:,} near-duplicate groups with the evaluation's clips, "
            f"for example {', '.join(found.examples)}. Allowed: another data.where or eval.where, eval.overlap = "
            "exclude, which leaves them out of training, or allow, which keeps them."
        )
    mask = training.mask.copy()
    mask[found.rows] = False
    if not mask.any():
        raise UserError(
            f"eval.overlap = exclude: all {training.num_clips:,} training clips share videos or near-duplicates with "
            "those of eval.where. Allowed: an eval.where that picks fewer videos, or another data.where."
        )
    return replace(training, mask=mask, num_excluded=len(found.rows))


def choose_run(samples: Samples, where: str, evaluation: EvalSettings) -> tuple[Choice, Choice | None]:
    """What a run trains on, and what it is evaluated on where `eval.where` is given. Raises UserError."""
    training = choose(samples, where, "data.where")
    if not evaluation.where.strip():
        return training, None
    held_out = choose(samples, evaluation.where, "eval.where")
    return apply_overlap(samples, training, held_out, evaluation.overlap), held_out


# --- Freezing


def select(
    corpus: str | Path, where: str = "", *, setting: str = "data.where", tables: Tables | None = None
) -> pa.Table:
    """A selection in memory, columns and order of the file. Raises UserError."""
    with open_samples(corpus, tables) as samples:
        choice = choose(samples, where, setting)
        return pa.Table.from_batches(_selected(samples, choice), SELECTION)


def freeze(
    path: str | Path, corpus: str | Path, where: str = "", *, setting: str = "data.where", tables: Tables | None = None
) -> Choice:
    """One selection of a corpus into one file. Raises UserError that names the setting."""
    with open_samples(corpus, tables) as samples:
        choice = choose(samples, where, setting)
        write(samples, choice, Path(path))
        return choice


def freeze_run(
    folder: str | Path, corpus: str | Path, where: str, evaluation: EvalSettings, tables: Tables | None = None
) -> tuple[Choice, Choice | None]:
    """A run's selections from one state of the corpus: `selection.arrow`, and `eval.arrow` where eval.where is given.

    `selection.arrow` is written last: where it is, both are complete. Raises UserError.
    """
    with open_samples(corpus, tables) as samples:
        training, held_out = choose_run(samples, where, evaluation)
        if held_out:
            write(samples, held_out, Path(folder) / EVAL_FILE)
        write(samples, training, Path(folder) / SELECTION_FILE)
    return training, held_out


def write(samples: Samples, choice: Choice, path: Path) -> None:
    """The chosen rows in order, as an uncompressed Arrow file under `path`, whole or not at all.

    Reads `samples` three times, a few shards at a time: for the snapshot, for the hash, for the rows. Both are in the
    file's first bytes, so they have to be known before the rows.
    """
    from shards.tar import replacing

    snapshot = _snapshot(samples, choice)
    metadata = {"root": samples.root, "snapshot": snapshot, "hash": hash_selection(snapshot, _ids(samples, choice))}
    with replacing(path, fsync=True) as file:
        with pa.ipc.new_file(file, SELECTION.with_metadata(metadata)) as writer:
            for batch in _selected(samples, choice):
                writer.write_batch(batch)


def _snapshot(samples: Samples, choice: Choice) -> str:
    """Hash of what training reads of the media: changes with the set of clips and with any clip's bytes.

    Not with texts, which do not decide the order, nor with where the corpus lies or how it is packed. Plain tars carry
    no hashes of their members; there a member is known by its place and size.
    """
    member = "coalesce({0}_sha256, concat({0}_offset, ' ', {0}_bytes), '')"
    content = f"concat_ws(' ', clip_id, {member.format('mp4')}, {member.format('jpg')}) AS content"
    digest = hashlib.blake2b(digest_size=16)
    for table in _in_order(samples, choice, content):
        digest.update(_lines(table["content"]).encode() + b"\0")
    return digest.hexdigest()


def _ids(samples: Samples, choice: Choice) -> Iterator[str]:
    """Many ids at a time, joined as `hash_selection` joins them: to its digest it makes no difference."""
    for table in _in_order(samples, choice, "clip_id"):
        yield _lines(table["clip_id"])


def _lines(column: pa.ChunkedArray) -> str:
    """All values as one string with zero bytes between them, made by Arrow."""
    values = column.combine_chunks()
    return pc.binary_join(pa.ListArray.from_arrays([0, len(values)], values), "\0")[0].as_py()


def _selected(samples: Samples, choice: Choice) -> Iterator[pa.RecordBatch]:
    columns = ", ".join(name for name in SELECTION.names if name not in ("shard", "duplicate_group"))
    prefix = samples.shard_prefix.replace("'", "''")
    for table in _in_order(samples, choice, f"{columns}, '{prefix}' || shard AS shard, duplicate_group"):
        yield from table.select(SELECTION.names).cast(SELECTION).to_batches(max_chunksize=_BATCH_ROWS)


def _in_order(samples: Samples, choice: Choice, columns: str) -> Iterator[pa.Table]:
    """The chosen rows by (shard, mp4_offset), a few shards at a time, so that memory does not grow with the corpus."""
    for first, last, low, high in _shard_ranges(samples):
        if not choice.mask[low : high + 1].any():
            continue
        table = samples.arrow(
            f"""
            SELECT s.rowid AS row, {columns} FROM samples s
            LEFT JOIN (SELECT * FROM _groups WHERE row BETWEEN {low} AND {high}) g ON g.row = s.rowid
            WHERE s.shard BETWEEN ? AND ? AND s.rowid BETWEEN {low} AND {high} ORDER BY s.shard, s.mp4_offset
            """,
            [first, last],
        )
        yield table.filter(pa.array(choice.mask[table["row"].to_numpy()])).drop_columns("row")


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
        if not schema.equals(SELECTION) or not schema.metadata:
            raise UserError(f"{self.path} is no selection of this clipmill: its columns are {', '.join(schema.names)}")
        self.root, self.snapshot, self.hash = (schema.metadata[key].decode() for key in (b"root", b"snapshot", b"hash"))

    @classmethod
    def open(cls, path: str | Path) -> "Selection":
        """Raises UserError for a file that is missing, torn or something else."""
        return cls(path)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Selection, (self.path,)

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
        table = pa.Table.from_batches(pieces, self._reader.schema)
        return table.combine_chunks().take(np.argsort(order))

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
            yield batch.take(pa.array(rows[numbers == number] - start))

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        """Views of the file: their headers are read, their data only where somebody looks."""
        return [self._reader.get_batch(number) for number in range(self._reader.num_record_batches)]

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
