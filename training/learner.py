"""The update: a batch in, weights a little better. Knows no files and no loader.

Read `Learner.train_step` first. Whatever the number of processes, wrappers or chunks, it is the update that one process
would make on the whole batch (tests/training/test_update_is_the_same_everywhere.py).
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from training.clip_feedback import Feedback
from training.data.batch import Batch
from training.losses.mil_nce import mil_nce_loss
from training.losses.omnisource import OmnisourceLoss, omnisource_loss
from training.losses.pair_matching import matching_loss
from training.models.clip_vip.model import ClipVip
from training.models.unipt.model import UniPtClip
from training.optim.augment import augment
from training.optim.ema import Ema
from training.optim.gradient_cache import cached_backward
from training.optim.optimizers import build_optimiser, parameter_groups, set_learning_rate
from training.optim.schedule import learning_rate
from training.parallel.distributed import Process
from training.parallel_model import FeatureSets, Wrapped, needs_pairs
from training.settings import TrainSettings

Values = dict[str, Tensor | float]


class Learner:
    """A model, its optimiser, and how many updates it has had: `step`."""

    def __init__(
        self,
        model: ClipVip,
        settings: TrainSettings,
        total_steps: int,
        process: Process,
        feedback: Feedback | None = None,
        seed: int = 0,
    ):
        self.settings, self.total_steps, self.process = settings, total_steps, process
        self.wrapped = Wrapped(model, settings, process)
        self.model = self.wrapped.model
        groups = parameter_groups(
            self.model.named_parameters(),
            weight_decay=settings.weight_decay,
            published_decay=settings.published_decay,
            rate_factors=settings.lr_factors,
        )
        self.optimiser = build_optimiser(groups, settings.update)
        self.ema = Ema(self.model, settings.ema) if settings.ema else None
        self.feedback, self.seed = feedback, seed
        self.step = 0

    def train_step(self, batch: Batch) -> Values:
        """One update; returns what a log line says of it. Nothing here waits for the device."""
        if self.settings.augment:
            batch = augment(batch, self.settings.augment, seed=self.seed, step=self.step)
        rate = self._learning_rate()
        set_learning_rate(self.optimiser, rate)
        self.optimiser.zero_grad(set_to_none=True)
        loss = self._backward(batch)
        norm = self.wrapped.clip_gradients(self.settings.grad_clip)
        self.optimiser.step()
        self.model.clamp_log_scale()
        if self.ema:
            self.ema.update()
        self.step += 1
        scale = self.model.logit_scale.detach().clone()
        values = {"loss": loss.total.detach(), **loss.terms, "grad_norm": norm, "logit_scale": scale, "lr": rate}
        return values | (self.model.log_values() if isinstance(self.model, UniPtClip) else {})

    def whole_model(self) -> ClipVip:
        """The model for other uses than training it, whole on every process, which call this together."""
        if not self.wrapped.is_sharded:
            return self.model
        with torch.device("meta"):
            model = ClipVip(self.model.config)
        model.load_state_dict({name: _whole(tensor) for name, tensor in self.model.state_dict().items()}, assign=True)
        return model

    def _backward(self, batch: Batch) -> OmnisourceLoss:
        """Leaves in the parameters the gradient of the whole batch's loss, over all processes."""
        chunk_size = self.settings.chunk_size
        if chunk_size is None or chunk_size >= len(batch):
            loss = self._loss(batch, self.wrapped.encode(batch), self.model.logit_scale)
            loss.total.backward()
        else:
            loss = cached_backward(
                self.wrapped.encode,
                batch.split(chunk_size),
                lambda features, used: self._loss(batch, features, used[0]),
                used_by_loss=[self.model.logit_scale],
                no_sync=self.wrapped.no_sync,
            )
        self.wrapped.reduce_loose_gradients()
        return loss

    def _loss(self, batch: Batch, features: FeatureSets, log_scale: Tensor) -> OmnisourceLoss:
        video, subtitle, frame, caption, neighbours = features
        masks = {"video_mask": batch.video_mask_B, "frame_mask": batch.video_mask_B}
        masks |= {"subtitle_mask": batch.subtitle_mask_B, "caption_mask": batch.caption_mask_B}
        if self.feedback is not None:
            self.feedback.add(batch, video, subtitle, caption, log_scale)
        group = self.process.group
        if needs_pairs(self.model):
            pairs = (subtitle, video, batch.subtitle_mask_B, batch.video_mask_B)
            return matching_loss(self.wrapped.score, *pairs, group=group)
        if self.settings.loss == "mil_nce":
            masks = (batch.video_mask_B, batch.subtitle_mask_B, batch.neighbour_mask_BN)
            return mil_nce_loss(video, subtitle, neighbours, log_scale, *masks, group=group)
        features = (video, subtitle, frame, caption)
        return omnisource_loss(*features, log_scale, self.settings.loss, group=group, equal_rows=True, **masks)

    def _learning_rate(self) -> float:
        return learning_rate(
            self.step + 1,
            self.settings.lr,
            total_steps=self.total_steps,
            warmup_ratio=self.settings.warmup_ratio,
            decay=self.settings.decay,
        )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
