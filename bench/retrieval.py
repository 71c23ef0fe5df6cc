"""Measure the memory and time of ranking many clips against as many texts, with random unit vectors.

    python -m bench.retrieval --clips 100000 --dim 512

It prints the peak memory of the process, imports included.
"""

import argparse
import resource
import time

import torch
from torch.nn.functional import normalize

from training.evaluation.metrics import retrieval_metrics
from training.evaluation.retrieval import CosineBlocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    video_ND = normalize(torch.randn(options.clips, options.dim, generator=generator), dim=1)
    text_UD = torch.randn(options.clips, options.dim, generator=generator).mul_(0.15).add_(video_ND)
    text_UD = normalize(text_UD, dim=1)
    began = time.monotonic()
    metrics = retrieval_metrics(CosineBlocks(text_UD, torch.arange(options.clips), video_ND), range(options.clips))
    seconds = time.monotonic() - began
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{options.clips:,} clips, {options.dim} numbers each: {seconds:.0f} s, at most {peak_gb:.2f} GB")
    for way in ("t2v", "v2t"):
        print(way, {name: round(value, 4) for name, value in metrics[way].items()})


if __name__ == "__main__":
    main()
