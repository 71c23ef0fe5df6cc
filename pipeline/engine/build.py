"""The commands `build`, `run` and `status`: a session that owns the corpus, and the steps of a build.

`build` runs ingest, every stage and pack; `run STAGE` runs one of them.
"""

import json
import os
import platform
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import duckdb
import pyarrow as pa

from clipmill.base.credentials import strip_credentials
from clipmill.base.errors import UserError
from clipmill.base.settings import load_recipe
from pipeline.engine import registry
from pipeline.engine.driver import Engine, EngineReport
from pipeline.engine.repair import find_rot, repair, write_suspects
from pipeline.engine.settings import RECIPES, CorpusSettings, resolve
from pipeline.engine.trust import RUNS_CODE, Trust, assigned, lines, trust_in, without_foreign_code
from pipeline.runtime.watchdog import sweep_reports
from pipeline.stages.download.ytdlp_options import check_names
from pipeline.stages.ingest.source_lists import SourceList, read_sources
from pipeline.stages.ingest.stage import IngestReport, ingest_sources
from pipeline.stages.pack import (
    PackReport,
    check_shard_bytes,
    check_where,
    named_pack,
    note_packed,
    pack_corpus,
    pack_state,
    record_pack,
)
from pipeline.stages.pack_notes import Pack
from pipeline.stages.stage import Stage
from shards.corpus.folder import Corpus, NewerCorpus, lock_owner
from shards.corpus.fragments import fragment_path, sweep_temporaries
from shards.corpus.ledger import Ledger
from shards.corpus.manifest import MANIFEST_NAME, is_current, publish
from shards.corpus.packs import MAIN
from shards.corpus.released_clips import recorded_volumes
from shards.corpus.schema import MANIFEST
from shards.corpus.tombstones import tombstone_files
from shards.corpus.volume_files import remove_cache
from shards.packing.release import ReleaseReport, index_tars, release_clips
from shards.packing.verify import Problem
from shards.query.sql import open_manifest, rows_of
from shards.storage.sealed_parquet import write_parquet


@dataclass
class BuildReport:
    ingest: IngestReport | None = None
    engine: EngineReport = field(default_factory=EngineReport)
    pack: PackReport | None = None
    changed: list[str] = field(default_factory=list)  # settings that differ from the corpus's last ones
    pending_before: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: list[tuple[str, str, int, str]] = field(default_factory=list)  # of this run: stage, class, count, example
    num_old_failures: int = 0  # items that failed in earlier runs and were not tried again
    without_clips: list[tuple[str, int, str]] = field(default_factory=list)  # reason, number of videos, an example

    @property
    def did_something(self) -> bool:
        new_sources = self.ingest.num_new + self.ingest.num_grown if self.ingest else 0
        packed = self.pack.num_written + self.pack.num_refreshed if self.pack else 0
        return bool(new_sources or packed or self.engine.num_done or self.engine.num_failed)

    @property
    def exit_code(self) -> int:
        """Return 1 if something failed in this run; failures of earlier runs do not count."""
        return 1 if self.failures else 0


class Session:
    """A corpus opened for writing: settings saved, leftovers swept, every fragment loaded."""

    def __init__(self, corpus: Corpus, settings: CorpusSettings, ledger: Ledger, command: str, trust: Trust):
        self.corpus, self.settings, self.ledger, self.trust = corpus, settings, ledger, trust
        self.command = strip_credentials(command)
        self.started_at = datetime.now(UTC)
        self.run_id = f"{self.started_at:%Y%m%dT%H%M%S}-{os.getpid()}"

    def engine(self, stages: Sequence[str]) -> Engine:
        """Return the engine that runs these stages, and packs the volumes that are complete if "pack" is one."""
        pack = Pack(MAIN, self.settings.pack) if "pack" in stages else None
        return Engine(self.corpus, self.settings, self.ledger, self.run_id, stages, pack)

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

    def merge_finished(self) -> None:
        """Merge the fragments of the volumes in which nothing is pending, while no task is running."""
        self.refresh_state()
        engine = self.settings.engine
        self.ledger.merge_finished(engine.merge_commits, fsync=engine.fsync and self.corpus.store is None)

    def publish(self, *, whole: bool = False) -> None:
        self.refresh_state()
        publish(self.ledger, whole=whole)

    def release_clips(self, display) -> None:
        """Delete the tars of clips that are packed, unless `pack.keep_clips`; leave rotten shards to the next build."""
        delete = not self.settings.pack.keep_clips
        if not delete and not recorded_volumes(self.corpus.root):
            return
        self.refresh_state()
        fsync = self.settings.engine.fsync or self.settings.pack.fsync
        report = release_clips(self.ledger, self.publish, delete=delete, fsync=fsync)
        display.released(report)
        if report.problems:
            display.damaged(report.problems)
            write_suspects(self.corpus, report.problems)


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
    check: Callable[[Corpus, CorpusSettings], None] | None = None,
) -> Iterator[tuple[Session, list[str]]]:
    """Open a corpus for writing; yield it with the settings that changed. Raises UserError.

    A mistake leaves corpus.yaml as it was: settings are checked before they are saved, and if the block raises
    UserError, for what only a worker or a later stage could find, the ones from before are saved again.

    Args:
        fresh: rebuild the working database, because rows deleted from it leave their bytes in the file.
        replace_sources: a damaged record of sources is removed, because lists are about to be read.
        check: raises UserError for what else is wrong with the command, before a new corpus is made.
    """
    corpus = Corpus(root)
    if not create:
        corpus.require()
    recorded = corpus.load_settings() if corpus.exists else None
    saved = None if recorded is None else with_defaults(recorded)
    settings = resolve(saved, recipe, _with_shuffle(saved, recipe, assignments)).without_plain_secrets(saved)
    trust = trust_in(corpus, settings, given=None if saved is None or recipe else assigned(assignments))
    trust.require(reaches=RUNS_CODE)
    if saved is None or saved["download"]["ytdlp_options"] != settings.download.ytdlp_options:
        check_names(settings.download.ytdlp_options)
    check_shard_bytes(corpus, settings.pack)
    registry.fingerprints(settings)  # raises for a missing model file before settings are saved
    resolved = settings.model_dump(mode="json")
    if resolved != saved:
        check_where(settings.pack, corpus.root)
    if check:
        check(corpus, settings)
    corpus.create()
    with corpus.writer():
        marks = corpus.load_marks()
        if resolved != recorded or trust.marks != marks:
            corpus.save_settings(resolved, trust.marks)
        sweep_temporaries(corpus.root)
        sweep_reports(corpus.root)
        if fresh:
            remove_cache(corpus.root)
        ledger = Ledger(corpus.root, registry.stages(), memory_limit=settings.engine.driver_memory)
        try:
            ledger.sync(replace_sources=replace_sources)
            ledger.remove_orphans()
            index_tars(corpus.root)
            yield Session(corpus, settings, ledger, command, trust), difference(saved, resolved) if saved else []
        except UserError:
            if saved and resolved != saved and lock_owner(corpus.root, corpus.store) == corpus.lock_owner:
                corpus.save_settings(saved, marks)
            raise
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
    pack: str | None = None,
    display=None,
) -> BuildReport:
    """Ingest `sources` if any, run the named stages, pack if "pack" is among them, publish.

    pack  name of the pack that is packed instead of the main one; assignments to `pack` change its settings
    """
    display = display or Silent()
    report = BuildReport()
    listed: SourceList | None = None
    named_one: Pack | None = None  # instead of the main one
    of_pack = [text for text in assignments if text.lstrip().startswith("pack.")] if pack is not None else []
    assignments = [text for text in assignments if text not in of_pack]

    def check(corpus: Corpus, settings: CorpusSettings) -> None:
        nonlocal listed, named_one
        if pack is not None:
            named_one = named_pack(corpus, pack, settings, of_pack)
        for stage in registry.stages():
            if list(stages) == [stage.name] and stage.is_off(getattr(settings, stage.name)):
                raise UserError(f"{stage.name}.{stage.switch} is null, so the stage is off; --set it to turn it on.")
        if "ingest" in stages and sources:
            listed = read_sources(sources, settings.ingest)
        if not corpus.exists:
            if listed and not (listed.table.num_rows or listed.problems):
                raise UserError(f"SOURCES: {' '.join(sources)}: no source is in there, so {corpus.name} was not made.")
            display.creating(corpus.name)

    with session(
        root, recipe, assignments, command, create="ingest" in stages, check=check, replace_sources=bool(sources)
    ) as opened:
        current, report.changed = opened
        display.settings_changed(report.changed)
        if listed:
            report.ingest = ingest_sources(current, sources, listed)
            display.ingested(report.ingest)
        current.refresh_state()
        display.damaged(current.damaged)
        if "ingest" in stages:
            current.repair_damage(display)
        if redo or where:
            _mark_pending(current, stages, where)
        report.pending_before = current.ledger.counts()
        display.plan(report.pending_before, stages)
        _run_stages(current, stages, report, display)
        _publish_and_pack(current, stages, named_one, report, display, redo=redo)
        current.merge_finished()
        report.failures = current.ledger.standing_failures(current.run_id)
        num_failures = sum(count for _, _, count, _ in current.ledger.standing_failures())
        report.num_old_failures = num_failures - sum(count for _, _, count, _ in report.failures)
        report.without_clips = current.ledger.without_clips()
    return report


def _mark_pending(current: Session, stages: Sequence[str], where: str | None) -> None:
    """Make the items of these stages pending that a condition names, None: all."""
    for stage in (stage for stage in registry.stages() if stage.name in stages):
        if where:
            current.ledger.mark_pending(stage.name, _items_named(current.corpus, stage, where))
            continue
        for volume in current.ledger.volumes():
            current.ledger.show(volume)
            current.ledger.mark_pending(stage.name, current.ledger.items_of(stage.name))
    current.refresh_state()


def _publish_and_pack(
    current: Session, stages: Sequence[str], named_one: Pack | None, report: BuildReport, display, *, redo: bool
) -> None:
    """Publish what the stages have made, pack it, publish where it is, and delete what is not needed any more."""
    packs, root = "pack" in stages, current.corpus.root
    if report.did_something or not is_current(root, current.ledger):
        current.publish()
    forgotten = tombstone_files(root)
    if packs or report.engine.num_done:
        if named_one:
            record_pack(current.corpus, named_one)
        report.pack = pack_corpus(current, display, write=packs, redo=redo and packs, pack=named_one)
        report.pack.num_written += report.engine.num_delivered
    current.refresh_state()
    current.ledger.tidy(clips=packs or bool(report.engine.num_done), sources=not current.settings.download.keep_sources)
    if report.did_something:
        current.record_run(ended=True)
    # An earlier build may have been killed between packing and publishing, or a video may have been forgotten.
    if report.did_something or not is_current(root, current.ledger):
        current.publish()
    if packs and not named_one:
        current.release_clips(display)
    if packs and forgotten == tombstone_files(root):  # else shards may hold a video that was forgotten meanwhile
        with open_manifest(root) as connection:
            note_packed(current.corpus, connection, named_one or Pack(MAIN, current.settings.pack), report.pack)


def _run_stages(current: Session, stages: Sequence[str], report: BuildReport, display) -> None:
    names = [stage.name for stage in registry.stages() if stage.name in stages]
    if not current.ledger.volumes_with_work(names):
        return
    current.trust.require([*names, "engine"])
    current.record_run(ended=False)
    engine = current.engine(stages)
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


def with_defaults(saved: dict) -> dict:
    """Return settings as an earlier version saved them, completed by the defaults of settings that are new since."""
    defaults = resolve(None, None, []).model_dump(mode="json")
    defaults["pack"]["shuffle"] = "corpus"  # as these versions packed: another way would pack everything again
    known = {section: saved.get(section) or {} for section in defaults}
    return saved | {
        section: defaults[section] | values for section, values in known.items() if isinstance(values, dict)
    }


def _with_shuffle(saved: dict | None, recipe: str | None, assignments: list[str]) -> list[str]:
    """Return assignments that keep the `pack.shuffle` of a corpus, unless the recipe or one of them names it.

    A recipe has the default of all settings that it does not name, and this one would pack everything again.
    """
    if not (saved and recipe) or "shuffle" in (load_recipe(RECIPES, recipe).get("pack") or {}):
        return assignments
    return [f"pack.shuffle={saved['pack']['shuffle']}", *assignments]


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
    pack: dict[str, int] | None  # None: unknown, see `problems`
    changed: list[str]
    damaged: list[Problem]  # fragments whose items are pending again
    problems: list[str]  # why something is unknown; with a problem in the settings, `counts` has only done and failed
    writer: str  # the process that is writing the corpus, else ""
    without_clips: list[tuple[str, int, str]]  # as in BuildReport
    untrusted: list[str] = field(default_factory=list)  # settings that are not the user's own


def status(root: str | Path, assignments: list[str]) -> Status:
    """Count the done, pending and failed items of each stage, with the settings as saved or as `--set` makes them.

    It answers whatever is wrong with the saved settings, while another process writes, and in a folder that cannot be
    written. Raises UserError for a folder that is not a corpus and for a wrong `--set`.
    """
    corpus = Corpus(root).require()
    settings, problems = None, []
    try:
        saved = with_defaults(corpus.load_settings())
        settings = resolve(saved, None, assignments)
        trust = trust_in(corpus, settings, assigned(assignments))
        settings = without_foreign_code(settings, trust)
        registry.fingerprints(settings)
        if any(text.startswith("pack.where") for text in assignments):
            check_where(settings.pack, corpus.root)
    except NewerCorpus:
        raise
    except UserError as error:
        if assignments:
            raise
        settings = None
        problems.append(str(error))
    with ExitStack() as stack:
        writer, cache = "", None
        try:
            stack.enter_context(corpus.alone_here())
            stack.enter_context(corpus.files.local_only())
            corpus.files.pull()
        except (UserError, OSError):  # another process is writing, or this one may not: read with a cache elsewhere
            writer = corpus.writer_name()
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clipmill-status-")))
        memory = settings.engine.driver_memory if settings else "1GB"
        ledger = stack.enter_context(closing(Ledger(corpus.root, registry.stages(), memory_limit=memory, cache=cache)))
        for attempt in range(3):
            try:
                ledger.sync()
                break
            except UserError as error:  # a damaged record of sources
                problems.append(str(error))
                return Status(ledger.recorded_counts(), [], [], None, [], [], problems, writer, [])
            except (duckdb.Error, OSError, pa.ArrowException):  # the writer replaced a fragment meanwhile
                if not cache or attempt == 2:
                    raise
        if settings is None:
            return Status(ledger.recorded_counts(), [], [], None, [], [], problems, writer, [])
        current = Session(corpus, settings, ledger, "status", trust)
        current.refresh_state()
        if not cache and (corpus.root / MANIFEST_NAME).exists() and not is_current(corpus.root):
            publish(ledger)  # another version wrote it, so it may lack columns that packing reads
        off = [stage.name for stage in registry.stages() if stage.is_off(getattr(settings, stage.name))]
        pack = None
        try:
            pack = pack_state(current)
        except UserError as error:  # a condition that does not fit, or a manifest of another version
            problems.append(str(error))
        changed = difference(saved, settings.model_dump(mode="json"))
        without, untrusted = ledger.without_clips(), lines(trust.untrusted)
        return Status(
            ledger.counts(),
            off,
            ledger.standing_failures(),
            pack,
            changed,
            current.damaged,
            problems,
            writer,
            without,
            untrusted,
        )


def versions() -> dict[str, str]:
    names = ("clipmill", "av", "duckdb", "open_clip_torch", "pyarrow", "ray", "torch", "transformers")
    names += ("webdataset", "yt-dlp")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


class Silent:
    """A display that shows nothing, for tests and library callers. The command line has `clipmill.cli.display`."""

    def creating(self, corpus: str) -> None: ...
    def settings_changed(self, changed: list[str]) -> None: ...
    def damaged(self, problems: list[Problem]) -> None: ...
    def ingested(self, report: IngestReport) -> None: ...
    def plan(self, counts: dict, stages: Sequence[str]) -> None: ...
    def tick(self, engine: Engine) -> None: ...
    def packing(self, done: int, total: int) -> None: ...
    def released(self, report: ReleaseReport) -> None: ...

    @contextmanager
    def progress(self, engine: Engine, counts: dict) -> Iterator[None]:
        yield


def require_stage(name: str) -> None:
    """Raise UserError unless `clipmill run` knows the stage."""
    known = registry.stage_names()[1:]
    if name not in known:
        raise UserError(f"unknown stage {name!r}; the stages are {', '.join(known)}.")
