"""Load published or local open_clip models without unpickling code, and choose their device.

Importing this module takes seconds, because open_clip imports torch, torchvision, timm and transformers. Import it
late, when a model is loaded, not at the top of modules that every command reads.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image

from captioning.model_identity import LOCAL_DIR, model_folder, weights_file
from captioning.settings import CaptionSettings, ScoreSettings
from clipmill.base.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class LoadedModel:
    """An open_clip model ready to run: in eval mode, on its device, with its own transform and tokenizer."""

    model: Any
    preprocess: Callable[[Image.Image], torch.Tensor]  # RGB picture → [3, H, W]
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype

    def pixels(self, pictures: list[Image.Image]) -> torch.Tensor:
        """Transform pictures to normalised pixels [B, 3, H, W] on the device."""
        pixels_BCHW = torch.stack([self.preprocess(picture) for picture in pictures])
        return pixels_BCHW.to(self.device, self.dtype, non_blocking=True)


def use_device(settings: CaptionSettings | ScoreSettings, section: str) -> torch.device:
    """Return the device of the settings, and set torch's number of threads if they give one.

    Raises UserError if the settings ask for a GPU that torch does not find.
    """
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"setting {section}.device = cuda: torch finds no GPU; use auto or cpu.")
    use_gpu = settings.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def load_open_clip(settings: CaptionSettings | ScoreSettings, section: str) -> LoadedModel:
    """Load an open_clip model by name and tag, name and weights file, or folder. Raises UserError."""
    device = use_device(settings, section)
    pretrained = _checked_weights(settings, section)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(settings.model, pretrained, weights_only=True)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"setting {section}.model = {settings.model}, {section}.pretrained = {settings.pretrained}: {error}. "
            f"Give a name and tag of open_clip.list_pretrained(), a name and a file of weights for it, "
            f"or {LOCAL_DIR}FOLDER."
        ) from error
    dtype = DTYPES[settings.precision]  # open_clip's own "bf16" mixes two types in CoCa's text tower
    tokenizer = open_clip.get_tokenizer(settings.model)
    return LoadedModel(model.to(device, dtype).eval(), preprocess, tokenizer, device, dtype)


def _checked_weights(settings: CaptionSettings | ScoreSettings, section: str) -> str | None:
    """Check that local weights hold tensors only; return open_clip's argument `pretrained`. Raises UserError."""
    if settings.model.startswith(LOCAL_DIR):
        folder = model_folder(settings.model, f"{section}.model")
        files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth")]
        if not files:
            suffixes = ".safetensors, .bin or .pth"
            raise UserError(f"setting {section}.model = {settings.model}: {folder} has no weights ({suffixes}).")
        for path in files:
            check_tensors_only(path, f"{section}.model")
        return None
    file = weights_file(settings.pretrained, f"{section}.pretrained")
    if file is None:
        return settings.pretrained
    check_tensors_only(file, f"{section}.pretrained")
    return str(file)


def check_tensors_only(path: Path, setting: str) -> None:
    """Raise UserError for a pickle that holds more than tensors.

    Call it before other code opens the file: some libraries retry without this check.
    """
    if path.suffix == ".safetensors":
        return
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, TypeError, ValueError, EOFError) as error:
        raise UserError(
            f"setting {setting}: {path.name} does not hold tensors only ({error}); give a file of tensors, "
            "preferably .safetensors."
        ) from error
