"""What a Ray worker does: run one stage over a few items of one unit and commit the result.

Nothing here decides what is to be done or what counts as done; that is the ledger's. A worker gets small rows, writes
media and fragments, and answers with a `Commit`.
"""

import importlib
import os
import resource
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from clipmill.base.errors import ItemError, UserError
from clipmill.base.settings import Settings
from pipeline.runtime.watchdog import reporting
from shards.corpus.folder import lock_owner
from shards.corpus.fragments import Commit, commit_name, table_schema, write_commit
from shards.corpus.schema import LEDGER
from shards.storage.mirror import mirror
from shards.storage.s3 import Store

GOVERNOR = "clipmill-governor"  # name of the Ray actor that limits how hard hosts are asked

RUNNERS = {  # by name: a worker imports only what its stage needs
    "download": "pipeline.stages.workers:run_download",
    "transcribe": "pipeline.stages.workers:run_transcribe",
    "segment": "pipeline.stages.workers:run_segment",
    "cut": "pipeline.stages.workers:run_cut",
    "caption": "pipeline.stages.model_workers:run_caption",
    "score": "pipeline.stages.model_workers:run_score",
}


@dataclass(frozen=True)
class Work:
    """Items of one unit for one stage. Each item has item_id, key, attempts, cost and its stage's payload columns."""

    stage: str
    unit: str
    items: list[dict]
    settings: Settings
    fingerprint: str
    root: str
    run_id: str
    store: Store | None = None  # where the corpus is, if that is no folder: `root` is then every node's mirror of it
    holder: str = ""  # who held the corpus's lock when this was given out

    @property
    def cost(self) -> float:
        return sum(item["cost"] for item in self.items)

    @property
    def name(self) -> str:
        return commit_name(self.stage, self.unit, [(item["item_id"], item["key"]) for item in self.items])


@dataclass
class Outcome:
    """What became of one item: rows per table, or a failure; `parts` are failures inside an item that is done."""

    item_id: str
    rows: dict[str, list[dict]] = field(default_factory=dict)
    failure: ItemError | None = None
    parts: list[tuple[str, ItemError]] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float = 0.0


def require_holder(work: Work) -> None:
    """Raises UserError where somebody else writes the corpus by now.

    A worker may outlive its build by a while. The next build has swept up by then and does the same work: what this one
    could not do for that reason is no failure, and what it has done must not replace what the other has.
    """
    if work.holder and lock_owner(Path(work.root), work.store) != work.holder:
        raise UserError("another process writes the corpus by now; this work is done by its workers.")


def execute(work: Work) -> Commit:
    """Run the work and commit it. Whatever a single item raises becomes that item's failure."""
    module, _, runner = RUNNERS[work.stage].partition(":")
    started = time.perf_counter()
    if work.store:
        mirror(Path(work.root), work.store)
    with reporting(Path(work.root), work.name):
        outcomes, media = getattr(importlib.import_module(module), runner)(work)
    return commit(work, outcomes, media, time.perf_counter() - started)


def commit(work: Work, outcomes: list[Outcome], media: list[str], wall_s: float = 0.0) -> Commit:
    """Write what became of the items as one commit named after the work. Raises UserError as `require_holder` does."""
    items = {item["item_id"]: item for item in work.items}
    assert set(items) == {outcome.item_id for outcome in outcomes}, "a stage must answer for every item"
    outcomes = sorted(outcomes, key=lambda outcome: outcome.item_id)
    tables = {}
    for outcome in outcomes:
        for table, rows in outcome.rows.items():
            stamp = {"item_id": outcome.item_id, "unit": work.unit, "key": items[outcome.item_id]["key"]}
            tables.setdefault(table, []).extend({**stamp, **row} for row in rows)
    ledger = [row for outcome in outcomes for row in _ledger_rows(work, items[outcome.item_id], outcome)]
    data = {name: pa.Table.from_pylist(rows, table_schema(name)) for name, rows in tables.items() if rows}
    require_holder(work)
    write_commit(Path(work.root), work.name, data, pa.Table.from_pylist(ledger, LEDGER), media)
    return Commit(
        name=work.name,
        stage=work.stage,
        unit=work.unit,
        num_done=sum(outcome.failure is None for outcome in outcomes),
        num_failed=sum(row["status"] == "failed" for row in ledger),
        num_rows=sum(row["num_rows"] for row in ledger),
        cpu_s=sum(outcome.cpu_s for outcome in outcomes),
        wall_s=wall_s,
    )


def _ledger_rows(work: Work, item: dict, outcome: Outcome) -> Iterator[dict]:
    common = {
        "stage": work.stage,
        "unit": work.unit,
        "key": item["key"],
        "fingerprint": work.fingerprint,
        "attempts": item["attempts"] + 1,
        "wall_s": outcome.wall_s,
        "cpu_s": outcome.cpu_s,
        "at": datetime.now(UTC),
        "run_id": work.run_id,
        "num_rows": 0,
    }
    if outcome.failure is None:
        num_rows = sum(len(rows) for rows in outcome.rows.values())
        yield {**common, "item_id": outcome.item_id, "status": "done", "num_rows": num_rows}
        failures = outcome.parts
    else:
        failures = [(outcome.item_id, outcome.failure)]
    for item_id, error in failures:
        reason = {"error_class": error.error_class, "message": error.message, "transient": error.transient}
        yield {**common, "item_id": item_id, "status": "failed", **reason}


Result = tuple[list[Outcome], list[str]]  # what a runner gives: an outcome per item, media files under the corpus


class Stopwatch:
    """Turns what one item does into an Outcome: `with Stopwatch(item_id) as outcome: outcome.rows[...] = …`."""

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
        elif isinstance(error, Exception) and not isinstance(error, UserError):
            self.outcome.failure = failure_of(error)
        else:
            return False  # an interrupt, or a setting that only the worker could check: ends the run
        self.outcome.rows.clear()
        return True


def failure_of(error: Exception) -> ItemError:
    """An exception nobody foresaw, as a row that tells where it came from."""
    if isinstance(error, OSError) and error.errno in (28, 122):
        return ItemError("disk-full", str(error), transient=True)
    where = "".join(traceback.format_exception(error)[-3:])
    return ItemError("internal-error", f"{type(error).__name__}: {error}\n{where}")


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def limit_threads(num_threads: int = 1) -> None:
    """Native libraries of this process use so many threads: parallelism is over items, not inside them."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(num_threads)
    pa.set_cpu_count(num_threads)
    pa.set_io_thread_count(max(2, num_threads))
