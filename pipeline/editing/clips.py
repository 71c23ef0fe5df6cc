"""The clips of an editing, frozen into one Arrow file, so that it resumes with the same ones as the corpus grows.

Clips to edit are packed, were picked by the condition, and are of no video that is kept for measuring: those of splits
other than "train", those that the teacher's run was evaluated on, and, where a student is to be trained and no split
says which, a share of the videos by the hash of their ids. What is said in a clip scores it, never its caption: that
was written for its present middle frame and would hold it there.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipmill.base.atomic_file import atomic_file
from clipmill.base.errors import UserError
from clipmill.base.settings import digest
from training.editing.boundaries import VideoClips, video_clips
from training.editing.rounds import fold_of
from training.editing.settings import EditSettings

ITEMS = pa.schema(
    [
        ("unit", pa.string()),
        ("video_id", pa.string()),
        ("clip_id", pa.string()),
        ("n", pa.int32()),
        ("use", pa.string()),  # edit | validation: held out, never edited
        ("fold", pa.int32()),
        ("base_start_s", pa.float64()),
        ("base_end_s", pa.float64()),
        ("start_s", pa.float64()),  # of the frames that the clip has
        ("end_s", pa.float64()),
        ("fps", pa.float64()),
        ("text", pa.string()),  # null: none
        ("duration_s", pa.float64()),  # of the video
        ("source", pa.string()),  # a file, relative to the corpus or absolute; null: not kept
        ("source_sha256", pa.string()),
        ("tar", pa.string()),  # where the clip is, relative to the corpus
        ("mp4_offset", pa.int64()),
        ("mp4_bytes", pa.int64()),
    ]
)

_SQL = """
    SELECT c.unit, c.video_id, c.clip_id, c.n, v.split, c.span_start_s AS base_start_s, c.span_end_s AS base_end_s,
           c.start_s, c.end_s, c.fps, nullif(trim(c.text), '') AS text,
           greatest(v.duration_s, max(c.end_s) OVER (PARTITION BY c.video_id)) AS duration_s,
           v.path AS source, c.source_sha256, 'shards/' || s.shard AS tar, s.mp4_offset, s.mp4_bytes
    FROM ({picked}) p JOIN clips c USING (clip_id) JOIN videos v ON v.video_id = c.video_id
    JOIN samples s ON s.clip_id = c.clip_id AND s.mp4_offset IS NOT NULL
    ORDER BY c.unit, c.video_id, c.n, c.clip_id
"""


@dataclass(frozen=True)
class Video:
    """One video's clips that are edited: rows of `ITEMS` that have a text, in their order."""

    unit: str
    items: list[dict[str, Any]]

    @property
    def video_id(self) -> str:
        return self.items[0]["video_id"]

    def clips(self, settings: EditSettings) -> VideoClips:
        """Build the video's clips, each timed at the middle of its span. Raises ItemError for invalid times."""
        items, duration_s = self.items, self.items[0]["duration_s"]
        spans = [(item["base_start_s"], min(item["base_end_s"], duration_s)) for item in items]
        return video_clips(
            self.video_id,
            duration_s,
            [item["clip_id"] for item in items],
            [(start + end) / 2 for start, end in spans],
            settings,
            spans,
            None if items[0]["source"] else [(item["start_s"], item["end_s"]) for item in items],
        )


class Items:
    """The frozen file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read as the clips of an editing: {error}") from error
        if not self.table.schema.equals(ITEMS):
            raise UserError(f"{path} is of another clipmill: its columns are {', '.join(self.table.schema.names)}")

    @cached_property
    def hash(self) -> str:
        """Hash of everything that scores depend on; independent of where the corpus lies."""
        return digest(self.table.drop_columns(["tar", "mp4_offset", "source"]).to_pylist())

    def ids(self, use: str, fold: int | None = None) -> list[str]:
        """List clip ids, with or without a text."""
        mask = pc.equal(self.table["use"], use)
        if fold is not None:
            mask = pc.and_(mask, pc.equal(self.table["fold"], fold))
        return self.table["clip_id"].filter(mask).to_pylist()

    @cached_property
    def videos(self) -> list[Video]:
        rows = [row for row in self._to_edit if row["text"] is not None]
        groups = [list(group) for _, group in groupby(rows, key=lambda row: row["video_id"])]
        return [Video(group[0]["unit"], group) for group in groups]

    @cached_property
    def held_out_videos(self) -> set[str]:
        return set(self.table["video_id"].filter(pc.equal(self.table["use"], "validation")).to_pylist())

    @cached_property
    def clips_without_text(self) -> dict[str, list[str]]:
        """Clips to edit that have no text to be scored by, by unit."""
        found: dict[str, list[str]] = {}
        for row in self._to_edit:
            if row["text"] is None:
                found.setdefault(row["unit"], []).append(row["clip_id"])
        return found

    @cached_property
    def _to_edit(self) -> list[dict[str, Any]]:
        return self.table.filter(pc.equal(self.table["use"], "edit")).to_pylist()


def freeze_items(
    path: Path,
    corpus: str | Path,
    where: str,
    settings: EditSettings,
    *,
    trains: bool,
    never: frozenset[str] = frozenset(),
    tables: Mapping[str, str | Path] | None = None,
) -> None:
    """Write the clips of an editing, whole or not at all.

    never  videos that the teacher's run was evaluated on
    Raises UserError for SQL that picks nothing, and for a corpus in which nothing is left to edit or to validate on.
    """
    from shards.query.sql import check_selection, open_manifest, selection

    with open_manifest(corpus, tables) as connection:
        check_selection(connection, where, "--where")
        picked = f"SELECT DISTINCT clip_id FROM ({selection(where)})"
        rows = connection.sql(_SQL.format(picked=picked)).to_arrow_table().to_pylist()
    if not rows:
        raise UserError(f"--where {where!r} picks no clip of {corpus} that is packed.")
    splits = {row["split"] for row in rows}
    use = _Use(splits, settings, trains, never)
    items = [_item(row, use.of(row), Path(corpus)) for row in rows]
    counts = {name: sum(item["use"] == name for item in items) for name in ("edit", "validation")}
    if not counts["edit"]:
        raise UserError(f"--where {where!r}: all {len(items):,} clips are of videos that are kept for measuring.")
    if trains and not counts["validation"]:
        raise UserError(
            f"edit.holdout = {settings.holdout:g}: of these {len(items):,} clips none is left to validate a student "
            "on. Allowed: a larger share, more videos, or --no-train."
        )
    table = pa.Table.from_pylist([item for item in items if item["use"] in counts], ITEMS)
    with atomic_file(path, fsync=True) as file, pa.ipc.new_file(file, ITEMS) as writer:
        writer.write_table(table)


class _Use:
    """Assignment of a clip to editing, validation or measuring."""

    def __init__(self, splits: set[str | None], settings: EditSettings, trains: bool, never: frozenset[str]):
        self.has_validation = any(_is_validation(split) for split in splits)
        self.settings, self.trains, self.never = settings, trains, never

    def of(self, row: Mapping[str, Any]) -> str:
        """Return edit, validation, or measuring (neither)."""
        if _is_validation(row["split"]):
            return "validation"
        if row["split"] not in (None, "train") or row["video_id"] in self.never:
            return "measuring"
        by_hash = self.trains and not self.has_validation
        return "validation" if by_hash and _share_of(row["video_id"]) < self.settings.holdout else "edit"


def _is_validation(split: str | None) -> bool:
    return split is not None and split.startswith("val")


def _share_of(video_id: str) -> float:
    """Hash an id to [0, 1), independently of its fold."""
    return int.from_bytes(hashlib.sha256(f"held out {video_id}".encode()).digest()[:8]) / 2**64


def _item(row: dict[str, Any], use: str, corpus: Path) -> dict[str, Any]:
    source = row["source"]
    kept = source is not None and os.path.isfile(corpus / source)
    item = {name: row[name] for name in ITEMS.names if name in row}
    return item | {"use": use, "fold": fold_of(row["video_id"]), "source": source if kept else None}
