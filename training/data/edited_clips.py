"""Find the clips that `data.edits` replaces, and the bytes of their edited versions.

A clip with edited boundaries is read from the tar that `clipmill edit` wrote. Its id, its text and its row in SQL stay;
its caption describes the old middle frame and is left out. An edit applies only while the clip has the text and source
of the time of the edit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from clipmill.base.errors import UserError
from training.data.clip_query import ClipQuery, Samples
from training.editing.rounds import HELD
from training.settings import Group

NONE = "none"


def with_edits(samples: Samples, clips: ClipQuery, edits: str | int, exclusive_groups: Sequence[Group]) -> ClipQuery:
    """Mark the clips that have an edit, and create the table `_edits`: the place of their bytes by row of `samples`.

    edits  `data.edits`, but not "none"
    Raises UserError if the editing or round does not exist, or if clips of one video may share a batch, because edited
    clips may overlap.
    """
    if "video" not in exclusive_groups:
        raise UserError("data.edits: edited clips of a video may overlap. Allowed: a data.apart with video in it.")
    editing, number = _editing_and_round(samples, edits)
    sql = "SELECT round FROM edit_rounds WHERE editing = ? AND list_contains(?, outcome) ORDER BY round"
    held = samples.arrow(sql, [editing, list(HELD)])["round"].to_pylist()
    if number is None and not held:
        raise UserError(f"data.edits = {edits!r}: editing {editing} kept no round. Allowed: a round's number, or none.")
    if number is not None:
        sql = "SELECT 1 FROM clip_edits WHERE editing = ? AND round = ? LIMIT 1"
        if not samples.arrow(sql, [editing, number]).num_rows:
            raise UserError(f"data.edits = {edits!r}: editing {editing} has no round {number}.")
    counted = [kept for kept in held if number is None or kept < number] + [number] * (number is not None)
    _make_table(samples, editing, counted)
    edited = np.zeros_like(clips.mask)
    for batch in samples.batches("SELECT row FROM _edits"):
        edited[batch["row"].to_numpy()] = True
    return replace(clips, edited=edited & clips.mask, editing=f"{editing}, round {counted[-1]}")


def _editing_and_round(samples: Samples, edits: str | int) -> tuple[str, int | None]:
    """Parse `data.edits`; the round is None for "accepted". The editing is the newest unless named."""
    name, _, which = str(edits).rpartition(":")
    number = None if which == "accepted" else int(which)
    tables = "SELECT count(*) FROM information_schema.tables WHERE table_name = 'edit_rounds'"
    known = []
    if samples.root and samples.row(tables)[0]:
        sql = 'SELECT editing FROM edit_rounds GROUP BY editing ORDER BY min("at"), editing'
        known = samples.arrow(sql)["editing"].to_pylist()
    if not known or (name and name not in known):
        names = ", ".join(known) or "none: `clipmill edit` makes one"
        raise UserError(f"data.edits = {edits!r}: {samples.name} has no such editing. Known here: {names}.")
    return name or known[-1], number


def _make_table(samples: Samples, editing: str, rounds: list[int]) -> None:
    """Create the table `_edits`.

    A clip's latest row in these rounds counts; a clip with its first boundaries is not edited.
    """
    samples.connection.execute(
        """
        CREATE OR REPLACE TEMP TABLE _edits AS
        WITH present AS (
            SELECT * FROM clip_edits WHERE editing = ? AND list_contains(?, round)
            QUALIFY row_number() OVER (PARTITION BY clip_id ORDER BY round DESC) = 1
        ), media AS (
            SELECT * FROM edited_clips WHERE editing = ?
            QUALIFY row_number() OVER (PARTITION BY clip_id, span_start_s, span_end_s ORDER BY round) = 1
        )
        SELECT s.rowid AS row, m.tar AS path, m.mp4_offset, m.num_bytes AS mp4_bytes, m.sha256 AS mp4_sha256,
               m.frames[1]."offset" AS jpg_offset, m.frames[1].num_bytes AS jpg_bytes, m.frame_sha256 AS jpg_sha256,
               m.num_frames, s.fps
        FROM present p
        JOIN media m ON m.clip_id = p.clip_id AND m.span_start_s = p.start_s AND m.span_end_s = p.end_s
        JOIN clips c ON c.clip_id = p.clip_id AND md5(c.text) = p.text_md5 AND c.source_sha256 = m.source_sha256
             AND c.span_start_s = p.base_start_s AND least(c.span_end_s, p.base_end_s) = p.base_end_s
        JOIN samples s ON s.clip_id = p.clip_id AND s.mp4_offset IS NOT NULL
        WHERE (p.start_s, p.end_s) <> (p.base_start_s, p.base_end_s)
        ORDER BY m.tar, m.mp4_offset
        """,
        [editing, rounds, editing],
    )


def edited_rows(samples: Samples, clips: ClipQuery, columns: str) -> Iterator[pa.Table]:
    """Yield the edited samples by (path, mp4_offset), in the form of `training.data.selection.rows_in_order`."""
    assert clips.edited is not None
    sql = f"""
        SELECT s.row, {columns}
        FROM (SELECT e.*, s.clip_id, s.video_id, s.subtitle, NULL::VARCHAR AS caption
              FROM _edits e JOIN samples s ON s.rowid = e.row) s
        LEFT JOIN _groups g ON g.row = s.row
        LEFT JOIN (SELECT row, list(text ORDER BY n) AS texts FROM _texts WHERE row IN (SELECT row FROM _edits)
                   GROUP BY row) t ON t.row = s.row
        LEFT JOIN _neighbours b ON b.row = s.row
        ORDER BY s.path, s.mp4_offset
    """
    for batch in samples.batches(sql):
        table = pa.Table.from_batches([batch])
        yield table.filter(pa.array(clips.edited[table["row"].to_numpy()])).drop_columns("row")
