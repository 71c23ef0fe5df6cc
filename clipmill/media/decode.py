"""Decode only the wanted frames of a video, in one pass over its packets.

Packets that no wanted frame depends on never reach the decoder; packets of wanted frames are decoded in full; for the
others the decoder skips frames that no other frame refers to (about half of the frames of a stream with B-frames, 40 %
of its decoding time). Wanted frames come out bit-identical to a full decode.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from clipmill.base.errors import ItemError
from clipmill.media.clock import NEVER, RESTART_S, Untrusted, leap_s, part_shifts, part_starts, play_start_s
from clipmill.media.frame_times import frame_times
from clipmill.media.packets import Limits, SourceFrames, check_size, packets_of
from clipmill.media.probe import open_media, video_stream

DROP, REFERENCES, FULL = 0, 1, 2


Decoded = tuple[int, av.VideoFrame, Fraction]  # index of the frame, the frame, width of its pixels / their height


@dataclass
class DecodeCounts:
    """Counts of one decoding, for tests and benchmarks."""

    num_passes: int = 0
    num_sent: int = 0  # packets given to a decoder
    num_skippable: int = 0  # of these, packets whose frames the decoder could skip
    num_frames: int = 0  # frames that came out
    num_errors: int = 0  # packets that the decoder refused
    messages: set[str] = field(default_factory=set)  # a few of its error messages


def wanted_frames(
    path: str | Path,
    source: SourceFrames,
    wanted: np.ndarray,
    limits: Limits,
    counts: DecodeCounts,
    references_only: bool = False,
) -> Iterator[Decoded]:
    """Yield (index, frame, pixel aspect) for the wanted indices into `source.times`, both ascending, in one pass.

    Frames that the decoder does not return are left out: the caller has to count. With `references_only` the decoder
    may skip wanted frames that no other frame refers to. Raises Untrusted as soon as the decoder contradicts the
    timestamps.
    """
    if source.match == "order":
        yield from _by_order(path, wanted, limits, counts)
    else:
        yield from _by_timestamp(path, source, wanted, limits, counts, references_only)


def list_by_decoding(path: str | Path, limits: Limits, counts: DecodeCounts) -> SourceFrames:
    """List the frames of a video by decoding all of it; times are the frames' own, else follow the nominal rate.

    Raises ItemError: undecodable, too-large, too-many-frames.
    """
    with open_media(path) as container:
        stream = video_stream(container)
        rate = float(stream.guessed_rate or 25)
        time_base = float(stream.time_base or 1 / 90000)
        seen = []
        for frame, _ in _decode(container, stream, None, limits, counts):
            seen.append((frame.pts, frame.dts, frame.duration or 0))
            if len(seen) > limits.max_frames:
                raise ItemError("too-many-frames", f"more than {limits.max_frames} frames")
        if not seen:
            raise ItemError("undecodable", "; ".join(sorted(counts.messages)) or "no frame decodes")
        nothing = np.empty(0, np.int64)
        order_only = {"match": "order", "ticks": nothing, "packet_ticks": nothing, "packet_keys": nothing != 0}
        order_only |= {"may_drop": False, "may_skip": False}
        for clock in (0, 1):
            if None in (stamps := [entry[clock] for entry in seen]):
                continue
            try:
                ticks, shifts = _ascending(np.array(stamps), leap_s(container) / time_base, RESTART_S / time_base)
            except Untrusted:
                continue
            first_s = stamps[0] * time_base
            origin_s = play_start_s(container, first_s)
            times = frame_times(ticks, time_base, seen[-1][2], first_s - origin_s)
            return SourceFrames(times, origin_s, tuple(shift * time_base for shift in shifts), **order_only)
        known = [entry[0] for entry in seen if entry[0] is not None]
        first_s = known[0] * time_base if known else 0.0
        origin_s = play_start_s(container, first_s)
        times = frame_times(np.arange(len(seen)), 1 / rate, first_s=first_s - origin_s)
    return SourceFrames(times, origin_s, (0.0,), **order_only)


def _ascending(stamps: np.ndarray, leap_ticks: float, restart_ticks: float) -> tuple[np.ndarray, list[int]]:
    """Join the parts of a clock in display order; return ticks and shifts. Raises Untrusted if it falls in a part."""
    starts = part_starts(stamps, np.ones(len(stamps), bool), leap_ticks, restart_ticks)
    shifts = part_shifts(stamps, starts)
    ticks = stamps + np.repeat(shifts, np.diff([*starts, len(stamps)]))
    if not (np.diff(ticks) > 0).all():
        raise Untrusted("frames come out in another order than their timestamps")
    return ticks, shifts


def _by_order(path, wanted, limits, counts) -> Iterator[Decoded]:
    pending = iter(wanted.tolist())
    target = next(pending, None)
    with open_media(path) as container:
        decoded = _decode(container, video_stream(container), None, limits, counts)
        for index, (frame, pixel_aspect) in enumerate(decoded):
            if index == target:
                yield index, frame, pixel_aspect
                target = next(pending, None)
            if target is None:
                return


def _by_timestamp(path, source, wanted, limits, counts, references_only) -> Iterator[Decoded]:
    indices = dict(zip(source.ticks[wanted].tolist(), wanted.tolist(), strict=True))
    actions = packet_actions(source, wanted)
    if references_only and source.may_skip:
        actions[actions == FULL] = REFERENCES
    stamps = source.packet_ticks if len(source.shifts_s) > 1 else None
    last = -1
    with open_media(path) as container:
        stream = video_stream(container)
        for frame, pixel_aspect in _decode(container, stream, actions, limits, counts, stamps):
            if frame.interlaced_frame and not source.may_drop:
                raise Untrusted("interlaced frames in a stream of fields: a packet may hold half a frame")
            index = indices.pop(frame.pts, None)
            if index is None:
                continue
            if index < last:
                raise Untrusted("frames come out in another order than their timestamps")
            last = index
            yield index, frame, pixel_aspect


def packet_actions(source: SourceFrames, wanted: np.ndarray) -> np.ndarray:
    """Return uint8 [packets]: DROP, REFERENCES (decode only if another frame refers to it) or FULL for each packet."""
    num_packets = len(source.packet_ticks)
    hit = np.isin(source.packet_ticks, source.ticks[wanted]) & (source.packet_ticks != NEVER)
    position = np.arange(num_packets)
    if source.may_drop and source.packet_keys.any():
        last_needed = _last_needed(source, hit)
    else:
        last_needed = np.full(num_packets, position[hit].max(initial=-1))
    plan = np.where(position <= last_needed, REFERENCES if source.may_skip else FULL, DROP).astype(np.uint8)
    plan[hit] = FULL
    return plan


def _last_needed(source: SourceFrames, hit: np.ndarray) -> np.ndarray:
    """Return int [packets]: the last packet to decode in each packet's own group of pictures, -1 for none.

    A wanted picture that precedes its keyframe in display order (open group) refers to the previous group, too.
    """
    position = np.arange(len(hit))
    starts = np.flatnonzero(source.packet_keys)
    group = np.cumsum(source.packet_keys) - 1  # -1: before the first keyframe
    ends = np.append(starts[1:], len(hit)) - 1
    last = np.maximum.reduceat(np.where(hit, position, -1), starts)
    leading = hit & (group >= 0) & (source.packet_ticks < source.packet_ticks[starts][group])
    needs_previous = np.flatnonzero(np.logical_or.reduceat(leading, starts))
    needs_previous = needs_previous[needs_previous > 0]
    last[needs_previous - 1] = ends[needs_previous - 1]
    return np.where(group >= 0, last[group], -1)


def _decode(
    container, stream, actions, limits: Limits, counts: DecodeCounts, stamps: np.ndarray | None = None
) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Yield all frames that the decoder returns, with their pixel aspects, for packets treated by `actions`.

    actions  DROP, REFERENCES or FULL for each packet; None: all in full
    stamps   timestamps in the place of the packets' own, where the clock of the file restarts
    """
    check_size(stream.codec_context, limits)
    decoder = stream.codec_context
    decoder.thread_count = 1  # a skip level applies to one packet: nothing may be decoded later or in parallel
    decoder.options = {"max_pixels": str(limits.max_pixels)}
    counts.num_passes += 1
    last = len(actions) - int(np.argmax(actions[::-1] != DROP)) if actions is not None and actions.any() else 0
    level, gap, shape = FULL, False, _PixelAspect(stream)
    for position, packet in enumerate(packets_of(container, stream)):
        if stamps is not None:
            packet.pts = packet.dts = None if stamps[position] == NEVER else int(stamps[position])
        if actions is not None:
            if position >= last:
                break
            action = int(actions[position])
            if action == DROP:
                gap = counts.num_sent > 0
                continue
            if gap:
                yield from ((frame, shape.of(frame)) for frame in _send(decoder, None, counts))
                decoder.flush_buffers()
                gap = False
            if action != level:
                decoder.skip_frame = "NONREF" if action == REFERENCES else "DEFAULT"
                level = action
            counts.num_skippable += action == REFERENCES
        counts.num_sent += 1
        frames = _send(decoder, packet, counts)
        if packet.is_keyframe:
            shape.sent(packet)
        for frame in frames:
            yield frame, shape.of(frame)
    yield from ((frame, shape.of(frame)) for frame in _send(decoder, None, counts))


class _PixelAspect:
    """The shape of the pixels of each frame, which may change at a keyframe, such as from 4:3 to 16:9.

    A decoder knows that of the packet it was given last, whose frame comes out later. The container's own shape, where
    it contradicts the stream, holds for all frames, as in players.
    """

    def __init__(self, stream):
        self.decoder = stream.codec_context
        of_stream = self.decoder.sample_aspect_ratio or Fraction(1)
        self.first = stream.sample_aspect_ratio or Fraction(1)
        self.fixed = self.first != of_stream
        self.changes: list[tuple[int, Fraction]] = []  # (timestamp from which it holds, shape), newest last

    def sent(self, packet) -> None:
        """Note the shape that begins with a packet that the decoder has just been given."""
        now = self.decoder.sample_aspect_ratio or Fraction(1)
        if not self.fixed and now != (self.changes[-1][1] if self.changes else self.first):
            self.changes.append((NEVER if packet.pts is None else packet.pts, now))

    def of(self, frame: av.VideoFrame) -> Fraction:
        for since, shape in reversed(self.changes):
            if frame.pts is None or since <= frame.pts:
                return shape
        return self.first


def _send(decoder, packet, counts: DecodeCounts) -> list[av.VideoFrame]:
    """Decode one packet; count it if the decoder refuses it. Only its own frames are lost, which their clips notice."""
    try:
        frames = decoder.decode(packet)
    except av.MemoryError:
        raise
    except av.FFmpegError as error:
        counts.num_errors += 1
        if len(counts.messages) < 5:
            counts.messages.add(str(error))
        return []
    counts.num_frames += len(frames)
    return frames
