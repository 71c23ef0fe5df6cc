"""Copies: videos with the same bytes, of which only the first is cut, also where they are in different volumes.

The index holds the content of every downloaded video. When the rows of a volume change, its new contents are looked up
there; what other volumes have of them is kept for both. `stages/download` finds the first of several copies.
"""

from typing import TYPE_CHECKING

import numpy as np

from shards.corpus.volume_files import INDEX

if TYPE_CHECKING:
    from shards.corpus.ledger import Ledger

MERGE_AT = 100_000  # contents in the set before they are merged into the sorted array


class Copies:
    """The contents of all volumes' videos. The temporary table `outside_copies` has those that one volume shares."""

    def __init__(self, ledger: "Ledger"):
        self.ledger = ledger
        self.sorted: np.ndarray | None = None  # hashes of all contents but those in `added`; None: not read yet
        self.added: set[int] = set()
        self.unregistered = set(ledger.volumes())
        self.loaded: int | None = None  # the volume of `outside_copies`

    def changed(self, volume: int) -> None:
        """Note that rows of a volume have changed, so that its contents may be others."""
        self.unregistered.add(volume)

    def load(self, volume: int) -> None:
        """Fill `outside_copies` for a volume."""
        if self.loaded != volume:
            self.ledger.connection.execute(
                "CREATE OR REPLACE TEMP TABLE outside_copies AS "
                f"SELECT content, video_id, ordinal, spans FROM {INDEX}.copies WHERE volume = {volume}"
            )
            self.loaded = volume

    def register(self, volume: int) -> bool:
        """Bring the index up to date with `video_contents`; return whether `outside_copies` has changed.

        Other volumes that share one of these contents are marked as changed.
        """
        if volume not in self.unregistered:
            return False
        self.unregistered.discard(volume)
        execute, here = self.ledger.connection.execute, f"{INDEX}.contents WHERE volume = {volume}"
        columns = "video_id, ordinal, content, spans"
        execute(
            f"CREATE OR REPLACE TEMP TABLE new_contents AS SELECT {columns} FROM video_contents "
            f"EXCEPT SELECT {columns} FROM {here}"
        )
        execute(
            f"CREATE OR REPLACE TEMP TABLE old_contents AS SELECT {columns} FROM {here} "
            f"EXCEPT SELECT {columns} FROM video_contents"
        )
        hashes = [row[0] for row in execute("SELECT hash(content) FROM new_contents").fetchall()]
        gone = execute("SELECT count(*) FROM old_contents").fetchall()[0][0]
        if not (hashes or gone):
            return False
        known, others = self._known(hashes), set()
        execute("BEGIN")  # what is noted of a content is noted for all volumes that have it
        if gone:
            others |= self._forget_old(volume, here)
        execute(f"INSERT INTO {INDEX}.contents BY NAME SELECT *, {volume} AS volume FROM new_contents")
        if known:
            others |= self._share_new(volume, columns)
        for other in others - {volume}:
            self.ledger.changed(other)
        execute("COMMIT")
        self.loaded = None
        return bool(others or gone)

    def _forget_old(self, volume: int, here: str) -> set[int]:
        """Delete the contents that a volume has no more; return the volumes that had copies of them."""
        execute, lost = self.ledger.connection.execute, "video_id IN (SELECT video_id FROM old_contents)"
        others = {v for (v,) in execute(f"SELECT DISTINCT volume FROM {INDEX}.copies WHERE {lost}").fetchall()}
        execute(f"DELETE FROM {INDEX}.copies WHERE {lost}")
        execute(
            f"DELETE FROM {INDEX}.copies WHERE volume = {volume} AND content IN (SELECT content FROM old_contents) "
            "AND content NOT IN (SELECT content FROM video_contents)"
        )
        execute(f"DELETE FROM {here} AND {lost}")
        return others

    def _share_new(self, volume: int, columns: str) -> set[int]:
        """Note for a volume and for the others the new contents that both have; return the others."""
        execute = self.ledger.connection.execute
        execute(
            "CREATE OR REPLACE TEMP TABLE shared AS "
            f"SELECT c.* FROM {INDEX}.contents c SEMI JOIN new_contents USING (content) WHERE volume <> {volume}"
        )
        execute(
            f"INSERT INTO {INDEX}.copies BY NAME SELECT {volume} AS volume, {columns} FROM shared "
            f"EXCEPT SELECT volume, {columns} FROM {INDEX}.copies"
        )
        execute(
            f"INSERT INTO {INDEX}.copies BY NAME SELECT s.volume, n.video_id, n.ordinal, n.content, n.spans "
            "FROM new_contents n JOIN (SELECT DISTINCT volume, content FROM shared) s USING (content)"
        )
        return {v for (v,) in execute("SELECT DISTINCT volume FROM shared").fetchall()}

    def _known(self, hashes: list[int]) -> bool:
        """Return whether one of the hashes may be of an earlier content; add all of them."""
        if self.sorted is None:
            rows = self.ledger.connection.execute(f"SELECT hash(content) AS hash FROM {INDEX}.contents").fetchnumpy()
            self.sorted = np.sort(rows["hash"].astype(np.uint64))
        wanted = np.array(hashes, np.uint64)
        places = np.searchsorted(self.sorted, wanted)
        inside = places < len(self.sorted)
        known = bool((self.sorted[places[inside]] == wanted[inside]).any()) or not self.added.isdisjoint(hashes)
        self.added.update(hashes)
        if len(self.added) > MERGE_AT:
            self.sorted = np.sort(np.concatenate([self.sorted, np.fromiter(self.added, np.uint64, len(self.added))]))
            self.added = set()
        return known
