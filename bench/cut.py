"""Measure the cost of cutting against decoding alone: `python -m bench.cut` (its first run makes videos for a minute).

Figures are CPU seconds of child processes (user + system of each and of all it waited for). The ways alternate, A B C A
B C: CPU seconds suffer less from other work on the machine than wall seconds, and alternating keeps drift out of the
ratios. A row is a gate (the command fails when it does not hold) or informational.

A worker starts once for many videos (`Sandbox.calls_per_child`). So one process cuts all videos here, and of the CPU of
its start, which has a column, only the share of these videos counts: in full, it would be a tenth of the cost of a
one-minute video.

Traps: with 3 videos two workers cannot be twice as fast, so the scaling rows cut each video twice; the first call of a
worker imports its libraries, so that is done before the clock starts; decoding in FFmpeg's command line and in PyAV
costs the same, and both are shown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

from bench.media import COLUMNS, DEFAULT_DIR, DURATION_S, FPS, benchmark_set

MOST_MB = 600
MOST_OF_DECODE = 1.0
LEAST_SPEEDUP = 1.8


@dataclass
class Cost:
    """CPU seconds and peak memory of a command."""

    cpu_s: float  # without the start
    peak_mb: float
    start_s: float = 0.0  # CPU seconds of starting a worker


def cost_of(command: list[str]) -> Cost:
    """Run a command; return its cost, with that of its children. A worker prints the CPU seconds of its start."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    start_s = float(process.stdout.read() or 0.0)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return Cost(usage.ru_utime + usage.ru_stime - start_s, usage.ru_maxrss / 1024, start_s)


def this(way: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "bench.cut", "--way", way, *arguments]


def decode_ffmpeg(videos: list[dict], out: Path) -> list[list[str]]:
    """Decode up to the end of the last span, which a cutter cannot avoid without seeking."""
    commands = []
    for video in videos:
        end = video["spans"][-1][1]
        options = ["-v", "error", "-nostdin", "-threads", "1", "-t", str(end), "-i", video["path"]]
        commands.append([imageio_ffmpeg.get_ffmpeg_exe(), *options, "-map", "0:v", "-f", "null", "-"])
    return commands


def decode_pyav(videos: list[dict], out: Path) -> list[list[str]]:
    return [this("decode", json.dumps(videos))]


def plain(videos: list[dict], out: Path) -> list[list[str]]:
    """Run an ffmpeg per clip, the usual script."""
    fixed = ["-map", "0:v", "-vf", "fps=3,scale=-2:256", "-c:v", "libx264", "-preset", "veryfast", "-crf", "23"]
    commands = []
    for n, (path, (start, end)) in enumerate((video["path"], span) for video in videos for span in video["spans"]):
        source = ["-v", "error", "-nostdin", "-y", "-threads", "1", "-ss", str(start), "-t", str(end - start)]
        target = ["-threads", "1", str(out / f"plain{n}.mp4")]
        commands.append([imageio_ffmpeg.get_ffmpeg_exe(), *source, "-i", path, *fixed, *target])
    return commands


def ours(encoding: str) -> Callable[[list[dict], Path], list[list[str]]]:
    return lambda videos, out: [this("cut", json.dumps(videos), encoding, str(out / f"{encoding}.bin"))]


WAYS: dict[str, tuple[str, Callable[[list[dict], Path], list[list[str]]]]] = {
    "decode alone, ffmpeg": ("reference", decode_ffmpeg),
    "decode alone, PyAV": ("informational", decode_pyav),
    "cut, fastdecode (default)": ("gate", ours("fastdecode")),
    "cut, small (x264 veryfast)": ("gate", ours("small")),
    "cut, ultrafast": ("informational", ours("ultrafast")),
    "cut, jpeg-frames": ("informational", ours("jpeg-frames")),
    "plain: one ffmpeg per clip": ("informational", plain),
}


def measure(videos: list[dict], rounds: int, out: Path) -> dict[str, list[Cost]]:
    """Measure all ways, alternating them."""
    from clipmill.media.sandbox import Sandbox

    share = len(videos) / Sandbox().calls_per_child
    costs: dict[str, list[Cost]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, (_, commands_of) in WAYS.items():
            runs = [cost_of(command) for command in commands_of(videos, out)]
            start_s = sum(run.start_s for run in runs)
            cpu_s = sum(run.cpu_s for run in runs) + share * start_s
            costs[name].append(Cost(cpu_s, max(run.peak_mb for run in runs), start_s))
    return costs


def report(costs: dict[str, list[Cost]], num_clips: int, minutes: float) -> list[str]:
    """Print the table; return the gates that failed."""
    reference = statistics.median(cost.cpu_s for cost in costs["decode alone, ffmpeg"])
    print("| way | CPU-s / source minute | clips / CPU-s | of decode alone | start, CPU-s | peak MB | |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    broken = []
    for name, (kind, _) in WAYS.items():
        seconds = [cost.cpu_s for cost in costs[name]]
        middle, ratio = statistics.median(seconds), statistics.median(seconds) / reference
        peak = max(cost.peak_mb for cost in costs[name])
        spread = f"{middle / minutes:.2f} ({min(seconds) / minutes:.2f}-{max(seconds) / minutes:.2f})"
        verdict = kind
        if kind == "gate":
            holds = ratio <= MOST_OF_DECODE and peak < MOST_MB
            verdict = f"gate: <= {MOST_OF_DECODE:.2f} and < {MOST_MB} MB: {'passed' if holds else 'FAILED'}"
            broken += [] if holds else [name]
        start_s = statistics.median(cost.start_s for cost in costs[name])
        rate = f"{num_clips / middle:.2f} | {ratio:.2f} | {start_s:.2f}"
        print(f"| {name} | {spread} | {rate} | {peak:.0f} | {verdict} |")
    return broken


def start_errors(videos: list[dict], out: Path) -> list[float]:
    """Return the milliseconds between each clip's asked start and the frame number in its first picture.

    Numbers begin again every `period_s`: an error of whole periods would not be seen.
    """
    from bench.frame_code import read_number

    errors = []
    for video in videos:
        for (start, _), frame in zip(video["spans"], _first_pictures(video, out), strict=True):
            period_s = video["period_s"]
            error_s = read_number(frame, COLUMNS) / FPS - start
            errors.append(1000 * ((error_s + period_s / 2) % period_s - period_s / 2))
    return errors


def _first_pictures(video: dict, out: Path):
    """Yield the luma of the first picture of each clip."""
    import io

    import av
    import numpy as np

    result = _cut(video, "fastdecode", out / "check.bin")
    for row in result.rows:
        with open(out / "check.bin", "rb") as file:
            file.seek(row["mp4_offset"])
            data = file.read(row["num_bytes"])
        with av.open(io.BytesIO(data)) as container:
            plane = next(container.decode(video=0)).planes[0]
        yield np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width]


def wall_of_workers(videos: list[dict], num_workers: int, out: Path) -> float:
    """Measure the wall seconds to cut every video twice in warm sandboxes."""
    from clipmill.media.sandbox import Sandbox
    from pipeline.stages.cut.cut import CutSettings, cut_in_sandbox

    sandboxes = [Sandbox() for _ in range(num_workers)]
    jobs = [(video, i) for i in range(2) for video in videos]
    free = list(sandboxes)

    def run(job: tuple[dict, int]) -> None:
        sandbox = free.pop()
        video, i = job
        target = out / f"worker{i}-{Path(video['path']).stem}.bin"
        cut_in_sandbox(sandbox, video["path"], _requests(video), CutSettings(), target)
        free.append(sandbox)

    for sandbox in sandboxes:
        cut_in_sandbox(sandbox, videos[0]["path"], _requests(videos[0])[:1], CutSettings(), out / "warm.bin")
    begun = time.monotonic()
    with ThreadPoolExecutor(num_workers) as pool:
        list(pool.map(run, jobs))
    elapsed = time.monotonic() - begun
    for sandbox in sandboxes:
        sandbox.close()
    return elapsed


def _requests(video: dict) -> list:
    from pipeline.stages.cut.cut import SpanRequest

    return [SpanRequest(f"v.{n}", n, start, end) for n, (start, end) in enumerate(video["spans"])]


def _cut(video: dict, encoding: str, target: Path):
    """Cut all spans of a video."""
    from pipeline.stages.cut.cut import CutSettings, cut_video

    result = cut_video(video["path"], _requests(video), CutSettings(encoding=encoding), target)
    assert len(result.rows) == len(video["spans"]), result.failures
    return result


def _decode(video: dict) -> None:
    """Decode a video to the end of its last span."""
    import av

    with av.open(video["path"]) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            if frame.time >= video["spans"][-1][1]:
                return


def run_way(arguments: list[str]) -> None:
    """Run a way inside a measured process, after printing the CPU seconds of its start."""
    import pipeline.stages.cut.cutter  # noqa: F401

    way, videos, *rest = arguments
    print(time.process_time(), flush=True)
    for video in json.loads(videos):
        if way == "decode":
            _decode(video)
        else:
            _cut(video, rest[0], Path(rest[1]))


def main() -> None:
    if sys.argv[1:2] == ["--way"]:
        return run_way(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way")
    parser.add_argument("--folder", type=Path, default=DEFAULT_DIR, help="where the benchmark set is kept")
    parser.add_argument("--footage", type=Path, help="a folder of real videos to make the set from")
    parser.add_argument("--duration-s", type=float, default=DURATION_S, help="length of each of the three videos")
    parser.add_argument("--skip-workers", action="store_true", help="leave out the wall-clock rows")
    options = parser.parse_args()
    videos = benchmark_set(options.folder, options.footage, options.duration_s)
    num_clips = sum(len(video["spans"]) for video in videos)
    print(f"{num_clips} clips of {len(videos)} videos of {options.duration_s:g} s, {options.rounds} rounds in turn\n")
    with tempfile.TemporaryDirectory() as out:
        broken = report(
            measure(videos, options.rounds, Path(out)), num_clips, len(videos) * options.duration_s / 60
        ) + _report_starts(start_errors(videos, Path(out)))
        if not options.skip_workers:
            broken += _report_workers(videos, Path(out))
    if broken:
        sys.exit("gates failed: " + ", ".join(broken))


def _report_starts(errors: list[float]) -> list[str]:
    """Print errors of clip starts; return the gates that failed."""
    largest, half_frame = max(abs(error) for error in errors), 500 / FPS
    print(
        f"\nfirst frame minus asked start: median {statistics.median(errors):+.1f} ms, largest {largest:.1f} ms; ",
        end="",
    )
    print(f"gate: within half a source frame ({half_frame:.1f} ms)")
    return [] if largest <= half_frame + 0.1 else ["starts"]


def _report_workers(videos: list[dict], out: Path) -> list[str]:
    """Print the speed-up by a second worker; return the gates that failed."""
    times = {count: [] for count in (1, 2)}
    for _ in range(2):
        for count, walls in times.items():
            walls.append(wall_of_workers(videos, count, out))
    one, two = (min(times[count]) for count in (1, 2))
    print(f"one worker {one:.1f} s, two workers {two:.1f} s wall: {one / two:.2f} times as fast; ", end="")
    print(f"gate: >= {LEAST_SPEEDUP} on two free cores ({len(os.sched_getaffinity(0))} here)")
    return [] if one / two >= LEAST_SPEEDUP else ["two workers"]


if __name__ == "__main__":
    main()
