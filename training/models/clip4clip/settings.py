"""Settings of a CLIP4Clip model on top of a CLIP. Nothing heavy is imported here."""

from typing import Literal

from pydantic import Field

from clipmill.base.settings import Settings

Head = Literal["meanP", "seqLSTM", "seqTransf", "tightTransf"]
Stem = Literal["2d", "3d"]


class Clip4ClipSettings(Settings):
    """Head, stem and frozen layers; all defaults but `frozen_layers` are published (docs/methods/clip4clip.md, 6)."""

    # Head that compares a text with the frames of a video. meanP: the mean frame. seqLSTM, seqTransf: the mean after an
    # LSTM or a transformer over frames. tightTransf: a transformer over text and frames, run once for every pair.
    head: Head = "meanP"
    # Patches of the first layer: of one frame (2d), or of three neighbouring frames (3d, which starts equal to 2d).
    stem: Stem = "2d"
    # Blocks of the head's transformer (seqTransf, tightTransf).
    num_layers: int = Field(4, ge=1)
    # Number of CLIP's first blocks that stay frozen, together with the embeddings; the last norms, the projections and
    # the log scale always train. 0: only the embeddings are frozen, as in the published runs. None: all of CLIP trains.
    frozen_layers: int | None = Field(None, ge=0)
