"""Keep the near-duplicate groups of a manifest of several volumes up to date with its clips.

`manifest.clip_groups` has the clips that are in a group. When a volume changes, these clips are looked up: its own, and
those of all groups that it had a part in, because a group may fall apart without a clip of it. All other clips are
streamed past them, so memory depends on what has changed, and time is a fraction of a second for a million others.
"""

from collections.abc import Iterable

import duckdb
import pyarrow as pa

from shards.corpus.near_duplicates import GroupedClips

CLIPS_AT_ONCE = 300_000  # that are looked up together; the others are streamed once for each such run
CLIPS_STREAMED = 100_000  # held at a time

_UNCHANGED = "volume IN (SELECT volume FROM manifest.volumes WHERE grouped = content)"


def update_groups(connection: duckdb.DuckDBPyConnection) -> None:
    """Bring `clip_groups` and `scores.duplicate_group` of the attached `manifest` up to date.

    `manifest.volumes` says which volumes have changed since their clips were grouped.
    """
    sql = "SELECT volume FROM manifest.volumes WHERE grouped IS DISTINCT FROM content ORDER BY volume"
    changed = [volume for (volume,) in connection.execute(sql).fetchall()]
    _dissolve_groups(connection)
    for volumes in _runs(connection, changed):
        is_new = f"({_among(volumes)} OR clip_id IN (SELECT clip_id FROM dissolved))"
        clips = GroupedClips(_hashes(connection, is_new).read_all())
        for batch in _hashes(connection, f"{_UNCHANGED} AND NOT {is_new}"):
            clips.meet(pa.Table.from_batches([batch]))
        _keep(connection, clips)
        connection.execute(f"UPDATE manifest.volumes SET grouped = content WHERE {_among(volumes)}")
        connection.execute("DELETE FROM dissolved")
    connection.execute(
        "UPDATE manifest.scores SET duplicate_group = new.duplicate_group FROM ("
        "SELECT s.clip_id, g.duplicate_group FROM manifest.scores s LEFT JOIN manifest.clip_groups g USING (clip_id) "
        "WHERE s.duplicate_group IS DISTINCT FROM g.duplicate_group) new WHERE scores.clip_id = new.clip_id"
    )


def _dissolve_groups(connection: duckdb.DuckDBPyConnection) -> None:
    """Remove the groups with clips of volumes that have changed; note their other clips in the table `dissolved`."""
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE stale AS "
        f"SELECT DISTINCT duplicate_group FROM manifest.clip_groups WHERE NOT {_UNCHANGED}"
    )
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE dissolved AS "
        f"SELECT clip_id FROM manifest.clip_groups WHERE duplicate_group IN (FROM stale) AND {_UNCHANGED}"
    )
    connection.execute("DELETE FROM manifest.clip_groups WHERE duplicate_group IN (FROM stale)")


def _runs(connection: duckdb.DuckDBPyConnection, volumes: list[int]) -> list[list[int]]:
    """Split volumes into runs of at most CLIPS_AT_ONCE clips, or of one volume; one run without any if none changed."""
    sql = f"SELECT volume, count(*) FROM manifest.clips WHERE {_among(volumes)} GROUP BY 1"
    counts = dict(connection.execute(sql).fetchall())
    runs: list[list[int]] = [[]]
    num_clips = 0
    for volume in volumes:
        num_clips += counts.get(volume, 0)
        if runs[-1] and num_clips > CLIPS_AT_ONCE:
            runs.append([])
            num_clips = counts.get(volume, 0)
        runs[-1].append(volume)
    some_left = connection.execute("SELECT count(*) FROM dissolved").fetchall()[0][0]
    return runs if volumes or some_left else []


def _among(volumes: Iterable[int]) -> str:
    return f"volume IN ({', '.join(map(str, volumes)) or 'NULL'})"


def _hashes(connection: duckdb.DuckDBPyConnection, condition: str) -> pa.RecordBatchReader:
    """Return a reader of (clip_id, phash); it ends with the next statement."""
    rows = connection.sql(f"SELECT clip_id, phash FROM manifest.clips WHERE {condition}")
    return rows.to_arrow_reader(CLIPS_STREAMED)


def _keep(connection: duckdb.DuckDBPyConnection, clips: GroupedClips) -> None:
    """Write the groups of the clips that were looked up, and of the others that joined them."""
    known = {}
    if clips.met:
        connection.register("met", pa.table({"clip_id": sorted({clip_id for _, clip_id in clips.met})}))
        sql = "SELECT clip_id, duplicate_group FROM manifest.clip_groups SEMI JOIN met USING (clip_id)"
        known = dict(connection.execute(sql).fetchall())
        connection.unregister("met")
    new, renamed = clips.groups(known)
    for names, sql in ((renamed, _RENAME), (new, _INSERT)):
        if names:
            connection.register("names", pa.table({"id": [*names], "name": [*names.values()]}))
            connection.execute(sql)
            connection.unregister("names")


_RENAME = "UPDATE manifest.clip_groups SET duplicate_group = n.name FROM names n WHERE duplicate_group = n.id"
_INSERT = """
    INSERT INTO manifest.clip_groups
    SELECT c.volume, n.id, n.name FROM names n JOIN manifest.clips c ON c.clip_id = n.id
"""
