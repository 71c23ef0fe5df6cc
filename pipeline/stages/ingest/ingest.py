"""Ingest: source lists → rows of `sources`, each with a unit and a volume that never change.

The result is a pure function of the lists and of the sources that the corpus already has.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from clipmill.base.credentials import REMOVED, strip_credentials, strip_url_credentials
from clipmill.base.errors import UserError
from pipeline.stages.ingest.added_spans import add_rows, replaced
from pipeline.stages.ingest.given_texts import WHOLE
from pipeline.stages.ingest.private_urls import PrivateUrl
from pipeline.stages.ingest.settings import IngestSettings
from pipeline.stages.ingest.source_lists import Problem, SourceList, read_sources
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
    num_duplicates: int  # rows among these that say nothing about a source of the corpus or of an earlier row
    num_forgotten: int = 0  # rows among these whose source was forgotten with `clipmill forget`
    private: tuple[PrivateUrl, ...] = ()  # full URLs of all rows, new or known, whose URL has a password or signature
    num_added: int = 0  # rows among these that add spans or texts to a source of the corpus or of an earlier row
    grown: pa.Table | None = None  # known sources with more spans or texts than before, columns as in `known`

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
    arguments: list[str],
    settings: IngestSettings,
    known: pa.Table,
    forgotten: Collection[str] = (),
    listed: SourceList | None = None,
    known_rows: Callable[[list[str]], pa.Table] | None = None,
) -> Ingested:
    """Return the sources in the arguments' lists that are not in `known`, and those of `known` that have grown.

    known       the corpus's sources: video_id, url, unit, volume, ordinal, split, texts
    forgotten   SHA-256 of spellings of URLs and of ids to leave out; such rows are counted and not reported
    listed      content of the arguments' lists, if they were read before: standard input can be read once
    known_rows  gives all columns of these known sources, in this order; by default from `known`

    Rows with the same canonical URL are one source: the first row's, with the spans of all (`added_spans`). An id that
    another URL has is a problem "duplicate-id", and the first wins. Raises UserError as `read_sources` does, and for a
    known source with another split or other reference texts.
    """
    listed = listed or read_sources(arguments, settings)
    table, num_forgotten = _without(listed.table.combine_chunks(), forgotten)
    canonical = _array(table, "canonical")
    ids = video_ids(canonical, pc.coalesce(_array(table, "video_id"), _array(table, "source_id")))
    _require_same_references(canonical.to_pylist(), table, known)
    given = table  # with credentials
    table = _without_credentials(table)
    rows = _assign_rows(canonical.to_pylist(), ids.to_pylist(), table, known)
    problems = listed.problems + [
        Problem(
            table["location"][row].as_py(),
            "duplicate-id",
            f"the id {ids[row]} belongs to another URL; {table['url'][row]} is left out, give it another id",
        )
        for row in rows.clashes
    ]
    new = pa.array(rows.new, pa.int64())
    picked = table.drop_columns("video_id").take(new).append_column("video_id", [ids.take(new)])
    changed, values, num_added = add_rows(picked, table.take(pa.array(rows.more, pa.int64())), rows.owners)
    sources = _with_units(replaced(picked, changed, values), settings, known)
    grown, num_grown_rows = None, 0
    if rows.more_of_known:
        videos = list(dict.fromkeys(rows.known_owners))
        index = {video_id: i for i, video_id in enumerate(videos)}
        before = known_rows(videos) if known_rows else _rows_of(known, videos)
        more, owners = table.take(pa.array(rows.more_of_known, pa.int64())), [index[v] for v in rows.known_owners]
        changed, values, num_grown_rows = add_rows(before, more, owners)
        grown = replaced(before, changed, values).take(pa.array(changed, pa.int64()))
    num_added += num_grown_rows
    num_duplicates = table.num_rows - len(rows.new) - len(rows.clashes) - num_added
    num_seen = table.num_rows + num_forgotten
    private = tuple(_private(given, table, ids, rows.clashes, known))
    return Ingested(sources, problems, num_seen, num_duplicates, num_forgotten, private, num_added, grown)


def _rows_of(known: pa.Table, video_ids: list[str]) -> pa.Table:
    return known.take(pc.index_in(pa.array(video_ids), known["video_id"].combine_chunks()))


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
        not is_forgotten([video_id, *source_spellings(url), *source_spellings(strip_url_credentials(url))], forgotten)
        for url, video_id in pairs
    ]
    return table.filter(pa.array(stays, pa.bool_())), stays.count(False)


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table[name].combine_chunks()
    return column if isinstance(column, pa.Array) else pa.array([], column.type)


@dataclass
class _Assigned:
    """Indices of the rows of the lists, in order: of new sources, of more rows about these, about known sources."""

    new: list[int] = field(default_factory=list)
    clashes: list[int] = field(default_factory=list)  # rows whose id belongs to another URL
    more: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)  # position in `new` of the source of each of `more`
    more_of_known: list[int] = field(default_factory=list)
    known_owners: list[str] = field(default_factory=list)  # video_id of the source of each of `more_of_known`


def _assign_rows(canonical: list[str], ids: list[str], table: pa.Table, known: pa.Table) -> _Assigned:
    """Find the source of each row. Rows without spans add nothing to an earlier row and belong to none.

    canonical  of the full URLs
    table      the rows without credentials: with the same id, a URL is known whatever its password or signature is
    """
    known_ids = known["video_id"].to_pylist() if known.num_rows else []
    of_known = dict(zip(canonical_urls(_array(known, "url")).to_pylist(), known_ids, strict=True)) if known_ids else {}
    has_spans = pc.fill_null(pc.greater(pc.list_value_length(_array(table, "spans")), 0), False).to_pylist()
    known_urls = known["url"].to_pylist() if known_ids else []
    same_id = {video_id: url for url, video_id in of_known.items()}  # canonical URL of each id
    seen_ids, of_new, rows = dict(zip(known_ids, known_urls, strict=True)), {}, _Assigned()
    for row, (url, video_id, address) in enumerate(zip(canonical, ids, table["url"].to_pylist(), strict=True)):
        if REMOVED in address and video_id in seen_ids and _place(seen_ids[video_id]) == _place(address):
            url = same_id.get(video_id, url)
        if url in of_known:
            if has_spans[row]:
                rows.more_of_known.append(row)
                rows.known_owners.append(of_known[url])
        elif url in of_new:
            if has_spans[row] and of_new[url] is not None:
                rows.more.append(row)
                rows.owners.append(of_new[url])
        elif video_id in seen_ids:
            of_new[url] = None
            rows.clashes.append(row)
        else:
            seen_ids[video_id] = address
            same_id[video_id] = url
            of_new[url] = len(rows.new)
            rows.new.append(row)
    return rows


def _place(url: str) -> str:
    """Return scheme, host and path of a URL, which stay when it is signed anew."""
    return strip_url_credentials(url).replace(f"{REMOVED}@", "").partition("?")[0]


def _require_same_references(canonical: list[str], table: pa.Table, known: pa.Table) -> None:
    """Raise UserError for a row that gives a known source another split, or its whole or a benchmark other texts.

    A row may leave both out. Rows with spans of their own add texts, unless they are those of a benchmark.
    """
    if table["split"].null_count == table["texts"].null_count == table.num_rows:
        return
    references: dict[str, tuple] = {}
    if known.num_rows:
        given = zip(known["split"].to_pylist(), known["texts"].to_pylist(), strict=True)
        references = dict(zip(canonical_urls(_array(known, "url")).to_pylist(), given, strict=True))
    columns = [table[name].to_pylist() for name in ("split", "texts", "spans", "video_id", "location")]
    for url, split, texts, spans, video_id, location in zip(canonical, *columns, strict=True):
        before = references.setdefault(url, (split, texts))
        of_benchmark, whole = video_id is not None, spans == WHOLE
        if (split, texts) == (None, None) or (not of_benchmark and not whole and split == before[0]):
            continue
        numbers = {span["n"] for span in spans or WHOLE}
        of_spans = [text for text in before[1] or () if text["n"] in numbers] or None
        if (split, texts) != (before[0], of_spans):
            raise UserError(
                f"SOURCES: {location}: {url} has "
                + (f"split {split}, but split {before[0]}" if before[0] != split else "other reference texts than")
                + " in the corpus or earlier in the lists. A corpus holds one version of a benchmark: "
                "build this one in a corpus of its own."
            )


def _with_units(picked: pa.Table, settings: IngestSettings, known: pa.Table) -> pa.Table:
    """Add ordinals, units and volumes after the largest known ones; return the columns of `sources`."""
    next_ordinal = next_unit = volume = num_units = 0
    if known.num_rows:
        next_ordinal = pc.max(known["ordinal"]).as_py() + 1
        numbers = pc.cast(pc.utf8_slice_codeunits(known["unit"], 1), pa.int64())
        next_unit = pc.max(numbers).as_py() + 1
        volumes = pc.fill_null(known["volume"], 0)
        volume = pc.max(volumes).as_py()
        num_units = len(pc.unique(known["unit"].filter(pc.equal(volumes, volume))))
    count = picked.num_rows
    places = [row // settings.unit_videos for row in range(count)]  # 0: the first new unit
    if num_units >= settings.volume_units:
        volume, num_units = volume + 1, 0
    columns = {
        "ordinal": pa.array(range(next_ordinal, next_ordinal + count), pa.int64()),
        "unit": pa.array([f"u{next_unit + place:06d}" for place in places], UNIT),
        "volume": pa.array([volume + (num_units + place) // settings.volume_units for place in places], pa.int32()),
    }
    for name, values in columns.items():
        picked = picked.append_column(name, [values])
    schema = TABLES["sources"].append(pa.field("unit", UNIT))
    return picked.select(schema.names).cast(schema)
