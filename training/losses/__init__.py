"""Losses by the names of `train.loss`: a loss is a file here and a line in `LOSSES`, or MODULE:ATTRIBUTE of any module.

Settings import this file to know the names, so it imports nothing heavy; `load_loss` imports a loss where it is used.

Shape letters: B clips of this process, K clips of all processes, D the features' size, N neighbours of a clip, F frames
of a video.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from clipmill.base.errors import UserError
from clipmill.base.plugins import load_attribute

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

LOSSES = {
    "vs": "training.losses.omnisource:VS",
    "vs_fc": "training.losses.omnisource:VS_FC",
    "vs_vc": "training.losses.omnisource:VS_VC",
    "vs_vc_fc": "training.losses.omnisource:VS_VC_FC",
    "vsc": "training.losses.omnisource:VSC",
    "vsc_fc": "training.losses.omnisource:VSC_FC",
    "joint": "training.losses.omnisource:JOINT",
    "mil_nce": "training.losses.mil_nce:MIL_NCE",
}
SOURCES = ("video", "subtitle", "frame", "caption")


@dataclass(frozen=True)
class LossInputs:
    """One process's share of a batch, encoded. A row whose mask is false may hold anything, NaN included."""

    video: "Tensor"  # unit vectors [B, D]; of a model that scores pairs frames [B, F, D] of any length
    subtitle: "Tensor | None"  # [B, D], like all texts and the still frame; None: not among `Loss.sources`
    frame: "Tensor | None"
    caption: "Tensor | None"
    neighbours: "Tensor | None"  # [B, N, D], texts of the clips before and after; None: N = 0

    video_mask: "Tensor"  # bool [B]: the clip could be read; false means that it has no frame either
    subtitle_mask: "Tensor"
    caption_mask: "Tensor"
    neighbour_mask: "Tensor"  # bool [B, N]

    log_scale: "Tensor"  # 0-d: exp(log_scale) times a cosine is a logit
    # The processes that share the batch, each with equally many rows; None: this one alone. What a process returns as
    # `total` is differentiated here and the gradients are averaged over the group: `training.losses.terms` helps.
    group: "dist.ProcessGroup | None" = None
    # Texts [B, D] and frames [K, F, D] to scores [B, K], where a model scores pairs.
    score: "Callable[[Tensor, Tensor], Tensor] | None" = None


class LossValue(NamedTuple):
    """`total` carries the gradient; `terms` are the detached means it is the sum of, by name (`video_to_subtitle`)."""

    total: "Tensor"
    terms: "dict[str, Tensor]"


@dataclass(frozen=True)
class Loss:
    """A loss and its properties that other parts of the trainer read.

    compute           computes the loss from the inputs of one process: whole batches, never the chunks of gradient
                      caching
    sources           members of `SOURCES` that it compares; the others are not encoded
    num_similarities  matrices [B, K] that it keeps for the backward pass, for the estimate of memory
    takes_neighbours  `data.neighbours` may be set; each neighbour adds one text and one matrix in either direction
    on_pairs          form of the loss for models that score pairs; None: there is none
    """

    compute: Callable[[LossInputs], LossValue]
    sources: frozenset[str]
    num_similarities: int
    takes_neighbours: bool = False
    on_pairs: Callable[[LossInputs], LossValue] | None = None


@cache
def load_loss(name: str) -> Loss:
    """Import the loss that `train.loss` names. Raises UserError if the object is not a `Loss`."""
    loss = load_attribute("train.loss", name, LOSSES.get(name))
    if not isinstance(loss, Loss):
        raise UserError(f"setting train.loss = {name}: it is a {type(loss).__name__}, not a training.losses.Loss.")
    return loss


def losses_that(property: str) -> list[str]:
    """List the names in `LOSSES` whose `Loss` has a property set, for messages."""
    return [name for name in LOSSES if getattr(load_loss(name), property)]
