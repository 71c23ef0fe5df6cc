"""Reference texts given in a source list: JSON text per row → rows of `sources.texts`.

Input is untrusted.
"""

import json

import pyarrow as pa

from pipeline.stages.ingest.given_spans import SPANS, TEXTS
from pipeline.stages.ingest.list_files import is_unicode

WHOLE = [{"n": 0, "start_s": 0.0, "end_s": None}]  # spans of a source that has texts but no spans

BadText = tuple[int, int, str, str]  # row, position in its list, error class, message


def texts_from_json(values: pa.Array, spans: pa.Array) -> tuple[pa.Array, pa.Array, list[BadText]]:
    """Parse texts; return (texts per row, spans per row, bad texts).

    A row is a JSON list of strings, which describe clip 0, or of {n, text}. A row with texts but without spans gets one
    span, the whole video. Empty texts and texts of a span that the row does not have are left out and reported; a row
    without a valid text has null.
    """
    if values.null_count == len(values):
        return pa.nulls(len(values), TEXTS), spans, []
    texts: list[list[dict] | None] = []
    spans_of_rows: list[list[dict] | None] = []
    problems: list[BadText] = []
    for row, (value, given) in enumerate(zip(values.to_pylist(), spans.to_pylist(), strict=True)):
        found = [] if value is None else _texts_of(row, value, given, problems)
        texts.append(found or None)
        spans_of_rows.append(WHOLE if found and given is None else given)
    return pa.array(texts, TEXTS), pa.array(spans_of_rows, SPANS), problems


def _texts_of(row: int, value: str, spans: list[dict] | None, problems: list[BadText]) -> list[dict]:
    """Return the valid texts of a row as {n, text}; append the bad ones to `problems`."""
    try:
        entries = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        problems.append((row, 0, "bad-text", f"texts is not a JSON list: {value[:200]}"))
        return []
    numbers = {span["n"] for span in (WHOLE if spans is None else spans)}
    found = []
    for position, entry in enumerate(entries):
        match entry:
            case str(text):
                n = 0
            case {"n": int(n), "text": str(text)}:
                pass
            case _:
                n, text = 0, None
        if text is None or n not in numbers:
            reason = "neither a string nor {n, text}" if text is None else f"the source has no span {n}"
            problems.append((row, position, "bad-text", f"{reason}: {json.dumps(entry)[:200]}"))
        elif not is_unicode(text):
            problems.append((row, position, "bad-text", f"half of a surrogate pair: {json.dumps(entry)[:200]}"))
        elif not text.strip():
            problems.append((row, position, "empty-text", "the text is empty"))
        else:
            found.append({"n": n, "text": text.strip()})
    return found
