"""Files of a corpus that lies in a folder, and the interface that `shards.storage.mirror` has in common with it.

All other code works on a folder through this interface: it reads and writes files in the folder itself and reports here
what it has written. In a plain folder a written file needs nothing more.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.storage.s3 import Store

MANIFEST_NAME = "manifest.duckdb"
PRIVATE = ".clipmill"  # files of this machine alone; in a store it holds the lock
UNFINISHED = (
    f"{PRIVATE}/compact.unfinished"  # exists while `compact` runs: members move before the manifest is published
)


class Files:
    """Files of a corpus in a folder. Paths are relative to the folder."""

    store: Store | None = None

    def __init__(self, root: Path):
        self.root = root

    def local(self, relative: str) -> Path:
        """Return the path to read a file from. Absolute paths (sources used in place) do not change."""
        return self.root / relative

    def has(self, relative: str) -> bool:
        return (self.root / relative).exists()

    def size(self, relative: str) -> int | None:
        """Return a file's size in bytes, None if it does not exist."""
        path = self.root / relative
        return path.stat().st_size if path.is_file() else None

    def sizes(self, folder: str) -> dict[str, int]:
        """Return name → bytes of the files in a folder, without hidden ones."""
        return file_sizes(self.root / folder)

    def list_prefix(self, prefix: str) -> dict[str, int]:
        """Return path → bytes of the files of one folder whose path begins with `prefix`."""
        folder, _, name = prefix.rpartition("/")
        return {f"{folder}/{file}": size for file, size in self.sizes(folder).items() if file.startswith(name)}

    def below(self, folder: str) -> dict[str, int]:
        """Return path → bytes of all files in a folder and its subfolders."""
        files = sorted(path for path in (self.root / folder).rglob("*") if path.is_file())
        return {str(path.relative_to(self.root)): path.stat().st_size for path in files}

    def list_all(self) -> dict[str, int]:
        """Return path → bytes of all files of the corpus; of one in a store, those that the store has."""
        sizes = {}
        for folder, _, names in os.walk(self.root):
            for path in (Path(folder, name) for name in names):
                with suppress(FileNotFoundError):  # a build moves and removes files meanwhile
                    sizes[str(path.relative_to(self.root))] = path.lstat().st_size
        return sizes

    def upload(self, *relatives: str) -> None:
        """Publish files that are complete in the folder; their order does not matter."""

    def remove(self, *relatives: str) -> None:
        for relative in relatives:
            (self.root / relative).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        if (self.root / folder).exists():
            shutil.rmtree(self.root / folder)

    def move(self, old: str, new: str) -> None:
        os.replace(self.root / old, self.root / new)

    def refresh_file(self, relative: str) -> bool:
        """Bring one small file up to date; return whether it exists."""
        return (self.root / relative).exists()

    def refresh(self, folder: str, every_s: float = 0.0) -> None:
        """Bring the small files of a folder up to date, at most once in `every_s` seconds."""

    def pull(self) -> None:
        """Bring all small files up to date and drop media that were removed elsewhere."""

    @contextmanager
    def local_only(self) -> Iterator[None]:
        """Keep what the block writes or removes on this machine: for commands that only inspect the corpus."""
        yield


def file_sizes(folder: Path) -> dict[str, int]:
    """Return name → bytes of a folder's files in order of names, without hidden ones; {} if it does not exist."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".") and entry.is_file()]
        return {entry.name: entry.stat().st_size for entry in sorted(found, key=lambda entry: entry.name)}
