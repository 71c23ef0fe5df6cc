"""Readers of source lists: every kind of SOURCES argument becomes rows of one Arrow table (`LISTED`).

Kinds: txt, csv/tsv, json/jsonl, Parquet, HD-VILA jsonl, folders, globs, single files, URLs, "-", and the folders of
published benchmarks (msrvtt:FOLDER, read by `pipeline.stages.ingest.benchmarks`). Lists are read column-wise by pyarrow
and DuckDB. An invalid line becomes a `Problem` with its location, and other lines are read. Input is untrusted text; no
URL and no video is opened here.
"""

import glob
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from clipmill.base.errors import UserError
from clipmill.base.text import sql_identifier, sql_literal
from pipeline.stages.ingest.benchmarks.sources import BENCHMARKS, is_benchmark, read_benchmark
from pipeline.stages.ingest.delimited import read_delimited
from pipeline.stages.ingest.given_spans import SPAN_FIELDS, SPANS, TEXTS, given_spans
from pipeline.stages.ingest.given_texts import texts_from_json
from pipeline.stages.ingest.list_files import VIDEO_EXTENSIONS, Problem, decode
from pipeline.stages.ingest.settings import IngestSettings
from pipeline.stages.ingest.sidecars import SUBTITLE_EXTENSIONS, leads_out, sidecars
from pipeline.stages.ingest.span_columns import SpanColumns, are_spans, span_columns, unit_of, unread_spans
from shards.corpus.source_ids import SCHEME_PATTERN, canonical_urls

LIST_EXTENSIONS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")  # all but Parquet also with .gz

# Column names that stand for a field, best first, compared case-insensitively.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "url": ("url", "video_url", "webpage_url", "link", "video_link", "contenturl", "source_url", "path", "video_path"),
    "source_id": ("id", "video_id", "videoid", "source_id", "youtube_id", "ytid"),
    "title": ("title",),
    "category": ("category", "genre"),
    "language": ("language", "lang"),
    "licence": ("licence", "license"),
    "subtitle": ("subtitle", "subtitles", "subtitle_url", "subtitle_path"),
    "split": ("split",),
    "spans": ("clip", "clips", "spans"),
    "texts": ("texts",),
}
JSON_FIELDS = ("spans", "texts")
TEXT_FIELDS = [name for name in SYNONYMS if name not in JSON_FIELDS]

LISTED = pa.schema(
    [("location", pa.string()), ("canonical", pa.string()), ("kind", pa.string())]
    + [(name, pa.string()) for name in TEXT_FIELDS]
    + [("spans", SPANS), ("texts", TEXTS), ("extra", pa.string())]
    + [("video_id", pa.string())]  # null: made from source_id and URL
)

_SAMPLE = 1000  # values of a column that decide whether it holds spans
_PIECE_BYTES = 1 << 24
_CHUNK_LINES = 200_000  # JSON lines passed to DuckDB at once: bounds memory for lists of many gigabytes


@dataclass(frozen=True)
class SourceList:
    """Sources in the arguments' order (`table` has the columns of `LISTED`) and the problems found."""

    table: pa.Table
    problems: list[Problem]


@dataclass
class _Rows:
    """One list file as read. `table` has `line` (int64) and any of the fields as strings (JSON_FIELDS as JSON text).

    It may also have the other SPAN_FIELDS, from which spans are read.
    """

    name: str  # for locations
    folder: Path  # base of the relative paths in the list
    table: pa.Table
    problems: list[Problem] = field(default_factory=list)

    def problem(self, line: int | str, error_class: str, message: str) -> None:
        self.problems.append(Problem(f"{self.name}:{line}", error_class, message[:500]))


def read_sources(arguments: list[str], settings: IngestSettings) -> SourceList:
    """Read all sources of the arguments in order, including duplicates.

    Raises UserError for an argument that does not exist, cannot be read, or is a table without a URL column.
    """
    tables, problems = [], []
    for argument in _expand(arguments):
        for rows in _read(argument, settings):
            tables.append(_listed(rows))
            if settings.read_spans:
                _report_unread_spans(rows, tables[-1])
            problems.extend(rows.problems)
    problems = list(dict.fromkeys(problems))  # a long list is read in parts, which may have the same problem
    return SourceList(pa.concat_tables(tables) if tables else LISTED.empty_table(), problems)


def _expand(arguments: list[str]) -> Iterator[str]:
    """Yield the arguments, each glob replaced by the paths it matches in sorted order."""
    for argument in arguments:
        is_glob = glob.has_magic(argument) and not re.match(SCHEME_PATTERN, argument) and not os.path.exists(argument)
        is_glob = is_glob and not is_benchmark(argument)
        if not is_glob:
            yield argument
            continue
        matches = sorted(glob.glob(argument, recursive=True))
        if not matches:
            raise UserError(f"SOURCES: no file matches {argument!r}")
        yield from matches


def _read(argument: str, settings: IngestSettings) -> Iterator[_Rows]:
    """Yield the rows of one argument by its kind: benchmark, standard input, URL, folder, video or list."""
    if is_benchmark(argument):
        yield _Rows(argument, Path.cwd(), *read_benchmark(argument))
        return
    if argument == "-":
        yield from _read_lines("stdin", Path.cwd(), sys.stdin.buffer.read(), settings)
        return
    if re.match(SCHEME_PATTERN, argument) and not argument.lower().startswith("file://"):
        yield _Rows(argument, Path.cwd(), pa.table({"line": [1], "url": [argument]}))
        return
    path = Path(_path_of_file_url(argument) if argument.lower().startswith("file://") else argument)
    if path.is_dir():
        yield _read_folder(path)
    elif not path.exists():
        raise UserError(
            f"SOURCES: {argument!r} does not exist. Give a file, folder, glob, URL, - for standard input, or a "
            f"benchmark's folder as NAME:FOLDER, NAME one of {', '.join(BENCHMARKS)}"
        )
    elif path.suffix.lower() in VIDEO_EXTENSIONS:
        yield _Rows(str(path), path.parent, _table_of_videos([Path(os.path.abspath(path))]))
    else:
        yield from _read_list(path, settings)


def _read_list(path: Path, settings: IngestSettings) -> Iterator[_Rows]:
    """Yield the rows of a list file by its extension. Raises UserError if it cannot be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] == ".gz"
    extension = suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if extension not in LIST_EXTENSIONS or (packed and extension == ".parquet"):
        raise UserError(
            f"SOURCES: {path} has the extension neither of a list ({' '.join(LIST_EXTENSIONS)}, text also .gz) "
            f"nor of a video ({' '.join(sorted(VIDEO_EXTENSIONS))})"
        )
    try:
        if extension == ".parquet":
            import pyarrow.parquet as pq

            table = pq.read_table(path)
            line = pa.array(range(1, table.num_rows + 1), pa.int64())
            table, problems = _with_valid_text(path, table)
            fields = _fields_of_table(path, table, line, settings)
            yield _Rows(str(path), path.parent.absolute(), fields, problems)
            return
        data = _unpacked(path, settings) if packed else path.read_bytes()
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
        raise UserError(f"SOURCES: {path} cannot be read: {error}") from error
    if extension in (".csv", ".tsv"):
        yield _read_csv(path, data, "\t" if extension == ".tsv" else None, settings)
    elif extension == ".json":
        yield from _read_json(path, data, settings)
    else:
        yield from _read_lines(str(path), path.parent.absolute(), data, settings)


def _unpacked(path: Path, settings: IngestSettings) -> bytes:
    """Decompress a gzip file. Raises UserError for more than `ingest.max_unpacked_bytes`."""
    data = bytearray()
    with gzip.open(path) as file:  # in pieces, because `read` allocates as many bytes as it is asked for
        while len(data) <= settings.max_unpacked_bytes and (piece := file.read(_PIECE_BYTES)):
            data += piece
    if len(data) > settings.max_unpacked_bytes:
        raise UserError(
            f"SOURCES: {path} decompresses to more than ingest.max_unpacked_bytes = {settings.max_unpacked_bytes:,} "
            "bytes; raise that setting if the list is really this long"
        )
    return bytes(data)


# --- tables ---------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, data: bytes, delimiter: str | None, settings: IngestSettings) -> _Rows:
    """Read a table with a header line; rows with another number of columns become problems."""
    from csv import Error

    from pyarrow import csv

    text, problem = decode(str(path), data)
    url_names = (settings.url_column.lower(),) if settings.url_column else SYNONYMS["url"]
    try:
        found = read_delimited(text, delimiter, url_names)
    except Error as error:
        raise UserError(f"SOURCES: the header of {path} cannot be read: {error}") from error
    if "url" not in _columns(found.names, settings):
        raise _no_url_column(path, found.names)
    invalid: list[tuple[int, str]] = []

    def skip(row) -> str:
        unclosed = found.unclosed_row(row.text)
        message = f"{row.actual_columns} columns, but the header has {row.expected_columns}: {row.text}"
        if unclosed is not None:
            message = f"a quotation mark is opened and not closed: {unclosed}"
        invalid.append((row.number or 0, message))
        return "skip"

    strings = {name: pa.string() for name in found.names}
    try:
        table = csv.read_csv(
            pa.py_buffer(found.text.encode("utf-8", "replace")),
            csv.ReadOptions(use_threads=False, skip_rows=1, column_names=found.names, block_size=1 << 24),
            csv.ParseOptions(delimiter=found.delimiter, newlines_in_values=True, invalid_row_handler=skip),
            csv.ConvertOptions(column_types=strings, strings_can_be_null=True, null_values=[""]),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"SOURCES: {path} is not a table: {error}") from error
    bad_lines = {number for number, _ in invalid}
    line = [number for number in range(2, table.num_rows + len(bad_lines) + 2) if number not in bad_lines]
    fields = _fields_of_table(path, table, pa.array(line, pa.int64()), settings)
    rows = _Rows(str(path), path.parent.absolute(), fields, problem)
    for number, message in invalid:
        rows.problem(number, "bad-line", message)
    return rows


def _fields_of_table(path: Path, table: pa.Table, line: pa.Array, settings: IngestSettings) -> pa.Table:
    """Convert known columns to strings, and the others to one JSON object per row (`extra`)."""
    import duckdb

    names = table.column_names
    names = [name if name not in names[:i] else f"{name}.{i}" for i, name in enumerate(names)]  # distinct
    columns = _columns(names, settings)
    if "url" not in columns:
        raise _no_url_column(path, names)
    table = table.rename_columns([f"c{i}" for i in range(table.num_columns)])
    # DuckDB takes names that differ by case for one, so columns have numbers there.
    text = {name: _text_sql(f"c{i}", table.schema.field(i).type) for i, name in enumerate(names)}
    known = {name: found[0] for name, found in columns.items()}
    with duckdb.connect() as connection:
        listed = connection.from_arrow(table)

        def values(name: str) -> list[str]:
            column = f"SELECT {text[name]} AS v FROM listed"
            return [v for (v,) in listed.query("listed", f"FROM ({column}) WHERE v <> '' LIMIT {_SAMPLE}").fetchall()]

        spans = _choose_span_columns(names, known, values, settings)
        picks = [f"{text[known[name]]} AS {name}" for name in known]
        used, given = set(known.values()), []
        for start, end in spans.pairs[:1]:
            units = {"start_unit": unit_of(start), "end_unit": unit_of(end)}
            picks += [f"{text[start]} AS start", f'{text[end]} AS "end"']
            picks += [f"{sql_literal(unit)} AS {name}" for name, unit in units.items()]
            used, given = used | {start, end}, [text[start], text[end]]
        for name in spans.timestamps[: 0 if spans.pairs else 1]:
            picks.append(f"{text[name]} AS timestamps")
            used, given = used | {name}, [text[name]]
        has_spans = " OR ".join(f"coalesce(trim({value}), '') <> ''" for value in given)
        shown = {name: f"c{i}" for i, name in enumerate(names) if name not in used}
        for name in spans.captions[:1]:  # a row without spans keeps its caption as a column
            picks.append(f"CASE WHEN {has_spans} THEN {text[name]} END AS captions")
            shown[name] = f"CASE WHEN NOT ({has_spans}) THEN {shown[name]} END"
        if shown:
            pairs = ", ".join(f"{sql_literal(name)}, {value}" for name, value in shown.items())
            picks.append(f"nullif(json_merge_patch('{{}}', json_object({pairs})), '{{}}') AS extra")
        result = listed.query("listed", f"SELECT {', '.join(picks)} FROM listed").to_arrow_table()
    return result.append_column("line", pa.chunked_array([line]))


def _with_valid_text(path: Path, table: pa.Table) -> tuple[pa.Table, list[Problem]]:
    """Return the table with plain types, and a problem for each column with text that is not UTF-8.

    Its wrong bytes become U+FFFD. Raises pa.ArrowInvalid for a damaged column of another type.
    """
    columns, problems = [], []
    for name, column in zip(table.column_names, map(_plain_column, table.columns), strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if not pa.types.is_string(column.type):
                raise
            values = column.cast(pa.binary()).to_pylist()
            text = [None if value is None else value.decode("utf-8", "replace") for value in values]
            column = pa.chunked_array([pa.array(text, pa.string())])
            problems.append(Problem(str(path), "bad-encoding", f"column {name}: {error}"))
        columns.append(column)
    return pa.Table.from_arrays(columns, table.column_names), problems


def _text_sql(column: str, type: pa.DataType) -> str:
    """Return SQL for a column as text: JSON for lists and structs."""
    return f"CAST({f'to_json({column})' if pa.types.is_nested(type) else column} AS VARCHAR)"


def _plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert Arrow's other kinds of strings and lists, dictionaries and UTF-8 bytes to strings and lists."""
    for type in (_plain_type(column.type, text_in_bytes=True), _plain_type(column.type, text_in_bytes=False)):
        try:
            plain = column.cast(type)
            plain.validate()
            return plain
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # bytes that are not text; more than 2 GB of text
            continue
    if pa.types.is_nested(column.type):  # pyarrow converts views of lists in views of lists to damaged arrays
        return pa.chunked_array([pa.array(column.to_pylist(), type)])
    return column


def _plain_type(type: pa.DataType, *, text_in_bytes: bool) -> pa.DataType:
    kinds, plain = pa.types, partial(_plain_type, text_in_bytes=text_in_bytes)
    if isinstance(type, pa.BaseExtensionType):
        return plain(type.storage_type)
    if kinds.is_dictionary(type):
        return plain(type.value_type)
    if kinds.is_large_string(type) or kinds.is_string_view(type):
        return pa.string()
    if kinds.is_binary(type) or kinds.is_large_binary(type) or kinds.is_binary_view(type):
        return pa.string() if text_in_bytes else pa.binary()
    if kinds.is_list(type) or kinds.is_large_list(type) or kinds.is_list_view(type) or kinds.is_large_list_view(type):
        return pa.list_(plain(type.value_type))
    if kinds.is_fixed_size_list(type):
        return pa.list_(plain(type.value_type))
    if kinds.is_struct(type):
        return pa.struct([pa.field(child.name, plain(child.type)) for child in type.fields])
    return type


def _choose_span_columns(
    names: list[str], known: dict, values: Callable[[str], list[str]], settings: IngestSettings
) -> SpanColumns:
    """Return the columns from which the spans of a list are read: its pairs, or else the lists of spans.

    `known` maps fields to columns (or lists of them). A column "clip" that holds something else, as the name of a file,
    is taken out of it if there is a pair. `values` gives some values of a column as text.
    """
    found = span_columns(names) if settings.read_spans else SpanColumns([], [], [])
    taken = {name for column in known.values() for name in ([column] if isinstance(column, str) else column)}
    pairs = [pair for pair in found.pairs if taken.isdisjoint(pair)]
    spans = known.get("spans", [])
    given = [value for name in ([spans] if isinstance(spans, str) else spans) for value in values(name)]
    if pairs and given and not are_spans(given):
        del known["spans"]
    if "spans" in known:
        return SpanColumns([], [], [])
    timestamps = [name for name in found.timestamps if name not in taken and are_spans(values(name))]
    captions = [name for name in found.captions if name not in taken and "texts" not in known]
    return SpanColumns(pairs, timestamps, captions if pairs or timestamps else [])


def _no_url_column(path: Path, names: list[str]) -> UserError:
    return UserError(
        f"SOURCES: {path} has no URL column (its columns: {', '.join(names) or 'none'}). "
        f"Call it one of {', '.join(SYNONYMS['url'])}, or name it with ingest.url_column"
    )


def _columns(names: list[str], settings: IngestSettings) -> dict[str, list[str]]:
    """Return the names that stand for each field, best first: of names that differ by case, the one in lower case.

    A column named by a setting is the only one for its field.
    """
    lowered: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: name != name.lower()):
        lowered.setdefault(name.strip().lower(), []).append(name)
    found = {}
    for wanted, synonyms in SYNONYMS.items():
        named = {"url": settings.url_column, "source_id": settings.id_column}.get(wanted)
        candidates = [named] if named else [name for synonym in synonyms for name in lowered.get(synonym, [])]
        candidates = [name for name in candidates if name in names]
        if candidates:
            found[wanted] = candidates
    return found


# --- lines ----------------------------------------------------------------------------------------------------------


def _read_lines(name: str, folder: Path, data: bytes, settings: IngestSettings) -> Iterator[_Rows]:
    """Yield one source per line: a URL or a path, or a JSON object if the first line is one.

    In plain lists, empty lines and lines that start with # are skipped.
    """
    text, problems = decode(name, data)
    lines = text.split("\n")
    first = next((line for line in lines if line.strip()), "")
    is_json = first.lstrip().startswith("{")
    for start in range(0, len(lines), _CHUNK_LINES):
        values = pa.array(lines[start : start + _CHUNK_LINES], pa.string())
        numbers = pa.array(range(start + 1, start + 1 + len(values)), pa.int64())
        values = pc.utf8_trim_whitespace(values)
        skipped = pc.equal(values, "") if is_json else pc.match_substring_regex(values, "^(?:#.*)?$")
        kept = pa.table({"line": numbers, "text": values}).filter(pc.invert(skipped))
        if is_json:
            yield _read_json_lines(_Rows(name, folder, kept, problems), settings)
        else:
            yield _Rows(name, folder, kept.rename_columns(["line", "url"]), problems)
        problems = []


def _read_json(path: Path, data: bytes, settings: IngestSettings) -> Iterator[_Rows]:
    """Yield the sources of a JSON array of objects or URLs. JSON lines with this extension are accepted, too."""
    text, problems = decode(str(path), data)
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if not text.lstrip().startswith("{"):
            raise UserError(f"SOURCES: {path} is not valid JSON: {error}") from error
        yield from _read_lines(str(path), path.parent.absolute(), data, settings)
        return
    values = values if isinstance(values, list) else [values]
    text_column = pa.array([json.dumps(value) for value in values], pa.string())
    table = pa.table({"line": pa.array(range(1, len(values) + 1), pa.int64()), "text": text_column})
    yield _read_json_lines(_Rows(str(path), path.parent.absolute(), table, problems), settings)


def _read_json_lines(rows: _Rows, settings: IngestSettings) -> _Rows:
    """Convert JSON values, one per row of `text`, to fields. Values other than objects and strings become problems."""
    import duckdb

    with duckdb.connect() as connection:
        connection.register("lines", rows.table)
        connection.execute(
            "CREATE TABLE parsed AS SELECT line, text, "
            "CASE WHEN json_valid(text) THEN json_type(text) END AS type FROM lines"
        )
        bad = "SELECT line, text FROM parsed WHERE type IS NULL OR type NOT IN ('OBJECT', 'VARCHAR') ORDER BY line"
        for line, text in connection.execute(bad).fetchall():
            rows.problem(line, "bad-line", f"neither a JSON object nor a string: {text[:200]}")
        keys = "SELECT DISTINCT unnest(json_keys(text)) AS key FROM parsed WHERE type = 'OBJECT' ORDER BY key"
        names = [key for (key,) in connection.execute(keys).fetchall()]

        def values(name: str) -> list[str]:
            column = f"SELECT text->>{_pointer(name)} AS v FROM parsed WHERE type = 'OBJECT'"
            return [v for (v,) in connection.execute(f"FROM ({column}) WHERE v <> '' LIMIT {_SAMPLE}").fetchall()]

        columns = _columns(names, settings)
        spans = _choose_span_columns(names, columns, values, settings)
        picks = _json_picks(columns, spans)
        good = f"SELECT line, {picks} FROM parsed WHERE type IN ('OBJECT', 'VARCHAR') ORDER BY line"
        rows.table = connection.sql(good).to_arrow_table()
    return rows


def _pointer(key: str) -> str:
    """Return the JSON pointer to a key as an SQL literal."""
    return sql_literal("/" + key.replace("~", "~0").replace("/", "~1"))


def _json_picks(columns: dict[str, list[str]], spans: SpanColumns) -> str:
    """Return the SELECT list that takes the fields out of the JSON column `text`. Other keys become `extra`.

    Objects may use other keys for one field. The first key with a value gives it, and the others stay in `extra`.
    """
    picks, extra = [], "text"

    def pick(name: str, choices: list[tuple[str, str, list[str]]], default: str = "NULL") -> None:
        """Take the value of the first of (condition, value, keys) that holds, and its keys out of `extra`."""
        nonlocal extra
        cases = "".join(f" WHEN {condition} THEN {taken}" for condition, taken, _ in choices) or " WHEN false THEN NULL"
        picks.append(f"CASE{cases} ELSE {default} END AS {sql_identifier(name)}")
        unused = [(condition, sql_literal(json.dumps(dict.fromkeys(keys)))) for condition, _, keys in choices if keys]
        gone = "".join(f" WHEN {condition} THEN {nulls}" for condition, nulls in unused)
        extra = f"json_merge_patch({extra}, CASE{gone} ELSE '{{}}' END)" if gone else extra

    def value(key: str) -> str:
        return f"text->>{_pointer(key)}"

    for name in SYNONYMS:
        if name in columns or name == "url":
            choices = [(f"{value(key)} IS NOT NULL", value(key), [key]) for key in columns.get(name, [])]
            pick(name, choices, "CASE WHEN type = 'VARCHAR' THEN text->>'$' END" if name == "url" else "NULL")
    given = [(f"coalesce({value(start)}, {value(end)}) IS NOT NULL", start, end) for start, end in spans.pairs]
    if given:
        pick("start", [(condition, value(start), [start, end]) for condition, start, end in given])
        pick("end", [(condition, value(end), []) for condition, _, end in given])
        pick("start_unit", [(condition, sql_literal(unit_of(start)), []) for condition, start, _ in given])
        pick("end_unit", [(condition, sql_literal(unit_of(end)), []) for condition, _, end in given])
    pairless = "".join(f" AND NOT ({condition})" for condition, _, _ in given)
    timestamps = [(f"{value(key)} IS NOT NULL{pairless}", value(key), [key]) for key in spans.timestamps]
    if timestamps:
        pick("timestamps", timestamps)
    if spans.captions:
        has_spans = " OR ".join(condition for condition, *_ in [*given, *timestamps])
        pick("captions", [(f"({has_spans}) AND {value(key)} IS NOT NULL", value(key), [key]) for key in spans.captions])
    picks.append(f"CASE WHEN type = 'OBJECT' THEN nullif(json_merge_patch('{{}}', {extra}), '{{}}') END AS extra")
    return ", ".join(picks)


# --- folders --------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> _Rows:
    """List the videos below a folder by their relative path; linked folders are not entered."""
    root = Path(os.path.abspath(folder))
    rows = _Rows(str(folder), root, LISTED.empty_table())
    videos: list[Path] = []
    for base, folders, files in os.walk(root):
        folders.sort()
        links = [name for name in folders if Path(base, name).is_symlink()]
        media = [name for name in files if _extension(name) in VIDEO_EXTENSIONS.union(SUBTITLE_EXTENSIONS)]
        for name in [*links, *media]:
            path = Path(base, name)
            if leads_out(path, root):
                message = f"the link leads out of {folder} and is not followed"
                rows.problems.append(Problem(str(path), "unsafe-symlink", message))
            elif _extension(name) in VIDEO_EXTENSIONS and name not in links and not name.startswith("."):
                videos.append(path)
    if not videos and not rows.problems:
        raise UserError(f"SOURCES: {folder} has no video file ({' '.join(sorted(VIDEO_EXTENSIONS))})")
    videos.sort(key=lambda path: path.relative_to(root).parts)
    rows.table = _table_of_videos(videos)
    return rows


def _table_of_videos(videos: list[Path]) -> pa.Table:
    subtitles = [next((str(found) for found, _ in sidecars(path)), None) for path in videos]
    return pa.table(
        {
            "line": pa.array(range(1, len(videos) + 1), pa.int64()),
            "url": pa.array([str(path) for path in videos], pa.string()),
            "subtitle": pa.array(subtitles, pa.string()),
        }
    )


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


# --- from fields to sources -----------------------------------------------------------------------------------------


def _listed(rows: _Rows) -> pa.Table:
    """Convert rows with a valid URL or path to the columns of `LISTED`; every other row becomes a problem."""
    table = rows.table
    count = table.num_rows
    fields = {name: _text(table, name) for name in TEXT_FIELDS}
    kind, url, refusals = _addresses(fields["url"], rows.folder)
    canonical = canonical_urls(url)
    given = given_spans({name: _text(table, name) for name in SPAN_FIELDS})
    bad_spans = given.bad_spans
    texts, spans, bad_texts = texts_from_json(_text(table, "texts"), given.spans)
    texts = pc.if_else(pc.is_null(texts), given.texts, texts)
    line = table["line"].combine_chunks() if count else pa.array([], pa.int64())
    location = pc.binary_join_element_wise(rows.name, pc.cast(line, pa.string()), ":")
    columns = {
        "location": pc.coalesce(_text(table, "location"), location),
        "canonical": canonical,
        "kind": kind,
        **fields,
        "url": url,
        "subtitle": _located(fields["subtitle"], rows.folder),
        "spans": spans,
        "texts": texts,
        "extra": _text(table, "extra"),
        "video_id": _text(table, "video_id"),
    }
    for index in pc.indices_nonzero(pc.is_null(canonical)).to_pylist():
        error_class, message = refusals.get(index) or ("bad-url", f"not a valid URL: {fields['url'][index]}")
        rows.problem(line[index].as_py(), error_class, message)
    for index, message in bad_spans:
        rows.problem(line[index].as_py(), "bad-span", message)
    for index, message in given.bad_texts:
        rows.problem(line[index].as_py(), "bad-text", message)
    for index, position, error_class, message in bad_texts:
        rows.problem(f"{line[index]}#/texts/{position}", error_class, message)
    # A row whose spans are all bad gives no source, since no clip could be cut from it.
    with_bad_spans = pa.array([index for index, _ in bad_spans], pa.int64())
    empty = pc.fill_null(pc.equal(pc.list_value_length(spans), 0), False)
    dropped = pc.and_(empty, pc.is_in(pa.array(range(count), pa.int64()), value_set=with_bad_spans))
    listed = pa.table([columns[name] for name in LISTED.names], schema=LISTED)
    return listed.filter(pc.and_not(pc.is_valid(canonical), dropped))


def _report_unread_spans(rows: _Rows, listed: pa.Table) -> None:
    """Report columns, and fragments of URLs, that look like spans in a list from which no span was read."""
    if listed["spans"].null_count < listed.num_rows:
        return
    message = unread_spans(listed["extra"])
    if message:
        rows.problems.append(Problem(rows.name, "unread-spans", message))
    timed = pc.match_substring_regex(listed["url"], r"^[A-Za-z][A-Za-z0-9+.-]*://[^#]*#(?:.*&)?t=[^&]*\d")
    if pc.any(timed).as_py():
        message = (
            "URLs that end in #t=START,END stand for the whole video; list spans in columns such as start_s and end_s"
        )
        rows.problems.append(Problem(rows.name, "unread-spans", message))


def _text(table: pa.Table, name: str) -> pa.Array:
    """Return a column as trimmed strings, null if it is empty or the table lacks it."""
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    values = pc.utf8_trim_whitespace(pc.cast(table[name].combine_chunks(), pa.string()))
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)


def _addresses(values: pa.Array, folder: Path) -> tuple[pa.Array, pa.Array, dict[int, tuple[str, str]]]:
    """Return (kind, URL or path, {index: (error class, message)}) for the addresses of a list.

    Paths are absolute; an address that cannot be used is null.
    """
    is_url = pc.fill_null(pc.match_substring_regex(values, f"^{SCHEME_PATTERN}[^/?#]"), False)
    clean = pc.invert(pc.match_substring_regex(values, r"[\x00-\x20\x7f]"))
    usable = pc.and_(is_url, pc.fill_null(clean, False))
    url = pc.if_else(usable, values, pa.scalar(None, pa.string()))
    refusals: dict[int, tuple[str, str]] = {}
    paths: dict[int, str] = {}
    for index in pc.indices_nonzero(pc.invert(usable)).to_pylist():
        path, refusal = _local_path(values[index].as_py(), folder)
        if refusal:
            refusals[index] = refusal
        else:
            paths[index] = path
    is_path = pa.array([index in paths for index in range(len(values))] if paths else [False] * len(values), pa.bool_())
    url = pc.replace_with_mask(url, is_path, pa.array(list(paths.values()), pa.string()))
    return pc.if_else(is_path, "file", "url"), url, refusals


def _local_path(value: str | None, folder: Path) -> tuple[str, tuple[str, str] | None]:
    """Return (absolute path, None) for an existing local file, or ("", (error class, message))."""
    if value is None:
        return "", ("missing-url", "this row has no URL")
    if value.lower().startswith("file://"):
        path = _path_of_file_url(value)
    elif re.match(SCHEME_PATTERN, value):
        return "", ("bad-url", f"not a valid URL (no host, or it has spaces or control characters): {value!r}")
    else:
        path = value
    if "\0" in path:
        return "", ("bad-url", f"the path has a NUL character: {value!r}")
    path = os.path.abspath(folder / path)
    if not os.path.lexists(path):
        return "", ("bad-url", f"neither a URL nor an existing file: {value!r}")
    return path, None


def _path_of_file_url(url: str) -> str:
    return unquote(urlsplit(url).path)


def _located(values: pa.Array, folder: Path) -> pa.Array:
    """Return subtitle addresses: URLs unchanged, paths made absolute from the list's folder."""
    if values.null_count == len(values):
        return values
    resolve: Callable[[str], str] = lambda value: (  # noqa: E731
        value
        if re.match(SCHEME_PATTERN, value) and not value.lower().startswith("file://")
        else os.path.abspath(folder / (_path_of_file_url(value) if value.lower().startswith("file://") else value))
    )
    return pa.array([value if value is None else resolve(value) for value in values.to_pylist()], pa.string())
