"""`clipmill train`: one process here, one of torchrun's, or Ray Train's workers; and what is said at the end."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from clipmill.base.errors import UserError
from training.run.best_checkpoint import chosen_checkpoint
from training.run.folder import RunFolder
from training.run.setup import Request
from training.trainer import Report, train


def run_train(
    corpus: str | None,
    run: str | Path,
    *,
    recipe: str | None = None,
    init: str | None = None,
    select: str | None = None,
    where: str | None = None,
    workers: int = 1,
    address: str | None = None,
    assignments: Sequence[str] = (),
    tables: Sequence[tuple[str, str]] = (),
    command: str = "",
) -> Report:
    """Begins a run, or goes on with it. Raises UserError.

    corpus         a corpus folder or a pattern of plain tars; None: the run's
    init           what to start from: a run, whose best or else latest checkpoint is taken, or what `model.init` may be
    select, where  a SELECT with clip_id, or a condition on `catalog`: `data.where`
    workers        training processes under Ray Train; 1: this process (which may be one of torchrun's)
    """
    if select and where:
        raise UserError("give --select or --where, not both: each of them says which clips are meant.")
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 process has to train.")
    chosen = [f"data.where={_yaml(select or where)}"] if select or where else []
    chosen += [f"model.init={_yaml(_start(init))}"] if init else []
    request = Request(
        run=str(Path(run).absolute()),
        corpus=None if corpus is None else str(Path(corpus).absolute()) if Path(corpus).is_dir() else corpus,
        recipe=recipe,
        assignments=(*assignments, *chosen),
        tables=tuple(tables),
        command=command,
    )
    if workers > 1 and "RANK" in os.environ:
        raise UserError("--workers goes without torchrun: its --nproc-per-node says how many processes train.")
    if workers == 1 and address is None:
        report = train(request)
    else:
        from training.ray import train_on_ray

        report = train_on_ray(request, workers, address)
    if int(os.environ.get("RANK", 0)) == 0:
        _show(report)
    return report


def _start(init: str) -> str:
    """Raises UserError for a run without a checkpoint."""
    folder = RunFolder(init)
    if not folder.exists:
        return init
    return str(folder.checkpoints.path(chosen_checkpoint(folder).step))


def _yaml(text: str) -> str:
    """Any SQL as one YAML string, as `--set` reads it."""
    return "'" + text.replace("'", "''") + "'"


def _show(report: Report) -> None:
    console = Console(highlight=False)
    if report.reason == "done":
        said = f"{report.run} is trained: {report.total_steps:,} steps."
        said += f"\n  clipmill eval --run {report.run}"
    else:
        said = f"Stopped by {report.reason} after step {report.step:,} of {report.total_steps:,}, all of it saved."
        said += f"\n  clipmill train --run {report.run}    goes on from there"
    console.print(said, soft_wrap=True)
