"""The ingest stage: source lists → new sources as one commit, and a failure for each line that cannot be read.

It runs in the driver: a list is read once, and only one process may assign sources to units.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipmill.base.credentials import strip_credentials
from clipmill.base.errors import ItemError
from clipmill.base.settings import digest
from pipeline.stages.ingest import private_urls
from pipeline.stages.ingest.added_spans import CHANGED, replaced
from pipeline.stages.ingest.benchmarks.sources import is_benchmark
from pipeline.stages.ingest.ingest import Problem, ingest
from pipeline.stages.ingest.settings import IngestSettings
from pipeline.stages.ingest.source_lists import SourceList
from pipeline.stages.stage import DriverStage
from shards.corpus.fragments import (
    commit_name,
    fragment_path,
    ledger_row,
    outputs_of,
    table_schema,
    write_commit,
)
from shards.corpus.schema import LEDGER
from shards.corpus.tombstones import all_hashes, read_tombstones
from shards.corpus.volume_files import INDEX

INGEST = DriverStage("ingest", help="source lists → sources", settings=IngestSettings)


@dataclass(frozen=True)
class IngestReport:
    num_seen: int
    num_new: int
    num_duplicates: int
    num_problems: int
    splits: list[tuple[str, int, int, int]]  # split, videos, texts, repeated texts: of the new sources of a benchmark
    num_forgotten: int = 0  # left out because they were forgotten with `clipmill forget`
    num_added: int = 0  # rows that add spans or texts to a source of the corpus or of an earlier row
    num_grown: int = 0  # known sources that have more spans or texts than before


def ingest_sources(session, arguments: list[str], listed: SourceList | None = None) -> IngestReport:
    """Read the lists and commit new sources and unreadable lines. `session`: of `pipeline.engine.build`.

    listed: content of the arguments' lists; None: read here.
    """
    columns = "video_id, url, unit, volume, ordinal, split, texts"
    known = session.ledger.connection.sql(f"SELECT {columns} FROM {INDEX}.all_sources").to_arrow_table()
    forgotten = all_hashes(read_tombstones(session.corpus.root))
    known_rows = partial(_known_rows, session.ledger)
    found = ingest(arguments, session.settings.ingest, known, forgotten, listed, known_rows)
    root, names = session.corpus.root, []
    refreshed = private_urls.save(found.private)  # first: without them the sources could not be downloaded
    session.ledger.mark_pending("download", _failed_downloads(session, refreshed))
    for volume in pc.unique(found.table["volume"]).to_pylist():
        names.append(_commit_sources(session, found.table.filter(pc.equal(found.table["volume"], volume))))
    names += _commit_problems(session, arguments, found.problems)
    session.ledger.load(names)
    num_grown = 0
    if found.grown is not None and found.grown.num_rows:
        num_grown = found.grown.num_rows
        _commit_grown(session, found.grown)
    assert (root / "fragments").is_dir()
    num_new, num_problems = found.table.num_rows, len(found.problems)
    return IngestReport(
        found.num_seen,
        num_new,
        found.num_duplicates,
        num_problems,
        found.splits(),
        found.num_forgotten,
        found.num_added,
        num_grown,
    )


def _known_rows(ledger, video_ids: list[str]) -> pa.Table:
    """Return the rows of `sources` of these videos, in this order, each with the name of its commit as `fragment`."""
    ledger.connection.register("named", pa.table({"video_id": video_ids, "position": list(range(len(video_ids)))}))
    rows = ledger.connection.sql(
        f"SELECT s.* FROM {INDEX}.all_sources s JOIN named USING (video_id) "
        "QUALIFY row_number() OVER (PARTITION BY video_id ORDER BY s.ordinal, s.fragment) = 1 ORDER BY position"
    ).to_arrow_table()
    ledger.connection.unregister("named")
    return rows


def _commit_grown(session, grown: pa.Table) -> None:
    """Write the commits of known sources again with their new spans and texts, each in place of the earlier one."""
    root, schema = session.corpus.root, table_schema("sources")
    for fragment in pc.unique(grown["fragment"]).to_pylist():
        new = grown.filter(pc.equal(grown["fragment"], fragment))
        keys = [f"ingested {digest(row)}" for row in new.select(CHANGED.names).to_pylist()]
        new = new.set_column(new.column_names.index("key"), "key", pa.array(keys, pa.string()))
        data = pq.read_table(fragment_path(root, "sources", fragment))
        data = pa.concat_tables([schema.empty_table(), data], promote_options="default").select(schema.names)
        indices = pc.index_in(new["video_id"], data["video_id"]).to_pylist()
        data = replaced(data, indices, new.select([*CHANGED.names, "key"]))
        items = zip(data["item_id"].to_pylist(), data["key"].to_pylist(), strict=True)
        name = commit_name("ingest", data["unit"][0].as_py(), items)
        path = fragment_path(root, "ledger", fragment)
        outputs, [row] = outputs_of(path), pq.read_table(path).to_pylist()
        ledger = pa.Table.from_pylist([{**row, "item_id": name}], LEDGER)
        write_commit(root, name, {"sources": data}, ledger, [], replaces=fragment)
        # Before the cache loads the new commit: the next `sync` removes what a commit replaces when it loads that.
        session.corpus.files.remove(str(path.relative_to(root)))
        session.corpus.files.remove(*outputs)
        session.ledger.forget([fragment])
        session.ledger.load([name])


def _failed_downloads(session, video_ids: list[str]) -> list[str]:
    """Return those whose download failed: with another password or signature it is tried again."""
    failed: set[str] = set()
    for volume in session.ledger.volumes_of(video_ids):
        session.ledger.activate(volume)
        rows = session.ledger.connection.execute(
            "SELECT DISTINCT item_id FROM ledger WHERE stage = 'download' AND status = 'failed' "
            "AND item_id NOT IN (SELECT video_id FROM downloads)"
        ).fetchall()
        failed |= {item_id for (item_id,) in rows}
    return sorted(failed & set(video_ids))


def _commit_sources(session, table: pa.Table) -> str:
    """Commit new sources of one volume."""
    ids, units = table["video_id"].combine_chunks(), table["unit"].combine_chunks()
    keys = pa.array(["ingested"] * len(ids), pa.string())
    columns = {"item_id": ids, "unit": units, "key": keys}
    schema = table_schema("sources")
    data = pa.table(
        [columns.get(f.name, table[f.name] if f.name in table.column_names else None) for f in schema], schema
    )
    name = commit_name("ingest", units[0].as_py(), zip(ids.to_pylist(), ["ingested"] * len(ids), strict=True))
    row = ledger_row("ingest", name, "ingested", run_id=session.run_id, num_rows=len(ids))
    write_commit(
        session.corpus.root, name, {"sources": data}, pa.Table.from_pylist([row], LEDGER), [], fsync=_fsync(session)
    )
    return name


def _commit_problems(session, arguments: list[str], problems: list[Problem]) -> list[str]:
    """Commit the problems of these arguments, replacing earlier ones of the same arguments."""
    name = f"ingest-problems-{digest([_absolute(argument) for argument in arguments])}"
    rows = []
    for problem in problems:
        error = ItemError(problem.error_class, problem.message)
        location = strip_credentials(problem.location)
        rows.append(ledger_row("ingest", location, name, run_id=session.run_id, error=error))
    session.ledger.activate(0)  # which has the rows without a unit
    known = session.ledger.connection.execute(
        "SELECT item_id, error_class, message FROM ledger WHERE fragment = ? ORDER BY ALL", [name]
    ).fetchall()
    if known == sorted((row["item_id"], row["error_class"], row["message"]) for row in rows):
        return []
    if rows:
        write_commit(session.corpus.root, name, {}, pa.Table.from_pylist(rows, LEDGER), [], fsync=_fsync(session))
        return [name]
    session.corpus.files.remove(f"fragments/ledger/{name}.parquet")
    session.ledger.forget([name])
    return []


def _fsync(session) -> bool:
    return session.settings.engine.fsync and session.corpus.store is None


def _absolute(argument: str) -> str:
    if is_benchmark(argument):
        name, _, folder = argument.partition(":")
        return f"{name}:{Path(folder).absolute()}"
    return argument if "://" in argument or argument == "-" else str(Path(argument).absolute())
