"""What a model takes to train, from shapes alone: parameters, arithmetic, and what is kept for the backward pass."""

from functools import cached_property

import torch
from torch import Tensor

from training.cost.memory import saved_bytes
from training.models import registry as models
from training.models.clip4clip.model import Clip4Clip, pair_flops
from training.models.clip_vip.model import ModelConfig, TowerConfig, sample_flops
from training.models.unipt.model import UniPtClip
from training.parallel_model import sources_of
from training.settings import DataSettings, RunSettings, TrainSettings

# Bytes that autograd keeps for the backward pass, per token, channel and block: counted with saved-tensor hooks on the
# CPU, over towers of 6 to 12 blocks (tests/training/test_plan_command_estimates.py). Compiling keeps less.
KEPT_BYTES = {"bf16": 45, "fp32": 78}
BLOCK_INPUT_BYTES = 4  # all that activation checkpointing keeps of a block: the fp32 stream that enters it


class Footprint:
    """Of the model that `config` and a run's settings describe; its weights are not read."""

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
        """Weights in fp32, the moments of those that train, the average. Of UniPT the side networks alone are kept."""
        written = self.num_trained if isinstance(self.model, UniPtClip) else self.num_parameters
        return 4 * written + 8 * self.num_trained + 4 * written * bool(self.settings.train.ema)

    @property
    def flops_of_clip(self) -> float:
        """Forward and backward, texts as long as they may be: an upper bound, since batches are cut to their longest.

        What is frozen below all that trains has no backward pass. Of UniPT its backbone alone is counted: its side
        networks add less than a hundredth.
        """
        data, sources = self.settings.data, sources_of(self.settings.train.loss)
        lengths = (data.max_text_tokens,) * _num_texts(data, sources)
        whole = sample_flops(self.config, data.num_frames, int("frame" in sources), lengths)
        if isinstance(self.model, UniPtClip):
            return whole / 3
        return whole * (1 - 2 / 3 * self._frozen_blocks / self.config.vision.num_layers)

    @property
    def flops_of_pair(self) -> float:
        """Of each text with each clip of a batch, where pairs are scored."""
        return pair_flops(self.config, self.settings.model.clip4clip, self.settings.data.num_frames)

    def kept_of_clip(self, train: TrainSettings) -> int:
        """Bytes of one clip and its texts until the backward pass."""
        data = self.settings.data
        if isinstance(self.model, UniPtClip):
            return self._kept_of_unipt(train)
        kept = kept_bytes(self.config, data, train, self._frozen_blocks)
        if isinstance(self.model, Clip4Clip) and self.model.settings.head == "seqTransf":
            kept += data.num_frames * self._kept_per_token_of_head
        return kept

    def kept_of_pairs(self, num_pairs: int) -> int:
        """Bytes of the pairs that are scored at a time; those of the others are computed again."""
        if not isinstance(self.model, Clip4Clip) or not self.model.needs_pairs:
            return 0
        num_tokens = 1 + self.settings.data.num_frames
        return min(num_pairs, self.model.pairs_at_a_time) * num_tokens * self._kept_per_token_of_head

    @property
    def _kept_per_token_of_head(self) -> int:
        blocks = self.settings.model.clip4clip.num_layers
        return KEPT_BYTES[self.settings.train.precision] * self.config.embed_dim * blocks

    @property
    def _frozen_blocks(self) -> int:
        """How many blocks of each tower lie below all that trains."""
        if not isinstance(self.model, Clip4Clip) or self.model.settings.stem == "3d":
            return 0
        return self.model.settings.frozen_layers or 0

    def _kept_of_unipt(self, train: TrainSettings) -> int:
        """Counted in a run on tensors without contents; at least the hidden states, which are all there at one time."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        data, config = self.settings.data, self.config
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bf16"):
            model = models.skeleton(config, self.settings.model)
            one, two = (saved_bytes(model, lambda n=n: _encode(model, n, data, train)) for n in (1, 2))
        num_states = 1 + config.vision.num_layers
        states = 4 * num_states * _num_tokens(config, data, train) * config.vision.width
        return max(two - one, states)


def _encode(model: UniPtClip, num_clips: int, data: DataSettings, train: TrainSettings) -> tuple[Tensor, Tensor]:
    size, num_texts = model.config.image_size, _num_texts(data, sources_of(train.loss))
    pixels = torch.empty(num_clips, data.num_frames, 3, size, size)
    ids = torch.zeros(num_clips * num_texts, data.max_text_tokens, dtype=torch.long)
    return model.encode_video(pixels), model.encode_text(ids, cut=False)


def pixels_of(config: ModelConfig, data: DataSettings, train: TrainSettings) -> int:
    """Of one sample: its frames, and the still where the loss has one."""
    return (data.num_frames + int("frame" in sources_of(train.loss))) * config.image_size**2


def kept_bytes(config: ModelConfig, data: DataSettings, train: TrainSettings, frozen_blocks: int = 0) -> int:
    """Activations of one sample: tokens x width x (bytes per block x blocks), and those of one block recomputed.

    A vision tower's last block computes its class token alone, so it keeps next to nothing.
    """
    num_texts = _num_texts(data, sources_of(train.loss))
    vision_blocks = max(config.vision.num_layers - 1 - frozen_blocks, 0)
    text_blocks = max(config.text.num_layers - frozen_blocks, 0)
    vision = _num_tokens(config, data, train) * _kept_per_token(config.vision, vision_blocks, train)
    text = num_texts * data.max_text_tokens * _kept_per_token(config.text, text_blocks, train)
    return vision + text


def _num_tokens(config: ModelConfig, data: DataSettings, train: TrainSettings) -> int:
    """Of one sample in the vision tower, the still frame's included."""
    proxies, patches = config.num_proxies, config.num_patches
    if config.pooling == "proxy":
        tokens = proxies + data.num_frames * patches
    else:
        tokens = data.num_frames * (proxies + patches)
    return tokens + (proxies + patches) * ("frame" in sources_of(train.loss))


def _num_texts(data: DataSettings, sources: frozenset[str]) -> int:
    return len(sources & {"subtitle", "caption"}) + 2 * data.neighbours


def _kept_per_token(tower: TowerConfig, num_blocks: int, train: TrainSettings) -> int:
    per_block = KEPT_BYTES[train.precision] * tower.width
    if train.activation_checkpointing:
        return BLOCK_INPUT_BYTES * tower.width * num_blocks + per_block
    return per_block * num_blocks
