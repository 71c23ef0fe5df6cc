"""Loading open_clip models, named, local or shipped, without ever unpickling code; the device they run on.

Importing this module costs seconds: torch, torchvision, timm and transformers come with open_clip.
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
    """An open_clip model ready to run: in eval mode, on its device, with its own picture transform and tokenizer."""

    model: Any
    preprocess: Callable[[Image.Image], torch.Tensor]  # RGB picture → [3, H, W]
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype

    def pixels(self, pictures: list[Image.Image]) -> torch.Tensor:
        """Pictures → normalised pixels [B, 3, H, W] on the device."""
        pixels_BCHW = torch.stack([self.preprocess(picture) for picture in pictures])
        return pixels_BCHW.to(self.device, self.dtype, non_blocking=True)


def use_device(settings: CaptionSettings | ScoreSettings, section: str) -> torch.device:
    """The device asked for; sets torch's thread count where the settings give one. Raises UserError without a GPU."""
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"setting {section}.device = cuda: torch sees no GPU here; allowed: auto, cpu.")
    use_gpu = settings.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def load_open_clip(settings: CaptionSettings | ScoreSettings, section: str) -> LoadedModel:
    """Any open_clip model by name and tag, name and weights file, or folder. Raises UserError naming the setting."""
    device = use_device(settings, section)
    pretrained = _checked_weights(settings, section)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(settings.model, pretrained, weights_only=True)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"setting {section}.model = {settings.model}, {section}.pretrained = {settings.pretrained}: {error}. "
            f"Allowed: a name and tag of open_clip.list_pretrained(), weights of that architecture in a file, "
            f"or {LOCAL_DIR}FOLDER."
        ) from error
    dtype = DTYPES[settings.precision]  # open_clip's own "bf16" leaves CoCa's text tower with tensors of two types
    tokenizer = open_clip.get_tokenizer(settings.model)
    return LoadedModel(model.to(device, dtype).eval(), preprocess, tokenizer, device, dtype)


def _checked_weights(settings: CaptionSettings | ScoreSettings, section: str) -> str | None:
    """The `pretrained` argument for open_clip, after every local file behind it was seen to hold tensors only."""
    if settings.model.startswith(LOCAL_DIR):
        folder = model_folder(settings.model, f"{section}.model")
        files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth")]
        if not files:
            raise UserError(f"setting {section}.model = {settings.model}: the folder holds no weights.")
        for path in files:
            check_tensors_only(path, f"{section}.model")
        return None
    file = weights_file(settings.pretrained, f"{section}.pretrained")
    if file is None:
        return settings.pretrained
    check_tensors_only(file, f"{section}.pretrained")
    return str(file)


def check_tensors_only(path: Path, setting: str) -> None:
    """Refuse a pickle that holds more than tensors before any other code opens it (some retry without the check)."""
    if path.suffix == ".safetensors":
        return
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, TypeError, ValueError, EOFError) as error:
        raise UserError(f"setting {setting}: {path.name} is no file of tensors ({error}).") from error
