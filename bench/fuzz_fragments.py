"""Fuzz the files of tables with flipped, moved, repeated and removed bytes: `python -m bench.fuzz --target fragments`.

Each case is a pure function of (seed, number). A sealed file must be refused as damaged, or read as it was written if
only the mark of its seal is damaged. A file of an earlier version, without seal, may be read or refused. Anything else
is a finding: an exception of another class, or a table out of a sealed file that is not as it was written.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq

from shards.corpus.schema import TABLES
from shards.storage.sealed_parquet import DamagedFile, check_parquet, read_parquet, write_parquet

NUM_ROWS = 40


def make_tables(rng: random.Random) -> dict[str, pa.Table]:
    """Return a table of random values, a third of them null, for each table of a corpus."""
    return {
        name: pa.table({field.name: [_value(field.type, rng) for _ in range(NUM_ROWS)] for field in schema}, schema)
        for name, schema in TABLES.items()
    }


def _value(type: pa.DataType, rng: random.Random):
    if rng.random() < 1 / 3:
        return None
    if pa.types.is_list(type):
        return [_value(type.value_type, rng) for _ in range(rng.randrange(3))]
    if pa.types.is_struct(type):
        return {field.name: _value(field.type, rng) for field in type}
    if pa.types.is_string(type):
        return rng.choice(["", "white", "a man rides a horse", "é" * rng.randrange(40), f"{rng.random()}"])
    if pa.types.is_boolean(type):
        return rng.random() < 0.5
    return rng.random() if pa.types.is_floating(type) else rng.randrange(1000)


def fuzz_fragments(seed: int, numbers: Iterator[int], tally, mutate: Callable[[bytes, random.Random], bytes]) -> None:
    """Damage one file per case and read it; record outcomes and findings in `tally`, a `bench.fuzz.Tally`."""
    tables = make_tables(random.Random(seed))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "fragment.parquet"
        for number in numbers:
            rng = random.Random(f"{seed} {number}")
            name, is_sealed = rng.choice(sorted(tables)), rng.random() < 0.8
            if is_sealed:
                write_parquet(path, tables[name])
            else:
                pq.write_table(tables[name], path, compression="zstd")
            path.write_bytes(mutate(path.read_bytes(), rng))
            tally.num_cases += 1
            step = "sealed" if is_sealed else "unsealed"
            try:
                check_parquet(path, TABLES[name])
                table = read_parquet(path)
            except DamagedFile:
                tally.outcomes[step, "damaged"] += 1
            except Exception as error:
                tally.findings.append(f"{number}: {name}, {step}: {type(error).__name__}: {error}")
            else:
                tally.outcomes[step, "read"] += 1
                if is_sealed and not table.equals(tables[name]):
                    tally.findings.append(f"{number}: {name}: a damaged file is read as another table")
