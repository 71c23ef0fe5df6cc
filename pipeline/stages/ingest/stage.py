"""The ingest stage: source lists → new sources as one commit, and a failure for each line that cannot be read.

It runs in the driver: a list is read once, and only one process may assign sources to units.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from clipmill.base.credentials import strip_credentials
from clipmill.base.errors import ItemError
from clipmill.base.settings import digest
from pipeline.stages.ingest import private_urls
from pipeline.stages.ingest.benchmarks.sources import is_benchmark
from pipeline.stages.ingest.ingest import Ingested, Problem, ingest
from pipeline.stages.ingest.settings import IngestSettings
from pipeline.stages.stage import DriverStage
from shards.corpus.fragments import commit_name, ledger_row, table_schema, write_commit
from shards.corpus.schema import LEDGER
from shards.corpus.tombstones import read_tombstones

INGEST = DriverStage("ingest", help="source lists → sources", settings=IngestSettings)


@dataclass(frozen=True)
class IngestReport:
    num_seen: int
    num_new: int
    num_duplicates: int
    num_problems: int
    splits: list[tuple[str, int, int, int]]  # split, videos, texts, repeated texts: of the new sources of a benchmark
    num_forgotten: int = 0  # left out because they were forgotten with `clipmill forget`


def ingest_sources(session, arguments: list[str]) -> IngestReport:
    """Read the lists and commit new sources and unreadable lines. `session`: of `pipeline.engine.build`."""
    columns = "video_id, url, unit, ordinal, split, texts"
    known = session.ledger.connection.sql(f"SELECT {columns} FROM sources").to_arrow_table()
    tombstones = read_tombstones(session.corpus.root)
    forgotten = {*tombstones["video_hash"].to_pylist(), *tombstones["url_hash"].to_pylist()}
    found = ingest(arguments, session.settings.ingest, known, forgotten)
    root, names = session.corpus.root, []
    refreshed = private_urls.save(found.private)  # first: without them the sources could not be downloaded
    session.ledger.mark_pending("download", _failed_downloads(session, refreshed))
    if found.table.num_rows:
        names.append(_commit_sources(session, found))
    names += _commit_problems(session, arguments, found.problems)
    session.ledger.load(names)
    assert (root / "fragments").is_dir()
    num_new, num_problems = found.table.num_rows, len(found.problems)
    return IngestReport(
        found.num_seen, num_new, found.num_duplicates, num_problems, found.splits(), found.num_forgotten
    )


def _failed_downloads(session, video_ids: list[str]) -> list[str]:
    """Return those whose download failed: with another password or signature it is tried again."""
    failed = session.ledger.connection.execute(
        "SELECT DISTINCT item_id FROM ledger WHERE stage = 'download' AND status = 'failed' "
        "AND item_id NOT IN (SELECT video_id FROM downloads)"
    ).fetchall()
    return sorted({item_id for (item_id,) in failed} & set(video_ids))


def _commit_sources(session, found: Ingested) -> str:
    table = found.table
    ids, units = table["video_id"].combine_chunks(), table["unit"].combine_chunks()
    keys = pa.array(["ingested"] * len(ids), pa.string())
    columns = {"item_id": ids, "unit": units, "key": keys}
    schema = table_schema("sources")
    data = pa.table(
        [columns.get(f.name, table[f.name] if f.name in table.column_names else None) for f in schema], schema
    )
    name = commit_name("ingest", units[0].as_py(), zip(ids.to_pylist(), ["ingested"] * len(ids), strict=True))
    row = ledger_row("ingest", name, "ingested", run_id=session.run_id, num_rows=len(ids))
    write_commit(session.corpus.root, name, {"sources": data}, pa.Table.from_pylist([row], LEDGER), [])
    return name


def _commit_problems(session, arguments: list[str], problems: list[Problem]) -> list[str]:
    """Commit the problems of these arguments, replacing earlier ones of the same arguments."""
    name = f"ingest-problems-{digest([_absolute(argument) for argument in arguments])}"
    rows = []
    for problem in problems:
        error = ItemError(problem.error_class, problem.message)
        location = strip_credentials(problem.location)
        rows.append(ledger_row("ingest", location, name, run_id=session.run_id, error=error))
    known = session.ledger.connection.execute(
        "SELECT item_id, error_class, message FROM ledger WHERE fragment = ? ORDER BY ALL", [name]
    ).fetchall()
    if known == sorted((row["item_id"], row["error_class"], row["message"]) for row in rows):
        return []
    if rows:
        write_commit(session.corpus.root, name, {}, pa.Table.from_pylist(rows, LEDGER), [])
        return [name]
    session.corpus.files.remove(f"fragments/ledger/{name}.parquet")
    session.ledger.forget([name])
    return []


def _absolute(argument: str) -> str:
    if is_benchmark(argument):
        name, _, folder = argument.partition(":")
        return f"{name}:{Path(folder).absolute()}"
    return argument if "://" in argument or argument == "-" else str(Path(argument).absolute())
