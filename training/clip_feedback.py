"""Record similarities and losses of each clip, for curating the corpus: a Parquet table that SQL joins by clip_id.

    clip_id              of the selection; only clips that were seen have a row
    times_seen           number of batches in which the clip could be read
    subtitle_similarity  cosine of video and subtitle when the clip was last seen; null without a subtitle
    caption_similarity   likewise with the caption
    loss                 mean over the times seen of -log p(own text | video) among the batch's texts, independent of
                         the run's loss: the mean of subtitle and caption if the clip has both

1. Each step `add` leaves a few numbers per row on the device, without waiting for them.
2. At a checkpoint `collect` brings the rows of all processes to the first one, which merges them in the order of the
   steps, so the table does not depend on the number of processes.
3. The merged arrays are saved beside the checkpoint (`save`) and read back on resume (`load`), so repeated steps are
   not counted twice. The Parquet file is written from the same arrays (`write`).

Shape letters: N rows of this process, K rows of all, D the features' size, C clips of the selection.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from clipmill.base.atomic_file import atomic_file
from training.data.batch import Batch
from training.data.selection import Selection
from training.parallel.all_gather import gather_rows

FEEDBACK = pa.schema(
    [
        ("clip_id", pa.string()),
        ("times_seen", pa.uint32()),
        ("subtitle_similarity", pa.float32()),
        ("caption_similarity", pa.float32()),
        ("loss", pa.float32()),
    ]
)
_HELD_STEPS = 256  # steps whose rows stay on the device before they are moved to the CPU


class RowFeedback(NamedTuple):
    """float32 [N] each; NaN where the row has no such text."""

    subtitle_similarity: Tensor
    caption_similarity: Tensor
    loss: Tensor


@torch.no_grad()
def row_feedback(
    video_ND: Tensor,
    subtitle_ND: Tensor | None,
    caption_ND: Tensor | None,
    video_mask_N: Tensor,
    subtitle_mask_N: Tensor,
    caption_mask_N: Tensor,
    log_scale: Tensor,
    group: dist.ProcessGroup | None = None,
) -> RowFeedback:
    """Compare unit vectors; None for a text that was not encoded. With a group, all have equally many rows."""
    similarities, losses = [], []
    for text_ND, mask_N in ((subtitle_ND, subtitle_mask_N), (caption_ND, caption_mask_N)):
        exists_N = mask_N & video_mask_N
        if text_ND is None:
            similarity_N = loss_N = torch.full_like(video_ND[:, 0], torch.nan)
        else:
            with torch.autocast(video_ND.device.type, enabled=False):
                similarity_N, loss_N = _against(video_ND.float(), text_ND.float(), exists_N, log_scale.float(), group)
        similarities.append(torch.where(exists_N, similarity_N, torch.nan).float())
        losses.append(torch.where(exists_N, loss_N, torch.nan).float())
    return RowFeedback(*similarities, torch.stack(losses).nanmean(dim=0))


def _against(
    video_ND: Tensor, text_ND: Tensor, exists_N: Tensor, log_scale: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Compute the cosine with the own text, and the cross entropy of picking it among all texts that exist."""
    text_ND = torch.where(exists_N[:, None], text_ND, 0)  # an absent row may be NaN
    similarity_N = (video_ND * text_ND).sum(dim=1)
    text_KD, exists_K = text_ND, exists_N
    if group is not None:
        packed = torch.cat([text_ND, exists_N[:, None]], dim=1)
        gathered = gather_rows(packed, group, [len(packed)] * dist.get_world_size(group))
        text_KD, exists_K = gathered[:, :-1], gathered[:, -1] > 0
    logits_NK = log_scale.exp() * (video_ND @ text_KD.T).masked_fill(~exists_K, -torch.inf)
    return similarity_N, logits_NK.logsumexp(dim=1) - log_scale.exp() * similarity_N


class Feedback:
    """Arrays by row of the selection, on the first process; other processes hold rows until `collect`.

    group    the processes that share a batch, for the loss among all its texts
    control  the group for `collect`; None: `group`
    """

    def __init__(
        self, num_clips: int, group: dist.ProcessGroup | None = None, control: dist.ProcessGroup | None = None
    ):
        self.group, self.control = group, control or group
        self._held: list[tuple[Tensor, Tensor]] = []
        self._moved: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        self.is_first = group is None or dist.get_rank(group) == 0
        self._arrays = _empty(num_clips if self.is_first else 0)

    def add(
        self, batch: Batch, video_ND: Tensor, subtitle_ND: Tensor | None, caption_ND: Tensor | None, log_scale: Tensor
    ) -> None:
        """Add a step's rows; wait for the device only every 256 steps."""
        masks = (batch.video_mask_B, batch.subtitle_mask_B, batch.caption_mask_B)
        values = row_feedback(video_ND, subtitle_ND, caption_ND, *masks, log_scale, self.group)
        rows_N = torch.where(batch.video_mask_B, batch.rows_B, -1)
        self._held.append((rows_N, torch.stack(values, dim=1)))
        if len(self._held) >= _HELD_STEPS:
            self._move()

    def collect(self) -> None:
        """Bring everything added so far to the first process; every process calls this together."""
        self._move()
        mine, self._moved = self._moved, []
        gathered = [mine]
        if self.group is not None:
            gathered = [None] * dist.get_world_size(self.group) if self.is_first else None
            dist.gather_object(mine, gathered, dst=0, group=self.control)
        if self.is_first:
            for steps in zip(*gathered, strict=True):  # one step's rows of each process
                _merge(self._arrays, *(np.concatenate(parts) for parts in zip(*steps, strict=True)))

    def _move(self) -> None:
        """Move the device's rows to the CPU in one transfer, as one pair of arrays per step."""
        if not self._held:
            return
        rows, values = (torch.stack(tensors).cpu().numpy() for tensors in zip(*self._held, strict=True))
        self._held.clear()
        self._moved += zip(rows, values, strict=True)

    # -- on the first process, after `collect` ------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Save the arrays as .npz: 20 bytes per clip of the selection."""
        np.savez(path, **self._arrays)

    def load(self, path: Path) -> None:
        """Continue from a saved state."""
        with np.load(path) as saved:
            arrays = {name: saved[name] for name in self._arrays}
        assert all(len(arrays[name]) == len(array) for name, array in self._arrays.items()), "of another selection"
        self._arrays = arrays

    def write(self, path: Path, selection: Selection) -> None:
        """Write the Parquet table of the clips seen so far, whole or not at all."""
        import pyarrow.parquet as pq

        start = 0
        with atomic_file(path) as file, pq.ParquetWriter(file, FEEDBACK, compression="zstd") as writer:
            for ids in selection.column("clip_id").chunks:
                table = self._table(ids, start)
                start += len(ids)
                if len(table):
                    writer.write_table(table)

    def _table(self, ids: pa.Array, start: int) -> pa.Table:
        part = {name: array[start : start + len(ids)] for name, array in self._arrays.items()}
        seen = np.flatnonzero(part["times_seen"])
        part = {name: array[seen] for name, array in part.items()}
        total, count = part.pop("loss_sum"), part.pop("num_losses")
        part["loss"] = np.divide(total, count, out=np.full(len(total), np.nan, np.float32), where=count > 0)
        columns = {"clip_id": ids.take(pa.array(seen))}
        columns |= {name: pa.array(array, from_pandas=True) for name, array in part.items()}  # NaN is null
        return pa.table(columns).select(FEEDBACK.names).cast(FEEDBACK)


def _empty(num_clips: int) -> dict[str, NDArray]:
    return {
        "times_seen": np.zeros(num_clips, np.uint32),
        "subtitle_similarity": np.full(num_clips, np.nan, np.float32),
        "caption_similarity": np.full(num_clips, np.nan, np.float32),
        "loss_sum": np.zeros(num_clips, np.float32),
        "num_losses": np.zeros(num_clips, np.uint32),
    }


def _merge(arrays: dict[str, NDArray], rows_N: NDArray[np.int64], values_N3: NDArray[np.float32]) -> None:
    """Merge one step's rows into the arrays. If a batch holds a clip twice, its last slot counts as the last time."""
    present = rows_N >= 0
    rows_N, (subtitle_N, caption_N, loss_N) = rows_N[present], values_N3[present].T
    np.add.at(arrays["times_seen"], rows_N, 1)
    for name, values_N in (("subtitle_similarity", subtitle_N), ("caption_similarity", caption_N)):
        known = ~np.isnan(values_N)
        arrays[name][rows_N[known]] = values_N[known]
    known = ~np.isnan(loss_N)
    np.add.at(arrays["loss_sum"], rows_N[known], loss_N[known])
    np.add.at(arrays["num_losses"], rows_N[known], 1)
