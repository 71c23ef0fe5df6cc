"""Make a small packed corpus with its selection and plan, compare batches, and simulate failing readers."""

import os
import signal
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from tests.helpers.shards import make_corpus, pack
from training.data.batch import Batch
from training.data.clip_query import Tables, open_samples, select_clips
from training.data.epoch_files import Epochs, plan_spec
from training.data.loader import Loader, SampleReader
from training.data.selection import Selection, freeze, selected_rows
from training.data.selection_schema import SELECTION
from training.data.shard_cache import ShardCache
from training.data.tokenizer import TextEncoder
from training.settings import DataSettings

SIZE, MAX_TOKENS = 32, 24
WORDS = ("red", "blue", "circle", "square", "moves", "left", "right", "the", "a", "over", "sea", "field", "we", "see")


@dataclass(frozen=True)
class Run:
    """Hold the inputs of a training loader."""

    corpus: Path
    selection: Selection
    epochs: Epochs
    data: DataSettings

    def reader(self, **changes) -> SampleReader:
        kind = changes.pop("kind", SampleReader)
        train = changes.pop("train", True)
        data = self.data.model_copy(update=changes)
        return kind(self.selection, data, TextEncoder(WORDS, MAX_TOKENS), SIZE, train=train)

    def loader(self, num_processes: int = 0, **options) -> Loader:
        reader = options.pop("reader", None) or self.reader()
        return Loader(reader, num_processes=num_processes, prefetch_samples=options.pop("prefetch", 32), **options)

    def batches(self, start: int, end: int, num_processes: int = 0, slots: slice | None = None, **options) -> list:
        with self.loader(num_processes, **options) as loader:
            whole = slice(0, self.epochs.spec.batch_size)
            return list(loader.batches(self.epochs, slots or whole, start, end))


def make_run(folder: Path, num_clips: int = 40, batch_size: int = 8, **settings) -> Run:
    """Make clips of 2 to 5 frames in shards of 5, and select all of them."""
    corpus = make_corpus(folder / "corpus", num_clips)
    pack(corpus)
    return open_run(folder, corpus, batch_size, **settings)


def open_run(folder: Path, corpus: Path, batch_size: int = 8, hashed: bool = True, **settings) -> Run:
    """Open the run again after the corpus was changed; without `hashed`, wrong bytes reach the decoder."""
    data = DataSettings(num_frames=4, apart=(), **settings)
    freeze(folder / "selection.arrow", corpus)
    if not hashed:
        remove_hashes(folder / "selection.arrow")
    selection = Selection(folder / "selection.arrow")
    spec = plan_spec(selection, data, batch_size)
    return Run(corpus, selection, Epochs(folder / "plan", spec, selection.path), data)


def remove_hashes(path: Path) -> None:
    """Turn a selection into one of a version that had no hashes and no later columns."""
    with pa.ipc.open_file(str(path)) as file:
        table = file.read_all().drop_columns(["mp4_sha256", "jpg_sha256", "neighbours", "fps"])
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b), field.name


def assert_all_equal(some: list[Batch], others: list[Batch]) -> None:
    for one, other in zip(some, others, strict=True):
        assert_equal(one, other)


class DeadlyReader(SampleReader):
    """Kill this process in the middle of `deadly` rows, as a crashing decoder does; a file counts how often.

    If `times` is set, a row kills that many processes and is readable afterwards.
    """

    deadly: tuple[int, ...] = ()
    times: int | None = None
    tally: Path = Path()

    def _decode(self, clip, source, epoch, out) -> int:
        row = self._row_of(clip["clip_id"])
        if row in self.deadly:
            with open(self.tally / str(row), "a") as file:
                file.write("x")
            if self.times is None or len((self.tally / str(row)).read_text()) <= self.times:
                os.kill(os.getpid(), signal.SIGSEGV)
        return super()._decode(clip, source, epoch, out)

    def _row_of(self, clip_id: str) -> int:
        ids = self.selection.take(np.arange(self.selection.num_clips))["clip_id"].to_pylist()
        return ids.index(clip_id)

    def num_deaths(self, row: int) -> int:
        path = self.tally / str(row)
        return len(path.read_text()) if path.exists() else 0


class UnstartableReader(SampleReader):
    """End the process that receives it, so that loader processes cannot start."""

    def __setstate__(self, state) -> None:
        os._exit(3)


class StuckReader(DeadlyReader):
    """Hang in a row after writing a file `stuck-PID`."""

    def _decode(self, clip, source, epoch, out) -> int:
        if self._row_of(clip["clip_id"]) in self.deadly:
            (self.tally / f"stuck-{os.getpid()}").touch()
            time.sleep(10_000)
        return super()._decode(clip, source, epoch, out)


def deadly_reader(run: Run, folder: Path, *rows: int, times: int | None = None, kind=DeadlyReader) -> DeadlyReader:
    reader = run.reader(kind=kind)
    reader.deadly, reader.times, reader.tally = rows, times, folder
    return reader


def select(
    corpus: str | Path, where: str = "", *, setting: str = "data.where", tables: Tables | None = None
) -> pa.Table:
    """Select clips into memory, with the columns and order of a selection file."""
    with open_samples(corpus, tables) as samples:
        clips = select_clips(samples, where, setting)
        return pa.Table.from_batches(selected_rows(samples, clips), SELECTION)


def settle(cache: ShardCache) -> None:
    """Wait until every shard that was requested is fetched or given up."""
    cache._asked.join()
