"""Read and write model weights: published CLIP-ViP files, HF CLIP folders, open_clip names, tags and files.

Every tensor of the resulting `ClipVip` is read from the source, except the two that a plain image CLIP lacks
(`model.new_tensors`); other missing or unexpected tensors are an error. Files that we write have published names and
their configuration, in the safetensors header and as JSON beside it. Pickles are read without running code.
"""

import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipmill.base.atomic_file import atomic_path, write_text
from clipmill.base.errors import UserError
from training.models.clip_vip.config_formats import config_from_dict, config_from_open_clip, config_from_shapes
from training.models.clip_vip.model import MAX_LOG_SCALE, ClipVip, ModelConfig, initialise_tensor
from training.models.clip_vip.weight_names import (
    NEW_TENSORS,
    from_open_clip,
    from_published,
    open_clip_name,
    published_names,
)

OPENAI_NAMES = {
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}
# Exceptions of `torch.load` for a file that is not a pickle, or holds other objects than tensors.
_PICKLE_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError)
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def load_clip_vip(
    weights: str | Path, config: str | Path | Mapping[str, Any] | ModelConfig | None = None, *, seed: int = 0
) -> ClipVip:
    """Load a model from one .safetensors or .pt file in published names, with or without the `clipmodel.` prefix.

    config  a JSON path or dict: HF's CLIP configuration, alone or as `reference_config`, and its
            `vision_additional_config`. None: the file's own header, a JSON of the same name, or inferred from shapes.
    seed    draws the added tokens of a plain CLIP, which becomes a CLIP-ViP.
    """
    weights = Path(weights)
    tensors = read_tensors(weights)
    return assemble(_resolve_config(weights, config, tensors), "published", tensors, seed, source=str(weights))


def load_model(
    source: str | Path,
    *,
    num_added: int | None = None,
    num_times: int | None = None,
    pooling: str | None = None,
    seed: int = 0,
) -> ClipVip:
    """Load a model from a value of `model.init`.

    source  a folder (ours, or HF's CLIP layout) · a file as for `load_clip_vip` · `open_clip:NAME/TAG` or
            `open_clip:NAME/PATH` · `open_clip:local-dir:FOLDER` · OpenAI's names such as `ViT-B/32`
    num_added, num_times, pooling  turn a plain CLIP into a CLIP-ViP (default: 3, 12, "proxy"); values that contradict
            a CLIP-ViP's file raise UserError
    """
    shape = {"num_added": num_added, "num_times": num_times, "pooling": pooling}
    shape = {name: value for name, value in shape.items() if value is not None}
    source = str(source)
    if source in OPENAI_NAMES:
        return _load_open_clip(OPENAI_NAMES[source], "openai", shape, seed)
    if source.startswith("open_clip:"):
        name, tag = _split_open_clip(source.removeprefix("open_clip:"))
        return _load_open_clip(name, tag, shape, seed)
    config, tensors = _read_files(source, shape)
    return assemble(config, "published", tensors, seed, source=source)


def model_config(source: str, **shape: Any) -> ModelConfig:
    """Return the configuration of `load_model(source, **shape)` from names, headers and shapes; read no weights.

    The weights of an open_clip tag or file are not checked.
    """
    shape = {name: value for name, value in shape.items() if value is not None}
    if source in OPENAI_NAMES:
        return with_shape(_open_clip_config(OPENAI_NAMES[source]), shape)
    if source.startswith("open_clip:"):
        return with_shape(_open_clip_config(_split_open_clip(source.removeprefix("open_clip:"))[0]), shape)
    return _read_files(source, shape, only_shapes=True)[0]


def _read_files(
    source: str, shape: dict[str, Any], *, only_shapes: bool = False
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a file's or folder's configuration, with the proxies that `shape` adds to a plain CLIP, and its tensors."""
    path = Path(source)
    if not path.exists():
        raise UserError(
            f"model {source!r} is neither a file nor a folder; also allowed: open_clip:NAME/TAG, "
            + ", ".join(OPENAI_NAMES)
        )
    if not path.is_dir():
        tensors = read_tensors(path, only_shapes=only_shapes)
        return _reshaped(_resolve_config(path, None, tensors), tensors, shape, source), tensors
    weights = next((path / name for name in _WEIGHT_FILES if (path / name).is_file()), None)
    if weights is None:
        raise UserError(f"model folder {source!r} holds none of {', '.join(_WEIGHT_FILES)}")
    tensors = read_tensors(weights, only_shapes=only_shapes)
    return _reshaped(_resolve_config(weights, path / "config.json", tensors), tensors, shape, source), tensors


def from_open_clip_model(
    model: torch.nn.Module, model_cfg: Mapping[str, Any], *, seed: int = 0, **shape: Any
) -> ClipVip:
    """Convert an open_clip model in memory, with its `get_model_config` dict."""
    tensors = {key.removeprefix("text."): tensor for key, tensor in model.state_dict().items()}
    config = config_from_open_clip(model, model_cfg)
    return assemble(with_shape(config, shape), "open_clip", tensors, seed, source="the open_clip model")


def write_model(tensors: dict[str, Tensor], config: Mapping[str, Any], path: str | Path) -> Path:
    """Write PATH.safetensors and PATH.json, or model.safetensors and config.json in a folder; return the weights' path.

    Each file is renamed into place, whole or not at all, and the weights' header repeats the configuration, so that a
    kill between the two leaves the weights readable. A folder of a plain CLIP opens in `transformers.CLIPModel`.
    """
    path = Path(path)
    is_file = path.suffix == ".safetensors"
    weights = path if is_file else path / "model.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=1, sort_keys=True)
    with atomic_path(weights, fsync=True) as temporary:
        _write_weights(tensors, text, temporary)
    write_text(path.with_suffix(".json") if is_file else path / "config.json", text, fsync=True)
    return weights


def read_tensors(path: Path, *, only_shapes: bool = False) -> dict[str, Tensor]:
    """Read the flat state dict of a file, in published names without prefixes or `position_ids` buffers.

    only_shapes  return tensors without values, from the file's header
    """
    if path.name.endswith(".index.json"):
        files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        if odd := [file for file in files if Path(file).name != file]:
            raise UserError(f"weights {str(path)!r}: {odd[0]!r} is not in the same folder; list names without a path")
        parts = (read_tensors(path.parent / file, only_shapes=only_shapes) for file in files)
        return {key: tensor for part in parts for key, tensor in part.items()}
    if not path.is_file():
        raise UserError(f"weights {str(path)!r}: no such file")
    if path.suffix == ".safetensors":
        try:
            if only_shapes:
                with safe_open(path, "pt") as file:
                    shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
                state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
            else:
                state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"weights {str(path)!r} cannot be read as a safetensors file: {error}") from error
    else:
        state = _unpickle(path, "meta" if only_shapes else "cpu")
    state = {key.removeprefix("module.").removeprefix("clipmodel."): tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in state.items() if not key.endswith("position_ids")}


def read_header(weights: Path) -> dict[str, Any] | None:
    """Read the configuration in the header of a .safetensors file; None if it has none."""
    if weights.suffix != ".safetensors":
        return None
    with safe_open(weights, "pt") as file:
        text = (file.metadata() or {}).get("config")
    return json.loads(text) if text else None


def _unpickle(path: Path, device: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except _PICKLE_ERRORS as error:
        raise UserError(f"weights {str(path)!r} cannot be read as plain tensors: {str(error)[:500]}") from error
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"weights {str(path)!r} are not a flat dict of tensors; save the state dict alone")
    return state


def _resolve_config(
    weights: Path, config: str | Path | Mapping[str, Any] | ModelConfig | None, tensors: dict[str, Tensor]
) -> ModelConfig:
    if isinstance(config, ModelConfig):
        return config
    if isinstance(config, Mapping):
        return config_from_dict(config)
    if config is not None:
        if not Path(config).is_file():
            raise UserError(f"config {str(config)!r}: no such file; give the path of an HF config.json")
        return config_from_dict(json.loads(Path(config).read_text()))
    if embedded := read_header(weights):
        return config_from_dict(embedded)
    beside = weights.with_name(weights.stem.removesuffix(".weights") + ".json")
    return config_from_dict(json.loads(beside.read_text())) if beside.is_file() else config_from_shapes(tensors)


def _reshaped(config: ModelConfig, tensors: dict[str, Tensor], shape: dict[str, Any], source: str) -> ModelConfig:
    """Add the proxies of `shape` to a plain CLIP's configuration; check it against a CLIP-ViP's."""
    if not any(key in tensors for name in NEW_TENSORS for key in published_names(name)):
        return with_shape(config, shape)
    for name, value in shape.items():
        if getattr(config, name) != value:
            raise UserError(
                f"model.{name} is {value!r}, but {source} is a CLIP-ViP with {getattr(config, name)!r}: "
                "remove the setting or use a plain CLIP"
            )
    return config


def with_shape(config: ModelConfig, shape: Mapping[str, Any]) -> ModelConfig:
    """Apply the given sizes to a plain CLIP's configuration; pooling "mean" removes the proxies."""
    if shape.get("pooling") == "mean":
        shape = {"num_added": 0, "num_times": 0} | shape
    return replace(config, **shape)


def assemble(config: ModelConfig, layout: str, theirs: dict[str, Tensor], seed: int, source: str) -> ClipVip:
    """Build a model from the tensors of a file in `layout`, "published" or "open_clip"; `source` is for messages.

    Raises UserError if a tensor is missing, unexpected or of another shape; see the module's text for the exceptions.
    """
    with torch.device("meta"):
        model = ClipVip(config)
    names = list(model.state_dict())
    if layout == "published":
        expected = {key for name in names for key in published_names(name)}
        ours = from_published(names, theirs)
    else:
        expected = {key for name in names if (key := open_clip_name(name))} | {"attn_mask"}
        ours = from_open_clip(names, theirs)
    missing = [name for name in names if name not in ours]
    new = tuple(name for name in NEW_TENSORS if name in names)
    if missing and tuple(sorted(missing)) != tuple(sorted(new)):
        allowed = f"only {' and '.join(new)} may be missing, all of them" if new else "no tensor may be missing"
        raise UserError(f"{source} lacks {_listed(missing)}; {allowed}")
    if unexpected := sorted(set(theirs) - expected):
        raise UserError(f"{source} holds tensors that this model does not have: {_listed(unexpected)}")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in ours.items():
        if tensor.shape != shapes[name] and not (name == "logit_scale" and tensor.numel() == 1):
            raise UserError(f"{source}: {name} is {list(tensor.shape)}, the configuration says {list(shapes[name])}")
    for name in missing:
        ours[name] = torch.empty(shapes[name])
        initialise_tensor(config, name, ours[name], torch.Generator().manual_seed(seed))
    ours["logit_scale"] = ours["logit_scale"].reshape(()).clamp(0, MAX_LOG_SCALE)
    # half-precision files are widened because weights train in float32; float64 files stay float64
    dtype = torch.promote_types(ours["logit_scale"].dtype, torch.float32)
    model.load_state_dict({name: tensor.to(dtype).contiguous().clone() for name, tensor in ours.items()}, assign=True)
    model.new_tensors = tuple(missing)
    return model.requires_grad_(True).train()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _split_open_clip(text: str) -> tuple[str, str | None]:
    if text.startswith(("local-dir:", "hf-hub:")):
        return text, None
    name, _, tag = text.partition("/")
    if not tag:
        raise UserError(
            f"model open_clip:{text} has no weights in its name: write open_clip:NAME/TAG or open_clip:NAME/PATH, "
            "such as open_clip:ViT-B-32/openai"
        )
    return name, tag


def _model_cfg(name: str) -> dict[str, Any]:
    import open_clip

    model_cfg = open_clip.get_model_config(name)
    if model_cfg is None:
        raise UserError(f"open_clip has no model {name!r}; `open_clip.list_models()` lists its models")
    return model_cfg


def _open_clip_config(name: str) -> ModelConfig:
    """Build a named model without weights and return its configuration."""
    import open_clip

    model_cfg = _model_cfg(name)
    logging.disable(logging.WARNING)  # open_clip warns about a model without weights
    try:
        return config_from_open_clip(open_clip.create_model(name, device="meta"), model_cfg)
    finally:
        logging.disable(logging.NOTSET)


def _load_open_clip(name: str, tag: str | None, shape: dict[str, Any], seed: int) -> ClipVip:
    import open_clip

    model_cfg = _model_cfg(name)
    if tag and Path(tag).is_file():
        read_tensors(Path(tag), only_shapes=True)  # refuses unsafe pickles, which open_clip would load unchecked
    try:
        model = open_clip.create_model(name, pretrained=tag, precision="fp32", require_pretrained=True)
    except (RuntimeError, OSError) as error:
        raise UserError(f"open_clip cannot load {name!r} with weights {tag!r}: {error}") from error
    return from_open_clip_model(model, model_cfg, seed=seed, **shape)


def _write_weights(tensors: dict[str, Tensor], config: str, file: Path) -> None:
    """Write a .safetensors file with sorted metadata, so that the same model gives the same bytes.

    safetensors writes its metadata in random order.
    """
    file.touch()
    mode = file.stat().st_mode  # safetensors would make the file unreadable to others
    save_file(tensors, file, metadata={"format": "pt", "config": config})
    file.chmod(mode)
    with open(file, "r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, "the header's length must not change"
        handle.seek(8)
        handle.write(text)
