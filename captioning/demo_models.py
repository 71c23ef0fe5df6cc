"""Load the demo world's two models, which `bench.demo_models.train` trains and `captioning/weights` holds.

`demo_captioner` is open_clip's CoCa and `demo_clip` open_clip's CLIP, each with its own configuration and vocabulary.
A JSON file beside the weights holds them: `model` (arguments of the class), `preprocess`, `words`. Training code
belongs in `bench.demo_models`.
"""

import json
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file

from captioning.captioners.coca import CocaCaptioner
from captioning.model_identity import DEMO_WEIGHTS
from captioning.open_clip_loader import DTYPES, LoadedModel, use_device
from captioning.settings import CaptionSettings, ScoreSettings
from captioning.word_tokenizer import WordTokenizer

CLASSES = {"demo_captioner": open_clip.CoCa, "demo_clip": open_clip.CLIP}


def load_captioner(settings: CaptionSettings) -> CocaCaptioner:
    """Load the demo captioner, as the plug-in `captioner: demo`."""
    return CocaCaptioner(load_model("demo_captioner", settings, "caption"), settings, "demo")


def load_model(name: str, settings: CaptionSettings | ScoreSettings, section: str) -> LoadedModel:
    """Load a shipped model with its weights, on the device and in the precision of the settings.

    `section` names the settings' section in messages. Raises UserError if the device is missing.
    """
    config = json.loads((DEMO_WEIGHTS / f"{name}.json").read_text())
    device, dtype = use_device(settings, section), DTYPES[settings.precision]
    loaded = build(name, config)
    weights = load_file(DEMO_WEIGHTS / f"{name}.safetensors")
    loaded.model.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, strict=True)
    loaded.model.to(device, dtype).eval()
    return LoadedModel(loaded.model, loaded.preprocess, loaded.tokenizer, device, dtype)


def build(name: str, config: dict[str, Any]) -> LoadedModel:
    """Build the architecture of a config with random weights, in fp32 on the CPU."""
    model = CLASSES[name](**config["model"])
    if config.get("stem"):
        model.visual.conv1 = convolutional_stem(config["stem"], config["model"]["vision_cfg"]["width"])
    if name == "demo_captioner":  # open_clip leaves this tensor uninitialised
        torch.nn.init.normal_(
            model.text_decoder.text_projection, std=config["model"]["multimodal_cfg"]["width"] ** -0.5
        )
    preprocess = image_transform_v2(PreprocessCfg(**config["preprocess"]), is_train=False)
    tokenizer = WordTokenizer(config["words"], config["model"]["text_cfg"]["context_length"])
    return LoadedModel(model, preprocess, tokenizer, torch.device("cpu"), torch.float32)


def convolutional_stem(channels: list[int], width: int) -> torch.nn.Sequential:
    """Build a replacement for the patch embedding: [B, 3, H, W] → [B, width, H/s, W/s], s = 2 ** len(channels).

    Overlapping 3x3 convolutions of stride 2 (Xiao et al., "Early Convolutions Help Transformers See Better", 2021).
    """
    layers: list[torch.nn.Module] = []
    for inputs, outputs in zip([3, *channels], channels, strict=False):
        layers.append(torch.nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False))
        layers += [torch.nn.GroupNorm(4, outputs), torch.nn.GELU()]
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(channels[-1], width, 1))
