"""Audio of clips: one forward pass over a video's audio stream, cut to the sample.

The video is untrusted: packets and frames that cannot be decoded are counted and become silence.
"""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from clipmill.media.encode import AUDIO_RATE
from clipmill.media.packets import packets_of
from clipmill.media.probe import open_media

FRAME_SAMPLES = 1024  # of an AAC frame
SLACK_SAMPLES = AUDIO_RATE // 10  # a timestamp that jumps by more than this is a gap, by less a rounding error


class AudioTrack:
    """Audio of a video as float32 stereo at 48 kHz; time 0 is the first displayed frame.

    Keeps only the samples after the last `forget`, so memory is that of the longest open clip: 0.4 MB per second.
    """

    def __init__(self, path: str | Path, origin_s: float):
        self.container = open_media(path)
        streams = self.container.streams.audio
        self.present = bool(streams) and streams[0].codec_context is not None
        self.origin_s = origin_s
        self.num_errors = 0  # packets and frames that cannot be decoded and become silence
        self.blocks: list[tuple[int, np.ndarray]] = []  # (first sample, float32 [2, n]) in order, without overlap
        self.frames = self._decoded(streams[0]) if self.present else iter(())

    def sound(self, start_s: float, duration_s: float) -> Iterator[av.AudioFrame]:
        """Yield AAC-sized frames of [start_s, start_s + duration_s), with silence in the track's gaps."""
        first = round(start_s * AUDIO_RATE)
        samples = np.zeros((2, round(duration_s * AUDIO_RATE)), np.float32)
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
        for begin in range(0, samples.shape[1], FRAME_SAMPLES):
            piece = np.ascontiguousarray(samples[:, begin : begin + FRAME_SAMPLES])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = AUDIO_RATE, begin
            yield frame

    def forget(self, before_s: float) -> None:
        """Drop the samples before `before_s`, which no later clip needs."""
        sample = round(before_s * AUDIO_RATE)
        self.blocks = [(at, block) for at, block in self.blocks if at + block.shape[1] > sample]

    def close(self) -> None:
        self.container.close()

    def _decoded(self, stream) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first sample, float32 [2, n]) blocks of the stream in order."""
        resampler = make = expected = None
        for packet in packets_of(self.container, stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                self.num_errors += 1
                continue
            for frame in frames:
                at = expected or 0
                if frame.pts is not None:
                    stamped = round((frame.pts * float(frame.time_base) - self.origin_s) * AUDIO_RATE)
                    if expected is None or abs(stamped - expected) > SLACK_SAMPLES:
                        at = stamped
                frame.pts = None  # otherwise the resampler fills gaps itself
                if (frame.format.name, frame.layout.name, frame.sample_rate) != make:
                    # A broadcast may change its format midway; the old resampler still holds less than a millisecond.
                    make = (frame.format.name, frame.layout.name, frame.sample_rate)
                    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=AUDIO_RATE)
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
