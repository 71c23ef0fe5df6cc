"""Read samples, from bytes in their shards to pictures and token ids; each is a pure function of (row, epoch).

`SampleReader.read` reads a few rows together, in the given order. A sample is the same in any process and beside any
other samples. A sample that cannot be read is a masked hole and a `Failure`.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipmill.base.errors import ItemError
from shards.corpus.tombstones import FORGOTTEN, Tombstones
from training.data.batch import Batch
from training.data.clip_frames import Picture, Pixels, decode_clip, decode_still
from training.data.epoch_plan import PAD
from training.data.frame_sampling import drawn_text, eval_indices, middle_index, paced_indices, train_indices
from training.data.range_reader import Range, ShardReader
from training.data.relocation import RelocationIndex
from training.data.selection import Selection
from training.data.shard_cache import ShardCache
from training.data.tokenizer import TextEncoder
from training.settings import DataSettings

HOLE = -1  # in `Batch.rows_B`


class Failure(NamedTuple):
    """A sample that could not be read."""

    clip_id: str
    row: int
    error: ItemError


class PixelBuffer(NamedTuple):
    """Memory for the pixels of samples, uint8, channels last: two dense arrays, each copied to a GPU at once."""

    frames_BTSS3: Tensor
    stills_B1SS3: Tensor

    def part(self, slots: slice) -> "PixelBuffer":
        return PixelBuffer(self.frames_BTSS3[slots], self.stills_B1SS3[slots])

    def sample(self, slot: int) -> list[Pixels]:
        """Return views of a sample's pictures [S, S, 3]: T frames and the still."""
        return [*self.frames_BTSS3[slot].numpy(), self.stills_B1SS3[slot, 0].numpy()]

    def clear(self, slot: int) -> None:
        self.frames_BTSS3[slot] = 0
        self.stills_B1SS3[slot] = 0

    def copy(self, source: "PixelBuffer") -> None:
        for pixels, others in zip(self, source, strict=True):
            pixels.copy_(others)


_ARRAYS = ("rows_B", "subtitle_BL", "caption_BL", "video_mask_B", "subtitle_mask_B", "caption_mask_B")
_ARRAYS += ("frame_mask_BT", "neighbour_BNL", "neighbour_mask_BN")


@dataclass
class PartialBatch:
    """Some slots of a step as plain arrays, so that it passes through a pipe. Legend: `training.data.batch`."""

    pixels: PixelBuffer | None  # None while sent through a pipe
    rows_B: NDArray[np.int64]
    subtitle_BL: NDArray[np.int64]  # cut to the longest text of the part
    caption_BL: NDArray[np.int64]
    video_mask_B: NDArray[np.bool_]
    subtitle_mask_B: NDArray[np.bool_]
    caption_mask_B: NDArray[np.bool_]
    frame_mask_BT: NDArray[np.bool_]
    neighbour_BNL: NDArray[np.int64]
    neighbour_mask_BN: NDArray[np.bool_]
    failures: list[Failure]
    read_s: float  # wall time waiting for bytes
    decode_s: float  # wall time from bytes to pixels

    def batch(self) -> Batch:
        """Convert without copying. Pixels stay channels last in memory, which is fast on GPUs."""
        assert self.pixels is not None
        return Batch(
            video_BT3SS=self.pixels.frames_BTSS3.permute(0, 1, 4, 2, 3),
            frame_B13SS=self.pixels.stills_B1SS3.permute(0, 1, 4, 2, 3),
            **{name: torch.from_numpy(getattr(self, name)) for name in _ARRAYS},
        )


def join(parts: list[PartialBatch], pixels: PixelBuffer) -> PartialBatch:
    """Join parts whose pixels are already in `pixels`."""
    return PartialBatch(
        pixels,
        *(_joined([getattr(part, name) for part in parts]) for name in _ARRAYS),
        failures=[failure for part in parts for failure in part.failures],
        read_s=sum(part.read_s for part in parts),
        decode_s=sum(part.decode_s for part in parts),
    )


def _joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    """Concatenate along the first axis; pad shorter texts with zeros after the end token."""
    shape = [sum(len(array) for array in arrays), *np.max([array.shape[1:] for array in arrays], axis=0).astype(int)]
    joined, at = np.zeros(shape, arrays[0].dtype), 0
    for array in arrays:
        joined[(slice(at, at + len(array)), *map(slice, array.shape[1:]))] = array
        at += len(array)
    return joined


class SampleReader:
    """Reader of a selection's samples; its pickle is small, and files are opened in the process that reads.

    train  False: the frames and texts of evaluation, the same in every epoch
    """

    def __init__(
        self, selection: Selection, data: DataSettings, texts: TextEncoder, image_size: int, *, train: bool = True
    ):
        self.selection, self.data, self.texts, self.image_size, self.train = selection, data, texts, image_size, train
        self.cache_dir = Path(data.cache_dir).absolute() if data.cache_dir else None  # readers may have another cwd

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("shards", "relocation", "tombstones")
        }

    @cached_property
    def shards(self) -> ShardReader:
        cache = ShardCache(self.cache_dir, self.data.cache_bytes) if self.cache_dir else None
        return ShardReader(self.selection.root, cache, self.wanted_bytes)

    @cached_property
    def tombstones(self) -> Tombstones | None:
        return Tombstones(self.selection.root) if self.selection.root else None

    @cached_property
    def relocation(self) -> RelocationIndex:
        return RelocationIndex(self.selection.root)

    def close(self) -> None:
        """Close open shards; the next read opens them again."""
        if "shards" in self.__dict__:
            self.shards.close()

    @property
    def picture(self) -> Picture:
        return Picture(self.image_size, self.data.fit, self.data.antialias)

    @property
    def sample_bytes(self) -> int:
        """Return the bytes of a sample's pixels."""
        return (self.data.num_frames + 1) * self.image_size * self.image_size * 3

    def pixel_buffer(self, num_samples: int, buffer: Tensor | None = None) -> PixelBuffer:
        """View a buffer of at least `num_samples * sample_bytes` bytes, or a new one, as uninitialised pixels."""
        if buffer is None:
            buffer = torch.empty(num_samples * self.sample_bytes, dtype=torch.uint8)
        size, num_frames = self.image_size, self.data.num_frames
        pixels = buffer[: num_samples * self.sample_bytes].view(-1, size, size, 3)
        frames, stills = pixels.tensor_split([num_samples * num_frames])
        return PixelBuffer(frames.view(num_samples, num_frames, size, size, 3), stills.unsqueeze(1))

    def read(
        self,
        rows: Sequence[int] | NDArray[np.integer],
        epoch: int,
        *,
        pixels: PixelBuffer | None = None,
        lost: Mapping[int, ItemError] | None = None,
        watch: Callable[[int], None] = lambda slot: None,
    ) -> PartialBatch:
        """Read rows in order; a row `PAD` gives an empty slot.

        pixels  memory to write to; None: new memory
        lost    slots to skip, and the error to report for each
        watch   called with the number of a slot before it is decoded, and with -1 at the end
        """
        rows = np.asarray(rows, np.int64)
        pixels = self.pixel_buffer(len(rows)) if pixels is None else pixels
        slots = np.flatnonzero(rows != PAD)
        clips = self.selection.take(rows[slots]).to_pylist()
        lost = dict(lost or {})
        if self.tombstones is not None:  # videos may have been forgotten since they were selected
            forgotten = self.tombstones.cover([clip["video_id"] for clip in clips])
            error = ItemError(FORGOTTEN, "its video was forgotten (`clipmill forget`)")
            lost |= {slot: error for slot, covered in zip(slots.tolist(), forgotten, strict=True) if covered}
        began = time.perf_counter()
        wanted = [slot not in lost for slot in slots.tolist()]
        found = iter(self._bytes([clip for clip, reads in zip(clips, wanted, strict=True) if reads]))
        sources = [next(found) if reads else None for reads in wanted]
        read_s, errors = time.perf_counter() - began, {}
        frame_mask_BT = np.ones((len(rows), self.data.num_frames), bool)
        for slot in np.flatnonzero(rows == PAD):
            pixels.clear(slot)
        for slot, clip, source in zip(slots.tolist(), clips, sources, strict=True):
            watch(slot)
            try:
                if slot in lost:
                    raise lost[slot]
                frame_mask_BT[slot, self._decode(clip, source, epoch, pixels.sample(slot)) :] = False
            except ItemError as error:
                pixels.clear(slot)
                errors[slot] = error
        watch(-1)
        decode_s = time.perf_counter() - began - read_s
        named = dict(zip(slots.tolist(), clips, strict=True))
        failures = [Failure(named[slot]["clip_id"], int(rows[slot]), error) for slot, error in errors.items()]
        readable_B = np.isin(np.arange(len(rows)), slots) & ~np.isin(np.arange(len(rows)), list(errors))
        clips_B = [named.get(slot) for slot in range(len(rows))]
        subtitle_BL, subtitle_mask_B = self._ids(clips_B, self.data.subtitle, readable_B, epoch)
        caption_BL, caption_mask_B = self._ids(clips_B, "caption", readable_B, epoch)
        rows_B = np.where(rows == PAD, HOLE, rows)
        arrays = (rows_B, subtitle_BL, caption_BL, readable_B, subtitle_mask_B, caption_mask_B, frame_mask_BT)
        return PartialBatch(pixels, *arrays, *self._neighbours(clips_B, readable_B), failures, read_s, decode_s)

    def _bytes(self, clips: list[dict[str, Any]]) -> list["_Source"]:
        """Read the bytes of all clips together, so that neighbours in a shard are one read."""
        ranges = [Range(clip["shard"], clip["mp4_offset"], clip["mp4_bytes"]) for clip in clips]
        hashes = [clip["mp4_sha256"] for clip in clips]
        stills = [clip for clip in clips if self._has_still(clip)]
        ranges += [Range(clip["shard"], clip["jpg_offset"], clip["jpg_bytes"]) for clip in stills]
        hashes += [clip["jpg_sha256"] for clip in stills]
        found = self._checked(ranges, hashes, self.shards.read(ranges))
        pictures = iter(found[len(clips) :])
        return [
            _Source(data, next(pictures) if self._has_still(clip) else None)
            for clip, data in zip(clips, found, strict=False)
        ]

    def _checked(
        self, ranges: list[Range], hashes: list[bytes | None], found: list[memoryview | ItemError]
    ) -> list[memoryview | ItemError]:
        """Replace bytes with a wrong hash by the right ones from elsewhere in the corpus, or by an error."""
        wrong = [n for n, (data, sha256) in enumerate(zip(found, hashes, strict=True)) if not _is(data, sha256)]
        if not wrong or not self.selection.root:
            return found
        moved = self.relocation.find([hashes[n] for n in wrong])
        again = [n for n, place in zip(wrong, moved, strict=True) if place is not None]
        places = [place for place in moved if place is not None]
        for shard in {place.shard for place in places}:
            self.shards.reopen(shard)
        checked = dict(zip(again, self.shards.read(places), strict=True))
        for n in wrong:
            data = checked.get(n, found[n])
            if not _is(data, hashes[n]):
                if not isinstance(data, ItemError):
                    place = f"{ranges[n].shard} has other bytes at {ranges[n].offset} than were selected"
                    data = ItemError("hash-mismatch", f"{place}, and no other shard has those")
            found[n] = data
        return found

    def _has_still(self, clip: dict[str, Any]) -> bool:
        return self.data.still == "captioned" and clip["jpg_offset"] is not None

    def _decode(self, clip: dict[str, Any], source: "_Source", epoch: int, out: list[Pixels]) -> int:
        """Fill one sample's pixels, with zeros after the frames taken; return their number. Raises ItemError."""
        frames, num_taken = out[: self.data.num_frames], 0
        for data in source:
            if isinstance(data, ItemError):
                raise data
        if source.still is not None:
            out.pop()[:] = decode_still(source.still, self.picture)
        elif self.data.still == "captioned" and clip["caption"]:
            raise ItemError("no-still", "the sample has a caption but no JPEG; set data.still = middle")
        with_middle = source.still is None

        def choose(total: int) -> NDArray[np.integer]:
            nonlocal num_taken
            indices = self._indices(total, epoch, clip)
            num_taken = len(indices)
            indices = np.pad(indices, (0, len(frames) - num_taken), mode="edge")  # decoded once
            return np.append(indices, middle_index(total)) if with_middle else indices

        decode_clip(source.clip, choose, self.picture, out)
        for pixels in frames[num_taken:]:
            pixels[:] = 0
        return num_taken

    def _indices(self, total: int, epoch: int, clip: dict[str, Any]) -> NDArray[np.integer]:
        data = self.data
        if data.frames_per_s is not None:
            if clip["fps"] is None:
                raise ItemError("no-frame-rate", "data.frames_per_s is set, but the clip's frame rate is not known")
            return paced_indices(total, clip["fps"], frames_per_s=data.frames_per_s, most=data.num_frames)
        if self.train and data.jitter:
            return train_indices(total, data.num_frames, seed=data.seed, epoch=epoch, clip_id=clip["clip_id"])
        return eval_indices(total, data.num_frames)

    def _ids(
        self, clips_B: list[dict[str, Any] | None], column: str, readable_B: NDArray[np.bool_], epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokenise a column: ids [B, L] cut to the longest, mask [B]. A missing text is empty and masked."""
        texts = []
        for clip in clips_B:
            text = (clip and clip[column]) or ""
            if isinstance(text, list):
                draw = drawn_text(len(text), seed=self.data.seed, epoch=epoch, clip_id=clip["clip_id"])
                text = text[draw if self.train else 0]
            texts.append(text)
        return self._encoded(texts, readable_B)

    def _neighbours(
        self, clips_B: list[dict[str, Any] | None], readable_B: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokenise the subtitles near in time: ids [B, N, L], mask [B, N]."""
        num = 2 * self.data.neighbours if self.train else 0
        lists = [((clip or {}).get("neighbours") or [])[:num] for clip in clips_B]
        texts = [text or "" for near in lists for text in near + [None] * (num - len(near))]
        shape = (len(clips_B), num)
        if not num:
            return np.zeros((*shape, 1), np.int64), np.zeros(shape, bool)
        ids_ML, mask_M = self._encoded(texts, readable_B.repeat(num))
        return ids_ML.reshape(*shape, -1), mask_M.reshape(shape)

    def _encoded(self, texts: list[str], readable_M: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        texts = [text.strip() for text in texts]
        mask_M = np.array([bool(text) for text in texts]) & readable_M
        ids_ML = self.texts([text if there else "" for text, there in zip(texts, mask_M.tolist(), strict=True)]).numpy()
        return ids_ML[:, : num_tokens(ids_ML)], mask_M

    # --- Cached shards

    def wanted_bytes(self, shard: str) -> int:
        """Count the bytes of a shard in the selection, by bisection, because the selection is in order of shards."""
        first = self._first_row(lambda name: name >= shard)
        after = self._first_row(lambda name: name > shard)
        table = self.selection.take(np.arange(first, after))
        names = ["mp4_bytes"] + ["jpg_bytes"] * (self.data.still == "captioned")
        return sum(pc.sum(table[name]).as_py() or 0 for name in names)

    def _first_row(self, reached: Callable[[str], bool]) -> int:
        low, high = 0, self.selection.num_clips
        while low < high:
            middle = (low + high) // 2
            if reached(self.selection.take([middle])["shard"][0].as_py()):
                high = middle
            else:
                low = middle + 1
        return low


def _is(data: memoryview | ItemError, sha256: bytes | None) -> bool:
    """Return True if the bytes have the selected hash; a hash of None accepts anything."""
    return sha256 is None or (not isinstance(data, ItemError) and hashlib.sha256(data).digest() == sha256)


class _Source(NamedTuple):
    """Bytes of a clip and, if wanted, of its captioned frame; an error in the place of missing bytes."""

    clip: memoryview | ItemError
    still: memoryview | ItemError | None


def num_tokens(ids_BL: NDArray[np.int64]) -> int:
    """Return the length up to the last end token of a batch; the end token has the largest id of its row."""
    return int(ids_BL.argmax(axis=1).max()) + 1
