"""Write the demo world's video files: formats, quiet audio, rotation. Same frames, same bytes.

Encoders run on one thread and muxers in bit-exact mode (no dates, no random ids), which makes every format
reproducible, including H.264 with B-frames.
"""

import os
import struct
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipeline.demo.plan import FORMATS, Format

os.environ.setdefault("SVT_LOG", "1")  # errors only: the AV1 encoder has no other switch for its log

AUDIO_RATE = 16_000  # a rate that AAC, MP3 and Opus all accept
TS_START_S = 10  # transport streams are parts of a broadcast and do not begin at zero

TimedFrame = tuple[Fraction, np.ndarray]  # seconds from the start, uint8 RGB H x W x 3


def write_video(
    path: Path,
    format_name: str,
    frames: Iterable[TimedFrame],
    size: tuple[int, int],
    rate: Fraction | None,
    audio: np.ndarray | None = None,
    rotation: int = 0,
) -> int:
    """Encode `frames` of `size` (width, height, as displayed); return their number.

    rate      frames per second; None for a variable rate, with times in whole milliseconds
    audio     int16 mono samples at AUDIO_RATE, or None
    rotation  clockwise degrees by which players rotate the stored picture: 0, 90, 180 or 270; MP4 only
    """
    fmt = FORMATS[format_name]
    assert rotation == 0 or fmt.extension == "mp4"
    time_base = 1 / rate if rate else Fraction(1, 1000)
    num_frames = 0
    with _muxer(path) as container:
        video = _video_stream(container, fmt, size if rotation in (0, 180) else size[::-1], rate, time_base)
        sound = _Sound(container, fmt.audio_encoder, audio) if audio is not None else None
        for time_s, picture in frames:
            stored = np.ascontiguousarray(np.rot90(picture, rotation // 90)) if rotation else picture
            frame = av.VideoFrame.from_ndarray(stored, format="rgb24")
            frame.pts, frame.time_base = round(time_s / time_base), time_base
            container.mux(video.encode(frame))
            num_frames += 1
            if sound:
                sound.write_until(float(time_s))
        container.mux(video.encode(None))
        if sound:
            sound.finish()
    if rotation:
        _set_rotation(path, rotation)
    return num_frames


def write_audio(path: Path, audio: np.ndarray) -> None:
    """Write an MP4 with an audio stream alone; `audio` is int16 mono at AUDIO_RATE."""
    with _muxer(path) as container:
        _Sound(container, "aac", audio).finish()


def quiet_audio(duration_s: float, rng: np.random.Generator) -> np.ndarray:
    """Make a soft swelling tone over faint noise, about 35 dB below full scale.

    Samples are int16 mono at AUDIO_RATE.
    """
    t = np.arange(round(duration_s * AUDIO_RATE), dtype=np.float32) / AUDIO_RATE
    swell = 0.6 + 0.4 * np.sin(2 * np.pi * t / np.float32(rng.uniform(3.0, 6.0)))
    tone = swell * np.sin(2 * np.pi * np.float32(rng.uniform(180.0, 520.0)) * t)
    return np.rint(500.0 * tone + 20.0 * rng.standard_normal(len(t), np.float32)).astype(np.int16)


def _muxer(path: Path):
    options = {"fflags": "+bitexact"} | ({"output_ts_offset": str(TS_START_S)} if path.suffix == ".ts" else {})
    return av.open(str(path), "w", container_options=options)


def _video_stream(container, fmt: Format, size: tuple[int, int], rate: Fraction | None, time_base: Fraction):
    stream = container.add_stream(fmt.encoder, rate=rate or Fraction(30), options=dict(fmt.options))
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = time_base
    stream.codec_context.thread_count = 1
    stream.codec_context.flags |= av.codec.context.Flags.bitexact
    return stream


class _Sound:
    """The audio track, written in step with the pictures so that the muxer need not buffer."""

    CHUNK = AUDIO_RATE // 10

    def __init__(self, container, encoder: str, samples: np.ndarray):
        self.container, self.samples, self.position = container, samples, 0
        self.stream = container.add_stream(encoder, rate=AUDIO_RATE, options={"b": "32k"}, layout="mono")
        self.stream.codec_context.flags |= av.codec.context.Flags.bitexact

    def write_until(self, time_s: float) -> None:
        while self.position < min(len(self.samples), time_s * AUDIO_RATE):
            chunk = self.samples[self.position : self.position + self.CHUNK]
            frame = av.AudioFrame.from_ndarray(chunk[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = AUDIO_RATE, self.position, Fraction(1, AUDIO_RATE)
            self.container.mux(self.stream.encode(frame))
            self.position += len(chunk)

    def finish(self) -> None:
        self.write_until(len(self.samples) / AUDIO_RATE)
        self.container.mux(self.stream.encode(None))


# The matrix (a b u, c d v, x y w) of ISO 14496-12's track header; players move the result into view themselves.
_MATRICES = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def _set_rotation(path: Path, rotation: int) -> None:
    """Write a display rotation into the first track header of an MP4, where phones put it. PyAV cannot do this."""
    data = bytearray(path.read_bytes())
    header = data.rindex(b"tkhd", 0, data.index(b"mdhd")) + 4
    matrix = header + 4 + (32 if data[header] == 1 else 20) + 16  # version and flags, times and id, layer to reserved
    a, b, c, d = (value << 16 for value in _MATRICES[rotation])
    assert struct.unpack_from(">i", data, matrix)[0] == 1 << 16, "the track header has no identity matrix"
    struct.pack_into(">9i", data, matrix, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
