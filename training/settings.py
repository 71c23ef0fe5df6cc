"""Sections data, train and eval of a training run's settings; `training.run.settings` joins all sections.

Nothing heavy is imported here, so that the command line starts quickly.
"""

from typing import Annotated, Literal

from pydantic import Field

from clipmill.base.plugins import PLUGIN
from clipmill.base.settings import Settings, operational

Decay = Literal["cosine", "linear", "invsqrt", "constant", "clip4clip"]
Update = Literal["adamw", "clip_vip", "clip4clip"]
Group = Literal["video", "duplicate"]
TextColumn = Literal["subtitle", "caption", "texts"]
Metric = Literal["t2v_r1", "t2v_r5", "t2v_r10", "v2t_r1", "v2t_r5", "v2t_r10"]
Round = Annotated[int, Field(ge=1)]
LossName = Annotated[str, Field(pattern=rf"^\w+$|{PLUGIN}")]  # `training.losses` has the names


class DataSettings(Settings):
    """Clips of a run, and the frames and texts of each."""

    # Clips to train on: an SQL condition on `catalog`, or a SELECT with a clip_id column. Empty: every sample.
    where: str = ""
    # Name of the pack whose shards are read (`clipmill run pack --name NAME`). Empty: the main pack.
    pack: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9-]{0,63})?$")] = ""
    # Boundaries from `clipmill edit`: "none", "accepted" (the last round that was kept) or a round's number, of the
    # newest editing; "EDITING:accepted" or "EDITING:3" name another one.
    edits: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^(none|(e[0-9a-f]+:)?(accepted|\d+))$")] = (
        "none"
    )
    # Clips that must not be in one batch, because they would be false negatives: those of one video, and those of one
    # near-duplicate group.
    apart: tuple[Group, ...] = ("video", "duplicate")
    # If no order can separate such clips: stop with an error, or keep them in one batch and count them.
    unmet: Literal["error", "keep"] = "keep"
    # Clips at the end of an epoch that do not fill a batch: drop them, pad the batch, or carry them to the next epoch.
    tail: Literal["drop", "pad", "carry"] = "drop"
    # Seed of the order of clips and of the choice of frames.
    seed: int = 0
    # Neighbouring clips of a shard that stay together in the order: more means longer reads and less shuffling.
    block_size: int = Field(1, ge=1)
    # Steps over which blocks are shuffled.
    window_steps: int = Field(64, ge=1)

    # Frames of a clip that the model sees.
    num_frames: int = Field(12, ge=1)
    # Frames per second to take from the start of the clip (CLIP4Clip). If they are more than num_frames, num_frames of
    # them evenly; if fewer, the rest is empty and masked. None: num_frames spread evenly over the clip.
    frames_per_s: float | None = Field(None, gt=0)
    # Draw the first and the last frame near the ends of the clip; false: the same frames at every visit.
    jitter: bool = True
    # The still frame F of the losses: frame floor(N/2) of the clip, or the sample's captioned JPEG.
    still: Literal["middle", "captioned"] = "middle"
    # Fit frames to the model's square: squash them, as published, or crop the middle and keep the aspect ratio.
    fit: Literal["squash", "crop"] = "squash"
    # Antialias the bicubic resize of frames.
    antialias: bool = True
    # Tokens of a text, both ends included; longer texts are cut.
    max_text_tokens: int = Field(70, ge=3)
    # Text S of the losses: the subtitle, the caption, or one of a benchmark's reference texts, drawn at every visit.
    subtitle: TextColumn = "subtitle"
    # For losses that take neighbours (mil_nce): the subtitles of this many clips before and after in the video count as
    # right answers too, because speech often comes a little before or after its picture.
    neighbours: int = Field(0, ge=0, le=10)

    # DuckDB's memory limit while clips are selected and frozen. Tables beyond it go to a folder in the run meanwhile.
    select_memory: str = operational("2GB", pattern=r"^\d+(MB|GB)$")
    # Share of unreadable samples above which the run stops.
    max_failures: float = operational(0.01, ge=0, le=1)
    # Loader processes per training process; 0: read in the training process. None: one per core, shared evenly.
    loader_processes: int | None = operational(None, ge=0)
    # Samples decoded ahead, per training process.
    prefetch_samples: int = operational(256, ge=1)
    # Folder that caches pieces of remote shards; None: no cache.
    cache_dir: str | None = operational(None)
    # Largest size of that cache in bytes.
    cache_bytes: int = operational(50_000_000_000, ge=0)


class TrainSettings(Settings):
    """Loss, optimiser and hardware of a run."""

    # Clips per update, over all processes.
    batch_size: int = Field(1024, ge=1)
    # Updates in all; None: `epochs` decides.
    max_steps: int | None = Field(None, ge=1)
    # Passes over the selected clips; fractions are allowed.
    epochs: float = Field(5, gt=0)
    # Loss, named by the pairs that it compares: v video, s subtitle, c caption, f still frame. vs, vs_fc, vs_vc,
    # vs_vc_fc, vsc, vsc_fc, joint; mil_nce also takes neighbours' subtitles; or MODULE:ATTRIBUTE, your own
    # `training.losses.Loss`.
    loss: LossName = "vsc_fc"
    # Augmentations on the device, the same for all frames of a clip; none, as published. Leave "flip" out if texts say
    # left or right.
    augment: tuple[Literal["flip", "brightness", "contrast"], ...] = ()
    # Samples that a process encodes at a time (gradient caching): less memory, the same gradients. None: all.
    chunk_size: int | None = operational(None, ge=1)

    # Learning rate at its peak.
    lr: float = Field(5e-6, gt=0)
    # Factors of the learning rate by prefix of a parameter's name, e.g. {"logit_scale": 10}.
    lr_factors: dict[str, float] = {}
    # Share of the steps over which the learning rate rises to its peak.
    warmup_ratio: float = Field(0.01, ge=0, le=1)
    # Curve of the learning rate after the warm-up.
    decay: Decay = "cosine"
    # Decoupled weight decay, on weight matrices only (see published_decay).
    weight_decay: float = Field(0.05, ge=0)
    # Decay norms and embeddings too, as the released code does.
    published_decay: bool = False
    # Update rule: torch's AdamW, or that of a method's released code.
    update: Update = "adamw"
    # Clip the gradient to this norm; None: not clipped. The gradient is that of the whole batch's loss, the sum of both
    # directions. CLIP4Clip's and UniPT's released code halves this loss and divides its gradient by the number of GPUs
    # before it clips, so its norm of 1.0 is 2 x GPUs here.
    grad_clip: float | None = Field(5.0, gt=0)
    # Norm to which update = clip4clip clips the gradient of each parameter alone. The released 1.0 is 2 x GPUs here, as
    # for grad_clip.
    parameter_clip: float = Field(1.0, gt=0)
    # Decay of averaged weights (EMA), kept beside the trained ones; None: no average.
    ema: float | None = Field(None, gt=0, lt=1)

    # Precision of matrix products; weights and updates are fp32.
    precision: Literal["fp32", "bf16"] = "bf16"
    # Compile the model with torch.compile: slower to start, faster steps.
    compile: bool = operational(False)
    # Recompute activations in the backward pass: less memory, slower steps.
    activation_checkpointing: bool = operational(False)
    # Several processes: each a copy of the model (ddp), or each a part of it (fsdp, FSDP2).
    parallel: Literal["ddp", "fsdp"] = operational("ddp")
    # Device of a process; auto takes a GPU if there is one.
    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    # CPU threads of a process on the CPU; None: cores divided by processes.
    threads: int | None = operational(None, ge=1)

    # Join a Ray cluster without token authentication too: whoever reaches its ports can run code on all its nodes.
    allow_open_cluster: bool = operational(False)
    # Restarts of a run under Ray Train after deaths of its processes or nodes; limited, because the run itself may be
    # what kills them. 0: none. -1: any number.
    max_restarts: int = operational(3, ge=-1)
    # Steps between checkpoints.
    checkpoint_every: int = operational(500, ge=1)
    # Latest checkpoints to keep; the best one is kept besides.
    keep_checkpoints: int = operational(3, ge=1)
    # Steps between lines of the log.
    log_every: int = operational(10, ge=1)
    # Write TensorBoard files.
    tensorboard: bool = operational(True)
    # Write feedback.parquet: each clip's similarities, loss, and how often it was seen.
    feedback: bool = operational(False)
    # Peak TFLOP/s of one device, for MFU; None: known for common GPUs, measured on a CPU.
    peak_tflops: float | None = operational(None, gt=0)


class EvalSettings(Settings):
    """Retrieval on clips held out from training."""

    # Clips to evaluate on, as in `data.where`. Empty: no evaluation during training.
    where: str = ""
    # Steps between evaluations, "epoch", or "5 epochs", besides those before the first and after the last step. None:
    # only these two.
    every: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^(epoch|[1-9]\d* epochs)$")] | None = None
    # Recall that chooses the best checkpoint if `every` is given; the earlier of equal steps wins. Clips of a split
    # "test" are refused. None: evaluations choose nothing.
    select: Metric | None = "t2v_r1"
    # Text that retrieves a clip; "texts": each reference text is a query.
    text: TextColumn = "subtitle"
    # Training clips of evaluated videos or of their near-duplicates: stop, leave them out of training, or allow them.
    overlap: Literal["error", "exclude", "allow"] = "error"
    # Clips encoded at a time.
    batch_size: int = operational(32, ge=1)

    @property
    def selects(self) -> bool:
        """Return True if evaluations choose the best checkpoint."""
        return bool(self.where.strip()) and self.every is not None and self.select is not None

    @property
    def every_epochs(self) -> int | None:
        """Return the number of epochs between evaluations, None if `every` counts steps."""
        return int(self.every.split()[0].replace("epoch", "1")) if isinstance(self.every, str) else None
