"""Study c: the gain after fine-tuning from post-pretraining on more clips."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from bench.studies.study import Arm, Claim, Study, Table
from training.run.plots import lines

NUM_CLIPS = {"none": 0, "25 clips": 25, "100 clips": 100, "400 clips": 400}  # by arm: the first clips of the world


@dataclass(frozen=True)
class Size:
    """The amount of work."""

    num_frames: int = 3
    seconds: float = 2.4
    batch_size: int = 16
    steps: int = 60  # of post-pretraining, for any number of clips
    num_tuned: int = 48  # clips with a written text to fine-tune on
    tuning_steps: int = 20
    num_test: int = 150
    noise: float = 0.3  # share of wrong subtitles
    lr: float = 3e-4
    tuning_lr: float = 1e-4


def run(arm: Arm, seed: int, size: Size, cache: Path) -> Mapping[str, float]:
    """Post-pretrain on an arm's clips, fine-tune, and score."""
    from bench.studies.fitting import fit, random_batches, settings_of, written_scores, written_texts
    from bench.studies.losses import captions_of, noisy_subtitles
    from bench.studies.scenes import alike_scenes, frames_of, single_scenes
    from training.models import registry as models
    from training.models.registry import ModelSettings

    model = models.load(ModelSettings(init="demo", num_added=3, num_times=12, pooling="proxy"), seed=seed)
    shape = size.num_frames, model.config.image_size, size.seconds, cache
    held_out = alike_scenes(size.num_test, [seed, 3])
    held_out_frames = frames_of(held_out, *shape)
    if num := NUM_CLIPS[arm.name]:
        scenes = single_scenes(max(NUM_CLIPS.values()), [seed, 2])
        subtitles, captions = noisy_subtitles(scenes, size.noise, seed)[:num], captions_of(scenes, seed)[:num]
        batches = random_batches(subtitles, captions, size.batch_size)
        fit(model, frames_of(scenes[:num], *shape), batches, settings_of("vsc_fc", size.steps, size.lr), seed)
    before = written_scores(model, held_out, held_out_frames)
    tuned = single_scenes(size.num_tuned, [seed, 4])
    batches = random_batches(written_texts(tuned), [None] * len(tuned), size.batch_size)
    fit(model, frames_of(tuned, *shape), batches, settings_of("vs", size.tuning_steps, size.tuning_lr), seed)
    after = written_scores(model, held_out, held_out_frames)
    return {"tuned_r1": after["r1"], "tuned_r5": after["r5"], "zero_shot_r1": before["r1"]}


def draw(table: Table) -> Figure:
    """Plot the scores over the number of clips."""
    headings = {"tuned_r1": "after fine-tuning", "zero_shot_r1": "before fine-tuning"}
    some = {name: num for name, num in NUM_CLIPS.items() if num}
    series = {
        heading: [(num, *(100 * value for value in table.mean(Arm(name), metric))) for name, num in some.items()]
        for metric, heading in headings.items()
    }
    marks = {
        f"no post-pretraining, {heading}": 100 * table.mean(Arm("none"), metric)[0]
        for metric, heading in headings.items()
    }
    x_label, y_label = "clips post-pretrained on", "R@1 of written queries, percent"
    return lines(STUDY.title, series, x_label=x_label, y_label=y_label, from_zero=True, log_x=True, marks=marks)


NOTES = """## What to make of it

Post-pretraining on 400 clips is worth it, and the means rise with every step, though the single steps are not settled.
The claim that small sets do harm is not confirmed, nor is its opposite. The image model knows the looks of this world
already, so post-pretraining adds little besides settling the new proxies. 60 updates are too few to overfit 25 clips:
400 clips are seen two or three times each, 25 clips nearly forty times. The galleries of the seeds differ more than
the arms do.

With 5 seeds all four claims were undecided. The number of 12 was fixed then, before the other seven were run.

Tried with the first seed: held-out clips with different backgrounds instead of the same one, where nine of ten answers
are right whatever the training (none 96, 25 clips 97 after fine-tuning); then, with one background, 80 updates at a
learning rate of 1e-3, where 400 clips reach 40.0 after fine-tuning and 25 clips 36.0, both below the result of the
lower rate. More updates on more clips may decide it; they were not tried."""

STUDY = Study(
    name="corpus-size",
    title="How many clips to post-pretrain on",
    question="Does a fine-tuned model gain from post-pretraining on more clips, and can too few do harm?",
    claimed="For the same number of updates, small sets overfit and degrade, and only a large one holds (CLIP-ViP's "
    "scaling experiment with WebVid-2.5M, HD-VILA-10M and HD-VILA-100M, as secondary sources report it).",
    setting="As in the study of losses, with V-(S,C) + F-C and some of the subtitles wrong. CLIP-ViP starts from the "
    "demo's image model, is post-pretrained for the same number of updates on the first N clips of a world, "
    "and is then fine-tuned with V-S on a few clips with written sentences. Scores are for retrieving clips of"
    " other scenes, all with the same background, by written sentences; nothing is selected by a score.",
    arms=tuple(Arm(name) for name in NUM_CLIPS),
    metrics={
        "tuned_r1": "fine-tuned, R@1",
        "tuned_r5": "fine-tuned, R@5",
        "zero_shot_r1": "before fine-tuning, R@1",
    },
    claims=(
        Claim("400 clips > 100 clips", "tuned_r1", "400 clips", "100 clips"),
        Claim("100 clips > 25 clips", "tuned_r1", "100 clips", "25 clips"),
        Claim("400 clips > none", "tuned_r1", "400 clips", "none"),
        Claim("none > 25 clips", "tuned_r1", "none", "25 clips"),
    ),
    sizes={
        "default": Size(),
        "small": Size(steps=2, tuning_steps=2, num_tuned=16, num_test=12, num_frames=2),
    },
    run=run,
    draw=draw,
    notes=NOTES,
    num_seeds=12,
)
