"""Measure the share of a build's CPU that hashing, checking and sandboxing cost.

    python -m bench.safety_cost                        the benchmark set (`bench.media`), 3 rounds (over 12 minutes)
    python -m bench.safety_cost --parts                each part taken out alone, too
    python -m bench.safety_cost --duration 40 --rounds 2

gate           all of it together < 5 % of the build's CPU
informational  each part alone

Builds with and without these parts alternate (A B A B); the two builds of a round are compared, and the median of the
rounds counts. `bench.without_safety` removes the parts, which no setting of the product can. CPU is that of all
processes (`bench.tree_cpu`). Not measured: the address guard and the limits of downloads, which wait for the network
and hash data as they arrive (the set lies on this disk).

Traps: starting Ray and the models is most of a short set's CPU (some 35 s of 40 at `--duration 60`), whose variation
then hides the difference. Without a sandbox, Ray's worker decodes; it starts no further interpreter but imports the
same modules, so the figure may fall below zero where little is cut.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import duckdb

from bench.build import _clean_build, _spread, _verdict, sources_of_set
from bench.tree_cpu import Cost
from bench.without_safety import PARTS, VARIABLE

MOST = 0.05
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=float, default=185.0, help="seconds of each of the three videos")
    parser.add_argument("--footage", type=Path, help="folder of real videos to make the set from")
    parser.add_argument("--parts", action="store_true", help="remove each part alone, too")
    arguments = parser.parse_args()
    ways = {"as it is": (), "without": PARTS}
    ways |= {f"without {part}": (part,) for part in PARTS if arguments.parts}
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as scratch:
        costs = _measure(Path(scratch), ways, arguments)
    sys.exit(_report(costs))


def _measure(scratch: Path, ways: dict[str, tuple[str, ...]], arguments: argparse.Namespace) -> dict[str, list[Cost]]:
    """Build in all ways, alternating them; return costs by way."""
    sources = sources_of_set(scratch, arguments.footage, arguments.duration)
    (scratch / "site").mkdir()
    (scratch / "site" / "sitecustomize.py").write_text("import bench.without_safety\n")
    environment = {"PYTHONPATH": f"{scratch / 'site'}:{ROOT}"}
    costs: dict[str, list[Cost]] = {way: [] for way in ways}
    made: dict[str, tuple] = {}
    for _ in range(arguments.rounds):
        for way, parts in ways.items():
            corpus = scratch / "corpus"
            costs[way].append(_clean_build(sources, corpus, environment=environment | {VARIABLE: ",".join(parts)}))
            made[way] = _what_was_made(corpus)
    assert len({counts for counts, _ in made.values()}) == 1, f"the ways made different corpora: {made}"
    assert made["without"][1] != made["as it is"][1], "hashing was not removed: the hashes are the same"
    return costs


def _what_was_made(corpus: Path) -> tuple[tuple[int, ...], str]:
    """Return the numbers of rows, and the hash of a clip."""
    with duckdb.connect(str(corpus / "manifest.duckdb"), read_only=True) as connection:
        tables = ("clips", "captions", "scores", "samples", "failures")
        counts = tuple(connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0] for table in tables)
        return counts, connection.execute("SELECT min(sha256) FROM clips").fetchall()[0][0]


def _report(costs: dict[str, list[Cost]]) -> int:
    """Print the table and the gate; return the exit code."""
    whole = [cost.cpu_s for cost in costs["as it is"]]
    print("| way | CPU-s | wall s | share of what is left out |\n| --- | --- | --- | --- |")
    shares = {}
    for way, measured in costs.items():
        cpu_s = [cost.cpu_s for cost in measured]
        shares[way] = statistics.median(1 - without / with_ for with_, without in zip(whole, cpu_s, strict=True))
        print(f"| {way} | {_spread(cpu_s)} | {_spread([cost.wall_s for cost in measured])} | {shares[way]:.1%} |")
    passed = shares["without"] < MOST
    print(f"\ngate {_verdict(passed)}: hashing, checking and safety are {shares['without']:.1%} (below {MOST:.0%})")
    return not passed


if __name__ == "__main__":
    main()
