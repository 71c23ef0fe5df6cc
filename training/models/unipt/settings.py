"""What decides the shape of a UniPT side network. Nothing heavy is imported here."""

from typing import Literal

from pydantic import Field

from clipmill.base.settings import Settings

VideoTokens = Literal["all", "frames", "proxies"]


class UniPtSettings(Settings):
    """The defaults are the published network for CLIP4Clip (docs/methods/unipt.md section 3)."""

    reduction: int = Field(1, ge=1)  # the inner width is embed_dim / reduction
    # Which hidden states of a video the network reads: all of them; the proxies and each frame's mean patch; the
    # proxies alone. All of them are 592 tokens a layer for 12 frames of B/32, the other two 16 and 4.
    tokens: VideoTokens = "all"
    every: int = Field(1, ge=1)  # reads every k-th layer, counted from the last; more than there are: the last alone
    zero_start: bool = False  # start as the frozen backbone itself: the last matrix 0 instead of N(0, 0.02)
