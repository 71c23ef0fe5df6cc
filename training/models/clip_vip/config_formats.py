"""Convert configurations (HF/CLIP-ViP JSON, open_clip dicts, shapes of tensors) to `ModelConfig`, and back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from clipmill.base.errors import UserError
from training.models.clip_vip.model import ModelConfig, TowerConfig

# Defaults of HF, which writes only the values that differ from them.
_HF_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_HF_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_VIP = {"type": "ViP", "temporal_size": 12, "if_use_temporal_embed": 1, "add_cls_num": 3, "logit_scale_init_value": 4.6}

# open_clip settings that we implement or can ignore; every other one must be off or at its default.
_OPEN_CLIP_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs"}
_OPEN_CLIP_VISION |= {"patch_dropout", "output_tokens"}
_OPEN_CLIP_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"}
_OPEN_CLIP_TEXT |= {"hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "pad_id", "eos_id", "output_tokens"}
_OPEN_CLIP_TOP = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}
_OPEN_CLIP_DEFAULTS = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}


def config_from_dict(data: Mapping[str, Any]) -> ModelConfig:
    """Read HF's CLIP configuration (alone or as `reference_config`) and `vision_additional_config`; all is optional."""
    clip = data.get("reference_config") or data.get("clip_config") or data
    if not isinstance(clip, Mapping) or not ("vision_config" in clip or "text_config" in clip):
        raise UserError("config has neither vision_config nor text_config; give an HF CLIP config.json")
    vision = _HF_VISION | dict(clip.get("vision_config") or {}) | dict(clip.get("vision_config_dict") or {})
    text = _HF_TEXT | dict(clip.get("text_config") or {}) | dict(clip.get("text_config_dict") or {})
    vip = _VIP | dict(data.get("vision_additional_config") or data.get("clip_vision_additional_config") or {})
    proxies = vip["type"] == "ViP"
    pixels = {key: tuple(data[key]) for key in ("image_mean", "image_std") if key in data}
    return ModelConfig(
        vision=_hf_tower(vision),
        text=_hf_tower(text),
        embed_dim=clip.get("projection_dim", 512),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vocab_size=text["vocab_size"],
        context_length=text["max_position_embeddings"],
        pooling="proxy" if proxies else "mean",
        num_added=vip["add_cls_num"] if proxies else 0,
        num_times=vip["temporal_size"] if proxies and vip["if_use_temporal_embed"] else 0,
        log_scale_init=vip["logit_scale_init_value"],
        words=tuple(data["words"]) if data.get("words") else None,
        **pixels,
    )


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Return the JSON beside weights in published names, which `config_from_dict` reads.

    Only a plain CLIP has HF's `model_type`: HF's `CLIPModel` would drop proxies and times and compute something else.
    By another type `AutoModel` refuses the folder, and `CLIPModel` warns.
    """
    is_plain = not (config.num_added or config.num_times)
    vision = _to_hf(config.vision) | {"image_size": config.image_size, "patch_size": config.patch_size}
    text = _to_hf(config.text) | {"vocab_size": config.vocab_size, "max_position_embeddings": config.context_length}
    # HF pools at eos_token_id; CLIP's start and end tokens are the two largest ids
    text |= {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1}
    vision_type = "clip_vision_model" if is_plain else "clip_vip_vision_model"
    return {
        "model_type": "clip" if is_plain else "clip_vip",
        "architectures": ["CLIPModel" if is_plain else "ClipVip"],
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.log_scale_init,
        "vision_config": vision | {"projection_dim": config.embed_dim, "model_type": vision_type},
        "text_config": text | {"projection_dim": config.embed_dim, "model_type": "clip_text_model"},
        "vision_additional_config": {
            "type": "ViP" if config.pooling == "proxy" else "mean",
            "temporal_size": config.num_times or 12,
            "if_use_temporal_embed": int(config.num_times > 0),
            "add_cls_num": config.num_added,
            "logit_scale_init_value": config.log_scale_init,
        },
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        **({"words": list(config.words)} if config.words else {}),
    }


def config_from_shapes(tensors: Mapping[str, Tensor]) -> ModelConfig:
    """Infer the configuration from the shapes of tensors in published names: heads of 64, quick-GELU as OpenAI's.

    A file with neither added tokens nor a temporal table is a plain CLIP and gets the default proxies.
    """
    try:
        patch = tensors["vision_model.embeddings.patch_embedding.weight"]
        vision_positions = tensors["vision_model.embeddings.position_embedding.weight"]
        vocab = tensors["text_model.embeddings.token_embedding.weight"]
        text_positions = tensors["text_model.embeddings.position_embedding.weight"]
        embed_dim = len(tensors["visual_projection.weight"])
    except KeyError as error:
        raise UserError(
            f"the weights have no configuration, and the tensor {error.args[0]} to infer it from is missing"
        ) from error
    added = tensors.get("vision_model.embeddings.added_cls")
    times = tensors.get("vision_model.embeddings.temporal_embedding")
    plain = added is None and times is None
    return ModelConfig(
        vision=_tower_from_shapes(tensors, "vision_model"),
        text=_tower_from_shapes(tensors, "text_model"),
        embed_dim=embed_dim,
        image_size=round((len(vision_positions) - 1) ** 0.5) * patch.shape[-1],
        patch_size=patch.shape[-1],
        vocab_size=len(vocab),
        context_length=len(text_positions),
        num_added=3 if plain else 0 if added is None else len(added),
        num_times=12 if plain else 0 if times is None else times.shape[1],
    )


def config_from_open_clip(model: nn.Module, model_cfg: Mapping[str, Any]) -> ModelConfig:
    """Read the configuration of a built open_clip ViT CLIP. Raises UserError for features that our towers lack.

    The activation is that of the built model, because a pretrained tag can override the name's configuration.
    """
    vision, text = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"])
    _refuse_unsupported("", dict(model_cfg), _OPEN_CLIP_TOP)
    _refuse_unsupported("vision_cfg.", vision, _OPEN_CLIP_VISION)
    _refuse_unsupported("text_cfg.", text, _OPEN_CLIP_TEXT)
    if not isinstance(vision["layers"], int):
        raise UserError("open_clip: vision_cfg.layers is a list, so this is a ResNet; choose a vision transformer")
    pixels = getattr(model.visual, "preprocess_cfg", None) or {}
    size = vision.get("image_size", 224)
    text.setdefault("heads", 8)
    return ModelConfig(
        vision=_open_clip_tower(vision | {"heads": vision["width"] // vision.get("head_width", 64)}, model.visual),
        text=_open_clip_tower(text, getattr(model, "text", model)),
        embed_dim=model_cfg["embed_dim"],
        image_size=size if isinstance(size, int) else size[0],
        patch_size=vision["patch_size"],
        vocab_size=text.get("vocab_size", 49408),
        context_length=text.get("context_length", 77),
        **{f"image_{key}": tuple(pixels[key]) for key in ("mean", "std") if key in pixels},
    )


def _refuse_unsupported(where: str, settings: dict[str, Any], known: set[str]) -> None:
    for key, value in settings.items():
        if key not in known and value and value not in _OPEN_CLIP_DEFAULTS.get(key, ()):
            raise UserError(f"open_clip: {where}{key} = {value!r} is not supported; allowed: OpenAI's ViT layout")


def _open_clip_tower(settings: dict[str, Any], tower: nn.Module) -> TowerConfig:
    activation = type(tower.transformer.resblocks[0].mlp.gelu).__name__
    return TowerConfig(
        width=settings["width"],
        num_layers=settings["layers"],
        num_heads=settings["heads"],
        mlp_width=int(settings["width"] * settings.get("mlp_ratio", 4.0)),
        activation="quick_gelu" if activation == "QuickGELU" else "gelu",
        norm_eps=(settings.get("norm_kwargs") or {}).get("eps", 1e-5),
    )


def _hf_tower(settings: Mapping[str, Any]) -> TowerConfig:
    return TowerConfig(
        width=settings["hidden_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        mlp_width=settings["intermediate_size"],
        activation=settings["hidden_act"],
        norm_eps=settings["layer_norm_eps"],
    )


def _to_hf(tower: TowerConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.norm_eps,
        "attention_dropout": 0.0,
    }


def _tower_from_shapes(tensors: Mapping[str, Tensor], tower: str) -> TowerConfig:
    prefix = f"{tower}.encoder.layers."
    mlp_width, width = tensors[f"{prefix}0.mlp.fc1.weight"].shape
    layers = {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
    return TowerConfig(width=width, num_layers=len(layers), num_heads=max(1, width // 64), mlp_width=mlp_width)
