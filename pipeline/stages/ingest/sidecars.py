"""Subtitle files beside a video (sidecars): NAME.vtt, NAME.LANG.vtt and the other formats.

File names are untrusted.
"""

import functools
import os
import re
from pathlib import Path

# In order of preference. Corpora record a video's first side-car, so new formats are added at the end.
SUBTITLE_EXTENSIONS = (
    *(".vtt", ".srt", ".ttml", ".json3"),
    *(".srv3", ".srv2", ".srv1", ".dfxp", ".itt", ".ass", ".ssa", ".sbv", ".sub", ".smi", ".sami"),
)


def sidecars(video: Path) -> list[tuple[Path, str | None]]:
    """Return (path, language) of the subtitle files beside a video.

    NAME.vtt comes first, then NAME.LANG.vtt by language.
    """
    folder = Path(os.path.abspath(video)).parent
    return list(_sidecars_of_folder(str(folder), folder.stat().st_mtime_ns).get(Path(video).stem, ()))


@functools.lru_cache(maxsize=16)
def _sidecars_of_folder(folder: str, _mtime_ns: int) -> dict[str, list[tuple[Path, str | None]]]:
    """Return sidecars by the videos' file stem, without links that lead out of the folder."""
    found: dict[str, list[tuple[Path, str | None]]] = {}
    for name in sorted(os.listdir(folder)):
        stem, extension = os.path.splitext(name)
        path = Path(folder, name)
        if extension.lower() not in SUBTITLE_EXTENSIONS or leads_out(path, Path(folder)):
            continue
        found.setdefault(stem, []).append((path, None))
        base, dot, language = stem.rpartition(".")
        if dot and re.fullmatch(r"[A-Za-z]{2,3}(?:-[A-Za-z0-9]{2,8})*", language):
            found.setdefault(base, []).append((path, language))
    order = {extension: i for i, extension in enumerate(SUBTITLE_EXTENSIONS)}
    for entries in found.values():
        entries.sort(key=lambda entry: (entry[1] or "", order[entry[0].suffix.lower()], entry[0].name))
    return found


def leads_out(path: Path, folder: Path) -> bool:
    """Return True for a symbolic link to something outside of `folder`."""
    return path.is_symlink() and not path.resolve().is_relative_to(folder.resolve())
