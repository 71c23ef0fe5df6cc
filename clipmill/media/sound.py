"""Sound of a video on the clock of its pictures: one forward pass over its audio stream, cut to the sample.

The video is untrusted: packets and frames that cannot be decoded are counted and become silence.
"""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from clipmill.media.packets import SourceFrames, packets_of
from clipmill.media.probe import audio_stream, open_media

SLACK_S = 0.1  # a timestamp that jumps by more than this is a gap, by less a rounding error


class SoundTrack:
    """Audio of a video as float32 at one rate and layout; time 0 is the start of play.

    Keeps only the samples after the last `forget`, so memory is that of the longest open interval.
    """

    def __init__(self, path: str | Path, source: SourceFrames | None, rate: int, layout: str):
        """Open the audio of a file; `source` lists its pictures, None if it has none: time 0 is its first sound."""
        self.rate, self.layout, self.source = rate, layout, source
        self.container = open_media(path)
        stream = audio_stream(self.container)
        self.exists = stream is not None
        self.present = self.exists and stream.codec_context is not None
        self.num_errors = 0  # packets and frames that cannot be decoded and become silence
        self.blocks: list[tuple[int, np.ndarray]] = []  # (first sample, float32 [channels, n]) in order, no overlap
        self.frames = self._decoded(stream) if self.present else iter(())

    def samples(self, start_s: float, duration_s: float) -> np.ndarray:
        """Return float32 [channels, N] of [start_s, start_s + duration_s), with silence in the track's gaps."""
        first = round(start_s * self.rate)
        num_channels = len(av.AudioLayout(self.layout).channels)
        samples = np.zeros((num_channels, round(duration_s * self.rate)), np.float32)
        end = first + samples.shape[1]
        while not self.blocks or self.blocks[-1][0] + self.blocks[-1][1].shape[1] < end:
            entry = next(self.frames, None)
            if entry is None:
                break
            self.blocks.append(entry)
        for at, block in self.blocks:
            low, high = max(at, first), min(at + block.shape[1], end)
            if low < high:
                samples[:, low - first : high - first] = block[:, low - at : high - at]
        return samples

    def first_channel(self, longest_s: float) -> np.ndarray:
        """Return float32 [N] from time 0 to the end of the track, at most `longest_s` seconds."""
        longest, end = round(longest_s * self.rate), 0
        samples = np.zeros(0, np.float32)
        for at, block in self.frames:
            if at >= longest:
                break
            values = block[0, max(0, -at) : longest - at]
            at = max(0, at)
            end = max(end, at + len(values))
            if end > len(samples):
                samples.resize(end + end // 8, refcheck=False)  # in place: hours of sound fit in memory once only
            samples[at : at + len(values)] = values
        samples.resize(end, refcheck=False)
        return samples

    def forget(self, before_s: float) -> None:
        """Drop the samples before `before_s`, which no later interval needs."""
        sample = round(before_s * self.rate)
        self.blocks = [(at, block) for at, block in self.blocks if at + block.shape[1] > sample]

    def close(self) -> None:
        self.container.close()

    def _decoded(self, stream) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first sample, float32 [channels, n]) blocks of the stream in order."""
        resampler = make = expected = None
        origin_s, shifts_s = (self.source.origin_s, self.source.shifts_s) if self.source else (None, (0.0,))
        for packet in packets_of(self.container, stream):
            try:
                frames = packet.decode()
            except av.MemoryError:
                raise
            except av.FFmpegError:
                self.num_errors += 1
                continue
            for frame in frames:
                at = expected or 0
                if frame.pts is not None:
                    time_s = frame.pts * float(frame.time_base)
                    origin_s = time_s if origin_s is None else origin_s
                    stamped, shifts_s = self._place(time_s - origin_s, shifts_s, expected)
                    if expected is None or abs(stamped - expected) > SLACK_S * self.rate:
                        at = stamped
                frame.pts = None  # otherwise the resampler fills gaps itself
                if (frame.format.name, frame.layout.name, frame.sample_rate) != make:
                    # A broadcast may change its format midway; the old resampler still holds less than a millisecond.
                    make = (frame.format.name, frame.layout.name, frame.sample_rate)
                    resampler = av.AudioResampler(format="fltp", layout=self.layout, rate=self.rate)
                try:
                    resampled = resampler.resample(frame)
                except av.MemoryError:
                    raise
                except av.FFmpegError:  # an impossible sample rate
                    self.num_errors += 1
                    continue
                for block in (piece.to_ndarray() for piece in resampled):
                    yield at, block
                    at += block.shape[1]
                expected = at

    def _place(self, time_s: float, shifts_s: tuple[float, ...], expected: int | None) -> tuple[int, tuple[float, ...]]:
        """Return the sample at which a frame begins, and the shifts of its part of the file and of those that follow.

        Where the clock restarts or leaps, the part is the one in which the sound goes on best.
        """
        if len(shifts_s) > 1 and expected is not None:
            expected_s = expected / self.rate
            part = min(range(len(shifts_s)), key=lambda k: (abs(time_s + shifts_s[k] - expected_s), k))
            shifts_s = shifts_s[part:]
        return round((time_s + shifts_s[0]) * self.rate), shifts_s
