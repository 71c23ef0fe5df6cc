"""Caption frames by open_clip's CoCa: `Decoder` gives the text, one teacher-forced pass its score.

Shapes: B pictures, L ids per caption (start and end token included), P picture tokens, D their width, V vocabulary.
"""

from collections.abc import Sequence

import open_clip
import torch
from PIL import Image

from captioning.captioner import Caption, caption_in_batches, caption_of, fingerprint_of, frame_seed
from captioning.captioners.coca_decoding import Decoder
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
        max_tokens = min(settings.max_tokens, loaded.model.context_length)
        if settings.min_tokens >= max_tokens:
            limit = f"{name} reads at most {loaded.model.context_length} tokens"
            raise UserError(f"setting caption.min_tokens = {settings.min_tokens} must be lower: {limit}.")
        self.loaded, self.settings, self.name = loaded, settings, name
        self.fingerprint = fingerprint_of(settings)
        start_id, end_id = loaded.tokenizer.sot_token_id, loaded.tokenizer.eot_token_id
        self.decoder = Decoder(loaded.model, settings, start_id, end_id, max_tokens)

    def caption(self, images: Sequence[Image.Image | bytes]) -> list[Caption | ItemError]:
        return caption_in_batches(images, self.settings.batch_size, self._caption_batch)

    @torch.inference_mode()
    def _caption_batch(self, pictures: list[Image.Image]) -> list[Caption]:
        """Encode the pictures once; generate ids, then score each but the first, given those before and the picture."""
        latent_BD, tokens_BPD = self.loaded.model._encode_image(self.loaded.pixels(pictures))
        rows = self._generate(pictures, latent_BD, tokens_BPD)
        pad_id = self.loaded.model.pad_id
        ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
        scored_BL = ids_BL[:, : self.loaded.model.context_length]
        logits_BLV = self.loaded.model(None, scored_BL, image_latent=latent_BD, image_embs=tokens_BPD)["logits"]
        log_probs_BL = logits_BLV.float().log_softmax(-1).gather(-1, scored_BL[:, 1:, None])[..., 0]
        answers = zip(rows, log_probs_BL.tolist(), strict=True)
        end_id, decode = self.decoder.end_id, self.loaded.tokenizer.decode
        return [caption_of(row.tolist(), scores[: len(row) - 1], end_id, decode) for row, scores in answers]

    def _generate(
        self, pictures: list[Image.Image], latent_BD: torch.Tensor, tokens_BPD: torch.Tensor
    ) -> list[torch.Tensor]:
        """Generate each caption's ids; when sampling, one by one, each with the seed of its frame."""
        if not self.settings.samples:
            return self.decoder.generate(latent_BD, tokens_BPD)
        rows = []
        for i, picture in enumerate(pictures):
            with torch.random.fork_rng(devices=[self.loaded.device] if self.loaded.device.type == "cuda" else []):
                torch.manual_seed(frame_seed(picture, self.settings.seed))
                rows += self.decoder.generate(latent_BD[i : i + 1], tokens_BPD[i : i + 1])
        return rows
