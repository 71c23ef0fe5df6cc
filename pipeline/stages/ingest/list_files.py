"""Shared by the readers of source lists: problem reports, text decoding, extensions of video files."""

import codecs
import os
import re
from dataclasses import dataclass

from shards.corpus.source_ids import SCHEME_PATTERN

VIDEO_EXTENSIONS = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .flv .f4v .wmv .asf .ts .m2ts .mts .mpg .mpeg .vob .ogv .3gp .3g2 .mxf .ivf".split()
)


@dataclass(frozen=True)
class Problem:
    """A line of a list, or a file of a folder, that gives no source or an incomplete one."""

    location: str  # FILE:LINE (a row's number in tables, the header being 1), FILE#JSON-POINTER, or a path
    # bad-line | missing-url | bad-url | bad-span | bad-text | empty-text | duplicate-id | bad-encoding |
    # unread-spans | unsafe-symlink; in benchmarks also missing-video | ambiguous-video | unknown-id | no-text
    error_class: str
    message: str


def decode(name: str, data: bytes) -> tuple[str, list[Problem]]:
    """Decode a list and make all line ends line feeds: UTF-8, or UTF-16 and UTF-32, also without a byte order mark.

    Anything else is read as Latin-1 and reported as a problem, and so are bytes that the encoding does not have.
    """
    encoding = _unicode_encoding(data)
    try:
        text, problems = data.decode(encoding), []
    except UnicodeDecodeError as error:
        text = data.decode("latin-1") if encoding == "utf-8-sig" else data.decode(encoding, "replace")
        read_as = "not UTF-8, so read as Latin-1" if encoding == "utf-8-sig" else f"not all of it is {encoding.upper()}"
        problems = [Problem(name, "bad-encoding", f"{read_as}: {error}")]
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removeprefix(_BOM).replace(f"\n{_BOM}", "\n"), problems  # files that were joined have a mark for each


_BOM = "\ufeff"


def _unicode_encoding(data: bytes) -> str:
    """Return the encoding that a byte order mark states, or for which every second byte of ASCII text is zero."""
    for mark, encoding in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")):
        if data.startswith(mark):
            return encoding
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    start = data[:4096]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if len(start) >= 4 and 4 * (even + odd) > len(start) and min(even, odd) * 8 < max(even, odd):
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8-sig"


def looks_like_address(text: str) -> bool:
    """Return whether text is a URL or the name of a video file."""
    text = text.strip()
    return bool(re.match(SCHEME_PATTERN, text)) or os.path.splitext(text)[1].lower() in VIDEO_EXTENSIONS


def is_unicode(text: str) -> bool:
    """Return False for text with half of a surrogate pair, which JSON can express but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
