"""Names of packs and of their files. The main pack is `shards/` itself, a named one is the folder `shards/NAME/`.

A shard of a volume is `VVVVVV-NNNNNN.tar`: the volume, and the number of the shard in it. A shard of a pack that is
shuffled over the whole corpus is `NNNNNN.tar`. Each has its index beside it, `.parquet`.
"""

import re
from pathlib import Path

from clipmill.base.errors import UserError
from clipmill.base.text import sql_literal

MAIN = ""  # name of the main pack
NEXT = ".next"  # folder inside a pack's folder for shards that are complete but not yet in place
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_SHARD_FILE = re.compile(r"(?:(\d{6,})-)?\d{6,}\.(?:tar|parquet)")


def check_name(name: str) -> None:
    """Raise UserError for a name that a pack cannot have."""
    if not is_name(name):
        raise UserError(
            f"--name {name!r}: a pack's name is at most 64 lowercase letters, digits and dashes, and begins with a "
            "letter or digit, for example captions-good."
        )


def is_name(name: str) -> bool:
    """Return whether a named pack may be called so; a name is also that of a folder."""
    return _NAME.fullmatch(name) is not None


def folder_of(pack: str) -> str:
    """Return the folder of a pack's shards, relative to the corpus."""
    return f"shards/{pack}" if pack else "shards"


def pack_of(relative: str) -> str:
    """Return the pack that a path below shards/ belongs to."""
    parts = Path(relative).parts
    return parts[1] if len(parts) > 2 and is_name(parts[1]) else MAIN


def samples_of(pack: str) -> str:
    """Return SQL for the samples of a pack, in the form of the table `samples`."""
    return f"(SELECT * EXCLUDE (pack) FROM pack_samples WHERE pack = {sql_literal(pack)})" if pack else "samples"


def named_packs(root: Path) -> list[str]:
    """Return the names of the packs that have a folder, in order; the main one is not among them."""
    folder = root / "shards"
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and is_name(path.name))


def index_files(root: Path, pack: str) -> list[Path]:
    """Return the indexes of a pack, in order of the shards' names."""
    return sorted((root / folder_of(pack)).glob("[0-9]*.parquet"))


def is_shard_file(name: str) -> bool:
    """Return whether this is the name of a shard or of an index."""
    return _SHARD_FILE.fullmatch(name) is not None


def volume_of(name: str) -> int | None:
    """Return the volume of a shard or index; None: it is of a pack that is shuffled over the whole corpus."""
    match = _SHARD_FILE.fullmatch(name)
    return int(match[1]) if match and match[1] else None
