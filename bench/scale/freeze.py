"""Check that freezing a selection takes a bounded amount of memory (gate), at several sizes of a synthetic corpus.

    python -m bench.scale.freeze [--clips 100000 300000 1000000] [--memory 200MB] [--neighbours 0]

freeze  all clips but every tenth video's are frozen for training, the others for evaluation, as `clipmill train` does:
        `training.data.selection.freeze_run`. Gate: the peak at the largest size is at most 1.3 times that at the size
        before
open    the selection is opened and its plan made: `training.data.epoch_files.plan_spec` (informational; a video and a
        near-duplicate group of every clip are in memory, see `bench.plan --groups`)

Each runs in a process of its own. A peak is the largest resident set (VmHWM), with Python and its libraries; DuckDB's
limit is `--memory`, which all sizes have to exceed, since below it more clips take more memory. The growth per clip
between the two largest sizes gives the figure for 100 million clips, the limit being what it is here.

Traps: ru_maxrss would include the memory of the parent process before exec. The pages of a file that is mapped count as
resident: `open` reads two columns of the selection that way, which the kernel can drop at any time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MOST_GROWTH = 1.3
MANY = 100_000_000


def peak_mb() -> float:
    """Return the largest resident set of this process so far, Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def make(folder: Path, num_clips: int) -> dict[str, float]:
    """Make the corpus."""
    from tests.helpers.manifests import make_manifest

    return {"manifest_mb": make_manifest(folder / "manifest.duckdb", num_clips).stat().st_size / 1e6}


def freeze(folder: Path, memory: str, neighbours: int) -> dict[str, float]:
    """Freeze the selections of a run."""
    from training.data.selection import freeze_run
    from training.settings import DataSettings, EvalSettings

    (folder / "run").mkdir(exist_ok=True)
    evaluation = EvalSettings(where="hash(video_id) % 10 = 0", overlap="exclude")
    data = DataSettings(select_memory=memory, neighbours=neighbours)
    begun = time.process_time()
    training, _ = freeze_run(folder / "run", folder, data, evaluation)
    return {"cpu_s": time.process_time() - begun, "peak_mb": peak_mb(), "num_clips": training.num_clips}


def plan(folder: Path) -> dict[str, float]:
    """Open the selection and make its plan."""
    from training.data.epoch_files import plan_spec
    from training.data.selection import Selection
    from training.settings import DataSettings

    begun = time.process_time()
    plan_spec(Selection(folder / "run" / "selection.arrow"), DataSettings(), 256)
    return {"cpu_s": time.process_time() - begun, "peak_mb": peak_mb()}


def measured(part: str, folder: Path, *rest: object) -> dict[str, float]:
    """Run a part in a process of its own."""
    command = [sys.executable, "-m", "bench.scale.freeze", "--part", part, str(folder), *map(str, rest)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_part(part: str, folder: str, *rest: str) -> dict[str, float]:
    """Run a part inside the measured process."""
    if part == "make":
        return make(Path(folder), int(rest[0]))
    if part == "freeze":
        return freeze(Path(folder), rest[0], int(rest[1]))
    return plan(Path(folder))


def main() -> int:
    if sys.argv[1:2] == ["--part"]:
        print(json.dumps(run_part(*sys.argv[2:])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[100_000, 300_000, 1_000_000], help="sizes, ascending")
    parser.add_argument("--memory", default="200MB", help="DuckDB's limit, the setting data.select_memory")
    parser.add_argument("--neighbours", type=int, default=0, help="data.neighbours")
    options = parser.parse_args()
    print("| clips | manifest MB | frozen | freeze: peak MB | CPU-s | open and plan: peak MB | CPU-s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    peaks: list[tuple[int, float, float]] = []
    for size in options.clips:
        with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as scratch:
            made = measured("make", Path(scratch), size)
            frozen = measured("freeze", Path(scratch), options.memory, options.neighbours)
            planned = measured("plan", Path(scratch))
        peaks.append((size, frozen["peak_mb"], planned["peak_mb"]))
        print(
            f"| {size:,} | {made['manifest_mb']:.0f} | {frozen['num_clips']:,} | {frozen['peak_mb']:.0f} | "
            f"{frozen['cpu_s']:.1f} | {planned['peak_mb']:.0f} | {planned['cpu_s']:.1f} |",
            flush=True,
        )
    return report(peaks)


def report(peaks: list[tuple[int, float, float]]) -> int:
    """Print growth, extrapolation and gate; return the exit code."""
    if len(peaks) < 2:
        return 0
    (fewer, *before), (more, *last) = peaks[-2:]
    for name, low, high in zip(("freeze", "open and plan"), before, last, strict=True):
        growth = max(0.0, (high - low) / (more - fewer))
        print(f"{name}: {growth * 2**20:.0f} bytes a clip; {MANY:,} clips: {high + growth * (MANY - more):,.0f} MB")
    ratio = last[0] / before[0]
    verdict = "passed" if ratio <= MOST_GROWTH else "FAILED"
    print(
        f"gate {verdict}: {more / fewer:.1f} times the clips take {ratio:.2f} times the memory (at most {MOST_GROWTH})"
    )
    return int(ratio > MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
