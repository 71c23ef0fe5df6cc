"""Encodings of clips: named presets, and an encoder from pictures to the bytes of one file in memory.

docs/clip_encoding.md compares the presets, with measured sizes and reading costs. Every preset gives the same bytes for
the same pictures with the same library versions (tested across processes): one thread, no AVX-512 in x264, no
timestamps and no encoder tags in the container. The index of an MP4 precedes its data, so that it plays and seeks while
it downloads.
"""

import io
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from clipmill.base.errors import ItemError

AUDIO_RATE = 48_000  # Hz, two channels
AUDIO_BITS_PER_S = 96_000
SOURCE_TICKS_PER_S = 90_000  # clock of clips that keep their source's frame times
JPEG_MAGIC = b"JPGS"


@dataclass(frozen=True)
class Encoding:
    """One way to write a clip."""

    codec: str  # FFmpeg's encoder; "jpeg-frames": no video codec, a sequence of JPEG files
    name: str  # value of `clips.codec`
    options: dict[str, str] = field(default_factory=dict)
    pix_fmt: str = "yuv420p"


# x264 165 with AVX-512 reads uninitialised memory: `python -m bench.clip_bytes` counts encodes with different bytes.
# Every processor with AVX-512 has the instruction sets named here; on others nothing is set.
WITHOUT_AVX512 = "asm=MMX2,SSE2Fast,LZCNT,SSSE3,SSE4.2,AVX,FMA3,BMI2,AVX2"


def cpu_flags() -> frozenset[str]:
    """Return the processor's feature flags on Linux; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in text.splitlines() if line.startswith("flags")), ()))


def x264(**options: str) -> Encoding:
    # a53cc=0: closed captions of the source do not belong to the picture.
    options = {"threads": "1", "a53cc": "0", **options}
    if "avx512f" in cpu_flags():
        options["x264-params"] = WITHOUT_AVX512
    return Encoding("libx264", "h264", options)


ENCODINGS: dict[str, Encoding] = {
    # The default: cheap to read (no CABAC, no deblocking, no B-frames) at a little more size.
    "fastdecode": x264(preset="veryfast", crf="24", tune="fastdecode", bf="0"),
    # Every frame is a keyframe: the cheapest video to read, and the only one in which seeking costs nothing.
    "intra": x264(preset="veryfast", crf="23", tune="fastdecode", bf="0", g="1"),
    # Plain x264: smaller, and more expensive to read.
    "small": x264(preset="veryfast", crf="23"),
    # Cheapest H.264 to write.
    "ultrafast": x264(preset="ultrafast", crf="23", bf="0"),
    # Smallest; three times as expensive to write as the default.
    "av1": Encoding("libsvtav1", "av1", {"preset": "8", "crf": "32", "svtav1-params": "lp=1"}),
    # JPEGs in an MP4: every frame can be read alone, for readers that need a video file.
    "mjpeg": Encoding(
        "mjpeg", "mjpeg", {"threads": "1", "flags": "+qscale", "global_quality": str(3 * 118)}, "yuvj420p"
    ),
    # JPEG files one after another and an index at the end (see `jpeg_frames`): the cheapest way to read a few frames.
    "jpeg-frames": Encoding("jpeg-frames", "jpeg-frames"),
}


class ClipEncoder:
    """Encoder of one clip: `add` its pictures in order, then `finish` returns the file. One thread, a few megabytes."""

    def __init__(
        self, encoding: Encoding, size: tuple[int, int], rate: Fraction | None, num_frames: int, sound_s: float
    ):
        """Open the file in memory.

        rate     frames per second; None: each picture has its own time
        sound_s  seconds of audio that will be added
        """
        import av

        num_sound_packets = int(sound_s * AUDIO_RATE / 1024) + 3 if sound_s else 0
        self.file = io.BytesIO()
        # The index is written into space reserved at the front: 24 bytes per packet are enough for all its tables.
        options = {"moov_size": str(2048 + 24 * (num_frames + num_sound_packets)), "fflags": "+bitexact"}
        self.container = av.open(self.file, "w", format="mp4", container_options=options)
        coding = dict(encoding.options)
        coding["flags"] = coding.get("flags", "") + "+frame_duration"  # so that the last frame keeps its duration
        self.stream = self.container.add_stream(encoding.codec, rate=rate or 30, options=coding)
        context = self.stream.codec_context
        context.width, context.height, context.pix_fmt = *size, encoding.pix_fmt
        context.thread_count = 1
        self.time_base = 1 / rate if rate else Fraction(1, SOURCE_TICKS_PER_S)
        context.time_base = self.time_base
        self.sound = None
        if sound_s:
            self.sound = self.container.add_stream("aac", rate=AUDIO_RATE, options={"flags": "+bitexact"})
            self.sound.codec_context.layout = "stereo"
            self.sound.codec_context.bit_rate = AUDIO_BITS_PER_S
        self.encoding, self.num_frames, self.tagged = encoding, 0, False

    def add(self, picture, start_s: float, end_s: float) -> None:
        """Add a yuv420p frame. Its times (in seconds of the clip) count only if the encoder has no rate."""
        if not self.tagged:
            context = self.stream.codec_context
            context.colorspace, context.color_primaries = picture.colorspace, picture.color_primaries
            context.color_trc = picture.color_trc
            context.color_range = 2 if self.encoding.pix_fmt.startswith("yuvj") else 1
            self.tagged = True
        if self.time_base.denominator == SOURCE_TICKS_PER_S:
            tick = round(start_s * SOURCE_TICKS_PER_S)
            duration = round(end_s * SOURCE_TICKS_PER_S) - tick
        else:
            tick, duration = self.num_frames, 1
        if self.encoding.pix_fmt != "yuv420p":
            picture = picture.reformat(format=self.encoding.pix_fmt, dst_color_range="JPEG", threads=1)
        picture.pts, picture.time_base, picture.duration = tick, self.time_base, max(1, duration)
        self.container.mux(self.stream.encode(picture))
        self.num_frames += 1

    def finish(self, sound: Iterable | None = None) -> bytes:
        """Return the whole file. `sound`: PyAV audio frames in the AAC encoder's format, in order."""
        self.container.mux(self.stream.encode(None))
        if self.sound is not None:
            for frame in sound:
                self.container.mux(self.sound.encode(frame))
            self.container.mux(self.sound.encode(None))
        self.container.close()
        return self.file.getvalue()


class JpegSequence:
    """Encoder of the "jpeg-frames" encoding, with `ClipEncoder`'s methods.

    The file has the JPEGs one after another (a raw MJPEG stream), then their sizes and their number as little-endian
    uint32, then `JPEG_MAGIC`.
    """

    def __init__(self, quality: int):
        from clipmill.media.frame_stats import Thumbnailer

        self.quality, self.views, self.files = quality, Thumbnailer(), []

    def add(self, picture, start_s: float, end_s: float) -> None:
        self.files.append(self.views.jpeg(picture, self.quality))

    def finish(self, sound: Iterable | None = None) -> bytes:
        sizes = [len(data) for data in self.files]
        return b"".join([*self.files, struct.pack(f"<{len(sizes) + 1}I", *sizes, len(sizes)), JPEG_MAGIC])


def jpeg_frames(data: bytes) -> list[memoryview]:
    """Return the JPEG files in a clip of the "jpeg-frames" encoding. Raises ItemError "not-jpeg-frames"."""
    if len(data) < 8 or data[-4:] != JPEG_MAGIC:
        raise ItemError("not-jpeg-frames", "no index at the end")
    (count,) = struct.unpack_from("<I", data, len(data) - 8)
    index = len(data) - 8 - 4 * count
    sizes = struct.unpack_from(f"<{count}I", data, index) if index >= 0 else ()
    if index < 0 or sum(sizes) != index:
        raise ItemError("not-jpeg-frames", "the index does not add up to the file")
    view, files = memoryview(data), []
    for size in sizes:
        files.append(view[:size])
        view = view[size:]
    return files
