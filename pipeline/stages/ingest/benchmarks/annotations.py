"""Contents of a benchmark's annotation files, by video: a reader fills `Annotations`, which then become sources.

Values come from untrusted files: `Annotations` checks names and texts and collects the bad ones as problems.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from clipmill.base.errors import UserError
from pipeline.stages.ingest.list_files import Problem, is_unicode


@dataclass
class Entry:
    """One video of a benchmark. Without spans it is one clip, the whole video."""

    video: str  # the benchmark's name for it
    split: str
    place: str  # location where a file first names it
    texts: list[tuple[int, str]] = field(default_factory=list)  # (clip number, text)
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)  # clip number → seconds
    extra: dict[str, Any] = field(default_factory=dict)


class Annotations:
    """Entries in the order in which the files name them, and the problems found in the files."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._entries: dict[str, Entry] = {}
        self._unknown: set[str] = set()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, video: Any) -> bool:
        return isinstance(video, str) and video in self._entries

    def __getitem__(self, video: str) -> Entry:
        return self._entries[video]

    def __len__(self) -> int:
        return len(self._entries)

    def add_video(self, video: Any, split: str, place: str) -> Entry | None:
        """Return the entry of a video, creating it if needed; None for an invalid name.

        Raises UserError for a video in a second split.
        """
        if not isinstance(video, str) or not video.strip() or not video.isprintable():
            self.problem(place, "bad-line", f"not a video name: {video!r}")
            return None
        entry = self._entries.setdefault(video, Entry(video, split, place))
        if entry.split != split:
            raise UserError(
                f"SOURCES: {place}: {video} is in split {split}, but in {entry.split} at {entry.place}. A video in two "
                "splits would be used for training and for testing: remove one of the two lines."
            )
        return entry

    def add_text(self, video: Any, text: Any, place: str, clip: int = 0) -> None:
        """Add a reference text to a known video. An invalid or empty text, or an unknown video, becomes a problem."""
        if video not in self:
            self.unknown(video, place)
        elif not isinstance(text, str) or not is_unicode(text):
            self.problem(place, "bad-text", f"{video}: not a valid text: {text!r}")
        elif not text.strip():
            self.problem(place, "empty-text", f"{video}: the text is empty")
        else:
            self._entries[video].texts.append((clip, text.strip()))

    def unknown(self, video: Any, place: str) -> None:
        """Record texts of a video that no list of videos names, as one problem for all of its texts."""
        if str(video) not in self._unknown:
            self._unknown.add(str(video))
            self.problem(place, "unknown-id", f"the files have texts of {video!r}, but no list of videos names it")

    def problem(self, place: str, error_class: str, message: str) -> None:
        self.problems.append(Problem(place, error_class, message[:500]))
