"""Which clips SQL picks from a corpus, and which of them training may not see because evaluation does.

`open_samples` gives a corpus's manifest, or an index of plain tars, as the same few tables; `choose` runs the user's
condition on them and keeps one bit for each row of `samples`; `apply_overlap` compares training with evaluation. What
comes of it is written by `training.data.selection`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipmill.base.errors import UserError
from training.data.plain_tars import Problem, is_tars, open_tars
from training.settings import DataSettings, EvalSettings

Overlap = Literal["error", "exclude", "allow"]
Tables = Mapping[str, str | Path]  # further tables for conditions: name -> file


# --- Opening


@dataclass(frozen=True)
class Samples:
    """A corpus as selecting sees it: the tables `samples` and `catalog`, near-duplicate groups, copies of videos."""

    connection: Any  # duckdb.DuckDBPyConnection
    name: str  # as the user gave it
    root: str  # folder or URL that shards are relative to; "" where they are not
    shard_prefix: str  # what comes before `samples.shard` on the way from the root
    problems: tuple[Problem, ...] = ()  # with plain tars, which nobody has verified

    def arrow(self, sql: str, params: Sequence[Any] | None = None) -> pa.Table:
        return self.connection.sql(sql, params=params).to_arrow_table()

    def row(self, sql: str) -> tuple[Any, ...]:
        return self.connection.sql(sql).fetchall()[0]


@contextmanager
def open_samples(corpus: str | Path, tables: Tables | None = None) -> Iterator[Samples]:
    """A corpus folder or its URL, or a pattern of plain tars. Raises UserError.

    tables  further tables that conditions may use, by name, see `shards.query.sql.open_manifest`
    """
    from shards.query.sql import open_manifest
    from shards.storage.s3 import is_url

    if is_tars(str(corpus)):
        with open_tars(str(corpus), tables) as (connection, problems):
            yield _prepared(Samples(connection, str(corpus), "", "", tuple(problems)))
        return
    if is_url(corpus):
        with open_manifest(corpus, tables) as connection:
            yield _prepared(Samples(connection, str(corpus), str(corpus).rstrip("/"), "shards/"))
        return
    path = Path(corpus).expanduser().absolute()
    with open_manifest(path, tables) as connection:
        root = path if path.is_dir() else path.parent
        yield _prepared(Samples(connection, str(corpus), str(root), "shards/"))


def _prepared(samples: Samples) -> Samples:
    """Adds `_groups` and `_texts` by row of `samples`, and `_copies`: videos with the bytes of an earlier one."""
    samples.connection.execute("""
        CREATE TEMP TABLE _groups AS SELECT s.rowid AS row, g.duplicate_group
        FROM scores g JOIN samples s USING (clip_id) WHERE g.duplicate_group IS NOT NULL ORDER BY row
    """)
    known = samples.row("SELECT count(*) FROM information_schema.tables WHERE table_name = 'texts'")[0]
    texts = "texts" if known else "(SELECT '' AS clip_id, '' AS text, 0 AS n LIMIT 0)"  # an older manifest has none
    samples.connection.execute(f"""
        CREATE TEMP TABLE _texts AS SELECT s.rowid AS row, list(t.text ORDER BY t.n) AS texts
        FROM {texts} t JOIN samples s USING (clip_id) GROUP BY ALL ORDER BY row
    """)
    samples.connection.execute("""
        CREATE TEMP TABLE _copies AS SELECT video_id, duplicate_of FROM videos WHERE duplicate_of IS NOT NULL
    """)
    add_neighbours(samples, 0)
    return samples


def add_neighbours(samples: Samples, num: int) -> None:
    """Makes `_neighbours`: by row of `samples` the subtitles of the `num` clips of its video before it and behind it.

    Of all clips in shards, in order of their start; in plain tars, which know none, of the number behind the id's last
    dot: whoever has no such number has no neighbours.
    """
    timed = samples.row("SELECT count(*) FROM information_schema.tables WHERE table_name = 'clips'")[0]
    clips = "SELECT clip_id, span_start_s AS place, n FROM clips"
    if not timed:
        number = r"TRY_CAST(regexp_extract(clip_id, '\.(\d+)$', 1) AS BIGINT)"
        clips = f"SELECT clip_id, {number} AS place, 0 AS n FROM samples WHERE {number} IS NOT NULL"
    near = ", ".join(f"{way}(subtitle, {k}) OVER video" for k in range(1, num + 1) for way in ("lag", "lead"))
    samples.connection.execute(f"""
        CREATE OR REPLACE TEMP TABLE _neighbours AS
        SELECT s.rowid AS row, CAST([{near}] AS VARCHAR[]) AS neighbours
        FROM samples s JOIN ({clips}) c USING (clip_id) WHERE {num} > 0
        WINDOW video AS (PARTITION BY s.video_id ORDER BY c.place, c.n, clip_id)
        ORDER BY row
    """)


# --- Choosing


@dataclass(frozen=True)
class Choice:
    """Rows of `samples`, as a mask over their row ids, and what became of other clips that the SQL picked."""

    mask: NDArray[np.bool_]
    setting: str  # whose SQL chose them
    num_unpacked: int = 0  # in no shard
    num_excluded: int = 0  # left out of training because evaluation has their video or a near-duplicate
    num_shared: int = 0  # in both all the same, because eval.overlap is "allow"
    problems: tuple[Problem, ...] = ()  # met on the way: rows for the run's failures
    edited: NDArray[np.bool_] | None = None  # a mask, too: clips that are read with edited boundaries
    editing: str = ""  # by which editing

    @cached_property
    def num_clips(self) -> int:
        return int(np.count_nonzero(self.mask))

    @property
    def num_edited(self) -> int:
        return 0 if self.edited is None else int(np.count_nonzero(self.edited))

    def notes(self) -> list[str]:
        """What a person should hear about the clips that are not simply in."""
        said = (
            (self.num_unpacked, "selected clips are in no shard and left out"),
            (self.num_excluded, "clips left out of training: evaluation has their video or a near-duplicate"),
            (self.num_shared, "training clips share a video or a near-duplicate group with evaluation"),
            (self.num_edited, f"clips with edited boundaries ({self.editing}), without their captions"),
        )
        by_class = Counter(problem.error_class for problem in self.problems)
        examples = {problem.error_class: f"{problem.item_id}: {problem.message}" for problem in self.problems}
        return [f"{count:,} {text}" for count, text in said if count] + [
            f"{count:,} {name}, for example {examples[name]}" for name, count in by_class.items()
        ]


def choose(samples: Samples, where: str, setting: str = "data.where") -> Choice:
    """What a condition on `catalog`, or a SELECT with clip_id, picks; "" picks every sample. Raises UserError."""
    import duckdb

    from shards.query.sql import check_selection, selection

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
    edited = None if training.edited is None else training.edited & mask
    return replace(training, mask=mask, edited=edited, num_excluded=len(found.rows))


def choose_run(samples: Samples, data: DataSettings, evaluation: EvalSettings) -> tuple[Choice, Choice | None]:
    """What a run trains on, and what it is evaluated on where `eval.where` is given. Raises UserError.

    Training clips are as `data.edits` has them; those of evaluation are never edited. Where evaluations select a
    checkpoint, none of their clips may be of the split "test".
    """
    from training.data.edited_clips import with_edits

    training = replace(choose(samples, data.where, "data.where"), problems=samples.problems)
    training = with_edits(samples, training, data.edits, data.apart)
    if not evaluation.where.strip():
        return training, None
    held_out = choose(samples, evaluation.where, "eval.where")
    if evaluation.selects:
        _refuse_test(samples, held_out, evaluation.every)
    return apply_overlap(samples, training, held_out, evaluation.overlap), held_out


def _refuse_test(samples: Samples, held_out: Choice, every: int | str) -> None:
    """Raises UserError. Plain tars and manifests without splits have no such clips."""
    columns = "SELECT column_name FROM information_schema.columns WHERE table_name = 'videos'"
    if "split" not in samples.arrow(columns)["column_name"].to_pylist():
        return
    sql = "SELECT s.rowid AS row FROM samples s JOIN videos v USING (video_id) WHERE v.split = 'test'"
    num_test = int(np.count_nonzero(held_out.mask[samples.arrow(sql)["row"].to_numpy()]))
    if num_test:
        raise UserError(
            f"eval.where: {num_test:,} of its {held_out.num_clips:,} clips are of the split 'test', and with eval.every"
            f" = {every} they would select the checkpoint that is tested on them. Allowed: clips of another split, or "
            "some of 'train' with eval.overlap = exclude; eval.select = null, which only watches; eval.every = null."
        )
