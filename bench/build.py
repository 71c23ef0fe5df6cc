"""Measure the CPU cost of a whole build, and the engine's share of it.

    python -m bench.build              the benchmark set (`bench.media`): build and the same work without the engine
    python -m bench.build --scaling    tiny media: cost per clip at 1,000 and at 20,000 clips (informational, minutes)

gate           build ≤ 2.2 times the CPU of decoding its sources alone · engine overhead ≤ 10 % of the CPU
informational  cost per clip as the corpus grows · the driver's memory

"The same work" runs every stage's worker code in one process, on the same items, without Ray, ledger or manifest. Both
count every process they start. The ways alternate (A B C A B C), and ratios are medians of the rounds. The videos are
made once and kept (`--folder`, see `bench.media`).
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench.cut import decode_ffmpeg
from bench.media import DEFAULT_DIR, benchmark_set
from bench.tree_cpu import Cost, measure

MAX_OF_DECODE, MAX_OVERHEAD = 2.2, 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=float, default=185.0, help="seconds of each of the three videos")
    parser.add_argument("--folder", type=Path, default=DEFAULT_DIR, help="where the videos are kept")
    parser.add_argument("--footage", type=Path, help="folder of real videos to make the set from")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 20_000], help="clips, for --scaling")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as scratch:
        if arguments.scaling:
            _scaling(Path(scratch), arguments.sizes)
        else:
            _build(Path(scratch), arguments)


def _build(scratch: Path, arguments: argparse.Namespace) -> None:
    """Measure builds of the benchmark set with and without the engine, and decoding alone; print table and gates."""
    videos = benchmark_set(arguments.folder, arguments.footage, arguments.duration)
    num_clips, sources = sum(len(video["spans"]) for video in videos), _list(videos, scratch)
    corpus, rows = scratch / "corpus", {"build": [], "without the engine": [], "decode alone": []}
    for _ in range(arguments.rounds):
        rows["build"].append(_clean_build(sources, corpus))
        direct = [sys.executable, "-m", "bench.direct", str(corpus), str(scratch / "direct")]
        rows["without the engine"].append(_measured(direct))
        decoded = [_measured(command) for command in decode_ffmpeg(videos, scratch)]
        cpu_s, wall_s = sum(cost.cpu_s for cost in decoded), sum(cost.wall_s for cost in decoded)
        rows["decode alone"].append(replace(decoded[0], cpu_s=cpu_s, wall_s=wall_s))
    minutes = sum(video["spans"][-1][1] for video in videos) / 60
    print(f"{num_clips} clips of {minutes:.1f} source minutes, {arguments.rounds} rounds\n")
    print("| way | CPU-s | clips / CPU-s | wall s | peak MB of a process |\n| --- | --- | --- | --- | --- |")
    for way, costs in rows.items():
        cpu_s = [cost.cpu_s for cost in costs]
        print(
            f"| {way} | {_spread(cpu_s)} | {num_clips / statistics.median(cpu_s):.2f} | "
            f"{_spread([cost.wall_s for cost in costs])} | {max(cost.peak_mb for cost in costs):.0f} |"
        )
    rounds = list(zip(*rows.values(), strict=True))
    overhead = statistics.median(build.cpu_s / direct.cpu_s - 1 for build, direct, _ in rounds)
    times = statistics.median(build.cpu_s / decode.cpu_s for build, _, decode in rounds)
    print(f"\ngate {_verdict(times <= MAX_OF_DECODE)}: {times:.2f} times decoding alone (at most {MAX_OF_DECODE})")
    print(f"gate {_verdict(overhead <= MAX_OVERHEAD)}: engine overhead {overhead:.1%} (at most {MAX_OVERHEAD:.0%})")


def sources_of_set(folder: Path, footage: Path | None, duration_s: float) -> Path:
    """Write the benchmark set as a list of sources with their spans; return its path."""
    return _list(benchmark_set(footage=footage, duration_s=duration_s), folder)


def _list(videos: list[dict], folder: Path) -> Path:
    path = folder / "sources.jsonl"
    path.write_text("".join(json.dumps(_source(video)) + "\n" for video in videos))
    return path


def _source(video: dict) -> dict:
    """Return the source of a video, with its spans, in HD-VILA's format."""
    spans = [{"n": n, "start_s": start, "end_s": end} for n, (start, end) in enumerate(video["spans"])]
    clips = [
        {"clip_id": f"{Path(video['path']).stem}.{s['n']}.mp4", "span": [_clock(s["start_s"]), _clock(s["end_s"])]}
        for s in spans
    ]
    return {"video_id": Path(video["path"]).stem, "url": video["path"], "clip": clips}


def _clock(seconds: float) -> str:
    return f"{int(seconds // 3600):02d}:{int(seconds // 60 % 60):02d}:{seconds % 60:06.3f}"


def _clean_build(sources: Path, corpus: Path, *settings: str, environment: dict[str, str] | None = None) -> Cost:
    """Build a corpus from nothing; return its cost."""
    shutil.rmtree(corpus, ignore_errors=True)
    command = [sys.executable, "-m", "clipmill", "build", str(sources), "--corpus", str(corpus), "--recipe", "demo"]
    return _measured([*command, *(word for setting in settings for word in ("--set", setting))], environment)


def _measured(command: list[str], environment: dict[str, str] | None = None) -> Cost:
    cost = measure(command, environment)
    assert cost.exit_code == 0, cost.output
    return cost


def _scaling(scratch: Path, sizes: list[int]) -> None:
    """Build corpora of tiny videos of twenty clips each, whose cost is mostly the engine's; print a row per size."""
    print("| clips | CPU ms / clip | wall ms / clip | driver's peak MB |\n| --- | --- | --- | --- |")
    for size in sizes:
        folder = scratch / f"{size}"
        sources = _tiny_videos(folder, size // 20)
        cost = _clean_build(sources, folder / "corpus", "pack.shard_bytes=64000000", "ingest.unit_videos=16")
        driver_mb = max(_driver_peaks(folder / "corpus"))
        print(
            f"| {size:,} | {1000 * cost.cpu_s / size:.1f} | {1000 * cost.wall_s / size:.1f} | {driver_mb:.0f} |",
            flush=True,
        )
        shutil.rmtree(folder)


def _tiny_videos(folder: Path, num_videos: int) -> Path:
    """Write copies of a 100 s video of 64x48 pixels, with twenty spans each.

    A trailing `free` box makes them differ, so that the ledger takes none for another.
    """
    import imageio_ffmpeg

    folder.mkdir(parents=True)
    source = "testsrc2=size=64x48:rate=5:duration=100"
    options = ["-c:v", "libx264", "-preset", "ultrafast", "-g", "25", "-pix_fmt", "yuv420p", str(folder / "tiny.mp4")]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source, *options], check=True)
    content, lines = (folder / "tiny.mp4").read_bytes(), []
    (folder / "videos").mkdir()
    for number in range(num_videos):
        path = folder / "videos" / f"tiny{number:06d}.mp4"
        path.write_bytes(content + (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big"))
        lines.append(json.dumps(_source({"path": str(path), "spans": [[5.0 * n, 5.0 * n + 5.0] for n in range(20)]})))
    (folder / "sources.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "sources.jsonl"


def _driver_peaks(corpus: Path) -> list[float]:
    """Return the peak resident MB that the drivers of this corpus recorded."""
    import duckdb

    with duckdb.connect(str(corpus / "manifest.duckdb"), read_only=True) as connection:
        rows = connection.execute("SELECT versions FROM runs").fetchall()
    return [json.loads(versions)["driver_peak_mb"] for (versions,) in rows]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"


if __name__ == "__main__":
    main()
