"""The pack stage: selected clips → shards, written by Ray tasks and put in place by the driver; indexes get new texts.

Each volume is packed alone: planned, written, put in place (`VolumePacking`). `pack_corpus` does this for all volumes,
with the shards of several of them in flight. It reads the published manifest like any reader, so the caller publishes
before and after.
"""

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from clipmill.base.errors import ItemError, UserError
from clipmill.base.ray_cluster import start_ray
from clipmill.base.settings import Settings, resolve_settings
from pipeline.stages.pack_notes import Note, Pack, PackFiles, Volume, current_notes, save_notes, states_of
from pipeline.stages.stage import DriverStage
from shards.corpus.folder import Corpus
from shards.corpus.fragments import fragment_path, ledger_row, write_commit
from shards.corpus.manifest import empty_manifest, is_current
from shards.corpus.packs import MAIN, check_name, index_files, samples_of
from shards.corpus.released_clips import PackedFile, recorded_volumes
from shards.corpus.schema import LEDGER
from shards.packing.index import read_index, refresh_index
from shards.packing.pack import (
    SHARDS_AT_ONCE,
    PackSettings,
    ShardPlan,
    clips_by_volume,
    commit_shards,
    next_paths,
    pending_shards,
    plan_shards,
    remove_other_names,
    reserved_slots,
    rows_by_shard,
    select_samples,
    volume_batches,
    write_shard,
)
from shards.packing.release import keep_needed
from shards.query.sql import check_selection, open_manifest, rows_of, selection
from shards.storage.local import MANIFEST_NAME
from shards.storage.mirror import files_of, mirror
from shards.storage.s3 import MOST_COPIED_BYTES, Store

PACK = DriverStage("pack", help="clips → shards", settings=PackSettings)
FEW_SHARDS = 2  # written in this process, because starting Ray would take longer
FAILURES = "pack"  # begins the names of the commits that hold the clips that the last packing left out


@dataclass
class PackReport:
    num_shards: int = 0
    num_samples: int = 0
    num_written: int = 0  # shards written or put in place now
    num_refreshed: int = 0  # indexes that got new texts
    seconds: float = 0.0
    failures: list[tuple[str, ItemError]] = field(default_factory=list)
    committed: set[str] = field(default_factory=set)  # names of the shards of all volumes that have changed
    failed: set[Volume] = field(default_factory=set)  # volumes with failures
    planned: dict[Volume, tuple[int, int]] = field(default_factory=dict)  # or noted: volume → its shards and samples

    def add(self, volume: "PackReport") -> None:
        self.num_written += volume.num_written
        self.failures += volume.failures
        self.committed |= volume.committed
        self.failed |= volume.failed


def pack_corpus(session, display, *, write: bool, redo: bool, pack: Pack | None = None) -> PackReport:
    """Bring a pack, by default the main one, up to date with the manifest; without `write` only its indexes' texts.

    `session`: of `pipeline.engine.build`.
    """
    root, started = session.corpus.root, time.perf_counter()
    pack = pack or Pack(MAIN, session.settings.pack)
    report = PackReport()
    with open_manifest(root) as connection:
        session.corpus.files.refresh("shards")
        files = PackFiles.of(root, pack)
        states = states_of(session.corpus, connection, pack, files)
        notes = {} if redo else current_notes(session.corpus, states, pack)
        volumes = [volume for volume in states if volume not in notes]
        report.planned = {volume: (note.num_shards, note.num_samples) for volume, note in notes.items()}
        report.num_shards = sum(note.num_shards for note in notes.values())
        report.num_samples = sum(note.num_samples for note in notes.values())
        if volumes:
            only = [volume for volume in volumes if volume is not None] if pack.has_own_volumes else None
            if write:
                with Writers(session) as writers:
                    _pack_volumes(session, connection, pack, files, only, writers, report, display, redo=redo)
                by_volume = pack.settings.shuffle == "volume"
                keep_needed(session.ledger, lambda f: f.pack != pack.name or ((f.volume is not None) == by_volume))
                report.num_written += remove_other_names(root, pack.settings, pack.name)
                for volume in recorded_volumes(root):
                    session.ledger.relocated(volume)
                _forget_failures_of_other_names(session, pack)
            report.num_refreshed = refresh_indexes(root, connection, pack, only, report.committed)
    report.seconds = time.perf_counter() - started
    return report


def _pack_volumes(
    session,
    connection: duckdb.DuckDBPyConnection,
    pack: Pack,
    files: PackFiles,
    only: Collection[int] | None,
    writers: "Writers",
    report: PackReport,
    display,
    *,
    redo: bool,
) -> None:
    """Pack these volumes, None: all; the shards of one are written while those of the next are planned."""
    waiting: deque[tuple[VolumePacking, Any]] = deque()
    num_done = 0

    def collect() -> None:
        nonlocal num_done
        packing, result = waiting.popleft()
        packing.add(result())
        num_done += 1
        if packing.is_written:
            report.add(packing.commit())

    for volume, plans in planned(session.corpus.root, connection, pack, files, only):
        packing = VolumePacking(session, pack, volume, plans, files=files, redo=redo)
        num_shards, num_samples = report.planned[volume] = _size(plans)
        report.num_shards += num_shards
        report.num_samples += num_samples
        if packing.is_written and packing.has_changed:
            report.add(packing.commit())
        writers.expect(len(packing.todo))
        for task in packing.tasks(connection):
            waiting.append((packing, writers(*task)))
            while len(waiting) > 2 * writers.width:
                collect()
    while waiting:
        collect()
    if num_done:
        display.packing(num_done, num_done)


def _size(plans: Collection[ShardPlan]) -> tuple[int, int]:
    return len(plans), sum(len(plan.clip_ids) for plan in plans)


class VolumePacking:
    """The packing of one volume, in steps, so that a driver can do other work between them.

    Submit `tasks`, hand the result of each to `add`, and call `commit` when `is_written`.

    files  of the pack; None: listed here
    redo   write all shards again, not only those that differ from their plan
    """

    def __init__(
        self,
        session,
        pack: Pack,
        volume: Volume,
        plans: list[ShardPlan],
        *,
        files: PackFiles | None = None,
        redo: bool = False,
    ):
        self.session, self.pack, self.volume, self.plans = session, pack, volume, plans
        root = session.corpus.root
        files = files or PackFiles.of(root, pack)
        self.there = files.placed.get(volume, [])
        self.todo = plans if redo else pending_shards(root, plans, retry_missing=True)
        wanted = {name for plan in plans for name in (plan.name, plan.index_name)}
        self.has_changed = bool(self.todo) or volume in files.next or wanted != set(self.there)
        self.failures: list[tuple[str, ItemError]] = []
        self.num_written = 0

    def tasks(self, connection: duckdb.DuckDBPyConnection) -> Iterator[tuple]:
        """Yield the arguments of `write_task` for each shard to write. Rows are sent to the tasks, media are not."""
        for plan, rows in rows_by_shard(connection, self.todo):
            yield plan, rows, self.session.corpus.root, self.session.corpus.store, self.pack.settings.fsync

    def add(self, failures: list[tuple[str, ItemError]]) -> None:
        self.failures += failures
        self.num_written += 1

    @property
    def is_written(self) -> bool:
        return self.num_written == len(self.todo)

    def commit(self) -> PackReport:
        """Put the shards in place, remove the volume's other ones, and record the clips that were left out."""
        if self.todo:
            self.session.corpus.files.refresh("shards")  # other machines have written them
        # Before the shards that hold the only copy of a clip change:
        keep_needed(self.session.ledger, self._stays, None if self.volume is None else [self.volume])
        self._note_relocation()  # and again below: a kill between leaves no summary with the old places
        num_placed, num_removed = commit_shards(
            self.session.corpus.root,
            self.plans,
            volume=self.volume,
            pack=self.pack.name,
            there=self.there,
            fsync=self.pack.settings.fsync,
        )
        if self.todo or not self.plans:
            _record_failures(self.session, self.pack, self.volume, self.failures)
        self._note_relocation()
        names = {plan.name for plan in self.plans}
        return PackReport(
            num_written=num_placed + num_removed,
            failures=self.failures,
            committed=names,
            failed={self.volume} if self.failures else set(),
            planned={self.volume: _size(self.plans)},
        )

    def _note_relocation(self) -> None:
        for volume in recorded_volumes(self.session.corpus.root):
            if self.volume in (volume, None):
                self.session.ledger.relocated(volume)

    def _stays(self, file: PackedFile) -> bool:
        """Return whether a file is in place after the commit, and has its clips then."""
        if file.pack != self.pack.name:
            return True
        indexes = {next_paths(plan)[1]: plan.index for plan in self.plans}
        root = self.session.corpus.root
        return file.index in {index if not (root / new).exists() else new for new, index in indexes.items()}


def planned(
    root: Path,
    connection: duckdb.DuckDBPyConnection,
    pack: Pack,
    files: PackFiles | None = None,
    volumes: Collection[int] | None = None,
) -> Iterator[tuple[Volume, list[ShardPlan]]]:
    """Yield (volume, the shards that it ought to have), from the manifest; one volume's clips are in memory at a time.

    A volume that has shards but no clips any more comes without shards. A pack that is shuffled over the whole corpus
    is one volume, None.

    volumes  only these
    """
    settings, name = pack.settings, pack.name
    if settings.shuffle == "corpus":
        samples = select_samples(connection, settings)
        yield None, plan_shards(samples, settings, reserved_slots(connection, pack=name), pack=name)
        return
    files = files or PackFiles.of(root, pack)
    counts = {volume: 0 for volume in (*files.placed, *files.next) if volume is not None}
    counts |= clips_by_volume(connection)
    if volumes is not None:
        counts = {volume: counts.get(volume, 0) for volume in volumes}
    for batch in volume_batches(dict(sorted(counts.items()))):
        samples = select_samples(connection, settings, batch)
        for volume in batch:
            some = samples.filter(pc.field("volume") == volume)
            yield volume, plan_shards(some, settings, reserved_slots(connection, volume, name), volume, name)


# -- named packs ------------------------------------------------------------------------------------------------------


class _Section(Settings):
    pack: PackSettings = PackSettings()


def packs_of(corpus: Corpus, settings) -> list[Pack]:
    """Return the main pack and the named ones that the corpus records. `settings`: a `CorpusSettings`."""
    named = [Pack(name, _settings_of(recorded, [])) for name, recorded in sorted(corpus.load_packs().items())]
    return [Pack(MAIN, settings.pack), *named]


def named_pack(corpus: Corpus, name: str, settings, assignments: Sequence[str]) -> Pack:
    """Return a named pack with its recorded settings, changed by `--set pack.…`; a new one has those of the main pack.

    Raises UserError for a wrong name or setting, and a condition that the corpus cannot answer.
    """
    check_name(name)
    pack = Pack(name, _settings_of(corpus.load_packs().get(name) or settings.pack.model_dump(mode="json"), assignments))
    check_shard_bytes(corpus, pack.settings)
    check_where(pack.settings, corpus.root)
    return pack


def _settings_of(recorded: dict, assignments: Sequence[str]) -> PackSettings:
    return resolve_settings(_Section, Path(), {"pack": recorded}, None, list(assignments)).pack


def record_pack(corpus: Corpus, pack: Pack) -> None:
    """Write the settings of a named pack into corpus.yaml, if they differ."""
    recorded = corpus.load_packs()
    content = pack.settings.model_dump(mode="json")
    if recorded.get(pack.name) != content:
        corpus.save_settings(corpus.load_settings(), packs=recorded | {pack.name: content})


def check_shard_bytes(corpus: Corpus, settings: PackSettings) -> None:
    """Raise UserError for shards that a store cannot put in place."""
    if corpus.store and settings.shard_bytes > MOST_COPIED_BYTES:
        raise UserError(
            f"pack.shard_bytes = {settings.shard_bytes}: at most {MOST_COPIED_BYTES} for a corpus in a store, "
            "which puts a shard in place by copying it."
        )


# -- plans ------------------------------------------------------------------------------------------------------------


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


def pack_state(session) -> dict[str, int]:
    """Count the samples that are packed as planned, and those in shards that are to be written or removed."""
    root = session.corpus.root
    counts = {"packed": 0, "to_pack": 0}
    if not (root / MANIFEST_NAME).exists():
        return counts
    pack = Pack(MAIN, session.settings.pack)
    with open_manifest(root) as connection:
        files = PackFiles.of(root, pack)
        states = states_of(session.corpus, connection, pack, files)
        notes = current_notes(session.corpus, states, pack)
        counts["packed"] = sum(note.num_samples for note in notes.values())
        only = [volume for volume in states if volume is not None and volume not in notes]
        if not states.keys() - notes.keys():
            return counts
        for _, plans in planned(root, connection, pack, files, only if pack.has_own_volumes else None):
            todo = {plan.name for plan in pending_shards(root, plans)}
            for plan in plans:
                counts["to_pack" if plan.name in todo else "packed"] += len(plan.clip_ids)
    return counts


def note_packed(corpus: Corpus, connection: duckdb.DuckDBPyConnection, pack: Pack, report: PackReport) -> None:
    """Note that the volumes of this packing are up to date with a manifest, but for those with failures.

    `connection`: of the manifest that it was planned from, or of a later one that differs only in what it has written.
    """
    states = states_of(corpus, connection, pack, PackFiles.of(corpus.root, pack))
    notes = current_notes(corpus, states, pack)
    planned, failed = report.planned, report.failed
    if planned and not pack.has_own_volumes:
        planned, failed = {None: (report.num_shards, report.num_samples)}, {None} if failed else set()
    for volume, (num_shards, num_samples) in planned.items():
        if (state := states.get(volume)) and volume not in failed:
            notes[volume] = Note(state, num_shards, num_samples)
    save_notes(corpus, pack, notes)


class Writers:
    """Write shards in this process while they are few, else as Ray tasks. A context manager, and called for each task.

    `width`: tasks that run at a time, 0 in this process.
    """

    def __init__(self, session):
        self.session, self.ray, self.started, self.width, self.num_here = session, None, False, 0, 0

    def __enter__(self) -> "Writers":
        return self

    def expect(self, num_shards: int) -> None:
        """Start or join Ray if these shards and the earlier ones are more than a few."""
        self.num_here += num_shards
        if self.ray is None and self.num_here > FEW_SHARDS:
            self._start()

    def _start(self) -> None:
        import ray

        self.session.trust.require(["engine"])
        engine = self.session.settings.engine
        allow_open = engine.allow_open_cluster
        self.started = start_ray(engine.address, engine.cpus, setting="engine.address", allow_open=allow_open)
        self.ray = ray
        self.width = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.task = ray.remote(num_cpus=1)(write_task)  # writing again gives the same bytes, so Ray may retry

    def __call__(self, *arguments):
        """Submit a task; return the function that waits for its result."""
        if self.ray is None:
            failures = write_task(*arguments)
            return lambda: failures
        reference = self.task.remote(*arguments)
        return lambda: self.ray.get(reference)

    def __exit__(self, *_):
        if self.started:
            self.ray.shutdown()


def write_task(
    plan: ShardPlan, rows: pa.Table, root: Path, store: Store | None, fsync: bool
) -> list[tuple[str, ItemError]]:
    """Write one shard under `.next`, on any machine; return the clips that were left out, with the reason."""
    if store:
        mirror(root, store)
    return write_shard(plan, rows, root, fsync=fsync).failures


def _record_failures(session, pack: Pack, volume: int | None, failures: list[tuple[str, ItemError]]) -> None:
    """Commit the clips that this packing of a volume left out in place of those of the one before."""
    name = _failures_name(pack.name, volume)
    key = f"{FAILURES} {pack.name}".rstrip()
    rows = [ledger_row("pack", clip_id, key, run_id=session.run_id, error=error) for clip_id, error in failures]
    root = session.corpus.root
    if rows:
        write_commit(root, name, {}, pa.Table.from_pylist(rows, LEDGER), [])
        session.ledger.load([name])
    elif fragment_path(root, "ledger", name).exists():
        session.corpus.files.remove(f"fragments/ledger/{name}.parquet")
        session.ledger.forget([name])


def _failures_name(pack: str, volume: int | None) -> str:
    """Name the commit of a volume's failures. No name of a pack has an underscore."""
    name = FAILURES if volume is None else f"{FAILURES}-{volume:06d}"
    return f"{name}_{pack}" if pack else name


def _forget_failures_of_other_names(session, pack: Pack) -> None:
    """Remove the failures of the packing with the other `pack.shuffle`."""
    ledger = session.corpus.root / "fragments" / "ledger"
    end = f"_{pack.name}" if pack.name else ""
    if pack.settings.shuffle == "corpus":
        names = [path.stem for path in sorted(ledger.glob(f"{FAILURES}-*{end}.parquet"))]
        names = [name for name in names if name.partition("_")[2] == pack.name]
    else:
        names = [_failures_name(pack.name, None)]
    for name in names:
        if fragment_path(session.corpus.root, "ledger", name).exists():
            session.corpus.files.remove(f"fragments/ledger/{name}.parquet")
            session.ledger.forget([name])


# Shards of which a text differs from that of `catalog`. $samples: of the pack, $volumes: a condition.
_OUTDATED = """
    SELECT DISTINCT s.shard FROM $samples s JOIN (FROM catalog WHERE $volumes) c USING (clip_id)
    WHERE (s.subtitle, s.caption, s.captioner, s.caption_score, s.language)
       IS DISTINCT FROM (c.text, c.caption, c.captioner, c.caption_score, c.language)
"""


def refresh_indexes(
    root: Path,
    connection: duckdb.DuckDBPyConnection,
    pack: Pack,
    volumes: Collection[int] | None,
    committed: Collection[str],
) -> int:
    """Write into the indexes the texts that the manifest has now; return how many indexes changed.

    volumes    only of these
    committed  shards of volumes that were packed now, which the manifest does not have; an earlier run may have written
               some of them
    """
    num_changed = 0
    among = "true" if volumes is None else f"coalesce(volume, 0) IN ({', '.join(map(str, volumes)) or 'NULL'})"
    sql = _OUTDATED.replace("$samples", samples_of(pack.name)).replace("$volumes", among)
    outdated = {*rows_of(connection, sql), *committed}
    paths = [path for path in index_files(root, pack.name) if f"{path.stem}.tar" in outdated]
    for start in range(0, len(paths), SHARDS_AT_ONCE):
        some = paths[start : start + SHARDS_AT_ONCE]
        clip_ids = pa.concat_tables([read_index(path).select(["clip_id"]) for path in some])
        connection.register("packed", clip_ids)
        texts = connection.sql(
            "SELECT c.clip_id, c.text AS subtitle, c.caption, c.captioner, c.caption_score, c.language "
            "FROM catalog c SEMI JOIN packed USING (clip_id)"
        ).to_arrow_table()
        connection.unregister("packed")
        for path in some:
            if refresh_index(path, texts):
                files_of(root).upload(str(path.relative_to(root)))
                num_changed += 1
    return num_changed
