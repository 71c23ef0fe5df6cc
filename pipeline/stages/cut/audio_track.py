"""The sound of clips: one forward pass over a video's audio beside the picture's, cut to the sample."""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from clipmill.media.encode import AUDIO_RATE
from clipmill.media.packets import packets_of
from clipmill.media.probe import open_media

FRAME_SAMPLES = 1024  # what AAC takes at once
SLACK_SAMPLES = AUDIO_RATE // 10  # timestamps that jump by more than this are believed, less is rounding


class AudioTrack:
    """Sound of a video as float32 stereo at 48 kHz, on the clock whose 0 is the first displayed picture.

    Holds only what lies after `forget`; memory is that of the longest open clip, 0.4 MB a second.
    """

    def __init__(self, path: str | Path, origin_s: float):
        self.container = open_media(path)
        streams = self.container.streams.audio
        self.present = bool(streams) and streams[0].codec_context is not None
        self.origin_s = origin_s
        self.num_errors = 0  # packets and frames that were refused: silence in their place
        self.held: list[tuple[int, np.ndarray]] = []  # (first sample, [2, n]) in order, without overlap
        self.frames = self._decoded(streams[0]) if self.present else iter(())

    def sound(self, start_s: float, duration_s: float) -> Iterator[av.AudioFrame]:
        """AAC-sized frames of [start_s, start_s + duration_s); silence where the track has nothing."""
        first = round(start_s * AUDIO_RATE)
        samples = np.zeros((2, round(duration_s * AUDIO_RATE)), np.float32)
        self._read_until(first + samples.shape[1])
        for at, block in self.held:
            low, high = max(at, first), min(at + block.shape[1], first + samples.shape[1])
            if low < high:
                samples[:, low - first : high - first] = block[:, low - at : high - at]
        for begin in range(0, samples.shape[1], FRAME_SAMPLES):
            piece = np.ascontiguousarray(samples[:, begin : begin + FRAME_SAMPLES])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = AUDIO_RATE, begin
            yield frame

    def forget(self, before_s: float) -> None:
        """No clip that is still to come starts earlier than this."""
        sample = round(before_s * AUDIO_RATE)
        self.held = [(at, block) for at, block in self.held if at + block.shape[1] > sample]

    def close(self) -> None:
        self.container.close()

    def _read_until(self, sample: int) -> None:
        while not self.held or self.held[-1][0] + self.held[-1][1].shape[1] < sample:
            entry = next(self.frames, None)
            if entry is None:
                return
            self.held.append(entry)

    def _decoded(self, stream) -> Iterator[tuple[int, np.ndarray]]:
        """(first sample, [2, n]) in order."""
        resampler = make = expected = None
        for packet in packets_of(self.container, stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                self.num_errors += 1
                continue
            for frame in frames:
                at = self._position(frame, expected)
                frame.pts = None  # the resampler would otherwise fill gaps by itself
                if (frame.format.name, frame.layout.name, frame.sample_rate) != make:
                    # A broadcast may change it midway. What the last resampler still holds is under a millisecond.
                    make = (frame.format.name, frame.layout.name, frame.sample_rate)
                    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=AUDIO_RATE)
                try:
                    resampled = resampler.resample(frame)
                except av.MemoryError:
                    raise
                except av.FFmpegError:  # no rate that there is
                    self.num_errors += 1
                    continue
                for block in (piece.to_ndarray() for piece in resampled):
                    yield at, block
                    at += block.shape[1]
                expected = at

    def _position(self, frame: av.AudioFrame, expected: int | None) -> int:
        if frame.pts is None:
            return expected or 0
        stamped = round((frame.pts * float(frame.time_base) - self.origin_s) * AUDIO_RATE)
        return stamped if expected is None or abs(stamped - expected) > SLACK_SAMPLES else expected
