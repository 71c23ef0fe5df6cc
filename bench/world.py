"""Measure the cost of making the demo world: scenes per CPU-second, and milliseconds per frame drawn and encoded.

    python -m bench.world [--videos N] [--seed S]

Informational. CPU time of one process, all threads, everything included (drawing, encoding, audio, subtitles, truth).
The first line gives the time of a thousand clips; the table divides it by format.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from pipeline.demo.grammar import sample_scene
from pipeline.demo.plan import WorldSettings, frames_of, plan_video
from pipeline.demo.render import render_frame
from pipeline.demo.world import make_world, read_truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    world_cost(arguments.videos, arguments.seed)
    frame_cost(arguments.seed)


def world_cost(num_videos: int, seed: int) -> None:
    """Print the cost of making a world."""
    settings = WorldSettings(num_videos=num_videos, seed=seed, workers=1)
    marks_s: list[float] = [time.process_time()]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "world"
        summary = make_world(folder, settings, lambda done, total: marks_s.append(time.process_time()))
        truth = read_truth(folder)
    cpu_s = marks_s[-1] - marks_s[0]
    print(f"{summary.num_scenes} scenes, {summary.num_videos} videos, {summary.duration_s / 60:.1f} min of video")
    print(
        f"{summary.num_scenes / cpu_s:.2f} scenes per CPU-second: 1000 take {1000 * cpu_s / summary.num_scenes:.0f} s"
    )
    by_format: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
    for row, start_s, end_s in zip(truth, marks_s, marks_s[1:], strict=False):
        by_format[row["format"]].append((end_s - start_s, row["num_frames"], row["num_bytes"]))
    for name, rows in sorted(by_format.items()):
        cost_s, frames, num_bytes = (sum(column) for column in zip(*rows, strict=True))
        per_frame = f"{1000 * cost_s / frames:5.2f} ms/frame  {num_bytes / frames:6.0f} bytes/frame"
        print(f"  {name:11} {len(rows):3} videos  {per_frame}")
    drawing_ms = _cpu_ms(lambda: [sum(1 for _ in frames_of(plan_video(settings, index))) for index in range(4)])
    frames = sum(row["num_frames"] for row in truth[:4])
    print(f"  of which drawing, new backgrounds and sprites included: {drawing_ms / frames:.3f} ms/frame")


def frame_cost(seed: int) -> None:
    """Time drawing alone, after a scene's background and sprites are made."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(20)]
    for width, height in ((320, 240), (426, 240), (640, 360)):
        costs = [_cpu_ms(lambda s=scene, w=width, h=height: _draw(s, w, h, 100), warm=True) / 100 for scene in scenes]
        print(f"render_frame {width}x{height}: median {np.median(costs):.3f} ms, largest {max(costs):.3f} ms")


def _draw(scene, width: int, height: int, num_frames: int) -> None:
    for k in range(num_frames):
        render_frame(scene, k / 15, width, height)


def _cpu_ms(work: Callable[[], object], warm: bool = False) -> float:
    """Return the CPU milliseconds of a call."""
    if warm:
        work()
    start_s = time.process_time()
    work()
    return 1000 * (time.process_time() - start_s)


if __name__ == "__main__":
    main()
