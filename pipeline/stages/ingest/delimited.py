"""Text of a CSV or TSV list, made ready for pyarrow: its delimiter and header, and rows with a quote that never closes.

Input is untrusted text with line feeds as line ends.
"""

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pipeline.stages.ingest.list_files import looks_like_address

_SEPARATOR_LINE = re.compile(r'(?i:"?sep=(?P<delimiter>[^\n"])"?)\n?')  # which spreadsheets write and read
_LONGEST_ROW = 100_000  # characters, below the limit of Python's reader
_MARK = "\ue000"  # for private use, so that lists do not have it


@dataclass(frozen=True)
class Delimited:
    """A table whose first line is one that pyarrow has to skip, and whose unclosed rows are marked."""

    names: list[str]  # of the columns, made distinct
    delimiter: str
    text: str
    unclosed: list[str]  # rows with a quotation mark that never closes, by number in the mark

    def unclosed_row(self, text: str) -> str | None:
        """Return the row for which pyarrow got this text, if it is one with an unclosed quotation mark."""
        number = text.rpartition(_MARK)[2]
        found = _MARK in text and number.isdecimal() and int(number) < len(self.unclosed)
        return self.unclosed[int(number)] if found else None


def read_delimited(text: str, delimiter: str | None, url_names: tuple[str, ...]) -> Delimited:
    """Find the header and mark the rows with unclosed quotation marks. `url_names`: lower-case names of the address.

    Such a row is one line. The rows after it are not part of it, wherever the next quotation mark is.
    """
    first = _SEPARATOR_LINE.match(text)
    if first:
        delimiter, text = first["delimiter"], text[first.end() :]
    if delimiter is None:  # spreadsheets in many languages write semicolons into .csv
        line = re.sub(r'"[^"\n]*"', "", text.partition("\n")[0])
        delimiter = max(",;\t|", key=line.count)
    line_pattern, row_pattern = (_row_pattern(delimiter, across_lines=across) for across in (False, True))
    row = line_pattern.match(text) or row_pattern.match(text)
    header = row[0] if row else text.partition("\n")[0]
    names = next(csv.reader(header.split("\n"), delimiter=delimiter, strict=False), [])
    names = [name if name not in names[:i] else f"{name}.{i}" for i, name in enumerate(names)]  # distinct
    url = next((i for i, name in enumerate(names) if name.strip().lower() in url_names), None)
    is_one = partial(_is_one_row, delimiter=delimiter, num_columns=len(names), url=url)
    body, unclosed = _mark_unclosed(text[len(header) :], line_pattern, row_pattern, delimiter * len(names), is_one)
    return Delimited(names, delimiter, "header" + body, unclosed)


def _row_pattern(delimiter: str, *, across_lines: bool) -> re.Pattern[str]:
    """Return the pattern of a whole row whose quotation marks are closed.

    On one line, text after a closing mark belongs to the field, as pyarrow reads it. A field of several lines must be
    well formed, as the next mark may be that of another row.
    """
    d = re.escape(delimiter)
    open_field = rf"[^{d}\"\n][^{d}\n]*+"
    quoted = r'"(?:[^"]++|"")*+"' if across_lines else rf'"(?:[^"\n]++|"")*+"[^{d}\n]*+'
    field = rf"(?:{quoted}|{open_field}|)"
    return re.compile(rf"{field}(?:{d}{field})*+(?=\n|\Z)")


def _mark_unclosed(
    text: str,
    line_pattern: re.Pattern[str],
    row_pattern: re.Pattern[str],
    too_many: str,
    is_one: Callable[[str], bool],
) -> tuple[str, list[str]]:
    """Replace each row with an unclosed mark by a row of too many columns that ends in its number."""
    unclosed: list[str] = []
    pieces: list[str] = []
    copied = at = 0
    while (quote := text.find('"', at)) >= 0:
        start = text.rfind("\n", 0, quote) + 1
        stop = text.find("\n", quote)
        stop = len(text) if stop < 0 else stop
        if not line_pattern.match(text, start):
            row = row_pattern.match(text, start)
            if row and is_one(row[0]):
                stop = row.end()
            else:
                pieces += [text[copied:start], f"{too_many}{_MARK}{len(unclosed)}"]
                unclosed.append(text[start:stop])
                copied = stop
        at = stop
    return "".join([*pieces, text[copied:]]), unclosed


def _is_one_row(text: str, delimiter: str, num_columns: int, url: int | None) -> bool:
    """Return whether several lines are one row: it has all columns, and none of its lines is like another row.

    Such a line has at least as many delimiters, and an address where the others have theirs.
    """
    if len(text) > _LONGEST_ROW or len(next(csv.reader(io.StringIO(text), delimiter=delimiter), [])) != num_columns:
        return False
    lines = [line.split(delimiter) for line in text.split("\n")[1:]] if url is not None and num_columns > 1 else []
    return not any(len(cells) >= num_columns and looks_like_address(cells[url].strip('" ')) for cells in lines)
