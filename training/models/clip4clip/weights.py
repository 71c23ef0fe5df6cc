"""Read CLIP4Clip weights: released files, a CLIP with or without a head's file beside it, our folders.

Every tensor of CLIP is read from the source. A head is read whole, or not at all and then starts from CLIP's tensors
(`model.new_tensors`). Other missing or unexpected tensors are an error.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipmill.base.errors import UserError
from clipmill.base.settings import validate_settings
from training.models.clip4clip.model import Clip4Clip
from training.models.clip4clip.settings import Clip4ClipSettings
from training.models.clip4clip.weight_names import (
    STEM_3D,
    config_from_names,
    head_of,
    num_head_layers,
    released_name,
    stem_of,
    tidy,
)
from training.models.clip_vip.config_formats import config_from_dict
from training.models.clip_vip.model import ClipVip, ModelConfig
from training.models.clip_vip.weights import assemble, load_clip_vip, load_model, read_header, read_tensors

Config = str | Path | Mapping[str, Any] | ModelConfig | None


def load_clip4clip(
    weights: str | Path,
    head_weights: str | Path | None = None,
    head: str | None = "meanP",
    config: Config = None,
    *,
    stem: str | None = None,
    num_layers: int | None = None,
    frozen_layers: int | None = None,
    seed: int = 0,
) -> Clip4Clip:
    """Load a model in evaluation mode (tightTransf has dropout), in float32 unless the file is float64.

    weights        a file in released names (OpenAI's, with or without `clip.`), with or without the head's tensors; one
                   of our folders; or a plain CLIP in any form that `training.models.clip_vip.weights.load_model` takes
    head_weights   a file with the tensors that CLIP4Clip adds
    head           "meanP", "seqLSTM", "seqTransf" or "tightTransf"; None: the one that the files hold
    config         of the CLIP: HF's JSON as a path or dict, or a `ModelConfig`. None: from the file's header or shapes
    stem           "2d" or "3d"; None: the one that the files hold
    num_layers     of a head with blocks; None: as many as the files hold, else 4
    frozen_layers  as in `Clip4ClipSettings`
    seed           draws the tensors of a head that neither the files nor CLIP have
    """
    clip, added = _read(weights, config)
    if head_weights is not None:
        added |= tidy(read_tensors(Path(head_weights)))
    source = str(weights) if head_weights is None else f"{weights} with {head_weights}"
    chosen = _settings(added, head, stem, num_layers, frozen_layers)
    model = Clip4Clip(clip, chosen, seed)
    if added or head_weights is not None:
        _read_added(model, added, source)
    return model.eval()


def _read(weights: str | Path, config: Config) -> tuple[ClipVip, dict[str, Tensor]]:
    """Read the CLIP of a source, and the tensors of its file that CLIP does not have, by released names."""
    path = Path(weights)
    if (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    theirs = tidy(read_tensors(path)) if path.is_file() else {}
    if path.name == "ema.safetensors" and (whole := path.with_name("model.safetensors")).is_file():
        theirs = tidy(read_tensors(whole)) | theirs  # clipmill 0.1 left buffers out of averaged weights
    if "clip.visual.class_embedding" not in theirs:
        if config is None:
            return load_model(weights, num_added=0, num_times=0, pooling="mean"), {}
        return load_clip_vip(weights, _plain(config)), {}
    added = {key: theirs.pop(key) for key in list(theirs) if key == STEM_3D or head_of(key)}
    bare = {key.removeprefix("clip."): tensor for key, tensor in theirs.items()}
    config = read_header(path) if config is None else config
    clip_config = config_from_names(theirs) if config is None else _plain(config)
    return assemble(clip_config, "open_clip", bare, seed=0, source=str(weights)), added


def _plain(config: str | Path | Mapping[str, Any] | ModelConfig) -> ModelConfig:
    """Read a configuration and drop its proxies; `load_clip_vip` refuses a file that has their tensors."""
    if isinstance(config, str | Path):
        if not Path(config).is_file():
            raise UserError(f"config {str(config)!r}: no such file; give the path of an HF config.json")
        config = json.loads(Path(config).read_text())
    if isinstance(config, Mapping):
        config = config_from_dict(config)
    return replace(config, pooling="mean", num_added=0, num_times=0)


def _settings(
    added: Mapping[str, Tensor], head: str | None, stem: str | None, num_layers: int | None, frozen_layers: int | None
) -> Clip4ClipSettings:
    """Combine the given settings with those that the tensors imply."""
    if head is None:  # each probe is a tensor that only its head has
        probes = {"tightTransf": "score.bias", "seqTransf": "blocks.0.out.bias", "seqLSTM": "lstm.bias_ih_l0"}
        found = [kind for kind, probe in probes.items() if released_name(f"head.{probe}", kind, "2d") in added]
        head = found[0] if found else "meanP"
    chosen: dict[str, Any] = {"head": head, "frozen_layers": frozen_layers}
    chosen["stem"] = stem or ("3d" if STEM_3D in added else "2d")
    settings = validate_settings(Clip4ClipSettings, chosen)
    num_layers = num_layers or num_head_layers(added, settings.head)
    return validate_settings(Clip4ClipSettings, chosen | {"num_layers": num_layers}) if num_layers else settings


@torch.no_grad()
def _read_added(model: Clip4Clip, theirs: Mapping[str, Tensor], source: str) -> None:
    """Fill the tensors that CLIP4Clip adds: the head and the 3-D stem, each whole or absent."""
    ours = {name: tensor for name, tensor in model.state_dict().items() if model.is_added(name)}
    keys = {name: released_name(name, model.settings.head, model.settings.stem) for name in ours}
    if unexpected := sorted(set(theirs) - set(keys.values())):
        raise UserError(
            f"{source} holds tensors that head {model.settings.head!r} with stem {model.settings.stem!r} "
            f"does not have: {', '.join(unexpected[:6])}. Set model.clip4clip.head and stem to those of the file."
        )
    in_head = [key for name, key in keys.items() if name.startswith("head.")]
    missing = [key for key in in_head if key not in theirs]
    if 0 < len(missing) < len(in_head):
        raise UserError(f"{source} lacks {', '.join(missing[:6])} of head {model.settings.head!r}")
    read = {name: theirs[key] for name, key in keys.items() if key in theirs}
    for name, tensor in read.items():
        if keys[name] == STEM_3D:
            if tensor.ndim != 5 or tensor.shape[1:3] != (3, 3):
                raise UserError(f"{source}: {STEM_3D} is {list(tensor.shape)}; allowed: [width, 3, 3, patch, patch]")
            tensor = stem_of(tensor)
        if tensor.shape != ours[name].shape:
            expected = list(ours[name].shape)
            raise UserError(f"{source}: {keys[name]} is {list(tensor.shape)}, but this model's {name} is {expected}")
        ours[name].copy_(tensor)
    model.new_tensors = tuple(name for name in model.new_tensors if name not in read)
