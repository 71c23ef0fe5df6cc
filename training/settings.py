"""All settings of a training run, in sections; recipes and `--set section.key=value` as for a corpus.

Nothing heavy is imported here, so that the command line can name every setting quickly: losses and methods are known by
name, and their code is imported when a run begins.
"""

from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from clipmill.base.plugins import PLUGIN
from clipmill.base.settings import Settings, operational, resolve_settings
from training.losses import LOSSES, load_loss, losses_that
from training.models.registry import ModelSettings, load_method

Decay = Literal["cosine", "linear", "invsqrt", "constant", "clip4clip"]
Update = Literal["adamw", "clip_vip", "clip4clip"]
Group = Literal["video", "duplicate"]
TextColumn = Literal["subtitle", "caption", "texts"]
Metric = Literal["t2v_r1", "t2v_r5", "t2v_r10", "v2t_r1", "v2t_r5", "v2t_r10"]
Round = Annotated[int, Field(ge=1)]


class DataSettings(Settings):
    """Which clips a run sees, and what it sees of each."""

    where: str = ""  # SQL condition on `catalog`, or a SELECT with a clip_id column; empty: every sample
    # Boundaries that `clipmill edit` gave clips: of its last round that held, of a round (its number), or none; of
    # another than the newest editing as "EDITING:accepted", "EDITING:3".
    edits: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^(none|(e[0-9a-f]+:)?(accepted|\d+))$")] = (
        "none"
    )
    # Clips that may never be in one batch, where they would be each other's negatives: those of one video, those of one
    # near-duplicate group.
    apart: tuple[Group, ...] = ("video", "duplicate")
    unmet: Literal["error", "keep"] = "keep"  # where no order can part them: stop, or count them and go on
    tail: Literal["drop", "pad", "carry"] = (
        "drop"  # clips of an epoch that do not fill a batch: see training/data/epoch_plan.py
    )
    seed: int = 0  # of the order and of which frames are taken
    block_size: int = Field(1, ge=1)  # neighbours in a shard that stay together: longer reads, less shuffle
    window_steps: int = Field(64, ge=1)  # steps over which blocks are mixed

    num_frames: int = Field(12, ge=1)  # per clip
    # So many are looked at a second, from the first on; where that is more than num_frames, num_frames of them evenly,
    # where it is fewer, the rest is empty and the model is told so (CLIP4Clip). None: num_frames evenly over the clip.
    frames_per_s: float | None = Field(None, gt=0)
    jitter: bool = True  # draw the first and the last frame near the clip's ends; False: always the same frames
    still: Literal["middle", "captioned"] = "middle"  # frame F: frame floor(N/2) of the clip, or the sample's JPEG
    fit: Literal["squash", "crop"] = "squash"  # to a square: as published, or keeping the aspect and cutting the middle
    antialias: bool = True  # of the bicubic resize
    max_text_tokens: int = Field(70, ge=3)  # both ends included; longer texts are cut
    # Which text is S in the losses: what is said, the caption, or one of a benchmark's reference texts, drawn at every
    # visit.
    subtitle: TextColumn = "subtitle"
    # For train.loss = mil_nce: the subtitles of so many clips of the video before and behind are right answers, too,
    # because what is said is often seen a little earlier or later.
    neighbours: int = Field(0, ge=0, le=10)

    max_failures: float = operational(0.01, ge=0, le=1)  # share of unreadable samples above which the run stops
    loader_processes: int | None = operational(None, ge=0)  # per training process; None: one per core, shared fairly
    prefetch_samples: int = operational(256, ge=1)  # decoded ahead, per training process
    cache_dir: str | None = operational(None)  # where pieces of remote shards are kept; None: not kept
    cache_bytes: int = operational(50_000_000_000, ge=0)


class TrainSettings(Settings):
    """The optimisation."""

    batch_size: int = Field(1024, ge=1)  # global: over all processes
    max_steps: int | None = Field(None, ge=1)  # updates in all; None: `epochs` decides
    epochs: float = Field(5, gt=0)
    # What is compared with what: v video, s subtitle, c caption, f still frame; mil_nce: a video with the subtitles of
    # its neighbours, too. Or MODULE:ATTRIBUTE, a `training.losses.Loss` of your own.
    loss: Literal[tuple(LOSSES)] | Annotated[str, Field(pattern=PLUGIN)] = "vsc_fc"
    # On the device, the same for all frames of a clip; none as published. "flip" is not for texts that say left or
    # right.
    augment: tuple[Literal["flip", "brightness", "contrast"], ...] = ()
    chunk_size: int | None = operational(
        None, ge=1
    )  # samples a process encodes at a time (gradient caching); None: all

    lr: float = Field(5e-6, gt=0)  # at the peak
    lr_factors: dict[str, float] = {}  # by prefix of a parameter's name, e.g. {"logit_scale": 10}
    warmup_ratio: float = Field(0.01, ge=0, le=1)
    decay: Decay = "cosine"
    weight_decay: float = Field(0.05, ge=0)
    published_decay: bool = False  # True: decay norms and embeddings too, as the released code does
    update: Update = "adamw"  # torch's AdamW, or what the released code of one of the methods does instead
    grad_clip: float | None = Field(5.0, gt=0)  # norm of the whole gradient; None: not clipped
    ema: float | None = Field(None, gt=0, lt=1)  # decay of averaged weights, kept beside the trained; None: none

    precision: Literal["fp32", "bf16"] = "bf16"  # of the matrix products; weights and updates are fp32
    compile: bool = operational(False)
    activation_checkpointing: bool = operational(False)
    parallel: Literal["ddp", "fsdp"] = operational("ddp")  # several processes: copies of the model, or shards (FSDP2)
    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    threads: int | None = operational(None, ge=1)  # of a process on the CPU; None: cores / processes

    checkpoint_every: int = operational(500, ge=1)  # steps
    keep_checkpoints: int = operational(3, ge=1)  # the latest so many
    log_every: int = operational(10, ge=1)  # steps
    tensorboard: bool = operational(True)
    feedback: bool = operational(False)  # write feedback.parquet: each clip's similarity, loss and times seen
    peak_tflops: float | None = operational(None, gt=0)  # of one device, for MFU; None: known GPUs, measured on a CPU


class EvalSettings(Settings):
    """Retrieval on clips held out from training."""

    where: str = ""  # as `data.where`; empty: no evaluation during training
    # Steps, or "epoch", or "5 epochs"; before the first and after the last step in any case. None: only then.
    every: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^(epoch|[1-9]\d* epochs)$")] | None = None
    # Where `every` is given: the evaluation that says which checkpoint stays as the best, by this recall, of equals the
    # earlier. Never one on a benchmark's split "test". None: it is only watched.
    select: Metric | None = "t2v_r1"
    text: TextColumn = "subtitle"  # what a clip is searched by; of "texts" by each
    overlap: Literal["error", "exclude", "allow"] = "error"  # training clips of its videos or their near-duplicates
    batch_size: int = operational(32, ge=1)

    @property
    def selects(self) -> bool:
        """Tell whether evaluations decide which checkpoint is the best."""
        return bool(self.where.strip()) and self.every is not None and self.select is not None

    @property
    def every_epochs(self) -> int | None:
        """Return the number of epochs where `every` counts them, else None."""
        return int(self.every.split()[0].replace("epoch", "1")) if isinstance(self.every, str) else None


class RunSettings(Settings):
    model: SerializeAsAny[ModelSettings] = ModelSettings()  # with the section of a method from outside, if it has one
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()

    @model_validator(mode="after")
    def _pace_fits(self) -> "RunSettings":
        if self.data.frames_per_s is None:
            return self
        if not load_method(self.model.method).takes_frames_per_s(self.model):
            raise ValueError(
                f"data.frames_per_s = {self.data.frames_per_s} leaves frames empty, which model.method = "
                f"{self.model.method} cannot leave out; allowed: model.method = clip4clip, or unipt with "
                "model.pooling = mean"
            )
        if self.data.jitter:
            raise ValueError("data.frames_per_s says which frames are taken; allowed with it: data.jitter = false")
        return self

    @model_validator(mode="after")
    def _neighbours_fit(self) -> "RunSettings":
        data = self.data
        if not data.neighbours:
            return self
        if not load_loss(self.train.loss).takes_neighbours:
            losses = " or ".join(losses_that("takes_neighbours"))
            raise ValueError(f"data.neighbours = {data.neighbours} is for train.loss = {losses}; allowed here: 0")
        if data.subtitle != "subtitle":
            raise ValueError(f"data.neighbours is of what is said; allowed with data.subtitle = {data.subtitle}: 0")
        if "video" not in data.apart:
            raise ValueError(
                "data.neighbours: a clip's text is a neighbour's, too; allowed: data.apart with video in it"
            )
        return self


RECIPES = resources.files("training").joinpath("recipes")


def resolve(base: dict[str, Any] | None, recipe: str | None, assignments: list[str]) -> RunSettings:
    """Resolve settings: a recipe (else `base`, a run's saved ones, else the defaults) with `--set` on top.

    Raises UserError.
    """
    return resolve_settings(RunSettings, RECIPES, base, recipe, assignments)
