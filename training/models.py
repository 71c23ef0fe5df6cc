"""The model of a run's settings, and what its texts become."""

import json
from dataclasses import replace

from safetensors.torch import load_file

from pipeline.errors import UserError
from training.checkpoint import from_open_clip_model, load_model
from training.model import ClipVip, ModelConfig
from training.settings import ModelSettings
from training.texts import TextEncoder


def load(settings: ModelSettings, seed: int = 0) -> ClipVip:
    """float32 on the CPU. `seed` draws the added tokens that a plain CLIP lacks. Raises UserError."""
    shape = settings.model_dump(include={"num_added", "num_times", "pooling"}, exclude_none=True)
    if settings.init == "demo":
        return _demo_model(seed, shape)
    return load_model(settings.init, seed=seed, **shape)


def text_encoder(config: ModelConfig, max_tokens: int) -> TextEncoder:
    """Raises UserError where the model knows no text of that length."""
    if max_tokens > config.context_length:
        raise UserError(
            f"data.max_text_tokens = {max_tokens}: the model reads at most {config.context_length}, "
            "both end tokens included."
        )
    return TextEncoder(config.words, max_tokens)


def _demo_model(seed: int, shape: dict) -> ClipVip:
    """The image-text model that ships with clipmill (`captioning.train_demo_models`)."""
    from captioning.demo import build
    from captioning.identity import DEMO_WEIGHTS

    description = json.loads((DEMO_WEIGHTS / "demo_clip.json").read_text())
    clip = build("demo_clip", description).model
    weights = load_file(DEMO_WEIGHTS / "demo_clip.safetensors")
    clip.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
    model = from_open_clip_model(clip, description["model"], seed=seed, **shape)
    model.config = replace(model.config, words=tuple(description["words"]))
    return model
