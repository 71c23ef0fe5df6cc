"""Study b: the best loss for subtitles that are partly wrong and captions of one frame."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.studies.study import Arm, Claim, Study, Table
from training.run.plots import bars

VARIANTS = {
    "V-S": "vs",
    "V-S + F-C": "vs_fc",
    "V-S + V-C": "vs_vc",
    "V-S + V-C + F-C": "vs_vc_fc",
    "V-(S,C)": "vsc",
    "V-(S,C) + F-C": "vsc_fc",
}
# Share of clips whose subtitle is about something else: half of them have another clip's, half have filler
NOISE = {"no noise": 0.0, "30 % noise": 0.3, "70 % noise": 0.7}


@dataclass(frozen=True)
class Size:
    """The amount of work."""

    num_clips: int = 300
    num_test: int = 150
    num_frames: int = 3
    seconds: float = 2.4
    batch_size: int = 16
    steps: int = 40
    lr: float = 3e-4


def run(arm: Arm, seed: int, size: Size, cache: Path) -> Mapping[str, float]:
    """Post-pretrain with an arm's loss and score."""
    from bench.studies.fitting import fit, random_batches, settings_of, written_scores
    from bench.studies.scenes import alike_scenes, frames_of, single_scenes
    from training.models import registry as models
    from training.models.registry import ModelSettings

    model = models.load(ModelSettings(init="demo", num_added=3, num_times=12, pooling="proxy"), seed=seed)
    scenes = single_scenes(size.num_clips, [seed, 2])
    frames = size.num_frames, model.config.image_size, size.seconds, cache
    subtitles, captions = noisy_subtitles(scenes, NOISE[arm.condition], seed), captions_of(scenes, seed)
    settings = settings_of(VARIANTS[arm.name], size.steps, size.lr)
    fit(model, frames_of(scenes, *frames), random_batches(subtitles, captions, size.batch_size), settings, seed)
    held_out = alike_scenes(size.num_test, [seed, 3])
    return written_scores(model, held_out, frames_of(held_out, *frames))


def noisy_subtitles(scenes: Sequence[Any], noise: float, seed: int) -> list[str]:
    """Write a subtitle per clip. Those wrong at a low level of noise are wrong at higher ones, too."""
    from pipeline.demo.grammar import filler_sentence, spoken_sentences

    rng = np.random.default_rng([seed, 11])
    said = [" ".join(spoken_sentences(scene, rng, num_words=26)) for scene in scenes]
    fillers = [f"{filler_sentence(rng)} {filler_sentence(rng)}" for _ in scenes]
    place, is_filler = rng.permutation(len(scenes)) / len(scenes), rng.random(len(scenes)) < 0.5
    others = np.roll(np.arange(len(scenes)), 1)
    wrong = [filler if talk else said[other] for filler, talk, other in zip(fillers, is_filler, others, strict=True)]
    return [wrong[i] if place[i] < noise else said[i] for i in range(len(scenes))]


def captions_of(scenes: Sequence[Any], seed: int) -> list[str]:
    """Write a caption per clip of what a frame shows, in a captioner's few wordings."""
    from pipeline.demo.grammar import still_text

    rng = np.random.default_rng([seed, 12])
    return [still_text(scene, int(rng.integers(5))) for scene in scenes]


def draw(table: Table) -> Figure:
    """Plot R@1 by loss and level of noise."""
    groups = {
        level: {name: tuple(100 * value for value in table.mean(Arm(name, level), "r1")) for name in VARIANTS}
        for level in NOISE
    }
    return bars(STUDY.title, groups, y_label="R@1 of written queries, percent", label="{:.0f}".format)


NOTES = """## What to make of it

With wrong subtitles V-(S,C) + F-C, the loss that CLIP-ViP adopts, is better than V-S at both levels of noise, by more
at the higher one, and V-S alone is the worst at both. What captions rescue is mostly looks: with the most noise V-S
finds 21 of 100 by looks alone, V-(S,C) + F-C 40. (That was not claimed beforehand.) Among themselves the losses with
captions lie within four points. With the most noise their order is exactly the one claimed, but these seeds do not
settle it. With right subtitles none of them differs from V-S: a narrator's sentence says all that a caption says, and
motion as well.

With 4 seeds everything was undecided. The number of 12 was fixed then, before the other eight were run.

Tried before, with the first seed: held-out clips with different backgrounds instead of the same one, where V-S was
right 95 times in a hundred without noise and 83 times with the most, too close to the top to tell losses apart.
Captions have no mistakes here, which favours every loss that uses them. 40 updates are few, so the result is about
what is learned first."""

STUDY = Study(
    name="losses",
    title="Which loss, when subtitles are wrong",
    question="Which of the losses over videos V, frames F, subtitles S and captions C gives the best retrieval, and "
    "how does that depend on how many subtitles talk about something else?",
    claimed="V-(S,C) + F-C is the loss that CLIP-ViP (arXiv 2209.06430) adopts and its released settings name. That "
    "captions together with subtitles are better than subtitles alone is its ablation as remembered, without "
    "figures.",
    setting="Clips of one scene of the demo world. S is what its narrator says about looks and motion, except for a "
    "share of the clips: half of these have another clip's S, half talk about nothing that is shown. C states "
    "the looks of the middle frame, without mistakes. CLIP-ViP with four proxies starts from the demo's image "
    "model and is post-pretrained with each loss on the same batches. Scores are for retrieving clips of other"
    " scenes, all with the same background, by written sentences, without fine-tuning; nothing is selected by "
    "a score.",
    arms=tuple(Arm(name, level) for level in NOISE for name in VARIANTS),
    metrics={"r1": "looks and motion, R@1", "r5": "looks and motion, R@5", "looks_r1": "looks alone, R@1"},
    claims=tuple(
        Claim(f"{better} > {worse}, {level}", "r1", better, worse, level)
        for level in NOISE
        for better, worse in (
            ("V-(S,C) + F-C", "V-S"),
            ("V-S + V-C", "V-S"),
            ("V-S + V-C + F-C", "V-S + F-C"),
            ("V-(S,C)", "V-S + V-C"),
            ("V-(S,C) + F-C", "V-(S,C)"),
        )
    ),
    sizes={
        "default": Size(),
        "small": Size(num_clips=40, num_test=12, num_frames=2, steps=2),
    },
    run=run,
    draw=draw,
    notes=NOTES,
    num_seeds=12,
)
