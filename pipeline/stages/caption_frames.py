"""The JPEGs of caption frames, read back by byte range from the tars of clips."""

import hashlib
from collections.abc import Sequence

from clipmill.base.errors import ItemError
from shards.packing.tar import read_member
from shards.storage.mirror import files_of


def read_frames(root: str, frames: Sequence[tuple[str, dict]]) -> list[bytes | ItemError]:
    """Return the JPEG of each (tar, frame), or the ItemError of one that cannot be read or is not what its row says.

    frame: a struct `FRAME` of the schema.
    """
    return [_read_frame(root, tar, frame) for tar, frame in frames]


def _read_frame(root: str, tar: str, frame: dict) -> bytes | ItemError:
    try:
        data = read_member(files_of(root).local(tar), frame["offset"], frame["num_bytes"])
    except ItemError as error:
        return error
    if hashlib.sha256(data).hexdigest() != frame["sha256"]:
        name = tar.rpartition("/")[2]
        return ItemError("corrupt-frame", f"{name} at {frame['offset']}: not the frame that was cut")
    return data
