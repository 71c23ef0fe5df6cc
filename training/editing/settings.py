"""Settings of editing clip boundaries. Nothing heavy is imported here.

The paper's own numbers are not known to us (docs/methods/video_editing.md): where a default is not that file's
proposal, docs/video_editing.md has the measurement that chose it.
"""

from typing import Literal

from pydantic import Field, model_validator

from clipmill.base.settings import Settings, operational


class EditSettings(Settings):
    # Clips from single timestamps: from the midpoint between neighbours to the next, or a fixed length around each. Not
    # for a corpus, whose clips have boundaries already.
    initial: Literal["midpoint", "fixed"] = "midpoint"
    half_length_s: float = Field(10.0, gt=0)  # of a fixed clip; of the only clip of a video, either way

    min_length_s: float = Field(2.0, gt=0)
    max_length_s: float = Field(60.0, gt=0)
    max_overlap: float = Field(0.5, ge=0, le=1)  # with a neighbour, as a share of the shorter of the two

    # A boundary moves by this share of the clip's length, at least by step_s; halved after a round that failed.
    step_ratio: float = Field(0.1, gt=0)
    step_s: float = Field(0.5, gt=0)
    smallest_step_s: float = Field(0.25, gt=0)  # editing ends when step_s has been halved below this
    rings: Literal[1, 2] = 1  # 2: also the moves by twice the step

    length_weight: float = Field(0.02, ge=0)  # what a clip's score loses per e-fold of change from its first length
    min_gain: float = Field(0.01, ge=0)  # an edit must raise the score by more than this
    lowest_share: float = Field(1.0, gt=0, le=1)  # edits only the clips that score lowest: this share of them
    bank_size: int = Field(512, ge=0)  # captions of other videos that a clip's own is measured against; 0: none
    same_caption: float = Field(0.95, gt=0, le=1)  # captions with a larger cosine say the same: not measured against

    # What the teacher sees of a video, and how far from its first boundaries a clip may go at most.
    frames_per_s: float = Field(2.0, gt=0, le=60)
    margin_s: float = Field(4.0, ge=0)

    # Where a model's video is more than the mean of its frames: so many of a clip's candidates, the best by their
    # frames, are encoded as videos, and so are the present boundaries. 0: frames decide.
    reencode: int = Field(2, ge=0)

    holdout: float = Field(0.1, gt=0, lt=1)  # share of videos held out for validation where no split says which
    folds: Literal[1, 2] = 1  # 2: each half of the videos is edited by a teacher trained on the other half
    epochs: float = Field(1.0, gt=0)  # that the student trains in a round

    # Where a backend trains from nothing; a corpus's teacher has been trained before.
    warmup_patience: int = Field(2, ge=1)  # evaluations without a rise that end the warm-up
    max_warmup_epochs: int = Field(20, ge=1)
    max_rounds: int = operational(10, ge=1)
    patience: int = Field(3, ge=1)  # rounds without improvement that end the editing
    # A round that leaves the median length further than this from the first clips', or more than this share of clips
    # newly at a limit, is taken back and ends the editing. None: not watched (fixed clips are meant to change a lot).
    max_median_change: float | None = Field(0.3, gt=0)
    max_share_at_limit: float | None = Field(0.4, gt=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> "EditSettings":
        if self.min_length_s > self.max_length_s:
            raise ValueError(f"min_length_s {self.min_length_s} is above max_length_s {self.max_length_s}")
        return self
