"""Time the ten queries of docs/queries.sql on a manifest of a million clips; the gate is a second for each.

    python -m bench.sql [--clips 1000000] [--manifest FILE] [--rounds 3]

The fastest of the rounds counts: the first one also reads the file, and other work on the machine only adds time. CPU
seconds are those of all threads; where they are below the wall seconds, the machine was busy. Exit code 1 when a query
misses the gate. Traps: fetching rows is included, opening the file is not (it has its own line); `text` is drawn from
16 words, while real text is longer and compresses worse.
"""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

from shards.query.sql import open_manifest
from tests.helpers.manifests import make_manifest

GATE_S = 1.0
QUERIES = Path(__file__).resolve().parents[1] / "docs" / "queries.sql"


def read_queries(path: Path = QUERIES) -> list[tuple[str, str]]:
    """Return (title, SQL) of every query in the file; a comment that begins with a number is the title."""
    blocks = re.split(r"^-- (?=\d+\. )", path.read_text(), flags=re.MULTILINE)[1:]
    return [(title, sql.strip().rstrip(";")) for title, sql in (block.split("\n", 1) for block in blocks)]


def measure(manifest: Path, rounds: int) -> list[tuple[str, float, int]]:
    """Time every query; return title, wall seconds and rows."""
    results = []
    start = time.perf_counter()
    connection = open_manifest(manifest)
    print(f"informational: opening took {time.perf_counter() - start:.3f} s")
    for title, sql in read_queries():
        times = []
        for _ in range(rounds):
            start, cpu = time.perf_counter(), time.process_time()
            rows = connection.execute(sql).fetchall()
            times.append((time.perf_counter() - start, time.process_time() - cpu))
        wall_s, cpu_s = min(times)
        results.append((title, wall_s, len(rows)))
        print(f"{wall_s:7.3f} s  {cpu_s:7.3f} CPU-s  {len(rows):5,} rows  {title}", flush=True)
    connection.close()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--manifest", type=Path, help="an existing manifest instead of a synthetic one")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = options.manifest or make_manifest(Path(folder) / "manifest.duckdb", options.clips)
        results = measure(manifest, options.rounds)
    slow = [title for title, seconds, _ in results if seconds >= GATE_S]
    print(f"gate {'missed by ' + str(slow) if slow else 'met'}: all under {GATE_S:g} s")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
