"""Convert decoded source frames to clip pictures: upright, square pixels, scaled, 8-bit 4:2:0.

Input is any frame that FFmpeg decodes. Colour: an SDR source keeps its YUV matrix (BT.601 or BT.709, guessed from the
size as players do if it is not given), and the result is tagged with it; full range becomes limited; RGB becomes
BT.709. HDR (PQ or HLG) and BT.2020 sources are scaled at their own depth, then mapped to BT.709 by swscale's colour
management: the 203-nit reference white becomes SDR white, brighter or more saturated colours are clipped. Interlaced
pictures stay interlaced.
"""

import functools
import math
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter

from clipmill.media.probe import AS_STORED, FrameOrientations, Orientation

# Bit-exact code paths: the same pixels on every processor.
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

BT709, UNSPECIFIED, BT470BG, SMPTE170M, SMPTE240M = 1, 2, 5, 6, 7  # AVColorSpace
HDR_CURVES = {int(ColorTrc.SMPTE2084), int(ColorTrc.ARIB_STD_B67)}
BT2020 = int(ColorPrimaries.BT2020)


def target_size(width: int, height: int, pixel_aspect: Fraction, short_side: int | None) -> tuple[int, int]:
    """Return (width, height) before rotation: square pixels, even, short side at most `short_side`.

    It never enlarges, except to 2x2, the smallest picture of 4:2:0.
    """
    display_width = width * pixel_aspect if Fraction(1, 16) <= pixel_aspect <= 16 else Fraction(width)
    scale = Fraction(1)
    if short_side is not None:
        scale = min(scale, short_side / min(display_width, Fraction(height)))
    return _even(display_width * scale), _even(height * scale)


def _even(length: Fraction) -> int:
    return max(2, 2 * math.ceil(length / 2 - Fraction(1, 2)))  # the nearest even number, the smaller one in a tie


class PictureMaker:
    """Convert the frames of one video to clip pictures, each in its own shape, which may change midway."""

    def __init__(self, pixel_aspect: Fraction | None, short_side: int | None):
        self.pixel_aspect = pixel_aspect or Fraction(1)
        self.short_side = short_side
        self.shape: tuple = ()  # of the frame before
        self.size = (0, 0)  # of its picture before it is turned
        self.orientations = FrameOrientations()
        self.scaler = VideoReformatter()

    def __call__(self, frame: av.VideoFrame, pixel_aspect: Fraction | None = None) -> av.VideoFrame:
        """Return a new yuv420p frame in limited range, without the source's timestamps, types or side data.

        pixel_aspect  of this frame; None: that of the video
        """
        shape = (frame.width, frame.height, pixel_aspect or self.pixel_aspect)
        if shape != self.shape:
            self.shape, self.size = shape, target_size(*shape, self.short_side)
        wide = frame.color_trc in HDR_CURVES or frame.color_primaries == BT2020
        small, matrix = self._mapped(frame) if wide else self._scaled(frame)
        return _picture(_upright(small.to_ndarray(), self.orientations.of(frame)), matrix)

    def _scaled(self, frame: av.VideoFrame) -> tuple[av.VideoFrame, int]:
        """Scale an SDR frame; return (yuv420p frame, its AVColorSpace)."""
        matrix = BT709
        if frame.colorspace in (BT470BG, SMPTE170M, SMPTE240M):
            matrix = SMPTE170M
        elif frame.colorspace == UNSPECIFIED and frame.width < 1280 and frame.height <= 576:
            matrix = SMPTE170M
        is_rgb = frame.format.is_rgb or frame.format.name.startswith(("pal8", "gray", "mono"))
        colours = {"dst_colorspace": Colorspace.ITU709} if is_rgb else {}
        small = self.scaler.reformat(
            frame, *self.size, "yuv420p", interpolation=SCALING, dst_color_range=ColorRange.MPEG, threads=1, **colours
        )
        return small, BT709 if is_rgb else matrix

    def _mapped(self, frame: av.VideoFrame) -> tuple[av.VideoFrame, int]:
        """Scale an HDR or BT.2020 frame and map its colours; return (yuv420p frame, BT709)."""
        small = self.scaler.reformat(frame, *self.size, frame.format, interpolation=SCALING, threads=1)
        if small.color_primaries == UNSPECIFIED:
            small.color_primaries = BT2020
        if small.colorspace == UNSPECIFIED:
            small.colorspace = 9  # BT.2020, non-constant luminance
        return _mapper().reformat(
            small,
            format="yuv420p",
            interpolation=SCALING,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            dst_color_trc=ColorTrc.BT709,
            dst_color_primaries=ColorPrimaries.BT709,
            threads=1,
        ), BT709


@functools.cache
def _mapper() -> VideoReformatter:
    """Return the process's colour mapper. Its table takes seconds to build and serves all sources of a kind."""
    return VideoReformatter()


def fitted(picture: av.VideoFrame, size: tuple[int, int]) -> av.VideoFrame:
    """Scale a clip picture to fit into another size, with black bars, as players do where the shape changes midway."""
    scale = min(Fraction(size[0], picture.width), Fraction(size[1], picture.height))
    inner = _even(picture.width * scale), _even(picture.height * scale)
    small = VideoReformatter().reformat(picture, *inner, "yuv420p", interpolation=SCALING, threads=1)
    left, top = (size[0] - inner[0]) // 4 * 2, (size[1] - inner[1]) // 4 * 2
    planes = []
    for plane, step, black in zip(_planes(small.to_ndarray()), (1, 2, 2), (16, 128, 128), strict=True):
        whole = np.full((size[1] // step, size[0] // step), black, np.uint8)
        whole[top // step :, left // step :][: plane.shape[0], : plane.shape[1]] = plane
        planes.append(whole)
    return _picture(_packed(planes), picture.colorspace)


def _picture(packed: np.ndarray, matrix: int) -> av.VideoFrame:
    """Return yuv420p samples [H * 3/2, W] as a frame of an SDR picture with this AVColorSpace."""
    picture = av.VideoFrame.from_ndarray(packed, format="yuv420p")
    picture.colorspace, picture.color_range = matrix, ColorRange.MPEG
    picture.color_primaries = ColorPrimaries.BT709 if matrix == BT709 else ColorPrimaries.SMPTE170M
    picture.color_trc = ColorTrc.BT709 if matrix == BT709 else ColorTrc.SMPTE170M
    return picture


def _upright(packed: np.ndarray, orientation: Orientation) -> np.ndarray:
    """Mirror and turn a picture for display; yuv420p as one uint8 array [H * 3/2, W]."""
    if orientation == AS_STORED:
        return packed
    return _packed([orientation.upright(plane) for plane in _planes(packed)])


def _planes(packed: np.ndarray) -> list[np.ndarray]:
    width, height = packed.shape[1], packed.shape[0] * 2 // 3
    return [packed[:height], *packed[height:].reshape(2, height // 2, width // 2)]


def _packed(planes: list[np.ndarray]) -> np.ndarray:
    joined = np.concatenate([np.ascontiguousarray(plane).reshape(-1) for plane in planes])
    return joined.reshape(-1, planes[0].shape[1])
