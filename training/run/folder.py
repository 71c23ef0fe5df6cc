"""The folder of a run: paths of its files, its saved settings, and the lock that allows one training at a time.

RUN/
  run.yaml            the settings, resolved; the corpus, the command, the selection's hash
  selection.arrow     the selected clips, frozen when the run started
  eval.arrow          the clips held out for evaluation (eval.where)
  plan/               the order of each epoch
  checkpoints/        see training/run/checkpoints.py; best.json names the best: training/run/best_checkpoint.py
  log.jsonl           one line per logged step: see training/run/log.py
  eval.jsonl          one line per evaluation
  failures.jsonl      one line per sample that could not be read
  feedback.parquet    per clip: similarity, loss, times seen (train.feedback)
  tensorboard/        curves for TensorBoard
"""

import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from clipmill.base.atomic_file import write_text
from clipmill.base.errors import UserError
from clipmill.base.file_lock import take_lock
from clipmill.base.settings import Settings, read_yaml, validate_settings
from training.run.checkpoints import Checkpoints
from training.run.settings import RunSettings

FORMAT = 1  # of the folder; a run of another format is refused

# Settings of a run's length. Only they and the operational settings may change on resume. After such a change the
# learning rate is that of a run of the new length, because it depends on the step and the total number of steps.
LENGTH = ("train.max_steps", "train.epochs")


@dataclass(frozen=True)
class RunRecord:
    """Content of run.yaml. `settings` is plain data: `RunSettings.model_dump(mode="json")`."""

    corpus: str
    command: str
    selection_hash: str
    settings: dict[str, Any]


class RunFolder:
    """The folder of a run that exists or is about to be created.

    Example: `RunFolder("run").require().load().settings`
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser().absolute()
        self.record_path = self.root / "run.yaml"
        self.selection_path = self.root / "selection.arrow"
        self.plan_path = self.root / "plan"
        self.failures_path = self.root / "failures.jsonl"
        self.feedback_path = self.root / "feedback.parquet"
        self.checkpoints = Checkpoints(self.root / "checkpoints")
        self._lock_path = self.root / ".lock"
        self._loaded: tuple[Any, RunRecord] | None = None  # run.yaml as last read, and which version of the file it was

    @property
    def exists(self) -> bool:
        return self.record_path.is_file()

    def require(self) -> "RunFolder":
        """Return self. Raises UserError if the folder holds no run."""
        if not self.exists:
            raise UserError(
                f"{self.root} is not a run (no run.yaml). Start one with `clipmill train --corpus DIR --run DIR`."
            )
        return self

    def create(self) -> None:
        """Create the folders. Raises UserError if the folder cannot be written or holds something else."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not self._lock_path.exists() and any(not entry.name.startswith(".") for entry in self.root.iterdir()):
                raise UserError(f"{self.root} is not empty and not a run: give --run a new or an empty folder.")
            self._lock_path.touch()  # first, because it marks the folder as a run's
            for folder in (self.plan_path, self.checkpoints.folder):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--run {self.root} cannot be written: {error.strerror}.") from error

    # -- settings -----------------------------------------------------------------------------------------------------

    def load(self) -> RunRecord:
        """Read run.yaml, or return the result of the last read if the file has not changed.

        Raises UserError if it cannot be read or has another format.
        """
        try:
            with open(self.record_path) as file:  # opened first: on NFS only that brings another host's changes
                found = os.fstat(file.fileno())
                version = (found.st_ino, found.st_mtime_ns, found.st_size)
                if self._loaded is None or self._loaded[0] != version:
                    saved = read_yaml(file.read())
                    format = saved.pop("format")
                    if format != FORMAT:
                        raise UserError(f"{self.root} has run format {format}; this clipmill reads format {FORMAT}.")
                    self._loaded = version, RunRecord(**saved)
            return self._loaded[1]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.record_path} cannot be read as a run's settings: {error}") from error

    def save(self, record: RunRecord) -> None:
        """Write run.yaml atomically."""
        text = "# A training run. Resume: `clipmill train --run DIR …`; change settings: `--set section.key=value`.\n"
        text += yaml.safe_dump({"format": FORMAT, **asdict(record)}, sort_keys=False, allow_unicode=True)
        write_text(self.record_path, text)

    def changes(self, settings: RunSettings) -> list[str]:
        """Return one line per setting that differs from the saved ones.

        Before the first checkpoint any setting may change, because nothing is trained yet. After it only operational
        settings and the run's length may change: UserError lists every other change.
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
                    f"{self.root} was started with other settings:\n"
                    + "\n".join(f"  {_change(name, *values)}" for name, values in fixed.items())
                    + "\nKeep the old values, or give --run a new folder. Allowed to change: "
                    + f"{', '.join(LENGTH)} and operational settings."
                )
        return [_change(name, *values) for name, values in changed.items()]

    # -- one writer ---------------------------------------------------------------------------------------------------

    @contextmanager
    def writer(self, patience_s: float = 5.0) -> Iterator[None]:
        """Hold the run's lock, on the first process only, and remove temporary files of killed trainings.

        The kernel releases the lock when its owner dies, even if forked processes live on. Raises UserError if another
        process holds the lock for `patience_s`.
        """
        self.create()
        with open(self._lock_path, "a+") as file:
            if not take_lock(file, patience_s):
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise UserError(f"{self.root} is being trained by {owner}. Stop it, or give --run another folder.")
            # a lock lives as long as any process has the file open, so forked loader processes must close it
            reference = weakref.ref(file)
            os.register_at_fork(after_in_child=lambda: (opened := reference()) and opened.close())
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            self.checkpoints.sweep()
            for path in (*self.root.glob(".tmp-*"), *self.plan_path.glob(".tmp-*")):
                path.unlink()
            yield


def _leaves(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every setting; a dict is one value."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _operational(settings: Settings, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the operational settings."""
    yield from (prefix + name for name in settings._operational())
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from _operational(value, f"{prefix}{name}.")


def _change(name: str, old: Any, new: Any) -> str:
    line = f"{name}: {old} → {new}"
    return f"{line} (the learning rate is now that of a run of this length)" if name in LENGTH else line
