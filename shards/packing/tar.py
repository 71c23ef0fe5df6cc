"""Tar files: writing them with known byte offsets, listing them without trusting them, reading one member.

What is written here is plain USTAR: names of at most 100 ASCII characters and members under 8 GiB need no extension
header, so a member's data starts 512 bytes after the member does, and the same samples give the same bytes: times are
0, owner, group and mode are fixed. What is read here may come from anywhere: a reader never extracts, follows no link
or extension header, and believes no size that goes past the end of the file. Knows nothing of clips or Parquet.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from clipmill.base.atomic_file import atomic_file
from clipmill.base.errors import ItemError

BLOCK = 512
RECORD = 20 * BLOCK  # a tar file ends at a multiple of this
MAX_NAME = 100  # characters: USTAR's name field
MAX_MEMBER_BYTES = 8 * 1024**3 - 1  # USTAR's size field: 11 octal digits
CHUNK_BYTES = 1 << 20
OWNER, MODE = "clipmill", 0o644


@dataclass(frozen=True)
class Sample:
    """What goes into a tar under one key: extension → bytes. Neither key nor extension has a dot in it."""

    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class Member:
    """Where a member's data lies: `offset` is that of its first byte, not of its header."""

    name: str
    offset: int
    num_bytes: int
    sha256: str = ""  # "" where nobody asked for it (listing alone reads no data)

    @property
    def end(self) -> int:
        return self.offset + padded(self.num_bytes)


@dataclass(frozen=True)
class Blob:
    """A piece of a file that becomes a member: what `write_clips_tar` copies."""

    name: str
    source: Path
    offset: int
    num_bytes: int


def member_bytes(num_bytes: int) -> int:
    """What a member of that size adds to a tar: its header and its data in whole blocks."""
    return BLOCK + padded(num_bytes)


def write_tar(path: str | Path, samples: Iterable[Sample], *, fsync: bool = False) -> list[Member]:
    """Writes samples in the given order, members of a sample sorted by extension; returns where each member lies.

    The file appears under its name only when it is complete. Of one sample at a time only the bytes are held.
    """
    from webdataset.writer import TarWriter  # imports torch, which the cut stage's workers do without

    members: list[Member] = []
    with atomic_file(path, fsync=fsync) as file:
        with TarWriter(file, user=OWNER, group=OWNER, mode=MODE, mtime=0, encoder=False, compress=False) as writer:
            for sample in samples:
                assert sample.key and sample.members and not set("./") & set(sample.key), (
                    f"not a sample: {sample.key!r}"
                )
                members += _placed(sample, writer.tarstream.offset)
                writer.write({"__key__": sample.key, **sample.members})
                assert writer.tarstream.offset == members[-1].end, "webdataset wrote something else than plain USTAR"
    return members


def write_clips_tar(path: str | Path, blobs: Iterable[Blob], *, fsync: bool = False) -> list[Member]:
    """Copies pieces of files into one tar, in the given order, a megabyte at a time; returns where each one lies.

    Raises ItemError "truncated-blob" when a source ends before its piece does; nothing is left under `path` then.
    """
    members: list[Member] = []
    with atomic_file(path, fsync=fsync) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for blob in blobs:
                members.append(_copy(blob, tar))
    return members


def read_member(path: str | Path, offset: int, num_bytes: int) -> bytes:
    """Bytes of one member by range. Raises ItemError "truncated-tar" when the file ends first, "tar-missing"."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(num_bytes)
    except FileNotFoundError as error:
        raise ItemError("tar-missing", f"{Path(path).name} is not there") from error
    if len(data) != num_bytes:
        raise ItemError("truncated-tar", f"{Path(path).name} ends inside the {num_bytes} bytes at {offset}")
    return data


def list_members(path: str | Path) -> list[Member]:
    """Every member in file order, from headers alone. Raises ItemError as `scan` does."""
    return [member for member, _ in scan(path, lambda member: None)]


def scan(
    path: str | Path, open_member: Callable[[Member], Callable[[bytes], None] | None]
) -> Iterator[tuple[Member, str]]:
    """Goes through a tar once, in order; for each member asks `open_member` who wants its bytes, in chunks.

    Yields (member, sha256 of its data); the hash is "" and no data is read where `open_member` answered None.
    Raises ItemError "bad-tar" for whatever `write_tar` would not have written: links, folders, devices, extension
    headers, names with a path in them or written twice, bad checksums, sizes past the end of the file, no end mark.
    """
    size = os.stat(path).st_size
    seen: set[str] = set()
    with open(path, "rb") as file:
        offset = 0
        while (member := _next_header(file, offset, size, Path(path).name)) is not None:
            if member.name in seen:
                raise ItemError("bad-tar", f"{Path(path).name}: {member.name!r} is there twice")
            seen.add(member.name)
            take = open_member(member)
            yield member, _stream(file, member, take) if take else ""
            offset = member.end
        _check_end(file, offset, size, Path(path).name)


class _Piece:
    """Reads at most `num_bytes` of a file, hashing what passes; notes when the file had less."""

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
    for extension in sorted(sample.members):  # the order in which TarWriter writes them
        data = sample.members[extension]
        name = f"{sample.key}.{extension}"
        _check_writable(name, len(data))
        members.append(Member(name, offset + BLOCK, len(data), hashlib.sha256(data).hexdigest()))
        offset = members[-1].end
    return members


def _header(name: str, num_bytes: int) -> tarfile.TarInfo:
    _check_writable(name, num_bytes)
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = num_bytes, MODE, OWNER, OWNER
    return info


def _check_writable(name: str, num_bytes: int) -> None:
    assert name.isascii() and 0 < len(name) <= MAX_NAME and _is_plain(name), f"not a member name: {name!r}"
    assert num_bytes <= MAX_MEMBER_BYTES, f"{name}: {num_bytes} bytes do not fit a tar member"


def _copy(blob: Blob, tar: tarfile.TarFile) -> Member:
    offset = tar.offset + BLOCK
    with open(blob.source, "rb") as source:
        source.seek(blob.offset)
        piece = _Piece(source, blob.num_bytes)
        try:
            tar.addfile(_header(blob.name, blob.num_bytes), piece)
        except OSError as error:
            if not piece.ended_early:  # the disk's error, not the blob's
                raise
            raise ItemError("truncated-blob", f"{blob.name}: {blob.source.name} ends too early: {error}") from error
    return Member(blob.name, offset, blob.num_bytes, piece.hash.hexdigest())


def _next_header(file: IO[bytes], offset: int, size: int, tar_name: str) -> Member | None:
    """The member whose header is at `offset`, None at the end mark."""
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise ItemError("bad-tar", f"{tar_name}: ends at {offset} without an end mark")
    if not any(block):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # one header, nothing that follows it
    except tarfile.HeaderError as error:
        raise ItemError("bad-tar", f"{tar_name}: no header at {offset}: {error}") from error
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not _is_plain(info.name):
        raise ItemError("bad-tar", f"{tar_name}: {info.name!r} (type {info.type!r}) is not a plain file")
    member = Member(info.name, offset + BLOCK, info.size)
    if info.size < 0 or member.end > size:
        raise ItemError("bad-tar", f"{tar_name}: {info.name!r} says {info.size} bytes, more than the file has")
    return member


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


def _check_end(file: IO[bytes], offset: int, size: int, tar_name: str) -> None:
    file.seek(offset)
    if not 2 * BLOCK <= size - offset <= 2 * RECORD or size % RECORD or any(file.read(2 * RECORD)):
        raise ItemError("bad-tar", f"{tar_name}: no proper end mark at {offset}")


def padded(num_bytes: int) -> int:
    """In whole blocks."""
    return -(-num_bytes // BLOCK) * BLOCK
