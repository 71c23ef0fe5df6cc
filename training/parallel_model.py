"""The model behind one `forward`, as wrappers want it: copied (DDP), sharded (FSDP2) or compiled, from settings."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from clipmill.base.errors import UserError
from training.data.batch import Batch
from training.data.frame_sampling import normalise
from training.losses.omnisource import TERMS
from training.models.clip_vip.model import ClipVip
from training.parallel.distributed import Process
from training.settings import TrainSettings

FeatureSets = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
SOURCES = ("video", "subtitle", "frame", "caption")


def sources_of(variant: str) -> frozenset[str]:
    """Which of `SOURCES` a loss variant compares: the others need not be encoded."""
    if variant == "mil_nce":
        return frozenset({"video", "subtitle"})
    used = {name for term in TERMS[variant] for name in (term.query, term.key, term.other)}
    return frozenset(SOURCES) if "visual" in used else frozenset(used) & frozenset(SOURCES)


def needs_pairs(model: nn.Module) -> bool:
    """Whether a model scores pairs instead of giving a vector per item (CLIP4Clip's tightTransf)."""
    return getattr(model, "needs_pairs", False)


def encode_clips(model: nn.Module, pixels_BT3SS: Tensor, mask_BT: Tensor) -> Tensor:
    """Unit vectors [B, D] of uint8 pixels; of a model that scores pairs frames [B, T, D], zeros where there is none.

    mask  false for frames that are not there, which are zeros to the model (spec/clip4clip.md section 5)
    """
    pixels = normalise(pixels_BT3SS, model.config.image_mean, model.config.image_std)
    if not getattr(model, "takes_frame_mask", False):
        return model.encode_video(pixels)
    pixels = torch.where(mask_BT[..., None, None, None], pixels, 0)
    return (
        model.frame_features(pixels) * mask_BT.unsqueeze(2)
        if needs_pairs(model)
        else model.encode_video(pixels, mask_BT)
    )


def score_pairs(model: nn.Module, text_BC: Tensor, frames_KTC: Tensor) -> Tensor:
    """[B, K] of a model that scores pairs, of frames as `encode_clips` gives them."""
    return model.similarity(text_BC, frames_KTC, frames_KTC.any(dim=2))


class Encoder(nn.Module):
    """A batch to its feature sets (video, subtitle, frame, caption, neighbours): unit vectors [B, D], of neighbours
    [B, N, D]; None where not asked for. Of a model that scores pairs frames [B, F, D] and texts [B, D], of any length.
    """

    def __init__(self, model: ClipVip, sources: frozenset[str]):
        super().__init__()
        self.model, self.sources = model, sources

    def forward(self, batch: Batch) -> FeatureSets:
        video = encode_clips(self.model, batch.video_BT3SS, batch.frame_mask_BT)
        still_mask_B1 = torch.ones_like(batch.frame_mask_BT[:, :1])
        frame = encode_clips(self.model, batch.frame_B13SS, still_mask_B1) if "frame" in self.sources else None
        subtitle, caption = self._encode_texts(batch)
        return video, subtitle, frame, caption, self._encode_neighbours(batch)

    def _encode_texts(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Both texts in one pass of the tower; the loader has cut them already."""
        ids = {"subtitle": batch.subtitle_BL, "caption": batch.caption_BL}
        wanted = [name for name in ids if name in self.sources]
        if not wanted:
            return None, None
        length = max(ids[name].shape[1] for name in wanted)
        stacked = torch.cat([pad(ids[name], (0, length - ids[name].shape[1])) for name in wanted])
        encode = self.model.text_features if needs_pairs(self.model) else self.model.encode_text
        features = encode(stacked, cut=False).chunk(len(wanted))
        by_name = dict(zip(wanted, features, strict=True))
        return by_name.get("subtitle"), by_name.get("caption")

    def _encode_neighbours(self, batch: Batch) -> Tensor | None:
        ids_BNL = batch.neighbour_BNL
        if not ids_BNL.shape[1]:
            return None
        return self.model.encode_text(ids_BNL.flatten(0, 1), cut=False).unflatten(0, ids_BNL.shape[:2])


class Wrapped:
    """An encoder as the settings want it run. `model` is the bare `ClipVip` inside, whatever surrounds it."""

    def __init__(self, model: ClipVip, settings: TrainSettings, process: Process):
        self.settings, self.process = settings, process
        check_settings(model, settings)
        if needs_pairs(model):
            _prepare_for_pairs(model)
        model.set_activation_checkpointing(settings.activation_checkpointing)
        self.model = model.to(process.device)
        encoder: nn.Module = Encoder(self.model, sources_of(settings.loss))
        self.is_sharded = process.group is not None and settings.parallel == "fsdp"
        if self.is_sharded:
            _shard(encoder, self.model)
        self.module = encoder
        if settings.compile:
            encoder = torch.compile(encoder)
        if process.group is not None and not self.is_sharded:
            encoder = DistributedDataParallel(encoder)
        self._run = encoder

    def encode(self, batch: Batch) -> FeatureSets:
        """Under autocast where the settings say bf16; features are of the weights' dtype."""
        enabled = self.settings.precision == "bf16"
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=enabled):
            features = self._run(batch)
        dtype = self.model.logit_scale.dtype
        return tuple(None if feature is None else feature.to(dtype) for feature in features)

    def score(self, text_BC: Tensor, frames_KFC: Tensor) -> Tensor:
        """[B, K] of a model that scores pairs. Outside of what DDP runs, which averages its gradients all the same."""
        enabled = self.settings.precision == "bf16"
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=enabled):
            return score_pairs(self.model, text_BC, frames_KFC)

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients stay with this process until a backward pass outside."""
        if isinstance(self._run, DistributedDataParallel):
            return self._run.no_sync()
        return nullcontext()

    def reduce_loose_gradients(self) -> None:
        """The mean over processes of what FSDP does not hold: the temperature."""
        if self.is_sharded:
            torch.distributed.all_reduce(self.model.logit_scale.grad, group=self.process.group)
            self.model.logit_scale.grad /= self.process.world_size

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Scales all gradients so that their common norm is at most `max_norm`; returns the norm as it was."""
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


def check_settings(model: nn.Module, settings: TrainSettings) -> None:
    """Raises UserError for settings that this model cannot be trained with."""
    if settings.parallel == "fsdp" and not isinstance(model, ClipVip):
        raise UserError("train.parallel = 'fsdp' is for model.method = 'clip_vip'; allowed here: ddp.")
    if not needs_pairs(model):
        return
    refused = {
        "train.loss": (settings.loss, settings.loss != "vs", "vs"),
        "train.chunk_size": (settings.chunk_size, settings.chunk_size is not None, "null: pairs are scored in chunks"),
        "train.feedback": (settings.feedback, settings.feedback, "false"),
    }
    for name, (value, is_refused, allowed) in refused.items():
        if is_refused:
            raise UserError(
                f"{name} = {value}: model.clip4clip.head = 'tightTransf' scores pairs and has no vector per video; "
                f"allowed here: {allowed}."
            )


def _prepare_for_pairs(model: nn.Module) -> None:
    model.train()  # its head has dropout
    model.logit_scale.requires_grad_(False)  # in no score, so it stays what it is, as in the published runs


def _shard(encoder: nn.Module, model: ClipVip) -> None:
    """FSDP2 block by block. The temperature is a single number and stays whole on every process."""
    for block in [*model.vision.blocks, *model.text.blocks]:
        fully_shard(block)
        register_fsdp_forward_method(block, "first_token")
    fully_shard(encoder, ignored_params={model.logit_scale})
