"""Read Matroska and WebM files that were put one behind another as one file.

FFmpeg ends at the second piece of such a file, or at the third. Recorders in browsers write pieces like these. The
headers of later pieces (RFC 8794, 11.2.1, and RFC 9559, 5.1.1) are therefore read as Void elements, and the first
segment as one of unknown size, which contains the clusters of all pieces.
"""

import io
import mmap
from dataclasses import dataclass
from pathlib import Path

HEADER, SEGMENT, VOID = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\xec"
DOC_TYPE = b"\x42\x82"
LONGEST_HEADER = 4096  # bytes; real ones have about 40


class JoinedPieces(io.RawIOBase):
    """A file, read with some of its bytes replaced."""

    def __init__(self, path: Path, patches: list[tuple[int, bytes]]):
        self.name = f"file:{path}"
        self._file, self._patches = open(path, "rb"), patches  # noqa: SIM115 - closed by close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        data = bytearray(self._file.read(size))
        for at, patch in self._patches:
            low, high = max(at, start), min(at + len(patch), start + len(data))
            if low < high:
                data[low - start : high - start] = patch[low - at : high - at]
        return bytes(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class _Piece:
    """The headers of a piece: that of EBML, and that of its segment."""

    start: int
    size_at: int  # where the size of the segment stands
    body: int  # where the segment's content begins
    end: int | None  # where the segment ends, None for unknown


def joined_pieces(path: Path) -> JoinedPieces | None:
    """Return a reader of a file of several Matroska pieces, None for any other file."""
    with open(path, "rb") as file:
        if file.read(len(HEADER)) != HEADER:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            pieces, at = [], 0
            while at >= 0:
                piece = _piece(data, at)
                if piece is not None:
                    pieces.append(piece)
                elif not pieces:
                    return None
                after = at + 1 if piece is None else piece.end or piece.body
                at = data.find(HEADER, after)
            if len(pieces) < 2:
                return None
    first, *later = pieces
    unknown_size = (1 << 7 * (first.body - first.size_at) + 1) - 1  # a length marker and ones only
    patches = [(first.size_at, unknown_size.to_bytes(first.body - first.size_at, "big"))]
    for piece in later:
        length = piece.body - piece.start
        patches.append((piece.start, VOID + ((1 << 56) + length - 9).to_bytes(8, "big")))
    return JoinedPieces(path, patches)


def _piece(data: mmap.mmap, at: int) -> _Piece | None:
    """Read the two headers of a piece; return None if these bytes are none."""
    size, segment_at = _number(data, at + len(HEADER))
    if size is None or size > LONGEST_HEADER or DOC_TYPE not in data[segment_at : segment_at + size]:
        return None
    segment_at += size
    if data[segment_at : segment_at + len(SEGMENT)] != SEGMENT:
        return None
    size_at = segment_at + len(SEGMENT)
    if size_at >= len(data):
        return None
    size, body = _number(data, size_at)
    return _Piece(at, size_at, body, None if size is None else body + size)


def _number(data: mmap.mmap, at: int) -> tuple[int | None, int]:
    """Read a size of variable length (RFC 8794, 4); return it, None for unknown, and where it ends."""
    length = 9 - data[at].bit_length() if at < len(data) else 9
    if length > 8:
        return None, at + 1
    mask = (1 << 7 * length) - 1
    value = int.from_bytes(data[at : at + length], "big") & mask
    return None if value == mask else value, at + length
