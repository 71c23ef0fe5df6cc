"""Names by which the columns of a list give spans and their texts, and signs of spans that are not read.

Names are compared without case and punctuation: "Start Time", startTime and start_time are one.
"""

import ast
import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pyarrow as pa

from clipmill.base.text import sql_literal

_BEFORE = r"(?:clip|segment|seg|span|scene|shot|event|moment|interval|action|annotation|video)?"
_MOMENT = r"(?:timestamp|timecode|time|ts|t|sec|frame)?"
_UNIT = r"(?:in)?(?P<unit>s|secs?|seconds?|ms|msecs?|millis|milliseconds?|us|microseconds?|frames?|idx|index)?"
_START = re.compile(rf"(?P<before>{_BEFORE}{_MOMENT})(?:start|begin|onset)(?:s|ing)?(?P<after>{_MOMENT}){_UNIT}")
_END = re.compile(rf"(?P<before>{_BEFORE}{_MOMENT})(?:end|stop|finish|offset)(?:s|ing)?(?P<after>{_MOMENT}){_UNIT}")
_LIST_OF_SPANS = re.compile(
    rf"{_BEFORE}(?:timestamp|timecode|timespan|timerange|time|span|segment|interval|window|moment|boundarie)s?{_UNIT}"
)
_CAPTIONS = ("caption", "captions", "text", "sentence", "sentences", "narration")

_CLOCK = r"(?:\d{1,9}:){1,2}\d{1,9}(?:[.,]\d*)?"
_TIME = rf"(?:{_CLOCK}|\d{{1,9}}(?:\.\d*)?)"
# "0:01 - 0:05", "1.5 --> 4". It also needs a colon, a point or an arrow, because 2024-05 is a month.
RANGE_PATTERN = rf"\s*({_TIME})\s*(?:-->|->|~|-|–|—|to|,|;)\s*({_TIME})\s*"
# A list of pairs or of objects with a start, one of these, or a range.
_SPAN_VALUE = re.compile(
    r"\s*[\[(]\s*[\[(]\s*['\"]?\d.*"
    r"|\s*[\[(]\s*['\"]?[\d:.]+['\"]?\s*,\s*['\"]?[\d:.]+['\"]?\s*,?\s*[\])]\s*"
    r"|\s*\[?\s*\{\s*['\"][A-Za-z_]*(?:start|begin|from|span|clip_id).*"
    rf"|(?=.*[:.>~]){RANGE_PATTERN}",
    re.DOTALL,
)

_TWO_TIMES = re.compile(r"[\s\[({'\"]*\d+(?:[.:]\d+)*['\"]?\s*(?:-+>?|–|to|,|;)\s*['\"]?\d")
_SAMPLE = 200  # rows that are searched for spans that nothing read


class SpanColumns(NamedTuple):
    """Columns of a list that give spans, best first."""

    pairs: list[tuple[str, str]]  # of start and end
    timestamps: list[str]  # which may hold lists of spans; their values decide
    captions: list[str]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def unit_of(name: str) -> str:
    """Return the unit that a column's name states: "ms", "us" or "", which stands for seconds."""
    match = _START.fullmatch(_plain(name)) or _END.fullmatch(_plain(name))
    unit = (match and match["unit"]) or ""
    return "ms" if unit.startswith(("ms", "milli")) else "us" if unit.startswith(("us", "micro")) else ""


def span_columns(names: Sequence[str]) -> SpanColumns:
    """Find the columns that give spans among the names of a list."""
    starts = [(name, match) for name in names if (match := _START.fullmatch(_plain(name))) and not _is_frame(match)]
    ends = [(name, match) for name in names if (match := _END.fullmatch(_plain(name))) and not _is_frame(match)]
    pairs = [(a, b) for a, start in starts for b, end in ends if _stem(start) == _stem(end)]
    if not pairs and starts and ends:
        pairs = [(starts[0][0], ends[0][0])]
    by_name = {_plain(name): name for name in reversed(names)}
    if not pairs and {"from", "to"} <= set(by_name):
        pairs = [(by_name["from"], by_name["to"])]
    taken = {name for pair in pairs for name in pair}
    timestamps = [name for name in names if _LIST_OF_SPANS.fullmatch(_plain(name)) and name not in taken]
    captions = [by_name[caption] for caption in _CAPTIONS if caption in by_name]
    return SpanColumns(pairs, timestamps, captions)


def _stem(match: re.Match) -> tuple[str, str, str]:
    return match["before"], match["after"], match["unit"] or ""


def _is_frame(match: re.Match) -> bool:
    return (match["unit"] or "").startswith(("frame", "idx", "index")) or "frame" in match["before"] + match["after"]


def span_keys(names: Sequence[str]) -> tuple[str, str, str]:
    """Return SQL for the start, the end and the texts of a JSON object `e` with any of these keys."""
    columns = span_columns(names)

    def value(name: str) -> str:
        pointer = sql_literal("/" + name.replace("~", "~0").replace("/", "~1"))
        unit = unit_of(name)
        return f"with_unit(e->>{pointer}, '{unit}')" if unit else f"e->>{pointer}"

    starts, ends = [value(start) for start, _ in columns.pairs], [value(end) for _, end in columns.pairs]
    texts = [value(name) for name in columns.captions]
    return (
        f"coalesce({', '.join([*starts, 'NULL', 'NULL'])})",
        f"coalesce({', '.join([*ends, 'NULL', 'NULL'])})",
        (", ".join(texts or ["CAST(NULL AS VARCHAR)"])),
    )


def are_spans(values: Iterable[str | None]) -> bool:
    """Return whether most values of a column are spans; its name alone may also mean the time of something."""
    given = [value for value in values if value and value.strip()]
    return 2 * sum(bool(_SPAN_VALUE.fullmatch(value)) for value in given) > len(given)


# --- what nothing read -----------------------------------------------------------------------------------------------


def unread_spans(extras: pa.Array) -> str | None:
    """Return the columns that look like spans and were not read, as a message, or None. `extras`: JSON objects."""
    seen: dict[str, list] = {}
    for extra in extras.drop_null()[:_SAMPLE].to_pylist():
        try:
            row = json.loads(extra)
        except (ValueError, RecursionError):
            continue
        for name, value in row.items():
            seen.setdefault(name, []).append(value)
    found = [name for name, values in seen.items() if _looks_like_spans(name, values)]
    if not found:
        return None
    return (
        f"{', '.join(map(repr, found))} may be spans and {'are' if len(found) > 1 else 'is'} not read. Spans are read "
        "from two columns in seconds such as start_s and end_s, or from a list of [start, end] in a column such as "
        "timestamps. If these columns are something else, set ingest.read_spans to false"
    )


def _looks_like_spans(name: str, values: list) -> bool:
    plain = _plain(name)
    if _START.fullmatch(plain) or _END.fullmatch(plain):
        return all(re.fullmatch(rf"\s*(?:{_CLOCK}|\d+(?:[.,]\d*)?)\s*", str(value)) for value in values)
    if _LIST_OF_SPANS.fullmatch(plain):
        is_month = all(re.match(r"\s*\d{4}-\d\d", str(value)) for value in values)
        return not is_month and all(_TWO_TIMES.match(str(value)) for value in values)
    return all(_is_list_of_spans(value) for value in values)


def _is_list_of_spans(value: object) -> bool:
    """Return whether a value is a list of pairs, each of which ends after it starts."""
    if isinstance(value, str) and value[:1] in "[(" and len(value) < 100_000:
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(pair, (list, tuple)) and len(pair) == 2 and _ends_later(*pair) for pair in value)


def _ends_later(start: object, end: object) -> bool:
    if all(isinstance(time, (int, float)) and not isinstance(time, bool) for time in (start, end)):
        return 0 <= start < end
    return all(isinstance(time, str) and re.fullmatch(_CLOCK, time) for time in (start, end)) and start != end
