"""All settings of a corpus: a section per stage, and the engine's; recipes; `--set stage.key=value`."""

from functools import cache
from importlib import resources
from typing import Any

from pydantic import Field, PositiveFloat, create_model

from clipmill.base.settings import Settings, resolve_settings, setting, validate_settings
from pipeline.engine.registry import STAGES, all_stages


class EngineSettings(Settings):
    """Settings of spreading tasks over a cluster. None of them changes the content of a corpus."""

    # Ray cluster to join ("auto", "ray://HOST:PORT"). null: the one in RAY_ADDRESS, else Ray starts on this machine.
    address: str | None = setting(None, reaches="sends all work to that cluster")
    # Join a Ray cluster without token authentication too: whoever reaches its ports can run code on all its nodes.
    allow_open_cluster: bool = setting(False, reaches="joins a cluster in which others can run code")
    # CPUs that Ray may use when it starts on this machine; null: all.
    cpus: int | None = Field(None, ge=1)
    # Download processes on a node; each downloads up to 32 sources at a time, or copies the local files of one unit.
    # download.per_host limits each host, and a source that waits for its host takes no place.
    downloads_per_node: int = Field(4, ge=1)
    # Actors that hold models. null: as many as GPUs or model_resources allow, else one per 8 CPUs.
    model_workers: int | None = Field(None, ge=1)
    # CPUs reserved for each model actor; 0 lets it share CPUs with cutting.
    model_cpus: float = Field(0, ge=0)
    # Custom Ray resources that each model actor takes: {"captioner": 1} places actors on nodes that have it.
    model_resources: dict[str, PositiveFloat] = {}
    # Seconds of video in a task of transcribe, segment or cut: bounds the work that a lost task repeats.
    batch_video_s: float = Field(300, gt=0)
    # Clips in a caption or score task.
    batch_clips: int = Field(512, ge=1)
    # Units in flight; null: four per CPU, and one per download task.
    active_units: int | None = Field(None, ge=1)
    # Attempts at an item over all runs, for retryable failures.
    max_attempts: int = Field(3, ge=1)
    # Least seconds between two publications of the manifest, which take at most 5 % of the time.
    publish_every_s: float = Field(10, gt=0)
    # Flush downloads, clips and fragments to the disk before a commit counts, so that a power cut loses no committed
    # work. Off is faster where that does not matter or the disk is slow; a process that is killed loses nothing anyway.
    fsync: bool = True
    # A build merges the fragments of a volume into one file per table when nothing in it is pending and so many commits
    # have been added. A hundred loose ones take a quarter of a second to read on a new machine.
    merge_commits: int = Field(100, ge=1)
    # Bytes of the corpus that a build reads, chosen at random, to find damaged files; 0 reads none. `clipmill verify
    # --deep` reads all. 64 MB take less than a second.
    check_bytes: int = Field(64_000_000, ge=0)
    # DuckDB's memory limit in the driver.
    driver_memory: str = Field("1GB", pattern=r"^\d+(MB|GB)$")


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
