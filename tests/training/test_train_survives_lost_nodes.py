"""Training under Ray Train on several nodes continues when a node is lost, with the same result.

`python -m bench.train_chaos` is the long version, with kills of every kind.
"""

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from bench.chaos import local_cluster, title_of
from clipmill.base.errors import UserError
from tests.helpers.training import ENOUGH_S, Forked, assert_same_run, small_corpus, train_command, train_here
from training.ray import train_on_ray
from training.run.setup import Request

SETTINGS = ("train.max_steps=12", "train.checkpoint_every=2", "data.loader_processes=0")

# Every Python of the cluster runs this at its start: a process about to publish the checkpoint of step 6 waits until
# the file GO exists, so that the run has not passed that step when its node is lost, at any speed.
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
    """Let Ray declare a silent node dead quickly, while a slow one keeps the usual 10 s for each answer.

    The watcher for announced node shutdowns is off, since no node announces one here.
    """
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "500")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


@pytest.fixture
def waiting_at_step_6(monkeypatch, tmp_path) -> tuple[Path, Path]:
    """Return (a file that exists while the run waits, a file that lets it continue), for clusters started later."""
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


def test_a_run_is_restarted_as_often_as_its_setting_says(tmp_path, monkeypatch):
    """Ray Train gets the setting; nothing is started."""
    given = []

    def stopped(train, *, run_config, **_):
        given.append(run_config.failure_config.max_failures)
        raise UserError("far enough")

    monkeypatch.setattr("ray.train.torch.TorchTrainer", stopped)
    monkeypatch.setattr("training.ray.ray_cluster", lambda *_, **__: nullcontext())
    monkeypatch.setattr("ray.cluster_resources", dict)
    for number, chosen in enumerate([(), ("train.max_restarts=0",), ("train.max_restarts=-1",)]):
        with pytest.raises(UserError, match="far enough"):
            train_on_ray(Request(str(tmp_path / str(number)), "nowhere", "demo", chosen), num_workers=2)
    assert given == [3, 0, -1]


def test_a_folder_that_is_no_run_is_refused_before_ray_writes_to_it(tmp_path):
    (tmp_path / "something.txt").write_text("not a run")
    with pytest.raises(UserError, match="not empty and not a run"):
        train_on_ray(Request(str(tmp_path), corpus=str(tmp_path), recipe="demo"), num_workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["something.txt"]
