"""Score clips: similarities of frame, subtitle and caption by any open_clip model, and two measures of the subtitle.

The result is the rows of `scores`. A missing text or frame gives null, never a number. Thresholds do not belong here:
queries decide which scores are good enough.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from captioning.captioner import decode_frame
from captioning.model_identity import demo_identity, open_clip_identity, open_clip_name
from captioning.settings import ScoreSettings
from clipmill.base.errors import ItemError
from clipmill.base.settings import digest

if TYPE_CHECKING:
    import torch

    from captioning.open_clip_loader import LoadedModel

CODE_VERSION = 1  # raise it when scores change for the same model and settings: all scores become pending
DEMO_MODEL = "demo_captioner"
DECIMALS = 5  # float32 sums differ in the seventh decimal between batch sizes and processors


@dataclass(frozen=True)
class ScoreInput:
    """A clip to score."""

    clip_id: str
    jpeg: bytes | None  # the clip's caption frame; None without one
    subtitle: str | None  # None and "" both mean no speech
    caption: str | None
    duration_s: float | None = None  # of the clip, for words per second


def load_scorer(settings: ScoreSettings) -> "Scorer":
    """Load the scorer of these settings with its model; the same settings give the same object. Raises UserError."""
    return _load(settings.model_dump_json(), fingerprint_of(settings))


@lru_cache(maxsize=2)  # the fingerprint is part of the key, so that weights changed on disk are loaded again
def _load(settings_json: str, fingerprint: str) -> "Scorer":
    settings = ScoreSettings.model_validate_json(settings_json)
    if settings.model == "demo":
        from captioning.demo_models import load_model

        return Scorer(load_model(DEMO_MODEL, settings, "score"), settings.batch_size, "demo", fingerprint)
    from captioning.open_clip_loader import load_open_clip

    name = open_clip_name(settings.model, settings.pretrained, "score")
    return Scorer(load_open_clip(settings, "score"), settings.batch_size, name, fingerprint)


def fingerprint_of(settings: ScoreSettings) -> str:
    """Hash everything but the clip that a score depends on; loads no model. Raises UserError for missing files."""
    if settings.model == "demo":
        identity: list = demo_identity(DEMO_MODEL)
    else:
        identity = open_clip_identity(settings.model, settings.pretrained, "score")
    return digest([CODE_VERSION, identity, settings.precision])


class Scorer:
    """A model that scores clips. It encodes each distinct frame and each distinct text once, in batches."""

    def __init__(self, loaded: "LoadedModel", batch_size: int, name: str, fingerprint: str):
        self.loaded, self.batch_size, self.name, self.fingerprint = loaded, batch_size, name, fingerprint

    def score(self, rows: Sequence[ScoreInput]) -> list[dict[str, Any] | ItemError]:
        """Return a row of `scores` per clip, in order, or the ItemError "undecodable-frame"."""
        frames = {row.jpeg: None for row in rows if row.jpeg is not None}
        images = self._image_features(frames)
        texts: dict[str, torch.Tensor] = {}
        for batch in _batched(dict.fromkeys(t for r in rows for t in (r.subtitle, r.caption) if t), self.batch_size):
            ids = self.loaded.tokenizer(batch).to(self.loaded.device)  # cuts texts at the model's context length
            texts |= zip(batch, self._encode(self.loaded.model.encode_text, ids), strict=True)
        return [self._row(row, images.get(row.jpeg), texts) for row in rows]

    def _row(self, row: ScoreInput, image: Any, texts: dict[str, "torch.Tensor"]) -> dict[str, Any] | ItemError:
        if isinstance(image, ItemError):
            return image
        subtitle, caption = texts.get(row.subtitle), texts.get(row.caption)
        return {
            "clip_id": row.clip_id,
            "model": self.name,
            "fingerprint": self.fingerprint,
            "frame_sha256": None if row.jpeg is None else hashlib.sha256(row.jpeg).hexdigest(),
            "subtitle_similarity": _cosine(image, subtitle),
            "caption_similarity": _cosine(image, caption),
            "text_similarity": _cosine(subtitle, caption),
            **speech_columns(row.subtitle, row.duration_s),
        }

    def _image_features(self, jpegs: Iterable[bytes]) -> dict[bytes, Any]:
        """Return the unit vector [D], or the ItemError, of every frame."""
        features: dict[bytes, Any] = {}
        for batch in _batched(jpegs, self.batch_size):
            decoded = {jpeg: decode_frame(jpeg) for jpeg in batch}
            features |= {jpeg: error for jpeg, error in decoded.items() if isinstance(error, ItemError)}
            pictures = {jpeg: picture for jpeg, picture in decoded.items() if not isinstance(picture, ItemError)}
            if pictures:
                pixels = self.loaded.pixels(list(pictures.values()))
                features |= zip(pictures, self._encode(self.loaded.model.encode_image, pixels), strict=True)
        return features

    def _encode(self, tower: Callable, inputs: "torch.Tensor") -> "torch.Tensor":
        """Encode a batch to unit vectors, float32 [B, D] on the CPU."""
        import torch

        with torch.inference_mode():
            return torch.nn.functional.normalize(tower(inputs).float(), dim=-1).cpu()


def speech_columns(subtitle: str | None, duration_s: float | None) -> dict[str, float | None]:
    """Return words per second, and 1 - distinct words / words; None without words, or without a duration."""
    words = re.findall(r"\w+(?:['’-]\w+)*", (subtitle or "").lower())
    return {
        "words_per_s": len(words) / duration_s if words and duration_s else None,
        "repeated_word_ratio": 1 - len(set(words)) / len(words) if words else None,
    }


def _cosine(first: "torch.Tensor | None", second: "torch.Tensor | None") -> float | None:
    """Return the cosine of two unit vectors, rounded; None if one is missing."""
    return None if first is None or second is None else round(float(first @ second), DECIMALS)


def _batched(items: Iterable, size: int) -> Iterable[list]:
    items = list(items)
    return (items[start : start + size] for start in range(0, len(items), size))
