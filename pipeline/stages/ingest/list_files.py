"""Shared by the readers of source lists: problem reports, text decoding, extensions of video files."""

from dataclasses import dataclass

VIDEO_EXTENSIONS = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .flv .f4v .wmv .asf .ts .m2ts .mts .mpg .mpeg .vob .ogv .3gp .3g2 .mxf .ivf".split()
)


@dataclass(frozen=True)
class Problem:
    """A line of a list, or a file of a folder, that gives no source or an incomplete one."""

    location: str  # FILE:LINE (a row's number in tables, the header being 1), FILE#JSON-POINTER, or a path
    # bad-line | missing-url | bad-url | bad-span | bad-text | empty-text | duplicate-id | bad-encoding |
    # unsafe-symlink; in benchmarks also missing-video | ambiguous-video | unknown-id | no-text
    error_class: str
    message: str


def decode(name: str, data: bytes) -> tuple[str, list[Problem]]:
    """Decode a list: UTF-8, or UTF-16 with a byte order mark.

    Anything else is read as Latin-1 and reported as a problem.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace"), []
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        return data.decode("latin-1"), [Problem(name, "bad-encoding", f"not UTF-8, so read as Latin-1: {error}")]


def is_unicode(text: str) -> bool:
    """Return False for text with half of a surrogate pair, which JSON can express but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
