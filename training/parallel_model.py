"""Wrap the model for the settings: one `forward` for all sources, copied (DDP), sharded (FSDP2) or compiled."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from clipmill.base.errors import UserError
from training.data.batch import Batch
from training.losses import Loss, load_loss, losses_that
from training.models.encode import encode_clips, encode_texts, needs_pairs, score_pairs
from training.models.model import VideoTextModel
from training.parallel.distributed import Process
from training.settings import TrainSettings


class FeatureSets(NamedTuple):
    """An encoded batch: unit vectors [B, D], of neighbours [B, N, D]; None for sources that the loss does not compare.

    For a model that scores pairs, the video is frames [B, F, D] and texts are [B, D], both not normalised.
    """

    video: Tensor
    subtitle: Tensor | None
    frame: Tensor | None
    caption: Tensor | None
    neighbours: Tensor | None


class Encoder(nn.Module):
    """Encoder of the sources of a batch that a loss compares."""

    def __init__(self, model: VideoTextModel, sources: frozenset[str]):
        super().__init__()
        self.model, self.sources = model, sources

    def forward(self, batch: Batch) -> FeatureSets:
        video = encode_clips(self.model, batch.video_BT3SS, batch.frame_mask_BT)
        still_mask_B1 = torch.ones_like(batch.frame_mask_BT[:, :1])
        frame = encode_clips(self.model, batch.frame_B13SS, still_mask_B1) if "frame" in self.sources else None
        subtitle, caption = self._encode_texts(batch)
        neighbours, ids_BNL = None, batch.neighbour_BNL
        if ids_BNL.shape[1]:
            neighbours = self.model.encode_text(ids_BNL.flatten(0, 1), cut=False).unflatten(0, ids_BNL.shape[:2])
        return FeatureSets(video, subtitle, frame, caption, neighbours)

    def _encode_texts(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Encode both texts in one pass of the tower; the loader has already cut them."""
        ids = {"subtitle": batch.subtitle_BL, "caption": batch.caption_BL}
        wanted = [name for name in ids if name in self.sources]
        if not wanted:
            return None, None
        length = max(ids[name].shape[1] for name in wanted)
        stacked = torch.cat([pad(ids[name], (0, length - ids[name].shape[1])) for name in wanted])
        features = encode_texts(self.model, stacked, cut=False).chunk(len(wanted))
        by_name = dict(zip(wanted, features, strict=True))
        return by_name.get("subtitle"), by_name.get("caption")


class Wrapped:
    """An encoder, wrapped as the settings say. `model` is the model inside, without wrappers."""

    def __init__(self, model: VideoTextModel, settings: TrainSettings, process: Process):
        self.settings, self.process = settings, process
        check_settings(model, settings)
        if needs_pairs(model):
            model.train()  # its head has dropout
            model.logit_scale.requires_grad_(False)  # not part of the scores; constant, as in the published runs
        model.set_activation_checkpointing(settings.activation_checkpointing)
        self.model = model.to(process.device)
        encoder: nn.Module = Encoder(self.model, load_loss(settings.loss).sources)
        self.is_sharded = process.group is not None and settings.parallel == "fsdp"
        if self.is_sharded:
            self.model.shard()
            # the temperature is a single number, which cannot be sharded
            fully_shard(encoder, ignored_params={self.model.logit_scale})
        self.module = encoder
        if settings.compile:
            encoder = torch.compile(encoder)
        if process.group is not None and not self.is_sharded:
            encoder = DistributedDataParallel(encoder)
        self._run = encoder

    def encode(self, batch: Batch) -> FeatureSets:
        """Encode in the settings' precision; return features in the weights' dtype."""
        with self._autocast():
            features = self._run(batch)
        dtype = self.model.logit_scale.dtype
        return FeatureSets(*(None if feature is None else feature.to(dtype) for feature in features))

    def score(self, text_BC: Tensor, frames_KFC: Tensor) -> Tensor:
        """Score pairs, [B, K]. DDP averages the gradients although this runs outside of its `forward`."""
        self.model.first_text = self.process.rank * len(text_BC)  # every process has equally many clips
        with self._autocast():
            return score_pairs(self.model, text_BC, frames_KFC)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def no_sync(self) -> AbstractContextManager[None]:
        """Keep gradients in this process until a backward pass outside of the context."""
        if isinstance(self._run, DistributedDataParallel):
            return self._run.no_sync()
        return nullcontext()

    def reduce_loose_gradients(self) -> None:
        """Average the gradient of the temperature over processes, which FSDP does not manage."""
        if self.is_sharded:
            torch.distributed.all_reduce(self.model.logit_scale.grad, group=self.process.group)
            self.model.logit_scale.grad /= self.process.world_size

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Scale all gradients so that their common norm is at most `max_norm`; return the norm before."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        sharded = [p for p in parameters if isinstance(p.grad, DTensor)]
        whole = [p for p in parameters if not isinstance(p.grad, DTensor)]
        norms = [get_total_norm([p.grad for p in some]) for some in (sharded, whole) if some]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        total = torch.linalg.vector_norm(torch.stack(norms))
        if max_norm is not None:
            for some in (sharded, whole):
                clip_grads_with_norm_(some, max_norm, total)
        return total


def check_settings(model: VideoTextModel, settings: TrainSettings) -> Loss:
    """Return the loss of the settings. Raises UserError for settings that this model does not support."""
    loss = load_loss(settings.loss)
    if settings.parallel == "fsdp" and not model.can_be_sharded:
        raise UserError(f"train.parallel = 'fsdp': {model.called} cannot be sharded; allowed here: ddp.")
    if not needs_pairs(model):
        return loss
    refused = {
        "train.loss": (settings.loss, loss.on_pairs is None, " or ".join(losses_that("on_pairs"))),
        "train.chunk_size": (settings.chunk_size, settings.chunk_size is not None, "null: pairs are scored in chunks"),
        "train.feedback": (settings.feedback, settings.feedback, "false"),
    }
    for name, (value, is_refused, allowed) in refused.items():
        if is_refused:
            raise UserError(
                f"{name} = {value}: {model.called} scores pairs and has no vector per video; allowed here: {allowed}."
            )
    return loss
