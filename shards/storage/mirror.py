"""The mirror: a folder on this machine with the files of a corpus that lies in an object store.

All other code works on the folder; the store has the valid state:

1. Written files are uploaded at once, and count when the store has them. A store cannot rename files, so the file
   that makes others count is uploaded after them: a commit's ledger fragment after its media and fragments, a shard's
   index after its tar, the manifest after everything. Each upload is one PUT, which readers see whole or not at all.
2. Files are removed in the reverse order, first from the store and then from the mirror.
3. All small files (fragments, indexes, manifest, settings) are in the mirror: opening a corpus lists the store, fetches
   what is missing and deletes what the store does not have. Media (sources, clips, shards) are fetched when they are
   read.
4. A file here is the store's object as long as its size and time are those noted when it was uploaded or fetched
   (`.clipmill/etags.log`: one line per file and transfer, appended by every process of this machine).

A mirror may be deleted while nothing uses it. `files_of` knows the mirrors of this process; other folders are corpora.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from clipmill.base.atomic_file import atomic_path, write_text
from clipmill.base.errors import ItemError, UserError
from clipmill.base.file_lock import lock_file
from shards.storage.local import MANIFEST_NAME, PRIVATE, UNFINISHED, Files, file_sizes
from shards.storage.s3 import CONNECTIONS, Changed, Object, Store, is_url

REFRESH_EVERY_S = 10.0  # for files that other machines write without taking the lock: tombstones
_SMALL = (MANIFEST_NAME, "corpus.yaml", UNFINISHED)
_WRITTEN_WITHOUT_LOCK = "fragments/forgotten/"
_WITH_PARQUET = ("fragments/", "shards/")
Guard = Callable[..., None]  # guard(True) asks the store even right after another check


@dataclass(frozen=True)
class _Note:
    """Size and time that a file had here when it was the store's object `etag`."""

    num_bytes: int
    mtime_ns: int
    etag: str


class Mirror(Files):
    """Files of a corpus in a store, with a mirror of it in the folder `root`."""

    def __init__(self, root: Path, store: Store):
        super().__init__(root)
        self.store = store
        self.guard: Guard = _no_guard
        self._uploads = True
        self._notes: dict[str, _Note] = {}
        self._notes_read = 0  # bytes of the log that `_notes` is made from
        self._shards: dict[str, int] | None = None  # path → bytes of the store's files under shards/
        self._refreshed_at: dict[str, float] = {}

    # --- Reading

    def local(self, relative: str) -> Path:
        """Return the path of a file in the mirror, fetched first if it is missing or outdated.

        Raises ItemError "input-missing" when the store does not have it either.
        """
        path = self.root / relative
        if os.path.isabs(relative) or (path.exists() and not _may_change(relative)):
            return path
        try:
            name = hashlib.sha256(relative.encode()).hexdigest()[:2]
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with lock_file(self._log.with_name(f"fetch-{name}.lock")):  # one worker fetches, the others find the file
                remote = self.store.head(relative) if path.exists() and _may_change(relative) else None
                if not path.exists() or (remote and not self._is_current(relative, remote)):
                    self._fetch(relative)
        except FileNotFoundError as error:
            raise ItemError("input-missing", f"{self.store.url}/{relative} does not exist", transient=True) from error
        return path

    def has(self, relative: str) -> bool:
        return (self.root / relative).exists() or (not os.path.isabs(relative) and bool(self.store.head(relative)))

    def size(self, relative: str) -> int | None:
        """Return the size in bytes of a file under shards/ in the store, None if it does not exist."""
        assert relative.startswith("shards/"), relative
        if self._shards is None:
            self.refresh("shards")
        return self._shards.get(relative)

    def sizes(self, folder: str) -> dict[str, int]:
        if folder.startswith("fragments"):
            return file_sizes(self.root / folder)  # all of them are here
        names = {key.removeprefix(f"{folder}/"): size for key, size in self.below(folder).items()}
        return {name: size for name, size in names.items() if "/" not in name and not name.startswith(".")}

    def list_prefix(self, prefix: str) -> dict[str, int]:
        return {key: found.num_bytes for key, found in self.store.list(prefix).items()}

    def below(self, folder: str) -> dict[str, int]:
        return self.list_prefix(f"{folder}/")

    def list_all(self) -> dict[str, int]:
        return self.list_prefix("")

    # --- Writing

    @contextmanager
    def guarded_by(self, guard: Guard) -> Iterator[None]:
        """Call `guard` before anything is uploaded or removed in the block; it raises when the lock is lost."""
        self.guard = guard
        try:
            yield
        finally:
            self.guard = _no_guard

    @contextmanager
    def local_only(self) -> Iterator[None]:
        self._uploads = False
        try:
            yield
        finally:
            self._uploads = True

    def upload(self, *relatives: str) -> None:
        if not self._uploads:
            return
        self.guard()
        _in_parallel(self._upload_one, relatives)

    def _upload_one(self, relative: str) -> None:
        path = self.root / relative
        before = path.stat()
        if relative == MANIFEST_NAME:
            etag = self._upload_manifest(path)
        else:
            etag = self.store.upload(relative, path)
        self._note(relative, before, etag)
        self._note_shard(relative, before.st_size)

    def _upload_manifest(self, path: Path) -> str:
        """Replace the version of the manifest that this machine knows, and no other; return the new ETag.

        So a process that has lost its lock and does not know it cannot replace a newer manifest.
        """
        known = self._read_notes().get(MANIFEST_NAME)
        try:
            return self.store.upload(MANIFEST_NAME, path, **_in_place_of(known))
        except Changed:
            self.guard(True)  # raises when another process has the lock; else the answer to our own PUT was lost
            remote = self.store.head(MANIFEST_NAME)
            try:
                return self.store.upload(MANIFEST_NAME, path, **_in_place_of(remote))
            except Changed as error:
                raise UserError(
                    f"{self.store.url}: another program writes {MANIFEST_NAME} without taking the corpus lock; stop it."
                ) from error

    def remove(self, *relatives: str) -> None:
        if self._uploads:
            self.guard()
            _in_parallel(self.store.delete, relatives)
        super().remove(*relatives)
        for relative in relatives:
            self._note_shard(relative, None)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder, its indexes first: a tar without an index is not a shard."""
        keys = list(self.store.list(f"{folder}/"))
        self.remove(*(key for key in keys if not key.endswith(".tar")))
        self.remove(*(key for key in keys if key.endswith(".tar")))
        super().remove_folder(folder)

    def move(self, old: str, new: str) -> None:
        """Copy a file inside the store, then remove the old one; a kill between the two leaves both."""
        self.guard()
        etag = self.store.copy(old, new)
        self._note_shard(new, self.size(old))
        if (self.root / old).exists():
            super().move(old, new)
            self._note(new, (self.root / new).stat(), etag)
        else:
            (self.root / new).unlink(missing_ok=True)  # an older file of that name
        self.remove(old)

    # --- Bringing the mirror up to date

    def pull(self) -> None:
        known = dict(self._read_notes())  # before the list is made, which lacks later uploads
        remote, not_uploaded = self.store.list(), []
        for path in self._files_here():
            relative = str(path.relative_to(self.root))
            if relative.startswith(_WRITTEN_WITHOUT_LOCK) and relative not in self._read_notes():
                not_uploaded.append(relative)  # its writer will upload it, or was killed before
            elif relative not in remote or not self._is_current(relative, remote[relative]):
                if self._uploads or relative in _SMALL or self._is_as_noted(relative, known.get(relative)):
                    path.unlink(missing_ok=True)  # else a worker of this machine may still upload it
        self.upload(*not_uploaded)
        _in_parallel(self._fetch, [key for key in remote if _is_small(key) and not (self.root / key).exists()])
        self._shards = {key: found.num_bytes for key, found in remote.items() if key.startswith("shards/")}
        if self._uploads:  # this process is the one writer of the corpus: others continue to read from an offset
            notes = {key: note for key, note in self._read_notes().items() if key in remote}
            text = "".join(f"{key}\t{note.num_bytes}\t{note.mtime_ns}\t{note.etag}\n" for key, note in notes.items())
            write_text(self._log, text)
            self._notes, self._notes_read = notes, len(text.encode())

    def refresh(self, folder: str, every_s: float = 0.0) -> None:
        now = time.monotonic()
        if folder in self._refreshed_at and now - self._refreshed_at[folder] < every_s:
            return
        remote = self.store.list(f"{folder}/")
        missing = [key for key, found in remote.items() if _is_small(key) and not self._is_current(key, found)]
        _in_parallel(self._fetch, missing)
        for path in (self.root / folder).rglob("*.parquet"):
            relative = str(path.relative_to(self.root))
            if relative not in remote and relative in self._read_notes():  # else its upload has not begun
                path.unlink(missing_ok=True)
        if folder == "shards":
            self._shards = {key: found.num_bytes for key, found in remote.items()}
        self._refreshed_at[folder] = now

    def refresh_file(self, relative: str) -> bool:
        remote = self.store.head(relative)
        if remote is None:
            (self.root / relative).unlink(missing_ok=True)
        elif not self._is_current(relative, remote):
            self._fetch(relative)
        return remote is not None

    def _fetch(self, key: str) -> None:
        """Download one object into the mirror. Raises FileNotFoundError."""
        path = self.root / key
        with atomic_path(path) as temporary:
            etag = self.store.download(key, temporary)
            stat = temporary.stat()
        self._note(key, stat, etag)

    def _files_here(self) -> list[Path]:
        """List the files that the store should have, too; unfinished downloads (.part) are not among them."""
        folders = [self.root / name for name in ("fragments", "sources", "clips", "shards")]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        files += [self.root / name for name in _SMALL]
        ours = [path for path in files if not any(".part" in Path(name).suffixes for name in path.parts)]
        return [path for path in ours if path.is_file()]

    # --- Notes: the object of the store that each file here is a copy of

    def _is_current(self, relative: str, remote: Object) -> bool:
        note = self._read_notes().get(relative)
        return note is not None and note.etag == remote.etag and self._is_as_noted(relative, note)

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

    def _read_notes(self) -> dict[str, _Note]:
        """Return all notes, with those that other processes have appended since the last call."""
        with suppress(FileNotFoundError), open(self._log, "rb") as file:
            if os.fstat(file.fileno()).st_size < self._notes_read:
                self._notes_read, self._notes = 0, {}  # the log was rewritten
            file.seek(self._notes_read)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._notes_read += len(whole)
            for line in whole.decode().splitlines():
                relative, num_bytes, mtime_ns, etag = line.split("\t")
                self._notes[relative] = _Note(int(num_bytes), int(mtime_ns), etag)
        return self._notes

    def _note_shard(self, relative: str, num_bytes: int | None) -> None:
        """Record a change to shards/ without listing the store again; None: the file was removed."""
        if self._shards is None:
            return
        self._shards.pop(relative, None)
        if num_bytes is not None and relative.startswith("shards/"):
            self._shards[relative] = num_bytes


def _no_guard(at_once: bool = False) -> None:
    """Guard of processes without the lock: workers, which compare lock owners themselves, and tombstones."""


def _in_place_of(known: Object | _Note | None) -> dict[str, str | bool]:
    """Return the condition of a PUT that replaces this version of an object, or creates the object."""
    return {"if_match": known.etag} if known else {"if_none_match": True}


def _may_change(relative: str) -> bool:
    """Return whether a file's content may change under its name; names of clip tars are made from their content."""
    return not relative.startswith("clips/")


def _is_small(key: str) -> bool:
    return key in _SMALL or (key.startswith(_WITH_PARQUET) and key.endswith(".parquet"))


def _in_parallel(function: Callable[[str], object], keys: Sequence[str]) -> None:
    """Call a function for every key in threads; raise the first error after all have ended."""
    if len(keys) < 2:
        for key in keys:
            function(key)
        return
    with ThreadPoolExecutor(min(CONNECTIONS, len(keys)), thread_name_prefix="store") as pool:
        for done in [pool.submit(function, key) for key in keys]:
            done.result()


# --- The mirrors of this process

_mirrors: dict[Path, Mirror] = {}


def files_of(root: str | Path) -> Files:
    """Return the files of a corpus folder, or of the mirror that this folder is in this process."""
    root = Path(root)
    return _mirrors.get(root) or Files(root)


def mirror(root: Path, store: Store) -> Mirror:
    """Make a folder the mirror of a store, for this process."""
    known = _mirrors.get(root)
    if known is None or known.store != store:
        _mirrors[root] = known = Mirror(root, store)
    return known


def mirror_folder(store: Store, purpose: str) -> Path:
    """Return the folder of this machine's mirror. `purpose`: "corpus" for the writer, "read" for readers."""
    base = os.environ.get("CLIPMILL_MIRROR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipmill" / "mirrors"
    name = f"{store.bucket}-{hashlib.sha256(f'{store.endpoint} {store.url}'.encode()).hexdigest()[:12]}"
    return (Path(base).expanduser().absolute() if base else cache) / name / purpose


def for_reading(corpus: str | Path, *names: str) -> Path:
    """Return the folder to read a corpus from; of a corpus in a store, a mirror in which `names` are up to date.

    names  small files; a folder, which stands for all its small files, ends with a slash
    """
    if not is_url(corpus):
        return Path(corpus).expanduser().absolute()
    store = Store.of(str(corpus))
    copy = mirror(mirror_folder(store, "read"), store)
    for name in names:
        if name.endswith("/"):
            copy.refresh(name.rstrip("/"))
        else:
            copy.refresh_file(name)
    return copy.root
