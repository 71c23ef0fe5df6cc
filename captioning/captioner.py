"""The captioner interface, the registry of built-in captioners, and their shared functions.

A captioner gets frames and returns a `Caption` or an `ItemError` for each of them, in order. An empty answer of the
model stays the text "". Import no model library at the top of this module: commands that run no model import it, too.
"""

import hashlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from captioning.model_identity import demo_identity, file_sha256, folder_identity, open_clip_identity
from captioning.settings import CAPTIONERS, CaptionSettings
from clipmill.base.errors import ItemError, UserError
from clipmill.base.plugins import load_attribute
from clipmill.base.secrets import for_fingerprint
from clipmill.base.settings import digest

if TYPE_CHECKING:
    from PIL import Image

CODE_VERSION = 1  # raise it when captions change for the same settings: all captions become pending
# Major versions of the libraries behind captions that give the captions of existing corpora. Another one is part of the
# fingerprint, so that captions are made again; a minor one is not. Add a major here once its captions are known to be
# the same (tests/captioning/test_coca_decoding.py).
SAME_CAPTIONS = {"open_clip_torch": {"2", "3"}, "torch": {"2"}, "transformers": {"4", "5"}}
LIBRARIES = {"coca": ("open_clip_torch", "torch", "transformers"), "huggingface": ("torch", "transformers")}
SCORE_DECIMALS = 4  # float32 sums differ in the sixth decimal between batch sizes and processors


@dataclass(frozen=True)
class Caption:
    """The caption of one frame."""

    text: str  # "" for an empty answer
    score: float | None  # mean natural log-probability of the text's tokens and the end token; None: unknown
    num_tokens: int  # of the text, without start and end


@runtime_checkable
class Captioner(Protocol):
    """A model that captions frames; a plug-in (`captioner: MODULE:ATTRIBUTE`) takes CaptionSettings and returns one."""

    name: str  # for the column `captioner`: the kind and the model, without local paths
    fingerprint: str  # equals `fingerprint_of(settings)`

    def caption(self, images: Sequence["Image.Image | bytes"]) -> list[Caption | ItemError]:
        """Return an answer per image (PIL, or the bytes of a JPEG), in order, independent of the other images."""
        ...


def load_captioner(settings: CaptionSettings) -> Captioner:
    """Load the captioner of these settings with its model; the same settings give the same object.

    Raises UserError for an unknown captioner, or a model that cannot be loaded.
    """
    return _load(settings.model_dump_json(), fingerprint_of(settings))


@lru_cache(maxsize=2)  # the fingerprint is part of the key, so that weights changed on disk are loaded again
def _load(settings_json: str, fingerprint: str) -> Captioner:
    settings = CaptionSettings.model_validate_json(settings_json)
    factory = load_attribute("caption.captioner", settings.captioner, CAPTIONERS.get(settings.captioner))
    captioner = factory(settings)
    if not isinstance(captioner, Captioner):
        raise UserError(
            f"setting caption.captioner = {settings.captioner} returns an object of type {type(captioner).__name__}; "
            "a captioner needs the attributes name, fingerprint and caption()."
        )
    return captioner


def fingerprint_of(settings: CaptionSettings) -> str:
    """Hash everything but the frame that a caption depends on. Reads local weights once; loads no model.

    Raises UserError for a missing file, folder or module.
    """
    chosen = settings.model_dump(mode="json", exclude=settings._operational() | {"model", "pretrained", "revision"})
    chosen["options"] = for_fingerprint("caption.options", chosen["options"])
    return digest([CODE_VERSION, chosen, _model_identity(settings), *_changed_libraries(settings.captioner)])


def _changed_libraries(captioner: str | None) -> list[str]:
    """Return name and major version of the libraries whose captions may differ from those of existing corpora."""
    majors = {name: metadata.version(name).partition(".")[0] for name in LIBRARIES.get(captioner, ())}
    return [f"{name} {major}" for name, major in majors.items() if major not in SAME_CAPTIONS[name]]


def _model_identity(settings: CaptionSettings) -> list:
    """Return the identity of the model: the name of a published one, hashes of local files."""
    if settings.captioner == "coca":
        return open_clip_identity(settings.model, settings.pretrained, "caption")
    if settings.captioner == "huggingface":
        folder = Path(settings.model).expanduser()
        return folder_identity(folder) if folder.is_dir() else [settings.model, settings.revision]
    if settings.captioner == "demo":
        return demo_identity("demo_captioner")
    return [settings.model, settings.pretrained, settings.revision, _module_sha256(settings.captioner)]


def _module_sha256(captioner: str) -> str:
    """Hash the source file of a captioner that has no identity of its own: editing it makes captions pending."""
    module = CAPTIONERS.get(captioner, captioner).partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise UserError(f"setting caption.captioner = {captioner}: {error}.") from error
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise UserError(
            f"setting caption.captioner = {captioner}: Python finds no source file of the module {module}; "
            "add its folder to PYTHONPATH."
        )
    return file_sha256(Path(spec.origin))


def decode_frame(image: "Image.Image | bytes") -> "Image.Image | ItemError":
    """Decode a frame to an RGB picture; return (not raise) the ItemError "undecodable-frame" for other bytes."""
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
    """Caption the images that can be decoded, at most `batch_size` at a time; return answers in the images' order."""
    answers: list[Caption | ItemError] = []
    for start in range(0, len(images), batch_size):
        frames = [decode_frame(image) for image in images[start : start + batch_size]]
        pictures = [frame for frame in frames if not isinstance(frame, ItemError)]
        captions = iter(caption_batch(pictures) if pictures else [])
        answers += [frame if isinstance(frame, ItemError) else next(captions) for frame in frames]
    return answers


def caption_of(ids: list[int], log_probs: list[float], end: int, decode: Callable[[list[int]], str]) -> Caption:
    """Make a caption of `ids` (start, text, id `end`, padding); `log_probs[i]` belongs to `ids[i + 1]`."""
    stop = ids.index(end, 1) if end in ids[1:] else len(ids)
    scored = log_probs[:stop]
    return Caption(" ".join(decode(ids[1:stop]).split()), round(sum(scored) / len(scored), SCORE_DECIMALS), stop - 1)


def frame_seed(picture: "Image.Image", seed: int) -> int:
    """Return the random seed of a picture, which depends on its pixels and `seed` only, not on its batch."""
    pixels = hashlib.sha256(picture.tobytes()).digest()
    return int.from_bytes(hashlib.sha256(pixels + seed.to_bytes(16, "big")).digest()[:8], "big") >> 1
