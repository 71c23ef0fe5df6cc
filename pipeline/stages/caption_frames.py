"""Read the JPEGs of caption frames by byte range from the tars of clips."""

import hashlib
from collections.abc import Sequence

from clipmill.base.errors import ItemError
from shards.packing.tar import read_member
from shards.storage.mirror import files_of


def read_frames(root: str, frames: Sequence[tuple[str, dict]]) -> list[bytes | ItemError]:
    """Return the JPEG of each (tar, frame), or the ItemError of one that is unreadable or does not match its row.

    frame: a struct `FRAME` of the schema.
    """
    found: list[bytes | ItemError] = []
    for tar, frame in frames:
        try:
            data = read_member(files_of(root).local(tar), frame["offset"], frame["num_bytes"])
        except ItemError as error:
            found.append(error)
            continue
        if hashlib.sha256(data).hexdigest() != frame["sha256"]:
            place = f"{tar.rpartition('/')[2]} at {frame['offset']}"
            data = ItemError("corrupt-frame", f"{place}: the bytes differ from the frame that was cut; cut it again")
        found.append(data)
    return found
