"""Compare every shard with its index, and both with the manifest; repair nothing.

Each tar is read once, from front to back, while structure, names, offsets, sizes, hashes and texts are compared; so
without decoding this runs at the speed of the disk or of SHA-256. The caller passes the function that decodes, because
clips are untrusted media and this package does not decode.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from clipmill.base.errors import ItemError
from shards.corpus.packs import MAIN, folder_of, is_name, named_packs, samples_of
from shards.corpus.schema import INDEX, origins, sample_key
from shards.corpus.tombstones import Tombstones
from shards.packing.index import TEXT_COLUMNS, read_index, read_stamp
from shards.packing.pack import EXTENSIONS, NEXT, SHARDS_AT_ONCE
from shards.packing.tar import Member, scan
from shards.storage.mirror import files_of
from shards.storage.sealed_parquet import DamagedFile

MAX_TEXT_BYTES = 16_000_000  # a larger KEY.txt or KEY.json is reported, not read

# A caption that this many unlike clips share is a fault of the captioner.
SAME_CAPTION_MIN = 100
SAME_CAPTION_SHARE = 0.001

CLIP_FACTS = {  # column of the index → column of `clips` that it has to equal
    "video_id": "video_id",
    "mp4_sha256": "sha256",
    "mp4_bytes": "num_bytes",
    "jpg_sha256": "frame_sha256",
    "num_frames": "num_frames",
    "fps": "fps",
    "duration_s": "duration_s",
    "width": "width",
    "height": "height",
    "frame_time_s": "frame_time_s",
}

_OF_ANOTHER_TIME = ("unknown-clip", "clip-mismatch", "stale-text")  # no problem of a named pack, see `verify`

_WARNINGS = (
    "outdated-pack", "same-caption", "forgotten", "unknown-origin", "no-checksum", "missing-source", "missing-subtitle",
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One difference. `item` is a clip_id or a member's name, "" for a whole file.

    kinds: missing-file, orphan-file, bad-index, bad-tar, missing-member, extra-member, misplaced-member, hash-mismatch,
    text-mismatch, bad-json, sample-mismatch, clip-mismatch, unknown-clip, stale-text, undecodable, frame-count,
    missing-sample, wrong-pair; of other files (`shards.packing.deep_verify`) damaged, missing-file, changed-source,
    changed-subtitle, changed-clip; and the warnings outdated-pack, same-caption, forgotten, unknown-origin,
    no-checksum, missing-source, missing-subtitle.
    """

    path: str
    item: str
    kind: str
    message: str

    @property
    def is_warning(self) -> bool:
        return self.kind in _WARNINGS


def verify(
    root: Path,
    connection: duckdb.DuckDBPyConnection,
    *,
    decode_frames: Callable[[bytes], int] | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """Check all shards of a corpus, `workers` at a time; return problems by shard and sample, warnings last.

    A named pack is as of its last packing, so clips that have changed since are one warning for the pack.

    decode_frames  mp4 bytes → number of frames that really decode; raises ItemError; called from several threads
    progress       called with (shards checked, shards in all)
    """
    root = Path(root)
    forgotten = Tombstones(root)
    problems: list[Problem] = []
    names = {pack: _shard_names(connection, pack) for pack in packs_in(root, connection)}
    num_shards, num_done = sum(map(len, names.values())), 0
    for pack, shards in names.items():
        problems += _files(root, shards, pack, forgotten)
        num_outdated = 0
        for found in _checked(root, connection, pack, shards, forgotten, decode_frames, max(1, workers)):
            outdated = [problem for problem in found if pack and problem.kind in _OF_ANOTHER_TIME]
            num_outdated += len({problem.item for problem in outdated})
            problems += [problem for problem in found if problem not in outdated]
            num_done += 1
            if progress:
                progress(num_done, num_shards)
        if num_outdated:
            message = f"{num_outdated:,} of its clips have changed: `clipmill run pack --name {pack}` packs them again"
            problems.append(Problem(folder_of(pack), "", "outdated-pack", message))
    problems += [*wrong_pairs(connection), *_same_captions(connection)]
    return sorted(problems, key=lambda problem: problem.is_warning)


def packs_in(root: Path, connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Return the main pack, and the named ones that the manifest or the folder has."""
    named = set(named_packs(root))
    if connection.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'pack_samples'").fetchall():
        named |= {name for (name,) in connection.execute("SELECT DISTINCT pack FROM pack_samples").fetchall()}
    return [MAIN, *sorted(filter(is_name, named))]


def _checked(root, connection, pack, names, forgotten, decode_frames, workers: int) -> Iterator[list[Problem]]:
    """Yield the problems of each shard, in order.

    The one thread with the connection queries the rows, and only for the shards that are being read and the next few:
    the rows of a corpus need not fit into memory.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[list[Problem]]] = deque()
        for shard in _expected_shards(connection, pack, names, forgotten):
            waiting.append(pool.submit(shard.check, root, decode_frames))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# -- expected shards -----------------------------------------------------------------------------------------------


def _shard_names(connection: duckdb.DuckDBPyConnection, pack: str) -> list[str]:
    sql = f"SELECT DISTINCT shard FROM {samples_of(pack)} ORDER BY shard"
    return [row[0] for row in connection.execute(sql).fetchall()]


def _expected_shards(
    connection: duckdb.DuckDBPyConnection, pack: str, names: list[str], forgotten: Tombstones
) -> Iterator["_Shard"]:
    """Yield the shards of the manifest; one query is for several shards, because each query costs a join."""
    for start in range(0, len(names), SHARDS_AT_ONCE):
        some = names[start : start + SHARDS_AT_ONCE]
        samples = connection.sql(
            f"SELECT {', '.join(INDEX.names)} FROM {samples_of(pack)} WHERE shard IN $names ORDER BY shard, position",
            params={"names": some},
        )
        clips = connection.sql(
            f"""
            SELECT s.shard AS in_shard, s.clip_id, c.clip_id IS NOT NULL AS known, c.* EXCLUDE (clip_id),
                   c.text AS subtitle
            FROM {samples_of(pack)} s LEFT JOIN catalog c ON c.clip_id = s.clip_id WHERE s.shard IN $names
            ORDER BY s.shard, s.position
            """,
            params={"names": some},
        )
        samples, clips = samples.to_arrow_table().cast(INDEX), clips.to_arrow_table()
        for name in some:
            rows = samples.filter(pc.field("shard") == name), clips.filter(pc.field("in_shard") == name)
            yield _Shard(pack, name, *rows, forgotten)


def _files(root: Path, shards: list[str], pack: str, forgotten: Tombstones) -> list[Problem]:
    """Find files of a pack without samples of the manifest, and leftovers of a killed packing."""
    wanted = {name for shard in shards for name in (shard, str(Path(shard).with_suffix(".parquet")))}
    problems, files, folder = [], files_of(root), folder_of(pack)
    there = [root / folder / name for name in files.sizes(folder)] if files.store else (root / folder).glob("*")
    others = set() if pack else set(named_packs(root))
    command = f"clipmill run pack --name {pack}" if pack else "clipmill run pack"
    for path in sorted(path for path in there if path.name not in others):
        if path.name == NEXT:
            problems.append(Problem(f"{folder}/{NEXT}", "", "orphan-file", "shards of an unfinished packing"))
        elif path.name not in wanted and _keys_of_forgotten(path.with_suffix(".parquet"), forgotten):
            problems.append(
                Problem(
                    f"{folder}/{path.name}",
                    "",
                    "forgotten",
                    "a shard of a forgotten video: `clipmill compact` removes it",
                )
            )
        elif path.name not in wanted:
            problems.append(
                Problem(
                    f"{folder}/{path.name}",
                    "",
                    "orphan-file",
                    f"the manifest has no sample in it; `{command}` removes it",
                )
            )
    return problems


@contextmanager
def _read_here(root: Path, relative: str) -> Iterator[Path | None]:
    """Yield a file's path, None if it does not exist. For a corpus in a store, fetch it for the block only."""
    files = files_of(root)
    try:
        path = files.local(relative)
    except ItemError:  # the store does not have it
        path = None
    yield path if path and path.is_file() else None
    if files.store and path:
        path.unlink(missing_ok=True)


def _keys_of_forgotten(index: Path, forgotten: Tombstones) -> set[str]:
    """Return the keys of forgotten samples that a shard still contains; none if its index is unreadable."""
    try:
        rows = read_index(index)
    except (DamagedFile, OSError):
        return set()
    return set(pc.filter(rows["key"], pa.array(forgotten.cover(rows["video_id"].to_pylist()))).to_pylist())


# Columns that a column with `made_from` is compared with: (table, column, name in a message).
_PRESENT = {
    "frame": (("clips", "frame_sha256", "the clip's frame"), ("samples", "jpg_sha256", "the shard's frame")),
    "video": (("clips", "source_sha256", "the clip's video"),),
    "clip": (("clips", "sha256", "the clip"),),
}
_SERVED = {"captions": "t.current AND t.frame_index = 0 AND"}


def wrong_pairs(connection: duckdb.DuckDBPyConnection) -> list[Problem]:
    """Find rows made from other bytes than their clip has now, for example a caption of another frame.

    Rows older than the column that holds the hash are counted in a warning.
    """
    problems, known = [], connection.execute("SELECT table_name, column_name FROM duckdb_columns()").fetchall()
    unknown: dict[tuple[str, str], int] = {}
    for table, column, made_from in origins():
        if (table, column) not in known:
            unknown[table, column] = _count(connection, table, "true")
            continue
        unknown[table, column] = _count(connection, table, f"t.{column} IS NULL")
        for others, other, what in _PRESENT[made_from]:
            rows = connection.execute(
                f"SELECT clip_id, t.{column}, c.{other} FROM {table} t JOIN {others} c USING (clip_id) "
                f"WHERE {_SERVED.get(table, '')} t.{column} <> c.{other} ORDER BY ALL"
            ).fetchall()
            problems += [
                Problem(
                    "manifest.duckdb",
                    clip_id,
                    "wrong-pair",
                    f"its row of {table} was made from {made}, {what} is {has}",
                )
                for clip_id, made, has in rows
            ]
    return problems + [
        Problem("manifest.duckdb", "", "unknown-origin", f"{count:,} rows of {table} have no {column}")
        for (table, column), count in unknown.items()
        if count
    ]


def _count(connection: duckdb.DuckDBPyConnection, table: str, condition: str) -> int:
    there = connection.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = ?", [table]).fetchall()
    return connection.execute(f"SELECT count(*) FROM {table} t WHERE {condition}").fetchall()[0][0] if there else 0


def _same_captions(connection: duckdb.DuckDBPyConnection) -> list[Problem]:
    """Find captions of implausibly many unlike clips; near-duplicates count once."""
    found = connection.execute(
        """
        WITH captioned AS (
            SELECT caption, coalesce(duplicate_group, clip_id) AS look, clip_id FROM catalog WHERE caption <> ''
        )
        SELECT caption, count(DISTINCT look) AS num_clips, min(clip_id), captioned_clips
        FROM captioned, (SELECT count(*) AS captioned_clips FROM captioned)
        GROUP BY caption, captioned_clips
        HAVING num_clips >= greatest(?, ? * captioned_clips)
        ORDER BY num_clips DESC, caption
        """,
        [SAME_CAPTION_MIN, SAME_CAPTION_SHARE],
    ).fetchall()
    return [
        Problem("manifest.duckdb", clip, "same-caption", f"{count:,} of {total:,} unlike clips have {caption!r}")
        for caption, count, clip, total in found
    ]


# -- one shard ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """A shard of the manifest: its rows of `samples` and of `catalog`, in the tar's order."""

    pack: str
    name: str
    samples: pa.Table
    clips: pa.Table
    forgotten: Tombstones

    @property
    def relative(self) -> str:
        return f"{folder_of(self.pack)}/{self.name}"

    @property
    def index(self) -> str:
        return str(Path(self.relative).with_suffix(".parquet"))

    def check(self, root: Path, decode_frames: Callable[[bytes], int] | None) -> list[Problem]:
        waiting = _keys_of_forgotten(root / self.index, self.forgotten)
        problems = list(self._index_problems(root / self.index))
        problems += self._clip_problems()
        if waiting:
            message = f"{len(waiting)} of its samples are forgotten: `clipmill compact` removes them"
            problems.append(self._problem("", "forgotten", message))
        with _read_here(root, self.relative) as path:
            if path is None:
                message = "the manifest has samples in it, but it does not exist"
                return [*problems, self._problem("", "missing-file", message)]
            return problems + _TarReader(self, decode_frames, waiting).read(path)

    def _problem(self, item: str, kind: str, message: str) -> Problem:
        return Problem(self.relative, item, kind, message)

    def _index_problems(self, path: Path) -> Iterator[Problem]:
        """Compare the index beside the tar with the manifest's `samples`."""
        where = self.index
        if not path.is_file():
            yield Problem(where, "", "missing-file", "the shard has no index")
            return
        try:
            index, stamp = read_index(path), read_stamp(path)
        except (DamagedFile, OSError) as error:
            yield Problem(where, "", "bad-index", getattr(error, "reason", str(error)))
            return
        if stamp is None:
            yield Problem(where, "", "bad-index", "it does not name the plan that it was written for")
        elif stamp.missing:
            message = f"{len(stamp.missing)} clips could not be packed, the first is {stamp.missing[0]}"
            yield Problem(where, "", "missing-sample", message)
        index = index.filter(pc.invert(pa.array(self.forgotten.cover(index["video_id"].to_pylist()), pa.bool_())))
        if index["clip_id"].to_pylist() != self.samples["clip_id"].to_pylist():
            yield Problem(where, "", "sample-mismatch", "its clips differ from the manifest's samples")
            return
        for name in INDEX.names:
            yield from _differences(where, name, index, self.samples[name], "sample-mismatch", "the manifest's samples")

    def _clip_problems(self) -> list[Problem]:
        """Compare the manifest's `samples` with its clips and their current texts."""
        where, rows = self.index, self.samples
        known = self.clips["known"].to_pylist()
        problems = [
            Problem(where, clip_id, "unknown-clip", "the manifest does not have this clip (any more)")
            for clip_id, is_known in zip(rows["clip_id"].to_pylist(), known, strict=True)
            if not is_known
        ]
        rows, clips = rows.filter(pa.array(known)), self.clips.filter(pa.array(known))
        for name, column in CLIP_FACTS.items():
            packed = rows[name].is_valid()  # null: a member that pack.members leaves out
            problems += _differences(
                where, name, rows.filter(packed), clips[column].filter(packed), "clip-mismatch", "the manifest's clip"
            )
        for name in TEXT_COLUMNS:
            problems += _differences(where, name, rows, clips[name], "stale-text", "the manifest's text")
        return problems


def _differences(where: str, name: str, rows: pa.Table, wanted: Any, kind: str, whose: str) -> Iterator[Problem]:
    """Yield a problem for every row whose column differs; whole columns are compared first."""
    if rows[name].equals(wanted.cast(rows[name].type)):
        return
    pairs = zip(rows["clip_id"].to_pylist(), rows[name].to_pylist(), wanted.to_pylist(), strict=True)
    for clip_id, has, want in pairs:
        if has != want:
            yield Problem(where, clip_id, kind, f"{name} is {_short(has)}, {whose} has {_short(want)}")


class _TarReader:
    """Compare one tar with its samples' rows while reading it; at most one member is in memory."""

    def __init__(self, shard: _Shard, decode_frames: Callable[[bytes], int] | None, forgotten: set[str]):
        self.shard, self.forgotten = shard, forgotten
        self.decode_frames = decode_frames
        self.expected: dict[str, tuple[Row, str]] = {}  # member's name → (row, extension)
        for row in shard.samples.to_pylist():
            assert row["key"] == sample_key(row["clip_id"]), f"{row['clip_id']} has key {row['key']}"
            for extension in EXTENSIONS:
                if row[f"{extension}_offset"] is not None:
                    self.expected[f"{row['key']}.{extension}"] = (row, extension)
        self.problems: list[Problem] = []
        self.content = bytearray()

    def read(self, path: Path) -> list[Problem]:
        found: set[str] = set()
        try:
            for member, digest in scan(path, self._consumer):
                found.add(member.name)
                if member.name in self.expected:
                    self._check(member, digest)
                elif member.name.partition(".")[0] not in self.forgotten:
                    self._note(member.name, "extra-member", "it belongs to no sample of the manifest")
        except (ItemError, OSError) as error:
            message = error.message if isinstance(error, ItemError) else str(error)
            return [*self.problems, self.shard._problem("", "bad-tar", message)]
        for name in self.expected.keys() - found:
            self._note(name, "missing-member", "it is not in the tar")
        return sorted(self.problems, key=lambda problem: problem.item)

    def _consumer(self, member: Member) -> Callable[[bytes], Any] | None:
        """Return the function that takes the member's chunks, None for a member that is not expected."""
        self.content = bytearray()
        if member.name not in self.expected:
            return None
        return self.content.extend if self._keeps(member) else (lambda chunk: None)

    def _keeps(self, member: Member) -> bool:
        row, extension = self.expected[member.name]
        if extension == "mp4":
            return self.decode_frames is not None and member.num_bytes == row["mp4_bytes"]
        return extension in ("txt", "json") and member.num_bytes <= MAX_TEXT_BYTES

    def _check(self, member: Member, digest: str) -> None:
        row, extension = self.expected[member.name]
        where = (row[f"{extension}_offset"], row[f"{extension}_bytes"])
        if (member.offset, member.num_bytes) != where:
            message = f"{member.num_bytes} bytes at {member.offset}; the manifest has {where[1]} at {where[0]}"
            self._note(member.name, "misplaced-member", message)
        if extension in ("mp4", "jpg") and digest != row[f"{extension}_sha256"]:
            self._note(member.name, "hash-mismatch", f"its SHA-256 is {digest}")
        elif extension == "txt" and digest != sha256((row["subtitle"] or "").encode()).hexdigest():
            text = _short(self.content.decode(errors="replace"))
            self._note(member.name, "text-mismatch", f"{text} is not the clip's subtitle")
        elif extension == "json" and self._keeps(member):
            self._check_json(member.name, row)
        elif extension == "mp4" and self._keeps(member):
            self._check_frames(member.name, row)

    def _check_json(self, name: str, row: Row) -> None:
        """Check that KEY.json parses, belongs to this clip, and has the hashes of the other members."""
        try:
            values = json.loads(self.content)
            facts = {column: values.get(column) for column in ("clip_id", "key", "mp4_sha256", "jpg_sha256")}
        except (ValueError, AttributeError) as error:
            self._note(name, "bad-json", str(error))
            return
        for column, value in facts.items():
            if row[column] is not None and value != row[column]:
                self._note(name, "text-mismatch", f"{column} is {_short(value)}, not {_short(row[column])}")

    def _check_frames(self, name: str, row: Row) -> None:
        try:
            num_frames = self.decode_frames(bytes(self.content))
        except ItemError as error:
            self._note(name, "undecodable", str(error))
            return
        if num_frames != row["num_frames"]:
            self._note(name, "frame-count", f"{num_frames} frames decode; the manifest has {row['num_frames']}")

    def _note(self, item: str, kind: str, message: str) -> None:
        self.problems.append(self.shard._problem(item, kind, message))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
