"""Run a few updates of the trainer in one or several processes, and compare the weights."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.clip_vip import random_texts, tiny_model
from tests.helpers.ranks import run_ranks
from training.data.batch import Batch
from training.learner import Learner
from training.parallel.distributed import Process, join
from training.settings import TrainSettings

NUM_STEPS, BATCH = 3, 8
Batches = Callable[[int], Batch]  # by step


def whole_batch(step: int) -> Batch:
    """Make a batch with all kinds of holes: an unreadable clip, missing subtitles, missing captions."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (BATCH, 3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    present = torch.rand(3, BATCH, generator=generator) < 0.8
    return Batch(
        rows_B=torch.arange(BATCH),
        video_BT3SS=pixels[:, :2],
        frame_B13SS=pixels[:, 2:],
        subtitle_BL=random_texts(BATCH, seed=10 + step),
        caption_BL=random_texts(BATCH, seed=20 + step),
        video_mask_B=present[0],
        subtitle_mask_B=present[1],
        caption_mask_B=present[2],
    )


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"lr": 1e-2, "precision": "fp32", "batch_size": BATCH, "warmup_ratio": 0, **changes})


def learn(
    process: Process, train: TrainSettings, batch: Batches = whole_batch, make_model: Callable[[], Any] = tiny_model
) -> tuple[dict[str, Tensor], list[float]]:
    """Return weights and losses after some updates on this process's part of the batches."""
    # fp64 is needed because Adam amplifies the rounding of gradients that are zero, such as those of the keys' biases
    model = make_model().to(torch.float32 if train.precision == "bf16" else torch.float64)
    learner = Learner(model, train, 10, process)
    share = BATCH // process.world_size
    losses = []
    for step in range(NUM_STEPS):
        mine = batch(step).split(share)[process.rank]
        losses.append(float(learner.train_step(mine)["loss"]))
    return whole_weights(learner.model), losses


def whole_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def alone(train: TrainSettings, *of: Any) -> tuple[dict[str, Tensor], list[float]]:
    return learn(Process(torch.device("cpu")), train, *of)


def _rank(rank: int, folder: Path, trains: list[TrainSettings], of: tuple[Any, ...]) -> None:
    with join("cpu") as process:
        torch.save([learn(process, train, *of) for train in trains], folder / f"{rank}.pt")


def together(world_size: int, trains: list[TrainSettings], *of: Any) -> list[list[Any]]:
    """Return the final weights and losses of every process, for each of the settings."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(world_size, _rank, Path(folder), trains, of)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]


def assert_same(ours: tuple[dict[str, Tensor], list[float]], expected: tuple[dict[str, Tensor], list[float]]) -> None:
    torch.testing.assert_close(torch.tensor(ours[1]), torch.tensor(expected[1]), rtol=1e-9, atol=1e-9)
    for name, weight in expected[0].items():
        torch.testing.assert_close(ours[0][name], weight, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
