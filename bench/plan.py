"""Check that an epoch of 100 million clips is planned in 20 s and 3 GB, and opens in under a second (gate).

    python -m bench.plan [--clips 100000000] [--batch 1024] [--block 1] [--groups]

Default: a full shuffle without groups; `--groups` keeps 30 clips per video and 5 % near-duplicates apart, `--block 256`
keeps neighbours together. Time and peak memory (of the whole process, the group arrays included) are those of planning
and writing the file; "resume" is a fresh process that finds a position and reads its batch. Making the group arrays,
which a run takes from the manifest, is not timed.

Trap: the first run on a machine also pays for first use of its memory; the plan itself is the same bytes every time.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from training.data.epoch_plan import PlanSpec, hash_groups, num_conflicts, open_epoch, write_epoch

GATE_S, GATE_BYTES, GATE_OPEN_S = 20.0, 3e9, 1.0

_OPEN = """
import sys, time
from training.data.epoch_plan import PlanSpec, locate, open_epoch
import json
spec, folder, position = PlanSpec(**json.loads(sys.argv[1])), sys.argv[2], int(sys.argv[3])
started = time.perf_counter()
epoch, step = locate(spec, position)
rows = open_epoch(folder, spec, epoch)[step].tolist()
print(time.perf_counter() - started)
"""


def group_arrays(num_clips: int) -> list[np.ndarray]:
    """Make groups: 30 scattered clips a video; one clip in twenty has on average two near-duplicates."""
    generator = np.random.default_rng(0)
    videos = generator.integers(0, max(1, num_clips // 30), num_clips, dtype=np.uint32)
    duplicates = np.full(num_clips, 2**32 - 1, np.uint32)
    chosen = generator.integers(0, num_clips, num_clips // 20)
    duplicates[chosen] = generator.integers(0, max(1, num_clips // 60), len(chosen), dtype=np.uint32)
    return [videos, duplicates]


def measure(num_clips: int, batch_size: int, block_size: int, with_groups: bool, folder: Path) -> dict[str, object]:
    """Plan an epoch; return time, memory and checks."""
    groups = group_arrays(num_clips) if with_groups else []
    started = time.perf_counter()
    spec = PlanSpec(num_clips, batch_size, "bench", block_size=block_size, groups_hash=hash_groups(groups))
    path = write_epoch(folder, spec, 0, groups)
    plan_s = time.perf_counter() - started
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = open_epoch(folder, spec, 0)
    resume = [sys.executable, "-c", _OPEN, json.dumps(vars(spec)), str(folder), str(len(rows) // 2)]
    resume_s = float(subprocess.run(resume, capture_output=True, check=True, text=True).stdout)
    return {
        "bench": "plan",
        "num_clips": num_clips,
        "batch_size": batch_size,
        "block_size": block_size,
        "groups": with_groups,
        "plan_s": plan_s,
        "peak_bytes": peak_bytes,
        "file_bytes": path.stat().st_size,
        "resume_s": resume_s,
        "num_conflicts": num_conflicts(rows, groups) if groups else 0,
        "each_clip_once": bool(np.bincount(rows.ravel(), minlength=num_clips).max() == 1),
        "gates": {"plan_s": GATE_S, "peak_bytes": GATE_BYTES, "resume_s": GATE_OPEN_S},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=100_000_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--block", type=int, default=1, help="neighbouring rows kept together")
    parser.add_argument("--groups", action="store_true", help="keep videos and near-duplicates apart")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.clips, arguments.batch, arguments.block, arguments.groups, Path(folder))
    print(json.dumps(result, indent=1))
    met = all(result[name] <= limit for name, limit in result["gates"].items())
    sys.exit(0 if met and result["each_clip_once"] and not result["num_conflicts"] else 1)


if __name__ == "__main__":
    main()
