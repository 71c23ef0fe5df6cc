"""The frames around a video's clips, a few a second, as the model takes them; and clips cut again as edits want them.

Both by the cutter of the corpus, in its sandbox: what is around a clip comes out as a small clip itself, so its
pictures are what training would see. Where the source video is not kept, the clips' own frames are all there is.
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
    """Read every frame that the video's clips may reach: times [F], ascending, and uint8 pixels [F, S, S, 3].

    Raises ItemError for a video of which anything cannot be read.
    """
    if clips.has_source:
        times, pixels = zip(*_of_source(root, video, clips, settings, cut, picture), strict=True)
    else:
        times, pixels = zip(*_of_clips(root, video, picture), strict=True)
    times_F, pixels_F = np.concatenate(times), np.concatenate(pixels)
    order = np.argsort(times_F, kind="stable")
    return times_F[order], pixels_F[order]


def _of_source(
    root: Path, video: Video, clips: VideoClips, settings: EditSettings, cut: CutSettings, picture: Picture
) -> Iterator[tuple[FrameTimes, Pixels]]:
    """Yield each stretch of the video that clips may reach, cut as a clip of `frames_per_s`."""
    fewer = cut.model_copy(update={"fps": settings.frames_per_s, "audio": False, "caption_frames": 1, "min_frames": 1})
    stretches = [SpanRequest(str(n), n, start, end) for n, (start, end) in enumerate(stretches_of(clips.room_N2))]
    with _scratch() as path:
        result = cut_in_sandbox(sandbox(), _source(root, video), stretches, fewer, path, clips.duration_s)
        for _, error in result.failures:
            raise error
        for row in result.rows:
            pixels = _all_frames(read_member(path, row["mp4_offset"], row["num_bytes"]), picture)
            yield row["span_start_s"] + np.arange(len(pixels)) / settings.frames_per_s, pixels


def _of_clips(root: Path, video: Video, picture: Picture) -> Iterator[tuple[FrameTimes, Pixels]]:
    for item in video.items:
        pixels = _all_frames(read_member(root / item["tar"], item["mp4_offset"], item["mp4_bytes"]), picture)
        yield item["start_s"] + np.arange(len(pixels)) / item["fps"], pixels


def stretches_of(room_N2: Floats) -> list[tuple[float, float]]:
    """Merge the rooms into pieces that do not touch."""
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

    Raises ItemError where nothing of the video can be cut.
    """
    if not spans:
        return [], []
    if video.items[0]["source"]:
        path = folder / video.video_id
        result = cut_in_sandbox(sandbox(), _source(root, video), spans, cut, path, video.items[0]["duration_s"])
        return [_stamped(video, row) for row in result.rows], result.failures
    return _cut_clips(root, video, spans, cut, folder)


def _cut_clips(
    root: Path, video: Video, spans: Sequence[SpanRequest], cut: CutSettings, folder: Path
) -> tuple[list[dict[str, Any]], list[tuple[str, ItemError]]]:
    """Cut from the clips themselves, one after the other; times in the rows are the video's."""
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
    """Cut one clip and append it to `out`, which the row's offsets point into. Raises ItemError."""
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


def _source(root: Path, video: Video) -> Path:
    return root / video.items[0]["source"]


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="clipmill-edit-") as folder:
        yield Path(folder) / "piece"
