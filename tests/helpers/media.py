"""Encode videos whose pictures show their frame number, in many formats, and read the numbers back."""

import io
import subprocess
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np

from bench.frame_code import draw_number, read_number

LONG_GOP = {"x264-params": "keyint=300:scenecut=0:bframes=3:b-pyramid=normal", "preset": "veryfast", "crf": "20"}
SHORT_GOP = {"x264-params": "keyint=24:scenecut=0:bframes=3:b-pyramid=normal", "preset": "veryfast", "crf": "20"}
OPEN_GOP = {"x264-params": "keyint=24:scenecut=0:bframes=3:b-pyramid=normal:open-gop=1", "preset": "veryfast"}


@dataclass
class Shape:
    """Describe the format of a test video, whose frame i shows the number i."""

    name: str  # of the file, with its extension
    num_frames: int = 90
    fps: int = 30
    size: tuple[int, int] = (320, 180)  # as stored
    codec: str = "libx264"
    options: dict = field(default_factory=lambda: dict(LONG_GOP))
    pix_fmt: str = "yuv420p"
    ticks: list[int] | None = None  # frame times in milliseconds instead of a constant rate
    start_s: float = 0.0
    rotation: int = 0  # clockwise degrees a player has to turn the picture
    pixel_aspect: Fraction = Fraction(1)
    sound_hz: int = 0  # pitch of a tone that sounds in every odd second
    colour: dict = field(default_factory=dict)  # attributes of the codec context
    muxer: dict = field(default_factory=dict)

    def times_s(self) -> list[Fraction]:
        """Return the times at which frames are shown, relative to the first."""
        if self.ticks:
            return [Fraction(tick - self.ticks[0], 1000) for tick in self.ticks]
        if self._counts_milliseconds:
            return [Fraction(round(1000 * i / self.fps), 1000) for i in range(self.num_frames)]
        return [Fraction(i, self.fps) for i in range(self.num_frames)]

    def end_s(self) -> Fraction:
        times = self.times_s()
        if self.ticks:
            return 2 * times[-1] - times[-2]
        return times[-1] + (Fraction(1000 // self.fps, 1000) if self._counts_milliseconds else Fraction(1, self.fps))

    @property
    def _counts_milliseconds(self) -> bool:
        return self.name.endswith((".mkv", ".webm", ".flv"))


def make_video(folder: Path, shape: Shape, first_number: int = 0) -> Path:
    path = folder / shape.name
    with av.open(str(path), "w", container_options=shape.muxer) as container:
        stream = container.add_stream(shape.codec, rate=shape.fps, options={"flags": "+frame_duration"} | shape.options)
        context = stream.codec_context
        context.width, context.height, context.pix_fmt, context.thread_count = *shape.size, shape.pix_fmt, 1
        context.sample_aspect_ratio = shape.pixel_aspect
        for name, value in shape.colour.items():
            setattr(context, name, value)
        if shape.rotation:
            stream.set_display_rotation(-shape.rotation)
        clock = Fraction(1, 1000) if shape.ticks else Fraction(1, shape.fps)
        context.time_base = clock
        sound = container.add_stream("aac", rate=48000) if shape.sound_hz else None
        if sound is not None:
            sound.codec_context.layout = "mono"
        for i in range(shape.num_frames):
            frame = numbered_frame(first_number + i, shape)
            tick = shape.ticks[i] if shape.ticks else i
            frame.pts, frame.time_base = tick + round(shape.start_s / clock), clock
            if shape.ticks:
                following = shape.ticks[i + 1] if i + 1 < shape.num_frames else 2 * tick - shape.ticks[i - 1]
                frame.duration = following - tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _add_tone(container, sound, shape)
    return path


def ffmpeg(*arguments) -> None:
    """Run FFmpeg with these arguments; the last one is the file it writes."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


def numbered_frame(number: int, shape: Shape) -> av.VideoFrame:
    """Draw a drifting gradient, a moving square and the number, stored so that it is upright after rotation."""
    width, height = shape.size if shape.rotation % 180 == 0 else shape.size[::-1]
    luma = np.add.outer(np.arange(height), np.arange(width) + 3 * number).astype(np.int64) % 200 + 20
    luma = luma.astype(np.uint8)
    if height >= 40 and width >= 40:
        left = 5 * number % (width - 20)
        luma[height // 2 : height // 2 + 20, left : left + 20] = 235
        draw_number(luma, number)
    luma = np.ascontiguousarray(np.rot90(luma, shape.rotation // 90))
    colour = np.full(((luma.shape[0] + 1) // 2, (luma.shape[1] + 1) // 2), 110, np.uint8)
    full = av.VideoFrame(luma.shape[1], luma.shape[0], "yuv420p")
    for plane, values in zip(full.planes, (luma, colour, colour), strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : plane.width] = values
        plane.update(rows.tobytes())
    return full if shape.pix_fmt == "yuv420p" else full.reformat(format=shape.pix_fmt)


def _add_tone(container, stream, shape: Shape) -> None:
    t = np.arange(int(shape.end_s() * 48000)) / 48000
    samples = np.where(t % 2 >= 1, 0.5 * np.sin(2 * np.pi * shape.sound_hz * t), 0).astype(np.float32)
    offset = round(shape.start_s * 48000)
    for begin in range(0, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + 1024], format="fltp", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), offset + begin
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def numbers_in(data: bytes) -> list[int]:
    """Return the frame numbers shown by an encoded clip, in order."""
    return [read_number(luma_of(frame)) for frame in decoded(data)]


def decoded(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))


def luma_of(frame: av.VideoFrame) -> np.ndarray:
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]


def expected_numbers(
    times_s: list[Fraction], end_s: Fraction, start: float, end: float, rate: float | None
) -> list[int]:
    """Apply the rule literally: the nearest source frame to each output time, the earlier of two, none past the end.

    At the source's rate the end is rounded like the start. Else what begins in the last millisecond is past the end.
    """
    start, end = Fraction(start).limit_denominator(10**6), Fraction(end).limit_denominator(10**6)
    start, millisecond = max(start, times_s[0]), Fraction(1, 1000)
    allowed = [i for i, t in enumerate(times_s) if t < end - millisecond] or [0]
    nearest = lambda moment: min(allowed, key=lambda i: (abs(times_s[i] - moment), i))  # noqa: E731
    if rate is None:
        edges = [*times_s, end_s]
        stop = min(range(len(edges)), key=lambda i: (abs(edges[i] - end), i))
        return list(range(nearest(start), max(stop, nearest(start) + 1)))
    step, numbers, k = 1 / Fraction(rate).limit_denominator(1001), [], 0
    while k == 0 or start + k * step < min(end - millisecond, end_s):
        numbers.append(nearest(start + k * step))
        k += 1
    return numbers


def pixels_of(frame: av.VideoFrame) -> bytes:
    """Return every visible sample, without the padding at the end of a buffer's lines."""
    sample_bytes = 2 if "10" in frame.format.name else 1
    planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in frame.planes]
    sizes = [(plane.height, plane.width * sample_bytes) for plane in frame.planes]
    return b"".join(rows[:height, :width].tobytes() for rows, (height, width) in zip(planes, sizes, strict=True))


def piece(path: Path, offset: int, num_bytes: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(num_bytes)


def flat_video(path: Path, luma: int) -> Path:
    """Encode 3 s of one grey."""
    colour = f"color=0x{luma:02x}{luma:02x}{luma:02x}:s=64x48:r=5:d=3"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", colour]
    subprocess.run([*command, "-c:v", "libx264", "-preset", "ultrafast", "-threads", "1", str(path)], check=True)
    return path
