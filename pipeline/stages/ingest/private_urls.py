"""URLs of lists with their passwords and signatures: kept in the user's state folder, never in a corpus.

`sources.url` and `sources.subtitle` have REMOVED in the place of each credential. The driver puts the full URLs back
into the tasks that download. Where they are missing (another machine or user), the list has to be given again.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clipmill.base.errors import UserError
from clipmill.base.user_state import user_state, write_private

NAME = "urls.sqlite"


@dataclass(frozen=True)
class PrivateUrl:
    """The full address behind a `url` or `subtitle` that a corpus shows without credentials."""

    video_id: str
    shown: str
    full: str


def save(urls: Iterable[PrivateUrl]) -> list[str]:
    """Keep full URLs; return the ids of those that are new or have other credentials. Raises UserError."""
    rows = [(each.video_id, each.shown, each.full) for each in urls]
    if not rows:
        return []
    path = user_state(NAME)
    write_private(path, b"")
    with _opened(path) as connection:
        changed = set()
        for video_id, shown, full in rows:
            known = connection.execute("SELECT full FROM urls WHERE video_id = ? AND shown = ?", (video_id, shown))
            if known.fetchone() != (full,):
                changed.add(video_id)
        connection.executemany("INSERT OR REPLACE INTO urls VALUES (?, ?, ?)", rows)
    return sorted(changed)


def full_urls(video_ids: Iterable[str]) -> dict[tuple[str, str], str]:
    """Return the kept URLs of these videos: (video_id, the URL as shown) → the full URL."""
    path, found = user_state(NAME), {}
    if not path.exists():
        return {}
    with _opened(path) as connection:
        for video_id in video_ids:
            for shown, full in connection.execute("SELECT shown, full FROM urls WHERE video_id = ?", (video_id,)):
                found[video_id, shown] = full
    return found


def forget(is_forgotten) -> None:
    """Delete the URLs of all videos whose id `is_forgotten` says so of."""
    path = user_state(NAME)
    if path.exists():
        with _opened(path) as connection:
            ids = [video_id for (video_id,) in connection.execute("SELECT DISTINCT video_id FROM urls")]
            gone = [(video_id,) for video_id in ids if is_forgotten(video_id)]
            connection.executemany("DELETE FROM urls WHERE video_id = ?", gone)
        with _opened(path) as connection:
            connection.execute("VACUUM")


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        connection = sqlite3.connect(path, timeout=60)
        try:
            with connection:
                columns = "video_id TEXT, shown TEXT, full TEXT"
                connection.execute(f"CREATE TABLE IF NOT EXISTS urls ({columns}, PRIMARY KEY (video_id, shown))")
            with connection:
                yield connection
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise UserError(
            f"{path} cannot be used ({error}); it holds the passwords of URLs in lists: repair or delete it, and give "
            "the lists again."
        ) from error
