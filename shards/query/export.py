"""Write the manifest of a corpus as one file of its own, which any DuckDB client opens wherever it is."""

from pathlib import Path

from clipmill.base.atomic_file import atomic_path, copy_file
from clipmill.base.errors import UserError
from shards.query.sql import open_manifest
from shards.storage.local import MANIFEST_NAME
from shards.storage.mirror import for_reading
from shards.storage.s3 import is_url


def export(corpus: str | Path, file: Path, *, force: bool = False) -> int:
    """Copy the manifest that is published now to `file`, whole or not at all; return its bytes.

    It is the same database: tables, views and all. A build that publishes meanwhile changes the corpus's, not the copy.
    Raises UserError if there is no manifest, or `file` exists and not `force`.
    """
    manifest = (for_reading(corpus, MANIFEST_NAME) if is_url(corpus) else Path(corpus)) / MANIFEST_NAME
    if file.is_dir():
        raise UserError(f"--export {file}: it is a folder; name a file, for example {file / 'corpus.duckdb'}.")
    if file.exists() and manifest.exists() and file.samefile(manifest):
        raise UserError(f"--export {file}: it is the manifest of this corpus; name another file.")
    if file.exists() and not force:
        raise UserError(f"--export {file}: it exists; add --force to replace it, or name another file.")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--export {file}: {file.absolute().parent} does not exist; make it first.")
    with open_manifest(corpus):  # says what is wrong with one that cannot be opened
        pass
    with atomic_path(file, fsync=True) as temporary:
        copy_file(manifest, temporary)
        with open_manifest(temporary) as connection:
            connection.execute("SELECT * FROM totals").fetchall()
    return file.stat().st_size
