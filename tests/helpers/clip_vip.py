"""Make small CLIP-ViP models, read reference files and compare tensors."""

import hashlib
import json
import tempfile
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.models.clip_vip.model import ClipVip, ModelConfig, TowerConfig
from training.models.clip_vip.weights import write_model
from training.models.model import VideoTextModel
from training.models.registry import load_method

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
_completed: list[tempfile.TemporaryDirectory] = []  # created lazily: ranks that import this exit without cleanup


def from_recipe(key: str, shape: Sequence[int], mean: float, std: float) -> Tensor:
    """Draw the float32 tensor of a "SEED:NAME", the same bytes on every platform and with every numpy."""
    uniform = np.random.RandomState(zlib.crc32(key.encode())).random_sample(shape)
    return torch.from_numpy((mean + (2 * uniform - 1) * np.sqrt(3) * std).astype(np.float32))


@cache
def reference(*parts: str) -> Path:
    """Return the path of a reference file, after adding the weights and inputs that its recipe draws."""
    name = "/".join(parts)
    drawn = json.loads((REFERENCE / "drawn.json").read_text()).get(name)
    if drawn is None:
        return REFERENCE / name
    state = load_file(REFERENCE / name) if (REFERENCE / name).exists() else {}
    for tensor, recipe in drawn["tensors"].items():
        state[tensor] = from_recipe(recipe["key"], recipe["shape"], recipe["mean"], recipe["std"])
        if "mask" in recipe:
            mask = state[recipe["mask"]]
            state[tensor][mask == 0] = 0
    drawn_bytes = b"".join(state[tensor].numpy().tobytes() for tensor in sorted(drawn["tensors"]))
    assert hashlib.sha256(drawn_bytes).hexdigest() == drawn["sha256"], f"{name}: differs from the reference"
    if not _completed:
        _completed.append(tempfile.TemporaryDirectory(prefix="clipmill-reference-"))
    completed = Path(_completed[0].name, name.replace("/", "-"))
    save_file(state, completed)
    return completed


def tensors(*parts: str) -> dict[str, Tensor]:
    return load_file(reference(*parts))


def numbers(*parts: str) -> Any:
    return json.loads(reference(*parts).read_text())


def tiny_config(**changes: Any) -> ModelConfig:
    """Return a config of two layers and 4 patches a frame: fast, yet large enough to show errors."""
    settings: dict[str, Any] = {
        "vision": TowerConfig(width=32, num_layers=2, num_heads=2, mlp_width=64),
        "text": TowerConfig(width=24, num_layers=2, num_heads=2, mlp_width=48),
        "embed_dim": 16,
        "image_size": 32,
        "patch_size": 16,
        "vocab_size": 50,
        "context_length": 12,
        "num_times": 4,
    }
    return ModelConfig(**settings | changes)


def tiny_model(seed: int = 0, **changes: Any) -> ClipVip:
    """Make a model with random weights, temporal table and biases included, so that every path affects the output."""
    model = ClipVip(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty(parameter.shape).normal_(0, 0.3, generator=generator)
            parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
        model.logit_scale.fill_(2.0)
    return model


def save(model: VideoTextModel, path: str | Path, *, prefix: str = "") -> Path:
    """Write a model's weights to a folder or .safetensors file, as a run does; return their path.

    prefix  of all names; released CLIP-ViP files have `clipmodel.`
    """
    code = load_method(model.method).code
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    written = {prefix + name: tensor for name, tensor in code.file_tensors(model, state).items()}
    return write_model(written, code.file_header(model), path)


def random_pixels(batch: int, num_frames: int, size: int = 32, seed: int = 1) -> Tensor:
    return torch.empty(batch, num_frames, 3, size, size).normal_(generator=torch.Generator().manual_seed(seed))


def random_texts(batch: int, length: int = 10, vocab: int = 50, seed: int = 2) -> Tensor:
    """Draw token rows of start, words, end and padding with 0; lengths differ and row 0 has no padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab - 2, (batch, length), generator=generator)
    ids[:, 0] = vocab - 2
    for row in range(batch):
        end = length - 1 - (row * 3) % (length - 2)
        ids[row, end] = vocab - 1
        ids[row, end + 1 :] = 0
    return ids


def max_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape."""
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()
