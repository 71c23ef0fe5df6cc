"""Freeze the clips of an editing into one Arrow file, so that it resumes with the same clips as the corpus grows.

Clips to edit are packed and meet the condition. Videos for measuring are left out: those of splits other than "train",
those of the teacher's evaluation, and, if a student is trained and no split is for validation, a share of the videos by
the hash of their ids. Clips are scored by their subtitles, not by captions: a caption describes the current middle
frame and would keep the clip there.
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
        ("text", pa.string()),  # subtitle; null: none
        ("duration_s", pa.float64()),  # of the video
        ("source", pa.string()),  # a file, relative to the corpus or absolute; null: not kept
        ("source_sha256", pa.string()),
        ("tar", pa.string()),  # of the clip, relative to the corpus
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
    """One video's clips to edit: rows of `ITEMS` with a text, in their order."""

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
    """The frozen clips of an editing."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read as the clips of an editing: {error}") from error
        if not self.table.schema.equals(ITEMS):
            columns = ", ".join(self.table.schema.names)
            raise UserError(f"{path} is from another version of clipmill: its columns are {columns}. Use a new --out.")

    @cached_property
    def hash(self) -> str:
        """Return the hash of all inputs of scores; it does not depend on the corpus's path."""
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
        """Return the ids of clips to edit without a text, by unit."""
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
    Raises UserError if no clip meets the condition, or none remains to edit or to validate on.
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
        raise UserError(
            f"--where {where!r}: all {len(items):,} clips are of videos that are kept for measuring. Pick other videos."
        )
    if trains and not counts["validation"]:
        raise UserError(
            f"edit.holdout = {settings.holdout:g}: none of the {len(items):,} clips is held out to validate a student. "
            "Allowed: a larger share, more videos, or --no-train."
        )
    table = pa.Table.from_pylist([item for item in items if item["use"] in counts], ITEMS)
    with atomic_file(path, fsync=True) as file, pa.ipc.new_file(file, ITEMS) as writer:
        writer.write_table(table)


class _Use:
    """Rule that assigns clips to editing, validation or measuring."""

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
        digest_of_id = hashlib.sha256(f"held out {row['video_id']}".encode()).digest()  # independent of the fold
        share = int.from_bytes(digest_of_id[:8]) / 2**64  # in [0, 1)
        return "validation" if by_hash and share < self.settings.holdout else "edit"


def _is_validation(split: str | None) -> bool:
    return split is not None and split.startswith("val")


def _item(row: dict[str, Any], use: str, corpus: Path) -> dict[str, Any]:
    source = row["source"]
    kept = source is not None and os.path.isfile(corpus / source)
    item = {name: row[name] for name in ITEMS.names if name in row}
    return item | {"use": use, "fold": fold_of(row["video_id"]), "source": source if kept else None}
