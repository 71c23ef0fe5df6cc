"""Spans given in a source list: HD-VILA's `clip` entries, parsed column-wise.

Input is untrusted JSON text.
"""

import pyarrow as pa
import pyarrow.compute as pc

from shards.corpus.schema import SPAN

SPANS = pa.list_(SPAN)

# "HH:MM:SS.mmm" with hours of up to nine digits and any number of decimals, "MM:SS", or seconds → whole microseconds.
_TIME_MACRO = r"""
CREATE MACRO micros(t) AS CASE WHEN regexp_full_match(t, '(?:(?:\d{1,9}:)?\d{1,2}:)?\d{1,9}(?:[.,]\d*)?') THEN
    coalesce(TRY_CAST(list_extract(string_split(t, ':'), -3) AS BIGINT), 0) * 3600000000
    + coalesce(TRY_CAST(list_extract(string_split(t, ':'), -2) AS BIGINT), 0) * 60000000
    + CAST(round(CAST(replace(list_extract(string_split(t, ':'), -1), ',', '.') AS DOUBLE) * 1e6) AS BIGINT) END
"""
_SPANS_SQL = r"""
CREATE TABLE entries AS
WITH lists AS (
    SELECT i, CASE WHEN json_valid(spans) AND json_type(spans) = 'ARRAY' THEN json_extract(spans, '$[*]') END AS list
    FROM given WHERE spans IS NOT NULL
), entry AS (
    SELECT i, unnest(entries) AS e, generate_subscripts(entries, 1) AS position
    FROM (SELECT i, coalesce(list, ['null'::JSON]) AS entries FROM lists)
), parsed AS (
    SELECT i, position, e,
        regexp_extract(e->>'$.clip_id', '\.(\d+)(?:\.[A-Za-z0-9]+)?$', 1) AS clip_n,
        TRY_CAST(coalesce(e->>'$.n', clip_n) AS INTEGER) AS n,
        micros(coalesce(e->>'$.start_s', e->>'$.span[0]')) AS start_us,
        micros(coalesce(e->>'$.end_s', e->>'$.span[1]')) AS end_us
    FROM entry
)
SELECT *, CASE
    WHEN n IS NULL OR n < 0 THEN 'no span number (clip_id as ID.N.mp4, or n from 0)'
    WHEN start_us IS NULL OR end_us IS NULL THEN 'the span is not [start, end] as HH:MM:SS.mmm'
    WHEN end_us <= start_us THEN 'the span does not end after it starts'
    WHEN row_number() OVER (PARTITION BY i, n ORDER BY position) > 1 THEN 'the span number is used twice in this video'
    END AS problem
FROM parsed
"""
_GOOD_SPANS_SQL = """
SELECT CASE WHEN given.spans IS NOT NULL THEN coalesce(found.spans, []) END AS spans
FROM given LEFT JOIN (
    SELECT i, list(struct_pack(n := n, start_s := start_us / 1e6, end_s := end_us / 1e6) ORDER BY position) AS spans
    FROM entries WHERE problem IS NULL GROUP BY i
) AS found USING (i) ORDER BY given.i
"""


def spans_from_json(texts: pa.Array) -> tuple[pa.Array, list[tuple[int, str]]]:
    """Parse `clip` lists (JSON text per row); return (spans per row, [(row, reason) of bad entries]).

    An entry is {clip_id: "ID.N.mp4", span: [start, end]}, N being the span's number, or {n, start_s, end_s}. Order is
    kept. A row without a valid entry has an empty list.
    """
    import duckdb

    if texts.null_count == len(texts):
        return pa.nulls(len(texts), SPANS), []
    with duckdb.connect() as connection:
        connection.register("given", pa.table({"i": pa.array(range(len(texts)), pa.int64()), "spans": texts}))
        connection.execute(_TIME_MACRO)
        connection.execute(_SPANS_SQL)
        reason = "problem || ': ' || left(CAST(e AS VARCHAR), 200)"
        bad = f"SELECT i, {reason} FROM entries WHERE problem IS NOT NULL ORDER BY i, position"
        problems = connection.execute(bad).fetchall()
        spans = connection.sql(_GOOD_SPANS_SQL).to_arrow_table()["spans"]
    return pc.cast(spans, SPANS).combine_chunks(), problems
