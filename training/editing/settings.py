"""Settings of editing clip boundaries. Nothing heavy is imported here.

The paper does not publish its numbers (docs/methods/video_editing.md): defaults are that file's proposals, or were
chosen by measurements in docs/video_editing.md.
"""

from typing import Literal

from pydantic import Field, model_validator

from clipmill.base.settings import Settings, operational


class EditSettings(Settings):
    # First boundaries of clips from single timestamps: the midpoints between neighbours, or a fixed length around each.
    # Not for a corpus, whose clips already have boundaries.
    initial: Literal["midpoint", "fixed"] = "midpoint"
    # Half the length in seconds of a fixed clip, and of the only clip of a video. Not for a corpus.
    half_length_s: float = Field(10.0, gt=0)

    # Least length of an edited clip, in seconds.
    min_length_s: float = Field(2.0, gt=0)
    # Largest length of an edited clip, in seconds.
    max_length_s: float = Field(60.0, gt=0)
    # Largest overlap of an edited clip with a neighbour, as a share of the shorter of the two.
    max_overlap: float = Field(0.5, ge=0, le=1)

    # Share of the clip's length by which a boundary moves; halved after a round that is rolled back.
    step_ratio: float = Field(0.1, gt=0)
    # Least distance in seconds by which a boundary moves; halved like step_ratio.
    step_s: float = Field(0.5, gt=0)
    # Editing ends when step_s has been halved below this.
    smallest_step_s: float = Field(0.25, gt=0)
    # Candidates of a clip: moves by one step (1), or by one and two steps (2).
    rings: Literal[1, 2] = 1

    # Cost in score per e-fold of change from the clip's first length.
    length_weight: float = Field(0.02, ge=0)
    # Gain in score that an edit must exceed.
    min_gain: float = Field(0.01, ge=0)
    # Share of clips that a round may edit: those with the lowest scores.
    lowest_share: float = Field(1.0, gt=0, le=1)
    # Captions of other videos that a clip is compared with; 0: none, the score is the cosine with its own caption.
    bank_size: int = Field(512, ge=0)
    # Captions with a larger cosine to a clip's own caption mean the same and are not compared with.
    same_caption: float = Field(0.95, gt=0, le=1)

    # Frames per second of video that the teacher encodes.
    frames_per_s: float = Field(2.0, gt=0, le=60)
    # Largest distance in seconds of a boundary from its first position, outwards.
    margin_s: float = Field(4.0, ge=0)

    # For a model whose video vector is not just the mean of its frames: number of a clip's best candidates by frames
    # that are encoded as videos, besides the current boundaries. 0: frames decide.
    reencode: int = Field(2, ge=0)

    # Share of videos held out for validation if no split is marked for it.
    holdout: float = Field(0.1, gt=0, lt=1)
    # 2: a teacher trained on one half of the videos edits the other half. 1: one teacher edits all.
    folds: Literal[1, 2] = 1
    # Epochs that the student trains in a round.
    epochs: float = Field(1.0, gt=0)

    # Evaluations without improvement that end the warm-up. Not for a corpus, whose teacher is already trained.
    warmup_patience: int = Field(2, ge=1)
    # Most epochs of the warm-up. Not for a corpus.
    max_warmup_epochs: int = Field(20, ge=1)
    # Most rounds of an editing.
    max_rounds: int = operational(10, ge=1)
    # Consecutive rounds without improvement that end the editing.
    patience: int = Field(3, ge=1)
    # Largest relative change of the median length from the first boundaries; a round that exceeds it is reverted and
    # ends the editing. None: no limit, for fixed clips, which are expected to change a lot.
    max_median_change: float | None = Field(0.3, gt=0)
    # Largest share of clips that editing may move to a limit of length or position; a round that exceeds it is reverted
    # and ends the editing. None: no limit.
    max_share_at_limit: float | None = Field(0.4, gt=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> "EditSettings":
        if self.min_length_s > self.max_length_s:
            raise ValueError(f"min_length_s {self.min_length_s} is above max_length_s {self.max_length_s}: lower it")
        return self
