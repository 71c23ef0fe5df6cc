"""File types by first bytes and layout: media or text, container, complete or truncated.

Nothing here decodes. The input is untrusted: any file, with any content.
"""

import hashlib
import os
import re
import stat
import struct
from pathlib import Path
from typing import BinaryIO

from pipeline.stages.download.errors import DownloadError
from pipeline.stages.transcribe.subtitles import READERS, sniff

SNIFF_BYTES = 2048
SUBTITLE_HEAD_BYTES = 65_536  # the first timing line follows the header of the file


def hash_file(path: Path) -> tuple[int, str]:
    """Return (size in bytes, SHA-256 as hex) of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def check_regular(path: Path, max_bytes: int) -> None:
    """Raise DownloadError unless `path` is a readable regular file of 1 to `max_bytes` bytes.

    Reading a device or a pipe might never end. Error classes: not-a-video, not-found, forbidden, empty-file, too-large.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DownloadError("not-a-video", f"{path} is not a regular file")
        with open(path, "rb"):
            pass
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DownloadError("not-found", str(error)) from error
    except PermissionError as error:
        raise DownloadError("forbidden", str(error)) from error
    if status.st_size == 0:
        raise DownloadError("empty-file", f"{path} is empty")
    if status.st_size > max_bytes:
        raise DownloadError("too-large", f"{path} has {status.st_size} bytes; the limit is {max_bytes}")


def is_text(head: bytes) -> str | None:
    """Classify a file's first bytes: "HTML", "JSON", "a playlist" or "text"; return None for binary data."""
    head = head[:SNIFF_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    lowered = head.lower()
    if lowered.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<?xml", b"<!--", b"<error")):
        return "HTML"
    if head.startswith(b"#EXTM3U"):
        return "a playlist"
    printable = all(byte >= 0x20 or byte in b"\t\n\r\f\x1b" for byte in head)
    if printable and head.startswith((b"{", b"[")):
        return "JSON"
    return "text" if printable and head else None


_EBML_HEADER, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_BOXES = {b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"free", b"skip", b"wide", b"styp", b"sidx", b"pnot", b"uuid"}


def check_whole(path: Path) -> None:
    """Raise DownloadError "truncated" if a file ends before its own layout does.

    Checked are MP4, QuickTime, Matroska and WebM.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        truncated = _truncated_segment(file, size) if file.read(4) == _EBML_HEADER else _truncated_box(file, size)
    if truncated:
        part, end = truncated
        message = f"{path.name} is truncated: {part} ends at byte {end}, the file has {size} bytes"
        raise DownloadError("truncated", message, transient=False)


def _truncated_box(file: BinaryIO, size: int) -> tuple[str, int] | None:
    """Return (name, end in bytes) of the first top-level box that ends beyond the file.

    Boxes are those of ISO 14496-12, 4.2.
    """
    offset = 0
    while offset + 8 <= size:
        file.seek(offset)
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind not in _BOXES:
            return None  # another container, or trailing bytes that players ignore
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        if length == 0:
            return None  # extends to the end of the file
        if length < 8:
            return None  # malformed: the demuxer gives a better message
        offset += length
        if offset > size:
            return f"box {kind.decode()}", offset
    return None


def _truncated_segment(file: BinaryIO, size: int) -> tuple[str, int] | None:
    """Return (name, end in bytes) of a Matroska segment (RFC 8794, RFC 9559) that ends beyond the file.

    `file` stands after the four bytes of the EBML header's id.
    """
    header_bytes = _ebml_size(file)
    if header_bytes is None:
        return None
    file.seek(header_bytes, os.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        return None  # malformed: the demuxer gives a better message
    length = _ebml_size(file)
    end = file.tell() + (length or 0)
    return ("the segment", end) if end > size else None


def _ebml_size(file: BinaryIO) -> int | None:
    """Read a variable-length size; return None if it is "unknown", as in a live recording, or malformed."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    num_more = 8 - first[0].bit_length()
    value = int.from_bytes(first + file.read(num_more), "big") & ((1 << 7 * (num_more + 1)) - 1)
    return None if value == (1 << 7 * (num_more + 1)) - 1 else value


_MAGIC = [
    (re.compile(rb"....ftypqt", re.DOTALL), "mov"),
    (re.compile(rb"....(?:ftyp|styp)", re.DOTALL), "mp4"),
    (re.compile(rb"....(?:moov|mdat|wide|free|skip|pnot)", re.DOTALL), "mov"),
    (re.compile(rb"\x1a\x45\xdf\xa3.{0,60}webm", re.DOTALL), "webm"),
    (re.compile(rb"\x1a\x45\xdf\xa3"), "mkv"),
    (re.compile(rb"RIFF....AVI ", re.DOTALL), "avi"),
    (re.compile(rb"FLV\x01"), "flv"),
    (re.compile(rb"OggS"), "ogv"),
    (re.compile(rb"\x30\x26\xb2\x75"), "wmv"),
    (re.compile(rb"\x00\x00\x01[\xba\xb3]"), "mpg"),
    (re.compile(rb"GIF8"), "gif"),
    (re.compile(rb"DKIF"), "ivf"),
    (re.compile(rb"\x47.{187}\x47", re.DOTALL), "ts"),
]


def container_extension(path: Path, container: str) -> str:
    """Return a file extension from the file's own bytes, never from its URL. The default is the demuxer's name."""
    with open(path, "rb") as file:
        head = file.read(256)
    found = next((extension for pattern, extension in _MAGIC if pattern.match(head)), None)
    return found or re.sub(r"[^a-z0-9]", "", container.split(",")[0]) or "bin"


def subtitle_format(path: Path) -> str:
    """Return a subtitle file's format by its first bytes, as the stage `transcribe` recognises it.

    Raises DownloadError "bad-subtitle".
    """
    with open(path, "rb") as file:
        head = file.read(SUBTITLE_HEAD_BYTES)
    # Of UTF-16 and UTF-32 only the zero bytes have to go: markup and times are ASCII in any encoding.
    text = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").decode("latin-1")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if re.search(r"<!doctype html|<html", text[:4096], re.I):
        message = f"{path.name} is a web page, not a subtitle file: {head[:100].decode('utf-8', 'replace')!r}"
        raise DownloadError("bad-subtitle", message)
    if head.startswith(b"\x00\x00\x01\xba"):
        raise DownloadError("bad-subtitle", f"{path.name} holds pictures of text (VobSub), which are not read")
    if found := sniff(text):
        return found
    message = f"{path.name} is not a subtitle file ({', '.join(READERS)}): "
    raise DownloadError("bad-subtitle", message + repr(head[:100].decode("utf-8", "replace")))
