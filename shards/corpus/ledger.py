"""The ledger: which items of a volume are current, pending and failed, derived from the rows of all fragments.

Readers get the published `manifest.duckdb` instead (`shards.corpus.manifest`).

A stage describes itself to the ledger by its `StageQuery`: SQL for the items that ought to exist, each with a key that
hashes the stage's fingerprint and the item's inputs. An item is done when a row has its present key. So a changed
setting, a changed input, a lost fragment and a new source are one case: a key without a row.

Items are derived volume by volume, into temporary tables. What a volume has in all is kept in the index: counts,
failures, videos without clips. A volume is derived again when its rows, the settings or the tombstones have changed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from clipmill.base.settings import digest
from clipmill.base.text import sql_literal
from shards.corpus.copies import Copies
from shards.corpus.released_clips import ReleasedClips
from shards.corpus.rows import insert_rows
from shards.corpus.stage_query import StageQuery, chosen_rows
from shards.corpus.volume_files import INDEX
from shards.corpus.working_database import WorkingDatabase

_TRIED = pa.schema([("stage", pa.string()), ("item_id", pa.string()), ("attempts", pa.int32())])
_SUMMARY = ("counts", "standing", "without_clips", "derived")  # tables of the index


@dataclass(frozen=True)
class SourceFile:
    """The file of a downloaded video. `stamp`: see the column `file_stamp` of `downloads`."""

    video_id: str
    path: str
    in_place: bool  # a local file that does not belong to the corpus
    num_bytes: int
    stamp: str | None


@dataclass(frozen=True)
class Scope:
    """The volume, the units and the settings that the temporary tables were derived for."""

    volume: int
    units: frozenset[str] | None  # None: all of the volume
    fingerprints: dict[str, str | None]
    run_id: str
    max_attempts: int


class Ledger(WorkingDatabase):
    """The working database, and what it says of the stages' items."""

    def __init__(
        self, root: Path, stages: Sequence[StageQuery], *, memory_limit: str = "1GB", cache: Path | None = None
    ):
        self.stages = {stage.name: stage for stage in stages}
        self.fingerprints: dict[str, str | None] = {}  # of the stages, at the last `refresh_state`
        self.scope: Scope | None = None
        self._has_views = False  # `chosen_S`, over tables that are made again for each scope
        self._run = ("", 0)  # run_id and max_attempts of the last `refresh_state`
        super().__init__(root, memory_limit=memory_limit, cache=cache)
        self.connection.execute("CREATE TEMP TABLE forced (stage VARCHAR, item_id VARCHAR)")
        self.connection.execute("CREATE TEMP TABLE once_more (stage VARCHAR, item_id VARCHAR, attempts INT)")
        self._derived = {volume for (volume,) in self._rows(f"SELECT volume FROM {INDEX}.derived")}
        self.copies = Copies(self)
        self._use(self.volumes()[0])
        self.released = ReleasedClips(self)
        self.activate(self.volumes()[0])

    # -- state ----------------------------------------------------------------------------------------------------

    def refresh_state(
        self, fingerprints: dict[str, str | None], *, units: Iterable[str] | None, run_id: str, max_attempts: int
    ) -> None:
        """Derive the items of these units, which are of one volume; None: those of every volume that has changed.

        Fills the temporary tables `input_S`, `chosen_S`, `state_S` and `current_…`, for the units or for the last
        volume that was derived. A stage without a fingerprint is off: it has no items, and the rows it made before do
        not count.
        """
        self.leave_out_forgotten()
        self.released.notice_changes()
        self.fingerprints, self._run = fingerprints, (run_id, max_attempts)
        if units is not None:
            units = frozenset(units)
            [volume] = {self.volume_of(unit) for unit in units} or {self.active or 0}
            self._derive(Scope(volume, units, fingerprints, run_id, max_attempts))
            return
        if self.scope and self.scope.units is not None:
            self.scope = None  # `counts` is of the whole corpus again
        again = True
        while again:  # a volume may bring another one copies of its videos
            again = [volume for volume in self.volumes() if not self._is_derived(volume)]
            for volume in again:
                self.show(volume)
        if len(self.volumes()) == 1:
            self.show(self.volumes()[0])

    def show(self, volume: int) -> None:
        """Fill the temporary tables for all units of a volume, and keep what it has in all, unless it is done."""
        scope = Scope(volume, None, self.fingerprints, *self._run)
        if self.scope == scope and self.active == volume and volume in self._derived:
            return
        self._derive(scope)
        self._keep_summary(scope)

    def changed(self, volume: int) -> None:
        """Note that the rows of a volume have changed."""
        self.scope = None
        self.copies.changed(volume)
        if volume in self._derived:
            self._derived.discard(volume)
            self._execute(f"DELETE FROM {INDEX}.derived WHERE volume = ?", [volume])

    def relocated(self, volume: int) -> None:
        """Note that shards with clips of a volume have changed, so that the bytes of these may be elsewhere."""
        self.released.loaded = None
        self.changed(volume)

    def load(self, names: Sequence[str]) -> None:
        super().load(names)
        self.released.made_again(names)

    def _is_derived(self, volume: int) -> bool:
        """Return whether the summary of a volume is that of its rows and the settings."""
        if volume not in self._derived:
            return False
        [(made_with, of_run)] = self._rows(f"SELECT made_with, run_id FROM {INDEX}.derived WHERE volume = ?", [volume])
        return made_with == self._made_with() and of_run in (None, self._run[0])

    def _made_with(self) -> str:
        statements = [(stage.wanted, stage.table, stage.current) for stage in self.stages.values()]
        return digest([self.fingerprints, self._run[1], statements, _STATE, _LAST_FAILURE])

    def _derive(self, scope: Scope) -> None:
        self._fill_tables(scope)
        if self.copies.register(scope.volume):
            self._fill_tables(scope)

    def _fill_tables(self, scope: Scope) -> None:
        self.activate(scope.volume)
        self.scope = None
        if scope.units is None:
            self.connection.execute("CREATE OR REPLACE TEMP TABLE scope AS SELECT DISTINCT unit FROM sources")
        else:
            with self._as_table("named_units", sorted(scope.units)):
                self.connection.execute("CREATE OR REPLACE TEMP TABLE scope AS SELECT name AS unit FROM named_units")
        self.copies.load(scope.volume)
        self.released.load(scope.volume)
        for stage in self.stages.values():
            fingerprint = scope.fingerprints[stage.name]
            wanted = stage.wanted.replace("$fingerprint", sql_literal(fingerprint or ""))
            wanted = wanted if fingerprint else f"SELECT * FROM ({wanted}) WHERE false"
            self.connection.execute(f"CREATE OR REPLACE TEMP TABLE input_{stage.name} AS {wanted}")
            self.connection.execute(
                _STATE.replace("$stage", stage.name)
                .replace("$run_id", sql_literal(scope.run_id))
                .replace("$max_attempts", str(int(scope.max_attempts)))
            )
            if not self._has_views:
                self.connection.execute(_CHOSEN.replace("$stage", stage.name))
            if stage.table:
                rows = chosen_rows(stage.name, stage.table)
                self.connection.execute(
                    f"CREATE OR REPLACE TEMP TABLE current_{stage.table} AS SELECT * FROM ({rows}) WHERE up_to_date"
                )
            for statement in stage.current:
                self.connection.execute(statement)
        self.scope, self._has_views = scope, True

    def _keep_summary(self, scope: Scope) -> None:
        """Keep the counts, failures and videos without clips of the volume that was derived."""
        volume = scope.volume
        statements = [f"DELETE FROM {INDEX}.{table} WHERE volume = {volume}" for table in _SUMMARY]
        for stage in self.stages:
            statements.append(
                f"INSERT INTO {INDEX}.counts SELECT {volume}, '{stage}', * FROM ({self._count_sql(stage)})"
            )
        statements.append(
            f"INSERT INTO {INDEX}.standing BY NAME SELECT {volume} AS volume, * FROM ({self._failures_sql()})"
        )
        statements.append(
            f"INSERT INTO {INDEX}.without_clips BY NAME SELECT {volume} AS volume, * FROM ({self._without_clips_sql()})"
        )
        tried = " UNION ALL ".join(f"SELECT retryable FROM state_{stage}" for stage in self.stages)
        ((of_run,),) = self._rows(f"SELECT bool_or(retryable) FROM ({tried})")
        forced = bool(self._rows("SELECT 1 FROM forced UNION ALL SELECT 1 FROM once_more LIMIT 1"))
        rows = 'count(*), coalesce(bit_xor(hash(fragment, item_id, key, status, attempts, epoch_us("at"))), 0)'
        ((num_rows, rows_hash),) = self._rows(f"SELECT {rows} FROM ledger")
        [sources] = self._rows("SELECT count(*), coalesce(bit_xor(hash(fragment, video_id)), 0) FROM sources")
        [(num_packed, *packed)] = self._rows(
            "SELECT count(*), coalesce(bit_xor(hash(clip_id, tar, mp4_offset)), 0) FROM packed_clips"
        )
        [(num_copies, copies)] = self._rows(
            "SELECT count(*), coalesce(bit_xor(hash(video_id, ordinal, content, spans)), 0) FROM outside_copies"
        )
        others = [*(packed if num_packed else []), *([num_copies, copies] if num_copies else [])]
        made_of = digest([num_rows, rows_hash, *sources, *others])
        made_with, of_run = self._made_with(), scope.run_id if of_run or forced else None
        self.connection.execute("BEGIN")
        for statement in statements:
            self.connection.execute(statement)
        self._execute(
            f"INSERT INTO {INDEX}.derived VALUES (?, ?, ?, ?, '')",
            [volume, made_with, of_run, made_of],
        )
        self.connection.execute("COMMIT")
        self._derived.add(volume)

    def content_of(self, volume: int) -> str:
        """Hash what a volume's part of the manifest is made from: its sources and other rows, the settings, the copies
        of its videos in other volumes, the places of clips that are in shards alone.

        "" if the volume has changed since it was derived.
        """
        rows = self._rows(f"SELECT made_with, rows_hash FROM {INDEX}.derived WHERE volume = ?", [volume])
        return digest(list(rows[0])) if rows else ""

    def mark_pending(self, stage: str, item_ids: Sequence[str]) -> None:
        """Make done or failed items pending once in this run."""
        if not item_ids:
            return
        with self._as_table("named_items", item_ids):
            self.connection.execute(f"INSERT INTO forced SELECT '{stage}', name FROM named_items")
        self._changed_items(item_ids)

    def _changed_items(self, item_ids: Iterable[str]) -> None:
        for volume in self.volumes_of({item_id.partition(".")[0] for item_id in item_ids}):
            self.changed(volume)

    def try_again(self, tried: Sequence[tuple[str, str, int]]) -> None:
        """Give retryable failures one more attempt in the run in which they failed.

        tried: (stage, item_id, attempts so far); without effect for an item that has more attempts by then.
        """
        self.connection.execute("DELETE FROM once_more")
        if tried:
            insert_rows(self.connection, "once_more", _TRIED, tried)
            self._changed_items(item_id for _, item_id, _ in tried)

    def work(self, stage: str) -> list[dict]:
        """Return the payload of every pending item of a stage, in item order, of what was derived last."""
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
        insert_rows(self.connection, "once_more", _TRIED, rows)
        return [item_id for _, item_id, _ in rows]

    def sources_cut(self) -> list[str]:
        """Return the paths of the copied videos whose clips are all cut, of the volume that was derived last."""
        sql = (
            "SELECT path FROM current_videos WHERE path NOT LIKE '/%' AND video_id IN "
            "(SELECT item_id FROM state_cut WHERE status = 'done') ORDER BY path"
        )
        return [path for (path,) in self._rows(sql)]

    def items_of(self, stage: str) -> list[str]:
        """Return the items of a stage, of what was derived last."""
        return [item_id for (item_id,) in self._rows(f"SELECT item_id FROM state_{stage} ORDER BY 1")]

    def standing_failures(self, run_id: str | None = None) -> list[tuple[str, str, int, str]]:
        """Return (stage, error class, count, example) of items that failed with their present inputs.

        run_id: count only items that failed in this run.
        """
        only = f"AND run_id = {sql_literal(run_id)} " if run_id else ""
        return self._rows(
            "SELECT stage, error_class, count(*), min(failed_id || ': ' || message) "
            f"FROM {INDEX}.standing WHERE stage <> 'edit' {only}GROUP BY ALL ORDER BY ALL"
        )

    def _failures_sql(self) -> str:
        """Return a SELECT of the failures of a derived volume that stand, one row per item.

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

    def _without_clips_sql(self) -> str:
        """Return a SELECT of the videos of a derived volume that are there and have no clip, with the reason.

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
                FROM ({self._failures_sql()}) WHERE stage IN (SELECT unnest({stages})) GROUP BY 1
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
            f"FROM {INDEX}.without_clips WHERE reason <> 'pending' GROUP BY ALL ORDER BY ALL"
        )

    def has_work(self, stage: str) -> bool:
        return bool(self._rows(f"SELECT 1 FROM state_{stage} WHERE status IN ('pending', 'retry') LIMIT 1"))

    def unit_of_work(self, stage: str) -> dict[str, str]:
        """Return item → unit of the items that `work` returns."""
        return dict(self._rows(f"SELECT item_id, unit FROM state_{stage} WHERE status IN ('pending', 'retry')"))

    def counts(self) -> dict[str, dict[str, int]]:
        """Return stage → status → number of items: of the units of the last refresh, else of the whole corpus.

        Besides pending, retry, done and failed: `waiting`, done items whose video has pending items in an earlier
        stage, which may make them pending; `quarantined`, items whose attempts are used up.
        """
        if self.scope and self.scope.units is not None:
            return {name: dict(self._rows(self._count_sql(name))) for name in self.stages}
        counts: dict[str, dict[str, int]] = {name: {} for name in self.stages}
        sql = f"SELECT stage, status, sum(num)::BIGINT FROM {INDEX}.counts GROUP BY ALL ORDER BY ALL"
        for stage, status, num in self._rows(sql):
            counts.setdefault(stage, {})[status] = num
        return counts

    def recorded_counts(self) -> dict[str, dict[str, int]]:
        """Return stage → done or failed → number of items by their last attempt, whatever the settings are now."""
        last = 'SELECT stage, item_id, arg_max(status, "at") AS status FROM ledger GROUP BY ALL'
        counts: dict[str, dict[str, int]] = {name: {} for name in self.stages}
        for _ in self.each_volume():
            for stage, ended, count in self._rows(f"SELECT stage, status, count(*) FROM ({last}) GROUP BY ALL"):
                if stage in counts:
                    counts[stage][ended] = counts[stage].get(ended, 0) + count
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
        """Return the units with pending items in these stages, of what was derived last; [] without stages."""
        union = " UNION ALL ".join(
            ["SELECT '' AS unit WHERE false"]
            + [f"SELECT unit FROM state_{stage} WHERE status IN ('pending', 'retry')" for stage in stages]
        )
        return [unit for (unit,) in self._rows(f"SELECT DISTINCT unit FROM ({union}) ORDER BY unit")]

    def volumes_with_work(self, stages: Iterable[str]) -> list[int]:
        """Return the volumes with pending items in these stages, in order, after `refresh_state` for all units."""
        with self._as_table("named_stages", list(stages)):
            return [
                volume
                for (volume,) in self._rows(
                    f"SELECT DISTINCT volume FROM {INDEX}.counts WHERE status IN ('pending', 'retry') "
                    "AND stage IN (SELECT name FROM named_stages) ORDER BY 1"
                )
            ]

    def merge_finished(self, least: int, *, fsync: bool = False) -> None:
        """Merge the commits of the volumes in which nothing is pending, and that have at least so many new ones.

        Call it after `refresh_state` for all units, while no task is running.
        """
        unfinished = self.volumes_with_work(self.stages)
        for volume in self.merged.volumes_to_merge(least):
            if volume not in unfinished:
                self.merged.merge(volume, fsync=fsync)

    def tidy(self, *, clips: bool, sources: bool) -> None:
        """Delete the clips that no row counts any more, and the copied videos whose clips are all cut.

        Call it after `refresh_state` for all units. It looks only at volumes that have changed since it last did.
        """
        wanted = ["clips"] * clips + ["sources"] * sources
        for volume, done in self._rows(f"SELECT volume, tidied FROM {INDEX}.derived ORDER BY volume"):
            if not set(wanted) <= set(done.split()):
                self.show(volume)
                if sources:
                    self.files.remove(*self.sources_cut())
                if not clips or not self.drop_superseded("cut"):
                    tidied = " ".join(sorted({*done.split(), *wanted}))
                    self._execute(f"UPDATE {INDEX}.derived SET tidied = ? WHERE volume = ?", [tidied, volume])

    def drop_superseded(self, stage: str) -> int:
        """Delete the commits of a stage, in the volume that was derived last, without a row that still counts."""
        names = [
            name
            for (name,) in self._rows(
                f"SELECT fragment FROM ledger WHERE stage = '{stage}' GROUP BY fragment "
                f"HAVING NOT bool_or(key IN (SELECT key FROM input_{stage})) "
                f"AND NOT bool_or(fragment IN (SELECT fragment FROM chosen_{stage}))"
            )
        ]
        self.remove_commits(names)
        return len(names)


# `chosen`: the row that counts for an item, which is the one made with the item's present key, else the newest of
# another key. One join for both, because a statement costs milliseconds however few the rows are.
_STATE = """
CREATE OR REPLACE TEMP TABLE state_$stage AS
WITH tried AS (
    SELECT i.item_id, i.unit, i.key, any_value(i.cost) AS cost,
           arg_min({key: l.key, fragment: l.fragment},
                   {other: l.key <> i.key, before: -epoch_us(l."at"), fragment: l.fragment})
               FILTER (l.status = 'done') AS chosen,
           max(l.attempts) FILTER (l.status = 'failed' AND l.key = i.key) AS attempts,
           arg_max(l.transient, l."at") FILTER (l.status = 'failed' AND l.key = i.key) AS transient,
           bool_or(l.run_id = $run_id) FILTER (l.key = i.key) AS in_this_run
    FROM input_$stage i LEFT JOIN (
        FROM ledger WHERE stage = '$stage'
        AND NOT (status = 'done' AND (item_id, fragment) IN (SELECT (item_id, fragment) FROM lost_cuts))
    ) l ON l.item_id = i.item_id GROUP BY ALL
)
SELECT t.item_id, t.unit, t.key, t.cost, coalesce(t.attempts, 0) AS attempts,
       CASE WHEN f.item_id IS NOT NULL AND NOT coalesce(t.in_this_run, false) THEN 'pending'
            WHEN t.chosen.key = t.key THEN 'done'
            WHEN t.attempts IS NULL THEN 'pending'
            WHEN t.transient AND t.attempts >= $max_attempts THEN 'quarantined'
            WHEN t.transient AND (NOT t.in_this_run OR o.item_id IS NOT NULL) THEN 'retry'
            ELSE 'failed' END AS status,
       coalesce(t.transient AND t.attempts < $max_attempts, false) AS retryable, t.chosen
FROM tried t
LEFT JOIN (SELECT DISTINCT item_id FROM forced WHERE stage = '$stage') f ON f.item_id = t.item_id
LEFT JOIN once_more o ON o.stage = '$stage' AND o.item_id = t.item_id AND o.attempts = t.attempts
"""

_CHOSEN = """
CREATE OR REPLACE TEMP VIEW chosen_$stage AS
SELECT item_id, unit, chosen.key AS key, chosen.fragment AS fragment, chosen.key = state_$stage.key AS up_to_date
FROM state_$stage WHERE chosen IS NOT NULL
"""

_LAST_FAILURE = """
SELECT stage, item_id AS failed_id, key AS failed_key, unit, error_class, message, transient, attempts, "at", run_id
FROM ledger WHERE status = 'failed'
QUALIFY row_number() OVER (PARTITION BY stage, item_id, key ORDER BY "at" DESC, attempts DESC) = 1
"""
