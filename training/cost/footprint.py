"""Compute a model's training costs from its shapes: parameters, FLOPs, and bytes kept for the backward pass."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from training.losses import load_loss
from training.models import registry as models
from training.models.clip_vip.model import ModelConfig, TowerConfig, sample_flops
from training.models.model import VideoTextModel
from training.run.settings import RunSettings
from training.settings import DataSettings, TrainSettings

# Bytes that autograd keeps for the backward pass, per token, channel and block: counted with saved-tensor hooks on the
# CPU, over towers of 6 to 12 blocks (tests/training/test_plan_command_estimates.py). A compiled model keeps less.
KEPT_BYTES = {"bf16": 45, "fp32": 78}
BLOCK_INPUT_BYTES = 4  # kept per block with activation checkpointing: the fp32 input


class Footprint:
    """Costs of the model of `config` and a run's settings, without reading weights."""

    def __init__(self, config: ModelConfig, settings: RunSettings):
        self.config, self.settings = config, settings
        with torch.device("meta"):
            self.model = models.skeleton(config, settings.model)

    @cached_property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def num_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def checkpoint_bytes(self) -> int:
        """Count weights in fp32, the moments of trained weights, and the averaged weights."""
        written = self.num_trained if self.model.saves_only_trained else self.num_parameters
        return 4 * written + 8 * self.num_trained + 4 * written * bool(self.settings.train.ema)

    @property
    def flops_of_clip(self) -> float:
        """Count forward and backward FLOPs of a clip with its texts.

        This is an upper bound, because batches are cut to their longest text, and texts are assumed to have the maximal
        length. A backward pass costs two forward passes, except through the frozen blocks below all trained weights.
        """
        data, sources = self.settings.data, load_loss(self.settings.train.loss).sources
        lengths = (data.max_text_tokens,) * _num_texts(data, sources)
        whole = sample_flops(self.config, data.num_frames, int("frame" in sources), lengths)
        return whole / 3 * (3 - 2 * self.model.num_frozen_blocks / self.config.vision.num_layers)

    @property
    def flops_of_pair(self) -> float:
        """Count FLOPs of scoring one pair of text and clip; 0 for models with vectors."""
        return self.model.pair_flops(self.settings.data.num_frames)

    def kept_of_clip(self, train: TrainSettings) -> int:
        """Count bytes kept of one clip and its texts until the backward pass."""
        data = self.settings.data
        if self.model.reads_hidden_states:
            num_states = 1 + self.config.vision.num_layers
            states = 4 * num_states * _num_tokens(self.config, data, train) * self.config.vision.width
            return max(self._counted_bytes(train), states)
        kept = kept_bytes(self.config, data, train, self.model.num_frozen_blocks)
        return kept + KEPT_BYTES[self.settings.train.precision] * self.model.head_activations(data.num_frames)

    def kept_of_pairs(self, num_pairs: int) -> int:
        """Count bytes kept of the pairs scored at a time, because other pairs are recomputed."""
        values = self.model.pair_activations(self.settings.data.num_frames, num_pairs)
        return KEPT_BYTES[self.settings.train.precision] * values

    def _counted_bytes(self, train: TrainSettings) -> int:
        """Count the bytes that autograd keeps of one clip, as the difference of two clips and one on fake tensors."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        data, size = self.settings.data, self.config.image_size
        num_texts = _num_texts(data, load_loss(train.loss).sources)

        def encode(model: VideoTextModel, num_clips: int) -> tuple[Tensor, Tensor]:
            pixels = torch.empty(num_clips, data.num_frames, 3, size, size)
            ids = torch.zeros(num_clips * num_texts, data.max_text_tokens, dtype=torch.long)
            return model.encode_video(pixels), model.encode_text(ids, cut=False)

        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bf16"):
            model = models.skeleton(self.config, self.settings.model)
            one, two = (saved_bytes(model, lambda n=n: encode(model, n)) for n in (1, 2))
        return two - one


def pixels_of(config: ModelConfig, data: DataSettings, train: TrainSettings) -> int:
    """Count the pixels of one sample: its frames, and the still if the loss has one."""
    return (data.num_frames + int("frame" in load_loss(train.loss).sources)) * config.image_size**2


def kept_bytes(config: ModelConfig, data: DataSettings, train: TrainSettings, frozen_blocks: int = 0) -> int:
    """Count bytes kept of one sample: tokens x width x bytes per block x blocks.

    A vision tower's last block computes only its class token and is not counted.
    """
    num_texts = _num_texts(data, load_loss(train.loss).sources)
    vision_blocks = max(config.vision.num_layers - 1 - frozen_blocks, 0)
    text_blocks = max(config.text.num_layers - frozen_blocks, 0)
    vision = _num_tokens(config, data, train) * _kept_per_token(config.vision, vision_blocks, train)
    text = num_texts * data.max_text_tokens * _kept_per_token(config.text, text_blocks, train)
    return vision + text


def _num_tokens(config: ModelConfig, data: DataSettings, train: TrainSettings) -> int:
    """Count the tokens of one sample in the vision tower, the still frame's included."""
    proxies, patches = config.num_proxies, config.num_patches
    if config.pooling == "proxy":
        tokens = proxies + data.num_frames * patches
    else:
        tokens = data.num_frames * (proxies + patches)
    return tokens + (proxies + patches) * ("frame" in load_loss(train.loss).sources)


def _num_texts(data: DataSettings, sources: frozenset[str]) -> int:
    return len(sources & {"subtitle", "caption"}) + 2 * data.neighbours


def _kept_per_token(tower: TowerConfig, num_blocks: int, train: TrainSettings) -> int:
    per_block = KEPT_BYTES[train.precision] * tower.width
    if train.activation_checkpointing:  # the inputs of all blocks, and one block that is recomputed
        return BLOCK_INPUT_BYTES * tower.width * num_blocks + per_block
    return per_block * num_blocks


def saved_bytes(model: nn.Module, step: Callable[[], Any]) -> int:
    """Count bytes that autograd keeps of `step` for the backward pass, each storage once, without the model's weights.

    With `FakeTensorMode` this needs neither memory nor time for a model of any size.
    """
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
