"""Make one optimiser step; this module does not use files or the loader.

Read `Learner.train_step` first. With any number of processes, wrappers or chunks it makes the update that one process
makes on the whole batch (tests/training/test_update_is_the_same_everywhere.py).
"""

from torch import Tensor
from torch.distributed.tensor import DTensor

from training.clip_feedback import Feedback
from training.data.batch import Batch
from training.losses import LossInputs, LossValue
from training.models.encode import needs_pairs
from training.models.model import VideoTextModel
from training.optim.augment import augment
from training.optim.ema import Ema
from training.optim.gradient_cache import cached_backward
from training.optim.optimizers import build_optimiser, parameter_groups, set_learning_rate
from training.optim.schedule import learning_rate
from training.parallel.distributed import Process
from training.parallel_model import FeatureSets, Wrapped, check_settings
from training.settings import TrainSettings

Values = dict[str, Tensor | float]


class Learner:
    """A model, its loss and its optimiser, and the number of updates done: `step`."""

    def __init__(
        self,
        model: VideoTextModel,
        settings: TrainSettings,
        total_steps: int,
        process: Process,
        feedback: Feedback | None = None,
        seed: int = 0,
    ):
        self.settings, self.total_steps, self.process = settings, total_steps, process
        self.loss = check_settings(model, settings)
        self.wrapped = Wrapped(model, settings, process)
        self.model = self.wrapped.model
        groups = parameter_groups(
            self.model.named_parameters(),
            weight_decay=settings.weight_decay,
            published_decay=settings.published_decay,
            rate_factors=settings.lr_factors,
        )
        self.optimiser = build_optimiser(groups, settings.update, settings.parameter_clip)
        self.ema = Ema(self.model, settings.ema) if settings.ema else None
        self.feedback, self.seed = feedback, seed
        self.step = 0

    def train_step(self, batch: Batch) -> Values:
        """Make one update without waiting for the device; return the values for its line of the log."""
        if self.settings.augment:
            batch = augment(batch, self.settings.augment, seed=self.seed, step=self.step)
        rate = learning_rate(
            self.step + 1,
            self.settings.lr,
            total_steps=self.total_steps,
            warmup_ratio=self.settings.warmup_ratio,
            decay=self.settings.decay,
        )
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
        return values | self.model.log_values()

    def whole_model(self) -> VideoTextModel:
        """Return the model, whole on every process, for other uses than training; all processes call this together."""
        if not self.wrapped.is_sharded:
            return self.model
        model = self.model.without_weights()
        state = self.model.state_dict()
        whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
        model.load_state_dict(whole, assign=True)
        return model

    def _backward(self, batch: Batch) -> LossValue:
        """Compute the gradient of the whole batch's loss, over all processes, into the parameters."""
        chunk_size = self.settings.chunk_size
        if chunk_size is None or chunk_size >= len(batch):
            loss = self._loss(batch, self.wrapped.encode(batch), self.model.logit_scale)
            loss.total.backward()
        else:
            loss = cached_backward(
                self.wrapped.encode,
                batch.split(chunk_size),
                lambda features, used: self._loss(batch, FeatureSets(*features), used[0]),
                used_by_loss=[self.model.logit_scale],
                no_sync=self.wrapped.no_sync,
            )
        self.wrapped.reduce_loose_gradients()
        return loss

    def _loss(self, batch: Batch, features: FeatureSets, log_scale: Tensor) -> LossValue:
        if self.feedback is not None:
            self.feedback.add(batch, features.video, features.subtitle, features.caption, log_scale)
        inputs = LossInputs(
            **features._asdict(),
            video_mask=batch.video_mask_B,
            subtitle_mask=batch.subtitle_mask_B,
            caption_mask=batch.caption_mask_B,
            neighbour_mask=batch.neighbour_mask_BN,
            log_scale=log_scale,
            group=self.process.group,
            score=self.wrapped.score,
        )
        return (self.loss.on_pairs if needs_pairs(self.model) else self.loss.compute)(inputs)
