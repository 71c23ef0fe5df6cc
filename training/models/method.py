"""Describe a training method to the registry without importing its model. Nothing heavy is imported here."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from clipmill.base.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from training.models.clip_vip.model import ModelConfig
    from training.models.model import VideoTextModel


class MethodCode(Protocol):
    """The functions of a method's module. `settings` are `training.models.registry.ModelSettings`."""

    def load(self, settings: Any, seed: int) -> "VideoTextModel":
        """Load the initial model, float32 on the CPU; `seed` draws the tensors that `settings.init` lacks."""
        ...

    def read(self, weights: "Path", settings: Any, seed: int) -> "VideoTextModel":
        """Load weights that this method has written: a folder or a .safetensors file."""
        ...

    def file_header(self, model: "VideoTextModel") -> dict[str, Any]:
        """Describe the model as JSON data for the header of its weight files."""
        ...

    def file_tensors(self, model: "VideoTextModel", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Rename the tensors of a state of `model`, whole and on the CPU, to the names in its weight files."""
        ...

    def config_of(self, settings: Any) -> "ModelConfig":
        """Return the configuration of the CLIP inside `load(settings)` without reading weights."""
        ...

    def skeleton(self, config: "ModelConfig", settings: Any) -> "VideoTextModel":
        """Build the model of `config_of(settings)` without weights, for meta and fake tensors."""
        ...


@dataclass(frozen=True)
class Method:
    """A training method, by its value of `model.method`.

    name       its section of settings is model.NAME
    code_in    module with the functions of `MethodCode`, imported when a model is built
    settings   class of that section; None: the method has no settings of its own
    check      raises UserError for model settings that the method cannot use
    takes_frames_per_s  returns True for model settings with which `data.frames_per_s` may be set, because the model
               ignores padding frames (`VideoTextModel.takes_frame_mask`)
    """

    name: str
    code_in: str
    settings: type[Settings] | None = None
    check: Callable[[Any], None] = lambda settings: None
    takes_frames_per_s: Callable[[Any], bool] = lambda settings: False

    @cached_property
    def code(self) -> MethodCode:
        return importlib.import_module(self.code_in)
