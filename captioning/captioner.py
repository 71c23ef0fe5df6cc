"""The captioner interface, and which class stands behind a setting. No model library is imported at the top.

A captioner gets frames and answers for every one of them, in order: a `Caption`, or the `ItemError` of that one frame.
Nothing is made up: what the model leaves empty is the text "".
"""

import hashlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from captioning.model_identity import demo_identity, file_sha256, folder_identity, open_clip_identity
from captioning.settings import CaptionSettings
from clipmill.base.errors import ItemError, UserError
from clipmill.base.plugins import load_attribute
from clipmill.base.settings import digest

if TYPE_CHECKING:
    from PIL import Image

CODE_VERSION = 1  # of what captioners write for the same model and settings: raising it makes every caption pending
SCORE_DECIMALS = 4  # float32 sums differ in the sixth decimal between batch sizes and processors


@dataclass(frozen=True)
class Caption:
    text: str  # "" where the model said nothing
    score: float | None  # mean natural log-probability of the text's tokens and the end token; None: not known
    num_tokens: int  # of the text, without start and end


@runtime_checkable
class Captioner(Protocol):
    name: str  # what the column `captioner` says: the kind and the model, no path
    fingerprint: str  # equals `fingerprint_of(settings)`

    def caption(self, images: Sequence["Image.Image | bytes"]) -> list[Caption | ItemError]:
        """One answer per image (PIL, or the bytes of a JPEG), in their order, whatever the other images are."""
        ...


def load_captioner(settings: CaptionSettings) -> Captioner:
    """The captioner of these settings, its model loaded; the same object when asked again. Raises UserError."""
    return _load(settings.model_dump_json(), fingerprint_of(settings))


@lru_cache(maxsize=2)  # the fingerprint is part of the key, so weights that changed on disk are loaded anew
def _load(settings_json: str, fingerprint: str) -> Captioner:
    settings = CaptionSettings.model_validate_json(settings_json)
    factory = load_attribute("caption.captioner", settings.captioner, _BUILT_IN.get(settings.captioner))
    captioner = factory(settings)
    if not isinstance(captioner, Captioner):
        raise UserError(
            f"setting caption.captioner = {settings.captioner}: it gives no name, fingerprint and caption()."
        )
    return captioner


def fingerprint_of(settings: CaptionSettings) -> str:
    """Hash of everything that shapes a caption but the frame; reads local weights once, loads no model.

    Raises UserError where a file, folder or module that the settings name is missing.
    """
    chosen = settings.model_dump(mode="json", exclude=settings._operational() | {"model", "pretrained", "revision"})
    return digest([CODE_VERSION, chosen, _model_identity(settings)])


def _model_identity(settings: CaptionSettings) -> list:
    if settings.captioner == "coca":
        return open_clip_identity(settings.model, settings.pretrained, "caption")
    if settings.captioner == "huggingface":
        folder = Path(settings.model).expanduser()
        return folder_identity(folder) if folder.is_dir() else [settings.model, settings.revision]
    if settings.captioner == "demo":
        return demo_identity("demo_captioner")
    return [settings.model, settings.pretrained, settings.revision, _module_sha256(settings.captioner)]


def _module_sha256(captioner: str) -> str:
    """Hash of a plugged-in captioner's source file: editing it makes captions pending."""
    module = captioner.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise UserError(f"setting caption.captioner = {captioner}: {error}.") from error
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise UserError(f"setting caption.captioner = {captioner}: there is no module {module} on the Python path.")
    return file_sha256(Path(spec.origin))


_BUILT_IN = {
    "coca": "captioning.captioners.coca:load",
    "demo": "captioning.demo_models:load_captioner",
    "huggingface": "captioning.captioners.huggingface:load",
}


def decode_frame(image: "Image.Image | bytes") -> "Image.Image | ItemError":
    """A frame as an RGB picture; the ItemError "undecodable-frame" (returned, not raised) for bytes that are none."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(image), formats=("JPEG", "PNG")) if isinstance(image, bytes) else image
        return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return ItemError("undecodable-frame", f"{type(error).__name__}: {error}")


def caption_in_batches(
    images: Sequence["Image.Image | bytes"],
    batch_size: int,
    caption_batch: Callable[[list["Image.Image"]], list[Caption]],
) -> list[Caption | ItemError]:
    """Decode, hand the pictures that decode to `caption_batch` in lists of at most `batch_size`, keep the order."""
    answers: list[Caption | ItemError] = []
    for start in range(0, len(images), batch_size):
        frames = [decode_frame(image) for image in images[start : start + batch_size]]
        pictures = [frame for frame in frames if not isinstance(frame, ItemError)]
        captions = iter(caption_batch(pictures) if pictures else [])
        answers += [frame if isinstance(frame, ItemError) else next(captions) for frame in frames]
    return answers


def frame_seed(picture: "Image.Image", seed: int) -> int:
    """The seed for what is drawn about this picture: its pixels and the setting decide, nothing around it."""
    pixels = hashlib.sha256(picture.tobytes()).digest()
    return int.from_bytes(hashlib.sha256(pixels + seed.to_bytes(16, "big")).digest()[:8], "big") >> 1
