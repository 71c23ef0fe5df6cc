"""Settings of the caption and score stages. Import nothing heavy here: every command reads this module."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from clipmill.base.settings import Settings, operational, setting

COCA_MODEL, COCA_PRETRAINED = "coca_ViT-L-14", "mscoco_finetuned_laion2b_s13b_b90k"
CLIP_MODEL, CLIP_PRETRAINED = "ViT-B-32", "datacomp_xl_s13b_b90k"

# A captioner is a file and a line here, or MODULE:ATTRIBUTE of any module (docs/captioning.md).
CAPTIONERS = {
    "coca": "captioning.captioners.coca:load",
    "huggingface": "captioning.captioners.huggingface:load",
    "demo": "captioning.demo_models:load_captioner",
}
CaptionerName = Annotated[str, Field(pattern=rf"^({'|'.join(CAPTIONERS)}|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")]


class ModelSettings(Settings):
    """Settings that the caption and score stages share: how to run a model, which does not change its results."""

    # Device of the model. auto: a GPU if torch finds one.
    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    # Images per forward pass: 32 frames of ViT-L fit in 8 GB.
    batch_size: int = operational(32, ge=1, le=4096)
    # CPU threads of torch in each process; null: torch's own choice.
    num_threads: int | None = operational(None, ge=1)
    # Seconds that the model may take for a task, besides those per image, before it counts as hung. Ten minutes are far
    # more than any start.
    timeout_base_s: float = operational(600.0, gt=0)
    # More seconds for each image of the task. 30 leave room for ViT-L with beam search on one CPU core.
    timeout_per_image_s: float = operational(30.0, gt=0)


class CaptionSettings(ModelSettings):
    """Settings of the stage `caption`: the captioner, its model, and the decoding of its text."""

    # coca, huggingface, demo or MODULE:ATTRIBUTE (docs/captioning.md); null: no captions. coca runs on open_clip, which
    # scores need anyway.
    captioner: CaptionerName | None = setting("coca", reaches="runs code", unless="demo|null")
    # The captioner's model: an open_clip name or local-dir:FOLDER for coca, a name or folder for huggingface. The
    # default is the largest CoCa that is published.
    model: str = setting(COCA_MODEL, reaches="loads a model from a file or address", unless=r"[\w-]+")
    # Weights of the model: open_clip's tag, or a local .safetensors or .pt file. The default is fine-tuned on captions.
    # local-dir and captioners other than coca do not use this setting.
    pretrained: str = setting(COCA_PRETRAINED, reaches="reads a file", unless=r"[\w-]+")
    # huggingface only: a commit, tag or branch of the model. A commit makes captions repeatable.
    revision: str | None = None
    # fp32 gives the same captions on CPU and GPU; bf16 and fp16 are faster.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    # Decoding; the defaults of this and the following settings are those of CoCa's authors. top_k with top_k = 1 is
    # greedy and fastest.
    generation: Literal["beam_search", "top_k", "top_p"] = "beam_search"
    # beam_search: number of hypotheses kept; of coca, in all groups.
    num_beams: int = Field(6, ge=1, le=64)
    # beam_search of coca: groups that num_beams is divided into. As in open_clip, groups do not see each other and find
    # the same captions, so num_beams / num_beam_groups hypotheses are kept; it has to divide num_beams.
    num_beam_groups: int = Field(3, ge=1, le=64)
    # top_k: draw among this many of the likeliest tokens; 1 always takes the likeliest.
    top_k: int = Field(1, ge=1)
    # top_p: draw among the likeliest tokens that have this probability together.
    top_p: float = Field(0.1, gt=0, le=1)
    # top_k and top_p: below 1 captions vary less; 1 uses the model's own probabilities.
    temperature: float = Field(1.0, gt=0)
    # Above 1 words that were used become less likely; 1 uses the model's own probabilities.
    repetition_penalty: float = Field(1.0, gt=0)
    # Least number of ids before the end token, the start token included: 5 prevents captions of a word or two.
    min_tokens: int = Field(5, ge=0)
    # Most ids, start and end included, at most as many as the model reads: 30 hold a sentence.
    max_tokens: int = Field(30, ge=3)
    # Seed of top_k and top_p, combined with the frame's hash, so that a frame always gets the same caption.
    seed: int = Field(0, ge=0)

    # Options for a MODULE:ATTRIBUTE captioner, which gets them with these settings; others ignore them.
    # A secret in them is $NAME, an environment variable, or file:PATH.
    options: dict[str, Any] = setting({}, reaches="tells other code what to do", secret=True)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_tokens >= self.max_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens} must be below max_tokens = {self.max_tokens}")
        if self.captioner == "coca" and self.generation == "beam_search" and self.num_beams % self.num_beam_groups:
            raise ValueError(f"num_beam_groups = {self.num_beam_groups} must divide num_beams = {self.num_beams}")
        if self.captioner == "demo" and (self.model, self.pretrained) != (COCA_MODEL, COCA_PRETRAINED):
            raise ValueError("captioner = demo has its own model: leave out model and pretrained, or set captioner")
        if self.captioner == "huggingface" and self.model == COCA_MODEL:
            raise ValueError("captioner = huggingface needs model: a model's name or its local folder")
        return self

    @property
    def samples(self) -> bool:
        """Return whether tokens are drawn at random; frames are then captioned one by one, each with its own seed."""
        return self.generation == "top_p" or (self.generation == "top_k" and self.top_k > 1)


class ScoreSettings(ModelSettings):
    """Settings of the stage `score`: the model that compares frames and texts."""

    # Name of an open_clip model, local-dir:FOLDER, or demo for the demo world's model; null: no scores. ViT-B-32 is
    # the fastest of the usual CLIP models.
    model: str | None = setting(CLIP_MODEL, reaches="loads a model from a file or address", unless=r"[\w-]+")
    # Weights of the model: open_clip's tag, or a local .safetensors or .pt file. local-dir and demo do not use it.
    pretrained: str = setting(CLIP_PRETRAINED, reaches="reads a file", unless=r"[\w-]+")
    # fp32 gives the same scores on CPU and GPU to five decimals; bf16 and fp16 are faster.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model == "demo" and self.pretrained != CLIP_PRETRAINED:
            raise ValueError("model = demo has its own weights: leave out pretrained, or set model")
        return self
