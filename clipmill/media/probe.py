"""Open untrusted media: the one place that limits which containers are opened and which files they reach.

Call these inside a sandbox (`clipmill.media.sandbox`): a hostile file can crash or hang the decoder.
"""

from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from clipmill.base.errors import ItemError

# Demuxers of files that contain media themselves. Playlists and scripts (hls, dash, concat, image2, lavfi …) are left
# out on purpose: they make FFmpeg open other files or addresses than the one it was given.
CONTAINERS = "mov,matroska,webm,avi,flv,asf,mpegts,mpeg,mpegvideo,ogg,wav,mp3,flac,aac,gif,m4v,h264,hevc,ivf,mxf"

# Options for every demuxer that reads untrusted bytes: only these containers, and only files.
SHUT_IN = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
# Options for libavformat itself, which ignores options that a demuxer does not have.
NO_REFERENCES = SHUT_IN | {"enable_drefs": "0"}


@dataclass(frozen=True)
class MediaInfo:
    """Facts from the container's headers, unchecked: a wrong header gives a wrong `duration_s`."""

    container: str
    duration_s: float  # 0.0 where the container does not say it
    width: int  # as displayed, rotation applied
    height: int
    fps: float  # average rate, 0.0 where unknown
    rotation: int  # degrees by which the picture is turned clockwise for display: 0, 90, 180, 270
    video_codec: str
    audio_codec: str | None

    def as_row(self) -> dict:
        return asdict(self)


def open_media(path: str | Path):
    """Open a local file as a PyAV container that can open no other file.

    Raises ItemError "source-missing", "empty-file", "not-a-video" when no allowed demuxer accepts it.
    """
    import av

    path = Path(path)
    if not path.exists():
        raise ItemError("source-missing", f"{path} does not exist (was sources/ cleaned?)")
    if path.stat().st_size == 0:
        raise ItemError("empty-file", f"{path.name} has no bytes")
    try:
        return av.open(f"file:{path}", options=NO_REFERENCES, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise ItemError("not-a-video", f"{path.name}: {error}") from error


def video_stream(container):
    """Return the main video stream, and disable all other streams. Raises ItemError "no-video-stream".

    It is the first one that is neither a cover picture (attached to audio files) nor a set of thumbnails.
    """
    from av.stream import Discard, Disposition

    stills = Disposition.attached_pic | Disposition.timed_thumbnails
    moving = [stream for stream in container.streams.video if not stream.disposition & stills]
    if not moving:
        raise ItemError("no-video-stream", f"none of the {len(container.streams)} streams is video")
    for stream in container.streams:
        stream.discard = Discard.default if stream is moving[0] else Discard.all
    if moving[0].codec_context is None:
        raise ItemError("undecodable", "no decoder for the video stream")
    return moving[0]


def rotation_of(stream_frame) -> int:
    """Return the clockwise display rotation of a decoded PyAV frame in degrees, 0 if none is signalled."""
    return round(-stream_frame.rotation) % 360


def probe(path: str | Path) -> MediaInfo:
    """Read the facts of a local file. Raises ItemError: empty-file, not-a-video, no-video-stream, undecodable."""
    import av

    with open_media(path) as container:
        stream = video_stream(container)
        audio = container.streams.audio[0] if container.streams.audio else None
        name = container.format.name
        duration = container.duration / av.time_base if container.duration else 0.0
        rate = stream.average_rate or Fraction(0)
        codec = stream.codec_context.name
        audio_codec = audio.codec_context.name if audio and audio.codec_context else None  # no decoder: silent
        try:
            frame = next(container.decode(stream))
        except (StopIteration, av.FFmpegError) as error:
            raise ItemError("undecodable", f"{Path(path).name}: no frame decodes ({error})") from error
        rotation = rotation_of(frame)
        width, height = (frame.height, frame.width) if rotation in (90, 270) else (frame.width, frame.height)
    return MediaInfo(name, float(duration), width, height, float(rate), rotation, codec, audio_codec)
