"""The merged commits in the working database: its index is kept up to date with the heads of merged volumes.

`shards.corpus.merged` has the files. Damage to one is mended from the rows in the database, where they are.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from clipmill.base.text import sql_identifier
from shards.corpus.fragments import OF_UNIT, fragment_path, outputs_of, table_of, table_schema
from shards.corpus.merged import (
    ROWS,
    Head,
    MergedCommit,
    by_commit,
    can_be_merged,
    head_name,
    is_same_commit,
    merge,
    merged_volumes,
    read_head,
    read_rows,
    remove_merged,
    rows_of_head,
    write_head,
    write_rows,
)
from shards.corpus.schema import LEDGER
from shards.corpus.volume_files import INDEX, row_schemas
from shards.storage.sealed_parquet import DamagedFile, check_parquet

if TYPE_CHECKING:
    from shards.corpus.working_database import Listing, WorkingDatabase

AGAIN = 20  # a volume is merged again when one twentieth of its commits is new, because all of it is written again


class MergedCommits:
    """Merge the loose commits of a working database, and load, mend and remove merged ones."""

    def __init__(self, database: "WorkingDatabase"):
        self.database = database
        self.mending: set[int] = set()  # volumes whose merged files are being checked

    def volumes_to_merge(self, least: int) -> list[int]:
        """Return the volumes with at least so many commits that are not merged, or that were removed since."""
        return [
            volume
            for (volume,) in self.database._rows(
                f"SELECT volume FROM {INDEX}.fragments LEFT JOIN {INDEX}.merged m USING (volume) GROUP BY volume "
                "HAVING count(*) FILTER (fragments.num_bytes IS NOT NULL AND regexp_full_match(name, ?) "
                "AND NOT starts_with(name, 'ingest-')) + coalesce(any_value(num_removed), 0) "
                ">= greatest(?, count(*) FILTER (fragments.num_bytes IS NULL) // ?) ORDER BY 1",
                [OF_UNIT, least, AGAIN],
            )
        ]

    def merge(self, volume: int, *, fsync: bool = False) -> None:
        """Merge the commits of a volume into one file per table, see `shards.corpus.merged`. No task may be running."""
        for _ in range(2):
            rows = self.database._rows(
                f"SELECT name, outputs FROM {INDEX}.fragments WHERE volume = ? AND num_bytes IS NOT NULL", [volume]
            )
            names = sorted(name for name, outputs in rows if can_be_merged(name, outputs))
            try:
                head = merge(self.database.root, volume, names, fsync=fsync)
            except DamagedFile as error:
                self.database._note_damage(error)
                self.database.rewrite(error.path.stem)
            except FileNotFoundError:
                return  # the next `sync` finds out what else the commit has lost
            else:
                self._note_head(volume, head)
                return

    def sync(self, listing: "Listing") -> tuple[int, int, set[str]]:
        """Bring the index up to date with the heads.

        Returns the numbers of commits that are new and lost, and the names of those that the new ones replace.
        Rows are loaded when their volume is activated.
        """
        known = {
            volume: row
            for volume, *row in self.database._rows(f"SELECT volume, num_bytes, mtime_ns, files FROM {INDEX}.merged")
        }
        num_loaded = num_forgotten = 0
        replaced: set[str] = set()
        for volume in sorted({*known, *merged_volumes(self.database.root)}):
            *stamp, files = known.get(volume, (None, None, {}))
            if stamp == _stamp(self.database.root / head_name(volume)) and listing.has_all(files):
                continue
            before = self._commits_in(volume)
            self.check(volume)
            after = self._commits_in(volume)
            num_loaded += len(after.keys() - before.keys())
            num_forgotten += len(before.keys() - after.keys())
            replaced |= {old for old in after.values() if old}
        with_media = f"SELECT name, outputs FROM {INDEX}.fragments WHERE num_bytes IS NULL AND cardinality(outputs) > 0"
        lost = [name for name, outputs in self.database._rows(with_media) if not listing.has_all(outputs)]
        self.remove(lost)
        return num_loaded, num_forgotten + len(lost), replaced

    def twins_of(self, whole: Iterable[str]) -> tuple[set[str], set[str]]:
        """Return which of these loose commits were merged too: as they are, and before they were made again."""
        leftovers: set[str] = set()
        done_again: set[str] = set()
        with self.database._as_table("named_commits", list(whole)):
            rows = self.database._rows(
                f"SELECT volume, name FROM {INDEX}.fragments WHERE num_bytes IS NULL "
                "AND name IN (SELECT name FROM named_commits) ORDER BY ALL"
            )
        for volume, of_volume in groupby(rows, key=lambda row: row[0]):
            names = [name for _, name in of_volume]
            merged = read_rows(self.database.root, read_head(self.database.root, volume), "ledger", names)
            for name in names:
                (leftovers if is_same_commit(self.database.root, name, merged) else done_again).add(name)
        return leftovers, done_again

    def remove_leftovers(self, names: Iterable[str]) -> None:
        """Delete the fragments of merged commits, which a killed writer left."""
        outputs = {name: outputs_of(fragment_path(self.database.root, "ledger", name)) for name in sorted(names)}
        self.database.files.remove(*(f"fragments/ledger/{name}.parquet" for name in outputs))
        rows = [relative for named in outputs.values() for relative in named if table_of(relative)]
        self.database.files.remove(*rows)

    def _commits_in(self, volume: int) -> dict[str, str | None]:
        """Return commit → the one that it replaces, of the merged commits of a volume."""
        sql = f"SELECT name, replaces FROM {INDEX}.fragments WHERE volume = ? AND num_bytes IS NULL"
        return dict(self.database._rows(sql, [volume]))

    def check(self, volume: int) -> None:
        """Check the merged files of a volume and put its commits into the index.

        A damaged file is written again from this database if it has the rows; else the commits with rows in that file
        never happened.
        """
        self.mending.add(volume)
        try:
            self._check(volume)
        finally:
            self.mending.discard(volume)

    def _check(self, volume: int) -> None:
        path, lost = self.database.root / head_name(volume), set()
        stamp = _stamp(path)
        try:
            head = read_head(self.database.root, volume)
        except FileNotFoundError:
            head = None
        except DamagedFile as error:
            self.database._note_damage(error)
            head = self._head_in_index(volume)
            if self.database.owns_corpus:
                write_head(self.database.root, volume, head, fsync=True)
        written: dict[str, str] = {}  # damaged file → the one in its place
        for relative, num_bytes in head.files.items() if head else ():
            try:
                _check_rows(self.database.root / relative, num_bytes)
            except DamagedFile as error:
                if not self.database.owns_corpus and stamp != _stamp(path):  # merged again since
                    return self._check(volume)
                self.database._note_damage(error)
                again = self._write_rows_again(volume, relative) if self.database.owns_corpus else None
                if again is None:
                    lost.add(table_of(relative))
                elif again != relative:
                    written[relative] = again
        if written:
            head = self._head_with(volume, head, written)
            write_head(self.database.root, volume, head, fsync=True)
        if lost:
            names = [name for name, commit in head.commits.items() if lost & set(commit.tables)]
            if self.database.owns_corpus:
                head = remove_merged(self.database.root, volume, names, fsync=True)
            else:
                commits = {name: commit for name, commit in head.commits.items() if name not in names}
                files = {each: size for each, size in head.files.items() if table_of(each) not in lost}
                head = Head(commits, files)
        if lost or head is None or head != self._head_in_index(volume):
            self.database.changed(volume)
            self.database._discard_file(volume)
        self._note_head(volume, head)

    def _head_with(self, volume: int, head: Head, written: dict[str, str]) -> Head:
        """Return the head with these files in place of others, and without the commits that do not count any more."""
        known = self._commits_in(volume)
        files = {written.get(path, path): size for path, size in head.files.items()}
        files |= {path: (self.database.root / path).stat().st_size for path in written.values()}
        commits = {name: commit for name, commit in head.commits.items() if name in known}
        return Head(commits, files, head.num_removed + len(head.commits) - len(commits))

    def _head_in_index(self, volume: int) -> Head | None:
        """Return the head as it was loaded; None if it was not."""
        found = self.database._rows(f"SELECT files, num_removed FROM {INDEX}.merged WHERE volume = ?", [volume])
        rows = self.database._rows(
            f"SELECT name, tables, outputs, replaces FROM {INDEX}.fragments WHERE volume = ? AND num_bytes IS NULL "
            "ORDER BY 1",
            [volume],
        )
        if not (found and rows):
            return None
        return Head({name: MergedCommit(tuple(tables), media, old) for name, tables, media, old in rows}, *found[0])

    def _write_rows_again(self, volume: int, relative: str) -> str | None:
        """Write a damaged file of merged rows from this database; return its path, None if the rows are not here.

        Its content, and with it its name, is another one if commits in it do not count any more.
        """
        table = table_of(relative)
        known = self.database._rows(f"SELECT files FROM {INDEX}.merged WHERE volume = ?", [volume])
        if not known or relative not in known[0][0] or table not in row_schemas():
            return None
        schema = LEDGER if table == "ledger" else table_schema(table)
        columns = ", ".join(sql_identifier(column) for column in [*schema.names, "fragment"])
        try:
            self.database._use(volume)
            rows = self.database.connection.sql(
                f"SELECT {columns} FROM {table} WHERE fragment IN (SELECT name FROM {INDEX}.fragments "
                f"WHERE volume = {volume} AND num_bytes IS NULL) ORDER BY fragment, rowid"
            ).to_arrow_reader(ROWS)
            path = write_rows(self.database.root, volume, table, by_commit(rows, "fragment"), schema, fsync=True)
        except duckdb.Error:  # it was to be loaded from the damaged file
            return None
        written = str(path.relative_to(self.database.root))
        self.database.files.upload(written)
        return written

    def _note_head(self, volume: int, head: Head | None) -> None:
        """Put the merged commits of a volume into the index, in place of loose ones of the same names."""
        self.database.connection.register("head_commits", rows_of_head(head or Head({}, {})))
        self.database.connection.execute("BEGIN")
        self.database._execute(
            f"DELETE FROM {INDEX}.fragments WHERE volume = ? "
            "AND (num_bytes IS NULL OR name IN (SELECT commit FROM head_commits))",
            [volume],
        )
        self.database._execute(f"DELETE FROM {INDEX}.merged WHERE volume = ?", [volume])
        if head:
            self.database._execute(
                f"INSERT INTO {INDEX}.fragments "
                "SELECT commit, NULL, NULL, media, ?, tables, replaces FROM head_commits",
                [volume],
            )
            stamp = _stamp(self.database.root / head_name(volume))
            row = [volume, *stamp, head.files, head.num_removed]
            self.database._execute(f"INSERT INTO {INDEX}.merged VALUES (?, ?, ?, ?, ?)", row)
        self.database.connection.execute("COMMIT")
        self.database.connection.unregister("head_commits")

    def remove(self, names: Sequence[str]) -> None:
        """Stop counting merged commits; others among the names stay as they are."""
        with self.database._as_table("named_commits", names):
            rows = self.database._rows(
                f"SELECT f.volume, f.name, f.num_bytes IS NULL FROM {INDEX}.fragments f "
                f"JOIN {INDEX}.merged USING (volume) WHERE f.name IN (SELECT name FROM named_commits) ORDER BY ALL"
            )
        for volume, of_volume in groupby(rows, key=lambda row: row[0]):
            of_volume = list(of_volume)
            head = None
            if self.database.owns_corpus:  # a loose commit may have an older twin in the head
                head = remove_merged(self.database.root, volume, [name for _, name, _ in of_volume], fsync=True)
            self.database.forget([name for _, name, is_merged in of_volume if is_merged])
            if self.database.owns_corpus:
                self._note_head(volume, head)

    def load_rows(self, volume: int) -> None:
        """Insert the rows of the merged commits of a volume into its file, which is in use and has none of them."""
        for (files,) in self.database._rows(f"SELECT files FROM {INDEX}.merged WHERE volume = ?", [volume]):
            for relative in files:
                table = table_of(relative)
                if table not in row_schemas():  # of a stage whose package is not installed
                    continue
                try:
                    self.database._execute(
                        f"INSERT INTO {table} BY NAME SELECT * EXCLUDE (commit), commit AS fragment "
                        "FROM read_parquet(?, hive_partitioning = false) WHERE commit IN "
                        f"(SELECT name FROM {INDEX}.fragments WHERE volume = ? AND num_bytes IS NULL)",
                        [str(self.database.root / relative), volume],
                    )
                except duckdb.BinderException as error:
                    raise self.database._newer_columns(error) from error


def _stamp(path: Path) -> list[int] | None:
    """Return size and time of a file, by which a change is noticed; None if it does not exist."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _check_rows(path: Path, num_bytes: int) -> None:
    """Raise DamagedFile if a file of merged rows is not as its head says."""
    stamp = _stamp(path)
    if stamp is None or stamp[0] != num_bytes:
        raise DamagedFile(path, "it does not exist" if stamp is None else f"it has {stamp[0]:,} bytes")
    try:
        check_parquet(path)
    except FileNotFoundError as error:
        raise DamagedFile(path, "it does not exist") from error
