"""Identify models without loading them, by names and by hashes of their files.

Fingerprints are made of these identities. Import the standard library only: every command may read this module.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

from clipmill.base.errors import UserError
from clipmill.base.settings import digest

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
LOCAL_DIR = "local-dir:"  # open_clip's prefix for a folder with open_clip_config.json and weights
DEMO_WEIGHTS = Path(__file__).parent / "weights"


def file_sha256(path: Path) -> str:
    """Return the hex digest of a file, computed once per process for the same path, size and modification time."""
    stat = path.stat()
    return _sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256(path: str, num_bytes: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_identity(folder: Path) -> list[list[str]]:
    """Return name and hash of every file in a model's folder; the folder's own path does not matter."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[path.relative_to(folder).as_posix(), file_sha256(path)] for path in files]


def demo_identity(name: str) -> list[str]:
    """Return the hashes of a shipped model's weights and config."""
    return [file_sha256(DEMO_WEIGHTS / f"{name}{suffix}") for suffix in (".safetensors", ".json")]


def weights_file(pretrained: str, setting: str) -> Path | None:
    """Return the local file that `pretrained` names, None for a tag. Raises UserError for a missing file."""
    path = Path(pretrained).expanduser()
    if path.suffix not in WEIGHT_SUFFIXES and not path.is_file():
        return None
    if path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(
            f"setting {setting} = {pretrained}: the name of a weights file ends in {', '.join(WEIGHT_SUFFIXES)}."
        )
    if not path.is_file():
        raise UserError(f"setting {setting} = {pretrained}: this file does not exist; give a file or a tag.")
    return path


def model_folder(model: str, setting: str) -> Path:
    """Return the folder that open_clip's `local-dir:` names. Raises UserError for any other folder."""
    folder = Path(model.removeprefix(LOCAL_DIR)).expanduser()
    if not (folder / "open_clip_config.json").is_file():
        raise UserError(
            f"setting {setting} = {model}: {folder} has no open_clip_config.json; name a folder that holds that file "
            "and the weights."
        )
    return folder


def open_clip_identity(model: str, pretrained: str, section: str) -> list:
    """Return the identity of an open_clip model: the name of a published one, hashes of local files."""
    if model.startswith(LOCAL_DIR):
        return ["local-dir", folder_identity(model_folder(model, f"{section}.model"))]
    file = weights_file(pretrained, f"{section}.pretrained")
    return [model, file_sha256(file)] if file else [model, pretrained]


def open_clip_name(model: str, pretrained: str, section: str) -> str:
    """Return the model's name for result rows: without local paths, the same for the same weights."""
    if model.startswith(LOCAL_DIR):
        return f"local-dir/{digest(open_clip_identity(model, pretrained, section))}"
    file = weights_file(pretrained, f"{section}.pretrained")
    return f"{model}/{file_sha256(file)[:16] if file else pretrained}"
