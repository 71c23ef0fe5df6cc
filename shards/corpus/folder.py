"""The folder of a corpus: its saved settings, and the lock that makes one process its only writer.

Of a corpus in a store, `root` is this machine's mirror (`shards.storage.mirror`). Its one writer brings the mirror up
to date, and holds two locks: the store's (`shards.storage.lease`) and that of the mirror.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from clipmill.base.atomic_file import write_text
from clipmill.base.errors import UserError
from clipmill.base.file_lock import is_locked, owner_has_died, owner_of, process_name, take_named_lock
from clipmill.base.settings import read_yaml
from shards.storage.lease import StoreLock, is_held, token_in
from shards.storage.local import PRIVATE, Files
from shards.storage.mirror import files_of, mirror, mirror_folder
from shards.storage.s3 import Store, is_url

_BEFORE_SETTINGS = ("README.txt", ".clipmill/")  # written to a store before the settings are
FORMAT = 1  # of the folder; a corpus of a newer format is refused
SETTINGS = "corpus.yaml"
LOCK = "lock"

README = """A clipmill corpus.
  corpus.yaml                 the settings it is built with
  manifest.duckdb             what is in it: open it with any DuckDB client, read-only
  fragments/TABLE/*.parquet   what workers wrote: the source of truth, the manifest can be rebuilt from it;
                              merged-*.parquet hold the rows of a whole volume that is done
  fragments/merged/*.parquet  which commits of a volume are merged, and the files that hold their rows
  sources/                    downloaded videos and subtitles
  clips/*.tar                 cut clips, before packing
  shards/*.tar                WebDataset shards, each with its index beside it; shards/NAME/ has those of pack NAME
"""


class NewerCorpus(UserError):
    """The corpus has a format that only a newer version reads."""


class Corpus:
    def __init__(self, root: str | Path):
        """Open a corpus: a folder, s3://BUCKET/PREFIX, or the mirror of one that this process has opened before."""
        if is_url(root):
            store = Store.of(str(root))
            self.root = mirror(mirror_folder(store, "corpus"), store).root
        else:
            self.root = Path(root).expanduser().absolute()
        self.files: Files = files_of(self.root)
        self.store = self.files.store
        self.name = self.store.url if self.store else str(self.root)
        self.settings_path = self.root / SETTINGS
        self.private = self.root / PRIVATE  # lock, progress and caches: never part of the corpus
        self.lock_owner = ""  # this process's name as owner of the lock; workers compare it with `lock_owner`

    @property
    def exists(self) -> bool:
        if self.store and not self._is_held_here():  # a writer on this machine has the newest settings
            self.files.refresh_file(SETTINGS)
        return self.settings_path.is_file()

    def require(self) -> "Corpus":
        """Return the corpus itself. Raises UserError if the folder is not a corpus."""
        if not self.exists:
            raise UserError(
                f"{self.name} is not a corpus (no corpus.yaml). Make one with `clipmill build SOURCES --corpus DIR`."
            )
        return self

    def create(self) -> None:
        """Make the folders. Raises UserError for a folder that cannot be written or holds other files."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._refuse_others()
            for name in (".clipmill", "fragments", "sources", "clips", "shards"):
                (self.root / name).mkdir(exist_ok=True)
            readme = self.root / "README.txt"
            if not readme.exists() or readme.read_text() != README:
                readme.write_text(README)
        except OSError as error:
            raise UserError(f"--corpus {self.root} cannot be written: {error.strerror}.") from error

    def _refuse_others(self) -> None:
        if self.exists:
            return
        if self.store:
            foreign = any(not key.startswith(_BEFORE_SETTINGS) for key in self.store.list())
        else:  # a private folder alone: a build was stopped before it saved its settings
            foreign = not self.private.exists() and any(e.name[0] != "." for e in self.root.iterdir())
        if foreign:
            raise UserError(f"{self.name} is not empty and not a corpus: give --corpus a new or empty folder.")

    # -- settings -------------------------------------------------------------------------------------------------

    def load_settings(self) -> dict:
        """Return the saved settings as plain data. Raises UserError for an unreadable corpus.yaml, NewerCorpus."""
        try:
            saved = read_yaml(self.settings_path.read_text())
            version, settings = saved["format"], saved["settings"]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
            raise UserError(f"{self.settings_path} cannot be read as a corpus's settings: {error}") from error
        if version != FORMAT:
            raise NewerCorpus(f"{self.name} has corpus format {version}; this clipmill reads format {FORMAT}.")
        if not isinstance(settings, dict):
            raise UserError(f"{self.settings_path} cannot be read as a corpus's settings: they are {settings!r}")
        return settings

    def load_marks(self) -> dict[str, list]:
        """Return the marks of settings, see `pipeline.engine.trust`; {} in a corpus.yaml without any."""
        return {name: found for name, found in self._section("trusted").items() if isinstance(found, list)}

    def load_packs(self) -> dict[str, dict]:
        """Return the settings of the named packs by name, as plain data."""
        return {name: found for name, found in self._section("packs").items() if isinstance(found, dict)}

    def _section(self, name: str) -> dict:
        """Return a mapping beside the settings in corpus.yaml, {} if there is none."""
        if not self.exists:
            return {}
        try:
            found = read_yaml(self.settings_path.read_text()).get(name)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
            return {}  # `load_settings` says what is wrong
        return found if isinstance(found, dict) else {}

    def save_settings(
        self, settings: dict, marks: dict[str, list] | None = None, packs: dict[str, dict] | None = None
    ) -> None:
        """Write corpus.yaml. `marks`, `packs`: see `load_marks` and `load_packs`; None: those that it has."""
        marks = self.load_marks() if marks is None else marks
        packs = self.load_packs() if packs is None else packs
        text = "# Settings of this corpus, resolved. Change them with `clipmill build|run … --set stage.key=value`.\n"
        content = {"format": FORMAT, "settings": settings} | ({"trusted": marks} if marks else {})
        content |= {"packs": packs} if packs else {}
        text += yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        write_text(self.settings_path, text, fsync=True)
        self.files.upload("README.txt", SETTINGS)

    # -- one writer -----------------------------------------------------------------------------------------------

    @contextmanager
    def writer(self):
        """Hold the corpus lock for the block. The lock of a process that has died is taken over.

        Of a corpus in a store, the mirror is up to date in the block, except for media.
        Raises UserError when another process has the lock.
        """
        with self.alone_here() as name:
            if self.store is None:
                self.lock_owner = name
                yield
                return
            lock = StoreLock(self.store)
            lock.take()
            self.lock_owner = lock.token
            try:
                with self.files.guarded_by(lock.check):
                    self.files.pull()
                    yield
            finally:
                lock.release()

    @contextmanager
    def alone_here(self) -> Iterator[str]:
        """Hold the lock of the folder or, for a corpus in a store, of the mirror alone; yield the owner's name in it.

        Raises UserError when another process has the lock.
        """
        self.private.mkdir(parents=True, exist_ok=True)  # a cache, which may have been deleted
        name = process_name()
        file = take_named_lock(self._lock, name)
        if file is None:
            owner = owner_of(self._lock) or "another process"
            raise UserError(f"{self.name} is being written by {owner}. Wait for it or stop it; reading is possible.")
        with file:
            self._progress.unlink(missing_ok=True)  # of an earlier build
            yield name

    @property
    def _lock(self) -> Path:
        return self.private / LOCK

    @property
    def _progress(self) -> Path:
        return self.private / "progress.json"

    def writer_name(self) -> str:
        """Return the name of the process on this machine, or sharing this folder, that holds the lock; else ""."""
        return owner_of(self._lock) if self._is_held_here() else ""

    def is_being_written(self) -> bool:
        return self._is_held_here() or (self.store is not None and is_held(self.store))

    def _is_held_here(self) -> bool:
        return self._lock.exists() and is_locked(self._lock) and not owner_has_died(self._lock)

    # -- progress of the running process, for `clipmill status` ----------------------------------------------------

    def write_progress(self, progress: dict) -> None:
        write_text(self._progress, json.dumps(progress))

    def read_progress(self) -> dict | None:
        """Return the last progress of the running build, None when no build is running."""
        if not self._is_held_here():
            return None
        try:
            return json.loads(self._progress.read_text())
        except (OSError, ValueError):
            return None  # the build has just begun


def lock_owner(root: Path, store: Store | None) -> str:
    """Return the fencing token of a corpus: the owner of its lock, or the last one. Each new writer changes it."""
    if store is None:
        try:
            return (root / PRIVATE / LOCK).read_text().strip()
        except FileNotFoundError:
            return ""  # a new owner is just taking the lock over
    return token_in(store)
