"""Caption frames by open_clip's CoCa: `generate` gives the text, one teacher-forced pass its score.

Shapes: B pictures, L ids per caption (start and end token included), P picture tokens, D their width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import open_clip
import torch
from PIL import Image

from captioning.captioner import Caption, caption_in_batches, caption_of, fingerprint_of, frame_seed
from captioning.model_identity import open_clip_name
from captioning.open_clip_loader import LoadedModel, load_open_clip
from captioning.settings import CaptionSettings
from clipmill.base.errors import ItemError, UserError


def load(settings: CaptionSettings) -> "CocaCaptioner":
    """Load the CoCa that `caption.model` and `caption.pretrained` name. Raises UserError for any other model."""
    loaded = load_open_clip(settings, "caption")
    if not isinstance(loaded.model, open_clip.CoCa):
        known = ", ".join(name for name in open_clip.list_models() if name.startswith("coca"))
        raise UserError(f"setting caption.model = {settings.model} is not a CoCa model; open_clip has {known}.")
    if not hasattr(loaded.tokenizer, "sot_token_id"):
        raise UserError(
            f"setting caption.model = {settings.model} has another tokenizer than CLIP's; use a CoCa model with it."
        )
    name = f"coca/{open_clip_name(settings.model, settings.pretrained, 'caption')}"
    return CocaCaptioner(loaded, settings, name)


class CocaCaptioner:
    """A captioner whose captions depend neither on the other frames of a batch nor, when sampling, on their order."""

    def __init__(self, loaded: LoadedModel, settings: CaptionSettings, name: str):
        self.max_tokens = min(settings.max_tokens, loaded.model.context_length)
        if settings.min_tokens >= self.max_tokens:
            limit = f"{name} reads at most {loaded.model.context_length} tokens"
            raise UserError(f"setting caption.min_tokens = {settings.min_tokens} must be lower: {limit}.")
        self.loaded, self.settings, self.name = loaded, settings, name
        self.fingerprint = fingerprint_of(settings)

    def caption(self, images: Sequence[Image.Image | bytes]) -> list[Caption | ItemError]:
        return caption_in_batches(images, self.settings.batch_size, self._caption_batch)

    @torch.inference_mode()
    def _caption_batch(self, pictures: list[Image.Image]) -> list[Caption]:
        """Encode the pictures once; generate ids, then score each but the first, given those before and the picture."""
        latent_BD, tokens_BPD = self.loaded.model._encode_image(self.loaded.pixels(pictures))
        ids_BL = self._generate(pictures, latent_BD, tokens_BPD)
        scored_BL = ids_BL[:, : self.loaded.model.context_length]
        logits_BLV = self.loaded.model(None, scored_BL, image_latent=latent_BD, image_embs=tokens_BPD)["logits"]
        log_probs_BL = logits_BLV.float().log_softmax(-1).gather(-1, scored_BL[:, 1:, None])[..., 0]
        answers = zip(ids_BL.tolist(), log_probs_BL.tolist(), strict=True)
        tokenizer = self.loaded.tokenizer
        return [caption_of(ids, scores, tokenizer.eot_token_id, tokenizer.decode) for ids, scores in answers]

    def _generate(self, pictures: list[Image.Image], latent_BD: torch.Tensor, tokens_BPD: torch.Tensor) -> torch.Tensor:
        """Generate ids [B, L], padded to the longest; when sampling, one by one, each with the seed of its frame."""
        if not self.settings.samples:
            return self._run_generate(latent_BD, tokens_BPD)
        rows = []
        for i, picture in enumerate(pictures):
            with torch.random.fork_rng(devices=[self.loaded.device] if self.loaded.device.type == "cuda" else []):
                torch.manual_seed(frame_seed(picture, self.settings.seed))
                rows.append(self._run_generate(latent_BD[i : i + 1], tokens_BPD[i : i + 1])[0])
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.loaded.model.pad_id)

    def _run_generate(self, latent_BD: torch.Tensor, tokens_BPD: torch.Tensor) -> torch.Tensor:
        """Run open_clip's `generate` on encoded pictures; return ids [B, L]."""
        chosen, tokenizer = self.settings, self.loaded.tokenizer
        repeats = chosen.num_beams if chosen.generation == "beam_search" else 1
        with _encoded_once(self.loaded.model, latent_BD, tokens_BPD, repeats):
            return self.loaded.model.generate(
                latent_BD,  # in place of the pictures, of which only the device and the number are used
                seq_len=self.max_tokens,
                max_seq_len=self.loaded.model.context_length,
                min_seq_len=chosen.min_tokens,
                generation_type=chosen.generation,
                num_beams=chosen.num_beams,
                num_beam_groups=chosen.num_beam_groups,
                top_k=chosen.top_k,
                top_p=chosen.top_p,
                temperature=chosen.temperature,
                repetition_penalty=chosen.repetition_penalty,
                sot_token_id=tokenizer.sot_token_id,
                eos_token_id=tokenizer.eot_token_id,
            )


@contextmanager
def _encoded_once(model: open_clip.CoCa, latent_BD: torch.Tensor, tokens_BPD: torch.Tensor, repeats: int) -> Iterator:
    """Make the model use already encoded pictures inside the `with` block.

    `generate` would run the vision tower on every beam's copy of a picture, which is half of all work with ViT-L.
    """
    encoded = latent_BD.repeat_interleave(repeats, 0), tokens_BPD.repeat_interleave(repeats, 0)
    model._encode_image = lambda images, normalize=True: encoded
    try:
        yield
    finally:
        del model._encode_image  # restores the method of the class
