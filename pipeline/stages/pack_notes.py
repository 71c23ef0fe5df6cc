"""Note which volumes of a pack are up to date with the manifest, so that they need not be planned to find this.

The note of a volume holds a hash of all that its shards and their texts are made from, and of its files. The notes are
a cache.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb

from clipmill.base.atomic_file import write_text
from clipmill.base.settings import digest
from shards.corpus.folder import Corpus
from shards.corpus.packs import folder_of, volume_of
from shards.corpus.tombstones import tombstone_files
from shards.packing.index import FORMAT
from shards.packing.pack import FIXED, NEXT, REFERENCES, PackSettings, shard_files
from shards.query.sql import looks_at_one_row
from shards.storage.mirror import files_of

NOTES = "packed.json"  # in the corpus's private folder
OF_OTHERS = ("duplicate_group", "is_duplicate", "shard", "position")  # of `catalog`: other clips change them

Volume = int | None  # None: the whole corpus is packed as one


@dataclass(frozen=True)
class Pack:
    """A pack of a corpus: its name, "" of the main one, and its settings."""

    name: str
    settings: PackSettings

    @property
    def has_own_volumes(self) -> bool:
        """Return whether the shards of a volume depend on nothing outside it."""
        return self.settings.shuffle == "volume" and looks_at_one_row(self.settings.where, OF_OTHERS)


@dataclass(frozen=True)
class PackFiles:
    """Names of a pack's files by volume; None: those of a pack that is shuffled over the whole corpus."""

    placed: dict[Volume, list[str]]
    next: dict[Volume, list[str]]  # under `.next`

    @classmethod
    def of(cls, root: Path, pack: Pack) -> "PackFiles":
        placed: dict[Volume, list[str]] = {}
        for name in shard_files(root, pack.name):
            placed.setdefault(volume_of(name), []).append(name)
        unfinished: dict[Volume, list[str]] = {}
        for name in files_of(root).sizes(f"{folder_of(pack.name)}/{NEXT}"):  # SHARD-KEY.tar
            unfinished.setdefault(volume_of(f"{name.rpartition('-')[0]}.tar"), []).append(name)
        return cls(placed, unfinished)


@dataclass(frozen=True)
class Note:
    state: str
    num_shards: int
    num_samples: int


def current_notes(corpus: Corpus, states: Mapping[Volume, str | None], pack: Pack) -> dict[Volume, Note]:
    """Return the notes on the volumes that have not changed since, given the `states` of all volumes."""
    notes = {int(key) if key else None: Note(**note) for key, note in _read(corpus).get(pack.name, {}).items()}
    return {volume: note for volume, note in notes.items() if states.get(volume) == note.state}


def save_notes(corpus: Corpus, pack: Pack, notes: Mapping[Volume, Note]) -> None:
    """Note that these volumes are up to date, and no others."""
    of_pack = {"" if volume is None else str(volume): asdict(note) for volume, note in notes.items()}
    write_text(corpus.private / NOTES, json.dumps(_read(corpus) | {pack.name: of_pack}))


def _read(corpus: Corpus) -> dict[str, dict[str, dict]]:
    try:
        return json.loads((corpus.private / NOTES).read_text())
    except (OSError, ValueError):
        return {}


def states_of(
    corpus: Corpus, connection: duckdb.DuckDBPyConnection, pack: Pack, files: PackFiles
) -> dict[Volume, str | None]:
    """Hash what each volume is packed from, and its files by size and time; None: it has to be planned.

    A pack whose volumes depend on each other has one state, that of None. `connection`: of the published manifest.
    """
    folder = corpus.root / folder_of(pack.name)
    times = {} if corpus.store else {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    sizes = corpus.files.sizes(folder_of(pack.name))
    made_by = [FORMAT, FIXED, REFERENCES, pack.settings.fingerprint()]
    listed = {
        volume: sorted((name, sizes[name], times.get(name)) for name in files.placed.get(volume, []))
        for volume in files.placed
    }
    tables = dict(connection.execute(_TABLES).fetchall())
    if not pack.has_own_volumes or "volumes" not in tables:
        made_from = tables["videos"]
        is_known = (made_from or "").startswith("made from") and not files.next
        everything = [made_by, made_from, tombstone_files(corpus.root), sorted(map(list, listed.values()))]
        return {None: digest(everything) if is_known else None}
    contents = dict(connection.execute("SELECT volume, content FROM volumes").fetchall())
    return {
        volume: digest([made_by, contents[volume], listed.get(volume, [])])
        if contents.get(volume) and volume not in files.next
        else None
        for volume in {*contents, *files.placed, *files.next}
    }


_TABLES = "SELECT table_name, comment FROM duckdb_tables() WHERE database_name = 'manifest'"
