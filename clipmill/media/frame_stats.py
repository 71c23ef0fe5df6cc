"""Statistics of a clip's pictures: motion, brightness, shot score, perceptual hashes; and its caption frames.

They are computed from pictures that are decoded and scaled for the clip anyway, through thumbnails of 64x36 pixels that
cost a few hundredths of a millisecond each.
"""

from dataclasses import dataclass, field

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

cv2.setNumThreads(1)

THUMBNAIL = (64, 36)
HASH_SIDE, HASH_LOW = 32, 8  # the perceptual hash keeps the 8x8 lowest frequencies of a 32x32 picture
AVERAGING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class Thumbnailer:
    """Scalers for clip pictures; one object per video, so that they are set up once."""

    def __init__(self):
        self._colour, self._grey, self._full = VideoReformatter(), VideoReformatter(), VideoReformatter()

    def colour(self, picture: av.VideoFrame) -> np.ndarray:
        """Return a uint8 [36, 64, 3] thumbnail, blue first."""
        small = self._colour.reformat(picture, *THUMBNAIL, "bgr24", interpolation=AVERAGING, threads=1)
        return small.to_ndarray()

    def grey(self, picture: av.VideoFrame) -> np.ndarray:
        """Return a uint8 [32, 32] grey picture, 0 to 255."""
        small = self._grey.reformat(
            picture, HASH_SIDE, HASH_SIDE, "gray", interpolation=AVERAGING, dst_color_range=ColorRange.JPEG, threads=1
        )
        return small.to_ndarray()

    def jpeg(self, picture: av.VideoFrame, quality: int) -> bytes:
        """Return the whole picture as a JPEG file."""
        pixels = self._full.reformat(picture, format="bgr24", interpolation=AVERAGING, threads=1).to_ndarray()
        done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        assert done, "JPEG encoding of a decoded picture cannot fail"
        return data.tobytes()


@dataclass(frozen=True)
class FrameStats:
    """Colours of one picture's thumbnail; computed once, shared by all clips that contain the picture."""

    hsv: np.ndarray  # int16 [36, 64, 3], OpenCV's scale
    luma: np.ndarray  # int16 [36, 64]

    @classmethod
    def of(cls, thumbnail: np.ndarray) -> "FrameStats":
        hsv = cv2.cvtColor(thumbnail, cv2.COLOR_BGR2HSV).astype(np.int16)
        return cls(hsv, cv2.cvtColor(thumbnail, cv2.COLOR_BGR2GRAY).astype(np.int16))


@dataclass
class ClipStats:
    """Running statistics of one clip, to which its pictures are added in order."""

    brightness_sum: float = 0.0
    motion_sum: float = 0.0
    shot_score: float = 0.0
    num_frames: int = 0
    hashes: list[int] = field(default_factory=list)
    _last: FrameStats | None = None

    def add(self, frame: FrameStats) -> None:
        self.brightness_sum += float(frame.luma.mean())
        if self._last is not None and self._last is not frame:
            self.motion_sum += float(np.abs(frame.luma - self._last.luma).mean())
            self.shot_score = max(self.shot_score, content_change(self._last, frame))
        self._last = frame
        self.num_frames += 1

    def columns(self) -> dict:
        """Return columns of the `clips` table. Motion and shot score of a single picture are 0."""
        return {
            "motion": self.motion_sum / 255 / max(1, self.num_frames - 1),
            "brightness": self.brightness_sum / 255 / self.num_frames,
            "shot_score": self.shot_score,
            "phash": self.hashes,
        }


def content_change(a: FrameStats, b: FrameStats) -> float:
    """Return PySceneDetect's ContentDetector score, 0 to 255, with equal weights; its default threshold is 27."""
    return float(np.abs(a.hsv - b.hsv).mean())


def perceptual_hash(grey: np.ndarray) -> int:
    """Return the 64-bit DCT hash of a uint8 [32, 32] picture: the low frequencies that exceed their median, by row."""
    low = cv2.dct(grey.astype(np.float32))[:HASH_LOW, :HASH_LOW]
    bits = (low > np.median(low)).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
