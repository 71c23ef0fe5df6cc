"""Select the clips of a run: those to train on and those to evaluate on, from one state of the corpus.

`choose_run` applies `data.where`, `data.edits`, `eval.where` and `eval.overlap`; `training.data.selection` writes the
result to files.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipmill.base.errors import UserError
from training.data.clip_query import ClipQuery, Samples, select_clips
from training.data.edited_clips import NONE, with_edits
from training.settings import DataSettings, EvalSettings

Overlap = Literal["error", "exclude", "allow"]


def choose_run(samples: Samples, data: DataSettings, evaluation: EvalSettings) -> tuple[ClipQuery, ClipQuery | None]:
    """Select a run's training clips, and its evaluation clips if `eval.where` is given. Raises UserError.

    `data.edits` applies to training clips only. If evaluations select a checkpoint, none of their clips may be of the
    split "test".
    """
    training = replace(select_clips(samples, data.where, "data.where"), problems=samples.problems)
    if data.edits != NONE:
        training = with_edits(samples, training, data.edits, data.apart)
    if not evaluation.where.strip():
        return training, None
    held_out = select_clips(samples, evaluation.where, "eval.where")
    if evaluation.selects:
        _refuse_test(samples, held_out, evaluation.every)
    return apply_overlap(samples, training, held_out, evaluation.overlap), held_out


def apply_overlap(samples: Samples, training: ClipQuery, held_out: ClipQuery, policy: Overlap) -> ClipQuery:
    """Apply `eval.overlap` to the training clips. Raises UserError for "error", and if no clip remains."""
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


@dataclass(frozen=True)
class Shared:
    """Training clips that share a video or a near-duplicate with evaluation."""

    rows: NDArray[np.int64]  # row ids of `samples`
    num_videos: int
    num_groups: int
    examples: tuple[str, ...]  # a few clip ids


def overlap(samples: Samples, training: ClipQuery, held_out: ClipQuery) -> Shared:
    """Find training clips of held-out videos (or of copies of their files) and near-duplicates of held-out clips."""
    connection = samples.connection
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
        FROM members WHERE by_video OR by_group ORDER BY row
    """)
    connection.unregister("held_out_rows")
    # the mask, not a join with all training rows, whose hash table would grow with the selection
    pieces = (batch["row"].to_numpy() for batch in samples.batches("SELECT row FROM _shared ORDER BY row"))
    rows = np.concatenate([np.zeros(0, np.int64), *(piece[training.mask[piece]] for piece in pieces)])
    connection.register("training_rows", pa.table({"row": rows}))
    num_videos, num_groups, examples = samples.row("""
        SELECT count(DISTINCT video) FILTER (by_video), count(DISTINCT duplicate_group) FILTER (by_group),
               min(clip_id, 3) FROM _shared WHERE row IN (SELECT row FROM training_rows)
    """)
    connection.unregister("training_rows")
    connection.execute("DROP TABLE _shared")
    return Shared(rows, num_videos, num_groups, tuple(examples or ()))


def _refuse_test(samples: Samples, held_out: ClipQuery, every: int | str) -> None:
    """Raise UserError for evaluation clips of the split "test". Plain tars and old manifests have no splits."""
    columns = "SELECT column_name FROM information_schema.columns WHERE table_name = 'videos'"
    if "split" not in samples.arrow(columns)["column_name"].to_pylist():
        return
    sql = "SELECT s.rowid AS row FROM samples s JOIN videos v USING (video_id) WHERE v.split = 'test'"
    num_test = sum(int(np.count_nonzero(held_out.mask[batch["row"].to_numpy()])) for batch in samples.batches(sql))
    if num_test:
        raise UserError(
            f"eval.where: {num_test:,} of its {held_out.num_clips:,} clips are of the split 'test', and with eval.every"
            f" = {every} they would select the checkpoint that is tested on them. Allowed: clips of another split, or "
            "some of 'train' with eval.overlap = exclude; eval.select = null, which selects nothing; eval.every = null."
        )
