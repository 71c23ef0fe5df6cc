"""A benchmark's folder: find annotation files and videos by name, and read the files safely.

Annotation files are untrusted text and pickles. A file whose format differs from its name is a UserError with file and
line; a single bad line or entry becomes a `Problem`.
"""

import csv
import json
import os
import pickle
import struct
from collections.abc import Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from clipmill.base.errors import ItemError, UserError
from pipeline.stages.ingest.list_files import VIDEO_EXTENSIONS, Problem, decode
from pipeline.stages.ingest.sidecars import leads_out

VIDEOS = "videos"  # the only folder that may be a link: videos are often on another disk


class Folder:
    """Index of the files below a folder by name, without hidden ones.

    Linked folders are not read, except FOLDER/videos.
    """

    def __init__(self, argument: str, root: Path):
        self.argument, self.root = argument, root  # the argument as the user wrote it, for messages
        self.problems: list[Problem] = []
        self._files: dict[str, list[Path]] = {}
        self._stems: dict[str, list[Path]] = {}  # videos by name without extension
        if not root.is_dir():
            raise UserError(f"SOURCES: {argument}: {root} is not a folder; give the benchmark's folder as NAME:FOLDER")
        self._index(root)
        if (root / VIDEOS).is_symlink():
            self._index((root / VIDEOS).resolve())

    def _index(self, root: Path) -> None:
        for base, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(name for name in files if not name.startswith(".")):
                path = Path(base, name)
                if leads_out(path, root):
                    message = f"the link leads out of {root} and is not followed"
                    self.problems.append(Problem(str(path), "unsafe-symlink", message))
                    continue
                self._files.setdefault(name, []).append(path)
                stem, extension = os.path.splitext(name)
                if extension.lower() in VIDEO_EXTENSIONS:
                    self._stems.setdefault(stem, []).append(path)

    def file(self, *names: str) -> Path | None:
        """Return the first of these annotation files that exists, or None. Raises UserError if it exists twice."""
        for name in names:
            paths = self._files.get(name, [])
            if len(paths) > 1:
                raise UserError(f"SOURCES: {self.argument}: {name} exists twice, {paths[0]} and {paths[1]}: remove one")
            if paths:
                return paths[0]
        return None

    def video(self, name: str) -> Path:
        """Find the video file of this name, given with or without extension.

        Names may contain dots (LSMDC's times), and a file's extension may differ from its annotation (DiDeMo).
        Raises ItemError: missing-video, ambiguous-video.
        """
        stem, extension = os.path.splitext(name)
        by_name = self._files.get(name, []) if extension.lower() in VIDEO_EXTENSIONS else []
        other = self._stems.get(stem, []) if extension.lower() in VIDEO_EXTENSIONS else []
        for paths in (by_name, self._stems.get(name, []), other):
            if len(paths) > 1:
                raise ItemError("ambiguous-video", f"{name} exists twice, {paths[0]} and {paths[1]}: remove one")
            if paths:
                return paths[0]
        raise ItemError("missing-video", f"no video file named {name} below {self.root}")


# --- files ----------------------------------------------------------------------------------------------------------


def text_of(path: Path, problems: list[Problem]) -> str:
    """Read a text file; append decoding problems to `problems`. Raises UserError for a file that cannot be read."""
    try:
        text, found = decode(str(path), path.read_bytes())
    except OSError as error:
        raise UserError(f"SOURCES: {path} cannot be read: {error.strerror}") from error
    problems.extend(found)
    return text


def read_json(path: Path, problems: list[Problem]) -> Any:
    """Read a JSON file. Raises UserError with the line at which it is invalid."""
    try:
        return json.loads(text_of(path, problems))
    except json.JSONDecodeError as error:
        raise UserError(f"SOURCES: {path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise UserError(f"SOURCES: {path}: the JSON is nested too deeply") from error


def of_type(value: Any, kind: type, path: Path, what: str) -> Any:
    """Return the value. Raises UserError for another type than `kind`, described by `what`."""
    if not isinstance(value, kind):
        raise UserError(f"SOURCES: {path}: expected {what}, found {type(value).__name__}")
    return value


def read_json_lines(path: Path, problems: list[Problem]) -> Iterator[tuple[str, dict]]:
    """Yield (FILE:LINE, object) per line; other lines become problems. Raises UserError if no line is an object."""
    bad: list[Problem] = []
    num_good = 0
    for place, line in read_lines(path, problems):
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            bad.append(Problem(place, "bad-line", f"not JSON: {error}"))
            continue
        if isinstance(value, dict):
            num_good += 1
            yield place, value
        else:
            bad.append(Problem(place, "bad-line", f"not a JSON object: {line[:200]}"))
    if bad and not num_good:
        raise UserError(f"SOURCES: {bad[0].location}: {bad[0].message}: expected one JSON object per line")
    problems.extend(bad)


def read_lines(path: Path, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """Yield (FILE:LINE, trimmed line) for every line that is not empty."""
    for number, line in enumerate(text_of(path, problems).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line.strip(" \r")


def read_csv(path: Path, columns: tuple[str, ...], problems: list[Problem]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (FILE:LINE, row) of a table with a header line.

    Raises UserError if the table lacks one of these columns.
    """
    reader = csv.DictReader(StringIO(text_of(path, problems)))
    try:
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            found = ", ".join(reader.fieldnames or ()) or "nothing"
            raise UserError(f"SOURCES: {path}:1: no column {', '.join(missing)} in the header; there is {found}")
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                problems.append(Problem(place, "bad-line", "the line has another number of columns than the header"))
            else:
                yield place, row
    except csv.Error as error:
        raise UserError(f"SOURCES: {path}:{reader.line_num}: not a CSV table: {error}") from error


class _PlainUnpickler(pickle._Unpickler):
    """Unpickler for containers, strings and numbers only; without classes and functions a pickle cannot run code.

    It derives from Python's pure-Python unpickler: the one in C allocates as many entries as a pickle claims to have.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to the class or function {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of the file")


def read_pickle(path: Path) -> Any:
    """Read a pickle of plain containers, strings and numbers without running code.

    Raises UserError for any other pickle.
    """
    try:
        return _PlainUnpickler(BytesIO(path.read_bytes()), encoding="utf-8").load()
    except (
        pickle.UnpicklingError,
        struct.error,
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        OSError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:  # everything that the unpickler raises for invalid bytes
        reason = str(error) or type(error).__name__
        raise UserError(f"SOURCES: {path} is not a pickle of plain lists and strings: {reason}") from error
