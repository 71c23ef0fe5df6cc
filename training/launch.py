"""Train, evaluate or estimate for a command or the API: options in, results out, without printing.

`launch_training` turns options into a `Request` and runs it in this process or under Ray Train. `launch_evaluation`
opens a checkpoint or any other model and ranks the clips of a selection. `launch_estimate` reads a corpus and computes
the cost of a run that it does not start.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from clipmill.base.errors import UserError
from training.cost.estimate import GPUS, Estimate, estimate
from training.data.selection import Selection, freeze
from training.data.selection_schema import EVAL_FILE, SELECTION_FILE
from training.evaluation.retrieval import Progress, evaluate, similarity_format
from training.models import registry as models
from training.models.model import VideoTextModel
from training.parallel.distributed import Process, join
from training.run.best_checkpoint import chosen_checkpoint
from training.run.folder import RunFolder
from training.run.settings import RunSettings, resolve
from training.run.setup import Request
from training.trainer import Report, train


def launch_training(
    corpus: str | None,
    run: str | Path,
    *,
    recipe: str | None = None,
    init: str | None = None,
    select: str | None = None,
    where: str | None = None,
    pack: str | None = None,
    workers: int = 1,
    address: str | None = None,
    assignments: Sequence[str] = (),
    tables: Sequence[tuple[str, str]] = (),
    command: str = "",
) -> Report:
    """Start a run, or resume it. Raises UserError.

    corpus         a corpus folder or URL, or a pattern of plain tars; None: the run's
    init           the initial model: a run (its best, else latest checkpoint), or any value of `model.init`
    select, where  a SELECT with clip_id, or a condition on `catalog`: becomes `data.where`
    pack           name of the pack whose shards are read: becomes `data.pack`
    workers        training processes under Ray Train; 1: this process (which may be one of torchrun's)
    """
    condition = one_condition(select, where)
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 process is needed.")
    chosen = [f"data.where={yaml_string(condition)}"] if condition else []
    chosen += [f"data.pack={yaml_string(pack)}"] if pack is not None else []
    chosen += [f"model.init={yaml_string(initial_weights(init))}"] if init else []
    request = Request(
        run=str(Path(run).absolute()),
        corpus=None if corpus is None else str(Path(corpus).absolute()) if Path(corpus).is_dir() else corpus,
        recipe=recipe,
        assignments=(*assignments, *chosen),
        tables=tuple(tables),
        command=command,
    )
    if workers > 1 and "RANK" in os.environ:
        raise UserError(
            "--workers cannot be combined with torchrun: its --nproc-per-node sets the number of processes."
        )
    if workers == 1 and address is None:
        return train(request)
    from training.ray import train_on_ray

    return train_on_ray(request, workers, address)


def initial_weights(init: str) -> str:
    """Return the value of `model.init` for `--init`: of a run, its best or else latest checkpoint.

    Raises UserError for a run without a checkpoint.
    """
    folder = RunFolder(init)
    return str(folder.checkpoints.path(chosen_checkpoint(folder).step)) if folder.exists else init


def one_condition(select: str | None, where: str | None) -> str | None:
    """Return the given one of `--select` and `--where`, None if neither is. Raises UserError for both."""
    if select and where:
        raise UserError("give --select or --where, not both: each of them selects clips.")
    return select or where


def yaml_string(text: str) -> str:
    """Quote any text as a YAML string, because `--set` reads values as YAML. JSON's form keeps line breaks."""
    return json.dumps(text, ensure_ascii=False)


# --- Evaluation


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, and the settings of its evaluation."""

    name: str
    model: VideoTextModel
    settings: RunSettings
    corpus: str | None  # the run's, used if no other is given
    trained_on: Path | None  # the run's frozen selection
    chosen_on: Path | None = None  # the selection whose evaluation chose the checkpoint


def launch_evaluation(
    run: str | Path | None = None,
    model: str | None = None,
    corpus: str | Path | None = None,
    *,
    recipe: str | None = None,
    select: str | None = None,
    where: str | None = None,
    pack: str | None = None,
    text: str | None = None,
    dsl: bool = False,
    checkpoint: str | None = None,
    ema: bool = False,
    save_similarity: str | Path | None = None,
    assignments: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a model; return `training.evaluation.retrieval.evaluate`'s metrics with `model`, `corpus` and `where`.

    run, model     one of them: a run folder, evaluated with the run's settings; or any value of `model.init`, evaluated
                   with the settings of `recipe`, else the defaults in float32
    corpus         None: the run's
    select, where  a SELECT with clip_id, or a condition on `catalog`; neither: eval.where, which is empty by default:
                   every sample
    pack           name of the pack whose shards are read; None: the run's, if its corpus is searched, else the main one
    checkpoint     of the run, see `training.run.best_checkpoint.chosen_checkpoint`
    ema            evaluate the run's averaged weights
    progress       called as clips are encoded, on the first process
    Raises UserError.
    """
    if save_similarity is not None:
        similarity_format(save_similarity)
    assignments = [*assignments, *([f"eval.text={text}"] if text else [])]
    assignments += [f"data.pack={yaml_string(pack)}"] if pack is not None else []
    subject = open_subject(run, model, recipe, checkpoint, ema, assignments)
    settings = subject.settings
    read_pack = settings.data.pack if corpus is None or pack is not None else ""
    corpus = corpus or subject.corpus
    condition = one_condition(select, where) or settings.eval.where
    if corpus is None:
        raise UserError("--corpus is missing: give the corpus of the clips to search.")
    with join(settings.train.device) as process, _selected(process, corpus, condition, read_pack) as selection:
        metrics = evaluate(
            subject.model.to(process.device),
            selection,
            settings,
            process,
            dsl="per_direction" if dsl else None,
            save_similarity=save_similarity,
            progress=progress if process.is_first else None,
        )
        metrics |= {"model": subject.name, "corpus": str(corpus), "where": condition}
        if subject.trained_on is not None:
            metrics["num_seen"] = num_seen(selection, Selection(subject.trained_on))
        if subject.chosen_on is not None:
            chosen_on = pc.unique(Selection(subject.chosen_on).column("clip_id"))
            in_both = pc.is_in(selection.column("clip_id"), value_set=chosen_on)
            metrics["num_chosen_on"] = pc.sum(in_both).as_py() or 0
    return metrics


def open_subject(
    run: str | Path | None,
    model: str | None,
    recipe: str | None,
    checkpoint: str | None,
    ema: bool,
    assignments: Sequence[str],
) -> Subject:
    """Load the checkpoint of a run, or any other model. Raises UserError for options that contradict each other."""
    if (run is None) == (model is None):
        raise UserError("give either --run DIR or --model MODEL.")
    if run is not None:
        if recipe:
            raise UserError("--recipe goes with --model: a run has its own settings, which --set changes.")
        return _subject_of_run(RunFolder(run).require(), checkpoint, ema, list(assignments))
    if checkpoint:
        raise UserError("--checkpoint goes with --run: a model's file is one set of weights.")
    if ema:
        raise UserError("--ema goes with --run: a model's file has one set of weights.")
    assignments = [f"model.init={yaml_string(model)}", *assignments]
    base: dict[str, Any] = {"train": {"precision": "fp32"}}
    settings = resolve(base, recipe, assignments)
    loaded = models.load(settings.model)
    if not recipe:  # by default texts are cut at the model's limit
        limit = min(settings.data.max_text_tokens, loaded.config.context_length)
        settings = resolve(base | {"data": {"max_text_tokens": limit}}, None, assignments)
    return Subject(model, loaded, settings, None, None)


def _subject_of_run(folder: RunFolder, which: str | None, ema: bool, assignments: list[str]) -> Subject:
    record = folder.load()
    settings = resolve(record.settings, None, assignments)
    chosen = chosen_checkpoint(folder, which)
    checkpoint = folder.checkpoints.load(chosen.step)
    weights = checkpoint.averaged if ema else checkpoint.weights
    if weights is None:
        raise UserError(f"--ema: {checkpoint.path} has no averaged weights, because the run's train.ema was not set.")
    model = models.read(weights, settings.model, settings.data.seed)
    name = f"{folder.root} at step {chosen.step}{chosen.reason}" + (", averaged weights" if ema else "")
    chosen_on = folder.root / EVAL_FILE if chosen.reason else None
    return Subject(name, model, settings, record.corpus, folder.root / SELECTION_FILE, chosen_on)


@contextmanager
def _selected(process: Process, corpus: str | Path, where: str, pack: str) -> Iterator[Selection]:
    """Freeze the clips on the first process and copy the file to every other, so that no shared folder is needed."""
    with tempfile.TemporaryDirectory(prefix="clipmill-eval-") as folder:
        path = Path(folder) / "eval.arrow"

        def frozen() -> bytes:
            freeze(path, corpus, where, setting="--where", pack=pack)
            return path.read_bytes()

        content = process.first(frozen)
        if not process.is_first:
            path.write_bytes(content)
        yield Selection(path)


def num_seen(selection: Selection, trained_on: Selection) -> int:
    """Count the clips of a selection whose video also has clips in the other one."""
    videos = selection.column("video_id")
    in_training = pc.is_in(trained_on.column("video_id"), value_set=pc.unique(videos))
    seen = pc.unique(trained_on.column("video_id").filter(in_training))
    return pc.sum(pc.is_in(videos, value_set=seen)).as_py() or 0


# --- Cost


def launch_estimate(
    corpus: str | Path,
    *,
    recipe: str | None = None,
    select: str | None = None,
    where: str | None = None,
    pack: str | None = None,
    workers: int = 1,
    gpus: Sequence[str] = (),
    assignments: Sequence[str] = (),
    tables: Mapping[str, str | Path] | None = None,
) -> tuple[Estimate, RunSettings]:
    """Estimate what a training run would cost; return it with the run's settings. Starts and writes nothing.

    corpus         a corpus folder or URL, or a pattern of plain tars
    select, where  a SELECT with clip_id, or a condition on `catalog`: becomes `data.where`
    pack           name of the pack whose shards are read: becomes `data.pack`
    workers        training processes, one device each
    gpus           names such as H100; none: `training.cost.estimate.GPUS`
    Raises UserError.
    """
    condition = one_condition(select, where)
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 process is needed.")
    chosen = [f"data.where={yaml_string(condition)}"] if condition else []
    chosen += [f"data.pack={yaml_string(pack)}"] if pack is not None else []
    settings = resolve(None, recipe, [*assignments, *chosen])
    return estimate(corpus, settings, num_devices=workers, gpus=gpus or GPUS, tables=tables), settings
