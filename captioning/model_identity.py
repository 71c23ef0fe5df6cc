"""What a model is, said without loading it: hashes of its files and names. Standard library only."""

import hashlib
from functools import lru_cache
from pathlib import Path

from clipmill.base.errors import UserError
from clipmill.base.settings import digest

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
LOCAL_DIR = "local-dir:"  # open_clip's prefix for a folder with open_clip_config.json and weights
DEMO_WEIGHTS = Path(__file__).parent / "weights"


def file_sha256(path: Path) -> str:
    """Hex digest of a file, computed once per process for a file of this path, size and time."""
    stat = path.stat()
    return _sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256(path: str, num_bytes: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_identity(folder: Path) -> list[list[str]]:
    """Name and hash of every file of a model's folder: where it lies does not matter, what it holds does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[path.relative_to(folder).as_posix(), file_sha256(path)] for path in files]


def demo_identity(name: str) -> list[str]:
    """Hashes of a shipped model's weights and of its config."""
    return [file_sha256(DEMO_WEIGHTS / f"{name}{suffix}") for suffix in (".safetensors", ".json")]


def weights_file(pretrained: str, setting: str) -> Path | None:
    """The local file that `pretrained` names, None where it is a tag. Raises UserError where a file is missing."""
    path = Path(pretrained).expanduser()
    if path.suffix not in WEIGHT_SUFFIXES and not path.is_file():
        return None
    if path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(
            f"setting {setting} = {pretrained}: a weights file ends in one of {', '.join(WEIGHT_SUFFIXES)}."
        )
    if not path.is_file():
        raise UserError(f"setting {setting} = {pretrained}: there is no such file.")
    return path


def model_folder(model: str, setting: str) -> Path:
    """The folder behind open_clip's `local-dir:`. Raises UserError where it is not one."""
    folder = Path(model.removeprefix(LOCAL_DIR)).expanduser()
    if not (folder / "open_clip_config.json").is_file():
        raise UserError(f"setting {setting} = {model}: the folder needs open_clip_config.json and weights beside it.")
    return folder


def open_clip_identity(model: str, pretrained: str, section: str) -> list:
    """What makes an open_clip model the one it is: names for what is published, hashes for what lies here."""
    if model.startswith(LOCAL_DIR):
        return ["local-dir", folder_identity(model_folder(model, f"{section}.model"))]
    file = weights_file(pretrained, f"{section}.pretrained")
    return [model, file_sha256(file)] if file else [model, pretrained]


def open_clip_name(model: str, pretrained: str, section: str) -> str:
    """The name that result rows carry: no path of this machine, the same for the same weights."""
    if model.startswith(LOCAL_DIR):
        return f"local-dir/{digest(open_clip_identity(model, pretrained, section))}"
    file = weights_file(pretrained, f"{section}.pretrained")
    return f"{model}/{file_sha256(file)[:16] if file else pretrained}"
