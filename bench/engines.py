"""Measure what Ray core and Ray Data cost per empty task: informational, the reason for the engine's design.

    python -m bench.engines [--pieces 400] [--rounds 3]

In both ways a worker returns a small row for each task. Figures are CPU seconds of all processes, with the start of
Ray, which both pay. The ways alternate (A B A B).
"""

import argparse
import statistics
import sys

from bench.tree_cpu import measure


def core(num_pieces: int) -> None:
    """Run empty tasks by Ray core."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    task = ray.remote(max_retries=0)(_work)
    waiting, done = [], 0
    for number in range(num_pieces):
        waiting.append(task.remote({"unit": number}))
        if len(waiting) >= 4:  # as the driver: few more in flight than cores
            ready, waiting = ray.wait(waiting, num_returns=1)
            done += len(ray.get(ready))
    done += len(ray.get(waiting))
    assert done == num_pieces
    ray.shutdown()


def data(num_pieces: int) -> None:
    """Run empty tasks by Ray Data."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"unit": number} for number in range(num_pieces)], override_num_blocks=num_pieces)
    assert sum(1 for _ in rows.map(_work).iter_rows()) == num_pieces
    ray.shutdown()


def _work(row: dict) -> dict:
    return {"unit": row["unit"], "done": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=["core", "data"], help="run one way (for the measuring process)")
    arguments = parser.parse_args()
    if arguments.way:
        {"core": core, "data": data}[arguments.way](arguments.pieces)
        return
    costs: dict[str, list] = {"core": [], "data": []}
    for _ in range(arguments.rounds):
        for way, rows in costs.items():
            command = [sys.executable, "-m", "bench.engines", "--way", way, "--pieces", str(arguments.pieces)]
            rows.append(measure(command, {"RAY_USAGE_STATS_ENABLED": "0"}))
            assert rows[-1].exit_code == 0, rows[-1].output
    print(f"{arguments.pieces} pieces, medians of {arguments.rounds}\n\n| way | CPU-s | wall s |\n| --- | --- | --- |")
    for way, rows in costs.items():
        cpu_s, wall_s = (statistics.median(getattr(cost, what) for cost in rows) for what in ("cpu_s", "wall_s"))
        print(f"| Ray {way} | {cpu_s:.1f} | {wall_s:.1f} |")


if __name__ == "__main__":
    main()
