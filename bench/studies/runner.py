"""Runs a study's arms with its seeds, keeps what is there, and reports.

DIR/rows.csv    condition, arm, seed, metric, value: a run's values are all there or none is
DIR/study.json  which study these rows are of, its size, and the processor seconds that they took
DIR/README.md, DIR/plot.svg   once all rows are there
"""

import csv
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from bench.studies import STUDIES, load
from bench.studies.report import write_index, write_report
from bench.studies.study import Arm, Cell, Study, Table, Values
from clipmill.base.atomic_file import write_text
from clipmill.base.errors import UserError
from clipmill.base.file_lock import take_lock

COLUMNS = ("condition", "arm", "seed", "metric", "value")


class Done(NamedTuple):
    cell: Cell
    values: Values
    cpu_s: float


def run_study(
    name: str,
    out: Path,
    *,
    size: str = "default",
    num_seeds: int | None = None,
    cache: Path,
    workers: int = 1,
    progress: Callable[[str], None] = print,
) -> Table:
    """Does what DIR lacks and writes the report. The same rows whatever the number of workers. Raises UserError."""
    study = load(name)
    if size not in study.sizes:
        raise UserError(f"--size {size}: the study {name} has {', '.join(study.sizes)}.")
    for option, number in (("--seeds", num_seeds), ("--workers", workers)):
        if number is not None and number < 1:
            raise UserError(f"{option} {number}: at least 1.")
    with only_writer(out):
        return _run_missing(StudyFolder(out, study, size), num_seeds or study.num_seeds, cache, workers, progress)


def index(folder: Path) -> None:
    """FOLDER/README.md of the studies that were run into FOLDER/NAME. Raises UserError where there is none."""
    done = {}
    for name in STUDIES:
        if (folder / name / "study.json").exists():
            study, cpu_s = load(name), json.loads((folder / name / "study.json").read_text())["cpu_s"]
            done[name] = study, Table(read_rows(folder / name / "rows.csv", study)), cpu_s
    if not done:
        raise UserError(f"--out {folder}: no study was run into a folder of its name there.")
    write_index(folder, done)


def _run_missing(
    folder: "StudyFolder", num_seeds: int, cache: Path, workers: int, progress: Callable[[str], None]
) -> Table:
    study, size = folder.study, folder.size
    seeds = range(num_seeds)
    missing = [Cell(arm, seed) for seed in seeds for arm in study.arms if Cell(arm, seed) not in folder.values]
    num_there = len(seeds) * len(study.arms) - len(missing)
    if num_there:
        progress(f"{num_there} of {len(seeds) * len(study.arms)} runs are there already.")
    with closing(_results(study.name, size, missing, cache, workers)) as results:
        for done in results:
            folder.add(done)
            num_there += 1
            told = "  ".join(f"{metric} {value:.3g}" for metric, value in done.values.items())
            progress(f"{num_there:3}  {done.cell.arm.label}, seed {done.cell.seed}: {told}  ({done.cpu_s:.0f} s)")
    table = Table({cell: values for cell, values in folder.values.items() if cell.seed in seeds})
    write_report(study, size, num_seeds, table, folder.path)
    return table


def _results(name: str, size: str, cells: list[Cell], cache: Path, workers: int) -> Iterator[Done]:
    """As they are done. Each process has one thread, so that sums are rounded alike wherever a cell is run."""
    if workers == 1 or len(cells) < 2:
        yield from (_run(name, size, cell, cache) for cell in cells)
        return
    pool = ProcessPoolExecutor(min(workers, len(cells)), mp_context=get_context("spawn"))
    try:
        yield from (future.result() for future in as_completed(pool.submit(_run, name, size, c, cache) for c in cells))
    finally:
        pool.shutdown(cancel_futures=True)


def _run(name: str, size: str, cell: Cell, cache: Path) -> Done:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)
    begun = time.process_time()
    study = load(name)
    try:
        values = study.run(cell.arm, cell.seed, study.sizes[size], cache)
    finally:
        torch.set_num_threads(threads)
    assert set(values) == set(study.metrics), f"{name}: {sorted(values)} are not its metrics"
    assert all(map(math.isfinite, values.values())), f"{name}, {cell}: {values}"
    rounded = {metric: float(f"{values[metric]:.6g}") for metric in study.metrics}
    return Done(cell, rounded, time.process_time() - begun)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Raises UserError while another process writes there: each would replace the other's rows."""
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not take_lock(descriptor, 0):
            raise UserError(f"--out {path}: a study is being run there now.")
        yield
    finally:
        os.close(descriptor)


class StudyFolder:
    """The rows of one study at one size. Opening it refuses those of another. Raises UserError."""

    def __init__(self, path: Path, study: Study, size: str):
        self.path, self.study, self.size = path, study, size
        description = {"study": study.name, "size": size, "settings": asdict(study.sizes[size])}
        self.values: dict[Cell, Values] = {}
        self.cpu_s = 0.0
        if (path / "study.json").exists():
            there = json.loads((path / "study.json").read_text())
            self.cpu_s = there.pop("cpu_s")
            _check_same(path, there, description)
            self.values = read_rows(path / "rows.csv", study)
        self.description = description

    def add(self, done: Done) -> None:
        self.values[done.cell] = done.values
        self.cpu_s += done.cpu_s
        text = json.dumps(self.description | {"cpu_s": round(self.cpu_s)}, indent=1) + "\n"
        write_text(self.path / "study.json", text)
        write_rows(self.path / "rows.csv", self.study, self.values)


def _check_same(path: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    if there != wanted:
        differing = [key for key in wanted if there.get(key) != wanted[key]]
        key = differing[0] if differing else "settings"
        raise UserError(
            f"--out {path} holds rows of another run: {key} is {there.get(key)!r} there, and {wanted[key]!r} was asked "
            "for. Choose another folder, or remove this one."
        )


def read_rows(path: Path, study: Study) -> dict[Cell, Values]:
    """Cells of `rows.csv` that are arms of the study and have all its metrics."""
    values: dict[Cell, dict[str, float]] = {}
    if path.exists():
        for row in csv.DictReader(io.StringIO(path.read_text())):
            cell = Cell(Arm(row["arm"], row["condition"]), int(row["seed"]))
            values.setdefault(cell, {})[row["metric"]] = float(row["value"])
    return {
        cell: found for cell, found in values.items() if cell.arm in study.arms and set(found) == set(study.metrics)
    }


def write_rows(path: Path, study: Study, values: dict[Cell, Values]) -> None:
    """In the order of arms and seeds, whatever came first: all of them, in place of what was there."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell in sorted(values, key=lambda cell: (study.arms.index(cell.arm), cell.seed)):
        for metric in study.metrics:
            writer.writerow((cell.arm.condition, cell.arm.name, cell.seed, metric, values[cell][metric]))
    write_text(path, text.getvalue())
