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
        """Load the model that training starts from, float32 on the CPU; `seed` draws what `settings.init` lacks."""
        ...

    def read(self, weights: "Path", settings: Any, seed: int) -> "VideoTextModel":
        """Load weights that the method itself has written: a folder or a .safetensors file."""
        ...

    def file_header(self, model: "VideoTextModel") -> dict[str, Any]:
        """Describe the model as JSON data, for the files that its weights are written to."""
        ...

    def file_tensors(self, model: "VideoTextModel", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Name the tensors of a state of `model`, whole and on the CPU, as they are to be written."""
        ...

    def config_of(self, settings: Any) -> "ModelConfig":
        """Find the configuration of the CLIP inside `load(settings)` without reading weights."""
        ...

    def skeleton(self, config: "ModelConfig", settings: Any) -> "VideoTextModel":
        """Build the model of `config_of(settings)` without weights: it is called for meta and fake tensors."""
        ...


@dataclass(frozen=True)
class Method:
    """A training method as `model.method` names it.

    name       of its section of settings, model.NAME
    code_in    the module with the functions of `MethodCode`, imported when a model is made
    settings   the class of that section; None: the method has no settings of its own
    check      raises UserError for model settings that the method cannot be made from
    takes_frames_per_s  tells from the model settings whether `data.frames_per_s` may be set: then the model leaves out
               frames that a video does not have (`VideoTextModel.takes_frame_mask`)
    """

    name: str
    code_in: str
    settings: type[Settings] | None = None
    check: Callable[[Any], None] = lambda settings: None
    takes_frames_per_s: Callable[[Any], bool] = lambda settings: False

    @cached_property
    def code(self) -> MethodCode:
        return importlib.import_module(self.code_in)
