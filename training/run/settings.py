"""All settings of a training run: its sections, the checks between them, recipes, `--set section.key=value`.

Nothing heavy is imported here: losses and methods are names, whose code is imported when a run starts.
"""

from importlib import resources
from typing import Any

from pydantic import SerializeAsAny, model_validator

from clipmill.base.settings import Settings, resolve_settings
from training.losses import LOSSES, load_loss, losses_that
from training.models.registry import ModelSettings, load_method
from training.settings import DataSettings, EvalSettings, TrainSettings

RECIPES = resources.files("training").joinpath("recipes")


class RunSettings(Settings):
    model: SerializeAsAny[ModelSettings] = ModelSettings()  # any, to keep the section of a plug-in method
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()

    @model_validator(mode="after")
    def _loss_exists(self) -> "RunSettings":
        if ":" not in self.train.loss and self.train.loss not in LOSSES:
            raise ValueError(f"train.loss = {self.train.loss}: choose {', '.join(LOSSES)}, or MODULE:ATTRIBUTE")
        return self

    @model_validator(mode="after")
    def _pace_fits(self) -> "RunSettings":
        if self.data.frames_per_s is None:
            return self
        if not load_method(self.model.method).takes_frames_per_s(self.model):
            raise ValueError(
                f"data.frames_per_s = {self.data.frames_per_s} pads short clips, which model.method = "
                f"{self.model.method} does not support; allowed: model.method = clip4clip, or unipt with "
                "model.pooling = mean"
            )
        if self.data.jitter:
            raise ValueError("data.frames_per_s fixes the frames that are taken: set data.jitter = false with it")
        return self

    @model_validator(mode="after")
    def _neighbours_fit(self) -> "RunSettings":
        data = self.data
        if not data.neighbours:
            return self
        if not load_loss(self.train.loss).takes_neighbours:
            losses = " or ".join(losses_that("takes_neighbours"))
            raise ValueError(f"data.neighbours = {data.neighbours} is for train.loss = {losses}; allowed here: 0")
        if data.subtitle != "subtitle":
            raise ValueError(f"data.neighbours needs subtitles; allowed with data.subtitle = {data.subtitle}: 0")
        if "video" not in data.apart:
            raise ValueError(
                "data.neighbours: the same text may belong to several clips of a video; add video to data.apart"
            )
        return self


def resolve(base: dict[str, Any] | None, recipe: str | None, assignments: list[str]) -> RunSettings:
    """Resolve a recipe, else `base` (a run's saved settings), else the defaults, with `--set` on top.

    Raises UserError.
    """
    return resolve_settings(RunSettings, RECIPES, base, recipe, assignments)
