"""Choose the frames of a clip and resize them to the model's pixels (docs/methods/clip_vip.md section 6).

Indices are pure functions of integers and names without a generator's state, so a sample is the same in every worker
and at every read. Pixels stay uint8 until they are normalised on the device (`training.models.encode.normalise`).
"""

import hashlib
import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from clipmill.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Fit = Literal["squash", "crop"]


def eval_indices(num_frames: int, num_taken: int) -> np.ndarray:
    """Take frames evenly from the first to the last: [num_taken] int64, truncated; shorter clips repeat some.

    As published, the floating-point grid is truncated, which for 15, 19 and some other numbers of frames gives some
    indices one lower than exact arithmetic.
    """
    _check_counts(num_frames, num_taken)
    return np.linspace(0, num_frames - 1, num_taken).astype(np.int64)


def paced_indices(num_frames: int, fps: float, *, frames_per_s: float, most: int) -> np.ndarray:
    """Take the frames at 0, 1/frames_per_s, … s of the clip, at most `most` of them, evenly: int64.

    This is CLIP4Clip's sampling (docs/methods/clip4clip.md section 5) at the clip's exact frame rate. The released code
    rounds the rate down to an integer, so that its times drift, and may read past the end (section 9).
    """
    _check_counts(num_frames, most)
    shown = np.arange(max(1, math.ceil(num_frames / fps * frames_per_s - 1e-6))) * (fps / frames_per_s)
    indices = np.minimum(shown + 1e-6, num_frames - 1).astype(np.int64)  # 1e-6 corrects 3 * (1/3) = 0.99…
    return indices if len(indices) <= most else indices[eval_indices(len(indices), most)]


def train_indices(num_frames: int, num_taken: int, *, seed: int, epoch: int, clip_id: str) -> np.ndarray:
    """Draw both ends within `jitter_ranges` and take frames evenly between: [num_taken] int64, sorted, truncated."""
    first, last = jitter_ranges(num_frames, num_taken)
    draws = _draws(seed, epoch, clip_id)
    start = first[0] + draws[0] % (first[1] - first[0] + 1)
    end = last[0] + draws[1] % (last[1] - last[0] + 1)
    start, end = min(start, end), max(start, end)  # they cross only if fewer than 4 frames are taken
    return np.linspace(start, end, num_taken).astype(np.int64)


def jitter_ranges(num_frames: int, num_taken: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the inclusive ranges of the first and last index: up to one interval k = ⌊N/(n-1)⌋ from either end.

    The published formula divides by zero for one frame and gives -1 for two; here one frame is drawn from the whole
    clip, and ranges end at the clip's ends.
    """
    _check_counts(num_frames, num_taken)
    if num_taken == 1:
        return (0, num_frames - 1), (num_frames - 1, num_frames - 1)
    interval = min(num_frames // (num_taken - 1), num_frames - 1)
    return (0, interval), (num_frames - 1 - interval, num_frames - 1)


def middle_index(num_frames: int) -> int:
    """Return the index of the still that is captioned and paired with the caption: ⌊N/2⌋."""
    _check_counts(num_frames, 1)
    return num_frames // 2


def drawn_text(num_texts: int, *, seed: int, epoch: int, clip_id: str) -> int:
    """Draw one of a clip's reference texts for a visit, as in the published fine-tuning."""
    return _draws(seed, epoch, f"text of {clip_id}")[0] % num_texts


def _draws(seed: int, epoch: int, clip_id: str) -> tuple[int, int]:
    """Draw two independent 64-bit integers by a hash, because a generator's stream could change between versions."""
    digest = hashlib.blake2b(f"{seed}:{epoch}:{clip_id}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _check_counts(num_frames: int, num_taken: int) -> None:
    if num_frames < 1 or num_taken < 1:
        raise UserError(f"cannot take {num_taken} of {num_frames} frames; both must be at least 1")


def resize(frames: "Tensor", size: int, *, fit: Fit = "squash", antialias: bool = True) -> "Tensor":
    """Resize [..., 3, H, W] to [..., 3, size, size] of the same dtype, bicubic; uint8 is rounded, within 0..255.

    fit        "squash" distorts to a square, as published; "crop" scales the short side and cuts out the middle
    antialias  True is the default of today's torchvision; that of the published runs did not antialias floats
    """
    from torch.nn.functional import interpolate

    if fit not in ("squash", "crop"):
        raise UserError(f"fit is {fit!r}; allowed: squash, crop")
    height, width = frames.shape[-2:]
    target = (size, size)
    if fit == "crop":
        landscape = height <= width
        long_side = max(size, round(width * size / height) if landscape else round(height * size / width))
        target = (size, long_side) if landscape else (long_side, size)
    if target != (height, width):
        flat = frames.reshape(-1, *frames.shape[-3:])
        scaled = interpolate(flat, size=target, mode="bicubic", align_corners=False, antialias=antialias)
        frames = scaled.reshape(*frames.shape[:-2], *target)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return frames[..., top : top + size, left : left + size]
