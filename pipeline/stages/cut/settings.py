"""Settings of the cut stage, and the request and result that pass between this process and the sandbox."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from clipmill.base.errors import ItemError
from clipmill.base.settings import Settings, operational


class CutSettings(Settings):
    """Settings of clips: their pictures and encoding, and limits on the cost of a source."""

    # Pixels of the shorter side; never enlarged. 256 leaves room to crop or resize to the 224 of CLIP models.
    short_side: Annotated[int, Field(ge=16, le=4320, multiple_of=2)] | Literal["source"] = 256
    # Frames per second of the clip. CLIP-ViP trains on 3 fps copies; "source" keeps every frame and its time.
    fps: Annotated[float, Field(gt=0, le=240)] | Literal["source"] = 3.0
    # Sound of the same interval as AAC (48 kHz stereo). Off, because CLIP-ViP does not use it and it costs bytes.
    audio: bool = False
    # Encoding of the clips. docs/clip_encoding.md compares sizes and reading costs, which made fastdecode the default.
    encoding: Literal["fastdecode", "intra", "small", "ultrafast", "av1", "mjpeg", "jpeg-frames"] = "fastdecode"
    # Stills kept for captioning. The first is frame floor(N/2) of the clip, which CLIP-ViP pairs with the caption.
    caption_frames: int = Field(1, ge=1, le=64)
    # JPEG quality of stills and of the "jpeg-frames" encoding: at 90 a captioner sees no difference.
    jpeg_quality: int = Field(90, ge=1, le=100)
    # Least frames of a clip; a span with fewer becomes a failure.
    min_frames: int = Field(1, ge=1)

    # Most pixels of a decoded picture, width x height: allows 8K, and refuses pictures made to exhaust memory.
    max_pixels: int = operational(8192 * 4352, ge=1)
    # Most frames a source may have: 46 hours at 60 fps.
    max_frames: int = operational(10_000_000, ge=1)
    # Seconds that cutting a video may take, besides those per second of video, before it counts as hung. A minute is
    # far more than a start needs.
    timeout_base_s: float = operational(60.0, gt=0)
    # More seconds for cutting, per second of video. 5 allows for a slow core and large pictures.
    timeout_per_second: float = operational(5.0, gt=0)
    # The longest limit for one video, because the length in a header may be wrong.
    timeout_most_s: float = operational(4 * 3600.0, gt=0)
    # Megabytes of memory of the process that decodes; 720p needs 300, 8K HEVC 2,000.
    memory_mb: int = operational(3072, ge=256)
    # Most megabytes of all clips of one video.
    max_output_mb: int = operational(20_000, ge=1)


@dataclass(frozen=True)
class SpanRequest:
    """A piece of a video that is to become a clip, in seconds from the start of play, end exclusive."""

    clip_id: str
    n: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class CutResult:
    """Rows in the order of the spans: all columns of the `clips` table but video_id, tar and source_sha256.

    `mp4_offset` and the stills' offsets point into the file that was written. Every span is either in `rows` or in
    `failures`. `duration_s` is the end of the last frame, not the header's value; `counts` are those of decoding.
    """

    rows: list[dict]
    failures: list[tuple[str, ItemError]]
    duration_s: float
    num_source_frames: int
    counts: dict[str, Any]
