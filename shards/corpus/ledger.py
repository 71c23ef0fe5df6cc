"""The working database: it holds the rows of all fragments, and derives from them current, pending and failed items.

It is private to the process that holds the corpus lock (`.clipmill/ledger.duckdb`), a cache of the fragments that can
be deleted at any time. Readers get the published `manifest.duckdb` instead (`shards.corpus.manifest`).

A stage describes itself to the ledger by its `StageQuery`: SQL for the items that ought to exist, each with a key that
hashes the stage's fingerprint and the item's inputs. An item is done when a row has its present key. So a changed
setting, a changed input, a lost fragment and a new source are one case: a key without a row.
"""

import fcntl
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from clipmill.base.errors import UserError
from clipmill.base.settings import digest
from clipmill.base.text import sql_identifier, sql_literal
from shards.corpus.fragments import fragment_path, outputs_of, replaced_by, table_schema, write_commit
from shards.corpus.schema import LEDGER, TABLES
from shards.corpus.stage_query import StageQuery, chosen_rows
from shards.corpus.tombstones import read_tombstones, tombstone_files
from shards.storage.local import Files
from shards.storage.mirror import files_of
from shards.storage.sealed_parquet import DamagedFile, check_parquet


@dataclass(frozen=True)
class FragmentFile:
    name: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class SourceFile:
    """The file of a downloaded video. `stamp`: see the column `file_stamp` of `downloads`."""

    video_id: str
    path: str
    in_place: bool  # a local file that does not belong to the corpus
    num_bytes: int
    stamp: str | None


class Ledger:
    """The connection to the working database. `memory_limit` bounds DuckDB; no rows are kept in Python.

    cache: folder of the database of a process without the corpus lock, which removes nothing from the corpus.
    """

    def __init__(
        self, root: Path, stages: Sequence[StageQuery], *, memory_limit: str = "1GB", cache: Path | None = None
    ):
        self.root, self.files, self.owns_corpus = root, files_of(root), cache is None
        self.stages = {stage.name: stage for stage in stages}
        self.path = (cache or root / ".clipmill") / "ledger.duckdb"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.connection = _connect(self.path, memory_limit)
        self.tombstones: tuple[str, ...] = ()  # names of the tombstone files applied to the tables
        self.damaged: dict[str, str] = {}  # file → what is wrong with it, of the commits that `sync` removed for it
        self.fingerprints: dict[str, str | None] = {}  # of the stages, at the last `refresh_state`
        self._create_tables()

    def close(self) -> None:
        self.connection.close()

    # -- fragments ------------------------------------------------------------------------------------------------

    def sync(self, *, replace_sources: bool = False) -> tuple[int, int]:
        """Load new fragments; forget those that are deleted, damaged or lack an output; return (loaded, forgotten).

        Raises UserError for a damaged commit of sources, which only their list can make again. With `replace_sources`
        it is removed like any other, because the caller is about to read lists.
        """
        present = {file.name: file for file in _scan(self.root / "fragments" / "ledger")}
        known = {
            name: (size, mtime) for name, size, mtime in self._rows("SELECT name, num_bytes, mtime_ns FROM fragments")
        }
        listing = _Listing(self.files)
        whole, outputs = {}, dict(self._rows("SELECT name, outputs FROM fragments"))
        for name, file in present.items():
            unchanged = known.get(name) == (file.num_bytes, file.mtime_ns)
            try:
                named = outputs[name] if unchanged else self._checked_outputs(name)
            except DamagedFile as error:  # torn by a crash, or rotten
                self.damaged[str(error.path.relative_to(self.root))] = error.reason
                if not (name in known and _is_list(name) and listing.has_all(outputs[name])):
                    continue
                self.rewrite(name)  # no stage can make it again
                named, unchanged = outputs[name], True
            if listing.has_all(named):
                whole[name] = (file, named, unchanged)
        deleted = [name for name in known if name not in whole]
        new = [name for name, (_, _, unchanged) in whole.items() if not unchanged]
        lost = set(present) - set(whole)  # a commit that lacks one of its files counts as never made
        if not replace_sources:
            self._refuse_to_lose_sources(lost)
        # A writer that was killed before it cleaned up leaves the commits that it superseded.
        replaced = {old for name in new for old in replaced_by(fragment_path(self.root, "ledger", name))} & set(whole)
        if self.owns_corpus:
            self.files.remove(*(f"fragments/ledger/{name}.parquet" for name in sorted(lost | replaced)))
        self.forget([*deleted, *replaced])
        self.load([name for name in new if name not in replaced])
        return len(new), len(deleted)

    def _checked_outputs(self, name: str) -> dict[str, int]:
        """Return path → size of the files of a commit after checking its fragments. Raises DamagedFile."""
        path = fragment_path(self.root, "ledger", name)
        outputs = outputs_of(path)
        check_parquet(path, LEDGER)
        for relative in outputs:
            table = _table_of(relative)
            if table in TABLES and (self.root / relative).is_file():
                check_parquet(self.root / relative, table_schema(table))
        return outputs

    def _refuse_to_lose_sources(self, lost: Iterable[str]) -> None:
        """Raise UserError if a commit of sources is among these: without it the next packing would remove clips."""
        for name in sorted(lost):
            if _is_list(name):
                of_it = [f"{path}: {why}" for path, why in self.damaged.items() if Path(path).stem == name]
                what = "".join(of_it) or f"a file of fragments/ledger/{name}.parquet is missing"
                raise UserError(
                    f"{self.root}: a record of sources is damaged ({what}). "
                    "Put a copy of the file back, or give `clipmill build` all lists of this corpus again."
                )

    def remove_orphans(self) -> int:
        """Delete files that no commit names, left by workers that were killed; return how many.

        Call it right after `sync`, while no worker is writing.
        """
        owned = {relative for _, outputs in self._rows("SELECT name, outputs FROM fragments") for relative in outputs}
        folders = [*(f"fragments/{table}" for table in TABLES), "clips"]
        there = [f"{folder}/{name}" for folder in folders for name in self.files.sizes(folder)]
        orphans = [relative for relative in there if relative not in owned]
        self.files.remove(*orphans)
        return len(orphans)

    def rewrite(self, name: str) -> None:
        """Write the fragments of a commit again from the rows in this database, which were checked when loaded."""
        outputs = dict(self._rows("SELECT name, outputs FROM fragments WHERE name = ?", [name])).get(name)
        if outputs is None:
            return  # not loaded: `sync` has removed it
        ((num_rows, written),) = self._rows(
            "SELECT (SELECT count(*) FROM sources WHERE fragment = $1), sum(num_rows) FROM ledger WHERE fragment = $1",
            [name],
        )
        if _is_list(name) and num_rows != written:  # forgotten sources are not in this database any more
            self._refuse_to_lose_sources([name])
        tables = {
            table: self._rows_of(name, table, table_schema(table))
            for table in sorted({_table_of(relative) for relative in outputs} & set(TABLES))
        }
        media = [relative for relative in outputs if _table_of(relative) is None]
        write_commit(self.root, name, tables, self._rows_of(name, "ledger", LEDGER), media, fsync=True)
        self.load([name])

    def _rows_of(self, commit: str, table: str, schema: pa.Schema) -> pa.Table:
        columns = ", ".join(sql_identifier(column) for column in schema.names)
        sql = f"SELECT {columns} FROM {table} WHERE fragment = $name ORDER BY rowid"
        return self.connection.sql(sql, params={"name": commit}).to_arrow_table().cast(schema)

    def drawn_files(self, seed: str, most: int) -> list[tuple[str, int]]:
        """Return (path, bytes) of fragments in an order that depends on the seed."""
        return self._rows(
            "WITH files AS (SELECT 'fragments/ledger/' || name || '.parquet' AS path, num_bytes FROM fragments "
            "UNION ALL SELECT o.key, o.value FROM (SELECT unnest(map_entries(outputs)) AS o FROM fragments)) "
            "SELECT path, num_bytes FROM files WHERE path LIKE 'fragments/%' ORDER BY hash(path || ?) LIMIT ?",
            [seed, most],
        )

    def drop_superseded(self, stage: str) -> int:
        """Delete a stage's commits without a row that still counts; return how many.

        Call it after `refresh_state` for all units. The ledger fragment is deleted first, so that a kill leaves orphans
        and never half a commit.
        """
        names = [
            name
            for (name,) in self._rows(
                f"SELECT fragment FROM ledger WHERE stage = '{stage}' GROUP BY fragment "
                f"HAVING NOT bool_or(key IN (SELECT key FROM input_{stage})) "
                f"AND NOT bool_or(fragment IN (SELECT fragment FROM chosen_{stage}))"
            )
        ]
        for name in names:
            outputs = self._rows("SELECT outputs FROM fragments WHERE name = ?", [name])[0][0]
            self.files.remove(f"fragments/ledger/{name}.parquet")
            self.files.remove(*outputs)
        self.forget(names)
        return len(names)

    def forget(self, names: Sequence[str]) -> None:
        if not names:
            return
        self.connection.register("removed", pa.table({"name": list(names)}))
        for table in ["ledger", *TABLES]:
            self.connection.execute(f"DELETE FROM {table} WHERE fragment IN (SELECT name FROM removed)")
        self.connection.execute("DELETE FROM fragments WHERE name IN (SELECT name FROM removed)")
        self.connection.unregister("removed")

    def load(self, names: Sequence[str]) -> None:
        """Load the rows of whole commits, replacing those loaded before."""
        if not names:
            return
        self.forget(names)
        files, by_table = [], {table: [] for table in TABLES}
        for name in names:
            path = fragment_path(self.root, "ledger", name)
            named, stat = outputs_of(path), path.stat()
            files.append((name, stat.st_size, stat.st_mtime_ns, named))
            for relative in named:
                if (table := _table_of(relative)) in by_table:  # else of a stage whose package is not installed
                    by_table[table].append(str(self.root / relative))
        self.connection.execute("BEGIN")
        ledger_files = [str(fragment_path(self.root, "ledger", name)) for name in names]
        try:
            self._insert("ledger", ledger_files)
            for table, paths in by_table.items():
                if paths:
                    self._insert(table, paths)
        except duckdb.BinderException as error:
            raise UserError(f"{self.root} has columns of a newer clipmill: {error}") from error
        self.connection.executemany("INSERT INTO fragments VALUES (?, ?, ?, ?)", files)
        self.connection.execute("COMMIT")
        if by_table["sources"]:
            self.tombstones = ()  # the new sources may have been forgotten

    def _insert(self, table: str, paths: list[str]) -> None:
        self.connection.execute(
            f"INSERT INTO {table} BY NAME SELECT * EXCLUDE (filename), parse_filename(filename, true) AS fragment "
            "FROM read_parquet(?, filename = true, hive_partitioning = false, union_by_name = true)",
            [paths],
        )

    # -- state ----------------------------------------------------------------------------------------------------

    def refresh_state(
        self, fingerprints: dict[str, str | None], *, units: Iterable[str] | None, run_id: str, max_attempts: int
    ) -> None:
        """Fill the temporary tables `input_S`, `chosen_S`, `state_S` and `current_…` for these units (None: all).

        A stage without a fingerprint is off: it has no items, and the rows it made before do not count.
        """
        self.leave_out_forgotten()
        self.fingerprints = fingerprints
        if units is None:
            self.connection.execute("CREATE OR REPLACE TEMP TABLE scope AS SELECT DISTINCT unit FROM sources")
        else:
            self.connection.register("wanted", pa.table({"unit": pa.array(list(units), pa.string())}))
            self.connection.execute("CREATE OR REPLACE TEMP TABLE scope AS SELECT unit FROM wanted")
            self.connection.unregister("wanted")
        for stage in self.stages.values():
            fingerprint = fingerprints[stage.name]
            wanted = stage.wanted.replace("$fingerprint", sql_literal(fingerprint or ""))
            wanted = wanted if fingerprint else f"SELECT * FROM ({wanted}) WHERE false"
            self.connection.execute(f"CREATE OR REPLACE TEMP TABLE input_{stage.name} AS {wanted}")
            self.connection.execute(_CHOOSE.replace("$stage", stage.name))
            self.connection.execute(
                _STATE.replace("$stage", stage.name)
                .replace("$run_id", sql_literal(run_id))
                .replace("$max_attempts", str(int(max_attempts)))
            )
            if stage.table:
                rows = chosen_rows(stage.name, stage.table)
                self.connection.execute(
                    f"CREATE OR REPLACE TEMP TABLE current_{stage.table} AS SELECT * FROM ({rows}) WHERE up_to_date"
                )
            for statement in stage.current:
                self.connection.execute(statement)

    def leave_out_forgotten(self) -> None:
        """Delete the sources that have a tombstone; every query but that for failures of lists starts from sources.

        Their other rows stay in this cache until `clipmill compact` rebuilds it.
        """
        files = tombstone_files(self.root)
        if files == self.tombstones:
            return
        self.connection.register("to_forget", read_tombstones(self.root))
        self.connection.execute("DELETE FROM sources WHERE sha256(video_id) IN (SELECT video_hash FROM to_forget)")
        self.connection.execute(
            "DELETE FROM ledger WHERE stage = 'pack' "
            "AND sha256(split_part(item_id, '.', 1)) IN (SELECT video_hash FROM to_forget)"
        )
        self.connection.unregister("to_forget")
        self.tombstones = files

    def mark_pending(self, stage: str, item_ids: Sequence[str]) -> None:
        """Make done or failed items pending once in this run."""
        self.connection.register("named", pa.table({"item_id": pa.array(list(item_ids), pa.string())}))
        self.connection.execute(f"INSERT INTO forced SELECT '{stage}', item_id FROM named")
        self.connection.unregister("named")

    def try_again(self, tried: Sequence[tuple[str, str, int]]) -> None:
        """Give retryable failures one more attempt in the run in which they failed.

        tried: (stage, item_id, attempts so far); without effect for an item that has more attempts by then.
        """
        self.connection.execute("DELETE FROM once_more")
        if tried:
            self.connection.executemany("INSERT INTO once_more VALUES (?, ?, ?)", list(tried))

    def work(self, stage: str) -> list[dict]:
        """Return the payload of every pending item of a stage, in item order, in the units of the last refresh."""
        self.connection.execute(
            f"CREATE OR REPLACE TEMP TABLE work AS SELECT * FROM state_{stage} WHERE status IN ('pending', 'retry')"
        )
        return self.connection.sql(self.stages[stage].payload).to_arrow_table().to_pylist()

    def sources_of(self, stages: Sequence[str]) -> list[SourceFile]:
        """Return the files of the downloaded videos that have pending items in these stages."""
        wanted = " UNION ".join(
            f"SELECT item_id FROM state_{stage} WHERE status IN ('pending', 'retry')" for stage in stages
        )
        sql = (
            "SELECT video_id, path, extractor = 'file' AND path LIKE '/%', num_bytes, file_stamp FROM current_videos "
            f"WHERE path IS NOT NULL AND video_id IN ({wanted})"
        )
        return [SourceFile(*row) for row in self._rows(sql)] if stages else []

    def retry_changed(self, stages: Sequence[str], run_id: str) -> list[str]:
        """Return the videos whose files had other bytes when one of these stages read them, and allow it another try.

        Left out are those that were downloaded since, or in this run.
        """
        if not stages:
            return []
        states = " UNION ALL ".join(f"SELECT '{stage}' AS stage, * FROM state_{stage}" for stage in stages)
        rows = self._rows(f"""
            SELECT l.stage, l.failed_id, l.attempts FROM ({_LAST_FAILURE}) l
            JOIN ({states}) s ON s.stage = l.stage AND s.item_id = l.failed_id AND s.key = l.failed_key
            WHERE l.error_class = 'source-changed' AND s.status IN ('failed', 'retry') AND NOT EXISTS (
                SELECT 1 FROM ledger d WHERE d.stage = 'download' AND d.item_id = l.failed_id
                AND (d.run_id = {sql_literal(run_id)} OR d."at" > l."at")
            )
        """)
        if rows:
            self.connection.executemany("INSERT INTO once_more VALUES (?, ?, ?)", rows)
        return [item_id for _, item_id, _ in rows]

    def sources_cut(self) -> list[str]:
        """Return the paths of the videos that were copied into the corpus and whose clips are all cut."""
        sql = (
            "SELECT path FROM current_videos WHERE path NOT LIKE '/%' AND video_id IN "
            "(SELECT item_id FROM state_cut WHERE status = 'done') ORDER BY path"
        )
        return [path for (path,) in self._rows(sql)]

    def items_of(self, stage: str) -> list[str]:
        return [item_id for (item_id,) in self._rows(f"SELECT item_id FROM state_{stage} ORDER BY 1")]

    def standing_failures(self, run_id: str | None = None) -> list[tuple[str, str, int, str]]:
        """Return (stage, error class, count, example) of items that failed with their present inputs.

        run_id: count only items that failed in this run.
        """
        only = f"AND run_id = {sql_literal(run_id)} " if run_id else ""
        return self._rows(
            f"SELECT stage, error_class, count(*), min(failed_id || ': ' || message) FROM ({self.failures_sql()}) "
            f"WHERE stage <> 'edit' {only}GROUP BY ALL ORDER BY ALL"
        )

    def failures_sql(self) -> str:
        """Return a SELECT of the failures that stand, one row per item, after `refresh_state` for all units.

        quarantined: the failure is retryable, but its attempts are used up; only `clipmill run --where` tries it again.
        """
        quarantined = " UNION ALL ".join(
            f"SELECT '{name}', item_id FROM state_{name} WHERE status = 'quarantined'" for name in self.stages
        )
        present = " UNION ALL ".join(
            f"SELECT '{name}', key, split_part(item_id, '.', 1) FROM input_{name}" for name in self.stages
        )
        return f"""
            SELECT *, (stage, failed_id) IN (FROM ({quarantined})) AS quarantined FROM ({_LAST_FAILURE}) l
            WHERE stage IN ('ingest', 'pack')
               OR (stage = 'edit' AND split_part(failed_id, '.', 1) IN (SELECT video_id FROM sources)
                   AND (failed_id, "at") IN
                   (SELECT item_id, max("at") FROM ledger WHERE stage = 'edit' GROUP BY item_id))
               OR ((stage, failed_key, split_part(failed_id, '.', 1)) IN (FROM ({present}))
                   AND NOT EXISTS (SELECT 1 FROM ledger d WHERE d.status = 'done' AND d.stage = l.stage
                                   AND d.item_id = l.failed_id AND d.key = l.failed_key))
        """

    def without_clips_sql(self) -> str:
        """Return a SELECT of the videos that are there and have no clip, with the reason, after `refresh_state`.

        The reason is the class of a failure of the last stage that has one, of the spans' absence, or "pending".
        """
        stages = [name for name in ("transcribe", "segment", "cut") if name in self.stages]
        pending = " UNION ALL ".join(
            [f"SELECT item_id FROM state_{name} WHERE status IN ('pending', 'retry')" for name in stages]
        )
        return f"""
            WITH failed AS (
                SELECT split_part(failed_id, '.', 1) AS video_id,
                       arg_max(error_class, list_position({stages}, stage)) AS error_class,
                       arg_max(message, list_position({stages}, stage)) AS message
                FROM ({self.failures_sql()}) WHERE stage IN (SELECT unnest({stages})) GROUP BY 1
            ), noted AS (
                SELECT l.item_id AS video_id, l.error_class, l.message FROM ledger l JOIN chosen_segment c
                ON l.item_id = c.item_id AND l.key = c.key AND l.fragment = c.fragment WHERE l.stage = 'segment'
            )
            SELECT v.video_id,
                   CASE WHEN v.video_id IN ({pending}) THEN 'pending'
                        ELSE coalesce(f.error_class, n.error_class, 'no-span') END AS reason,
                   coalesce(f.message, n.message, 'no span was made of it') AS message
            FROM current_videos v LEFT JOIN failed f USING (video_id) LEFT JOIN noted n USING (video_id)
            WHERE v.duplicate_of IS NULL AND v.video_id NOT IN (SELECT video_id FROM current_clips)
        """

    def without_clips(self) -> list[tuple[str, int, str]]:
        """Return (reason, number of videos, example) of the videos that no stage will make clips of."""
        return self._rows(
            "SELECT reason, count(*), min(video_id || ': ' || message) "
            f"FROM ({self.without_clips_sql()}) WHERE reason <> 'pending' GROUP BY ALL ORDER BY ALL"
        )

    def has_work(self, stage: str) -> bool:
        return bool(self._rows(f"SELECT 1 FROM state_{stage} WHERE status IN ('pending', 'retry') LIMIT 1"))

    def unit_of_work(self, stage: str) -> dict[str, str]:
        """Return item → unit of the items that `work` returns."""
        return dict(self._rows(f"SELECT item_id, unit FROM state_{stage} WHERE status IN ('pending', 'retry')"))

    def counts(self) -> dict[str, dict[str, int]]:
        """Return stage → status → number of items, in the units of the last refresh.

        Besides pending, retry, done and failed: `waiting`, done items whose video has pending items in an earlier
        stage, which may make them pending; `quarantined`, items whose attempts are used up.
        """
        return {name: dict(self._rows(self._count_sql(name))) for name in self.stages}

    def recorded_counts(self) -> dict[str, dict[str, int]]:
        """Return stage → done or failed → number of items by their last attempt, whatever the settings are now."""
        last = 'SELECT stage, item_id, arg_max(status, "at") AS status FROM ledger GROUP BY ALL'
        counts: dict[str, dict[str, int]] = {name: {} for name in self.stages}
        for stage, ended, count in self._rows(f"SELECT stage, status, count(*) FROM ({last}) GROUP BY ALL"):
            if stage in counts:
                counts[stage][ended] = count
        return counts

    def _count_sql(self, stage: str) -> str:
        before = [
            f"SELECT split_part(item_id, '.', 1) FROM state_{name} WHERE status IN ('pending', 'retry')"
            for name in self._ancestors(stage)
        ] or ["SELECT NULL WHERE false"]
        return (
            f"WITH unsettled(video_id) AS ({' UNION '.join(before)}) "
            "SELECT CASE WHEN status = 'done' AND split_part(item_id, '.', 1) IN (SELECT video_id FROM unsettled) "
            f"THEN 'waiting' ELSE status END AS status, count(*) FROM state_{stage} GROUP BY 1 ORDER BY 1"
        )

    def _ancestors(self, stage: str) -> list[str]:
        direct = self.stages[stage].after
        return sorted({*direct, *(a for name in direct for a in self._ancestors(name))})

    def units_with_work(self, stages: Iterable[str]) -> list[str]:
        """Return the units with pending items in these stages; [] without stages, as when only packing is left."""
        union = " UNION ALL ".join(
            ["SELECT '' AS unit WHERE false"]
            + [f"SELECT unit FROM state_{stage} WHERE status IN ('pending', 'retry')" for stage in stages]
        )
        return [unit for (unit,) in self._rows(f"SELECT DISTINCT unit FROM ({union}) ORDER BY unit")]

    # -- plumbing -------------------------------------------------------------------------------------------------

    def _rows(self, sql: str, parameters: Sequence = ()) -> list[tuple]:
        return self.connection.execute(sql, list(parameters)).fetchall()

    def _create_tables(self) -> None:
        for table, schema in _schemas().items():
            self.connection.register("columns", schema.empty_table())
            self.connection.execute(f"CREATE TABLE IF NOT EXISTS {table} AS SELECT * FROM columns")
            self.connection.unregister("columns")
        self.connection.execute(f"CREATE TABLE IF NOT EXISTS fragments ({_FRAGMENTS})")
        self.connection.execute("CREATE TEMP TABLE forced (stage VARCHAR, item_id VARCHAR)")
        self.connection.execute("CREATE TEMP TABLE once_more (stage VARCHAR, item_id VARCHAR, attempts INT)")


# The row that counts for an item: the one made with the item's present key, else the newest of another key.
_CHOOSE = """
CREATE OR REPLACE TEMP TABLE chosen_$stage AS
SELECT l.item_id, i.unit, l.key, l.fragment, l.key = i.key AS up_to_date
FROM ledger l JOIN input_$stage i USING (item_id)
WHERE l.stage = '$stage' AND l.status = 'done'
QUALIFY row_number() OVER (PARTITION BY l.item_id ORDER BY l.key = i.key DESC, l.at DESC, l.fragment) = 1
"""

_STATE = """
CREATE OR REPLACE TEMP TABLE state_$stage AS
WITH tried AS (
    SELECT item_id, key, max(attempts) FILTER (status = 'failed') AS attempts,
           arg_max(transient, "at") FILTER (status = 'failed') AS transient,
           bool_or(run_id = $run_id) AS in_this_run
    FROM ledger WHERE stage = '$stage' GROUP BY ALL
)
SELECT i.item_id, i.unit, i.key, i.cost, coalesce(t.attempts, 0) AS attempts,
       CASE WHEN f.item_id IS NOT NULL AND NOT coalesce(t.in_this_run, false) THEN 'pending'
            WHEN c.up_to_date THEN 'done'
            WHEN t.attempts IS NULL THEN 'pending'
            WHEN t.transient AND t.attempts >= $max_attempts THEN 'quarantined'
            WHEN t.transient AND (NOT t.in_this_run OR o.item_id IS NOT NULL) THEN 'retry'
            ELSE 'failed' END AS status
FROM input_$stage i
LEFT JOIN chosen_$stage c ON c.item_id = i.item_id AND c.up_to_date
LEFT JOIN tried t ON t.item_id = i.item_id AND t.key = i.key
LEFT JOIN (SELECT DISTINCT item_id FROM forced WHERE stage = '$stage') f ON f.item_id = i.item_id
LEFT JOIN once_more o ON o.stage = '$stage' AND o.item_id = i.item_id AND o.attempts = t.attempts
"""


_LAST_FAILURE = """
SELECT stage, item_id AS failed_id, key AS failed_key, unit, error_class, message, transient, attempts, "at", run_id
FROM ledger WHERE status = 'failed'
QUALIFY row_number() OVER (PARTITION BY stage, item_id, key ORDER BY "at" DESC, attempts DESC) = 1
"""


class _Listing:
    """The sizes of files, found by one listing per folder instead of one stat per file."""

    def __init__(self, files: Files):
        self.files, self.folders = files, {}

    def has_all(self, outputs: dict[str, int]) -> bool:
        return all(self._size(relative) == num_bytes for relative, num_bytes in outputs.items())

    def _size(self, relative: str) -> int | None:
        folder, _, name = relative.rpartition("/")
        if folder not in self.folders:
            self.folders[folder] = self.files.sizes(folder)
        return self.folders[folder].get(name)


def _scan(folder: Path) -> list[FragmentFile]:
    if not folder.is_dir():
        return []
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.is_file():
                continue
            stat = entry.stat()
            files.append(FragmentFile(entry.name.removesuffix(".parquet"), stat.st_size, stat.st_mtime_ns))
    return sorted(files, key=lambda file: file.name)


def _is_list(commit: str) -> bool:
    """Return whether a commit holds sources, which only the lists of the user can make again."""
    return commit.startswith("ingest-") and not commit.startswith("ingest-problems-")


def _table_of(relative: str) -> str | None:
    """Return the table of a fragment, None for another file of a commit."""
    folder, *rest = Path(relative).parts
    return rest[0] if folder == "fragments" and len(rest) == 2 else None


_FRAGMENTS = "name VARCHAR, num_bytes BIGINT, mtime_ns BIGINT, outputs MAP(VARCHAR, BIGINT)"


def _schemas() -> dict[str, pa.Schema]:
    """Return the columns of the tables that hold the rows of fragments, each with the fragment it came from."""
    schemas = {"ledger": LEDGER, **{table: table_schema(table) for table in TABLES}}
    return {table: schema.append(pa.field("fragment", pa.string())) for table, schema in schemas.items()}


def _layout() -> str:
    """Hash the columns of the working database. A file with another hash is rebuilt from the fragments."""
    columns = {table: [f"{field.name} {field.type}" for field in schema] for table, schema in _schemas().items()}
    return digest([columns, _FRAGMENTS])


def _connect(path: Path, memory_limit: str) -> duckdb.DuckDBPyConnection:
    config = {"memory_limit": memory_limit, "threads": 1, "preserve_insertion_order": False}
    for attempt in (1, 2):
        try:
            connection = duckdb.connect(str(path), config=config)
            connection.execute("CREATE TABLE IF NOT EXISTS layout AS SELECT ? AS version", [_layout()])
            if connection.execute("SELECT version FROM layout").fetchall() == [(_layout(),)]:
                connection.execute("SET TimeZone = 'UTC'")
                return connection
            connection.close()
        except duckdb.Error:
            if attempt == 2:
                raise
        _remove(path)  # a cache: of another layout or torn, it is rebuilt from the fragments
    raise AssertionError("unreachable")


def remove_cache(root: Path) -> None:
    """Delete the working database of a corpus. Raises UserError if a process has it open."""
    _remove(root / ".clipmill" / "ledger.duckdb")


def _remove(path: Path) -> None:
    """Delete a database that no process has open: one that cannot be opened may be another process's and whole.

    Raises UserError if a process holds DuckDB's lock on it.
    """
    with suppress(FileNotFoundError), open(path, "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{path} is in use by another process, which may be writing this corpus from another container or "
                "host. Stop it, or wait for its end, and run the command again."
            ) from error
        path.unlink()
    path.with_name(path.name + ".wal").unlink(missing_ok=True)
