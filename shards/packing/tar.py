"""Tar files: write them with known byte offsets, walk through untrusted ones, read one member.

Written tars are plain USTAR: names of at most 100 ASCII characters and members under 8 GiB need no extension
header, so a member's data starts 512 bytes after its header does. The same samples give the same bytes: times are 0;
owner, group and mode are fixed. Tars that are read are untrusted: files are not extracted, links are not followed, and
sizes are checked against the end of the file. This module does not depend on Parquet.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from clipmill.base.atomic_file import atomic_file
from clipmill.base.errors import ItemError

BLOCK = 512
RECORD = 20 * BLOCK  # a tar file ends at a multiple of this
MAX_NAME = 100  # characters: USTAR's name field
MAX_MEMBER_BYTES = 8 * 1024**3 - 1  # USTAR's size field: 11 octal digits
MAX_EXTENSION_BYTES = 1 << 16  # of an extension header that is read: paths have at most 4,096 bytes
CHUNK_BYTES = 1 << 20
OWNER, MODE = "clipmill", 0o644

_EXTENSIONS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_KINDS = dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE), "file")
_KINDS |= {tarfile.DIRTYPE: "folder", tarfile.GNUTYPE_SPARSE: "sparse file"}
_KINDS |= dict.fromkeys((tarfile.SYMTYPE, tarfile.LNKTYPE), "link")
_KINDS |= dict.fromkeys((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE), "device")


@dataclass(frozen=True)
class Sample:
    """Members of a tar under one key: extension → bytes. Neither key nor extension has a dot in it."""

    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class Member:
    """Place of a member's data: `offset` is that of its first byte, not of its header."""

    name: str
    offset: int
    num_bytes: int
    sha256: str = ""  # "" where no data was read: listing reads headers only

    @property
    def end(self) -> int:
        return self.offset + padded(self.num_bytes)


@dataclass(frozen=True)
class Blob:
    """Range of a file that `write_clips_tar` copies into a member."""

    name: str
    source: Path
    offset: int
    num_bytes: int


def member_bytes(num_bytes: int) -> int:
    """Return the bytes that a member adds to a tar: its header, and its data in whole blocks."""
    return BLOCK + padded(num_bytes)


def write_tar(path: str | Path, samples: Iterable[Sample], *, fsync: bool = False) -> list[Member]:
    """Write samples in the given order, members of a sample sorted by extension; return the place of each member.

    The file appears under its name when it is complete. Only one sample at a time is held in memory.
    """
    from webdataset.writer import TarWriter  # imports torch, which workers of the cut stage do not need

    members: list[Member] = []
    with atomic_file(path, fsync=fsync) as file:
        with TarWriter(file, user=OWNER, group=OWNER, mode=MODE, mtime=0, encoder=False, compress=False) as writer:
            for sample in samples:
                assert sample.key and sample.members and not set("./") & set(sample.key), (
                    f"not a sample: {sample.key!r}"
                )
                members += _placed(sample, writer.tarstream.offset)
                writer.write({"__key__": sample.key, **sample.members})
                assert writer.tarstream.offset == members[-1].end, "webdataset did not write plain USTAR"
    return members


def write_clips_tar(path: str | Path, blobs: Iterable[Blob]) -> list[Member]:
    """Copy ranges of files into one tar, in the given order, a megabyte at a time; return the place of each member.

    Raises ItemError "truncated-blob" when a source ends before its range does; then nothing is left under `path`.
    """
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        return [_copy(blob, tar) for blob in blobs]


def write_clips(path: Path, rows: list[dict[str, Any]], source_of: Callable[[dict[str, Any]], Path]) -> None:
    """Copy the media of clips into one tar, CLIP_ID.mp4 and CLIP_ID.N.jpg, and set the rows' offsets to their places.

    rows       of the table `clips` or one like it; their offsets and sizes are those in their source files
    source_of  file in which the media of a row lie
    """
    blobs = []
    for row in rows:
        source, clip_id = source_of(row), row["clip_id"]
        blobs.append(Blob(f"{clip_id}.mp4", source, row["mp4_offset"], row["num_bytes"]))
        for number, frame in enumerate(row["frames"] or ()):
            blobs.append(Blob(f"{clip_id}.{number}.jpg", source, frame["offset"], frame["num_bytes"]))
    members = iter(write_clips_tar(path, blobs))
    for row in rows:
        row["mp4_offset"] = next(members).offset
        for frame in row["frames"] or ():
            frame["offset"] = next(members).offset


def read_member(path: str | Path, offset: int, num_bytes: int) -> bytes:
    """Read one member by its range. Raises ItemError "tar-missing", "truncated-tar" when the file ends too early."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(num_bytes)
    except FileNotFoundError as error:
        raise ItemError("tar-missing", f"{Path(path).name} does not exist") from error
    if len(data) != num_bytes:
        raise ItemError("truncated-tar", f"{Path(path).name} ends inside the {num_bytes} bytes at {offset}")
    return data


def scan(
    path: str | Path, open_member: Callable[[Member], Callable[[bytes], None] | None]
) -> Iterator[tuple[Member, str]]:
    """Read a tar of ours once, in order; `open_member` returns for each member a consumer of its chunks.

    Yields (member, sha256 of its data); if `open_member` returns None, no data is read and the hash is "".
    Raises ItemError "bad-tar" for everything that `write_tar` does not write: links, folders, devices, extension
    headers, names with a path in them or used twice, bad checksums, sizes past the end of the file, no end mark.
    """
    size, name = os.stat(path).st_size, Path(path).name
    seen: set[str] = set()
    end = 0
    with open(path, "rb") as file:
        try:
            for entry in walk(file):
                if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not _is_plain(entry.name):
                    raise tarfile.ReadError(f"{entry.name!r} (type {entry.type!r}) is not a plain file")
                member = Member(entry.name, entry.offset, entry.num_bytes)
                if member.end > size:
                    raise tarfile.ReadError(f"{entry.name!r} has {entry.num_bytes} bytes, more than the file")
                if member.name in seen:
                    raise tarfile.ReadError(f"{member.name!r} occurs twice")
                seen.add(member.name)
                take = open_member(member)
                yield member, _stream(file, member, take) if take else ""
                end = member.end
        except tarfile.TarError as error:
            raise ItemError("bad-tar", f"{name}, at byte {end}: {error}") from error
        file.seek(end)
        if not 2 * BLOCK <= size - end <= 2 * RECORD or size % RECORD or any(file.read(2 * RECORD)):
            raise ItemError("bad-tar", f"{name}, at byte {end}: no proper end mark")


# --- The walk through any tar


class Entry(NamedTuple):
    """A header of a tar. Bytes of `name` that are not UTF-8 are surrogates."""

    name: str
    type: bytes
    kind: str  # file, folder, link, device, sparse file, extension header, unknown
    offset: int  # of its data
    num_bytes: int


def walk(file: IO[bytes]) -> Iterator[Entry]:
    """Yield every header of any tar, up to the end mark. Raises tarfile.HeaderError or tarfile.ReadError.

    Extension headers (long names of GNU tar and of pax) are yielded, too, and applied to the member that follows.
    Read header by header, and not by `tarfile`, which takes an extension header of any size into memory, recurses
    for extension headers that follow one another, and for some members searches the end by reading on.
    """
    offset, extension = 0, {}
    while True:
        block = _block(file, offset, "no end mark")
        if not any(block):
            return
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # one header, and nothing that follows it
        offset += BLOCK
        if info.size < 0:
            raise tarfile.ReadError(f"{info.name!r} has {info.size} bytes")
        if info.type in _EXTENSIONS:
            yield Entry(info.name, info.type, "extension header", offset, info.size)
            file.seek(offset)
            extension |= _read_extension(file, info)
            offset += padded(info.size)
            continue
        kind = "sparse file" if "sparse" in extension else _KINDS.get(info.type, "unknown")
        if info.type == tarfile.GNUTYPE_SPARSE:  # blocks that continue the map in the header precede the data
            more = block[482]
            while more:
                more = _block(file, offset, "the map of a sparse file has no end")[504]
                offset += BLOCK
        num_bytes = 0 if kind in ("folder", "link", "device") else extension.get("size", info.size)
        yield Entry(extension.get("path", info.name), info.type, kind, offset, num_bytes)
        offset, extension = offset + padded(num_bytes), {}


def _block(file: IO[bytes], offset: int, otherwise: str) -> bytes:
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise tarfile.ReadError(otherwise)
    return block


def _read_extension(file: IO[bytes], info: tarfile.TarInfo) -> dict[str, Any]:
    """Return the values that an extension header gives the next member: "path", "size", "sparse"."""
    if info.size > MAX_EXTENSION_BYTES:
        raise tarfile.ReadError(f"an extension header has {info.size} bytes, more than {MAX_EXTENSION_BYTES}")
    data = file.read(info.size)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    return _pax_records(data) if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) else {}


def _pax_records(data: bytes) -> dict[str, Any]:
    """Parse records of the form "LENGTH KEY=VALUE\\n", where LENGTH counts the whole record (POSIX pax)."""
    found: dict[str, Any] = {}
    while data.strip(b"\0"):
        length = data[:20].partition(b" ")[0]
        if not length.isdigit() or not 5 <= int(length) <= len(data):
            raise tarfile.ReadError("an extension header cannot be parsed")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            found["path"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit() and len(value) < 20:
            found["size"] = int(value)
        elif key.startswith(b"GNU.sparse."):
            found["sparse"] = True
        data = data[int(length) :]
    return found


class _Piece:
    """Read at most `num_bytes` of a file and hash them; `ended_early` when the file has fewer."""

    def __init__(self, source: IO[bytes], num_bytes: int):
        self.source, self.left, self.ended_early = source, num_bytes, False
        self.hash = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.source.read(min(size, self.left))
        self.ended_early = len(data) < min(size, self.left)
        self.left -= len(data)
        self.hash.update(data)
        return data


def _placed(sample: Sample, offset: int) -> list[Member]:
    members = []
    for extension in sorted(sample.members):  # TarWriter's order
        data = sample.members[extension]
        name = f"{sample.key}.{extension}"
        _check_writable(name, len(data))
        members.append(Member(name, offset + BLOCK, len(data), hashlib.sha256(data).hexdigest()))
        offset = members[-1].end
    return members


def _check_writable(name: str, num_bytes: int) -> None:
    assert name.isascii() and 0 < len(name) <= MAX_NAME and _is_plain(name), f"not a member name: {name!r}"
    assert num_bytes <= MAX_MEMBER_BYTES, f"{name}: {num_bytes} bytes do not fit a tar member"


def _copy(blob: Blob, tar: tarfile.TarFile) -> Member:
    _check_writable(blob.name, blob.num_bytes)
    offset = tar.offset + BLOCK
    with open(blob.source, "rb") as source:
        source.seek(blob.offset)
        piece = _Piece(source, blob.num_bytes)
        info = tarfile.TarInfo(blob.name)
        info.size, info.mode, info.uname, info.gname = blob.num_bytes, MODE, OWNER, OWNER
        try:
            tar.addfile(info, piece)
        except OSError as error:
            if not piece.ended_early:  # the disk's error, not the blob's
                raise
            raise ItemError("truncated-blob", f"{blob.name}: {blob.source.name} ends too early: {error}") from error
    return Member(blob.name, offset, blob.num_bytes, piece.hash.hexdigest())


def _is_plain(name: str) -> bool:
    return bool(name) and not set("/\\\0") & set(name) and name.isprintable() and name not in (".", "..")


def _stream(file: IO[bytes], member: Member, take: Callable[[bytes], None]) -> str:
    file.seek(member.offset)
    hasher, left = hashlib.sha256(), member.num_bytes
    while left:
        chunk = file.read(min(left, CHUNK_BYTES))
        if not chunk:
            raise ItemError("bad-tar", f"{member.name} ends early")  # shrank while it was read
        hasher.update(chunk)
        take(chunk)
        left -= len(chunk)
    return hasher.hexdigest()


def padded(num_bytes: int) -> int:
    """Return a size rounded up to whole blocks."""
    return -(-num_bytes // BLOCK) * BLOCK
