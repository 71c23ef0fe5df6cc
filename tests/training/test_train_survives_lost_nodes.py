"""Training under Ray Train on several nodes continues when a node is lost, with the same result.

The long run, with kills of every kind, is `python -m bench.train_chaos`.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from bench.chaos import local_cluster, title_of
from clipmill.base.errors import UserError
from tests.helpers.training import ENOUGH_S, Forked, assert_same_run, small_corpus, train_command, train_here
from training.ray import train_on_ray
from training.run.setup import Request

SETTINGS = ("train.max_steps=12", "train.checkpoint_every=2", "data.loader_processes=0")

# What every Python of the cluster runs at its start: whoever is about to put the checkpoint of step 6 in place waits
# until the file GO is there, so that the run is no further when its node goes, however fast it is.
WAITS = """
import os, sys, time
def wait(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("step-00000006"):
        open({waiting!r}, "a").close()
        while not os.path.exists({go!r}):
            time.sleep(0.05)
sys.addaudithook(wait)
"""


@pytest.fixture
def watchful(monkeypatch):
    """A node that answers nobody is soon called dead. One that is slow has the usual 10 s for each of its answers.

    And nobody waits for nodes that announce their end: none does here.
    """
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "500")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


@pytest.fixture
def waiting_at_step_6(monkeypatch, tmp_path) -> tuple[Path, Path]:
    """(a file that is there when the run waits, a file that lets it go on), for clusters that are started later."""
    waiting, go, folder = tmp_path / "waiting", tmp_path / "go", tmp_path / "at start"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WAITS.format(waiting=str(waiting), go=str(go)))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return waiting, go


@pytest.mark.slow
def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(tmp_path, watchful, waiting_at_step_6):
    corpus, undisturbed, run = small_corpus(tmp_path / "corpus", 64), tmp_path / "undisturbed", tmp_path / "run"
    train_here(corpus, undisturbed, *SETTINGS)
    with local_cluster(num_nodes=1) as cluster:  # and the head
        command = train_command(corpus, run, *SETTINGS, workers=2)
        process = Forked(command, tmp_path / "output", RAY_ADDRESS=cluster.address)
        try:
            waiting, go = waiting_at_step_6
            while not waiting.exists():
                assert process.poll() is None, (tmp_path / "output").read_text()[-3000:]
                time.sleep(0.05)
            [node] = cluster.nodes
            assert any("RayTrainWorker" in title_of(worker) for worker in cluster.workers([node]))
            cluster.remove(node)
            go.touch()
            cluster.add(num_cpus=1)
            code = process.wait(timeout=ENOUGH_S)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
    assert code == 0, (tmp_path / "output").read_text()[-3000:]
    assert_same_run(run, undisturbed)


def test_a_folder_that_is_no_run_is_refused_before_ray_writes_to_it(tmp_path):
    (tmp_path / "something.txt").write_text("not a run")
    with pytest.raises(UserError, match="not empty and not a run"):
        train_on_ray(Request(str(tmp_path), corpus=str(tmp_path), recipe="demo"), num_workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["something.txt"]
