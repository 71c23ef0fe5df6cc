"""Decode frames of a clip from its bytes to the model's pixels, S x S RGB.

There are three decoders with the same result. Packets of a plain MP4, the default encoding, go straight from memory to
the codec (`training.data.mp4_index`). Clips of the "jpeg-frames" encoding are JPEGs. Any other file, and a plain MP4
that the first decoder refuses, is read like a source video (`clipmill.media.packets`, `clipmill.media.decode`): any
container, frames in any order, rotated upright. Frame k is the k-th in display order in all of them.

swscale converts a frame to RGB with the matrix and range of the stream (if unspecified, BT.601 or BT.709 by size), then
`training.data.frame_sampling.resize` scales it. Legend: N pictures, S pixels a side.
"""

import contextlib
import functools
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import av
import cv2
import numpy as np
import torch
from av.video.reformatter import ColorRange, VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from clipmill.base.errors import ItemError
from clipmill.media.decode import DecodeCounts, list_by_decoding, wanted_frames
from clipmill.media.encode import JPEG_MAGIC, jpeg_frames
from clipmill.media.packets import Limits, Untrusted, check_size, list_frames
from clipmill.media.probe import FrameOrientations
from training.data.frame_sampling import Fit, resize
from training.data.mp4_index import Track, plain_track

Pixels = NDArray[np.uint8]
Bytes = bytes | memoryview
Choose = Callable[[int], Sequence[int] | NDArray[np.integer]]

LIMITS = Limits()
# Small pictures are resized together, because the fixed cost of a call is a fifth of a small picture's.
_TOGETHER_PIXELS = 4_000_000


@dataclass(frozen=True)
class Picture:
    """Size of the model's pictures, and the way frames are fitted to it."""

    size: int  # S
    fit: Fit = "squash"
    antialias: bool = True


def decode_clip(data: Bytes, choose: Choose, picture: Picture, out: Sequence[Pixels] | None = None) -> Sequence[Pixels]:
    """Decode the frames with the indices `choose(number of frames)`, in that order: uint8 [N, S, S, 3].

    out  N arrays [S, S, 3] to write to; None: a new array [N, S, S, 3]
    Raises ItemError: empty-file, not-a-video, no-video-stream, undecodable, too-large, too-many-frames,
    not-jpeg-frames, bad-jpeg.
    """
    pixels, places = _distinct(data, choose, picture)
    if out is None:
        return pixels[places]
    for target, place in zip(out, places.tolist(), strict=True):
        target[:] = pixels[place]
    return out


def decode_still(data: Bytes, picture: Picture) -> Pixels:
    """Decode a JPEG (or any picture that OpenCV reads): uint8 [S, S, 3]. Raises ItemError bad-jpeg, too-large."""
    return _resized([_jpeg(data)], picture)[0]


def _distinct(data: Bytes, choose: Choose, picture: Picture) -> tuple[Pixels, NDArray[np.intp]]:
    """Decode the distinct frames wanted, in the clip's order; return them and the index of each wanted frame."""
    if data[-4:] == JPEG_MAGIC:
        return _from_jpegs(data, choose, picture)
    track = plain_track(data)
    if track is not None:
        try:
            return _from_track(data, track, choose, picture)
        except _NotSoPlain:
            pass  # the general decoder reports errors
    return _from_container(data, choose, picture)


# --- A plain MP4


class _NotSoPlain(Exception):
    """The codec does not return one picture per packet."""


def _from_track(data: Bytes, track: Track, choose: Choose, picture: Picture) -> tuple[Pixels, NDArray[np.intp]]:
    wanted = np.asarray(choose(len(track)))
    shown, places = np.unique(wanted, return_inverse=True)
    gather = _Gather(picture)
    for frame in _track_frames(data, track, shown):
        if frame.colorspace == _UNSPECIFIED and track.tagged or frame.interlaced_frame:
            raise _NotSoPlain
        gather.add(_rgb(frame))
    return gather.pixels(), places


def _track_frames(data: Bytes, track: Track, shown: NDArray[np.integer]) -> Iterator[av.VideoFrame]:
    """Yield the frames `shown` (ascending), decoding each group of pictures from its key to its last shown frame."""
    decoder = av.CodecContext.create("h264", "r")
    decoder.extradata = track.extradata
    decoder.thread_count = 1
    decoder.options = {"max_pixels": str(LIMITS.max_pixels)}
    view = memoryview(data)
    wanted = set(shown.tolist())
    try:
        for first, last in _stretches(track.keys, shown):
            number = first
            for frame in _decode_packets(decoder, view, track, first, last):
                if number in wanted:
                    yield frame
                number += 1
            if number != last + 1:
                raise _NotSoPlain
    except av.FFmpegError as error:
        raise _NotSoPlain from error


def _stretches(keys: NDArray[np.bool_], shown: NDArray[np.integer]) -> list[tuple[int, int]]:
    """Return the (first, last) frame of every stretch to decode; neighbours without a gap are merged."""
    starts = np.flatnonzero(keys)
    group = np.searchsorted(starts, shown, side="right") - 1
    ends = shown[np.append(np.flatnonzero(np.diff(group)), len(shown) - 1)]
    stretches: list[tuple[int, int]] = []
    for first, last in zip(starts[np.unique(group)].tolist(), ends.tolist(), strict=True):
        if stretches and stretches[-1][1] + 1 == first:
            first = stretches.pop()[0]
        stretches.append((first, last))
    return stretches


def _decode_packets(decoder, view: memoryview, track: Track, first: int, last: int) -> Iterator[av.VideoFrame]:
    """Decode packets, then drain and flush, because key frames of two groups may have the same H.264 picture id."""
    for number in range(first, last + 1):
        offset = int(track.offsets[number])
        yield from decoder.decode(av.Packet(view[offset : offset + int(track.sizes[number])]))
    yield from decoder.decode(None)
    decoder.flush_buffers()


# --- Any other video


def _from_container(data: Bytes, choose: Choose, picture: Picture) -> tuple[Pixels, NDArray[np.intp]]:
    """Decode by the packets' timestamps; if they are wrong, by the order of the decoder's output."""
    if not data:
        raise ItemError("empty-file", "the clip has no bytes")
    with _named(data) as path, _without_path(path):
        for listed in (lambda counts: list_frames(path, LIMITS), lambda counts: list_by_decoding(path, LIMITS, counts)):
            counts = DecodeCounts()
            try:
                source = listed(counts)
                shown, places = np.unique(np.asarray(choose(len(source.times))), return_inverse=True)
                gather, orientations = _Gather(picture), FrameOrientations()
                for _, frame, _ in wanted_frames(path, source, shown, LIMITS, counts):
                    gather.add(orientations.of(frame).upright(_rgb(frame)))
            except Untrusted:
                continue
            if gather.num_added == len(shown) and not counts.num_errors:
                return gather.pixels(), places
    raise ItemError("undecodable", "; ".join(sorted(counts.messages)) or "not all frames come out of the decoder")


@contextlib.contextmanager
def _named(data: Bytes) -> Iterator[str]:
    """Yield a path to bytes in memory, because FFmpeg's demuxers open files by name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("clip")
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    with tempfile.NamedTemporaryFile(prefix="clipmill-clip-") as file:
        file.write(data)
        file.flush()
        yield file.name


@contextlib.contextmanager
def _without_path(path: str) -> Iterator[None]:
    """Remove the name of a temporary file from error messages."""
    try:
        yield
    except ItemError as error:
        message = error.message.removeprefix(f"{os.path.basename(path)}: ").replace(f"file:{path}", "the clip")
        raise ItemError(error.error_class, message) from error


# --- JPEGs


def _from_jpegs(data: Bytes, choose: Choose, picture: Picture) -> tuple[Pixels, NDArray[np.intp]]:
    files = jpeg_frames(data)
    if not files:
        raise ItemError("undecodable", "the clip has no pictures")
    shown, places = np.unique(np.asarray(choose(len(files))), return_inverse=True)
    gather = _Gather(picture)
    for number in shown.tolist():
        gather.add(_jpeg(files[number]))
    return gather.pixels(), places


def _jpeg(data: Bytes) -> Pixels:
    """Decode a JPEG to uint8 [H, W, 3], rotated as its EXIF says; check its size before decoding."""
    try:
        with Image.open(io.BytesIO(data)) as header:
            width, height = header.size
        if width * height > LIMITS.max_pixels:
            raise ItemError("too-large", f"{width}x{height} pictures, at most {LIMITS.max_pixels} pixels are decoded")
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except (OSError, Image.DecompressionBombError, cv2.error) as error:
        raise ItemError("bad-jpeg", str(error)) from error
    if pixels is None:
        raise ItemError("bad-jpeg", "the still picture does not decode")
    return pixels


# --- Pixels

_BT709, _UNSPECIFIED, _BT470BG = 1, 2, 5  # AVColorSpace


def _rgb(frame: av.VideoFrame) -> Pixels:
    """Convert a frame to RGB: uint8 [H, W, 3], a view."""
    check_size(frame, LIMITS)
    matrix = None
    if frame.colorspace == _UNSPECIFIED and not frame.format.is_rgb:
        matrix = _BT709 if frame.width >= 1280 or frame.height > 576 else _BT470BG
    converter = _converter(frame.width, frame.height, frame.format.name)
    rgb = converter.reformat(frame, format="rgb24", src_colorspace=matrix, dst_color_range=ColorRange.JPEG, threads=1)
    plane = rgb.planes[0]
    return np.ndarray((rgb.height, rgb.width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))


@functools.lru_cache(maxsize=16)
def _converter(width: int, height: int, pix_fmt: str) -> VideoReformatter:
    """Keep one converter per kind of frame, so that its tables are built once."""
    return VideoReformatter()


class _Gather:
    """Collects pictures and resizes those of one shape together."""

    def __init__(self, picture: Picture):
        self.picture = picture
        self.num_added = 0
        self.waiting: list[Pixels] = []
        self.done: list[Pixels] = []

    def add(self, pixels: Pixels) -> None:
        if self.waiting:
            height, width = self.waiting[0].shape[:2]
            full = (len(self.waiting) + 1) * height * width > _TOGETHER_PIXELS
            if full or pixels.shape != self.waiting[0].shape:
                self._flush()
        self.waiting.append(pixels)
        self.num_added += 1

    def pixels(self) -> Pixels:
        self._flush()
        return self.done[0] if len(self.done) == 1 else np.concatenate(self.done)

    def _flush(self) -> None:
        if self.waiting:
            self.done.append(_resized(self.waiting, self.picture))
            self.waiting = []


def _resized(pictures: list[Pixels], picture: Picture) -> Pixels:
    """Resize frames of one shape to [N, S, S, 3]. Memory stays channels last, which is the resize's fast path."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    small = resize(stacked, picture.size, fit=picture.fit, antialias=picture.antialias)
    return small.permute(0, 2, 3, 1).numpy()
