"""Training methods by the names of `model.method`, the settings of a model, and the models that they make.

A method is a folder here and a line in `METHODS`, or MODULE:ATTRIBUTE of any module that has a `Method`. Settings
import this file, so it imports nothing heavy; a method's code is imported when a model is made.
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
    """Import the method that `model.method` names. Raises UserError where the name stands for something else."""
    method = load_attribute("model.method", name, METHODS.get(name))
    if not isinstance(method, Method):
        raise UserError(
            f"setting model.method = {name}: it is a {type(method).__name__}, not a training.models.method.Method."
        )
    return method


# --- Settings


class ModelSettings(Settings):
    """What a run starts from."""

    # A folder or file of weights, "open_clip:NAME/TAG", one of OpenAI's names ("ViT-B/32"), or "demo": the small CLIP
    # that ships with clipmill.
    init: str = "open_clip:ViT-B-32-quickgelu/openai"
    # A checkpoint of this very method to begin with; `init` then says what it was built on. None: begin with `init`.
    weights: str | None = None
    # Proxy tokens besides CLIP's class token, rows of the temporal table, and how frames become a video; None: as the
    # file has them, else 3, 12 and "proxy". Of clip_vip, and of the backbone of unipt.
    num_added: int | None = Field(None, ge=0)
    num_times: int | None = Field(None, ge=0)
    pooling: Literal["proxy", "mean"] | None = None

    # Which model is trained. Below it every method has its own section, model.METHOD, which is for it alone.
    method: Literal[tuple(METHODS)] | Annotated[str, Field(pattern=PLUGIN)] = "clip_vip"

    @model_validator(mode="wrap")
    @classmethod
    def _with_section_of_plugin(cls, data: Any, validate: Callable[[Any], "ModelSettings"]) -> "ModelSettings":
        """Read the section of a method from outside, which `ModelSettings` cannot have as a field."""
        name = data.get("method") if isinstance(data, dict) else None
        if not isinstance(name, str) or ":" not in name:
            return validate(data)
        method = load_method(name)
        if method.settings is None or method.name in cls.model_fields:
            return validate(data)
        return _with_sections(cls, method).model_validate(data)


@cache  # the same settings are of the same class
def _with_sections(base: type[ModelSettings], *methods: Method) -> type[ModelSettings]:
    sections = {method.name: (method.settings, method.settings()) for method in methods if method.settings}
    return create_model("ModelSettings", __base__=base, __doc__=base.__doc__, __module__=__name__, **sections)


ModelSettings = _with_sections(ModelSettings, *map(load_method, METHODS))


def check_settings(settings: ModelSettings) -> Method:
    """Return the method of the settings. Raises UserError for settings that are of another method."""
    method = load_method(settings.method)
    for other in map(load_method, METHODS):
        section = getattr(settings, other.name, None)
        if other is not method and section is not None and section != other.settings():
            raise UserError(f"model.{other.name} is for model.method = {other.name!r}; here it is {settings.method!r}")
    method.check(settings)
    return method


# --- Models


def load(settings: ModelSettings, seed: int = 0) -> "VideoTextModel":
    """Load the model that a run starts from, float32 on the CPU.

    seed  draws what the method adds and `settings.init` lacks. Raises UserError
    """
    method = check_settings(settings)
    if settings.weights is not None:
        return method.code.read(Path(settings.weights), settings, seed)
    return method.code.load(settings, seed)


def read(weights: Path, settings: ModelSettings, seed: int = 0) -> "VideoTextModel":
    """Load the weights of a checkpoint, as its run's settings say what they are of. Raises UserError."""
    return load_method(settings.method).code.read(weights, settings, seed)


def writer(model: "VideoTextModel") -> "Callable[[State, Path], Path]":
    """Return a function that writes a state of the model, whole and on the CPU, to a folder or .safetensors file."""
    from training.models.clip_vip.weights import write_model

    code = load_method(model.method).code
    header = code.file_header(model)
    return lambda tensors, path: write_model(code.file_tensors(model, tensors), header, path)


def config_of(settings: ModelSettings) -> "ModelConfig":
    """Find the configuration of the CLIP inside `load(settings)`, weights unread. Raises UserError."""
    return check_settings(settings).code.config_of(settings)


def skeleton(config: "ModelConfig", settings: ModelSettings) -> "VideoTextModel":
    """Build the model of `load(settings)` from `config_of(settings)`, without weights: on meta or fake tensors."""
    return load_method(settings.method).code.skeleton(config, settings)
