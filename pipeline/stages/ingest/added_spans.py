"""Rows of one video become one source: the first row's columns, and the spans of all rows.

A list has a row for each clip more often than not, and a later list may have more spans of a known video. What the rows
say is added up in their order, so reading two lists one after the other gives what reading both at once does, and
reading a list again changes nothing.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import count, groupby

import pyarrow as pa

from shards.corpus.schema import TABLES

# Key of `extra`: {span's number: {column: value}}, the columns of later rows that differ from those of the first.
BY_SPAN = "by_span"
_NAMED = ("source_id", "title", "category", "language", "licence", "subtitle", "split")
_COLUMNS = [*_NAMED, "spans", "texts", "extra"]
CHANGED = pa.schema([field for field in TABLES["sources"] if field.name in ("spans", "texts", "extra")])
_BATCH = 50_000  # rows converted to Python objects at once


def united_spans(spans: Sequence[dict], more: Sequence[dict]) -> list[dict]:
    """Return the spans and those of `more` that have other times, each with a number of its own.

    A number that is taken is replaced by the next free one.
    """
    united = list(spans)
    times, taken = {(span["start_s"], span["end_s"]) for span in spans}, {span["n"] for span in spans}
    for span in more:
        if (span["start_s"], span["end_s"]) in times:
            continue
        n = span["n"] if span["n"] not in taken else next(k for k in count(len(united)) if k not in taken)
        times.add((span["start_s"], span["end_s"]))
        taken.add(n)
        united.append({**span, "n": n})
    return united


def add_row(source: dict, row: dict) -> bool:
    """Add the spans of another row of the same video to a source; return whether the source has changed.

    A span is known by its times. One whose number another span has gets the next free number. Texts of a known span are
    added to it. Columns in which the row differs from the first row are kept in `extra` under the numbers of the row's
    new spans. A row without spans adds nothing.
    """
    if not row["spans"]:
        return False
    old_spans, texts = source["spans"] or (), list(source["texts"] or ())
    spans = united_spans(old_spans, row["spans"])
    new = [span["n"] for span in spans[len(old_spans) :]]
    by_times = {(span["start_s"], span["end_s"]): span["n"] for span in spans}
    numbers = {span["n"]: by_times[span["start_s"], span["end_s"]] for span in row["spans"]}
    known_texts = {(text["n"], text["text"]) for text in texts}
    for text in row["texts"] or ():
        text = {**text, "n": numbers[text["n"]]}
        if (text["n"], text["text"]) not in known_texts:
            known_texts.add((text["n"], text["text"]))
            texts.append(text)
    if not new and len(texts) == len(source["texts"] or ()):
        return False
    if new:
        source["extra"] = _extra_with(source, row, new)
    source["spans"], source["texts"] = spans, texts or None
    return True


def _extra_with(source: dict, row: dict, numbers: Sequence[int]) -> str | None:
    """Return the source's `extra` with the columns of a row that differ from the source's, for these spans."""
    extra, other = _object(source["extra"]), _object(row["extra"])
    by_span = extra and extra.get(BY_SPAN, {})
    if not isinstance(by_span, dict) or other is None:  # a column of the list has this name, or it is nested too deep
        return source["extra"]
    first = {name: value for name, value in extra.items() if name != BY_SPAN}
    other.pop(BY_SPAN, None)
    differing = {name: other.get(name) for name in [*first, *other] if other.get(name) != first.get(name)}
    differing |= {name: row[name] for name in _NAMED if row[name] is not None and row[name] != source[name]}
    if not differing:
        return source["extra"]
    return json.dumps({**first, BY_SPAN: {**by_span, **{str(n): differing for n in numbers}}}, ensure_ascii=False)


def _object(extra: str | None) -> dict | None:
    try:
        return dict(json.loads(extra or "{}"))
    except (ValueError, TypeError, RecursionError):
        return None


def add_rows(sources: pa.Table, rows: pa.Table, owners: Sequence[int]) -> tuple[list[int], pa.Table, int]:
    """Add rows to sources, `owners[i]` being the index of the source of row i.

    Returns the indices of the changed sources in order, their new spans, texts and extra, and the number of rows that
    changed a source.
    """
    order = sorted(range(len(owners)), key=owners.__getitem__)  # stable: rows of a source stay in order
    changed: list[int] = []
    parts, num_rows = [CHANGED.empty_table()], 0
    for batch in _batches(order, owners):
        indices = sorted({owners[row] for row in batch})
        by_index = dict(zip(indices, sources.select(_COLUMNS).take(indices).to_pylist(), strict=True))
        added = set()
        for position, row in zip(batch, rows.select(_COLUMNS).take(batch).to_pylist(), strict=True):
            if add_row(by_index[owners[position]], row):
                added.add(owners[position])
                num_rows += 1
        changed += sorted(added)
        new = [{name: by_index[index][name] for name in CHANGED.names} for index in sorted(added)]
        parts.append(pa.Table.from_pylist(new, CHANGED))
    return changed, pa.concat_tables(parts), num_rows


def _batches(order: list[int], owners: Sequence[int]) -> Iterator[list[int]]:
    """Yield the rows in batches of bounded size, all rows of a source in one."""
    batch: list[int] = []
    for _, rows in groupby(order, key=owners.__getitem__):
        batch += rows
        if len(batch) >= _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def replaced(table: pa.Table, indices: Sequence[int], new: pa.Table) -> pa.Table:
    """Replace the columns of `new` in these rows of a table."""
    take = list(range(table.num_rows))
    for k, index in enumerate(indices):
        take[index] = table.num_rows + k
    for name in new.column_names:
        column = pa.chunked_array([*table[name].chunks, *new[name].cast(table[name].type).chunks], table[name].type)
        table = table.set_column(table.column_names.index(name), name, column.take(pa.array(take, pa.int64())))
    return table
