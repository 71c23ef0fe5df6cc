"""What decides a CLIP4Clip model beside the CLIP inside. Nothing heavy is imported here."""

from typing import Literal

from pydantic import Field

from clipmill.base.settings import Settings

Head = Literal["meanP", "seqLSTM", "seqTransf", "tightTransf"]
Stem = Literal["2d", "3d"]


class Clip4ClipSettings(Settings):
    """The defaults are those of the published runs (docs/methods/clip4clip.md section 6), but for `frozen_layers`."""

    # How a text is compared with a video's frames: the mean frame; the mean after an LSTM or a transformer over frames;
    # a transformer over text and frames together, run once for every pair.
    head: Head = "meanP"
    stem: Stem = "2d"  # patches of one frame, or of three neighbouring ones (starts as 2d exactly)
    num_layers: int = Field(4, ge=1)  # blocks of the head's transformer (seqTransf, tightTransf)
    # CLIP's first so many blocks, and all of CLIP before and beside the blocks but their last norms, projections and
    # the log scale, stay as they are; 0: the published runs. None: all of CLIP trains.
    frozen_layers: int | None = Field(None, ge=0)
