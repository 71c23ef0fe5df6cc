"""Train and score models for studies, by the project's learner and metrics on arrays in memory.

Shape letters: N clips, T frames, S pixels a side, B clips of a batch, M texts, D the features' size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.demo.grammar import Scene, motion_text, still_text
from training.data.batch import Batch
from training.data.frame_sampling import middle_index
from training.evaluation.metrics import ranks_of
from training.learner import Learner
from training.models.encode import normalise, text_encoder
from training.models.model import VideoTextModel
from training.parallel.distributed import Process
from training.settings import TrainSettings

MAX_TOKENS = 40  # of a text; longer ones are cut
CHUNK = 64  # clips or texts encoded at once when scoring


class Texts(NamedTuple):
    """The texts of a batch's clips; None where a clip has none."""

    subtitles: Sequence[str | None]
    captions: Sequence[str | None]


Draw = Callable[[np.random.Generator], tuple[NDArray[np.int64], Texts]]  # rows of a batch, and the texts of this visit


def settings_of(loss: str, steps: int, lr: float, lr_factors: Mapping[str, float] | None = None) -> TrainSettings:
    """Return the training settings that the studies share."""
    return TrainSettings(
        loss=loss,
        max_steps=steps,
        lr=lr,
        lr_factors=dict(lr_factors or {}),
        warmup_ratio=0.1,
        precision="fp32",
        grad_clip=1.0,
    )


def fit(
    model: VideoTextModel, pixels_NT3SS: np.ndarray, draw: Draw, settings: TrainSettings, seed: int
) -> VideoTextModel:
    """Train a model in place for `settings.max_steps` updates; return it in evaluation mode."""
    assert settings.max_steps is not None
    learner = Learner(model.train(), settings, settings.max_steps, Process(torch.device("cpu")), seed=seed)
    rng = np.random.default_rng([seed, 7])
    for _ in range(settings.max_steps):
        rows, texts = draw(rng)
        learner.train_step(make_batch(model, pixels_NT3SS, rows, texts))
    return learner.model.eval()


def random_batches(subtitles: Sequence[str | None], captions: Sequence[str | None], batch_size: int) -> Draw:
    """Return a drawer of batches that takes all clips in one random order after another, without the remainders."""
    num = len(subtitles)
    waiting: list[int] = []

    def draw(rng: np.random.Generator) -> tuple[NDArray[np.int64], Texts]:
        if len(waiting) < batch_size:
            waiting[:] = rng.permutation(num).tolist()
        rows = [waiting.pop() for _ in range(min(batch_size, num))]
        return np.array(rows), Texts([subtitles[row] for row in rows], [captions[row] for row in rows])

    return draw


def make_batch(model: VideoTextModel, pixels_NT3SS: np.ndarray, rows: NDArray[np.int64], texts: Texts) -> Batch:
    """Make a training batch of clips and their texts."""
    video_BT3SS = torch.from_numpy(pixels_NT3SS[rows])
    middle = middle_index(video_BT3SS.shape[1])
    return Batch(
        rows_B=torch.from_numpy(rows),
        video_BT3SS=video_BT3SS,
        frame_B13SS=video_BT3SS[:, middle : middle + 1],
        subtitle_BL=_ids(model, texts.subtitles),
        caption_BL=_ids(model, texts.captions),
        video_mask_B=torch.ones(len(rows), dtype=torch.bool),
        subtitle_mask_B=torch.tensor([text is not None for text in texts.subtitles]),
        caption_mask_B=torch.tensor([text is not None for text in texts.captions]),
    )


def _ids(model: VideoTextModel, texts: Sequence[str | None]) -> Tensor:
    """Return token ids [B, L], cut after the longest text."""
    ids_BL = text_encoder(model.config, MAX_TOKENS)([text or "" for text in texts])
    return ids_BL[:, : int(ids_BL.argmax(dim=1).max()) + 1]


@torch.no_grad()
def video_features(model: VideoTextModel, pixels_NT3SS: np.ndarray) -> Tensor:
    """Encode clips to unit vectors [N, D]."""
    mean, std = model.config.image_mean, model.config.image_std
    chunks = (torch.from_numpy(np.array(chunk)) for chunk in _chunks(pixels_NT3SS))
    return torch.cat([model.encode_video(normalise(chunk, mean, std)) for chunk in chunks])


@torch.no_grad()
def text_features(model: VideoTextModel, texts: Sequence[str]) -> Tensor:
    """Encode texts to unit vectors [M, D]."""
    return torch.cat([model.encode_text(_ids(model, chunk)) for chunk in _chunks(texts)])


def similarities(model: VideoTextModel, texts: Sequence[str], pixels_NT3SS: np.ndarray) -> NDArray[np.float64]:
    """Return the cosines of texts and clips, [M, N]."""
    return (text_features(model, texts).double() @ video_features(model, pixels_NT3SS).double().T).numpy()


def recall(similarity_MN: NDArray[np.float64], k: int = 1) -> float:
    """Return the share of texts i with video i among the k nearest; a tie at the k-th place counts half."""
    answers = np.arange(len(similarity_MN))
    best, worst = (ranks_of(similarity_MN, answers, ties=ties) for ties in ("optimistic", "pessimistic"))
    return float(((best <= k).mean() + (worst <= k).mean()) / 2)


def written_texts(scenes: Sequence[Scene]) -> list[str]:
    """Write a sentence of looks and motion per scene, in varying words, as a benchmark's annotator might."""
    return [f"{still_text(scene, i)} and {motion_text(scene, i)}" for i, scene in enumerate(scenes)]


def written_scores(model: VideoTextModel, scenes: Sequence[Scene], pixels_NT3SS: np.ndarray) -> dict[str, float]:
    """Score retrieval as in a benchmark, by sentences of looks and motion, and of looks alone; a clip per scene."""
    looks, whole = [still_text(scene, i) for i, scene in enumerate(scenes)], written_texts(scenes)
    video_ND = video_features(model, pixels_NT3SS).double()
    by_whole, by_looks = ((text_features(model, texts).double() @ video_ND.T).numpy() for texts in (whole, looks))
    return {"r1": recall(by_whole), "r5": recall(by_whole, 5), "looks_r1": recall(by_looks)}


def recall_within(similarity_MN: NDArray[np.float64], size: int, k: int = 1) -> float:
    """Return `recall` where a video's rivals are only those in the same block of `size`."""
    blocks = [similarity_MN[start : start + size, start : start + size] for start in range(0, len(similarity_MN), size)]
    return float(np.mean([recall(block, k) for block in blocks]))


def _chunks(items: Sequence) -> list:
    return [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
