"""A task: some items of one unit for one stage, run by a Ray worker and committed as one result.

Nothing here decides which items are pending or done; that is the ledger's part. A worker gets small rows, writes media
and fragments, and returns a `Commit`.
"""

import os
import resource
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from clipmill.base.credentials import Redactor
from clipmill.base.errors import ItemError, UserError
from clipmill.base.settings import Settings
from clipmill.media.sandbox import Sandbox
from pipeline.runtime.watchdog import reporting
from shards.corpus.folder import lock_owner
from shards.corpus.fragments import Commit, commit_name, ledger_row, table_schema, write_commit
from shards.corpus.schema import LEDGER
from shards.storage.mirror import mirror
from shards.storage.s3 import Store

HOST_LIMITER = "clipmill-host-limiter"  # name of the Ray actor that limits downloads per host


@dataclass(frozen=True)
class Task:
    """Items of one unit for one stage. Each item has item_id, key, attempts, cost and the columns of its payload."""

    stage: str
    unit: str
    items: list[dict]
    settings: Settings  # the stage's own section
    fingerprint: str
    root: str
    run_id: str
    store: Store | None = None  # the corpus's store, if it is not a folder: `root` is then each node's mirror of it
    lock_owner: str = ""  # owner of the corpus lock when the task was submitted
    fsync: bool = False  # flush what the commit rests on to the disk
    secrets: tuple[str, ...] = field(default=(), repr=False)  # of the settings; no message of a failure repeats them

    @property
    def cost(self) -> float:
        return sum(item["cost"] for item in self.items)

    @property
    def client(self) -> str:
        """Name under which a task of one item takes its host's turn, whichever process asks."""
        return f"{self.run_id}:{self.items[0]['item_id']}"

    @property
    def name(self) -> str:
        return commit_name(self.stage, self.unit, [(item["item_id"], item["key"]) for item in self.items])


@dataclass
class Outcome:
    """Result of one item: rows per table, or a failure. `parts` are failures inside an item that is done.

    `note` says of an item that is done why it has no rows. It is not a failure.
    """

    item_id: str
    rows: dict[str, list[dict]] = field(default_factory=dict)
    failure: ItemError | None = None
    parts: list[tuple[str, ItemError]] = field(default_factory=list)
    note: ItemError | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0


Result = tuple[list[Outcome], list[str]]  # an outcome per item, and the media files written, relative to the corpus


class Postponed(Exception):
    """An item that can go on only later, which is neither done nor failed."""


@dataclass(frozen=True)
class NotNow:
    """Result of a task of one item whose host wants to be left alone: the driver runs it again after `wait_s`.

    so_far: what the item has used of its limits, which comes back as `item["so_far"]`.
    """

    wait_s: float
    so_far: dict


def require_lock(task: Task) -> None:
    """Raise UserError if another process has become the writer of the corpus since the task was submitted.

    A worker may outlive its build. The next build deletes its temporary files and does the same work, so the old
    worker's failures are not the items', and its files must not replace those of the new build.
    """
    if task.lock_owner and lock_owner(Path(task.root), task.store) != task.lock_owner:
        raise UserError(
            "another process is writing the corpus now and does this task; this worker belongs to an earlier build."
        )


_one_mirror = threading.Lock()  # of a store in this process, which may begin several tasks at once


def execute(run: Callable[[Task], Result | NotNow], task: Task) -> Commit | NotNow:
    """Run a stage's function on a task and commit the result. An error of one item becomes that item's failure."""
    started = time.perf_counter()
    if task.store:
        with _one_mirror:
            mirror(Path(task.root), task.store)
    with reporting(Path(task.root), task.name):
        result = run(task)
    if isinstance(result, NotNow):
        return result
    outcomes, media = result
    return commit(task, outcomes, media, time.perf_counter() - started)


def commit(task: Task, outcomes: list[Outcome], media: list[str], wall_s: float = 0.0) -> Commit:
    """Write the outcomes of all items as one commit named after the task. Raises UserError as `require_lock` does."""
    items = {item["item_id"]: item for item in task.items}
    assert set(items) == {outcome.item_id for outcome in outcomes}, f"stage {task.stage}: not one outcome per item"
    outcomes = sorted(outcomes, key=lambda outcome: outcome.item_id)
    tables, ledger, redactor = {}, [], Redactor(task.secrets)
    for outcome in outcomes:
        item = items[outcome.item_id]
        for table, rows in outcome.rows.items():
            stamp = {"item_id": outcome.item_id, "unit": task.unit, "key": item["key"]}
            tables.setdefault(table, []).extend({**stamp, **row} for row in rows)
        common = {"run_id": task.run_id, "unit": task.unit, "fingerprint": task.fingerprint}
        common |= {"attempts": item["attempts"] + 1, "wall_s": outcome.wall_s, "cpu_s": outcome.cpu_s}
        failures = [(outcome.item_id, outcome.failure)] if outcome.failure else outcome.parts
        if outcome.failure is None:
            num_rows = sum(len(rows) for rows in outcome.rows.values())
            row = ledger_row(task.stage, outcome.item_id, item["key"], num_rows=num_rows, **common)
            if outcome.note:
                row |= {"error_class": outcome.note.error_class, "message": outcome.note.message}
            ledger.append(row)
        for item_id, error in failures:
            error.message = redactor.text(error.message)
            ledger.append(ledger_row(task.stage, item_id, item["key"], error=error, **common))
    data = {name: pa.Table.from_pylist(rows, table_schema(name)) for name, rows in tables.items() if rows}
    require_lock(task)
    ledger_rows = pa.Table.from_pylist(ledger, LEDGER)
    write_commit(Path(task.root), task.name, data, ledger_rows, media, fsync=task.fsync)
    return Commit(
        name=task.name,
        stage=task.stage,
        unit=task.unit,
        num_done=sum(outcome.failure is None for outcome in outcomes),
        num_failed=sum(row["status"] == "failed" for row in ledger),
        num_rows=sum(row["num_rows"] for row in ledger),
        cpu_s=sum(outcome.cpu_s for outcome in outcomes),
        wall_s=wall_s,
    )


# -- for the functions of stages ------------------------------------------------------------------------------------


class Stopwatch:
    """Measure one item and convert its exception to a failure: `with Stopwatch(item_id) as outcome: …`."""

    def __init__(self, item_id: str):
        self.outcome = Outcome(item_id)

    def __enter__(self) -> Outcome:
        self.wall, self.cpu = time.perf_counter(), _cpu_s()
        return self.outcome

    def __exit__(self, kind, error, trace) -> bool:
        self.outcome.wall_s = time.perf_counter() - self.wall
        self.outcome.cpu_s += _cpu_s() - self.cpu
        if error is None:
            return False
        if isinstance(error, ItemError):
            self.outcome.failure = error
        elif isinstance(error, Exception) and not isinstance(error, UserError | Postponed):
            self.outcome.failure = failure_of(error)
        else:
            return False  # an interrupt, a setting that only the worker could check (both end the run), a postponement
        self.outcome.rows.clear()
        return True


def failure_of(error: Exception) -> ItemError:
    """Turn an unexpected exception into a failure that holds the end of its traceback."""
    if isinstance(error, OSError) and error.errno in (28, 122):
        return ItemError("disk-full", str(error), transient=True)
    where = "".join(traceback.format_exception(error)[-3:])
    return ItemError("internal-error", f"{type(error).__name__}: {error}\n{where}")


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@lru_cache(maxsize=1)
def sandbox() -> Sandbox:
    """Return this process's one sandbox, whose child is started once and serves all videos."""
    return Sandbox()


_unavailable: dict[str, ItemError] = {}  # stage fingerprint → why its model cannot be loaded


def load_model(load: Callable[[Settings], object], settings: Settings, fingerprint: str) -> object | ItemError:
    """Return the model of a stage, or the ItemError "model-unavailable" of the first failed attempt to load it.

    So a model that cannot be loaded fails its stage's items and not the build, and is not tried again for each task.
    """
    if fingerprint not in _unavailable:
        try:
            return load(settings)
        except (UserError, OSError) as error:
            _unavailable[fingerprint] = ItemError("model-unavailable", str(error), transient=True)
    return _unavailable[fingerprint]


def limit_threads() -> None:
    """Limit native libraries of this process to one thread: work is parallel over items, not inside them."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    pa.set_cpu_count(1)
    pa.set_io_thread_count(2)
