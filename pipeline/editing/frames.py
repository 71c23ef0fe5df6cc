"""Read the frames around a video's clips, a few a second, and cut edited clips.

Both use the corpus's cutter in its sandbox: the video around a clip is cut as a small clip itself, so that its pictures
equal those of training. If the source video is not kept, only the clips' own frames are read.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmill.base.errors import ItemError
from pipeline.editing.clips import Video
from pipeline.runtime.source_file import unchanged
from pipeline.runtime.task import sandbox
from pipeline.stages.cut.cut import cut_in_sandbox
from pipeline.stages.cut.settings import CutSettings, SpanRequest
from shards.packing.tar import read_member
from training.data.clip_frames import Picture, Pixels, decode_clip
from training.editing.boundaries import Floats, VideoClips
from training.editing.settings import EditSettings

FrameTimes = NDArray[np.float64]


def read_frames(
    root: Path, video: Video, clips: VideoClips, settings: EditSettings, cut: CutSettings, picture: Picture
) -> tuple[FrameTimes, Pixels]:
    """Read all frames within the rooms of the video's clips: times [F], ascending, and uint8 pixels [F, S, S, 3].

    Raises ItemError if a part of the video cannot be read.
    """
    times, pixels = [], []
    if clips.has_source:
        for times_of_stretch, pixels_of_stretch in _of_source(root, video, clips, settings, cut, picture):
            times.append(times_of_stretch)
            pixels.append(pixels_of_stretch)
    else:
        for item in video.items:
            pixels.append(_all_frames(read_member(root / item["tar"], item["mp4_offset"], item["mp4_bytes"]), picture))
            times.append(item["start_s"] + np.arange(len(pixels[-1])) / item["fps"])
    times_F, pixels_F = np.concatenate(times), np.concatenate(pixels)
    order = np.argsort(times_F, kind="stable")
    return times_F[order], pixels_F[order]


def _of_source(
    root: Path, video: Video, clips: VideoClips, settings: EditSettings, cut: CutSettings, picture: Picture
) -> Iterator[tuple[FrameTimes, Pixels]]:
    """Yield the frames of each stretch of the video within clips' rooms, cut as a clip of `frames_per_s`."""
    fewer = cut.model_copy(update={"fps": settings.frames_per_s, "audio": False, "caption_frames": 1, "min_frames": 1})
    stretches = [SpanRequest(str(n), n, start, end) for n, (start, end) in enumerate(stretches_of(clips.room_N2))]
    with _scratch() as path:
        with _source(root, video) as source:
            result = cut_in_sandbox(sandbox(), source, stretches, fewer, path, clips.duration_s)
        for _, error in result.failures:
            raise error
        for row in result.rows:
            pixels = _all_frames(read_member(path, row["mp4_offset"], row["num_bytes"]), picture)
            yield row["span_start_s"] + np.arange(len(pixels)) / settings.frames_per_s, pixels


def stretches_of(room_N2: Floats) -> list[tuple[float, float]]:
    """Merge overlapping and touching rooms."""
    stretches: list[tuple[float, float]] = []
    for start, end in sorted(map(tuple, room_N2.tolist())):
        if stretches and start <= stretches[-1][1]:
            stretches[-1] = (stretches[-1][0], max(end, stretches[-1][1]))
        else:
            stretches.append((start, end))
    return stretches


def _all_frames(data: bytes, picture: Picture) -> Pixels:
    return np.asarray(decode_clip(data, range, picture))


def cut_again(
    root: Path, video: Video, spans: Sequence[SpanRequest], cut: CutSettings, folder: Path
) -> tuple[list[dict[str, Any]], list[tuple[str, ItemError]]]:
    """Cut clips of these spans; return rows of `clips`, with offsets in FOLDER/VIDEO_ID, and the failures.

    Raises ItemError if the video cannot be cut at all.
    """
    if not spans:
        return [], []
    if video.items[0]["source"]:
        path = folder / video.video_id
        with _source(root, video) as source:
            result = cut_in_sandbox(sandbox(), source, spans, cut, path, video.items[0]["duration_s"])
        return [_stamped(video, row) for row in result.rows], result.failures
    return _cut_clips(root, video, spans, cut, folder)


def _cut_clips(
    root: Path, video: Video, spans: Sequence[SpanRequest], cut: CutSettings, folder: Path
) -> tuple[list[dict[str, Any]], list[tuple[str, ItemError]]]:
    """Cut each span from its clip; times in the rows are the video's."""
    items = {item["clip_id"]: item for item in video.items}
    rows: list[dict[str, Any]] = []
    failures: list[tuple[str, ItemError]] = []
    with open(folder / video.video_id, "wb") as out:
        for span in spans:
            item = items[span.clip_id]
            try:
                row = _cut_clip(root, item, span, cut, out)
                rows.append(_stamped(video, row | {"span_start_s": span.start_s, "span_end_s": span.end_s}))
            except ItemError as error:
                failures.append((span.clip_id, error))
    return rows, failures


def _cut_clip(root: Path, item: dict[str, Any], span: SpanRequest, cut: CutSettings, out: Any) -> dict[str, Any]:
    """Cut one clip and append it to `out`; offsets in the row are those in `out`. Raises ItemError."""
    with _scratch() as whole, _scratch() as piece:
        whole.write_bytes(read_member(root / item["tar"], item["mp4_offset"], item["mp4_bytes"]))
        shift_s, at = item["start_s"], out.tell()
        inside = SpanRequest(span.clip_id, span.n, max(0.0, span.start_s - shift_s), span.end_s - shift_s)
        result = cut_in_sandbox(sandbox(), whole, [inside], cut, piece)
        for _, error in result.failures:
            raise error
        out.write(piece.read_bytes())
    [row] = result.rows
    row["mp4_offset"] += at
    for frame in row["frames"]:
        frame["offset"] += at
        frame["time_s"] += shift_s
    for name in ("start_s", "end_s", "frame_time_s"):
        row[name] += shift_s
    return row


def _stamped(video: Video, row: dict[str, Any]) -> dict[str, Any]:
    return row | {"video_id": video.video_id, "source_sha256": video.items[0]["source_sha256"]}


@contextmanager
def _source(root: Path, video: Video) -> Iterator[Path]:
    """Yield the video's file, which has the bytes that its clips were cut from. Raises ItemError "source-changed"."""
    path = root / video.items[0]["source"]
    with unchanged(path, video.items[0]["source_sha256"]):
        yield path


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="clipmill-edit-") as folder:
        yield Path(folder) / "piece"
