"""All settings of a corpus, joined from the stages that own them; recipes; `--set stage.key=value`."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from captioning.settings import CaptionSettings, ScoreSettings
from pipeline.config import Settings
from pipeline.cut import CutSettings
from pipeline.download import DownloadSettings
from pipeline.errors import UserError
from pipeline.ingest import IngestSettings
from pipeline.segment import SegmentSettings
from pipeline.transcribe import TranscribeSettings
from shards.pack import PackSettings


class EngineSettings(Settings):
    """How work is spread; none of it changes what a corpus holds."""

    address: str | None = None  # Ray cluster to join ("auto", "ray://…"); None: the surrounding one, or this machine
    cpus: int | None = Field(None, ge=1)  # CPUs Ray may use when it starts on this machine; None: all
    downloads_per_node: int = Field(4, ge=1)  # download tasks at a time on a node, each one unit; hosts have own caps
    model_workers: int | None = Field(None, ge=1)  # actors that hold models; None: one per GPU, else one per 8 CPUs
    model_cpus: float = Field(0, ge=0)  # CPUs reserved per such actor; 0 lets it share with cutting
    batch_video_s: float = Field(300, gt=0)  # seconds of video per cutting task: bounds what a lost task costs
    batch_clips: int = Field(512, ge=1)  # clips per caption or score task
    active_units: int | None = Field(None, ge=1)  # units in flight; None: four per CPU
    max_attempts: int = Field(3, ge=1)  # over all runs, for failures that trying again may heal
    publish_every_s: float = Field(
        10, gt=0
    )  # the manifest is published at most this often, and takes at most 5 % of time
    driver_memory: str = Field("1GB", pattern=r"^\d+(MB|GB)$")  # DuckDB's limit in the driver


class CorpusSettings(Settings):
    ingest: IngestSettings = IngestSettings()
    download: DownloadSettings = DownloadSettings()
    transcribe: TranscribeSettings = TranscribeSettings()
    segment: SegmentSettings = SegmentSettings()
    cut: CutSettings = CutSettings()
    caption: CaptionSettings = CaptionSettings()
    score: ScoreSettings = ScoreSettings()
    pack: PackSettings = PackSettings()
    engine: EngineSettings = EngineSettings()


def resolve(base: dict | None, recipe: str | None, assignments: list[str]) -> CorpusSettings:
    """Settings from a recipe (else `base`, else the defaults) with `--set` on top. Raises UserError."""
    data = load_recipe(recipe) if recipe else dict(base or {})
    for assignment in assignments:
        _assign(data, assignment)
    return validate(data)


def validate(data: dict) -> CorpusSettings:
    try:
        return CorpusSettings.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error.errors())) from None


def load_recipe(name: str) -> dict:
    """A recipe shipped with clipmill by name, or a YAML file by path."""
    shipped = {path.name.removesuffix(".yaml"): path for path in recipe_files()}
    source = shipped.get(name) or Path(name)
    if not source.is_file():
        raise UserError(f"--recipe {name}: neither a file nor one of {', '.join(sorted(shipped))}.")
    try:
        data = yaml.safe_load(source.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {name} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"--recipe {name}: expected sections such as `cut:`, found {type(data).__name__}.")
    return data


def recipe_files() -> list:
    return [path for path in resources.files("pipeline").joinpath("recipes").iterdir() if path.name.endswith(".yaml")]


def _assign(data: dict, assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not sections:
        raise UserError(f"--set {assignment}: write it as stage.key=value, for example --set cut.fps=2.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {assignment}: the value is not YAML ({error}).") from error
    for section in sections:
        branch = data.get(section)
        data[section] = data = dict(branch) if isinstance(branch, dict) else {}
    data[key] = value


def _explain(problems: list[Any]) -> str:
    """One line per setting that is wrong, naming it and what it may be."""
    messages: dict[str, list[str]] = {}
    for problem in problems:
        where, model = _locate(problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            messages[f"setting {where}"] = [f"there is no such setting; known here are {known}"]
        else:
            text = problem["msg"][0].lower() + problem["msg"][1:]
            messages.setdefault(f"setting {where} = {problem['input']!r}", []).append(text)
    return "\n".join(f"{where}: {' or '.join(texts)}." for where, texts in messages.items())


def _locate(location: tuple) -> tuple[str, Any]:
    """The dotted name of a setting, without the parts that name branches of its type; and the model it is in."""
    model, names = CorpusSettings, []
    for part in location:
        names.append(str(part))
        field = model.model_fields.get(part)
        if field is None or not hasattr(field.annotation, "model_fields"):
            break
        model = field.annotation
    return ".".join(names), model
