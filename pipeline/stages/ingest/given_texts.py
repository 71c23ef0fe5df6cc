"""Reference texts that a list gives with a source: JSON text per row to rows of `sources.texts`. It is untrusted."""

import json
from typing import Any

import pyarrow as pa

from pipeline.stages.ingest.given_spans import SPANS
from pipeline.stages.ingest.list_files import is_unicode
from shards.corpus.schema import REFERENCE

TEXTS = pa.list_(REFERENCE)
WHOLE = [{"n": 0, "start_s": 0.0, "end_s": None}]  # the spans of a source that has texts and no spans

BadText = tuple[int, int, str, str]  # row, position in its list, error class, message


def texts_from_json(values: pa.Array, spans: pa.Array) -> tuple[pa.Array, pa.Array, list[BadText]]:
    """(texts, spans, what is no text). A row is a JSON list of strings, which are about clip 0, or of {n, text}.

    A row with texts and without spans gets one span, the whole video. Empty texts and texts about a span that the row
    does not have are left out and reported; a row without a usable text has null.
    """
    if values.null_count == len(values):
        return pa.nulls(len(values), TEXTS), spans, []
    texts: list[list[dict] | None] = []
    pieces: list[list[dict] | None] = []
    problems: list[BadText] = []
    for row, (value, given) in enumerate(zip(values.to_pylist(), spans.to_pylist(), strict=True)):
        found = [] if value is None else _texts_of(row, value, given, problems)
        texts.append(found or None)
        pieces.append(WHOLE if found and given is None else given)
    return pa.array(texts, TEXTS), pa.array(pieces, SPANS), problems


def _texts_of(row: int, value: str, spans: list[dict] | None, problems: list[BadText]) -> list[dict]:
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
        n, text = (0, entry) if isinstance(entry, str) else _numbered(entry)
        if text is None or n not in numbers:
            why = "neither a string nor {n, text}" if text is None else f"there is no span {n}"
            problems.append((row, position, "bad-text", f"{why}: {json.dumps(entry)[:200]}"))
        elif not is_unicode(text):
            problems.append((row, position, "bad-text", f"half a surrogate pair: {json.dumps(entry)[:200]}"))
        elif not text.strip():
            problems.append((row, position, "empty-text", "a text without a word"))
        else:
            found.append({"n": n, "text": text.strip()})
    return found


def _numbered(entry: Any) -> tuple[int, str | None]:
    match entry:
        case {"n": int(n), "text": str(text)}:
            return n, text
    return 0, None
