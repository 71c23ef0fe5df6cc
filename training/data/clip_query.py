"""Open a corpus for selecting, and find the clips that meet an SQL condition.

`open_samples` presents a corpus's manifest, or an index of plain tars, as the same few tables. `select_clips` runs the
user's condition on them and keeps one bit per row of `samples`. `training.data.run_selection` combines the conditions
of a run, `training.data.selection` writes the result.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipmill.base.errors import UserError
from clipmill.base.text import sql_literal
from training.data.plain_tars import Problem, is_tars, open_tars

Tables = Mapping[str, str | Path]  # further tables for conditions: name -> file
DEFAULT_MEMORY = "2GB"  # DuckDB's limit, see `data.select_memory`
BATCH_ROWS = 200_000  # of an answer
SPILL = ".select-"  # prefix of folders with what exceeds it


# --- Opening


@dataclass(frozen=True)
class Samples:
    """An open corpus: the tables `samples` and `catalog`, near-duplicate groups, copies of videos."""

    connection: Any  # duckdb.DuckDBPyConnection
    name: str  # as the user gave it
    root: str  # folder or URL that shards are relative to; "": their paths are absolute
    shard_prefix: str  # precedes `samples.shard` in a path from the root
    problems: tuple[Problem, ...] = ()  # found while indexing plain tars, which no build has verified

    def arrow(self, sql: str, params: Sequence[Any] | None = None) -> pa.Table:
        return self.connection.sql(sql, params=params).to_arrow_table()

    def batches(self, sql: str) -> Iterator[pa.RecordBatch]:
        """Yield an answer in pieces as it is computed. Another query on the connection ends it."""
        yield from self.connection.sql(sql).to_arrow_reader(BATCH_ROWS)

    def row(self, sql: str) -> tuple[Any, ...]:
        return self.connection.sql(sql).fetchall()[0]


@contextmanager
def open_samples(
    corpus: str | Path,
    tables: Tables | None = None,
    num_neighbours: int = 0,
    *,
    pack: str = "",
    memory: str = DEFAULT_MEMORY,
    spill_in: Path | None = None,
) -> Iterator[Samples]:
    """Open a corpus folder, its URL, or a pattern of plain tars. Raises UserError.

    Adds temporary tables by row of `samples`: `_groups` (near-duplicates), `_texts` (reference texts, one a row),
    `_neighbours` (subtitles of clips near in time), and `_copies` (videos with the bytes of an earlier one).

    tables          further tables that conditions may use, by name, see `shards.query.sql.open_manifest`
    num_neighbours  clips before and after whose subtitles are needed, see `data.neighbours`
    pack            name of the pack whose shards are `samples`; "": the main one
    memory          DuckDB's limit; tables and joins beyond it go to disk
    spill_in        folder for that; None: the one for temporary files
    """
    from shards.corpus.packs import folder_of
    from shards.query.sql import open_manifest
    from shards.storage.s3 import is_url

    name, problems = str(corpus), []
    with ExitStack() as stack:
        if spill_in is not None:
            spill_in.mkdir(parents=True, exist_ok=True)
        spill = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=SPILL, dir=spill_in)))
        limits: dict[str, Any] = {"memory": memory, "spill": spill}
        if is_tars(name):
            if pack:
                raise UserError(f"data.pack = {pack!r}: {name} names tars, and a pack is of a corpus.")
            connection, problems = stack.enter_context(open_tars(name, tables, **limits))
            samples = Samples(connection, name, "", "", tuple(problems))
        elif is_url(corpus):
            connection = stack.enter_context(open_manifest(corpus, tables, **limits))
            samples = Samples(connection, name, name.rstrip("/"), f"{folder_of(pack)}/")
        else:
            path = Path(corpus).expanduser().absolute()
            connection = stack.enter_context(open_manifest(path, tables, **limits))
            root = str(path if path.is_dir() else path.parent)
            samples = Samples(connection, name, root, f"{folder_of(pack)}/")
        with _named_limit(memory, spill):
            if pack:
                _show_pack(connection, name, pack)
            _add_tables(samples, num_neighbours)
            yield samples


def _add_tables(samples: Samples, num_neighbours: int) -> None:
    """Create the temporary tables of `open_samples`."""
    connection = samples.connection
    connection.execute("""
        CREATE TEMP TABLE _groups AS SELECT s.rowid AS row, g.duplicate_group
        FROM scores g JOIN samples s USING (clip_id) WHERE g.duplicate_group IS NOT NULL ORDER BY row
    """)
    known = {row[0] for row in connection.sql("SELECT table_name FROM information_schema.tables").fetchall()}
    # manifests of older versions have no texts
    texts = "texts" if "texts" in known else "(SELECT '' AS clip_id, '' AS text, 0 AS n LIMIT 0)"
    connection.execute(f"""
        CREATE TEMP TABLE _texts AS SELECT s.rowid AS row, t.n, t.text
        FROM {texts} t JOIN samples s USING (clip_id) ORDER BY row, n
    """)
    connection.execute("""
        CREATE TEMP TABLE _copies AS SELECT video_id, duplicate_of FROM videos WHERE duplicate_of IS NOT NULL
    """)
    # Clips of a video are ordered by their start. Plain tars have no times: there the number after the id's last
    # dot orders them, and clips without one have no neighbours.
    clips = "SELECT clip_id, span_start_s AS place, n FROM clips"
    if "clips" not in known:
        number = r"TRY_CAST(regexp_extract(clip_id, '\.(\d+)$', 1) AS BIGINT)"
        clips = f"SELECT clip_id, {number} AS place, 0 AS n FROM samples WHERE {number} IS NOT NULL"
    offsets = range(1, num_neighbours + 1)
    near = ", ".join(f"{way}(subtitle, {k}) OVER video" for k in offsets for way in ("lag", "lead"))
    connection.execute(f"""
        CREATE TEMP TABLE _neighbours AS
        SELECT s.rowid AS row, CAST([{near}] AS VARCHAR[]) AS neighbours
        FROM samples s JOIN ({clips}) c USING (clip_id) WHERE {num_neighbours} > 0
        WINDOW video AS (PARTITION BY s.video_id ORDER BY c.place, c.n, clip_id)
        ORDER BY row
    """)


@contextmanager
def _named_limit(memory: str, spill: Path) -> Iterator[None]:
    """Turn DuckDB's errors of memory and disk into UserError."""
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"data.select_memory = {memory} is too little, or the disk of {spill} is full: {first}"
        ) from error
    except duckdb.IOException as error:
        raise UserError(f"{spill}, to which what exceeds data.select_memory goes, cannot be used: {error}") from error


def _show_pack(connection: Any, corpus: str, pack: str) -> None:
    """Put the samples of a named pack in the place of the main one's, also in `catalog`. Raises UserError."""
    known = []
    if connection.sql("SELECT 1 FROM duckdb_tables() WHERE table_name = 'pack_samples'").fetchall():
        known = [row[0] for row in connection.sql("SELECT DISTINCT pack FROM pack_samples ORDER BY 1").fetchall()]
    if pack not in known:
        names = f"has {', '.join(known)}" if known else "has no named pack"
        raise UserError(
            f"data.pack = {pack!r}: {corpus} {names}. `clipmill run pack --name {pack}` writes one of that name."
        )
    # Row numbers of `pack_samples` are those of its one table, in which a pack's rows are consecutive.
    connection.execute(f"""
        CREATE TEMP VIEW samples AS
        SELECT rowid, * EXCLUDE (pack) FROM pack_samples WHERE pack = {sql_literal(pack)}
    """)
    connection.execute("""
        CREATE TEMP VIEW catalog AS
        SELECT c.* REPLACE (p.shard AS shard, p.position AS position)
        FROM manifest.catalog c LEFT JOIN samples p ON p.clip_id = c.clip_id
    """)


# --- Selecting


@dataclass(frozen=True)
class ClipQuery:
    """Result of a condition: a mask over the row ids of `samples`, and counts of clips that are left out or changed."""

    mask: NDArray[np.bool_]
    setting: str  # name of the setting with the condition
    num_unpacked: int = 0  # selected clips in no shard
    num_excluded: int = 0  # left out of training because evaluation has their video or a near-duplicate
    num_shared: int = 0  # shared with evaluation, and kept because eval.overlap is "allow"
    problems: tuple[Problem, ...] = ()  # damaged tars and members, reported to the user
    edited: NDArray[np.bool_] | None = None  # mask of clips that are read with edited boundaries
    editing: str = ""  # name and round of the editing

    @cached_property
    def num_clips(self) -> int:
        return int(np.count_nonzero(self.mask))

    @property
    def num_edited(self) -> int:
        return 0 if self.edited is None else int(np.count_nonzero(self.edited))

    def notes(self) -> list[str]:
        """Describe clips that are left out, changed or damaged, in lines for the user."""
        counts = (
            (self.num_unpacked, "selected clips are in no shard and left out"),
            (self.num_excluded, "clips left out of training: evaluation has their video or a near-duplicate"),
            (self.num_shared, "training clips share a video or a near-duplicate group with evaluation"),
            (self.num_edited, f"clips with edited boundaries ({self.editing}), without their captions"),
        )
        by_class = Counter(problem.error_class for problem in self.problems)
        examples = {problem.error_class: f"{problem.item_id}: {problem.message}" for problem in self.problems}
        return [f"{count:,} {text}" for count, text in counts if count] + [
            f"{count:,} {name}, for example {examples[name]}" for name, count in by_class.items()
        ]


def select_clips(samples: Samples, where: str, setting: str = "data.where") -> ClipQuery:
    """Run a condition on `catalog`, or a SELECT with clip_id; "" selects every sample.

    Raises UserError with the setting's name if the SQL fails or no packed clip meets the condition.
    """
    import duckdb

    from shards.query.sql import check_selection, selection

    check_selection(samples.connection, where, setting)
    sql = "SELECT rowid AS row FROM samples WHERE mp4_offset IS NOT NULL"
    if where.strip():
        sql = f"""
            SELECT s.rowid AS row FROM (SELECT DISTINCT clip_id FROM ({selection(where)})) picked
            LEFT JOIN samples s ON s.clip_id = picked.clip_id AND s.mp4_offset IS NOT NULL
        """
    [num_row_ids] = samples.row("SELECT coalesce(max(rowid), -1) + 1 FROM samples")
    mask, num_unpacked = np.zeros(num_row_ids, bool), 0
    try:
        for batch in samples.connection.sql(sql).to_arrow_reader(1_000_000):
            num_unpacked += batch["row"].null_count
            mask[batch["row"].drop_null().to_numpy()] = True
    except (duckdb.OutOfMemoryException, duckdb.IOException):
        raise  # these concern data.select_memory, not the condition
    except (duckdb.Error, pa.ArrowException) as error:  # an error in a row, such as a value that does not convert
        raise UserError(f"{setting}: {error}") from error
    if mask.any():
        return ClipQuery(mask, setting, num_unpacked)
    condition = f"{setting} = {where!r}" if where.strip() else f"{setting} is empty, which selects every sample"
    if num_unpacked:
        raise UserError(
            f"{condition}: it picks {num_unpacked:,} clips of {samples.name}, but no shard holds any of them. "
            "`clipmill run pack` packs the clips of pack.where."
        )
    raise UserError(
        f"{condition}: it picks no clip of {samples.name}. Change the condition so that some clip meets it."
    )
