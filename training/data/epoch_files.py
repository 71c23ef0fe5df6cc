"""Plan the rows of every step into files, one per epoch, planned on first use by one process of a host.

`training.data.epoch_plan` defines the order. Every process of a host has an `Epochs` on the same folder. The first that
needs an epoch takes the folder's lock, plans, and renames the file into place; the others wait for the lock and find
the file. Epochs are memory-mapped, so a host has one copy in memory.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmill.base.errors import UserError
from clipmill.base.file_lock import lock_file
from training.data.epoch_plan import (
    PAD,
    PlanSpec,
    Rows,
    hash_groups,
    locate,
    num_conflicts,
    open_epoch,
    plan_path,
    steps_before,
    steps_in_epoch,
    write_epoch,
)
from training.data.selection import Selection
from training.settings import DataSettings, Group, TrainSettings


def plan_spec(selection: Selection, data: DataSettings, batch_size: int) -> PlanSpec:
    """Return the plan of a run's settings. Raises UserError.

    It has one stream per slot of a batch, so that any number of processes that divides the batch size may take part.
    """
    spec = spec_without_groups(selection.num_clips, data, batch_size, selection.hash)
    return replace(spec, groups_hash=hash_groups(selection.groups(data.apart)))


def spec_without_groups(num_clips: int, data: DataSettings, batch_size: int, selection_hash: str = "") -> PlanSpec:
    """Return a plan without groups, for the arithmetic of steps. Raises UserError if the clips do not fill a batch."""
    if data.tail != "pad" and num_clips < batch_size:
        raise UserError(
            f"train.batch_size = {batch_size}: only {num_clips:,} clips are selected. "
            f"Allowed: at most {num_clips}, or data.tail = pad."
        )
    return PlanSpec(
        num_clips=num_clips,
        batch_size=batch_size,
        selection_hash=selection_hash,
        seed=data.seed,
        tail=data.tail,
        block_size=data.block_size,
        window_steps=data.window_steps,
        unmet=data.unmet,
    )


def total_steps(spec: PlanSpec, train: TrainSettings) -> int:
    """Return the number of updates in the run: `train.max_steps`, else the steps of `train.epochs`."""
    if train.max_steps is not None:
        return train.max_steps
    whole = int(train.epochs)
    return max(1, steps_before(spec, whole) + round((train.epochs - whole) * steps_in_epoch(spec, whole)))


class Epochs:
    """The rows of every step of a run, on one host. Pickles without its open file.

    folder            of the plan files
    exclusive_groups  kinds of groups in `spec.groups_hash`
    """

    def __init__(
        self, folder: str | Path, spec: PlanSpec, selection_path: str | Path, exclusive_groups: Sequence[Group] = ()
    ):
        self.folder, self.spec, self.selection_path = Path(folder), spec, Path(selection_path)
        self.exclusive_groups = tuple(exclusive_groups)
        self._open: tuple[int, Rows] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def rows(self, step: int) -> NDArray[np.uint32]:
        """Return the rows of the selection for a step of the run: [batch_size], `PAD` for holes.

        Plans the epoch if no process has. Raises UserError if no order satisfies `data.apart` (`data.unmet`).
        """
        epoch, step_in_epoch = locate(self.spec, step)
        return np.array(self.epoch(epoch)[step_in_epoch])

    def epoch(self, epoch: int) -> Rows:
        """Return the rows of an epoch [steps, batch_size], memory-mapped, planning it if needed. One is kept open."""
        if self._open is None or self._open[0] != epoch:
            path = plan_path(self.folder, self.spec, epoch)
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                with lock_file(self.folder / ".lock"):  # the kernel frees the lock of a process that dies
                    write_epoch(self.folder, self.spec, epoch, self._groups() if not path.exists() else ())
            self._open = epoch, open_epoch(self.folder, self.spec, epoch)
        return self._open[1]

    def describe(self, epoch: int = 0) -> dict[str, int]:
        """Count an epoch's steps, clips and conflicts (see `num_conflicts`), for the log."""
        rows = self.epoch(epoch)
        num_used = int(np.count_nonzero(rows != PAD))
        return {
            "epoch": epoch,
            "num_clips": self.spec.num_clips,
            "num_steps": steps_in_epoch(self.spec, epoch),
            "num_left": max(0, self.spec.num_clips - num_used),
            "num_holes": rows.size - num_used,
            "num_conflicts": num_conflicts(rows, self._groups()) if self.exclusive_groups else 0,
        }

    def tidy(self, before_epoch: int) -> int:
        """Remove the files of epochs before this one; return their number. Processes keep the files they have open."""
        paths = [plan_path(self.folder, self.spec, epoch) for epoch in range(before_epoch)]
        stale = [path for path in paths if path.exists()]
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)

    def _groups(self) -> list[NDArray[np.int32]]:
        selection = Selection(self.selection_path)
        if selection.hash != self.spec.selection_hash:
            raise UserError(f"{self.selection_path} is not the selection of the plan: restore the original file.")
        return selection.groups(self.exclusive_groups)
