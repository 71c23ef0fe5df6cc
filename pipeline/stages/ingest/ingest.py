"""Ingest: source lists → rows of `sources`, each with a unit that never changes.

The result is a pure function of the lists and of the sources that the corpus already has.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from clipmill.base.credentials import REMOVED, strip_credentials, strip_url_credentials
from clipmill.base.errors import UserError
from pipeline.stages.ingest.private_urls import PrivateUrl
from pipeline.stages.ingest.settings import IngestSettings
from pipeline.stages.ingest.source_lists import Problem, read_sources
from shards.corpus.schema import TABLES
from shards.corpus.source_ids import canonical_urls, video_ids
from shards.corpus.tombstones import hash_of

UNIT = pa.string()


@dataclass(frozen=True)
class Ingested:
    """New sources of the lists, in the order of first occurrence. `table` has the columns of `sources` and `unit`."""

    table: pa.Table
    problems: list[Problem]
    num_seen: int  # valid rows of the lists
    num_duplicates: int  # rows among these whose source is in the corpus, or earlier in the lists
    num_forgotten: int = 0  # rows among these whose source was forgotten with `clipmill forget`
    private: tuple[PrivateUrl, ...] = ()  # full URLs of all rows, new or known, whose URL has a password or signature

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
    forgotten  SHA-256 of canonical URLs and ids to leave out; such rows are counted and not reported

    Rows with the same canonical URL are one source; the first wins. An id that another URL has is a problem
    "duplicate-id"; the first wins as well. Raises UserError as `read_sources` does, and for a known source with another
    split or other reference texts.
    """
    listed = read_sources(arguments, settings)
    table, num_forgotten = _without(listed.table.combine_chunks(), forgotten)
    canonical = _array(table, "canonical")
    ids = video_ids(canonical, pc.coalesce(_array(table, "video_id"), _array(table, "source_id")))
    _require_same_references(canonical.to_pylist(), table, known)
    given = table  # with credentials
    table = _without_credentials(table)
    new, clashes = _new_rows(canonical.to_pylist(), ids.to_pylist(), table, known)
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
    private = tuple(_private(given, table, ids, clashes, known))
    return Ingested(sources, problems, table.num_rows + num_forgotten, num_duplicates, num_forgotten, private)


def _without_credentials(table: pa.Table) -> pa.Table:
    """Return the rows as the corpus shows them. Ids are made from the full URLs before, as they always were."""
    for name in ("url", "subtitle", "source_id", "title", "extra"):
        column = table[name].to_pylist()
        strip = strip_credentials if name == "extra" else strip_url_credentials
        shown = [value and strip(value) for value in column]
        if shown != column:
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), [shown])
    return table


def _private(
    given: pa.Table, shown: pa.Table, ids: pa.Array, clashes: Collection[int], known: pa.Table
) -> Iterator[PrivateUrl]:
    """Yield the full URLs that the corpus does not show.

    A known video's own `url` in the corpus counts: a newly signed URL has another date beside its signature.
    """
    in_corpus = (
        dict(zip(known["video_id"].to_pylist(), known["url"].to_pylist(), strict=True)) if known.num_rows else {}
    )
    skipped = set(clashes)
    for name in ("url", "subtitle"):
        for row, (full, short) in enumerate(zip(given[name].to_pylist(), shown[name].to_pylist(), strict=True)):
            if full != short and row not in skipped:
                video_id = ids[row].as_py()
                known_as = in_corpus.get(video_id, short) if name == "url" else short
                yield PrivateUrl(video_id, known_as, full)


def _without(table: pa.Table, forgotten: Collection[str]) -> tuple[pa.Table, int]:
    """Return (the rows that are not forgotten, number of forgotten rows)."""
    forgotten = set(forgotten)
    if not forgotten:
        return table, 0
    canonical = _array(table, "canonical")
    ids = video_ids(canonical, pc.coalesce(_array(table, "video_id"), _array(table, "source_id")))
    pairs = zip(canonical.to_pylist(), ids.to_pylist(), strict=True)
    stays = [
        forgotten.isdisjoint({hash_of(url), hash_of(strip_url_credentials(url)), hash_of(video_id)})
        for url, video_id in pairs
    ]
    return table.filter(pa.array(stays, pa.bool_())), stays.count(False)


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table[name].combine_chunks()
    return column if isinstance(column, pa.Array) else pa.array([], column.type)


def _new_rows(canonical: list[str], ids: list[str], shown: pa.Table, known: pa.Table) -> tuple[list[int], list[int]]:
    """Return (indices of new rows, indices of rows whose id belongs to another URL), in order.

    canonical  of the full URLs
    shown      the rows without credentials: with the same id, a URL is known whatever its password or signature is
    """
    has_known = known.num_rows > 0
    seen_urls = set(canonical_urls(_array(known, "url")).to_pylist()) if has_known else set()
    seen_ids = dict(zip(known["video_id"].to_pylist(), known["url"].to_pylist(), strict=True)) if has_known else {}
    new, clashes = [], []
    for row, (url, video_id, address) in enumerate(zip(canonical, ids, shown["url"].to_pylist(), strict=True)):
        if url in seen_urls:
            continue
        if REMOVED in address and video_id in seen_ids and _place(seen_ids[video_id]) == _place(address):
            continue
        seen_urls.add(url)
        if video_id in seen_ids:
            clashes.append(row)
            continue
        seen_ids[video_id] = address
        new.append(row)
    return new, clashes


def _place(url: str) -> str:
    """Return scheme, host and path of a URL, which stay when it is signed anew."""
    return strip_url_credentials(url).replace(f"{REMOVED}@", "").partition("?")[0]


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
