"""Run a function in several processes of one gloo group, forked from a server that has imported torch already."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imports of the ranks: the trainer's modules, and torch._dynamo, which any torch optimiser imports at its first use.
HEAVY = [
    "pytest",
    "safetensors.torch",
    "torch._dynamo",
    "training.learner",
    "training.data.reader_pool",
    "training.evaluation.retrieval",
]

_server: list[int] = []  # the server that has the imports


def run_ranks(num_ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(rank, *arguments)` on joined processes with one thread each; raise the first error."""
    serve_imports()
    with tempfile.TemporaryDirectory() as folder:
        everything = (num_ranks, f"file://{folder}/meeting", function, arguments)
        mp.start_processes(_rank, everything, nprocs=num_ranks, start_method="forkserver")


def _rank(rank: int, num_ranks: int, meeting: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
    function(rank, *arguments)
    dist.destroy_process_group()


def serve_imports() -> None:
    """Start a fork server with the heavy imports, replacing one that a loader has started with fewer."""
    server = forkserver._forkserver
    if not _server or server._forkserver_pid != _server[0]:
        server._stop()
        multiprocessing.set_forkserver_preload(HEAVY)
        forkserver.ensure_running()
        _server[:] = [server._forkserver_pid]
