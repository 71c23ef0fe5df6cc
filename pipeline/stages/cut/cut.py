"""Cut the spans of one video into clips, in this process or in a sandbox. `cutter` beside this file does the work.

This module imports neither PyAV nor numpy: the driver, which only submits tasks, loads it with the stage.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from clipmill.base.errors import ItemError
from clipmill.base.settings import Settings, operational
from clipmill.media.sandbox import Sandbox


class CutSettings(Settings):
    """What clips look like, and what a source may cost."""

    # Pixels of the shorter side; never enlarged. 256 leaves room to crop or resize to the 224 of CLIP models.
    short_side: Annotated[int, Field(ge=16, le=4320, multiple_of=2)] | Literal["source"] = 256
    # Frames per second of the clip. CLIP-ViP trains on 3 fps copies; "source" keeps every frame and its time.
    fps: Annotated[float, Field(gt=0, le=240)] | Literal["source"] = 3.0
    # Sound of the same interval as AAC (48 kHz stereo). CLIP-ViP does not listen, so it would only cost bytes.
    audio: bool = False
    # How clips are written: docs/clip_encoding.md has the sizes and reading costs that made this the default.
    encoding: Literal["fastdecode", "intra", "small", "ultrafast", "av1", "mjpeg", "jpeg-frames"] = "fastdecode"
    # Stills kept for captioning. The first is frame floor(N/2) of the clip, which CLIP-ViP pairs with the caption.
    caption_frames: int = Field(1, ge=1, le=64)
    # JPEG quality of stills and of the "jpeg-frames" encoding: at 90 a captioner sees no difference.
    jpeg_quality: int = Field(90, ge=1, le=100)
    # A span of which the video holds fewer frames than this becomes a failure instead of a clip.
    min_frames: int = Field(1, ge=1)

    # Largest picture that is decoded, width x height: 8K passes, pictures made to exhaust memory do not.
    max_pixels: int = operational(8192 * 4352, ge=1)
    # Most frames a source may have: 46 hours at 60 fps.
    max_frames: int = operational(10_000_000, ge=1)
    # A video may take this long before it counts as hung: a start, plus so much for each second that it lasts.
    timeout_base_s: float = operational(60.0, gt=0)
    timeout_per_second: float = operational(5.0, gt=0)
    # … and never longer than this, whatever a header says.
    timeout_most_s: float = operational(4 * 3600.0, gt=0)
    # Memory of the process that decodes; 720p needs 0.3 GB, 8K HEVC 2 GB.
    memory_mb: int = operational(3072, ge=256)
    # Most bytes the clips of one video may have together.
    max_output_mb: int = operational(20_000, ge=1)


@dataclass(frozen=True)
class SpanRequest:
    """A piece of a video that is to become a clip, in seconds from the first displayed frame, end exclusive."""

    clip_id: str
    n: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class CutResult:
    """Rows in the order of the spans: all columns of the `clips` table but video_id, tar and source_sha256.

    `mp4_offset` and the stills' offsets point into the file that was written. Every span is either in `rows` or in
    `failures`. `duration_s` is when the last frame ends, whatever the header says; `counts` is what decoding did.
    """

    rows: list[dict]
    failures: list[tuple[str, ItemError]]
    duration_s: float
    num_source_frames: int
    counts: dict[str, Any]


def cut_video(path: str | Path, spans: list[SpanRequest], settings: CutSettings, out_path: str | Path) -> CutResult:
    """Cut all spans of one video in one decode; write clips and caption frames to `out_path`.

    Failures of single spans are in the result. Raises ItemError for the whole video: source-missing, empty-file,
    not-a-video, no-video-stream, undecodable, too-large, too-many-frames. The video is untrusted: call it in a sandbox.
    """
    from pipeline.stages.cut.cutter import Cutter

    return Cutter(path, settings).cut(spans, out_path)


def cut_in_sandbox(
    sandbox: Sandbox,
    path: str | Path,
    spans: list[SpanRequest],
    settings: CutSettings,
    out_path: str | Path,
    duration_s: float = 0.0,
) -> CutResult:
    """Run `cut_video` in another process under the settings' limits on time, memory and output size.

    The time limit grows with `duration_s`, the container's stated duration, up to `timeout_most_s`. Raises the
    ItemErrors of `cut_video`, and timeout, out-of-memory, decoder-crash, output-too-large, disk-full.
    """
    expected_s = max([duration_s, *(span.end_s for span in spans)])
    timeout_s = min(settings.timeout_most_s, settings.timeout_base_s + settings.timeout_per_second * expected_s)
    return sandbox.call(
        cut_video,
        str(path),
        spans,
        settings,
        str(out_path),
        timeout_s=timeout_s,
        memory_bytes=settings.memory_mb * 2**20,
        file_bytes=settings.max_output_mb * 2**20,
    )
