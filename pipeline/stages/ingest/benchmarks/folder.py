"""A benchmark's folder: finding its annotation files and its videos by name, and reading the files safely.

Annotation files are untrusted text and pickles. One that is not what its name promises is the user's mistake and named
with the line where it breaks; a line or entry that is bad in itself becomes a `Problem`.
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

VIDEOS = "videos"  # the one folder that may be a link: videos often lie on another disk


class Folder:
    """Every file below a folder by name, but hidden ones. Links to folders are not entered, except FOLDER/videos."""

    def __init__(self, argument: str, root: Path):
        self.argument, self.root = argument, root  # the argument as the user wrote it, for messages
        self.problems: list[Problem] = []
        self._files: dict[str, list[Path]] = {}
        self._stems: dict[str, list[Path]] = {}  # of videos: the name without its extension
        if not root.is_dir():
            raise UserError(f"SOURCES: {argument}: {root} is no folder")
        self._index(root)
        if (root / VIDEOS).is_symlink():
            self._index((root / VIDEOS).resolve())

    def _index(self, root: Path) -> None:
        for base, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(name for name in files if not name.startswith(".")):
                path = Path(base, name)
                if leads_out(path, root):
                    message = f"leads out of {root}, not followed"
                    self.problems.append(Problem(str(path), "unsafe-symlink", message))
                    continue
                self._files.setdefault(name, []).append(path)
                stem, extension = os.path.splitext(name)
                if extension.lower() in VIDEO_EXTENSIONS:
                    self._stems.setdefault(stem, []).append(path)

    def file(self, *names: str) -> Path | None:
        """The first of these annotation files that is there. Raises UserError for one that is there twice."""
        for name in names:
            paths = self._files.get(name, [])
            if len(paths) > 1:
                twice = f"{name} is there twice, {paths[0]} and {paths[1]}"
                raise UserError(f"SOURCES: {self.argument}: {twice}: leave one")
            if paths:
                return paths[0]
        return None

    def video(self, name: str) -> Path:
        """The video file of this name, with or without its extension. Raises ItemError missing-video, ambiguous-video.

        Names may hold dots (LSMDC's times), and a file may have another extension than its annotation says (DiDeMo).
        """
        stem, extension = os.path.splitext(name)
        by_name = self._files.get(name, []) if extension.lower() in VIDEO_EXTENSIONS else []
        other = self._stems.get(stem, []) if extension.lower() in VIDEO_EXTENSIONS else []
        for paths in (by_name, self._stems.get(name, []), other):
            if len(paths) > 1:
                raise ItemError("ambiguous-video", f"{name} is there twice, {paths[0]} and {paths[1]}")
            if paths:
                return paths[0]
        raise ItemError("missing-video", f"{name}: no video of this name below {self.root}")


# --- files ----------------------------------------------------------------------------------------------------------


def text_of(path: Path, problems: list[Problem]) -> str:
    """Raises UserError for a file that cannot be read."""
    try:
        text, found = decode(str(path), path.read_bytes())
    except OSError as error:
        raise UserError(f"SOURCES: {path} cannot be read: {error.strerror}") from error
    problems.extend(found)
    return text


def read_json(path: Path, problems: list[Problem]) -> Any:
    """Raises UserError that names the line where the file stops being JSON."""
    try:
        return json.loads(text_of(path, problems))
    except json.JSONDecodeError as error:
        raise UserError(f"SOURCES: {path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise UserError(f"SOURCES: {path}: JSON that is nested too deep") from error


def of_type(value: Any, kind: type, path: Path, what: str) -> Any:
    """The value. Raises UserError where it is of another type than the published file has there."""
    if not isinstance(value, kind):
        raise UserError(f"SOURCES: {path}: expected {what}, found {type(value).__name__}")
    return value


def read_json_lines(path: Path, problems: list[Problem]) -> Iterator[tuple[str, dict]]:
    """(FILE:LINE, object) of every line; a line that is none is a problem. Raises UserError where not one is."""
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
            bad.append(Problem(place, "bad-line", f"no JSON object: {line[:200]}"))
    if bad and not num_good:
        raise UserError(f"SOURCES: {bad[0].location}: {bad[0].message}: expected one JSON object per line")
    problems.extend(bad)


def read_lines(path: Path, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """(FILE:LINE, line without spaces around it) of every line that says something."""
    for number, line in enumerate(text_of(path, problems).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line.strip(" \r")


def read_csv(path: Path, columns: tuple[str, ...], problems: list[Problem]) -> Iterator[tuple[str, dict[str, str]]]:
    """(FILE:LINE, row) of a table with a header line. Raises UserError where it lacks one of these columns."""
    reader = csv.DictReader(StringIO(text_of(path, problems)))
    try:
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            found = ", ".join(reader.fieldnames or ()) or "nothing"
            raise UserError(f"SOURCES: {path}:1: no column {', '.join(missing)} in the header; there is {found}")
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                problems.append(Problem(place, "bad-line", "another number of columns than the header has"))
            else:
                yield place, row
    except csv.Error as error:
        raise UserError(f"SOURCES: {path}:{reader.line_num}: no table: {error}") from error


class _PlainUnpickler(pickle._Unpickler):
    """Reads containers, strings and numbers. What names a class or a function, as code in a pickle must, is refused.

    It is Python's reader written in Python: the one in C takes memory for as many entries as a pickle claims to have.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of itself")


def read_pickle(path: Path) -> Any:
    """A pickle of plain containers, strings and numbers; nothing in it is run. Raises UserError for any other."""
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
    ) as error:  # all that the reader raises for bytes that are no pickle
        reason = str(error) or type(error).__name__
        raise UserError(f"SOURCES: {path} is no pickle of plain lists and strings: {reason}") from error
