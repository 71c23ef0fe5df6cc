"""Cut the spans of one video into clips, in this process or in a sandbox. `cutter` beside this file does the work.

This module imports neither PyAV nor numpy: the driver, which only submits tasks, loads it with the stage.
"""

from pathlib import Path

from clipmill.media.sandbox import Sandbox
from pipeline.stages.cut.settings import CutResult, CutSettings, SpanRequest


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
