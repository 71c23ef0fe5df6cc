"""Settings of the caption and score stages. Nothing heavy is imported here: every command reads this module."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from clipmill.base.settings import Settings, operational

COCA_MODEL, COCA_PRETRAINED = "coca_ViT-L-14", "mscoco_finetuned_laion2b_s13b_b90k"
CLIP_MODEL, CLIP_PRETRAINED = "ViT-B-32", "datacomp_xl_s13b_b90k"

CaptionerName = Annotated[str, Field(pattern=r"^(coca|huggingface|demo|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")]


class ModelSettings(Settings):
    """What the caption and score stages share: how a model is run, which changes no result."""

    device: Literal["auto", "cpu", "cuda"] = operational("auto")  # auto: a GPU where there is one
    batch_size: int = operational(32, ge=1, le=4096)  # images per forward pass: 32 frames of ViT-L fit in 8 GB
    num_threads: int | None = operational(None, ge=1)  # CPU threads of torch in this process; None: as torch chose
    # The model may take this long for a piece of work, and so much for each image of it, before it counts as hung.
    timeout_base_s: float = operational(600.0, gt=0)
    timeout_per_image_s: float = operational(30.0, gt=0)


class CaptionSettings(ModelSettings):
    # coca | huggingface | demo | MODULE:ATTRIBUTE (see docs/captioning.md); None: no captions
    captioner: CaptionerName | None = "coca"
    model: str = COCA_MODEL  # open_clip name, local-dir:FOLDER; for huggingface a name or folder
    pretrained: str = COCA_PRETRAINED  # open_clip tag, or a local .safetensors/.pt file; unused by local-dir and others
    revision: str | None = None  # huggingface only: commit, tag or branch; a commit makes captions repeatable
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # fp32 gives the same captions on CPU and GPU; bf16 is faster

    # Decoding. The values are those CoCa's authors generate with.
    generation: Literal["beam_search", "top_k", "top_p"] = "beam_search"  # top_k with top_k=1 is greedy, and fastest
    num_beams: int = Field(6, ge=1, le=64)  # beam_search: hypotheses kept
    num_beam_groups: int = Field(3, ge=1, le=64)  # beam_search of coca: diverse groups; must divide num_beams
    top_k: int = Field(1, ge=1)  # top_k: draw among this many likeliest tokens
    top_p: float = Field(0.1, gt=0, le=1)  # top_p: draw among the likeliest tokens that hold this probability
    temperature: float = Field(1.0, gt=0)  # top_k, top_p: below 1 is less varied
    repetition_penalty: float = Field(1.0, gt=0)  # above 1 avoids words that were said; 1 leaves the model alone
    min_tokens: int = Field(5, ge=0)  # ids before the end token, the start token included
    max_tokens: int = Field(30, ge=3)  # ids in all, start and end included, and no more than the model reads
    seed: int = Field(0, ge=0)  # with the frame's hash it seeds what is drawn, so a frame is always captioned alike

    options: dict[str, Any] = {}  # passed on to a MODULE:ATTRIBUTE captioner

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_tokens >= self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} must be below max_tokens {self.max_tokens}")
        if self.captioner == "coca" and self.generation == "beam_search" and self.num_beams % self.num_beam_groups:
            raise ValueError(f"num_beam_groups {self.num_beam_groups} must divide num_beams {self.num_beams}")
        if self.captioner == "demo" and (self.model, self.pretrained) != (COCA_MODEL, COCA_PRETRAINED):
            raise ValueError("the demo captioner has one model: leave model and pretrained out, or set captioner")
        if self.captioner == "huggingface" and self.model == COCA_MODEL:
            raise ValueError("captioner huggingface needs model: a model's name or its local folder")
        return self

    @property
    def samples(self) -> bool:
        """Whether chance decides what is written: then frames are captioned one by one, each with its own seed."""
        return self.generation == "top_p" or (self.generation == "top_k" and self.top_k > 1)


class ScoreSettings(ModelSettings):
    # Any open_clip model's name, local-dir:FOLDER, or demo: the demo world's own; None: no scores.
    model: str | None = CLIP_MODEL
    pretrained: str = CLIP_PRETRAINED  # open_clip tag, or a local .safetensors/.pt file; unused by local-dir and demo
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # fp32 gives the same scores on CPU and GPU to five decimals

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model == "demo" and self.pretrained != CLIP_PRETRAINED:
            raise ValueError("the demo model has one set of weights: leave pretrained out, or set model")
        return self
