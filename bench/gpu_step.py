"""Measure updates per second on a GPU (gate), for ViT-B/32 and B/16 as post-pretraining runs them.

    python -m bench.gpu_step [--models b32 b16] [--batches 64 128 256 512] [--corpus DIR] [--output bench/results]

First the whole update alone (`Learner.train_step`: four encoders, loss over 12 frames, 1 still, two texts of 70 tokens,
backward, clipping, AdamW) on one batch that stays on the device, so that data cost nothing: compiled or not, with
activation checkpointing, with gradient caching. With --corpus the loader feeds the same update from that corpus's
shards; the difference is the cost of data.

MFU is the published arithmetic (`training.models.clip_vip.model.sample_flops`: 374 GFLOP a sample for B/32, 1,402 for
B/16) per second over the chip's dense bf16 peak (`training.run.hardware_peaks`); what recomputing adds is not credited.
Gate: MFU >= 0.45.

Traps: the first steps of a compiled way compile; a batch that does not fit gives a row and the bench continues; a hot
or shared GPU is slower: the table has the clock, but check what else runs. `--device cpu --models tiny` checks that the
bench runs without a GPU; its figures mean nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from training.data.batch import Batch
from training.data.epoch_files import Epochs, plan_spec
from training.data.loader import Loader, SampleReader
from training.data.selection import Selection, freeze
from training.learner import Learner
from training.models.clip_vip.model import ClipVip, ModelConfig, TowerConfig, sample_flops
from training.models.encode import text_encoder
from training.parallel.distributed import Process
from training.run.hardware_peaks import peak_flops
from training.settings import DataSettings, TrainSettings

GATE_MFU = 0.45
NUM_FRAMES, NUM_TOKENS = 12, 70
WARM_UP_STEPS, MEASURED_STEPS = 4, 12

_TEXT = TowerConfig(width=512, num_layers=12, num_heads=8, mlp_width=2048)
_VISION = TowerConfig(width=768, num_layers=12, num_heads=12, mlp_width=3072)
_TINY = TowerConfig(width=64, num_layers=2, num_heads=2, mlp_width=128)
MODELS = {
    "b32": ModelConfig(vision=_VISION, text=_TEXT, embed_dim=512, patch_size=32),
    "b16": ModelConfig(vision=_VISION, text=_TEXT, embed_dim=512, patch_size=16),
    "tiny": ModelConfig(vision=_TINY, text=_TINY, embed_dim=32, image_size=64, vocab_size=100),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"compile": True},
    "checkpointing": {"activation_checkpointing": True},
    "compiled, checkpointing": {"compile": True, "activation_checkpointing": True},
    "caching, chunks of a quarter": {"chunk_size": 4},  # a quarter of the batch: see `settings_of`
}


@dataclass(frozen=True)
class Row:
    """The measurement of one way. `samples_per_s` is None where the batch did not fit."""

    model: str
    way: str
    source: str  # "cached batch" or "loader"
    batch_size: int
    samples_per_s: float | None
    mfu: float | None
    peak_memory_gb: float


def settings_of(way: str, batch_size: int) -> TrainSettings:
    """Return the training settings of a way."""
    changes = dict(WAYS[way])
    if "chunk_size" in changes:
        changes["chunk_size"] = max(1, batch_size // changes["chunk_size"])
    return TrainSettings(batch_size=batch_size, precision="bf16", **changes)


def cached_batches(config: ModelConfig, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Yield the same random batch for ever, on the device, with texts of the maximum length."""
    size, generator = config.image_size, torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch_size, NUM_FRAMES + 1, 3, size, size), dtype=torch.uint8, generator=generator)
    ids = torch.randint(1, config.vocab_size - 2, (2, batch_size, NUM_TOKENS), generator=generator)
    ids[:, :, -1] = config.vocab_size - 1
    there = torch.ones(batch_size, dtype=torch.bool)
    rows = torch.arange(batch_size)
    batch = Batch(rows, pixels[:, :-1], pixels[:, -1:], ids[0], ids[1], there, there, there).to(device)
    while True:
        yield batch


def measure(name: str, way: str, batches: Iterator[Batch], batch_size: int, process: Process, source: str) -> Row:
    """Measure a way: samples per second, MFU and memory; without a rate where the batch does not fit."""
    config, device = MODELS[name], process.device
    model = ClipVip(config)
    model.initialise()
    learner = Learner(model, settings_of(way, batch_size), 1000, process)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        seconds = [_timed_step(learner, batches, device) for _ in range(WARM_UP_STEPS + MEASURED_STEPS)]
    except torch.OutOfMemoryError:
        return Row(name, way, source, batch_size, None, None, _memory_gb(device))
    rate = batch_size / statistics.median(seconds[WARM_UP_STEPS:])
    peak = peak_flops(device, "bf16")
    flops = sample_flops(config, NUM_FRAMES, 1, (NUM_TOKENS, NUM_TOKENS))
    return Row(name, way, source, batch_size, rate, rate * flops / peak if peak else None, _memory_gb(device))


def _timed_step(learner: Learner, batches: Iterator[Batch], device: torch.device) -> float:
    """Time a step as the training loop sees it, waiting for the batch included."""
    before = time.perf_counter()
    learner.train_step(next(batches).to(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - before


def _memory_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def describe(row: Row) -> str:
    """Return a row as text."""
    if row.samples_per_s is None:
        return f"{row.model:5} {row.way:30} {row.source:13} {row.batch_size:5}  does not fit"
    mfu = "" if row.mfu is None else f"{row.mfu:7.1%}"
    return (
        f"{row.model:5} {row.way:30} {row.source:13} {row.batch_size:5}  {row.samples_per_s:9,.1f} samples/s"
        f" {mfu}  {row.peak_memory_gb:6.1f} GB"
    )


def loader_batches(corpus: str, config: ModelConfig, batch_size: int, stack: ExitStack) -> Iterator[Batch]:
    """Yield batches of a corpus as a run reads them, epoch after epoch."""
    folder = Path(stack.enter_context(TemporaryDirectory()))
    data = DataSettings(max_text_tokens=NUM_TOKENS, apart=())
    freeze(folder / "selection.arrow", corpus)
    selection = Selection(folder / "selection.arrow")
    spec = plan_spec(selection, data, batch_size)
    epochs = Epochs(folder, spec, selection.path)
    reader = SampleReader(selection, data, text_encoder(config, NUM_TOKENS), config.image_size)
    loader = stack.enter_context(Loader(reader, pin_memory=torch.cuda.is_available()))
    return loader.batches(epochs, slice(0, batch_size), 0, 1_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["b32", "b16"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--corpus", help="also feed the fastest way from this corpus's shards")
    parser.add_argument("--output", type=Path, help="folder for the rows as JSON")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "torch finds no GPU: run this on a machine with one, or pass --device cpu --models tiny to test the bench"
        )
    process = Process(torch.device(chosen.device))
    torch.set_float32_matmul_precision("high")
    rows = []
    for name in chosen.models:
        for way in chosen.ways:
            for batch_size in chosen.batches:
                batches = cached_batches(MODELS[name], batch_size, process.device)
                rows.append(measure(name, way, batches, batch_size, process, "cached batch"))
                print(describe(rows[-1]), flush=True)
                torch.compiler.reset()
        best = max((row for row in rows if row.model == name and row.samples_per_s), key=lambda row: row.samples_per_s)
        if chosen.corpus:
            with ExitStack() as stack:
                batches = loader_batches(chosen.corpus, MODELS[name], best.batch_size, stack)
                rows.append(measure(name, best.way, batches, best.batch_size, process, "loader"))
            print(describe(rows[-1]), flush=True)
        if best.mfu is not None:
            verdict = "passes" if best.mfu >= GATE_MFU else "fails"
            print(f"{name}: best {best.mfu:.1%} of peak, gate {GATE_MFU:.0%}: {verdict}")
    if chosen.output:
        device = torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu"
        path = chosen.output / f"gpu_step-{device.replace(' ', '-').lower()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            "device": device,
            "torch": torch.__version__,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        path.write_text(json.dumps(environment | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
