"""Compare two corpora: shards by their bytes, tables row by row, failures by item and class; find orphan files."""

import hashlib
from pathlib import Path

import duckdb

from shards.corpus.merged import merged_volumes, read_head

TABLES = ("videos", "sentences", "spans", "clips", "texts", "captions", "scores", "samples")
# The place of media before packing depends on how work was divided into tasks, which a fault changes.
PLACES = {"clips": ("tar", "mp4_offset", "frames")}
OWNED = ("transcripts", "sentences", "spans", "clips", "captions", "scores")
TEMPORARY = (".tmp-", ".next", ".part")


def differences(one: Path, other: Path) -> list[str]:
    """Describe the differences; empty where there is none."""
    ours, theirs = _hashes(one), _hashes(other)
    found = [f"shard {name}" for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    with _open(one) as ours, _open(other) as theirs:
        for table in TABLES:
            without = PLACES.get(table)
            columns = f"* EXCLUDE ({', '.join(without)})" if without else "*"
            rows = [set(map(str, c.execute(f"SELECT {columns} FROM {table}").fetchall())) for c in (ours, theirs)]
            if rows[0] != rows[1]:
                sample = sorted(rows[0] ^ rows[1])[0]
                found.append(
                    f"table {table}: {len(rows[0] - rows[1])} and {len(rows[1] - rows[0])} rows, e.g. {sample}"
                )
        failures = "SELECT stage, item_id, error_class FROM failures ORDER BY ALL"
        rows = [set(c.execute(failures).fetchall()) for c in (ours, theirs)]
        found += [f"failure {row}" for row in sorted(rows[0] ^ rows[1])]
    return found


def orphans(corpus: Path) -> list[str]:
    """Return temporary files, and fragments and clips that no commit names."""
    files = [path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file()]
    files = [path for path in files if ".clipmill" not in path.parts]
    owners = {path.stem for path in (corpus / "fragments" / "ledger").glob("*.parquet")}
    for volume in merged_volumes(corpus):
        head = read_head(corpus, volume)
        owners |= {*head.commits, *(Path(relative).stem for relative in head.files)}
    left = [path for path in files if any(mark in path.name for mark in TEMPORARY)]
    left += [path for path in files if path.parts[0] == "clips" and path.stem not in owners and path not in left]
    owned = [path for path in files if path.parts[0] == "fragments" and path.parts[1] in OWNED and path not in left]
    return sorted(str(path) for path in [*left, *(path for path in owned if path.stem not in owners)])


def _hashes(corpus: Path) -> dict[str, str]:
    """Return the hashes of shards and indexes by name; the same rows make the same index file."""
    files = sorted(path for path in (corpus / "shards").glob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _open(corpus: Path) -> duckdb.DuckDBPyConnection:
    return duckdb.connect(str(corpus / "manifest.duckdb"), read_only=True)
