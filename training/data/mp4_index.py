"""Find the pictures of a plain MP4 by parsing the boxes of ISO/IEC 14496-12 and -15 that this needs.

FFmpeg needs about a millisecond to open a container, because it decodes the first picture to learn the format: a tenth
of the time of reading a short clip. `plain_track` reads only the default form of clips (one upright H.264 track, shown
in the order it is stored, from its first picture to its last) and returns None for any other.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_UPRIGHT = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
_SAMPLE_ENTRY_BYTES = 78  # of a VisualSampleEntry before its boxes
_MAX_PICTURES = 1_000_000


@dataclass(frozen=True)
class Track:
    """The pictures of a clip: picture k is the k-th stored and the k-th shown."""

    extradata: bytes  # AVCDecoderConfigurationRecord
    offsets: NDArray[np.int64]  # [pictures], in the file
    sizes: NDArray[np.int64]
    keys: NDArray[np.bool_]  # decoding may start at these pictures
    tagged: bool  # the container describes the colours

    def __len__(self) -> int:
        return len(self.sizes)


def plain_track(data: bytes | memoryview) -> Track | None:
    """Find the pictures of a plain MP4; return None for any other or damaged file, which FFmpeg then reads."""
    try:
        return _plain_track(memoryview(data))
    except (_NotPlain, struct.error, ValueError, IndexError, KeyError):
        return None


class _NotPlain(Exception):
    """The file has another form than this module reads."""


def _plain_track(data: memoryview) -> Track:
    movie = _inside(_boxes(data), b"moov")
    _need(b"mvex" not in movie)  # pictures in fragments
    tracks = [_boxes(box) for box in movie.get(b"trak", [])]
    tracks = [track for track in tracks if bytes(_inside(track, b"mdia")[b"hdlr"][0][8:12]) == b"vide"]
    _need(len(tracks) == 1)
    (track,) = tracks
    _need(bytes(track[b"tkhd"][0][-44:-8]) == _UPRIGHT)
    for box in track.get(b"edts", []):  # one edit that shows the track from its beginning: start 0, rate 1
        edits = _only(_boxes(box), b"elst")
        start, rate = struct.unpack_from(">qI" if edits[0] else ">iI", edits, 16 if edits[0] else 12)
        _need(_count(edits) == 1 and start == 0 and rate == 65536)
    table = _inside(track, b"mdia", b"minf", b"stbl")
    _need({b"stsd", b"stsz", b"stsc"} <= table.keys() and b"ctts" not in table)  # ctts: shown in another order
    descriptions = table[b"stsd"][0]
    _need(_count(descriptions) == 1)
    ((kind, entry),) = _walk(descriptions[8:])
    _need(kind == b"avc1")
    boxes = _boxes(entry[_SAMPLE_ENTRY_BYTES:])
    size, count = struct.unpack_from(">II", table[b"stsz"][0], 4)
    _need(count <= _MAX_PICTURES)
    sizes = np.full(count, size, np.int64) if size else _integers(table[b"stsz"][0], 12, count)
    offsets = _offsets(table, sizes)
    _need(0 < len(sizes) == len(offsets) and sizes.min() > 0 and int((offsets + sizes).max()) <= len(data))
    return Track(bytes(_only(boxes, b"avcC")), offsets, sizes, _keys(table, len(sizes)), b"colr" in boxes)


Boxes = dict[bytes, list[memoryview]]


def _boxes(data: memoryview) -> Boxes:
    """Collect the contents of the boxes in a stretch of the file, by kind."""
    found: Boxes = {}
    for kind, body in _walk(data):
        found.setdefault(kind, []).append(body)
    return found


def _walk(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, at + 8)
            head = 16
        elif size == 0:
            size = len(data) - at
        _need(size >= head and at + size <= len(data))
        yield kind, data[at + head : at + size]
        at += size


def _only(boxes: Boxes, kind: bytes) -> memoryview:
    _need(len(boxes.get(kind, [])) == 1)
    return boxes[kind][0]


def _inside(boxes: Boxes, *path: bytes) -> Boxes:
    """Open the only box of each kind in `path`, one inside the other; return the boxes inside the last."""
    for kind in path:
        boxes = _boxes(_only(boxes, kind))
    return boxes


def _offsets(table: Boxes, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Compute every picture's offset from the chunks' offsets and the number of pictures in each."""
    wide = b"co64" in table
    box = table[b"co64" if wide else b"stco"][0]
    chunks = _integers(box, 8, _count(box), ">u8" if wide else ">u4")
    runs = table[b"stsc"][0]
    first_N3 = _integers(runs, 8, 3 * _count(runs)).reshape(-1, 3)
    starts = first_N3[:, 0] - 1
    _need(len(starts) > 0 and starts[0] == 0 and bool((first_N3[:, 2] == 1).all()))
    per_chunk = np.repeat(first_N3[:, 1], np.diff(np.append(starts, len(chunks))))
    _need(int(per_chunk.sum()) == len(sizes))
    before = np.cumsum(sizes) - sizes
    first_of_chunk = np.cumsum(per_chunk) - per_chunk
    return before + np.repeat(chunks - before[first_of_chunk], per_chunk)


def _keys(table: Boxes, num_pictures: int) -> NDArray[np.bool_]:
    """Mark the key pictures; without a list of keys, all pictures are keys."""
    if b"stss" not in table:
        return np.ones(num_pictures, bool)
    box = table[b"stss"][0]
    keys = np.zeros(num_pictures, bool)
    keys[_integers(box, 8, _count(box)) - 1] = True
    _need(bool(keys[0]))
    return keys


def _count(box: memoryview) -> int:
    return struct.unpack_from(">I", box, 4)[0]


def _integers(box: memoryview, at: int, count: int, kind: str = ">u4") -> NDArray[np.int64]:
    return np.frombuffer(box, kind, count, at).astype(np.int64)


def _need(holds: bool) -> None:
    if not holds:
        raise _NotPlain
