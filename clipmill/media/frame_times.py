"""Choose the source frames of a clip: pure arithmetic on frame times, without media.

Times are seconds from the start of play: the first picture or sound. The rule, for a span [start_s, end_s) and an
output rate:
- output frame k is the source frame nearest to start_s + k / rate (of two equally near ones the earlier), for every k
  with start_s + k / rate < end_s; a source frame is repeated when the source is slower than the output;
- no frame whose time is end_s or later is used, and none less than a millisecond earlier, because spans are rounded to
  milliseconds and the frame may be the first of the next scene;
- at rate "source" the clip starts with the frame nearest to start_s and ends before the frame nearest to end_s; it has
  at least one frame.
Real frame times count, never a header: a span that begins before the first picture or exceeds the end of the video is
cut to what exists; one without any picture fails as "span-before-start" or "span-past-end".
"""

import math
from dataclasses import dataclass

import numpy as np

from clipmill.base.errors import ItemError

# Times are decimals and rationals converted to doubles; times that differ by less than this are equal.
SAME_MOMENT_S = 1e-6
# Error of a span whose ends are rounded to milliseconds.
SPAN_ROUNDING_S = 1e-3


@dataclass(frozen=True)
class FrameTimes:
    """Times at which the displayed frames of a video begin, ascending, and at which the last one ends."""

    times_s: np.ndarray  # float64 [N]
    end_s: float

    def end_of(self, index: int) -> float:
        return float(self.times_s[index + 1]) if index + 1 < len(self.times_s) else self.end_s

    def __len__(self) -> int:
        return len(self.times_s)


def frame_times(ticks: np.ndarray, seconds_per_tick: float, last_duration: int = 0, first_s: float = 0.0) -> FrameTimes:
    """Make FrameTimes from presentation timestamps in any order, with duplicates, from any origin.

    last_duration  ticks that the last frame lasts; 0 (the container does not say it): the median distance of frames
    first_s        time of the first frame, in seconds from the start of play
    Raises ItemError "undecodable" for no frames.
    """
    if len(ticks) == 0:
        raise ItemError("undecodable", "the video stream has no frames")
    ordered = np.unique(np.asarray(ticks, dtype=np.int64))
    times = (ordered - ordered[0]) * seconds_per_tick + first_s
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    last = last_duration * seconds_per_tick or usual or 1.0 / 25
    return FrameTimes(times, float(times[-1] + last))


def choose_frames(
    frames: FrameTimes, start_s: float, end_s: float, rate: float | None, min_frames: int = 1
) -> np.ndarray:
    """Return indices into `frames`, one per output frame, ascending; `rate` None keeps every frame of the span.

    Raises ItemError: bad-span (not 0 <= start_s < end_s), span-before-start (no picture is shown yet), span-past-end
    (fewer than `min_frames` before the video ends), span-too-short (fewer than `min_frames` although the video
    continues).
    """
    if not (0.0 <= start_s < end_s < math.inf):
        raise ItemError("bad-span", f"a span must have 0 <= start_s < end_s, got [{start_s}, {end_s})")
    if start_s >= frames.end_s - SAME_MOMENT_S:
        raise ItemError("span-past-end", f"the span starts at {start_s:.3f} s, the video ends at {frames.end_s:.3f} s")
    if end_s <= frames.times_s[0] + SAME_MOMENT_S:
        first_s = frames.times_s[0]
        raise ItemError("span-before-start", f"the span ends at {end_s:.3f} s, the first picture is at {first_s:.3f} s")
    start_s = max(start_s, float(frames.times_s[0]))
    earliest_end_s = end_s - SPAN_ROUNDING_S - SAME_MOMENT_S
    num_before_end = max(1, int(np.searchsorted(frames.times_s, earliest_end_s, side="left")))
    if rate is None:
        boundaries = FrameTimes(np.append(frames.times_s, frames.end_s), frames.end_s)
        first, stop = _nearest(boundaries, np.array([start_s, end_s])).tolist()
        first = min(first, num_before_end - 1)
        chosen = np.arange(first, max(stop, first + 1))
    else:
        count = max(1, math.ceil((min(earliest_end_s, frames.end_s - SAME_MOMENT_S) - start_s) * rate))
        slots = start_s + np.arange(count) / rate
        chosen = np.minimum(_nearest(frames, slots), num_before_end - 1)
    if len(chosen) < min_frames:
        past = end_s > frames.end_s + SAME_MOMENT_S
        message = f"[{start_s:.3f}, {end_s:.3f}) s gives {len(chosen)} frames of a video of {frames.end_s:.3f} s"
        raise ItemError(
            "span-past-end" if past else "span-too-short", f"{message}, fewer than the required {min_frames}"
        )
    return chosen


def _nearest(frames: FrameTimes, moments_s: np.ndarray) -> np.ndarray:
    midpoints = (frames.times_s[:-1] + frames.times_s[1:]) / 2
    return np.searchsorted(midpoints, moments_s - SAME_MOMENT_S, side="left")


def caption_frames(num_frames: int, count: int) -> list[int]:
    """Return the output frames that are kept as caption frames, at most `count`.

    The middle one (floor(N/2), which trainers use) comes first, then the others in time order, all evenly spread.
    """
    middle = num_frames // 2
    spread = {(2 * i + 1) * num_frames // (2 * count) for i in range(count)}
    if middle not in spread:
        spread.remove(min(spread, key=lambda i: (abs(i - middle), i)))
    return [middle, *sorted(spread - {middle})]
