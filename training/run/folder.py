"""A run on disk: where its parts are, its saved settings, and the lock that makes one training its writer.

RUN/
  run.yaml            the settings, resolved; the corpus, the command, the selection's hash
  selection.arrow     the selected clips, frozen when the run started
  plan/               the order of each epoch
  checkpoints/        see training/run/checkpoints.py; best.json says which is the best: training/run/best_checkpoint.py
  log.jsonl           one line per logged step: see training/run/log.py
  eval.jsonl          one line per evaluation
  failures.jsonl      samples that could not be read
  feedback.parquet    per clip: similarity, loss, times seen (train.feedback)
  tensorboard/        the curves for TensorBoard
"""

import os
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import yaml

from clipmill.base.atomic_file import write_text
from clipmill.base.errors import UserError
from clipmill.base.file_lock import take_lock
from clipmill.base.settings import Settings, read_yaml, validate_settings
from training.run.checkpoints import Checkpoints, warn
from training.settings import RunSettings

FORMAT = 1  # of the folder; a run of another format is refused

# What may change on resume besides the operational settings: how far the run goes. The learning rate is a function of
# the step and of the number of steps in all, so from the resumed step on it is that of a run of the new length; what
# was trained keeps what it had.
LENGTH = ("train.max_steps", "train.epochs")


@dataclass(frozen=True)
class RunRecord:
    """What run.yaml holds. `settings` are plain data, as `RunSettings.model_dump(mode="json")` gives them."""

    corpus: str
    command: str
    selection_hash: str
    settings: dict[str, Any]


class RunFolder:
    def __init__(self, root: str | Path, warn: Callable[[str], None] = warn):
        self.root = Path(root).expanduser().absolute()
        self.record_path = self.root / "run.yaml"
        self.selection_path = self.root / "selection.arrow"
        self.plan_path = self.root / "plan"
        self.failures_path = self.root / "failures.jsonl"
        self.feedback_path = self.root / "feedback.parquet"
        self.checkpoints = Checkpoints(self.root / "checkpoints", warn)
        self._lock_path = self.root / ".lock"

    @property
    def exists(self) -> bool:
        return self.record_path.is_file()

    def require(self) -> "RunFolder":
        """Raises UserError unless there is a run here."""
        if not self.exists:
            raise UserError(
                f"{self.root} is no run (no run.yaml). Make one with `clipmill train --corpus DIR --run DIR`."
            )
        return self

    def create(self) -> None:
        """Makes the folders. Raises UserError for a folder that cannot be written or holds something else."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not self._lock_path.exists() and any(not entry.name.startswith(".") for entry in self.root.iterdir()):
                raise UserError(f"{self.root} is not empty and not a run: give --run a new or an empty folder.")
            self._lock_path.touch()  # first of all: what comes later is then known to be ours
            for folder in (self.plan_path, self.checkpoints.folder):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--run {self.root} cannot be written: {error.strerror}.") from error

    # -- settings -----------------------------------------------------------------------------------------------------

    def load(self) -> RunRecord:
        """Raises UserError for an unreadable run.yaml or one of another format."""
        try:
            saved = read_yaml(self.record_path.read_text())
            version = saved.pop("format")
            if version != FORMAT:
                raise UserError(f"{self.root} has run format {version}; this clipmill reads format {FORMAT}.")
            return RunRecord(**saved)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.record_path} cannot be read as a run's settings: {error}") from error

    def save(self, record: RunRecord) -> None:
        text = (
            "# A training run. Go on with `clipmill train --run DIR …`; settings change by `--set section.key=value`.\n"
        )
        text += yaml.safe_dump({"format": FORMAT, **asdict(record)}, sort_keys=False, allow_unicode=True)
        write_text(self.record_path, text)

    def changes(self, settings: RunSettings) -> list[str]:
        """A line for each setting that differs from the saved ones, where the run may go on with it.

        Until the first checkpoint nothing has been trained, so everything may change: the caller begins anew. After
        it, what would make the rest of the run another run's is a UserError that lists each such setting.
        """
        if not self.exists:
            return []
        saved = validate_settings(RunSettings, self.load().settings)
        old, new = dict(_leaves(saved)), dict(_leaves(settings))
        changed = {name: (old[name], value) for name, value in new.items() if old[name] != value}
        if self.checkpoints.steps():
            free = set(_operational(settings)) | set(LENGTH)
            fixed = {name: values for name, values in changed.items() if name not in free}
            if fixed:
                raise UserError(
                    f"{self.root} was begun with other settings:\n"
                    + "\n".join(f"  {_told(name, *values)}" for name, values in fixed.items())
                    + "\nGo on with the old values, or give --run a new folder. Allowed to change: "
                    + f"{', '.join(LENGTH)} and what only decides how the work is done."
                )
        return [_told(name, *values) for name, values in changed.items()]

    # -- one writer ---------------------------------------------------------------------------------------------------

    @contextmanager
    def writer(self, patience_s: float = 5.0) -> Iterator[None]:
        """Holds the run's lock, and sweeps up after a killed holder. For the first process of a training only.

        Raises UserError when another process has it; a dead holder's lock is simply free, and the processes that one
        has forked do not keep it.
        """
        self.create()
        with open(self._lock_path, "a+") as file:
            if not take_lock(file, patience_s):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(f"{self.root} is being trained by {holder}. Stop it, or give --run another folder.")
            _close_in_forks(file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Removes what a killed writer left half written."""
        self.checkpoints.sweep()
        for path in self.root.glob(".tmp-*"):
            path.unlink()


def _close_in_forks(file: IO[str]) -> None:
    """A lock lives as long as any process has the file open: a loader process must not outlive its run with it."""
    os.register_at_fork(after_in_child=partial(_close, weakref.ref(file)))


def _close(reference: weakref.ref) -> None:
    file = reference()
    if file is not None:
        file.close()


def _leaves(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name; one whose value is a dict is one setting."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _operational(settings: Settings, prefix: str = "") -> Iterator[str]:
    yield from (prefix + name for name in settings._operational())
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from _operational(value, f"{prefix}{name}.")


def _told(name: str, old: Any, new: Any) -> str:
    line = f"{name}: {old} → {new}"
    return f"{line} (from here on the learning rate is that of a run of this length)" if name in LENGTH else line
