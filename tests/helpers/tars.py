"""Write tars as other programs do: in any format, with links and devices."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_members(
    path: Path,
    members: Mapping[str, bytes] | Iterable[tuple[str, bytes]],
    *,
    links: Mapping[str, str] | None = None,
    devices: Iterable[str] = (),
    folders: Iterable[str] = (),
    format: str = "pax",
    mode: str = "w",
) -> Path:
    """Write members in the given order, followed by links (name -> target), devices and folders."""
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, mode, format=FORMATS[format]) as tar:
        for name, data in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            tar.addfile(_special(name, tarfile.SYMTYPE, target))
        for name in devices:
            tar.addfile(_special(name, tarfile.CHRTYPE))
        for name in folders:
            tar.addfile(_special(name, tarfile.DIRTYPE))
    return path


def _special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info
