"""Open untrusted media: the one place that limits which containers are opened and which files they reach.

Call these inside a sandbox (`clipmill.media.sandbox`): a hostile file can crash or hang the decoder.
"""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from clipmill.base.errors import ItemError
from clipmill.media.matroska import joined_pieces

# Demuxers of files that contain media themselves. Playlists and scripts (hls, dash, concat, image2, lavfi …) are left
# out on purpose: they make FFmpeg open other files or addresses than the one it was given.
CONTAINERS = "mov,matroska,webm,avi,flv,asf,mpegts,mpeg,mpegvideo,ogg,wav,mp3,flac,aac,gif,m4v,h264,hevc,ivf,mxf"

# Options for every demuxer that reads untrusted bytes: only these containers, and only files.
SHUT_IN = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
# Options for libavformat itself, which ignores options that a demuxer does not have.
NO_REFERENCES = SHUT_IN | {"enable_drefs": "0"}


@dataclass(frozen=True)
class MediaInfo:
    """Facts of a file: the duration as its pictures last, all else from its headers and its first picture."""

    container: str
    duration_s: float  # from the start of play to the end of the last picture
    width: int  # as displayed, rotation applied
    height: int
    fps: float  # average rate, 0.0 where unknown
    rotation: int  # degrees clockwise by which the picture, after mirroring if any, is turned: 0, 90, 180, 270
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
        source = joined_pieces(path) or f"file:{path}"
        return av.open(source, options=NO_REFERENCES, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise ItemError("not-a-video", f"{path.name}: {error}") from error


def video_stream(container):
    """Return the video stream that players show, and disable all other streams. Raises ItemError "no-video-stream".

    It is neither a cover picture nor a set of thumbnails. Of several, one with more than one picture comes before a
    still, one that is enabled by default before others, then the first of those that last (nearly) the longest.
    """
    from av.stream import Discard

    shown = _shown_stream(container)
    for stream in container.streams:
        stream.discard = Discard.default if stream is shown else Discard.all
    if shown.codec_context is None:
        raise ItemError("undecodable", "no decoder for the video stream")
    return shown


def _shown_stream(container):
    """Return the video stream that players show. Raises ItemError "no-video-stream"."""
    from av.stream import Disposition

    stills = Disposition.attached_pic | Disposition.timed_thumbnails
    moving = [stream for stream in container.streams.video if not stream.disposition & stills]
    if not moving:
        raise ItemError("no-video-stream", f"none of the {len(container.streams)} streams is video")
    return _most_shown(moving) if len(moving) > 1 else moving[0]


def _most_shown(streams: list):
    """Choose between several video streams by their packets: headers leave out how many pictures a stream has."""
    from av.stream import Disposition

    num_pictures, length_s = _extents(streams)

    def rank(stream) -> tuple:
        by_default = bool(stream.disposition & Disposition.default)
        return stream.codec_context is not None, num_pictures[stream.index] > 1, by_default

    best = max(map(rank, streams))
    equal = [stream for stream in streams if rank(stream) == best]
    enough_s = NEARLY * max(length_s[stream.index] for stream in equal)
    return next(stream for stream in equal if length_s[stream.index] >= enough_s)


NEARLY = 0.9  # streams that last at least this part of the longest are equally long


def _extents(streams: list) -> tuple[dict[int, int], dict[int, float]]:
    """Return the number of pictures and the length in seconds of each stream, by index; reads the file once if needed.

    The index of an MP4 file has both.
    """
    from clipmill.media.packets import packets_of

    if all(stream.frames and stream.duration for stream in streams):
        lengths_s = {stream.index: float(stream.duration * stream.time_base) for stream in streams}
        return {stream.index: stream.frames for stream in streams}, lengths_s
    counts = dict.fromkeys((stream.index for stream in streams), 0)
    first_s, last_s = {}, dict.fromkeys(counts, 0.0)
    path = streams[0].container.name.removeprefix("file:")
    with open_media(path) as again:
        for packet in packets_of(again, [again.streams[index] for index in counts]):
            index = packet.stream_index
            counts[index] += 1
            if packet.pts is not None:
                time_s = float(packet.pts * packet.time_base)
                last_s[index] = max(last_s[index], time_s - first_s.setdefault(index, time_s))
    return counts, last_s


def audio_stream(container):
    """Return the sound that players play with the video, or None; of several, the first that is enabled by default.

    In a broadcast of several programmes it is the sound of the video's own.
    """
    from av.stream import Disposition

    streams = list(container.streams.audio)
    if len(streams) > 1 and len(container.streams.video) > 1:
        with suppress(ItemError):  # cover pictures only
            return container.streams.best("audio", related=_shown_stream(container))
    enabled = [stream for stream in streams if stream.disposition & Disposition.default]
    return next(iter(enabled or streams), None)


@dataclass(frozen=True)
class Orientation:
    """Display of a stored picture: mirrored left to right or not, then turned clockwise by degrees."""

    mirrored: bool = False
    clockwise: int = 0  # 0, 90, 180, 270

    @property
    def swaps_sides(self) -> bool:
        return self.clockwise in (90, 270)

    def upright(self, picture: np.ndarray) -> np.ndarray:
        """Return a stored picture [H, W, ...] as it is displayed."""
        return np.rot90(picture[:, ::-1] if self.mirrored else picture, -self.clockwise // 90)


AS_STORED = Orientation()


def orientation_of(frame) -> Orientation:
    """Return the orientation of a decoded PyAV frame by its display matrix; angles between the four are ignored.

    The matrix of ISO 14496-12, 6.2.2: a stored point (x, y) is displayed at (ax + cy, bx + dy), with y downwards. How
    it scales the two axes is part of the pixel aspect, which FFmpeg computes.
    """
    # PyAV keeps a frame whose side data was read until the next garbage collection: read those of a tiny copy.
    stored = frame.reformat(width=16, height=16, format="gray", threads=1).side_data.get("DISPLAYMATRIX")
    if stored is None:
        return AS_STORED
    a, b, _, c, d = np.frombuffer(stored, np.int32, 5).tolist()
    mirrored = a * d - b * c < 0
    angle = round(math.degrees(math.atan2(-b, -a) if mirrored else math.atan2(b, a))) % 360
    return Orientation(mirrored, angle if angle in (90, 180, 270) else 0)


class FrameOrientations:
    """Give the orientation of each frame of a video; the matrix is read again where the angle or the size changes."""

    def __init__(self):
        self._seen: tuple = ()
        self._orientation = AS_STORED

    def of(self, frame) -> Orientation:
        seen = (frame.rotation, frame.width, frame.height)
        if seen != self._seen:
            self._seen, self._orientation = seen, orientation_of(frame)
        return self._orientation


def probe(path: str | Path) -> MediaInfo:
    """Read the facts of a local file; reads all of it, because headers are wrong about the duration.

    Raises ItemError: empty-file, not-a-video, no-video-stream, undecodable.
    """
    import av

    with open_media(path) as container:
        stream = video_stream(container)
        audio = audio_stream(container)
        name = container.format.name
        stated_s = container.duration / av.time_base if container.duration else 0.0
        rate = stream.average_rate or Fraction(0)
        codec = stream.codec_context.name
        audio_codec = audio.codec_context.name if audio and audio.codec_context else None  # no decoder: silent
        try:
            frame = next(container.decode(stream))
        except (StopIteration, av.FFmpegError) as error:
            raise ItemError("undecodable", f"{Path(path).name}: no frame decodes ({error})") from error
        shown = orientation_of(frame)
        width, height = (frame.height, frame.width) if shown.swaps_sides else (frame.width, frame.height)
    duration_s = _played_s(path, stated_s)
    return MediaInfo(name, duration_s, width, height, float(rate), shown.clockwise, codec, audio_codec)


def _played_s(path: str | Path, stated_s: float) -> float:
    """Return the end of the last picture by its packet, or by its number where packets have no times.

    What the limits of the stage `cut` refuse keeps the stated duration.
    """
    from clipmill.media.packets import Limits, Untrusted, list_frames, packets_of

    try:
        return list_frames(path, Limits()).times.end_s
    except ItemError:
        return stated_s
    except Untrusted:
        if stated_s:
            return stated_s
    with open_media(path) as container:
        stream = video_stream(container)
        return sum(1 for _ in packets_of(container, stream)) / float(stream.guessed_rate or 25)
