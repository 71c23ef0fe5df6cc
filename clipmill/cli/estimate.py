"""`clipmill plan`: print the cost of a training run as tables or JSON. Reads the corpus, starts nothing."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipmill.base.console import plain_console
from training.cost.estimate import CHUNK, DECODED_PER_CORE_S, Estimate
from training.launch import launch_estimate
from training.run.settings import RunSettings

Format = Literal["table", "json"]


def run_plan(
    corpus: str | Path, *, format: Format = "table", console: Console | None = None, **options: Any
) -> Estimate:
    """Estimate with the options of `training.launch.launch_estimate`, and print the result. Raises UserError."""
    found, settings = launch_estimate(corpus, **options)
    if format == "json":
        print(json.dumps(asdict(found), indent=1))
    else:
        show(found, settings, console or plain_console())
    return found


def show(found: Estimate, settings: RunSettings, console: Console) -> None:
    """Print one table each for data, steps, memory, disk and time, then notes."""
    for title, rows in (
        ("data", _data_rows(found, settings)),
        ("steps", _step_rows(found, settings)),
        ("memory per device", _memory_rows(found, settings)),
        ("disk", _disk_rows(found, settings)),
    ):
        table = Table(box=None, pad_edge=False, show_header=False, title=f"[bold]{title}", title_justify="left")
        table.add_column(justify="right", min_width=12)
        table.add_column()
        for value, text in rows:
            table.add_row(value, text)
        console.print(table)
    console.print(_time_table(found))
    console.print(
        f"[dim]time: from an assumed share of the dense {settings.train.precision} peak; the CPU's peak is measured; "
        f"a core decodes {DECODED_PER_CORE_S:.0f} samples of 12 frames of 224 pixels a second[/]",
        soft_wrap=True,
    )
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)


def _data_rows(found: Estimate, settings: RunSettings) -> list[tuple[str, str]]:
    data, named = found.data, settings.data
    short = ": some frames are repeated"
    if named.frames_per_s is not None:
        short = f" at {named.frames_per_s:g} per second: padded with empty frames"
    rows = [(f"{data.num_clips:,}", f"clips to train on, in {data.num_shards:,} shards")]
    if settings.eval.where.strip():
        rows.append((f"{data.num_held_out:,}", "clips held out for evaluation"))
    rows += [
        (
            _percent(data.num_without_subtitle, data.num_clips),
            f"have no {named.subtitle}: left out of its loss terms",
        ),
        (_percent(data.num_without_caption, data.num_clips), "have no caption"),
        (_percent(data.num_without_text, data.num_clips), "have no text at all"),
        (_percent(data.num_short, data.num_clips), f"are shorter than {named.num_frames} frames{short}"),
        (_bytes(data.read_bytes), f"to read per epoch, in {data.num_reads:,} reads"),
    ]
    return rows


def _step_rows(found: Estimate, settings: RunSettings) -> list[tuple[str, str]]:
    step, tail = found.step, {"drop": "dropped", "carry": "carried over", "pad": "dropped"}[settings.data.tail]
    share = f", {step.per_device:,} per device" if step.per_device < step.batch_size else ""
    trained = f", {step.num_trained / 1e6:,.1f} M of them trained" * (step.num_trained < step.num_parameters)
    gflops_of_clip = step.flops_per_step / step.batch_size / 1e9
    return [
        (f"{step.batch_size:,}", f"clips per step{share}"),
        (f"{step.steps_per_epoch:,}", f"steps per epoch; {step.num_dropped:,} clips {tail} at its end"),
        (f"{step.total_steps:,}", f"steps in total, {step.total_steps / step.steps_per_epoch:.3g} epochs"),
        (f"{step.num_parameters / 1e6:,.1f} M", f"parameters: {escape(settings.model.init)}{trained}"),
        (f"{step.flops_per_step / 1e12:,.3g} TFLOP", f"per step, {gflops_of_clip:,.4g} GFLOP per clip"),
    ]


def _memory_rows(found: Estimate, settings: RunSettings) -> list[tuple[str, str]]:
    memory, train = found.memory, settings.train
    state = "weights, gradients, AdamW" + ", EMA" * bool(train.ema) + ", bf16 copies" * (train.precision == "bf16")
    kept = memory.weights + memory.gradients + memory.optimiser + memory.ema + memory.casts
    rows = [
        (_bytes(kept), state),
        (_bytes(memory.inputs + memory.loss), "the batch, features and similarities"),
        (_bytes(memory.activations), "activations kept for the backward pass"),
        (f"[bold]{_bytes(memory.total)}", "in total, plus about 1 GB of CUDA context on a GPU"),
    ]
    others = {
        "train.activation_checkpointing=true": found.with_checkpointing,
        f"train.chunk_size={CHUNK}": found.with_chunks,
    }
    return rows + [
        (_bytes(other.total), f"with {setting}, for a third more compute")
        for setting, other in others.items()
        if other.total < memory.total
    ]


def _disk_rows(found: Estimate, settings: RunSettings) -> list[tuple[str, str]]:
    return [
        (_bytes(found.data.selection_bytes), "selection"),
        (_bytes(2 * found.data.plan_bytes), "plans of this epoch and the next"),
        (_bytes(found.checkpoint_bytes), f"checkpoints, {settings.train.keep_checkpoints} of them"),
    ]


def _time_table(found: Estimate) -> Table:
    table = Table(box=None, pad_edge=False, title="[bold]time", title_justify="left")
    for column in ("device", "peak TFLOP/s", "share", "samples/s", "total", "cores to decode"):
        table.add_column(column, justify="left" if column == "device" else "right")
    for speed in found.speeds:
        table.add_row(
            f"{speed.num_devices} x {speed.device}" if speed.num_devices > 1 else speed.device,
            f"{speed.peak_flops / 1e12:,.3g}",
            f"{speed.mfu:.0%}",
            f"{speed.samples_per_s:,.3g}",
            _duration(speed.total_s),
            f"{speed.decoding_cores:,.1f}",
        )
    return table


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.3g} {unit}"
        count /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} s"
