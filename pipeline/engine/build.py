"""The commands `build`, `run` and `status`: a session that owns the corpus, and the steps of a build.

`build` runs ingest, every stage and pack; `run STAGE` runs one of them.
"""

import json
import os
import platform
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pyarrow as pa

from clipmill.base.errors import UserError
from pipeline.engine import registry
from pipeline.engine.driver import Engine, EngineReport
from pipeline.engine.repair import find_rot, repair
from pipeline.engine.settings import CorpusSettings, resolve, validate
from pipeline.runtime.watchdog import sweep_reports
from pipeline.stages.ingest.stage import IngestReport, ingest_sources
from pipeline.stages.pack import PackReport, pack_corpus, pack_state
from pipeline.stages.stage import Stage
from shards.corpus.folder import Corpus
from shards.corpus.fragments import fragment_path, sweep_temporaries
from shards.corpus.ledger import Ledger, remove_cache
from shards.corpus.manifest import MANIFEST_NAME, is_current, publish
from shards.corpus.schema import MANIFEST
from shards.packing.verify import Problem
from shards.query.sql import open_manifest, rows_of
from shards.storage.s3 import MOST_COPIED_BYTES
from shards.storage.sealed_parquet import write_parquet


@dataclass
class BuildReport:
    ingest: IngestReport | None = None
    engine: EngineReport = field(default_factory=EngineReport)
    pack: PackReport | None = None
    changed: list[str] = field(default_factory=list)  # settings that differ from the corpus's last ones
    pending_before: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: list[tuple[str, str, int, str]] = field(default_factory=list)  # stage, class, count, an example

    @property
    def did_something(self) -> bool:
        new_sources = self.ingest.num_new if self.ingest else 0
        packed = self.pack.num_written + self.pack.num_refreshed if self.pack else 0
        return bool(new_sources or packed or self.engine.num_done or self.engine.num_failed)

    @property
    def exit_code(self) -> int:
        return 1 if self.failures else 0


class Session:
    """A corpus opened for writing: settings saved, leftovers swept, every fragment loaded."""

    def __init__(self, corpus: Corpus, settings: CorpusSettings, ledger: Ledger, command: str):
        self.corpus, self.settings, self.ledger, self.command = corpus, settings, ledger, command
        self.started_at = datetime.now(UTC)
        self.run_id = f"{self.started_at:%Y%m%dT%H%M%S}-{os.getpid()}"

    def engine(self, stages: Sequence[str]) -> Engine:
        return Engine(self.corpus, self.settings, self.ledger, self.run_id, stages)

    def refresh_state(self) -> None:
        self.ledger.refresh_state(
            registry.fingerprints(self.settings),
            units=None,
            run_id=self.run_id,
            max_attempts=self.settings.engine.max_attempts,
        )

    def record_run(self, *, ended: bool) -> None:
        """Write the row of this run, when it first does something and again when it ends."""
        row = {
            "run_id": self.run_id,
            "command": self.command,
            "started_at": self.started_at,
            "ended_at": datetime.now(UTC) if ended else None,
            "settings": json.dumps(self.settings.model_dump(mode="json"), sort_keys=True),
            "versions": json.dumps(
                {**versions(), "driver_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024},
                sort_keys=True,
            ),
        }
        path = fragment_path(self.corpus.root, "runs", self.run_id)
        write_parquet(path, pa.Table.from_pylist([row], MANIFEST["runs"]))
        self.corpus.files.upload(str(path.relative_to(self.corpus.root)))

    @property
    def damaged(self) -> list[Problem]:
        """Return the damaged fragments whose commits do not count any more."""
        return [Problem(path, "", "damaged", why) for path, why in self.ledger.damaged.items()]

    def repair_damage(self, display) -> None:
        """Show the damaged files that the last `verify --deep` and a random look have found; repair them."""
        rot = find_rot(self.corpus, self.ledger, self.settings.engine.check_bytes, self.run_id)
        if rot:
            display.damaged(rot)
            repair(self.corpus, self.ledger, rot)
            self.refresh_state()

    def publish(self) -> None:
        self.refresh_state()
        publish(self.ledger)

    def failures(self) -> list[tuple[str, str, int, str]]:
        return self.ledger.standing_failures()


@contextmanager
def session(
    root: str | Path,
    recipe: str | None,
    assignments: list[str],
    command: str,
    *,
    create: bool,
    fresh: bool = False,
    replace_sources: bool = False,
) -> Iterator[tuple[Session, list[str]]]:
    """Open a corpus for writing; yield it with the settings that changed. Raises UserError.

    Args:
        fresh: rebuild the working database, because rows deleted from it leave their bytes in the file.
        replace_sources: a damaged record of sources is removed, because lists are about to be read.
    """
    corpus = Corpus(root)
    if not create:
        corpus.require()
    saved = corpus.load_settings() if corpus.exists else None
    settings = resolve(saved, recipe, assignments)
    if corpus.store and settings.pack.shard_bytes > MOST_COPIED_BYTES:
        raise UserError(
            f"pack.shard_bytes = {settings.pack.shard_bytes}: at most {MOST_COPIED_BYTES} for a corpus in a store, "
            "which puts a shard in place by copying it."
        )
    registry.fingerprints(settings)  # raises for a missing model file before settings are saved
    resolved = settings.model_dump(mode="json")
    corpus.create()
    with corpus.writer():
        if resolved != saved:
            corpus.save_settings(resolved)
        sweep_temporaries(corpus.root)
        sweep_reports(corpus.root)
        if fresh:
            remove_cache(corpus.root)
        ledger = Ledger(corpus.root, registry.stages(), memory_limit=settings.engine.driver_memory)
        try:
            ledger.sync(replace_sources=replace_sources)
            ledger.remove_orphans()
            yield Session(corpus, settings, ledger, command), changes(saved, resolved) if saved else []
        finally:
            ledger.close()


def build(
    root: str | Path,
    sources: list[str],
    *,
    stages: Sequence[str],
    recipe: str | None,
    assignments: list[str],
    command: str,
    redo: bool = False,
    where: str | None = None,
    display=None,
) -> BuildReport:
    """Ingest `sources` if any, run the named stages, pack if "pack" is among them, publish."""
    display = display or Silent()
    report = BuildReport()
    with session(root, recipe, assignments, command, create="ingest" in stages, replace_sources=bool(sources)) as (
        current,
        report.changed,
    ):
        for stage in registry.stages():
            if list(stages) == [stage.name] and stage.is_off(getattr(current.settings, stage.name)):
                raise UserError(f"{stage.name}.{stage.switch} is null, so the stage is off; --set it to turn it on.")
        display.settings_changed(report.changed)
        if "ingest" in stages and sources:
            report.ingest = ingest_sources(current, sources)
            display.ingested(report.ingest)
        current.refresh_state()
        display.damaged(current.damaged)
        if "ingest" in stages:
            current.repair_damage(display)
        if redo or where:
            for stage in (stage for stage in registry.stages() if stage.name in stages):
                named = _items_named(current.corpus, stage, where) if where else current.ledger.items_of(stage.name)
                current.ledger.mark_pending(stage.name, named)
            current.refresh_state()
        report.pending_before = current.ledger.counts()
        display.plan(report.pending_before, stages)
        _run_stages(current, stages, report, display)
        if report.did_something or not is_current(current.corpus.root, current.ledger):
            current.publish()
        if "pack" in stages or report.engine.num_done:
            report.pack = pack_corpus(current, display, write="pack" in stages, redo=redo and "pack" in stages)
            current.ledger.drop_superseded("cut")
        if not current.settings.download.keep_sources:
            current.corpus.files.remove(*current.ledger.sources_cut())
        if report.did_something:
            current.record_run(ended=True)
        # An earlier build may have been killed between packing and publishing, or a video may have been forgotten.
        if report.did_something or not is_current(current.corpus.root, current.ledger):
            current.publish()
        report.failures = current.failures()
    return report


def _run_stages(current: Session, stages: Sequence[str], report: BuildReport, display) -> None:
    names = [stage.name for stage in registry.stages() if stage.name in stages]
    if not current.ledger.units_with_work(names):
        return
    current.record_run(ended=False)
    engine = current.engine(names)
    with display.progress(engine, report.pending_before):
        report.engine = engine.run(lambda engine: display.tick(engine))


def _items_named(corpus: Corpus, stage: Stage, where: str) -> list[str]:
    """Return the items of a stage for which an SQL condition over the manifest holds.

    It may use the columns of `catalog` for stages that work on clips and of `videos` for the others, and error_class,
    message, attempts and quarantined of the item's failure in this stage. Raises UserError for bad SQL.
    """
    table, item = ("catalog", "clip_id") if stage.item == "clip" else ("videos", "video_id")
    failures = f"SELECT item_id, error_class, message, attempts, quarantined FROM failures WHERE stage = '{stage.name}'"
    sql = (
        f"SELECT DISTINCT {item} FROM (SELECT t.*, f.* EXCLUDE (item_id) FROM {table} t LEFT JOIN ({failures}) f "
        f"ON f.item_id = t.{item} OR split_part(f.item_id, '.', 1) = t.{item}) WHERE ({where}) ORDER BY 1"
    )
    with open_manifest(corpus.root) as connection:
        return rows_of(connection, sql)


def changes(saved: dict, settings: dict) -> list[str]:
    """Return `difference` without the settings that are newer than the saved ones and have their default."""
    try:
        saved = validate(saved).model_dump(mode="json")
    except UserError:
        pass  # a saved value that is not allowed any more, which the new settings replace
    return difference(saved, settings)


def difference(before: dict, after: dict, prefix: str = "") -> list[str]:
    """Return a line such as "cut.fps: 3.0 → 2.0" for every setting that differs."""
    lines = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += difference(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} → {new}")
    return lines


@dataclass(frozen=True)
class Status:
    counts: dict[str, dict[str, int]]
    off: list[str]  # stages
    failures: list[tuple[str, str, int, str]]
    pack: dict[str, int]
    changed: list[str]
    damaged: list[Problem]  # fragments whose items are pending again


def status(root: str | Path, assignments: list[str]) -> Status:
    """Count the done, pending and failed items of each stage, with the settings as saved or as `--set` makes them."""
    corpus = Corpus(root).require()
    saved = corpus.load_settings()
    settings = resolve(saved, None, assignments)
    with corpus.alone_here(), corpus.files.local_only():
        corpus.files.pull()
        ledger = Ledger(corpus.root, registry.stages(), memory_limit=settings.engine.driver_memory)
        try:
            ledger.sync()
            current = Session(corpus, settings, ledger, "status")
            current.refresh_state()
            if (corpus.root / MANIFEST_NAME).exists() and not is_current(corpus.root):
                publish(ledger)  # another version wrote it, so it may lack columns that packing reads
            changed = changes(saved, settings.model_dump(mode="json"))
            off = [stage.name for stage in registry.stages() if stage.is_off(getattr(settings, stage.name))]
            return Status(ledger.counts(), off, current.failures(), pack_state(current), changed, current.damaged)
        finally:
            ledger.close()


def versions() -> dict[str, str]:
    names = ("clipmill", "av", "duckdb", "open_clip_torch", "pyarrow", "ray", "torch", "webdataset", "yt-dlp")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


class Silent:
    """A display that shows nothing, for tests and library callers. The command line has `clipmill.cli.display`."""

    def settings_changed(self, changed: list[str]) -> None: ...
    def damaged(self, problems: list[Problem]) -> None: ...
    def ingested(self, report: IngestReport) -> None: ...
    def plan(self, counts: dict, stages: Sequence[str]) -> None: ...
    def tick(self, engine: Engine) -> None: ...
    def packing(self, done: int, total: int) -> None: ...

    @contextmanager
    def progress(self, engine: Engine, counts: dict) -> Iterator[None]:
        yield


def require_stage(name: str) -> None:
    """Raise UserError unless `clipmill run` knows the stage."""
    known = registry.stage_names()[1:]
    if name not in known:
        raise UserError(f"unknown stage {name!r}; the stages are {', '.join(known)}.")
