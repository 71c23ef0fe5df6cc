"""The pack stage: selected clips → shards, written by Ray tasks and put in place by the driver; indexes get new texts.

It reads the published manifest like any reader, so the caller publishes before and after.
"""

import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pyarrow as pa

from clipmill.base.errors import ItemError, UserError
from clipmill.base.ray_cluster import start_ray
from pipeline.stages.stage import DriverStage
from shards.corpus.fragments import fragment_path, ledger_row, write_commit
from shards.corpus.manifest import empty_manifest, is_current
from shards.corpus.schema import LEDGER
from shards.packing.index import read_index, refresh_index
from shards.packing.pack import (
    PackSettings,
    ShardPlan,
    commit_shards,
    pending_shards,
    plan_shards,
    reserved_slots,
    rows_by_shard,
    select_samples,
    write_shard,
)
from shards.query.sql import check_selection, open_manifest, rows_of, selection
from shards.storage.local import MANIFEST_NAME
from shards.storage.mirror import files_of, mirror
from shards.storage.s3 import Store

PACK = DriverStage("pack", help="clips → shards", settings=PackSettings)
FEW_SHARDS = 2  # written in this process, because starting Ray would take longer
FAILURES = "pack"  # name of the one commit that holds the clips that the last packing left out


@dataclass
class PackReport:
    num_shards: int = 0
    num_samples: int = 0
    num_written: int = 0  # shards written or put in place now
    num_refreshed: int = 0  # indexes that got new texts
    seconds: float = 0.0
    failures: list[tuple[str, ItemError]] = field(default_factory=list)


def pack_corpus(session, display, *, write: bool, redo: bool) -> PackReport:
    """Bring shards/ up to date with the manifest; without `write` only the texts of the indexes.

    `session`: of `pipeline.engine.build`.
    """
    root, settings, started = session.corpus.root, session.settings.pack, time.perf_counter()
    report = PackReport()
    with open_manifest(root) as connection:
        if write:
            plans = planned(connection, settings)
            session.corpus.files.refresh("shards")
            todo = plans if redo else pending_shards(root, plans, retry_missing=True)
            report.failures = _write_all(session, connection, todo, display)
            report.num_written, num_removed = commit_shards(root, plans, fsync=settings.fsync)
            report.num_written += num_removed
            report.num_shards, report.num_samples = len(plans), sum(len(plan.clip_ids) for plan in plans)
            if todo:
                _record_failures(session, report.failures)
        report.num_refreshed = _refresh(root, connection)
    report.seconds = time.perf_counter() - started
    return report


def check_where(settings: PackSettings, root: Path) -> None:
    """Raise UserError for a `pack.where` that this version's `catalog`, or a row of it in the corpus, cannot answer."""
    if not settings.where.strip():
        return
    with empty_manifest() as connection:
        check_selection(connection, settings.where, "pack.where")
    if (root / MANIFEST_NAME).is_file() and is_current(root):
        with open_manifest(root) as connection:
            try:
                rows_of(connection, f"SELECT count(*) FROM ({selection(settings.where)})")
            except UserError as error:
                raise UserError(f"pack.where: {error}") from error


def planned(connection, settings: PackSettings) -> list[ShardPlan]:
    """Return the shards that ought to exist, from the manifest."""
    return plan_shards(select_samples(connection, settings), settings, reserved_slots(connection))


def pack_state(session) -> dict[str, int]:
    """Count the samples that are packed as planned, and those in shards that are to be written or removed."""
    root = session.corpus.root
    if not (root / MANIFEST_NAME).exists():
        return {"packed": 0, "to_pack": 0}
    with open_manifest(root) as connection:
        plans = planned(connection, session.settings.pack)
    todo = {plan.name for plan in pending_shards(root, plans)}
    sizes = {plan.name: len(plan.clip_ids) for plan in plans}
    return {
        "packed": sum(size for name, size in sizes.items() if name not in todo),
        "to_pack": sum(sizes[name] for name in todo),
    }


def _write_all(session, connection, plans: list[ShardPlan], display) -> list[tuple[str, ItemError]]:
    """Write the shards, with Ray if they are many. Rows are sent to the tasks, media are not."""
    root, fsync = session.corpus.root, session.settings.pack.fsync
    failures: list[tuple[str, ItemError]] = []
    few = len(plans) <= FEW_SHARDS
    if not few:
        session.trust.require(["engine"])
    with nullcontext(_InThisProcess()) if few else _RayTasks(session.settings) as submit:
        waiting, num_done = deque(), 0
        for piece in chain(rows_by_shard(connection, plans), [None]):
            if piece is not None:
                waiting.append(submit(*piece, root, session.corpus.store, fsync))
            while waiting and (piece is None or len(waiting) > 2 * submit.width):
                failures += waiting.popleft()()
                num_done += 1
                display.packing(num_done, len(plans))
    return failures


class _InThisProcess:
    width = 0

    def __call__(self, *arguments):
        failures = _write(*arguments)
        return lambda: failures


class _RayTasks:
    def __init__(self, settings):
        self.settings = settings

    def __enter__(self):
        import ray

        engine = self.settings.engine
        allow_open = engine.allow_open_cluster
        self.started = start_ray(engine.address, engine.cpus, setting="engine.address", allow_open=allow_open)
        self.ray = ray
        self.width = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.task = ray.remote(num_cpus=1)(_write)  # writing again gives the same bytes, so Ray may retry
        return self

    def __call__(self, *arguments):
        reference = self.task.remote(*arguments)
        return lambda: self.ray.get(reference)

    def __exit__(self, *_):
        if self.started:
            self.ray.shutdown()


def _write(
    plan: ShardPlan, rows: pa.Table, root: Path, store: Store | None, fsync: bool
) -> list[tuple[str, ItemError]]:
    if store:
        mirror(root, store)
    return write_shard(plan, rows, root, fsync=fsync).failures


def _record_failures(session, failures: list[tuple[str, ItemError]]) -> None:
    """Commit the clips that this packing left out in place of those of the one before."""
    rows = [ledger_row("pack", clip_id, FAILURES, run_id=session.run_id, error=error) for clip_id, error in failures]
    root = session.corpus.root
    if rows:
        write_commit(root, FAILURES, {}, pa.Table.from_pylist(rows, LEDGER), [])
        session.ledger.load([FAILURES])
    elif fragment_path(root, "ledger", FAILURES).exists():
        session.corpus.files.remove(f"fragments/ledger/{FAILURES}.parquet")
        session.ledger.forget([FAILURES])


def _refresh(root: Path, connection) -> int:
    """Write into every index the texts that the manifest has now; return how many indexes changed."""
    num_changed = 0
    for path in sorted((root / "shards").glob("[0-9]*.parquet")):
        connection.register("packed", read_index(path).select(["clip_id"]))
        texts = connection.sql(
            "SELECT c.clip_id, c.text AS subtitle, c.caption, c.captioner, c.caption_score, c.language "
            "FROM catalog c SEMI JOIN packed USING (clip_id)"
        ).to_arrow_table()
        connection.unregister("packed")
        if refresh_index(path, texts):
            files_of(root).upload(f"shards/{path.name}")
            num_changed += 1
    return num_changed
