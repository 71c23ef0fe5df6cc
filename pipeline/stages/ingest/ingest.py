"""Ingest: source lists → rows of `sources`, each with a unit that never changes.

The result is a pure function of the lists and of the sources that the corpus already has.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from clipmill.base.errors import UserError
from pipeline.stages.ingest.settings import IngestSettings
from pipeline.stages.ingest.source_lists import Problem, read_sources
from shards.corpus.schema import TABLES
from shards.corpus.source_ids import canonical_urls, source_spellings, video_ids
from shards.corpus.tombstones import is_forgotten

UNIT = pa.string()


@dataclass(frozen=True)
class Ingested:
    """New sources of the lists, in the order of first occurrence. `table` has the columns of `sources` and `unit`."""

    table: pa.Table
    problems: list[Problem]
    num_seen: int  # valid rows of the lists
    num_duplicates: int  # rows among these whose source is in the corpus, or earlier in the lists
    num_forgotten: int = 0  # rows among these whose source was forgotten with `clipmill forget`

    def splits(self) -> list[tuple[str, int, int, int]]:
        """Count (split, videos, texts, texts that equal another of the split) of a benchmark's new sources."""
        videos: Counter[str] = Counter()
        texts: dict[str, Counter[str]] = {}
        for split, given in zip(self.table["split"].to_pylist(), self.table["texts"].to_pylist(), strict=True):
            if split is not None:
                videos[split] += 1
                texts.setdefault(split, Counter()).update(entry["text"] for entry in given or ())
        repeated = {split: sum(times for times in found.values() if times > 1) for split, found in texts.items()}
        return [(split, videos[split], found.total(), repeated[split]) for split, found in texts.items()]


def ingest(
    arguments: list[str], settings: IngestSettings, known: pa.Table, forgotten: Collection[str] = ()
) -> Ingested:
    """Return the sources in the arguments' lists that are not in `known`.

    known      the corpus's sources: video_id, url, unit, ordinal, split, texts
    forgotten  SHA-256 of spellings of URLs and of ids to leave out; such rows are counted and not reported

    Rows with the same canonical URL are one source; the first wins. An id that another URL has is a problem
    "duplicate-id"; the first wins as well. Raises UserError as `read_sources` does, and for a known source with another
    split or other reference texts.
    """
    listed = read_sources(arguments, settings)
    table, num_forgotten = _without(listed.table.combine_chunks(), forgotten)
    canonical = _array(table, "canonical")
    ids = video_ids(canonical, pc.coalesce(_array(table, "video_id"), _array(table, "source_id")))
    _require_same_references(canonical.to_pylist(), table, known)
    new, clashes = _new_rows(canonical.to_pylist(), ids.to_pylist(), known)
    problems = listed.problems + [
        Problem(
            table["location"][row].as_py(),
            "duplicate-id",
            f"the id {ids[row]} belongs to another URL; {table['url'][row]} is left out, give it another id",
        )
        for row in clashes
    ]
    rows = pa.array(new, pa.int64())
    picked = table.drop_columns("video_id").take(rows).append_column("video_id", [ids.take(rows)])
    sources = _with_units(picked, settings.unit_videos, known)
    num_duplicates = table.num_rows - len(new) - len(clashes)
    return Ingested(sources, problems, table.num_rows + num_forgotten, num_duplicates, num_forgotten)


def _without(table: pa.Table, forgotten: Collection[str]) -> tuple[pa.Table, int]:
    """Return (the rows that are not forgotten, number of forgotten rows)."""
    if not forgotten:
        return table, 0
    canonical = _array(table, "canonical")
    ids = video_ids(canonical, pc.coalesce(_array(table, "video_id"), _array(table, "source_id")))
    pairs = zip(canonical.to_pylist(), ids.to_pylist(), strict=True)
    stays = [not is_forgotten([video_id, *source_spellings(url)], forgotten) for url, video_id in pairs]
    return table.filter(pa.array(stays, pa.bool_())), stays.count(False)


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table[name].combine_chunks()
    return column if isinstance(column, pa.Array) else pa.array([], column.type)


def _new_rows(canonical: list[str], ids: list[str], known: pa.Table) -> tuple[list[int], list[int]]:
    """Return (indices of new rows, indices of rows whose id belongs to another URL), in order."""
    has_known = known.num_rows > 0
    seen_urls = set(canonical_urls(_array(known, "url")).to_pylist()) if has_known else set()
    seen_ids = set(known["video_id"].to_pylist()) if has_known else set()
    new, clashes = [], []
    for row, (url, video_id) in enumerate(zip(canonical, ids, strict=True)):
        if url in seen_urls:
            continue
        seen_urls.add(url)
        if video_id in seen_ids:
            clashes.append(row)
            continue
        seen_ids.add(video_id)
        new.append(row)
    return new, clashes


def _require_same_references(canonical: list[str], table: pa.Table, known: pa.Table) -> None:
    """Raise UserError for a row that gives a known source another split or other texts. A row may leave both out."""
    if table["split"].null_count == table["texts"].null_count == table.num_rows:
        return
    references: dict[str, tuple] = {}
    if known.num_rows:
        given = zip(known["split"].to_pylist(), known["texts"].to_pylist(), strict=True)
        references = dict(zip(canonical_urls(_array(known, "url")).to_pylist(), given, strict=True))
    rows = zip(canonical, table["split"].to_pylist(), table["texts"].to_pylist(), table["location"], strict=True)
    for url, split, texts, location in rows:
        before = references.setdefault(url, (split, texts))
        if (split, texts) not in ((None, None), before):
            raise UserError(
                f"SOURCES: {location}: {url} has "
                + (f"split {split}, but split {before[0]}" if before[0] != split else "other reference texts than")
                + " in the corpus or earlier in the lists. A corpus holds one version of a benchmark: "
                "build this one in a corpus of its own."
            )


def _with_units(picked: pa.Table, unit_videos: int, known: pa.Table) -> pa.Table:
    """Add ordinals and units after the largest known ones; return the columns of `sources`."""
    next_ordinal, next_unit = 0, 0
    if known.num_rows:
        next_ordinal = pc.max(known["ordinal"]).as_py() + 1
        numbers = pc.cast(pc.utf8_slice_codeunits(known["unit"], 1), pa.int64())
        next_unit = pc.max(numbers).as_py() + 1
    count = picked.num_rows
    units = [f"u{next_unit + row // unit_videos:06d}" for row in range(count)]
    picked = picked.append_column("ordinal", [pa.array(range(next_ordinal, next_ordinal + count), pa.int64())])
    schema = TABLES["sources"].append(pa.field("unit", UNIT))
    picked = picked.append_column("unit", [pa.array(units, UNIT)])
    return picked.select(schema.names).cast(schema)
