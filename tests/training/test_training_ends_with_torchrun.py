"""A training process whose torchrun was killed ends."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

# The first of two ranks, which waits for the other in `join` until its time limit.
RANK = "import training.parallel.distributed as d; print('joins', flush=True); d.join('cpu').__enter__()"
# Acts as torchrun: starts the rank, prints its process id and waits for it.
PARENT = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); "
    "print(child.pid, flush=True); child.wait()"
)
ALONE_OF_TWO = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_rank_whose_launcher_was_killed_ends():
    command = [sys.executable, "-c", PARENT, RANK]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | ALONE_OF_TWO)
    rank = psutil.Process(int(launcher.stdout.readline()))
    try:
        assert launcher.stdout.readline() == "joins\n"
        while not rank.net_connections("tcp"):  # until it listens for the other one
            time.sleep(0.05)
        launcher.send_signal(signal.SIGKILL)
        rank.wait(timeout=600)
    finally:
        launcher.kill()
        launcher.wait()
        if rank.is_running():
            rank.kill()
