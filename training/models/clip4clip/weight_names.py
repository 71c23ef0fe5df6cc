"""Names and layouts of `Clip4Clip`'s tensors in released files (docs/methods/clip4clip.md section 10)."""

from collections.abc import Mapping

from torch import Tensor

from clipmill.base.errors import UserError
from training.models.clip_vip.model import ModelConfig, TowerConfig
from training.models.clip_vip.weight_names import open_clip_name

_HEADS = {
    "meanP": {},
    "seqLSTM": {"position_embedding": "frame_position_embeddings.weight", "lstm.": "lstm_visual."},
    "seqTransf": {"position_embedding": "frame_position_embeddings.weight", "blocks.": "transformerClip.resblocks."},
    "tightTransf": {
        "position_embedding": "cross.embeddings.position_embeddings.weight",
        "blocks.": "cross.transformer.resblocks.",
        "pool_norm.": "cross.pooler.ln_pool.",
        "pool_dense.": "cross.pooler.dense.",
        "score.": "similarity_dense.",
    },
}
_BLOCK = {
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".qkv.": ".attn.in_proj_",
    ".out.": ".attn.out_proj.",
    ".fc1.": ".mlp.c_fc.",
    ".fc2.": ".mlp.c_proj.",
}
STEM_3D = "clip.visual.conv2.weight"
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI's files hold as tensors


def released_name(name: str, head: str, stem: str) -> str:
    """Translate one name of ours to that in the released files."""
    if name.startswith("head."):
        for ours, theirs in (_HEADS[head] | _BLOCK).items():
            name = name.removeprefix("head.").replace(ours, theirs)
        return name
    if name == "flat_stem":
        return "clip.visual.conv1.weight"
    if stem == "3d" and name == "clip.vision.patch_embedding.weight":
        return STEM_3D
    theirs = open_clip_name(name.removeprefix("clip."))
    assert theirs is not None, f"released files have no tensor for {name}"
    return "clip." + theirs


def to_released(tensors: Mapping[str, Tensor], head: str, stem: str) -> dict[str, Tensor]:
    """Rename tensors (or gradients) from our names to the released ones."""
    released = {}
    for name, tensor in tensors.items():
        key = released_name(name, head, stem)
        if key == STEM_3D:
            tensor = tensor.unflatten(1, (3, 3)).transpose(1, 2)
        elif name.endswith("_projection.weight"):
            tensor = tensor.t()
        released[key] = tensor.contiguous()
    return released


def stem_of(released_DCTPP: Tensor) -> Tensor:
    """Reshape the released 3-D patch weight to [D, 9, P, P], for the concatenated channels of three frames."""
    return released_DCTPP.transpose(1, 2).flatten(1, 2)


def tidy(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a file's tensors to one form: prefix `clip.` for CLIP's tensors, today's names of norms, weights only."""
    tidied = {}
    for key, tensor in theirs.items():
        key = key.removesuffix(".gamma") + ".weight" if key.endswith(".gamma") else key
        key = key.removesuffix(".beta") + ".bias" if key.endswith(".beta") else key
        if key.removeprefix("clip.") not in _NOT_WEIGHTS:
            tidied[key if head_of(key) or key.startswith("clip.") else f"clip.{key}"] = tensor
    return tidied


def head_of(key: str) -> str | None:
    """Name the first head that has this tensor, or None; seqLSTM and seqTransf share the frame positions."""
    return next((head for head, names in _HEADS.items() if key.startswith(tuple(names.values()))), None)


def config_from_names(theirs: Mapping[str, Tensor]) -> ModelConfig:
    """Infer a CLIP's configuration from tidied tensors, with OpenAI's conventions: heads of 64, quick-GELU."""
    try:
        patch = theirs["clip.visual.conv1.weight"].shape[-1]
        return ModelConfig(
            vision=_tower(theirs, "clip.visual."),
            text=_tower(theirs, "clip."),
            embed_dim=theirs["clip.text_projection"].shape[1],
            image_size=round((len(theirs["clip.visual.positional_embedding"]) - 1) ** 0.5) * patch,
            patch_size=patch,
            vocab_size=len(theirs["clip.token_embedding.weight"]),
            context_length=len(theirs["clip.positional_embedding"]),
            pooling="mean",
            num_added=0,
            num_times=0,
        )
    except KeyError as error:
        raise UserError(
            f"the weights have no configuration, and the tensor {error.args[0]} to infer it from is missing"
        ) from error


def num_layers(keys: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)})


def num_head_layers(keys: Mapping[str, Tensor], head: str) -> int:
    """Count the blocks of a head among tidied tensors."""
    prefix = _HEADS[head].get("blocks.")
    return num_layers(keys, prefix) if prefix else 0


def _tower(theirs: Mapping[str, Tensor], prefix: str) -> TowerConfig:
    prefix = f"{prefix}transformer.resblocks."
    mlp_width, width = theirs[f"{prefix}0.mlp.c_fc.weight"].shape
    layers = num_layers(theirs, prefix)
    return TowerConfig(width=width, num_layers=layers, num_heads=max(1, width // 64), mlp_width=mlp_width)
