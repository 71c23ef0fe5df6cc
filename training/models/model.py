"""The interface of every method's model: what the trainer, the evaluation and the estimate of costs ask of it."""

from torch import Tensor, nn

from clipmill.base.errors import UserError


class VideoTextModel(nn.Module):
    """A video and a text encoder, trained together. A method's model overrides what differs from the defaults here.

    Besides these methods it has `config` (`training.models.clip_vip.model.ModelConfig`), `logit_scale` (a 0-d tensor:
    cosines times its exponential are logits) and `new_tensors` (names of the tensors that no file brought). What trains
    is what requires gradients.
    """

    method: str  # as `model.method` names it: says how the model is written
    needs_pairs = False  # it scores pairs, by `text_features`, `frame_features` and `similarity`, and has no vectors
    takes_frame_mask = False  # `encode_video` takes a mask [B, T] of the frames that are there

    def encode_video(self, pixels: Tensor, video_mask: Tensor | None = None) -> Tensor:
        """Encode normalised pixels [B, T, 3, H, W] to unit vectors [B, embed_dim]."""
        raise NotImplementedError

    def encode_text(self, ids: Tensor, mask: Tensor | None = None, *, cut: bool = True) -> Tensor:
        """Encode token ids [B, L] to unit vectors [B, embed_dim].

        cut  False: the caller has dropped the positions behind the batch's last end of text already
        """
        raise NotImplementedError

    def encode_frames(self, pixels_F3HW: Tensor) -> Tensor:
        """Encode each frame by itself, [F, embed_dim]: the frames of videos that are about to be edited."""
        return self.encode_video(pixels_F3HW.unsqueeze(1))

    @property
    def mixes_frames(self) -> bool:
        """Tell whether a video's vector is more than the mean of its frames'."""
        return self.config.pooling == "proxy"

    @property
    def called(self) -> str:
        """Name the setting that makes this model what it is, for messages."""
        return f"model.method = {self.method!r}"

    # -- training -----------------------------------------------------------------------------------------------------

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass and compute the rest again."""
        if enabled:
            raise UserError(f"train.activation_checkpointing: {self.called} does not support it; set it false.")

    def clamp_log_scale(self) -> None:
        """Keep `logit_scale` in its range, in place, after every update."""

    def log_values(self) -> dict[str, Tensor]:
        """Return 0-d tensors for the line that the log has of a step, still on the device."""
        return {}

    can_be_sharded = False  # train.parallel = fsdp

    def shard(self) -> None:
        """Shard the blocks with FSDP2; the rest follows with the module that holds the model."""
        raise NotImplementedError

    def without_weights(self) -> "VideoTextModel":
        """Build the same model on meta, to be filled with whole tensors of a sharded one."""
        raise NotImplementedError

    # -- costs --------------------------------------------------------------------------------------------------------

    saves_only_trained = False  # checkpoints hold what trains, without what is frozen
    num_frozen_blocks = 0  # of each tower, below all that trains: no backward pass goes through them
    # True: it reads all hidden states of frozen towers. They are in memory at the same time, and what is kept for the
    # backward pass is counted on tensors without contents instead of computed from sizes.
    reads_hidden_states = False

    def pair_flops(self, num_frames: int) -> float:
        """Count forward and backward FLOPs of scoring one pair."""
        return 0.0

    def head_activations(self, num_frames: int) -> int:
        """Count tokens x channels x blocks of a transformer over the frames of one video."""
        return 0

    def pair_activations(self, num_frames: int, num_pairs: int) -> int:
        """Count tokens x channels x blocks of the pairs that are scored at a time, of `num_pairs` in all."""
        return 0
