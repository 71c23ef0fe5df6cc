"""Settings of the UniPT side networks. Nothing heavy is imported here."""

from typing import Literal

from pydantic import Field

from clipmill.base.settings import Settings

VideoTokens = Literal["all", "frames", "proxies"]


class UniPtSettings(Settings):
    """Sizes and inputs; the defaults are the published network for CLIP4Clip (docs/methods/unipt.md section 3)."""

    # Divisor of the inner width, which is embed_dim / reduction.
    reduction: int = Field(1, ge=1)
    # Hidden states of a video that the network reads: all of them; the proxies and each frame's mean patch (frames);
    # the proxies alone. For 12 frames of B/32 these are 592, 16 and 4 tokens a layer.
    tokens: VideoTokens = "all"
    # Read every k-th layer, counted from the last; more than the number of layers: the last alone.
    every: int = Field(1, ge=1)
    # Start equal to the frozen backbone: the last matrix is 0 instead of N(0, 0.02).
    zero_start: bool = False
