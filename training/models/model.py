"""The interface of every method's model, for the trainer, the evaluation and the estimate of costs."""

from typing import Any

from torch import Tensor, nn

from clipmill.base.errors import UserError


class VideoTextModel(nn.Module):
    """A video and a text encoder that are trained together; a method overrides the defaults.

    A model also has `config` (`training.models.clip_vip.model.ModelConfig`), `logit_scale` (0-d tensor: logits are
    cosines times its exponential) and `new_tensors` (names of the tensors that were not read from a file). Exactly the
    parameters that require gradients are trained.
    """

    method: str  # value of `model.method`; chooses the format of the weight files
    needs_pairs = False  # has no vectors: scores pairs by `text_features`, `frame_features` and `similarity`
    first_text = (
        0  # of the texts that `similarity` scores: its place in the batch of all processes, which all draw alike
    )
    takes_frame_mask = False  # `encode_video` takes a mask [B, T], true for real frames

    def encode_video(self, pixels: Tensor, video_mask: Tensor | None = None) -> Tensor:
        """Encode normalised pixels [B, T, 3, H, W] to unit vectors [B, embed_dim]."""
        raise NotImplementedError

    def encode_text(self, ids: Tensor, mask: Tensor | None = None, *, cut: bool = True) -> Tensor:
        """Encode token ids [B, L] to unit vectors [B, embed_dim].

        cut  False: the caller has already dropped the positions after the batch's last end of text
        """
        raise NotImplementedError

    def forward(self, pixels: Tensor | None = None, ids: Tensor | None = None, mask: Tensor | None = None) -> Any:
        """Run the encoders that have an input; return a pair if both have. For wrappers that only call `forward`."""
        video = None if pixels is None else self.encode_video(pixels)
        text = None if ids is None else self.encode_text(ids, mask)
        return (video, text) if video is not None and text is not None else video if text is None else text

    def encode_frames(self, pixels_F3HW: Tensor) -> Tensor:
        """Encode each frame alone, [F, embed_dim], for editing."""
        return self.encode_video(pixels_F3HW.unsqueeze(1))

    @property
    def mixes_frames(self) -> bool:
        """Return True if a video's vector is not just the mean of its frames' vectors."""
        return self.config.pooling == "proxy"

    @property
    def called(self) -> str:
        """Name the setting that chose this kind of model, for messages."""
        return f"model.method = {self.method!r}"

    # -- training -----------------------------------------------------------------------------------------------------

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass and recompute everything else."""
        if enabled:
            raise UserError(f"train.activation_checkpointing: {self.called} does not support it; set it false.")

    def clamp_log_scale(self) -> None:
        """Keep `logit_scale` in its range, in place, after every update."""

    def log_values(self) -> dict[str, Tensor]:
        """Return 0-d tensors for the log line of a step, still on the device."""
        return {}

    can_be_sharded = False  # train.parallel = fsdp

    def shard(self) -> None:
        """Shard the blocks with FSDP2; the caller shards the module around them."""
        raise NotImplementedError

    def without_weights(self) -> "VideoTextModel":
        """Build the same model on the meta device, to be filled with the whole tensors of a sharded one."""
        raise NotImplementedError

    # -- costs --------------------------------------------------------------------------------------------------------

    saves_only_trained = False  # checkpoints leave out frozen parameters
    num_frozen_blocks = 0  # of each tower, below all trained parameters: the backward pass skips them
    # True: all hidden states of frozen towers are in memory at the same time, and the bytes kept for the backward pass
    # are counted on fake tensors instead of computed from sizes.
    reads_hidden_states = False

    def pair_flops(self, num_frames: int) -> float:
        """Count forward and backward FLOPs of scoring one pair."""
        return 0.0

    def head_activations(self, num_frames: int) -> int:
        """Count tokens x channels x blocks of a transformer over the frames of one video."""
        return 0

    def pair_activations(self, num_frames: int, num_pairs: int) -> int:
        """Count tokens x channels x blocks of the pairs scored at a time, at most `num_pairs`."""
        return 0
