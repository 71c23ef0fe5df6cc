"""Opening untrusted media: one place that says which containers may be opened and what they may reach.

Call these inside a sandbox (`clipmill.media.sandbox`): a hostile file can crash or hang the decoder.
"""

from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from clipmill.base.errors import ItemError

# Demuxers that hold media themselves. Playlists and scripts (hls, dash, concat, image2, lavfi …) are left out on
# purpose: they make FFmpeg open other files or addresses than the one it was given.
CONTAINERS = "mov,matroska,webm,avi,flv,asf,mpegts,mpeg,mpegvideo,ogg,wav,mp3,flac,aac,gif,m4v,h264,hevc,ivf,mxf"


# Options of every demuxer that meets bytes from elsewhere: these containers, files alone.
SHUT_IN = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
# And of libavformat itself, where options that a demuxer does not have are no error.
NO_REFERENCES = SHUT_IN | {"enable_drefs": "0"}


@dataclass(frozen=True)
class MediaInfo:
    """What the container says, checked against nothing: `duration_s` of a lying header is still a lie."""

    container: str
    duration_s: float  # 0.0 where the container does not say
    width: int  # as displayed, rotation applied
    height: int
    fps: float  # average rate, 0.0 where unknown
    rotation: int  # degrees clockwise the picture has to be turned for display: 0, 90, 180, 270
    video_codec: str
    audio_codec: str | None

    def as_row(self) -> dict:
        return asdict(self)


def open_media(path: str | Path):
    """A PyAV container over a local file that may open nothing but that file.

    Raises ItemError "not-a-video" when no allowed demuxer takes it, "empty-file" for zero bytes.
    """
    import av

    path = Path(path)
    if not path.exists():
        raise ItemError("source-missing", f"{path} is not there (was sources/ cleaned?)")
    if path.stat().st_size == 0:
        raise ItemError("empty-file", f"{path.name} has no bytes")
    try:
        return av.open(f"file:{path}", options=NO_REFERENCES, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise ItemError("not-a-video", f"{path.name}: {error}") from error


def video_stream(container):
    """The video stream that is meant to be watched, all others switched off. Raises ItemError "no-video-stream".

    The first one that is not a cover picture (attached to audio files) or a set of thumbnails.
    """
    from av.stream import Discard, Disposition

    stills = Disposition.attached_pic | Disposition.timed_thumbnails
    moving = [stream for stream in container.streams.video if not stream.disposition & stills]
    if not moving:
        raise ItemError("no-video-stream", f"{len(container.streams)} streams, none is video")
    for stream in container.streams:
        stream.discard = Discard.default if stream is moving[0] else Discard.all
    if moving[0].codec_context is None:
        raise ItemError("undecodable", "no decoder for the video stream")
    return moving[0]


def rotation_of(stream_frame) -> int:
    """Clockwise display rotation in degrees of a decoded PyAV frame (0 where none is signalled)."""
    return round(-stream_frame.rotation) % 360


def probe(path: str | Path) -> MediaInfo:
    """Container facts of a local file. Raises ItemError: empty-file, not-a-video, no-video-stream, undecodable."""
    import av

    with open_media(path) as container:
        stream = video_stream(container)
        audio = container.streams.audio[0] if container.streams.audio else None
        name = container.format.name
        duration = container.duration / av.time_base if container.duration else 0.0
        rate = stream.average_rate or Fraction(0)
        codec = stream.codec_context.name
        audio_codec = audio.codec_context.name if audio and audio.codec_context else None  # of no known codec: silent
        try:
            frame = next(container.decode(stream))
        except (StopIteration, av.FFmpegError) as error:
            raise ItemError("undecodable", f"{Path(path).name}: no frame decodes ({error})") from error
        rotation = rotation_of(frame)
        width, height = (frame.height, frame.width) if rotation in (90, 270) else (frame.width, frame.height)
    return MediaInfo(name, float(duration), width, height, float(rate), rotation, codec, audio_codec)
