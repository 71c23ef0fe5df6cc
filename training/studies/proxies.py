"""Study a: what in the model lets it tell motions apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.studies.scenes import DIRECTIONS, families, frames_of, with_reversed
from training.studies.study import Arm, Claim, Study, Table

MODELS: dict[str, dict[str, Any]] = {  # `ModelSettings` by arm
    "4 proxies": {"num_added": 3, "num_times": 12, "pooling": "proxy"},
    "1 proxy": {"num_added": 0, "num_times": 12, "pooling": "proxy"},
    "mean pooling": {"pooling": "mean"},
    "seqTransf": {"method": "clip4clip", "clip4clip": {"head": "seqTransf", "num_layers": 2}},
    "seqLSTM": {"method": "clip4clip", "clip4clip": {"head": "seqLSTM"}},
}
# Tables of positions in time, which have to grow from zero
TIMES = {"4 proxies": ("vision.time_embedding",), "1 proxy": ("vision.time_embedding",)}
FAMILY = len(DIRECTIONS)


@dataclass(frozen=True)
class Size:
    num_families: int = 120  # of six training clips each
    num_test_families: int = 40
    num_frames: int = 4
    seconds: float = 2.4
    steps: int = 150
    families_per_batch: int = 5
    lr: float = 1e-3
    time_factor: float = 10.0  # of the learning rate of the temporal table, which starts from zero


def run(arm: Arm, seed: int, size: Size, cache: Path) -> Mapping[str, float]:
    from training import models
    from training.settings import ModelSettings, TrainSettings
    from training.studies.fitting import fit

    model = models.load(ModelSettings(init="demo", **MODELS[arm.name]), seed=seed)
    scenes, pixels = clips(size.num_families, [seed, 0], size, model.config.image_size, cache)
    settings = TrainSettings(
        loss="vs",
        max_steps=size.steps,
        lr=size.lr,
        lr_factors=dict.fromkeys(TIMES.get(arm.name, ()), size.time_factor),
        warmup_ratio=0.1,
        precision="fp32",
        grad_clip=1.0,
    )
    fit(model, pixels, lambda rng: draw_batch(scenes, size.families_per_batch, rng), settings, seed)
    return scores(model, *clips(size.num_test_families, [seed, 1], size, model.config.image_size, cache))


def clips(num: int, seed: list[int], size: Size, image_size: int, cache: Path) -> tuple[list, np.ndarray]:
    """Families one behind the other, each of six clips with every motion once, and their pixels."""
    scenes = [scene for family in families(num, seed) for scene in family]
    return with_reversed(scenes, frames_of(scenes, size.num_frames, image_size, size.seconds, cache))


def draw_batch(scenes: list, num_families: int, rng: np.random.Generator) -> Any:
    """Whole families, so that clips of the same looks are each other's negatives; half the texts say the looks, too."""
    from pipeline.demo.grammar import motion_text, spoken_sentences
    from training.studies.fitting import Texts

    chosen = rng.choice(len(scenes) // FAMILY, num_families, replace=False)
    rows = (chosen[:, None] * FAMILY + np.arange(FAMILY)).reshape(-1)
    texts = [
        motion_text(scenes[row], int(rng.integers(3)))
        if rng.random() < 0.5
        else " ".join(spoken_sentences(scenes[row], rng, num_words=26))
        for row in rows
    ]
    return rows, Texts(texts, [None] * len(rows))


def scores(model: Any, scenes: list, pixels: np.ndarray) -> dict[str, float]:
    from pipeline.demo.grammar import motion_text, still_text
    from training.studies.fitting import recall, recall_within, similarities

    motion = similarities(model, [motion_text(scene, i % 3) for i, scene in enumerate(scenes)], pixels)
    ones = np.arange(0, len(scenes), FAMILY)  # one clip of each family: no two look the same
    still = similarities(model, [still_text(scenes[i]) for i in ones], pixels[ones])
    return {
        "direction_r1": recall_within(motion, 2),
        "family_r1": recall_within(motion, FAMILY),
        "motion_r1": recall(motion),
        "motion_r5": recall(motion, 5),
        "still_r1": recall(still),
        "still_r5": recall(still, 5),
    }


def draw(table: Table, path: Path) -> Path:
    from training.plots import bars

    shown = {
        "direction_r1": "forwards or backwards",
        "family_r1": "same looks, six motions",
        "still_r1": "one frame answers",
    }
    groups = {
        told: {arm.name: tuple(100 * v for v in table.mean(arm, metric)) for arm in STUDY.arms}
        for metric, told in shown.items()
    }
    marks = {"forwards or backwards": 50.0, "same looks, six motions": 100 / FAMILY}
    return bars(path, STUDY.title, groups, y_label="R@1, percent", marks=marks, label="{:.0f}".format)


STUDY = Study(
    name="proxies",
    title="Video proxies and what else can tell a motion",
    question="Which way of making a video's vector from its frames answers queries that only the order of frames "
    "answers, and does it cost anything where any one frame answers?",
    claimed="Video proxies are above mean pooling (CLIP-ViP), and so is CLIP4Clip's seqTransf with enough data; on "
    "what any frame answers mean pooling is as good.",
    setting="The demo's image model is trained on clips.",
    arms=tuple(Arm(name) for name in MODELS),
    metrics={
        "direction_r1": "clip or the same backwards, R@1",
        "family_r1": "same looks, six motions, R@1",
        "motion_r1": "motion among all, R@1",
        "motion_r5": "motion among all, R@5",
        "still_r1": "looks, R@1",
        "still_r5": "looks, R@5",
    },
    claims=(
        Claim("4 proxies > mean pooling", "family_r1", "4 proxies", "mean pooling"),
        Claim("seqTransf > mean pooling", "family_r1", "seqTransf", "mean pooling"),
        Claim("seqLSTM > mean pooling", "family_r1", "seqLSTM", "mean pooling"),
        Claim("4 proxies > seqTransf", "family_r1", "4 proxies", "seqTransf"),
        Claim("4 proxies > 1 proxy", "family_r1", "4 proxies", "1 proxy"),
        Claim("4 proxies at most 5 points below mean pooling", "still_r1", "4 proxies", "mean pooling", by=-0.05),
    ),
    sizes={"default": Size(), "small": Size(num_families=6, num_test_families=4, steps=3, families_per_batch=2)},
    run=run,
    draw=draw,
)
