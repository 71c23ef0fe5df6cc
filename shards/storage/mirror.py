"""The files of a corpus, wherever it lies: in a folder, or in a store with a mirror of it here.

All code works on a folder. Where the corpus is in a store, that folder is a *mirror*, and the store is the truth:

1. What is written here goes up at once, and counts when it is there. A store cannot rename, so what makes other files
   count goes up after them: a commit's ledger fragment after its media and fragments, a shard's index after its tar,
   the manifest after everything. Each is one PUT, which is seen whole or not at all.
2. What is removed goes in the reverse order, first in the store and then here.
3. Small files (fragments, indexes, manifest, settings) are all here: whoever opens the corpus lists the store, fetches
   what it lacks and drops what the store has not. Media (sources, clips, shards) are fetched when somebody reads them.
4. A file here is what the store has while its size and time are those noted when it went up or came down
   (`.clipmill/etags.log`, one line per file and transfer, by any process of this machine).

A mirror may be deleted whenever nobody uses it. `files_of` knows the mirrors of this process; all else is a folder.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from clipmill.base.atomic_file import atomic_path, write_text
from clipmill.base.errors import ItemError, UserError
from clipmill.base.file_lock import lock_file
from shards.storage.s3 import CONNECTIONS, Changed, Object, Store, is_url

MANIFEST_NAME = "manifest.duckdb"
PRIVATE = ".clipmill"  # of this machine alone; in the store it holds the lock
LOOK_EVERY_S = 10.0  # at what others may write without being asked: tombstones
UNFINISHED = f"{PRIVATE}/compact.unfinished"  # there while `compact` runs: members move before the manifest says so
_SMALL = (MANIFEST_NAME, "corpus.yaml", UNFINISHED)
_LOCKLESS = "fragments/forgotten/"
_WITH_PARQUET = ("fragments/", "shards/")
Guard = Callable[..., None]  # `True`: not what it knew a moment ago will do


class Files:
    """Of a folder: what is written is there."""

    store: Store | None = None

    def __init__(self, root: Path):
        self.root = root

    def local(self, relative: str) -> Path:
        """Where it can be read. An absolute path is no file of the corpus, and stays as it is."""
        return self.root / relative

    def has(self, relative: str) -> bool:
        return (self.root / relative).exists()

    def size(self, relative: str) -> int | None:
        path = self.root / relative
        return path.stat().st_size if path.is_file() else None

    def sizes(self, folder: str) -> dict[str, int]:
        """Name → bytes of the files in a folder, without hidden ones."""
        return _sizes(self.root / folder)

    def beginning(self, start: str) -> dict[str, int]:
        """Path → bytes of the files whose path begins so; the last part of `start` is that of a name."""
        folder, _, name = start.rpartition("/")
        return {f"{folder}/{file}": size for file, size in _sizes(self.root / folder).items() if file.startswith(name)}

    def below(self, folder: str) -> dict[str, int]:
        """Path → bytes of the files in a folder and its folders."""
        files = sorted(path for path in (self.root / folder).rglob("*") if path.is_file())
        return {str(path.relative_to(self.root)): path.stat().st_size for path in files}

    def written(self, *relatives: str) -> None:
        """They are complete here, in no order among themselves."""

    def remove(self, *relatives: str) -> None:
        for relative in relatives:
            (self.root / relative).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        if (self.root / folder).exists():
            shutil.rmtree(self.root / folder)

    def move(self, old: str, new: str) -> None:
        os.replace(self.root / old, self.root / new)

    def update(self, relative: str) -> bool:
        """One small file is, or is not, here from now on as whoever wrote it last left it; whether it is."""
        return (self.root / relative).exists()

    @contextmanager
    def here_only(self) -> Iterator[None]:
        """For who only looks: what is written or removed in the block is so on this machine alone."""
        yield

    def pull(self) -> None:
        """All small files are here from now on, and no media that are gone."""

    def look(self, folder: str, every_s: float = 0.0) -> None:
        """Small files that others have written or removed in the folder are, or are not, here from now on."""


@dataclass(frozen=True)
class _Note:
    """What a file here was when it was the store's object `etag`."""

    num_bytes: int
    mtime_ns: int
    etag: str


class Mirror(Files):
    """Of a store."""

    def __init__(self, root: Path, store: Store):
        super().__init__(root)
        self.store = store
        self.guard: Guard = _nobody
        self._goes_up = True
        self._notes: dict[str, _Note] = {}
        self._notes_read = 0
        self._shards: dict[str, int] | None = None  # sizes of what is under shards/ in the store
        self._looked_at: dict[str, float] = {}

    # --- Reading

    def local(self, relative: str) -> Path:
        """Fetched first where it is not here. Raises ItemError "input-missing" where the store has it not either."""
        path = self.root / relative
        if os.path.isabs(relative) or (path.exists() and not _may_change(relative)):
            return path
        try:
            name = hashlib.sha256(relative.encode()).hexdigest()[:2]
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with lock_file(self._log.with_name(f"fetch-{name}.lock")):  # one worker fetches, the others find the file
                if not self._serves(relative):
                    self._fetch(relative)
        except FileNotFoundError as error:
            raise ItemError("input-missing", f"{self.store.url}/{relative} is not there", transient=True) from error
        return path

    def _serves(self, relative: str) -> bool:
        """Whether what is here is what the store has."""
        if not (self.root / relative).exists():
            return False
        there = self.store.head(relative) if _may_change(relative) else None
        return there is None or self._is_current(relative, there)

    def has(self, relative: str) -> bool:
        return (self.root / relative).exists() or (not os.path.isabs(relative) and bool(self.store.head(relative)))

    def size(self, relative: str) -> int | None:
        assert relative.startswith("shards/"), relative
        if self._shards is None:
            self.look("shards")
        return self._shards.get(relative)

    def sizes(self, folder: str) -> dict[str, int]:
        if folder.startswith("fragments"):
            return _sizes(self.root / folder)  # all of them are here
        there = self.store.list(f"{folder}/")
        names = {key.removeprefix(f"{folder}/"): found.num_bytes for key, found in there.items()}
        return {name: size for name, size in names.items() if "/" not in name and not name.startswith(".")}

    def beginning(self, start: str) -> dict[str, int]:
        return {key: found.num_bytes for key, found in self.store.list(start).items()}

    def below(self, folder: str) -> dict[str, int]:
        return self.beginning(f"{folder}/")

    # --- Writing

    @contextmanager
    def guarded_by(self, guard: Guard) -> Iterator[None]:
        """`guard` is asked before anything is written or removed, and raises where that must not be any more."""
        self.guard = guard
        try:
            yield
        finally:
            self.guard = _nobody

    @contextmanager
    def here_only(self) -> Iterator[None]:
        self._goes_up = False
        try:
            yield
        finally:
            self._goes_up = True

    def written(self, *relatives: str) -> None:
        if not self._goes_up:
            return
        self.guard()
        _at_once(self._send, relatives)

    def _send(self, relative: str) -> None:
        path = self.root / relative
        before = path.stat()
        if relative == MANIFEST_NAME:
            etag = self._send_manifest(path)
        else:
            etag = self.store.send(relative, path)
        self._note(relative, before, etag)
        self._seen(relative, before.st_size)

    def _send_manifest(self, path: Path) -> str:
        """In place of the one that this machine knows: a writer that lost its lock unawares cannot put an old one."""
        known = self._noted().get(MANIFEST_NAME)
        try:
            return self.store.send(MANIFEST_NAME, path, new=known is None, instead_of=known.etag if known else None)
        except Changed:
            self.guard(True)  # raises where another one writes by now; else it was our own, whose answer was lost
            there = self.store.head(MANIFEST_NAME)
            try:
                return self.store.send(MANIFEST_NAME, path, new=there is None, instead_of=there.etag if there else None)
            except Changed as error:
                raise UserError(f"{self.store.url}: somebody without the lock writes {MANIFEST_NAME}.") from error

    def remove(self, *relatives: str) -> None:
        if self._goes_up:
            self.guard()
            _at_once(self.store.delete, relatives)
        super().remove(*relatives)
        for relative in relatives:
            self._seen(relative, None)

    def remove_folder(self, folder: str) -> None:
        """Indexes first: without one, a tar is no shard."""
        keys = list(self.store.list(f"{folder}/"))
        self.remove(*(key for key in keys if not key.endswith(".tar")))
        self.remove(*(key for key in keys if key.endswith(".tar")))
        super().remove_folder(folder)

    def move(self, old: str, new: str) -> None:
        """A copy inside the store, then the old one goes: who is killed between has both."""
        self.guard()
        etag = self.store.copy(old, new)
        self._seen(new, self.size(old))
        if (self.root / old).exists():
            super().move(old, new)
            self._note(new, (self.root / new).stat(), etag)
        else:
            (self.root / new).unlink(missing_ok=True)  # another one of before
        self.remove(old)

    # --- Bringing the mirror up to date

    def pull(self) -> None:
        known = dict(self._noted())  # before the list is made: what is sent meanwhile is not in it
        there, unsent = self.store.list(), []
        for path in self._files_here():
            relative = str(path.relative_to(self.root))
            if relative.startswith(_LOCKLESS) and relative not in self._noted():
                unsent.append(relative)  # by who is about to send it, or died before
            elif relative not in there or not self._is_current(relative, there[relative]):
                if self._goes_up or relative in _SMALL or self._is_as_noted(relative, known.get(relative)):
                    path.unlink(missing_ok=True)  # else a worker of this machine may be about to send it
        self.written(*unsent)
        _at_once(self._fetch, [key for key in there if _is_small(key) and not (self.root / key).exists()])
        self._shards = {key: found.num_bytes for key, found in there.items() if key.startswith("shards/")}
        if self._goes_up:
            self._forget_notes(set(there))

    def look(self, folder: str, every_s: float = 0.0) -> None:
        now = time.monotonic()
        if folder in self._looked_at and now - self._looked_at[folder] < every_s:
            return
        there = self.store.list(f"{folder}/")
        lacking = [key for key, found in there.items() if _is_small(key) and not self._is_current(key, found)]
        _at_once(self._fetch, lacking)
        for path in (self.root / folder).rglob("*.parquet"):
            relative = str(path.relative_to(self.root))
            if relative not in there and relative in self._noted():  # else it is on its way
                path.unlink(missing_ok=True)
        if folder == "shards":
            self._shards = {key: found.num_bytes for key, found in there.items()}
        self._looked_at[folder] = now

    def update(self, relative: str) -> bool:
        there = self.store.head(relative)
        if there is None:
            (self.root / relative).unlink(missing_ok=True)
        elif not self._is_current(relative, there):
            self._fetch(relative)
        return there is not None

    def _fetch(self, key: str) -> None:
        """Raises FileNotFoundError."""
        path = self.root / key
        with atomic_path(path) as temporary:
            etag = self.store.fetch(key, temporary)
            stat = temporary.stat()
        self._note(key, stat, etag)

    def _files_here(self) -> list[Path]:
        """What the store should have, too. A download that is not complete may be gone on with."""
        folders = [self.root / name for name in ("fragments", "sources", "clips", "shards")]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        files += [self.root / name for name in _SMALL]
        ours = [path for path in files if not any(".part" in Path(name).suffixes for name in path.parts)]
        return [path for path in ours if path.is_file()]

    # --- What is known of files here

    def _is_current(self, relative: str, there: Object) -> bool:
        note = self._noted().get(relative)
        return note is not None and note.etag == there.etag and self._is_as_noted(relative, note)

    def _is_as_noted(self, relative: str, note: _Note | None) -> bool:
        if note is None:
            return False
        with suppress(FileNotFoundError):
            stat = (self.root / relative).stat()
            return (stat.st_size, stat.st_mtime_ns) == (note.num_bytes, note.mtime_ns)
        return False

    @property
    def _log(self) -> Path:
        return self.root / PRIVATE / "etags.log"

    def _note(self, relative: str, stat: os.stat_result, etag: str) -> None:
        line = f"{relative}\t{stat.st_size}\t{stat.st_mtime_ns}\t{etag}\n"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, line.encode())  # one write: lines of several processes do not mix
        finally:
            os.close(descriptor)

    def _noted(self) -> dict[str, _Note]:
        """All notes; what other processes have added since the last time is read now."""
        with suppress(FileNotFoundError), open(self._log, "rb") as file:
            if os.fstat(file.fileno()).st_size < self._notes_read:
                self._notes_read, self._notes = 0, {}  # written anew
            file.seek(self._notes_read)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._notes_read += len(whole)
            for line in whole.decode().splitlines():
                relative, num_bytes, mtime_ns, etag = line.split("\t")
                self._notes[relative] = _Note(int(num_bytes), int(mtime_ns), etag)
        return self._notes

    def _forget_notes(self, there: Set[str]) -> None:
        """The log is written anew, without what is gone. For the writer alone: others read on where they were."""
        notes = {key: note for key, note in self._noted().items() if key in there}
        lines = [f"{key}\t{note.num_bytes}\t{note.mtime_ns}\t{note.etag}\n" for key, note in notes.items()]
        write_text(self._log, "".join(lines))
        self._notes, self._notes_read = notes, len("".join(lines).encode())

    def _seen(self, relative: str, num_bytes: int | None) -> None:
        if self._shards is None:
            return
        self._shards.pop(relative, None)
        if num_bytes is not None and relative.startswith("shards/"):
            self._shards[relative] = num_bytes


def _nobody(at_once: bool = False) -> None:
    """The guard of who holds no lock: workers, who look for themselves for whom they commit, and tombstones."""


def _may_change(relative: str) -> bool:
    """Whether other bytes may come to stand under the name. Names of clip tars say what is in them."""
    return not relative.startswith("clips/")


def _is_small(key: str) -> bool:
    return key in _SMALL or (key.startswith(_WITH_PARQUET) and key.endswith(".parquet"))


def _sizes(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".") and entry.is_file()]
        return {entry.name: entry.stat().st_size for entry in sorted(found, key=lambda entry: entry.name)}


def _at_once(function: Callable[[str], object], keys: Sequence[str]) -> None:
    """Side by side, each of them; the first error after all have ended."""
    if len(keys) < 2:
        for key in keys:
            function(key)
        return
    with ThreadPoolExecutor(min(CONNECTIONS, len(keys)), thread_name_prefix="store") as pool:
        for done in [pool.submit(function, key) for key in keys]:
            done.result()


# --- Which mirror is whose

_mirrors: dict[Path, Mirror] = {}


def files_of(root: str | Path) -> Files:
    root = Path(root)
    return _mirrors.get(root) or Files(root)


def mirror(root: Path, store: Store) -> Mirror:
    """The folder `root` is a mirror of the store from now on, in this process."""
    known = _mirrors.get(root)
    if known is None or known.store != store:
        _mirrors[root] = known = Mirror(root, store)
    return known


def mirror_folder(store: Store, purpose: str) -> Path:
    """Where this machine keeps one. `purpose`: "corpus" of who writes it, "read" of who only reads."""
    base = os.environ.get("CLIPMILL_MIRROR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipmill" / "mirrors"
    name = f"{store.bucket}-{hashlib.sha256(f'{store.endpoint} {store.url}'.encode()).hexdigest()[:12]}"
    return (Path(base).expanduser().absolute() if base else cache) / name / purpose


def for_reading(corpus: str | Path, *names: str) -> Path:
    """The corpus's folder; of a corpus in a store this machine's copy, in which `names` are as the store has them.

    names  of small files; folders, of which all small files are meant, end with a slash
    """
    if not is_url(corpus):
        return Path(corpus).expanduser().absolute()
    store = Store.of(str(corpus))
    copy = mirror(mirror_folder(store, "read"), store)
    for name in names:
        copy.look(name.rstrip("/")) if name.endswith("/") else copy.update(name)
    return copy.root
