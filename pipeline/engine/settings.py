"""All settings of a corpus: a section per stage, and the engine's; recipes; `--set stage.key=value`."""

from functools import cache
from importlib import resources
from typing import Any

from pydantic import Field, PositiveFloat, create_model

from clipmill.base.settings import Settings, resolve_settings, validate_settings
from pipeline.engine.registry import STAGES, all_stages


class EngineSettings(Settings):
    """How tasks are spread over a cluster. None of these settings changes what a corpus holds."""

    address: str | None = None  # Ray cluster to join ("auto", "ray://…"); None: the surrounding one, or this machine
    cpus: int | None = Field(None, ge=1)  # CPUs Ray may use when it starts on this machine; None: all
    downloads_per_node: int = Field(4, ge=1)  # download tasks at a time on a node, each one unit; hosts have own caps
    model_workers: int | None = Field(
        None, ge=1
    )  # actors that hold models; None: what GPUs or model_resources allow, else one per 8 CPUs
    model_cpus: float = Field(0, ge=0)  # CPUs reserved per such actor; 0 lets it share with cutting
    # Custom resources that each such actor takes: {"captioner": 1} places them on the nodes that were started with it.
    model_resources: dict[str, PositiveFloat] = {}
    batch_video_s: float = Field(300, gt=0)  # seconds of video per cutting task: bounds what a lost task costs
    batch_clips: int = Field(512, ge=1)  # clips per caption or score task
    active_units: int | None = Field(None, ge=1)  # units in flight; None: four per CPU
    max_attempts: int = Field(3, ge=1)  # over all runs, for failures that trying again may heal
    publish_every_s: float = Field(
        10, gt=0
    )  # the manifest is published at most this often, and takes at most 5 % of time
    driver_memory: str = Field("1GB", pattern=r"^\d+(MB|GB)$")  # DuckDB's limit in the driver


@cache
def _model(stages: tuple) -> type[Settings]:
    """Make the settings model that has a section for each of these stages."""
    sections = {stage.name: (stage.settings, stage.settings()) for stage in stages}
    return create_model(
        "CorpusSettings",
        __base__=Settings,
        __module__=__name__,
        **sections,
        engine=(EngineSettings, EngineSettings()),
    )


CorpusSettings = _model(STAGES)  # with stages from other packages, `resolve` and `validate` give a model that has them

RECIPES = resources.files("pipeline").joinpath("recipes")


def resolve(base: dict | None, recipe: str | None, assignments: list[str]) -> CorpusSettings:
    """Return the settings of a recipe (else `base`, else the defaults) with `--set` on top. Raises UserError."""
    return resolve_settings(_model(all_stages()), RECIPES, base, recipe, assignments)


def validate(data: dict[str, Any]) -> CorpusSettings:
    return validate_settings(_model(all_stages()), data)
