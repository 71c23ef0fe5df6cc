"""Training methods by the values of `model.method`, the settings of a model, and building models from them.

A method is a folder here and a line in `METHODS`, or MODULE:ATTRIBUTE of any module that has a `Method`. Settings
import this file, so it imports nothing heavy; a method's code is imported when a model is built.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from clipmill.base.errors import UserError
from clipmill.base.plugins import PLUGIN, load_attribute
from clipmill.base.settings import Settings
from training.models.method import Method

if TYPE_CHECKING:
    from training.models.clip_vip.model import ModelConfig
    from training.models.model import VideoTextModel
    from training.parallel.state_dict import State

METHODS = {
    "clip_vip": "training.models.clip_vip:METHOD",
    "clip4clip": "training.models.clip4clip:METHOD",
    "unipt": "training.models.unipt:METHOD",
}


@cache
def load_method(name: str) -> Method:
    """Import the method that `model.method` names. Raises UserError if the object is not a `Method`."""
    method = load_attribute("model.method", name, METHODS.get(name))
    if not isinstance(method, Method):
        raise UserError(
            f"setting model.method = {name}: it is a {type(method).__name__}, not a training.models.method.Method."
        )
    return method


# --- Settings


class ModelSettings(Settings):
    """The initial model of a run."""

    # Initial weights: a folder or file, "open_clip:NAME/TAG", one of OpenAI's names ("ViT-B/32"), or "demo", the small
    # CLIP that ships with clipmill.
    init: str = "open_clip:ViT-B-32-quickgelu/openai"
    # Checkpoint of the same method to start from; `init` then names the CLIP it was built on. None: start from `init`.
    weights: str | None = None
    # Proxy tokens besides CLIP's class token, for clip_vip and the backbone of unipt. None: as in the file, else 3.
    num_added: int | None = Field(None, ge=0)
    # Rows of the temporal table, for clip_vip and the backbone of unipt. None: as in the file, else 12.
    num_times: int | None = Field(None, ge=0)
    # How frames become one vector, for clip_vip and the backbone of unipt: by proxy tokens, or as the mean of frames
    # through plain CLIP. None: as in the file, else "proxy".
    pooling: Literal["proxy", "mean"] | None = None

    # Training method: clip_vip, clip4clip, unipt, or MODULE:ATTRIBUTE, your own `training.models.method.Method`. Each
    # method has its own section of settings, model.METHOD, which other methods do not use.
    method: Literal[tuple(METHODS)] | Annotated[str, Field(pattern=PLUGIN)] = "clip_vip"

    @model_validator(mode="wrap")
    @classmethod
    def _with_section_of_plugin(cls, data: Any, validate: Callable[[Any], "ModelSettings"]) -> "ModelSettings":
        """Add the section of a plug-in method, which `ModelSettings` does not have as a field."""
        name = data.get("method") if isinstance(data, dict) else None
        if not isinstance(name, str) or ":" not in name:
            return validate(data)
        method = load_method(name)
        if method.settings is None or method.name in cls.model_fields:
            return validate(data)
        return _with_sections(cls, method).model_validate(data)


@cache  # so that equal settings have the same class
def _with_sections(base: type[ModelSettings], *methods: Method) -> type[ModelSettings]:
    sections = {method.name: (method.settings, method.settings()) for method in methods if method.settings}
    return create_model("ModelSettings", __base__=base, __doc__=base.__doc__, __module__=__name__, **sections)


ModelSettings = _with_sections(ModelSettings, *map(load_method, METHODS))


def check_settings(settings: ModelSettings) -> Method:
    """Return the method of the settings. Raises UserError if settings of another method are set."""
    method = load_method(settings.method)
    for other in map(load_method, METHODS):
        section = getattr(settings, other.name, None)
        if other is not method and section is not None and section != other.settings():
            raise UserError(f"model.{other.name} is for model.method = {other.name!r}; here it is {settings.method!r}")
    method.check(settings)
    return method


# --- Models


def load(settings: ModelSettings, seed: int = 0) -> "VideoTextModel":
    """Load the initial model of a run, float32 on the CPU. Raises UserError.

    seed  draws the tensors that the method adds and `settings.init` lacks
    """
    method = check_settings(settings)
    if settings.weights is not None:
        return method.code.read(Path(settings.weights), settings, seed)
    return method.code.load(settings, seed)


def read(weights: Path, settings: ModelSettings, seed: int = 0) -> "VideoTextModel":
    """Load the weights of a checkpoint with its run's settings. Raises UserError."""
    return load_method(settings.method).code.read(weights, settings, seed)


def writer(model: "VideoTextModel") -> "Callable[[State, Path], Path]":
    """Return a function that writes a state of this model, whole and on the CPU, to a folder or .safetensors file."""
    from training.models.clip_vip.weights import write_model

    code = load_method(model.method).code
    header = code.file_header(model)
    return lambda tensors, path: write_model(code.file_tensors(model, tensors), header, path)


def config_of(settings: ModelSettings) -> "ModelConfig":
    """Return the configuration of the CLIP inside `load(settings)`; read no weights. Raises UserError."""
    return check_settings(settings).code.config_of(settings)


def skeleton(config: "ModelConfig", settings: ModelSettings) -> "VideoTextModel":
    """Build the model of `load(settings)` from `config_of(settings)` without weights, for meta and fake tensors."""
    return load_method(settings.method).code.skeleton(config, settings)
