"""Parquet files that show damage: every page has a checksum, and the whole file a seal.

The checksums of Parquet (CRC-32) cover pages. A changed bit in the footer could still rename a column, drop a row or
move a page. So 48 bytes between the last page and the footer, the seal, hold the SHA-256 of all other bytes. Parquet
keeps optional structures such as page indexes there, so every reader opens the file.

Files of earlier versions have neither. They are opened, and only damage that breaks the format is found in them.
"""

import errno
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from clipmill.base.atomic_file import atomic_file
from clipmill.base.errors import UserError

_MARK = b"\xff\xfeclipmill seal\x01"  # no text contains it: it is not UTF-8
_SEAL_BYTES = len(_MARK) + hashlib.sha256().digest_size
_TAIL_BYTES = 8  # length of the footer and "PAR1"
CHUNK_BYTES = 1 << 20
_BAD_DISK = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)


class DamagedFile(UserError):
    """A file of the corpus does not have the bytes that were written. `reason` says how it differs."""

    def __init__(self, path: Path, reason: str):
        self.path, self.reason = path, reason
        super().__init__(f"{path} is damaged ({reason}). `clipmill verify DIR --deep` says what repairs it.")


def write_parquet(path: Path, table: pa.Table, *, fsync: bool = False) -> None:
    """Write a sealed file that appears whole or not at all."""
    data = io.BytesIO()
    pq.write_table(table, data, compression="zstd", write_page_checksum=True)
    content = data.getvalue()
    end = _footer_start(content)
    with atomic_file(path, fsync=fsync) as file:
        file.write(content[:end] + _MARK + hashlib.sha256(content).digest() + content[end:])


def write_row_groups(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> str:
    """Write a sealed file of any size, each table a row group; return the SHA-256 of its seal, in hex.

    Only one table is in memory at a time. The file does not appear atomically: `path` is a temporary one.
    """
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    with open(path, "r+b") as file:
        content = hashlib.file_digest(file, "sha256")
        end = _footer_start_in(file)
        file.seek(end)
        footer = file.read()
        file.seek(end)
        file.write(_MARK + content.digest() + footer)
    return content.hexdigest()


def read_parquet(path: Path, columns: Sequence[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """Read a table and verify all bytes. Raises DamagedFile, FileNotFoundError."""
    try:
        return pq.read_table(
            pa.BufferReader(checked_bytes(path)),
            columns=None if columns is None else list(columns),
            schema=schema,
            page_checksum_verification=True,
        )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def read_metadata(path: Path) -> dict[bytes, bytes]:
    """Read the file's key-value metadata and verify all bytes. Raises DamagedFile, FileNotFoundError."""
    try:
        return pq.read_schema(pa.BufferReader(checked_bytes(path))).metadata or {}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def checked_bytes(path: Path) -> bytes:
    """Return a file's bytes if its seal, if any, is right. Raises DamagedFile, FileNotFoundError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        if error.errno in _BAD_DISK:
            raise DamagedFile(path, str(error.strerror)) from error
        raise
    if has_seal(data):
        end = _footer_start(data)
        start = end - _SEAL_BYTES
        seal = _MARK + hashlib.sha256(data[:start] + data[end:]).digest()
        if start < 0 or data[start:end] != seal:
            raise DamagedFile(path, "its bytes differ from those that were written")
    return data


def check_parquet(path: Path, schema: pa.Schema | None = None) -> bool:
    """Read a whole file; return whether it has a seal. Raises DamagedFile, FileNotFoundError.

    schema  the columns that an unsealed file may have
    """
    if _has_right_seal(path) or has_seal(checked_bytes(path)):
        return True
    table = read_parquet(path)
    try:
        table.validate(full=True)
        for column in table.schema if schema else ():
            table[column.name].cast(schema.field(column.name).type)
    except (pa.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    return False


def _has_right_seal(path: Path) -> bool:
    """Return whether a file has a seal that is right, without holding the file in memory."""
    try:
        with open(path, "rb") as file:
            end = _footer_start_in(file)
            file.seek(end - _SEAL_BYTES)
            seal = file.read(_SEAL_BYTES)
            if not seal.startswith(_MARK):
                return False
            content, left = hashlib.sha256(), end - _SEAL_BYTES
            file.seek(0)
            while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                content.update(chunk)
                left -= len(chunk)
            file.seek(end)
            content.update(file.read())
            return seal == _MARK + content.digest()
    except (OSError, ValueError):
        return False  # the caller reads the file again, and says what is wrong


def has_seal(data: bytes) -> bool:
    """Return whether a file was sealed; its seal may be wrong."""
    return _MARK in data


def _footer_start(data: bytes) -> int:
    return len(data) - _TAIL_BYTES - int.from_bytes(data[-_TAIL_BYTES:-4], "little")


def _footer_start_in(file: IO[bytes]) -> int:
    size = file.seek(-_TAIL_BYTES, os.SEEK_END) + _TAIL_BYTES
    return size - _TAIL_BYTES - int.from_bytes(file.read(4), "little")


def _damaged(path: Path, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno is not None and error.errno not in _BAD_DISK:
        return error  # for example not readable by this user: the file itself may be sound
    return DamagedFile(path, str(error).splitlines()[0])
