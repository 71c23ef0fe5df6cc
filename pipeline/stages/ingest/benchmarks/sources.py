"""Benchmark folders as sources: `msrvtt:FOLDER` among the arguments of a build.

Folder and files are untrusted.

1. A reader (`readers` beside this file) takes the protocol's videos and texts from the published annotation files.
2. Every video that they name is looked up in the folder. A video that is missing or has no text is recorded as a
   problem and not replaced.
3. The others are rows of a source list like any other: file, id, split, given spans, reference texts.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from clipmill.base.errors import ItemError, UserError
from pipeline.stages.ingest.benchmarks.annotations import Annotations, Entry
from pipeline.stages.ingest.benchmarks.folder import Folder
from pipeline.stages.ingest.benchmarks.readers import READERS
from pipeline.stages.ingest.list_files import Problem
from shards.corpus.source_ids import ID_PATTERN

BENCHMARKS = tuple(READERS)

_FIELDS = ("location", "url", "source_id", "video_id", "split", "texts", "spans", "extra")


def is_benchmark(argument: str) -> bool:
    """Return True for an argument NAME:FOLDER with the name of a known benchmark."""
    name, colon, folder = argument.partition(":")
    return bool(colon and folder) and name in READERS


def read_benchmark(argument: str) -> tuple[pa.Table, list[Problem]]:
    """Read NAME:FOLDER; return (table of strings with the columns `line` and `_FIELDS`, problems).

    Raises UserError for a folder without annotation files or without any of their videos, and for files that are
    truncated or of another format.
    """
    name, _, path = argument.partition(":")
    folder, found = Folder(argument, Path(path).absolute()), Annotations()
    READERS[name](folder, found)
    rows = list(_rows(name, folder, found))
    _require_some(argument, folder, found)
    columns = {field: pa.array([row[field] for row in rows], pa.string()) for field in _FIELDS}
    line = pa.array(range(1, len(rows) + 1), pa.int64())
    return pa.table({"line": line, **columns}), [*folder.problems, *found.problems]


def _require_some(argument: str, folder: Folder, found: Annotations) -> None:
    if not len(found):
        first = f" ({found.problems[0].location}: {found.problems[0].message})" if found.problems else ""
        raise UserError(f"SOURCES: {argument}: its annotation files name no video{first}")
    if sum(problem.error_class == "missing-video" for problem in found.problems) == len(found):
        raise UserError(
            f"SOURCES: {argument}: none of its {len(found):,} videos is below {folder.root}, "
            f"{next(iter(found)).video} for example. Put them beside the annotation files, or into a folder videos/ "
            "there."
        )


def _rows(name: str, folder: Folder, found: Annotations) -> Iterator[dict[str, str | None]]:
    """Yield a row per video with a file of its own and at least one text; the others become problems."""
    taken: dict[Path, str] = {}
    for entry in found:
        try:
            path = _video_of(name, folder, entry.video)
        except ItemError as error:
            found.problem(entry.place, error.error_class, error.message)
            continue
        other = taken.setdefault(path, entry.video)
        if other != entry.video:
            found.problem(entry.place, "ambiguous-video", f"{path} is the file of both {other} and {entry.video}")
        elif not entry.texts:
            found.problem(entry.place, "no-text", f"no annotation file has a text for {entry.video}")
        else:
            yield _row(name, path, entry)


def _video_of(name: str, folder: Folder, video: str) -> Path:
    """Find a video's file. Raises ItemError.

    ActivityNet's ids are "v_" and YouTube's id; its files may lack the "v_".
    """
    try:
        return folder.video(video)
    except ItemError as error:
        if not (name.startswith("activitynet") and video.startswith("v_") and error.error_class == "missing-video"):
            raise
        return folder.video(video.removeprefix("v_"))


def _row(name: str, path: Path, entry: Entry) -> dict[str, str | None]:
    spans = [{"n": n, "start_s": start_s, "end_s": end_s} for n, (start_s, end_s) in sorted(entry.spans.items())]
    # The benchmark's own name, made safe: a source's usual id depends on the folder's path, so results could not be
    # compared by id.
    video_id = entry.video
    if not re.fullmatch(ID_PATTERN, video_id):
        digits = hashlib.sha256(video_id.encode()).hexdigest()[:10]
        video_id = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', video_id)[:53]}-{digits}"
    return {
        "location": entry.place,
        "url": str(path),
        "source_id": entry.video,
        "video_id": video_id,
        "split": entry.split,
        "texts": json.dumps([{"n": n, "text": text} for n, text in entry.texts]),
        "spans": json.dumps(spans) if spans else None,
        "extra": json.dumps({"benchmark": name, **entry.extra}, sort_keys=True),
    }
