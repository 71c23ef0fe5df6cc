"""Detect the shots of a video, which change at hard cuts, by PySceneDetect's detectors on small frames.

`precision: exact` decodes every frame, which costs as much as playing the whole video once; a cut is placed on the
first frame of the new shot. `precision: fast` decodes only the frames that others refer to, which saves at least half
of the decoding in videos with B-frames (and nothing in others). A cut is then placed on the first decoded
frame of the new shot, less than one distance of reference frames (usually 2 to 4 frames) late. Both detectors look for
hard cuts; they miss most slow fades and dissolves, as in the literature.

Source videos are untrusted: call this inside a sandbox.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from clipmill.base.errors import ItemError
from clipmill.base.settings import Settings

if TYPE_CHECKING:
    from clipmill.media.packets import SourceFrames

log = logging.getLogger(__name__)

# Cheap to process, and the width to which PySceneDetect itself scales: its thresholds are tuned at this size.
FRAME_WIDTH = 256
TICK_S = 1e-9  # of the times that PySceneDetect is given


class ShotSettings(Settings):
    """Settings of detecting shots, if `mode` or `wordless` asks for them."""

    # exact decodes every frame. fast is cheaper in videos with B-frames, and places cuts a few frames late at worst.
    precision: Literal["exact", "fast"] = "exact"
    # adaptive compares a frame's change with that of its neighbours, so that fast motion is not taken for a cut (the
    # best detector on PySceneDetect's own benchmark). content compares it with a fixed threshold.
    detector: Literal["adaptive", "content"] = "adaptive"
    # adaptive: multiple of the mean change of the 2 frames on either side. content: mean change in HSV, 0..255.
    # null: 3 and 31, PySceneDetect's default and its best value over three benchmark sets.
    threshold: float | None = Field(None, gt=0)
    # A frame that changes less than this (0..255) is never a cut: in a still scene noise alone passes the threshold.
    min_change: float = Field(15.0, ge=0)
    # Seconds that a shot lasts at least; closer cuts are flashes.
    min_shot_s: float = Field(0.6, ge=0)


def detect_shots(path: str | Path, settings: ShotSettings | None = None) -> list[tuple[float, float]]:
    """Return (start_s, end_s) of each shot, in seconds from the start of play; together they cover all pictures.

    Raises ItemError: source-missing, empty-file, not-a-video, no-video-stream, undecodable, too-large,
    too-many-frames.
    """
    from clipmill.media.decode import DecodeCounts, list_by_decoding
    from clipmill.media.packets import Limits, Untrusted, list_frames

    path, settings = Path(path), settings or ShotSettings()
    try:
        return _shots(path, list_frames(path, Limits()), settings)
    except Untrusted:
        return _shots(path, list_by_decoding(path, Limits(), DecodeCounts()), settings)


def _shots(path: Path, source: "SourceFrames", settings: ShotSettings) -> list[tuple[float, float]]:
    """Return the shots; raises Untrusted if the listed frames are not those that the decoder returns."""
    from clipmill.media.packets import Untrusted

    detector, recent, cuts, first = _detector(settings), deque(maxlen=8), [], None
    for timecode, picture in _small_frames(path, source, settings.precision == "fast"):
        first = first or timecode
        recent.append((timecode, picture))
        cuts += [cut for cut in detector.process_frame(timecode, picture) if _is_change(cut, recent, settings)]
    if first is None:
        if source.match == "pts":
            raise Untrusted("no listed frame comes out of the decoder")
        raise ItemError("undecodable", f"{path.name}: no frame can be decoded")
    first_s, end_s = float(source.times.times_s[0]), source.times.end_s
    cuts += detector.post_process(timecode)
    inside = sorted({cut.seconds for cut in cuts if first.seconds < cut.seconds < end_s})
    return list(pairwise([first_s, *inside, end_s]))


def _is_change(cut: Any, recent: Sequence[tuple[Any, Any]], settings: ShotSettings) -> bool:
    """Return whether the picture at a cut differs from the one before when hue is compared on its circle.

    The detectors subtract hues, so that a red background, whose hue wavers between 0 and 179, jumps at every keyframe.
    """
    times = [timecode.seconds for timecode, _ in recent]
    if cut.seconds not in times[1:]:
        return True  # its frame is not among the recent ones any more
    index = times.index(cut.seconds)
    return _change(recent[index - 1][1], recent[index][1]) >= settings.min_change


def _change(before: Any, after: Any) -> float:
    """Return the mean change in hue, saturation and value, 0..255: the detectors' measure, with hue as a circle."""
    import cv2
    import numpy as np

    differences = cv2.absdiff(cv2.cvtColor(before, cv2.COLOR_BGR2HSV), cv2.cvtColor(after, cv2.COLOR_BGR2HSV))
    hue = np.minimum(differences[..., 0], 180 - differences[..., 0])
    return float((hue.mean() + differences[..., 1].mean() + differences[..., 2].mean()) / 3)


def _detector(settings: ShotSettings) -> Any:
    from scenedetect.detectors import AdaptiveDetector, ContentDetector

    if settings.detector == "content":
        return ContentDetector(threshold=settings.threshold or 31.0, min_scene_len=float(settings.min_shot_s))
    return AdaptiveDetector(
        adaptive_threshold=settings.threshold or 3.0,
        min_content_val=settings.min_change,
        min_scene_len=float(settings.min_shot_s),
    )


def _small_frames(path: Path, source: "SourceFrames", fast: bool) -> Iterator[tuple[Any, Any]]:
    """Yield (FrameTimecode, BGR picture [H, W, 3]) of each decoded frame, in display order.

    A broken packet loses its own frames only, as in any player; they are logged. Raises Untrusted.
    """
    import numpy as np
    from scenedetect.common import FrameTimecode, Timecode

    from clipmill.media.decode import DecodeCounts, wanted_frames
    from clipmill.media.packets import Limits

    times, counts = source.times, DecodeCounts()
    rate = Fraction(len(times) / (times.end_s - times.times_s[0])).limit_denominator(1001)
    everything = np.arange(len(times))
    for index, frame, _ in wanted_frames(path, source, everything, Limits(), counts, references_only=fast):
        height = max(2, round(frame.height * FRAME_WIDTH / frame.width))
        size = (FRAME_WIDTH, height) if frame.width > FRAME_WIDTH else (frame.width, frame.height)
        picture = frame.to_ndarray(format="bgr24", width=size[0], height=size[1], interpolation="AREA")
        timecode = Timecode(round(times.times_s[index] / TICK_S), Fraction(TICK_S).limit_denominator(10**9))
        yield FrameTimecode(timecode, rate or Fraction(25)), picture
    if counts.num_errors:
        log.warning("%s: %d packets cannot be decoded (%s)", path.name, counts.num_errors, min(counts.messages))
