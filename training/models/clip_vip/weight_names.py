"""Names and layouts of `ClipVip`'s tensors in published CLIP-ViP/HF files and in open_clip."""

import torch
from torch import Tensor

_PUBLISHED = {
    "vision.blocks.": "vision_model.encoder.layers.",
    "vision.class_embedding": "vision_model.embeddings.class_embedding",
    "vision.added_embedding": "vision_model.embeddings.added_cls",
    "vision.time_embedding": "vision_model.embeddings.temporal_embedding",
    "vision.patch_embedding.": "vision_model.embeddings.patch_embedding.",
    "vision.position_embedding": "vision_model.embeddings.position_embedding.weight",
    "vision.pre_norm.": "vision_model.pre_layrnorm.",  # misspelt in every published file
    "vision.post_norm.": "vision_model.post_layernorm.",
    "text.blocks.": "text_model.encoder.layers.",
    "text.token_embedding.": "text_model.embeddings.token_embedding.",
    "text.position_embedding": "text_model.embeddings.position_embedding.weight",
    "text.final_norm.": "text_model.final_layer_norm.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".out.": ".self_attn.out_proj.",
    ".fc1.": ".mlp.fc1.",
    ".fc2.": ".mlp.fc2.",
}

_OPEN_CLIP = {
    "vision.blocks.": "visual.transformer.resblocks.",
    "vision.class_embedding": "visual.class_embedding",
    "vision.patch_embedding.": "visual.conv1.",
    "vision.position_embedding": "visual.positional_embedding",
    "vision.pre_norm.": "visual.ln_pre.",
    "vision.post_norm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
    "text.blocks.": "transformer.resblocks.",
    "text.token_embedding.": "token_embedding.",
    "text.position_embedding": "positional_embedding",
    "text.final_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".qkv.": ".attn.in_proj_",
    ".out.": ".attn.out_proj.",
    ".fc1.": ".mlp.c_fc.",
    ".fc2.": ".mlp.c_proj.",
}

NEW_TENSORS = ("vision.added_embedding", "vision.time_embedding")  # absent from a plain image CLIP


def published_names(name: str) -> tuple[str, ...]:
    """Translate one name of ours to the published layout; three for a fused query-key-value tensor."""
    renamed = _rename(name, _PUBLISHED)
    if ".qkv." not in name:
        return (renamed,)
    return tuple(renamed.replace(".qkv.", f".self_attn.{part}_proj.") for part in "qkv")


def to_published(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Rename tensors (or gradients) from our names to the published ones; released files have prefix `clipmodel.`."""
    published: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        theirs = published_names(name)
        parts = tensor.chunk(3) if len(theirs) == 3 else (tensor,)
        if name == "vision.time_embedding":
            parts = (tensor.unsqueeze(0),)
        published.update((prefix + key, part.contiguous()) for key, part in zip(theirs, parts, strict=True))
    return published


def from_published(names: list[str], published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collect the tensors in `names` whose published parts all exist, by our names."""
    ours: dict[str, Tensor] = {}
    for name in names:
        parts = [published[key] for key in published_names(name) if key in published]
        if len(parts) == len(published_names(name)):
            tensor = torch.cat(parts) if len(parts) == 3 else parts[0]
            ours[name] = tensor.squeeze(0) if name == "vision.time_embedding" else tensor
    return ours


def open_clip_name(name: str) -> str | None:
    """Translate one name of ours to open_clip's layout; None for a tensor that CLIP does not have."""
    return None if name in NEW_TENSORS else _rename(name, _OPEN_CLIP)


def from_open_clip(names: list[str], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collect the tensors in `names` that open_clip's state dict holds, by our names; transpose its projections."""
    ours = {name: theirs[key] for name in names if (key := open_clip_name(name)) in theirs}
    return {name: tensor.t() if name.endswith("_projection.weight") else tensor for name, tensor in ours.items()}


def _rename(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name
