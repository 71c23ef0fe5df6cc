"""Index plain WebDataset tars without a manifest, from their headers.

`--corpus 'shards/{000000..000009}.tar'` (braces, globs, any fsspec URL) walks every tar once, keeps the place of each
member, reads the small text members, and builds the tables for selections: `samples` and the view `catalog`. Nothing is
extracted or decoded. Tars are not trusted: damage becomes a row, and the intact part of a torn tar is used.
"""

import glob
import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from clipmill.base.errors import UserError
from shards.corpus.near_duplicates import duplicate_groups
from shards.packing.tar import Entry, walk
from training.data.selection_schema import SELECTION

VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi")  # in order of preference
STILL_EXTENSIONS = ("jpg", "jpeg")
MAX_TEXT_BYTES = 1 << 20  # of a txt or json member; longer ones are reported and not read
MAX_VIDEO_BYTES = 1 << 29  # of a clip, because a loader holds several; longer ones are reported and left out

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # WebDataset: a key ends at the name's first dot
_HASH = re.compile(r"[0-9a-f]{16}")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PLURAL = {"sparse file": "sparse files", "link": "links", "device": "devices"}
_THREADS = 16  # tars read at a time; more than cores, because remote reads mostly wait
_REMOTE_BLOCK_BYTES = 1 << 16  # read ahead per remote header; most members between headers are far larger


class Problem(NamedTuple):
    """Damage in a tar or in one of its members."""

    item_id: str  # the tar, or tar and member
    error_class: str
    message: str


@dataclass(frozen=True)
class TarIndex:
    samples: pa.Table  # columns of `training.data.selection_schema.SELECTION`, in order of (shard, mp4_offset)
    problems: list[Problem]


def is_tars(corpus: str) -> bool:
    """Return True if `--corpus` names tars, not a corpus folder: with braces expanded, it ends like a tar."""
    return not Path(corpus).is_dir() and expand_braces(corpus)[0].endswith((".tar", *_COMPRESSED))


@contextmanager
def open_tars(
    pattern: str,
    tables: Mapping[str, str | Path] | None = None,
    *,
    memory: str | None = None,
    spill: Path | None = None,
) -> Iterator[tuple[Any, list[Problem]]]:
    """Index tars into a DuckDB connection, locked down like that of a manifest; yield it and the problems found."""
    from shards.query.sql import add_tables, private_connection, shut_in

    index = index_tars([pattern])
    with private_connection(memory, spill) as connection:
        connection.register("indexed", index.samples)
        connection.execute("""
            CREATE TABLE samples AS
            SELECT * EXCLUDE (duplicate_group, texts, neighbours, mp4_sha256, jpg_sha256),
                   NULL::VARCHAR AS mp4_sha256, NULL::VARCHAR AS jpg_sha256
            FROM indexed;
            CREATE TABLE scores AS
            SELECT clip_id, duplicate_group FROM indexed WHERE duplicate_group IS NOT NULL;
            CREATE TABLE texts AS
            SELECT clip_id, unnest(texts) AS text, generate_subscripts(texts, 1) - 1 AS n FROM indexed;
            CREATE TABLE videos AS SELECT DISTINCT video_id, NULL::VARCHAR AS duplicate_of FROM indexed;
            CREATE VIEW catalog AS
            SELECT clip_id, video_id, shard, mp4_bytes AS num_bytes, num_frames, subtitle AS text, caption,
                   duplicate_group,
                   duplicate_group IS NOT NULL
                       AND row_number() OVER (PARTITION BY duplicate_group ORDER BY clip_id) > 1 AS is_duplicate
            FROM samples LEFT JOIN scores USING (clip_id);
        """)
        connection.unregister("indexed")
        add_tables(connection, tables or {})
        shut_in(connection)
        yield connection, index.problems


def index_tars(patterns: list[str]) -> TarIndex:
    """Index every sample that has a video. Raises UserError if a tar cannot be opened or is compressed.

    clip_id    of the json, else the key; a repeated one gets its shard's name as prefix
    video_id   of the json, else the clip_id
    subtitle   the txt, else the json's `subtitle` or `text`
    caption    the json's `caption`, or the first of its `captions`
    duplicate_group  of the json, else found among these tars by the json's `phash`, 3 hashes of 16 hex digits
    """
    paths = [path for pattern in patterns for path in expand(pattern)]
    with ThreadPoolExecutor(min(_THREADS, len(paths))) as pool:
        contents = list(pool.map(read_tar, paths))
    rows = [row for content in contents for row in content.rows]
    _name_clips(rows)
    _group_duplicates(rows)
    table = pa.Table.from_pylist(rows, SELECTION).sort_by([("shard", "ascending"), ("mp4_offset", "ascending")])
    return TarIndex(table, [problem for content in contents for problem in content.problems])


# --- Patterns


def expand(pattern: str) -> list[str]:
    """Return absolute paths or URLs of the tars that a pattern matches. Raises UserError if it matches none."""
    found = list(dict.fromkeys(path for part in expand_braces(pattern) for path in _expand_glob(part)))
    for path in found:
        if path.endswith(_COMPRESSED):
            raise UserError(f"--corpus: {path} is compressed, so its clips cannot be read alone. Allowed: plain .tar.")
    return found


def expand_braces(pattern: str) -> list[str]:
    """Expand braces: "{08..10}.tar" → 08.tar, 09.tar, 10.tar; "{a,b}" → a, b; "{0..8..2}" has a step; they may nest."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    paths = (path for value in _alternatives(match[1]) for path in expand_braces(before + value + after))
    return list(dict.fromkeys(paths))


def _alternatives(inner: str) -> list[str]:
    numbers = _RANGE.fullmatch(inner)
    if numbers is None:
        return inner.split(",")
    first, last, step = int(numbers[1]), int(numbers[2]), max(1, int(numbers[3] or 1))
    padded = any(len(text) > 1 and text.startswith("0") for text in numbers.group(1, 2))
    width = max(len(numbers[1]), len(numbers[2])) if padded else 0
    values = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{value:0{width}d}" for value in values]


def _expand_glob(pattern: str) -> list[str]:
    if _URL.match(pattern):
        return _expand_remote(pattern)
    path = os.path.abspath(os.path.expanduser(pattern))
    if os.path.isfile(path):
        return [path]
    if not glob.has_magic(path):
        raise UserError(f"--corpus: {pattern}: no such file.")
    if not (found := sorted(glob.glob(path, recursive=True))):
        raise UserError(f"--corpus: {pattern} matches no file.")
    return found


def _expand_remote(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    system, path = _filesystem(pattern)
    try:
        found = sorted(system.glob(path))
    except OSError as error:
        raise UserError(f"--corpus: {pattern} cannot be listed: {error}") from error
    if not found:
        raise UserError(f"--corpus: {pattern} matches no file.")
    return [system.unstrip_protocol(path) for path in found]


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"--corpus: {url}: {error}") from error


# --- One tar


@dataclass
class _Content:
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class _Sample:
    """The members of one key: extension → the entry in the tar. The extension of clip.12.mp4 is "12.mp4"."""

    key: str
    members: dict[str, Entry] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # content of txt and json


def read_tar(path: str) -> _Content:
    """Read the samples of one tar. Raises UserError if it cannot be opened or is compressed."""
    content = _Content()
    try:
        if _URL.match(path):
            system, inner = _filesystem(path)
            opened = system.open(inner, "rb", block_size=_REMOTE_BLOCK_BYTES)
        else:
            opened = open(path, "rb")
        with opened as file:
            if file.read(6).startswith(_MAGIC):
                raise UserError(f"--corpus: {path} is compressed, so its clips cannot be read alone.")
            file.seek(0)
            for sample in _samples(file, path, content.problems):
                if row := _row(sample, path, content.problems):
                    content.rows.append(row)
    except OSError as error:
        raise UserError(f"--corpus: {path} cannot be read: {error}") from error
    return content


def _samples(file: IO[bytes], path: str, problems: list[Problem]) -> Iterator[_Sample]:
    """Group the members by key; they need not lie side by side. A later member of the same name begins a new sample."""
    samples: list[_Sample] = []
    latest: dict[str, _Sample] = {}  # by key
    last_key = None
    for member in _members(file, path, problems):
        match = _KEY.fullmatch(member.name)
        if match is None:
            continue
        key, extension = match[1], match[2].lower()
        sample = latest.get(key)
        if sample and extension in sample.members and key == last_key:
            problems.append(Problem(f"{path}/{member.name}", "repeated-member", "the sample already has this member"))
            continue
        if sample is None or extension in sample.members:
            samples.append(sample := _Sample(key))
            latest[key] = sample
        sample.members[extension], last_key = member, key
    for sample in samples:
        for part in _parts(sample, path, problems):
            for extension in ("txt", "json"):
                member = part.members.get(extension)
                if member and (text := _read_text(file, path, member, problems)) is not None:
                    part.texts[extension] = text
            yield part


def _parts(sample: _Sample, path: str, problems: list[Problem]) -> Iterator[_Sample]:
    """Yield the sample, or those of names with further dots: clip.12.mp4 is the video of clip.12 if clip has none.

    A video or text that belongs to no sample becomes a problem.
    """
    dotted: dict[str, _Sample] = {}  # by key
    plain = _Sample(sample.key)
    for extension, member in sample.members.items():
        stem, dot, last = extension.rpartition(".")
        part = dotted.setdefault(f"{sample.key}.{stem}", _Sample(f"{sample.key}.{stem}")) if dot else plain
        part.members[last] = member
    has_video = [part for part in dotted.values() if part.members.keys() & set(VIDEO_EXTENSIONS)]
    if plain.members.keys() & set(VIDEO_EXTENSIONS):
        yield plain
        has_text = plain.members.keys() & {"txt", "json"}
        unused = (
            has_video if has_text else [part for part in dotted.values() if part in has_video or "txt" in part.members]
        )
        for part in unused:
            message = f"{sample.key} has a video of its own, so {part.key} is not a sample"
            problems.append(Problem(f"{path}/{part.key}", "unused-members", message))
        return
    yield from has_video
    for part in (plain, *dotted.values()):
        if part not in has_video and (text := part.members.get("txt") or part.members.get("json")):
            problems.append(Problem(f"{path}/{text.name}", "text-without-video", "no video has this name in the tar"))


def _members(file: IO[bytes], path: str, problems: list[Problem]) -> Iterator[Entry]:
    """Yield the complete plain files in order; report other members and the position where a tar is torn."""
    size, ignored, reached = file.seek(0, os.SEEK_END), Counter[str](), 0
    try:
        for entry in walk(file):
            if entry.kind == "extension header":
                continue
            if entry.offset + entry.num_bytes > size:
                raise tarfile.ReadError(f"{entry.name!r} goes past the end of the file")
            reached = entry.offset + entry.num_bytes
            if entry.kind == "file":
                yield entry._replace(name=entry.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
            elif entry.kind != "folder":
                ignored[_PLURAL.get(entry.kind, "members of unknown kind")] += 1
    except (tarfile.HeaderError, tarfile.ReadError) as error:
        problems.append(Problem(path, "torn-tar", f"read up to byte {reached} of {size}: {error}"))
    problems += [
        Problem(path, "ignored-member", f"{count} {kind} among its members") for kind, count in ignored.items()
    ]


def _read_text(file: IO[bytes], path: str, member: Entry, problems: list[Problem]) -> str | None:
    item = f"{path}/{member.name}"
    if member.num_bytes > MAX_TEXT_BYTES:
        problems.append(Problem(item, "text-too-long", f"{member.num_bytes} bytes, at most {MAX_TEXT_BYTES} are read"))
        return None
    file.seek(member.offset)
    try:
        return file.read(member.num_bytes).decode()
    except UnicodeDecodeError as error:
        problems.append(Problem(item, "bad-text", str(error)))
        return None


# --- One sample


def _row(sample: _Sample, path: str, problems: list[Problem]) -> dict[str, Any] | None:
    """Build a row of the index; return None for a clip that is too large."""
    video = next(sample.members[name] for name in VIDEO_EXTENSIONS if name in sample.members)
    if video.num_bytes > MAX_VIDEO_BYTES:
        message = f"{video.num_bytes} bytes; a clip may have at most {MAX_VIDEO_BYTES}"
        problems.append(Problem(f"{path}/{sample.key}", "clip-too-large", message))
        return None
    still = next((sample.members[name] for name in STILL_EXTENSIONS if name in sample.members), None)
    facts = _facts(sample, path, problems)
    captions, texts, num_frames, fps = (facts.get(name) for name in ("captions", "texts", "num_frames", "fps"))
    first_caption = captions[0] if isinstance(captions, list) and captions else captions
    return {
        "clip_id": _text(facts.get("clip_id")) or sample.key,
        "video_id": _text(facts.get("video_id")),
        "shard": path,
        "mp4_offset": video.offset,
        "mp4_bytes": video.num_bytes,
        "jpg_offset": still and still.offset,
        "jpg_bytes": still and still.num_bytes,
        "num_frames": num_frames if type(num_frames) is int and 0 < num_frames < 2**31 else None,
        "fps": float(fps) if type(fps) in (int, float) and 0 < fps < math.inf else None,
        "subtitle": sample.texts.get("txt", _text(facts.get("subtitle")) or _text(facts.get("text"))),
        "caption": _text(facts.get("caption")) or _text(first_caption),
        "texts": [text for text in map(_text, texts if isinstance(texts, list) else []) if text] or None,
        "duplicate_group": _text(facts.get("duplicate_group")),
        "phash": _hashes(facts.get("phash")),
    }


def _hashes(values: Any) -> list[int] | None:
    """Return the perceptual hashes of a json; None if it has none or other ones."""
    is_ours = isinstance(values, list) and all(isinstance(text, str) and _HASH.fullmatch(text) for text in values)
    return [int(text, 16) for text in values] if is_ours else None


def _facts(sample: _Sample, path: str, problems: list[Problem]) -> dict[str, Any]:
    if "json" not in sample.texts:
        return {}
    try:
        facts = json.loads(sample.texts["json"])
    except (ValueError, RecursionError) as error:
        problems.append(Problem(f"{path}/{sample.key}.json", "bad-json", str(error)))
        return {}
    if isinstance(facts, dict):
        return facts
    problems.append(Problem(f"{path}/{sample.key}.json", "bad-json", f"{type(facts).__name__}, not an object"))
    return {}


def _text(value: Any) -> str | None:
    """Return a string that Arrow accepts, because JSON may hold halves of surrogate pairs; None if empty."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) and value else None


def _name_clips(rows: list[dict[str, Any]]) -> None:
    """Make clip ids unique: prefix repeated ones with the tar's name, then with its path and the offset."""
    qualifiers = (
        lambda row: f"{Path(row['shard']).stem}/{row['clip_id']}",
        lambda row: f"{row['shard']}/{row['mp4_offset']}/{row['clip_id']}",
    )
    for qualify in qualifiers:
        repeated = {clip_id for clip_id, count in Counter(row["clip_id"] for row in rows).items() if count > 1}
        for row in rows:
            if row["clip_id"] in repeated:
                row["clip_id"] = qualify(row)
    for row in rows:
        row["video_id"] = row["video_id"] or row["clip_id"]


def _group_duplicates(rows: list[dict[str, Any]]) -> None:
    """Find the near-duplicates among the clips whose json has hashes and names no group."""
    hashed = [row for row in rows if row["phash"] and not row["duplicate_group"]]
    if len(hashed) < 2:
        return
    columns = [[row["clip_id"] for row in hashed], [row["phash"] for row in hashed]]
    table = pa.table(columns, pa.schema([("clip_id", pa.string()), ("phash", pa.list_(pa.uint64()))]))
    groups = dict(zip(*duplicate_groups(table).to_pydict().values(), strict=True))
    for row in hashed:
        row["duplicate_group"] = groups.get(row["clip_id"])
