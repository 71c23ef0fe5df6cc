"""Checkpoints of a run: written whole or not at all, checked before use, and only the latest few kept.

    checkpoints/step-00000100/
      model.safetensors config.json   the weights: `training.models.clip_vip.weights.load_model` opens the folder
      ema.safetensors ema.json        averaged weights, if the run keeps them
      training.pt                     optimiser and random state: tensors and plain containers, no code
      state.json                      position in the plan and settings; size and SHA-256 of the other files

A checkpoint is written as `.tmp-…`, flushed to disk file by file, and renamed. The next writer removes the `.tmp-…` of
a killed one.
"""

import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipmill.base.atomic_file import atomic_path, sync
from clipmill.base.errors import UserError
from clipmill.base.settings import digest
from training.parallel.state_dict import OptimiserState, State

WriteWeights = Callable[[State, Path], Any]

FORMAT = 1  # of the folder; newer formats are refused


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. `state` is JSON data, as given to `save`."""

    step: int
    path: Path
    state: dict[str, Any]
    optimiser: OptimiserState
    random: State

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def averaged(self) -> Path | None:
        """Return the path of the averaged weights, None if the run keeps none."""
        path = self.path / "ema.safetensors"
        return path if path.exists() else None


def warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Checkpoints:
    """A run's folder of checkpoints. `warn` is called with a line for each one that is skipped."""

    def __init__(self, folder: Path, warn: Callable[[str], None] = warn):
        self.folder, self.warn = folder, warn
        self._damaged: set[int] = set()

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """List the steps of all checkpoints, ascending, without checking them."""
        if not self.folder.is_dir():
            return []
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    # -- writing ------------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        write: WriteWeights,
        tensors: State,
        *,
        state: Mapping[str, Any],
        optimiser: OptimiserState,
        random: State,
        ema: State | None = None,
        attach: Mapping[str, Callable[[Path], None]] | None = None,
        keep: int = 3,
        also_keep: Collection[int] = (),
    ) -> Path:
        """Write a checkpoint, then remove all but the latest `keep` and those of the steps in `also_keep`.

        write                    writes weights to a folder or a .safetensors file (`training.models.registry.writer`)
        tensors, optimiser, ema  results of `full_state` on the first process; `ema` is `tensors` with averages in it
        state                    JSON data: position in the plan and settings
        attach                   further files by name, each written by its function before the checkpoint is sealed
        A whole checkpoint of this step that already exists is not written again.
        """
        path = self.path(step)
        if not path.exists() or self.problem(step):
            with atomic_path(path, fsync=True) as temporary:
                temporary.mkdir()
                write(tensors, temporary)
                if ema is not None:
                    write(ema, temporary / "ema.safetensors")
                torch.save({"optimiser": optimiser, "random": random}, temporary / "training.pt")
                for name, write_file in (attach or {}).items():
                    write_file(temporary / name)
                _seal(temporary, {"format": FORMAT, "step": step, "state": dict(state)})
                self._discard(path)
        self._damaged.discard(step)
        self._rotate(keep, {step, *also_keep})
        return path

    def sweep(self) -> None:
        """Remove the temporary files and folders of killed writers. Only the run's writer may call this."""
        for path in self.folder.glob(".tmp-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _rotate(self, keep: int, wanted: set[int]) -> None:
        whole = [step for step in self.steps() if step not in self._damaged]
        wanted = wanted | set(whole[-keep:])
        for step in self.steps():
            if step not in wanted:
                self._discard(self.path(step))
                self._damaged.discard(step)

    def _discard(self, path: Path) -> None:
        """Remove a checkpoint; rename it first, so that a kill leaves no checkpoint with missing files."""
        if path.exists():
            renamed = self.folder / f".tmp-old-{path.name}-{os.getpid()}"
            os.rename(path, renamed)
            shutil.rmtree(renamed)

    # -- reading ------------------------------------------------------------------------------------------------------

    def find_latest(self) -> int | None:
        """Find the step of the newest whole checkpoint; return None if the run has no checkpoint.

        Damaged ones are reported and skipped. Raises UserError if all are damaged.
        """
        problems = []
        for step in reversed(self.steps()):
            problem = self.problem(step)
            if problem is None:
                return step
            self._damaged.add(step)
            problems.append(f"{self.path(step).name}: {problem}")
            self.warn(f"checkpoint {self.path(step)} is skipped: {problem}")
        if problems:
            raise UserError(
                f"{self.folder}: no checkpoint is whole ({'; '.join(problems)}). "
                "Restore one from a copy, or remove this folder to start the run over."
            )
        return None

    def problem(self, step: int) -> str | None:
        """Read all of a checkpoint and describe what is wrong with it. Raises UserError for a newer format."""
        path = self.path(step)
        try:
            sealed = _read_seal(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"state.json cannot be read ({error})"
        for name, expected in sealed["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
        return None

    def load(self, step: int) -> Checkpoint:
        """Read a checkpoint that `find_latest` has found whole, except its weights, on any process."""
        path = self.path(step)
        try:
            sealed = _read_seal(path)
            training = torch.load(path / "training.pt", map_location="cpu", weights_only=True, mmap=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"checkpoint {path} cannot be read: {str(error)[:500]}") from error
        return Checkpoint(sealed["step"], path, sealed["state"], training["optimiser"], training["random"])


def _seal(folder: Path, state: dict[str, Any]) -> None:
    """Write state.json with the sizes and hashes of the other files, and flush everything to disk."""
    state["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())
    }
    state["digest"] = digest(state)
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def _read_seal(folder: Path) -> dict[str, Any]:
    """Read state.json. Raises UserError for a newer format, ValueError and the like if it is damaged."""
    sealed = json.loads((folder / "state.json").read_text())
    if digest({key: value for key, value in sealed.items() if key != "digest"}) != sealed["digest"]:
        raise ValueError("its digest differs")
    if sealed["format"] > FORMAT:
        raise UserError(f"{folder} has checkpoint format {sealed['format']}; this clipmill reads format {FORMAT}.")
    return sealed


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
