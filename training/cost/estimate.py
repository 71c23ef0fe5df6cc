"""Estimate the cost of a run before it starts: steps, bytes, memory, FLOPs, time. Nothing is started or written.

`DataCost` comes from the corpus's tables, `StepCost` from the model's configuration, `Memory` from both and the
settings, `Speed` from a device's peak. The comments of the constants below name measurements and assumptions.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch

from clipmill.base.errors import UserError
from training.cost.footprint import Footprint, pixels_of
from training.data.clip_query import ClipQuery, Samples, open_samples
from training.data.epoch_files import spec_without_groups, total_steps
from training.data.epoch_plan import PlanSpec, rank_slots, remainder_rows, steps_in_epoch
from training.data.range_reader import LOCAL_GAP_BYTES, REMOTE_GAP_BYTES
from training.data.run_selection import choose_run
from training.data.selection import selected_rows
from training.losses import load_loss
from training.models import registry as models
from training.models.encode import needs_pairs, text_encoder
from training.parallel_model import check_settings
from training.run.hardware_peaks import gpu_peak, peak_flops
from training.run.settings import RunSettings
from training.settings import DataSettings, TrainSettings

# Assumed share of a device's dense peak: the goal of the GPU bench; on a CPU half the speed of its matrix products,
# because small products and the operations between them are slower.
ASSUMED_MFU = {"cuda": 0.45, "cpu": 0.5}
# Samples per second and core that loader processes decode: 12 frames of 224² from shards in clipmill's encoding.
DECODED_PER_CORE_S = 60.0
DECODED_PIXELS = 13 * 224**2  # of such a sample
GPUS = ("A100", "H100", "H200")  # shown by default
CHUNK = 32  # samples per chunk in the estimate with gradient caching


@dataclass(frozen=True)
class DataCost:
    """Counts of the selected clips, and the cost of reading them once."""

    num_clips: int
    num_held_out: int
    num_excluded: int
    num_unpacked: int
    num_shards: int  # that hold at least one selected clip
    num_without_subtitle: int
    num_without_caption: int
    num_without_text: int
    num_short: int  # with fewer frames than are taken, so that some repeat
    read_bytes: int  # per epoch, with the gaps between merged reads
    num_reads: int
    selection_bytes: int  # of selection.arrow
    plan_bytes: int  # of one epoch's plan


@dataclass(frozen=True)
class StepCost:
    """Steps, parameters and FLOPs of the run."""

    steps_per_epoch: int
    total_steps: int
    num_dropped: int  # clips that are not in an epoch
    batch_size: int
    per_device: int  # slots of a batch
    num_parameters: int
    num_trained: int
    flops_per_step: float  # all devices together


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, without the allocator's slack and the device's context (about 1 GB on a GPU)."""

    weights: int
    gradients: int
    optimiser: int
    ema: int
    casts: int  # bf16 copies of the weights
    inputs: int  # the batch, as bytes and as normalised floats
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Speed:
    """Duration of the run on some devices."""

    device: str
    num_devices: int
    peak_flops: float  # of one
    mfu: float  # assumed
    samples_per_s: float
    total_s: float
    decoding_cores: float  # needed to decode as fast


@dataclass(frozen=True)
class Estimate:
    data: DataCost
    step: StepCost
    memory: Memory
    with_checkpointing: Memory
    with_chunks: Memory  # of CHUNK samples
    checkpoint_bytes: int  # of all checkpoints that a run keeps
    speeds: tuple[Speed, ...]
    notes: tuple[str, ...]


def estimate(
    corpus: str | Path,
    settings: RunSettings,
    *,
    num_devices: int = 1,
    gpus: Sequence[str] = GPUS,
    tables: Mapping[str, str | Path] | None = None,
) -> Estimate:
    """Estimate the cost of `clipmill train` with these settings. Raises UserError like that command."""
    data, train = settings.data, settings.train
    config = models.config_of(settings.model)
    text_encoder(config, data.max_text_tokens)
    with open_samples(corpus, tables, pack=data.pack, memory=data.select_memory) as samples:
        training, held_out = choose_run(samples, data, settings.eval)
        cost = data_cost(samples, training, held_out, settings)
    spec = spec_without_groups(cost.num_clips, data, train.batch_size)
    footprint = Footprint(config, settings)
    check_settings(footprint.model, train)
    footprint.model.set_activation_checkpointing(train.activation_checkpointing)  # UniPT raises UserError
    step = step_cost(footprint, settings, spec, total_steps(spec, train), num_devices)
    sizes = (step.per_device, num_devices)
    checkpointed = train.model_copy(update={"activation_checkpointing": True})
    chunk_size = None if needs_pairs(footprint.model) else min(CHUNK, step.per_device)
    chunked = train.model_copy(update={"chunk_size": chunk_size})
    return Estimate(
        data=cost,
        step=step,
        memory=memory(footprint, data, train, *sizes),
        with_checkpointing=memory(footprint, data, checkpointed, *sizes),
        with_chunks=memory(footprint, data, chunked, *sizes),
        checkpoint_bytes=train.keep_checkpoints * footprint.checkpoint_bytes,
        speeds=tuple(
            speed_on(device, num_devices, step, pixels_of(config, data, train)) for device in devices(train, gpus)
        ),
        notes=tuple(training.notes()),
    )


# --- Data


def data_cost(samples: Samples, training: ClipQuery, held_out: ClipQuery | None, settings: RunSettings) -> DataCost:
    """Count the selected clips and their bytes in one pass over the rows."""
    data, totals = settings.data, _Totals(samples.root, settings.data)
    for batch in selected_rows(samples, training):
        totals.add(batch)
    spec = spec_without_groups(training.num_clips, data, settings.train.batch_size)
    return DataCost(
        num_clips=training.num_clips,
        num_held_out=held_out.num_clips if held_out else 0,
        num_excluded=training.num_excluded,
        num_unpacked=training.num_unpacked,
        plan_bytes=4 * steps_in_epoch(spec, 0) * spec.batch_size,
        **totals.counts,
    )


class _Totals:
    """Sums over record batches of a selection."""

    def __init__(self, root: str, data: DataSettings):
        self.data, self.root = data, root
        self.shards: set[str] = set()
        names = ("without_subtitle", "without_caption", "without_text", "short", "reads")
        self._counts = dict.fromkeys([f"num_{name}" for name in names] + ["read_bytes", "selection_bytes"], 0)

    @property
    def counts(self) -> dict[str, int]:
        return self._counts | {"num_shards": len(self.shards)}

    def add(self, batch: pa.RecordBatch) -> None:
        self.shards |= set(pc.unique(batch["shard"]).to_pylist())
        num_frames = batch["num_frames"]
        if self.data.frames_per_s is not None:
            num_frames = pc.ceil(pc.multiply(pc.divide(num_frames, batch["fps"]), self.data.frames_per_s))
        no_subtitle, no_caption = _is_empty(batch[self.data.subtitle]), _is_empty(batch["caption"])
        read_bytes, num_reads = self._reads(batch)
        found = {
            "num_without_subtitle": _sum(no_subtitle),
            "num_without_caption": _sum(no_caption),
            "num_without_text": _sum(pc.and_(no_subtitle, no_caption)),
            "num_short": _sum(pc.less(num_frames, self.data.num_frames)),
            "num_reads": num_reads,
            "read_bytes": read_bytes,
            "selection_bytes": batch.nbytes,
        }
        for name, value in found.items():
            self._counts[name] += value

    def _reads(self, batch: pa.RecordBatch) -> tuple[int, int]:
        """Return (bytes, reads) of single clips, with the still in the same read if it is near."""
        mp4_bytes = _sum(batch["mp4_bytes"])
        if self.data.still != "captioned":
            return mp4_bytes, batch.num_rows
        with_still = batch.filter(pc.is_valid(batch["jpg_offset"]))
        columns = ("mp4_offset", "mp4_bytes", "jpg_offset", "jpg_bytes")
        start, size, still_start, still_size = (with_still[name].to_numpy() for name in columns)
        gap = (start - still_start - still_size).clip(min=0) + (still_start - start - size).clip(min=0)
        is_remote = "://" in self.root + batch["shard"][0].as_py()
        merged = gap <= (REMOTE_GAP_BYTES if is_remote else LOCAL_GAP_BYTES)
        extra = int(still_size.sum() + gap[merged].sum())
        return mp4_bytes + extra, batch.num_rows + int((~merged).sum())


def _is_empty(column: pa.Array) -> pa.Array:
    return pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(column, ""))), 0)


def _sum(column: pa.Array) -> int:
    return pc.sum(column).as_py() or 0


# --- Steps and memory


def step_cost(
    footprint: Footprint, settings: RunSettings, spec: PlanSpec, total_steps: int, num_devices: int
) -> StepCost:
    """Compute the run's arithmetic. Raises UserError if the devices cannot share the batch."""
    slots = rank_slots(spec, 0, num_devices)
    return StepCost(
        steps_per_epoch=steps_in_epoch(spec, 0),
        total_steps=total_steps,
        num_dropped=0 if spec.tail == "pad" else len(remainder_rows(spec, 0)),
        batch_size=spec.batch_size,
        per_device=slots.stop - slots.start,
        num_parameters=footprint.num_parameters,
        num_trained=footprint.num_trained,
        flops_per_step=spec.batch_size * footprint.flops_of_clip + spec.batch_size**2 * footprint.flops_of_pair,
    )


def memory(footprint: Footprint, data: DataSettings, train: TrainSettings, per_device: int, num_devices: int) -> Memory:
    """Estimate the bytes on one device.

    Weights, gradients and AdamW's two moments of trained weights are fp32: 4 + 4 + 8 bytes, divided among devices by
    FSDP.

    activations  of the samples encoded at a time (`train.chunk_size`, else all of the device's), and of the pairs
    loss         features and similarities of the whole batch with the device's rows, and their gradients
    """
    config = footprint.config
    share = num_devices if train.parallel == "fsdp" else 1
    parameters, trained = footprint.num_parameters, footprint.num_trained
    at_a_time = min(train.chunk_size or per_device, per_device)
    values = pixels_of(config, data, train) * 3  # of a sample
    float_bytes = 2 if train.precision == "bf16" else 4
    batch_size = per_device * num_devices
    num_matrices = load_loss(train.loss).num_similarities + 2 * data.neighbours
    similarities = 3 * 4 * num_matrices * per_device * batch_size
    return Memory(
        weights=4 * parameters // share,
        gradients=4 * trained // share,
        optimiser=8 * trained // share,
        ema=4 * parameters // share if train.ema else 0,
        casts=2 * parameters // share if train.precision == "bf16" else 0,
        inputs=per_device * values + at_a_time * values * (4 + float_bytes),
        activations=at_a_time * footprint.kept_of_clip(train) + footprint.kept_of_pairs(per_device * batch_size),
        loss=similarities + 4 * 4 * batch_size * config.embed_dim * 2,
    )


# --- Time


@dataclass(frozen=True)
class Device:
    name: str
    kind: str  # of ASSUMED_MFU
    peak_flops: float
    num_cores: int = 0  # of a CPU, which trains and decodes on the same cores


def devices(train: TrainSettings, gpus: Sequence[str]) -> list[Device]:
    """List this machine's CPU, measured, and GPUs by name. Raises UserError for one whose peak is unknown."""
    num_cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(train.threads or num_cores)
    found = [Device(f"this CPU, {num_cores} cores", "cpu", peak_flops(torch.device("cpu"), train.precision), num_cores)]
    for name in gpus:
        peak = train.peak_tflops * 1e12 if train.peak_tflops else gpu_peak(name, train.precision)
        if peak is None:
            raise UserError(f"--gpu {name}: its peak is not known. Give it with --set train.peak_tflops=NUMBER.")
        found.append(Device(name, "cuda", peak))
    return found


def speed_on(device: Device, num_devices: int, step: StepCost, sample_pixels: int) -> Speed:
    """Compute the speed at the assumed share of the peak; a CPU also decodes, a GPU's data is decoded elsewhere."""
    mfu, count = ASSUMED_MFU[device.kind], 1 if device.num_cores else num_devices
    decode_s = sample_pixels / DECODED_PIXELS / DECODED_PER_CORE_S
    sample_s = step.flops_per_step / step.batch_size / (count * device.peak_flops * mfu)
    if device.num_cores:
        sample_s += decode_s / device.num_cores
    return Speed(
        device=device.name,
        num_devices=count,
        peak_flops=device.peak_flops,
        mfu=mfu,
        samples_per_s=1 / sample_s,
        total_s=step.total_steps * step.batch_size * sample_s,
        decoding_cores=decode_s / sample_s,
    )
