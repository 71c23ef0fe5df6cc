"""Read UniPT's weights: side networks in a file of their own, or a released file with its CLIP.

A file of ours holds the side networks alone, in published names: 38 MB beside a frozen backbone of 600 MB. Its header
has the settings and the backbone's digest.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipmill.base.errors import UserError
from clipmill.base.settings import validate_settings
from training.models.clip4clip.weight_names import config_from_names, tidy
from training.models.clip_vip.model import ClipVip
from training.models.clip_vip.weights import assemble, read_header, read_tensors
from training.models.unipt.model import PREFIXES, UniPtClip, side_tensors
from training.models.unipt.settings import UniPtSettings


def unipt_header(model: UniPtClip) -> dict[str, Any]:
    """Describe the side networks and their backbone for the header of a file."""
    settings = model.settings.model_dump(mode="json")
    own = {"model_type": "unipt", "architectures": ["UniPtClip"]}
    return own | {"unipt": settings, "backbone": backbone_digest(model.backbone)}


def load_unipt(weights: str | Path, backbone: ClipVip | None = None) -> UniPtClip:
    """Load side networks from a file or folder of ours, or from a released file, onto their backbone.

    backbone  None: the CLIP that a released file holds under `clip.`
    Raises UserError if names or sizes do not fit, or if a file of ours was trained on another backbone.
    """
    path = Path(weights)
    path = path / "model.safetensors" if path.is_dir() else path
    theirs = read_tensors(path)
    side = {name: tensor for name, tensor in theirs.items() if name.startswith(PREFIXES)}
    if not side:
        raise UserError(f"{path} holds no UniPT network: no tensor in it begins with {' or '.join(PREFIXES)}")
    if foreign := sorted(name for name in theirs if not name.startswith((*PREFIXES, "clip."))):
        raise UserError(f"{path} holds {len(foreign)} tensors that UniPT does not have, such as {foreign[0]}")
    header = read_header(path) or {}
    if "unipt" in header:
        if backbone is None:
            raise UserError(f"{path} holds side networks alone: give their backbone, {header['backbone']}")
        if header["backbone"] != (found := backbone_digest(backbone)):
            raise UserError(f"{path} was trained on backbone {header['backbone']}, not on this one, {found}")
        model = UniPtClip(backbone, validate_settings(UniPtSettings, header["unipt"]))
        fill(model, side, str(path))
        return model
    if backbone is None:
        clip = tidy({name: tensor for name, tensor in theirs.items() if name not in side})
        bare = {name.removeprefix("clip."): tensor for name, tensor in clip.items()}
        backbone = assemble(config_from_names(clip), "open_clip", bare, seed=0, source=str(path))
    gate = side.get("image_adapter.gate_layer.weight")
    inner = backbone.config.embed_dim if gate is None else gate.shape[-1]
    model = UniPtClip(backbone, UniPtSettings(reduction=max(1, backbone.config.embed_dim // inner)))
    fill(model, side, str(path))
    return model


def fill(model: UniPtClip, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill both side networks. Raises UserError unless names and shapes match exactly."""
    ours = side_tensors(model.state_dict())
    for problem, names in {"lacks": ours.keys() - tensors.keys(), "has besides": tensors.keys() - ours.keys()}.items():
        if names:
            raise UserError(f"{source} {problem} {len(names)} tensors, such as {sorted(names)[0]}")
    for name, tensor in ours.items():
        if tensor.shape != tensors[name].shape:
            theirs = list(tensors[name].shape)
            raise UserError(f"{source}: {name} is {theirs}, but this model needs {list(tensor.shape)}")
    model.load_state_dict(dict(tensors), strict=False)


@torch.no_grad()
def backbone_digest(backbone: ClipVip) -> str:
    """Hash every weight's bytes, name and shape to 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
