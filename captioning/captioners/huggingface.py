"""Caption frames by a Hugging Face image-to-text model that takes the picture alone: BLIP, GIT, ViT-GPT2 and others.

A model is named (with a revision) or stored in a local folder. Code in a model's repository is never run.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from captioning.captioner import Caption, caption_in_batches, caption_of, fingerprint_of, frame_seed
from captioning.model_identity import folder_identity
from captioning.open_clip_loader import DTYPES, use_device
from captioning.settings import CaptionSettings
from clipmill.base.errors import ItemError, UserError
from clipmill.base.settings import digest


def load(settings: CaptionSettings) -> "HuggingFaceCaptioner":
    """Load the model that `caption.model` names. Raises UserError if that fails or it cannot caption pictures."""
    device, dtype = use_device(settings, "caption"), DTYPES[settings.precision]
    folder = Path(settings.model).expanduser()
    where = str(folder) if folder.is_dir() else settings.model
    try:
        common = {"revision": settings.revision} if settings.revision and not folder.is_dir() else {}
        processor = AutoImageProcessor.from_pretrained(where, backend="pil", **common)
        tokenizer = AutoTokenizer.from_pretrained(where, **common)
        model = AutoModelForImageTextToText.from_pretrained(where, **common)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"setting caption.model = {settings.model}: {error}. Give the name or the local folder of an "
            "image-to-text model such as BLIP, GIT or a vision-encoder-decoder."
        ) from error
    identity = f"folder-{digest(folder_identity(folder))}" if folder.is_dir() else settings.model
    return HuggingFaceCaptioner(
        model.to(device, dtype).eval(), processor, tokenizer, settings, f"huggingface/{identity}"
    )


class HuggingFaceCaptioner:
    """A captioner whose captions depend neither on the other frames of a batch nor, when sampling, on their order."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, settings: CaptionSettings, name: str):
        self.model, self.processor, self.tokenizer = model, processor, tokenizer
        self.settings, self.name, self.fingerprint = settings, name, fingerprint_of(settings)
        sep, eos = tokenizer.sep_token_id, tokenizer.eos_token_id
        self.end_id = eos if sep is None else sep  # BERT's vocabularies end a text with [SEP]

    def caption(self, images: Sequence[Image.Image | bytes]) -> list[Caption | ItemError]:
        return caption_in_batches(images, self.settings.batch_size, self._caption_batch)

    @torch.inference_mode()
    def _caption_batch(self, pictures: list[Image.Image]) -> list[Caption]:
        """Caption pictures together; when sampling, one by one, each with the seed of its frame."""
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        pixels_BCHW = pixels.to(self.model.device, self.model.dtype)
        if not self.settings.samples:
            return self._generate(pixels_BCHW)
        captions = []
        for picture, row in zip(pictures, pixels_BCHW, strict=True):
            with torch.random.fork_rng(devices=[row.device] if row.is_cuda else []):
                torch.manual_seed(frame_seed(picture, self.settings.seed))
                captions += self._generate(row[None])
        return captions

    def _generate(self, pixels_BCHW: torch.Tensor) -> list[Caption]:
        """Generate ids [B, L], then score each id but the first, given the ids before it and the picture."""
        ids_BL = self.model.generate(pixel_values=pixels_BCHW, **self._decoding())
        given = "decoder_input_ids" if self.model.config.is_encoder_decoder else "input_ids"
        logits = self.model(pixel_values=pixels_BCHW, **{given: ids_BL[:, :-1]}).logits
        logits_BLV = logits[:, 1 - ids_BL.shape[1] :]  # some models put the picture's tokens before the text's
        log_probs_BL = logits_BLV.float().log_softmax(-1).gather(-1, ids_BL[:, 1:, None])[..., 0]
        answers = zip(ids_BL.tolist(), log_probs_BL.tolist(), strict=True)
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return [caption_of(ids, scores, self.end_id, decode) for ids, scores in answers]

    def _decoding(self) -> dict[str, Any]:
        chosen = self.settings
        common = {
            "min_length": chosen.min_tokens,
            "max_length": chosen.max_tokens,
            "repetition_penalty": chosen.repetition_penalty,
            "num_beams": chosen.num_beams if chosen.generation == "beam_search" else 1,
            "do_sample": chosen.samples,
        }
        if not chosen.samples:
            return common
        limit = {"top_k": chosen.top_k} if chosen.generation == "top_k" else {"top_k": 0, "top_p": chosen.top_p}
        return {**common, **limit, "temperature": chosen.temperature}
