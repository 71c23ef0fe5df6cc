"""The clock that a player shows: where time 0 is, and how it runs on where a file's timestamps restart or leap.

Time 0 is the first picture or sound. A file that was put together from pieces may count from the start again in each
piece; a recording may leap by hours. A player plays on, and so does this clock: each such *part* of the file follows
the part before it.
"""

import numpy as np

from clipmill.base.errors import ItemError

NEVER = np.iinfo(np.int64).min  # tick of a packet without a displayed frame

# Seconds without a picture that are a leap of the clock, not a pause: in formats whose clock may leap (MPEG-TS, MPEG-PS
# and Ogg) and in the others, as in ffplay.
LEAP_S, LEAP_ELSEWHERE_S = 10.0, 3600.0
# A clock that falls back by more than this restarts; by less it is imprecise, as ffmpeg has it.
RESTART_S = 0.1
# A part shorter than this many frames on average is not a part: such a clock is useless.
LEAST_FRAMES_OF_A_PART = 5


class Untrusted(Exception):
    """The packets' timestamps do not describe the frames that come out of the decoder."""


def leap_s(container) -> float:
    """Return the seconds from which a gap between two pictures of this PyAV container is a leap of its clock."""
    from av.format import Flags

    return LEAP_S if container.format.flags & Flags.ts_discont.value else LEAP_ELSEWHERE_S


def play_start_s(container, first_picture_s: float) -> float:
    """Return the time on the container's clock at which play starts: that of the first picture or sound.

    A sound so much earlier that no picture is shown for the length of a leap has another clock.
    """
    known = [stream for stream in container.streams.audio if stream.start_time is not None]
    start_s = min((float(stream.start_time * stream.time_base) for stream in known), default=first_picture_s)
    # Containers round times to a millisecond.
    return start_s if 0.001 < first_picture_s - start_s <= leap_s(container) else first_picture_s


def part_starts(ticks: np.ndarray, restarts_here: np.ndarray, leap_ticks: float, restart_ticks: float) -> list[int]:
    """Return the index of the first frame of each part.

    ticks          int64 [N]: presentation timestamps, in decode or display order
    restarts_here  bool [N]: frames at which the clock may fall back: not where frames are only reordered
    """
    highest = np.maximum.accumulate(ticks)
    leaps = ticks[1:] - highest[:-1] > leap_ticks
    falls = restarts_here[1:] & (highest[:-1] - ticks[1:] > restart_ticks)
    if not (leaps.any() or falls.any()):
        return [0]
    starts, top = [0], int(ticks[0])
    for index, (tick, may_restart) in enumerate(zip(ticks.tolist(), restarts_here.tolist(), strict=True)):
        if tick > top + leap_ticks or (may_restart and tick < top - restart_ticks):
            starts.append(index)
            top = tick
        top = max(top, tick)
    if len(starts) * LEAST_FRAMES_OF_A_PART > len(ticks) + LEAST_FRAMES_OF_A_PART:
        raise Untrusted(f"the clock restarts or leaps {len(starts) - 1} times in {len(ticks)} frames")
    return starts


def part_shifts(ticks: np.ndarray, starts: list[int]) -> list[int]:
    """Return the ticks to add to each part, so that it begins when the part before it has ended.

    A part ends one usual distance of frames after its last frame. The first part is not moved.
    """
    if len(ticks) == 0:
        raise ItemError("undecodable", "the video stream has no frames")
    parts = np.split(ticks, starts[1:])
    steps = [np.diff(np.unique(part)) for part in parts]
    all_steps = np.concatenate(steps)
    usual = int(np.median(all_steps)) if len(all_steps) else 1  # the length of a part of one frame
    shifts, end = [], int(parts[0].min())
    for part, own in zip(parts, steps, strict=True):
        shifts.append(end - int(part.min()))
        end = int(part.max()) + shifts[-1] + (int(np.median(own)) if len(own) else usual)
    return shifts
