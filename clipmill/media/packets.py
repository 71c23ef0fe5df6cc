"""List a video's frames from its packets, without decoding (milliseconds per minute of video).

`SourceFrames` has the time of each frame and the packet it comes from. Where the packets are not reliable
(`Untrusted`), `clipmill.media.decode.list_by_decoding` makes the same object by decoding the video once.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from clipmill.base.errors import ItemError
from clipmill.media.clock import (
    LEAP_S,
    NEVER,
    RESTART_S,
    Untrusted,
    leap_s,
    part_shifts,
    part_starts,
    play_start_s,
)
from clipmill.media.frame_times import FrameTimes, frame_times
from clipmill.media.probe import open_media, video_stream

# Decoders whose skip level can change with every packet (dav1d reads it once, when it is opened).
SKIPPING = {"h264", "hevc", "vp8", "mpeg4", "mpeg2video", "mpeg1video", "vc1"}


@dataclass(frozen=True)
class Limits:
    """Limits of a source, beyond which the item fails."""

    max_pixels: int = 8192 * 4352  # width x height of the coded picture
    max_frames: int = 10_000_000  # 46 hours at 60 fps


@dataclass(frozen=True)
class SourceFrames:
    """Frames of a video in display order, and the packets they come from in decode order."""

    times: FrameTimes
    origin_s: float  # start of play on the container's clock, which its audio shares: the first picture or sound
    shifts_s: tuple[float, ...]  # for each part of the file (see `clock`), seconds to add to the container's clock
    match: Literal["pts", "order"]  # decoded frames are recognised by their timestamps, or by their order
    ticks: np.ndarray  # int64 [frames], ascending: timestamp of each frame; empty if match is "order"
    packet_ticks: np.ndarray  # int64 [packets]: timestamp, shifted by its part, of the frame that it shows, or NEVER
    packet_keys: np.ndarray  # bool [packets]
    may_drop: bool  # decoding may start at any keyframe, so packets between can be left out
    may_skip: bool  # the decoder may skip frames that no other frame refers to


def list_frames(path: str | Path, limits: Limits) -> SourceFrames:
    """List the frames of a file by demuxing it once.

    Raises Untrusted, and ItemError: no-video-stream, not-a-video, empty-file, undecodable, too-large, too-many-frames.
    """
    ticks, keys, falls = array("q"), array("b"), array("b")
    last_tick, last_duration, all_have_pts, last_dts, reconfigured = NEVER, 0, True, None, False
    with open_media(path) as container:
        stream = video_stream(container)
        check_size(stream.codec_context, limits)
        by_dts = container.format.name == "avi"  # it has no presentation times; guessed ones are wrong for B-frames
        shows, has_layers = _shown_test(stream), _layer_test(stream)
        layered, restart_ticks = False, RESTART_S / stream.time_base
        dts_given = leap_s(container) == LEAP_S  # elsewhere FFmpeg may guess decoding times, wrongly after a restart
        for packet in packets_of(container, stream):
            dts = packet.dts
            tick = dts if by_dts else packet.pts
            all_have_pts &= tick is not None
            # A packet that the container calls corrupt may decode; the decoder has the last word.
            shown = tick is not None and not packet.is_discard and shows(packet)
            ticks.append(tick if shown else NEVER)
            keys.append(packet.is_keyframe)
            fallen = dts_given and None not in (dts, last_dts) and dts < last_dts - restart_ticks
            falls.append(packet.is_keyframe or fallen)
            last_dts = last_dts if dts is None else dts
            reconfigured = reconfigured or (len(ticks) > 1 and packet.has_sidedata("new_extradata"))
            layered = layered or has_layers(packet)
            if shown and tick > last_tick:
                last_tick, last_duration = tick, packet.duration or 0
            if len(ticks) > limits.max_frames:
                raise ItemError("too-many-frames", f"more than {limits.max_frames} frames")
        if not all_have_pts:
            raise Untrusted("packets without presentation timestamps")
        may_skip = stream.codec_context.name in SKIPPING and not layered
        indexed = bool({"mov", "matroska"} & set(container.format.name.split(",")))
        time_base, leap_ticks = float(stream.time_base), leap_s(container) / stream.time_base
        packet_ticks, packet_keys = np.frombuffer(ticks, np.int64), np.frombuffer(keys, np.int8) != 0
        packet_ticks = _without_leading(packet_ticks, packet_keys)
        may_fall = np.frombuffer(falls, np.int8) != 0
        packet_ticks, shifts = _joined(packet_ticks, may_fall, float(leap_ticks), float(restart_ticks))
        shown_ticks = packet_ticks[packet_ticks != NEVER]
        if len(shown_ticks) == 0:
            raise ItemError("undecodable", "the video stream has no frames")
        first_s = float(shown_ticks.min()) * time_base
        origin_s = play_start_s(container, first_s)
    times = frame_times(shown_ticks, time_base, last_duration, first_s - origin_s)
    shifts_s = tuple(shift * time_base for shift in shifts)
    if by_dts:
        nothing = shown_ticks[:0]
        return SourceFrames(times, origin_s, shifts_s, "order", nothing, packet_ticks, packet_keys, False, False)
    may_drop = indexed and not reconfigured  # a packet with a new configuration must reach the decoder
    ticks_shown = np.unique(shown_ticks)
    return SourceFrames(times, origin_s, shifts_s, "pts", ticks_shown, packet_ticks, packet_keys, may_drop, may_skip)


def _joined(
    ticks: np.ndarray, may_fall: np.ndarray, leap_ticks: float, restart_ticks: float
) -> tuple[np.ndarray, list[int]]:
    """Make the packets' clock run on where it restarts or leaps; return the ticks and the shift of each part."""
    shown = np.flatnonzero(ticks != NEVER)
    if len(shown) == 0:
        return ticks, [0]
    starts = part_starts(ticks[shown], may_fall[shown], leap_ticks, restart_ticks)
    shifts = part_shifts(ticks[shown], starts)
    if len(starts) > 1:
        ticks = ticks.copy()
        lengths = np.diff([*starts, len(shown)])
        ticks[shown] += np.repeat(shifts, lengths)
    return ticks, shifts


def packets_of(container, streams):
    """Yield the packets of a stream or of several that hold data, in decode order, the same each time a file is read.

    A truncated file ends where it breaks off; the packets before are valid.
    """
    import av

    packets = container.demux(streams)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.EOFError, av.InvalidDataError):
            return
        if packet.size:
            yield packet


def check_size(codec_context, limits: Limits) -> None:
    width, height = codec_context.width, codec_context.height
    if width * height > limits.max_pixels:
        raise ItemError("too-large", f"{width}x{height} pictures, at most {limits.max_pixels} pixels are decoded")


def _without_leading(ticks: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Mark packets that no decoder can show as NEVER: those before the first keyframe in decode or display order."""
    if not keys.any():
        return ticks
    first = int(np.argmax(keys))
    ticks = ticks.copy()
    ticks[:first] = NEVER
    if ticks[first] != NEVER:
        ticks[ticks < ticks[first]] = NEVER
    return ticks


def _shown_test(stream) -> Callable[[object], bool]:
    """Return a test for packets with a displayed frame: VP8 has packets of hidden reference frames (RFC 6386, 9.1)."""
    if stream.codec_context.name in ("vp8", "libvpx"):
        return lambda packet: bool(memoryview(packet)[0] & 0x10)
    return lambda packet: True


def _layer_test(stream) -> Callable[[object], bool]:
    """Return a test for HEVC packets of a higher temporal layer.

    HEVC calls a picture unreferenced if its own layer does not refer to it, but higher layers may (H.265, 7.4.2.2). So
    skipping is unsafe there; in every other codec "unreferenced" means by no picture.
    """
    if stream.codec_context.name != "hevc":
        return lambda packet: False
    config = stream.codec_context.extradata or b""
    length_size = (config[21] & 3) + 1 if len(config) > 22 and config[0] == 1 else 0
    return lambda packet: _temporal_id(bytes(packet), length_size) > 0


def _temporal_id(data: bytes, length_size: int) -> int:
    """Return the temporal id of the first picture NAL unit; `length_size` 0: start codes instead of lengths."""
    at = 0
    while at + length_size + 3 < len(data):
        if length_size:
            size = int.from_bytes(data[at : at + length_size], "big")
            start, following = at + length_size, at + length_size + size
        else:
            start = data.find(b"\0\0\1", at) + 3
            if start == 2:
                return 0
            following = start
        if data[start] >> 1 & 0x3F < 32:
            return (data[start + 1] & 7) - 1
        at = following
    return 0
