"""Spans given in a source list, in the notations that lists use, parsed column-wise; with a text of their own if any.

Notations, one per row: entries as HD-VILA has them, pairs or objects with a start and an end as JSON or as a Python
list (Panda-70M), one pair, "START --> END", two columns, two columns of lists. Input is untrusted text.
"""

import ast
import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.stages.ingest.list_files import is_unicode
from pipeline.stages.ingest.span_columns import RANGE_PATTERN, span_keys
from shards.corpus.schema import REFERENCE, SPAN

SPANS = pa.list_(SPAN)
TEXTS = pa.list_(REFERENCE)
# Columns from which spans are read. `spans` and `timestamps` hold all spans of a row; units are suffixes of numbers.
SPAN_FIELDS = ("spans", "start", "end", "start_unit", "end_unit", "timestamps", "captions")

_MOST_LITERAL = 1 << 20  # characters of a Python list of captions: reading one takes many times its size in memory

_NUMBER = r"(\d{1,18}(?:[.,]\d*)?(?:[eE][+-]?\d{1,2})?)"
_UNIT = r"(s|secs?|seconds?|ms|msecs?|milliseconds?|us|microseconds?|)"
# Times become whole microseconds: "HH:MM:SS.mmm" with hours of up to nine digits and any number of decimals, "MM:SS",
# seconds, or a number with a unit. Python's notation of lists becomes JSON.
_MACROS = rf"""
CREATE MACRO clock(t) AS
    coalesce(TRY_CAST(list_extract(string_split(t, ':'), -3) AS BIGINT), 0) * 3600000000
    + coalesce(TRY_CAST(list_extract(string_split(t, ':'), -2) AS BIGINT), 0) * 60000000
    + CAST(round(CAST(replace(list_extract(string_split(t, ':'), -1), ',', '.') AS DOUBLE) * 1e6) AS BIGINT);
CREATE MACRO number(t, unit) AS TRY_CAST(round(TRY_CAST(replace(t, ',', '.') AS DOUBLE)
    * CASE unit[1:2] WHEN 'ms' THEN 1e3 WHEN 'mi' THEN if(unit[1:3] = 'mic', 1.0, 1e3) WHEN 'us' THEN 1.0 ELSE 1e6 END)
    AS BIGINT);
CREATE MACRO bare_micros(t) AS CASE
    WHEN regexp_full_match(t, '(?:(?:\d{{1,9}}:)?\d{{1,2}}:)?\d{{1,9}}(?:[.,]\d*)?') THEN clock(t)
    WHEN regexp_full_match(t, '{_NUMBER} *{_UNIT}')
        THEN number(regexp_extract(t, '^{_NUMBER} *{_UNIT}$', 1), regexp_extract(t, '^{_NUMBER} *{_UNIT}$', 2)) END;
CREATE MACRO micros(t) AS bare_micros(regexp_replace(trim(t), '^0 days?,? +', ''));
CREATE MACRO python_json(t) AS
    regexp_replace(replace(replace(replace(t, '''', '"'), '(', '['), ')', ']'), ',\s*\]', ']', 'g');
CREATE MACRO as_json(t) AS CASE WHEN json_valid(t) THEN t WHEN json_valid(python_json(t)) THEN python_json(t) END;
CREATE MACRO is_pair(j) AS json_type(j) = 'ARRAY' AND json_array_length(j) = 2
    AND json_type(j, '$[0]') NOT IN ('ARRAY', 'OBJECT') AND json_type(j, '$[1]') NOT IN ('ARRAY', 'OBJECT');
CREATE MACRO is_one(j) AS json_type(j) = 'OBJECT' OR is_pair(j);
CREATE MACRO of_range(t) AS CASE WHEN regexp_full_match(t, '{RANGE_PATTERN}') AND regexp_matches(t, '[:.>~]') THEN
    CAST(to_json([regexp_extract(t, '{RANGE_PATTERN}', 1), regexp_extract(t, '{RANGE_PATTERN}', 2)]) AS VARCHAR) END;
CREATE MACRO notation(t) AS coalesce(as_json(t), of_range(t));
CREATE MACRO with_unit(t, unit) AS CASE WHEN contains(t, ':') THEN t ELSE t || coalesce(unit, '') END;
CREATE MACRO texts_of(j) AS CAST(json_extract_string(j, '$[*]') AS VARCHAR[]);
CREATE MACRO zipped(a, b, a_unit, b_unit) AS list_transform(range(1, greatest(len(a), len(b)) + 1),
    lambda k: [with_unit(a[k], a_unit), with_unit(b[k], b_unit)]);
"""
_NOTATED_SQL = """
CREATE TABLE notated AS SELECT i, captions,
    CASE WHEN list IS NULL THEN '[null]' WHEN is_one(list) THEN '[' || list || ']'
         WHEN json_type(list) = 'ARRAY' THEN list ELSE '[null]' END AS list,
    coalesce(is_one(list), false) AS is_one
FROM (
    SELECT i, captions, CASE
        WHEN spans IS NOT NULL THEN notation(spans)
        WHEN starts_with("start", '[') THEN
            CAST(to_json(zipped(texts_of(as_json("start")), texts_of(as_json("end")), start_unit, end_unit)) AS VARCHAR)
        WHEN "start" IS NOT NULL OR "end" IS NOT NULL THEN
            CAST(to_json([with_unit("start", start_unit), with_unit("end", end_unit)]) AS VARCHAR)
        ELSE notation(timestamps) END AS list
    FROM given WHERE coalesce(spans, "start", "end", timestamps) IS NOT NULL
)
"""
_ENTRIES_SQL = """
CREATE TABLE entries AS
WITH entry AS (
    SELECT i, is_one, captions, unnest(json_extract(list, '$[*]')) AS e,
           generate_subscripts(json_extract(list, '$[*]'), 1) AS position
    FROM notated
), parsed AS (
    SELECT *, json_type(e) AS type,
        coalesce(e->>'$.n', regexp_extract(e->>'$.clip_id', '\\.(\\d+)(?:\\.[A-Za-z0-9]+)?$', 1)) AS named,
        micros(CASE WHEN is_pair(e) THEN e->>'$[0]' ELSE coalesce($starts, e->>'$.span[0]') END) AS start_us,
        micros(CASE WHEN is_pair(e) THEN e->>'$[1]' ELSE coalesce($ends, e->>'$.span[1]') END) AS end_us
    FROM entry
), numbered AS (
    -- Spans without a number of their own are counted, after the largest given one.
    SELECT *, CASE WHEN named IS NOT NULL THEN TRY_CAST(named AS INTEGER)
        ELSE TRY_CAST(coalesce(max(TRY_CAST(named AS INTEGER)) OVER (PARTITION BY i), -1)
            + row_number() OVER (PARTITION BY i, named IS NULL ORDER BY position) AS INTEGER) END AS n
    FROM parsed
)
SELECT *, CASE
    WHEN n IS NULL OR n < 0 THEN 'no span number (clip_id as ID.N.mp4, or n from 0)'
    WHEN start_us IS NULL OR end_us IS NULL THEN 'the span is not a start and an end, in seconds or as HH:MM:SS.mmm'
    WHEN end_us <= start_us THEN 'the span does not end after it starts'
    WHEN row_number() OVER (PARTITION BY i, n ORDER BY position) > 1 THEN 'the span number is used twice in this video'
    END AS problem
FROM numbered
"""
_GOOD_SPANS_SQL = """
SELECT CASE WHEN notated.i IS NOT NULL THEN coalesce(found.spans, []) END AS spans
FROM given LEFT JOIN notated USING (i) LEFT JOIN (
    SELECT i, list(struct_pack(n := n, start_s := start_us / 1e6, end_s := end_us / 1e6) ORDER BY position) AS spans
    FROM entries WHERE problem IS NULL GROUP BY i
) AS found USING (i) ORDER BY given.i
"""
# A text in the entry itself, or the captions at its position: a string or a list of them.
_TEXTS_SQL = """
WITH told AS (
    SELECT i, position, n, coalesce(
        CASE WHEN type = 'OBJECT' THEN list_filter([$own], lambda t: t IS NOT NULL) END || [],
        []) || coalesce(CASE json_type(c) WHEN 'VARCHAR' THEN [c->>'$'] WHEN 'ARRAY' THEN texts_of(c) END, []) AS texts
    FROM (SELECT *, json_extract(captions, '$[' || (position - 1) || ']') AS c FROM entries WHERE problem IS NULL)
), each AS (
    SELECT i, position, n, trim(unnest(texts)) AS text, generate_subscripts(texts, 1) AS k FROM told
), found AS (
    SELECT i, list(struct_pack(n := n, text := text) ORDER BY position, k) AS texts
    FROM each WHERE text <> '' GROUP BY i
)
SELECT found.texts FROM given LEFT JOIN found USING (i) ORDER BY given.i
"""


@dataclass(frozen=True)
class GivenSpans:
    """Spans and texts of each row, and the reasons of what cannot be read, as (row, reason)."""

    spans: pa.Array  # of SPANS; null: the row gives none; empty: none that can be read
    texts: pa.Array  # of TEXTS: the texts of these spans, null without any
    bad_spans: list[tuple[int, str]]
    bad_texts: list[tuple[int, str]]


def given_spans(fields: dict[str, pa.Array]) -> GivenSpans:
    """Parse the spans of rows. `fields` has the arrays of SPAN_FIELDS, all of one length and of strings.

    Order is kept. A span without a number is counted from 0. `spans` are read before `start` and `end`, and these
    before `timestamps`. `captions` is a text for a row with one span, and a list of texts for one with a list of spans.
    """
    import duckdb

    count = len(fields["spans"])
    if all(fields[name].null_count == count for name in ("spans", "start", "end", "timestamps")):
        return GivenSpans(pa.nulls(count, SPANS), pa.nulls(count, TEXTS), [], [])
    with duckdb.connect() as connection:
        connection.execute(_MACROS)
        connection.register("given", pa.table({"i": pa.array(range(count), pa.int64()), **fields}))
        connection.execute(_NOTATED_SQL)
        bad_texts = _align_captions(connection) if fields["captions"].null_count < count else []
        keys = "SELECT DISTINCT unnest(json_keys(e)) FROM (SELECT unnest(json_extract(list, '$[*]')) AS e FROM notated)"
        names = [key for (key,) in connection.execute(f"{keys} WHERE json_type(e) = 'OBJECT' ORDER BY 1").fetchall()]
        starts, ends, texts = span_keys(names)
        sql = _ENTRIES_SQL.replace("$starts", starts).replace("$ends", ends)
        connection.execute(sql)
        reason = "problem || ': ' || left(CAST(e AS VARCHAR), 200)"
        bad = f"SELECT i, coalesce({reason}, problem) FROM entries WHERE problem IS NOT NULL ORDER BY i, position"
        problems = connection.execute(bad).fetchall()
        spans = connection.sql(_GOOD_SPANS_SQL).to_arrow_table()["spans"]
        told = connection.sql(_TEXTS_SQL.replace("$own", texts)).to_arrow_table()["texts"]
    return GivenSpans(
        pc.cast(spans, SPANS).combine_chunks(), pc.cast(told, TEXTS).combine_chunks(), problems, bad_texts
    )


def _align_captions(connection) -> list[tuple[int, str]]:
    """Replace the captions in `notated` by a JSON list with an element for each entry; return [(row, reason)]."""
    rows = connection.execute(
        "SELECT i, captions, is_one, json_array_length(list) FROM notated WHERE captions IS NOT NULL ORDER BY i"
    ).fetchall()
    aligned, problems = [], []
    for i, value, is_one, num_entries in rows:
        listed = _strings(value)
        captions = [value if listed is None else listed] if is_one else [value] if listed is None else listed
        if len(captions) == num_entries:
            aligned.append((i, json.dumps(captions)))
        else:
            aligned.append((i, None))
            problems.append((i, f"{len(captions)} texts for {num_entries} spans: {value[:200]}"))
    table = pa.table({"i": [i for i, _ in aligned], "c": pa.array([c for _, c in aligned], pa.string())})
    connection.register("aligned", table)
    connection.execute("UPDATE notated SET captions = aligned.c FROM aligned WHERE aligned.i = notated.i")
    return problems


def _strings(value: str) -> list[str] | None:
    """Return the strings of a list in JSON or in Python's notation, or None for any other text."""
    if not (value.startswith("[") and value.endswith("]")) or len(value) > _MOST_LITERAL:
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(text, str) and is_unicode(text) for text in found):
            return found
    return None
