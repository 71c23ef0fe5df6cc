"""A run that is killed, stopped or resumed elsewhere has the same batches and losses as an uninterrupted one.

Interrupted runs are the real command in a process of its own; uninterrupted ones run in this process.
"""

import signal
import subprocess

import pytest

from tests.helpers.training import (
    ENOUGH_S,
    assert_same_run,
    curve,
    kill_at_step,
    lines,
    quiet,
    small_corpus,
    train_command,
    train_here,
)

NUM_CLIPS, EPOCH, NUM_STEPS = 64, 8, "train.max_steps=18"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus") / "corpus", NUM_CLIPS)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train_here(corpus, run, NUM_STEPS)
    assert [step for step, _ in curve(run)] == list(range(1, 19))
    return run


@pytest.mark.slow
def test_killed_and_resumed_with_other_loader_processes(corpus, undisturbed, tmp_path):
    """The kills are within an epoch, at its end, and right after the start of the next."""
    run = tmp_path / "run"
    for step, loaders in ((3, 0), (EPOCH, 2), (EPOCH + 1, 0)):
        command = train_command(corpus, run, NUM_STEPS, f"data.loader_processes={loaders}")
        assert kill_at_step(command, run, step, anew=step == 3) == -signal.SIGKILL
    train_here(None, run, "data.loader_processes=3")
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_a_signal_saves_and_ends_the_run_cleanly(corpus, undisturbed, tmp_path):
    run = tmp_path / "run"
    for step, number in zip((4, 8, 12), (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), strict=True):
        command = train_command(corpus, run, NUM_STEPS, f"data.loader_processes={int(step == 4)}")
        assert kill_at_step(command, run, step, number) == 0, number.name
        stopped_at = lines(run)[-1]["step"]
        assert (run / "checkpoints" / f"step-{stopped_at:08d}").is_dir(), number.name
    train_here(None, run)
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_exactly_at_the_epochs_end_the_next_epoch_follows(corpus, undisturbed, tmp_path):
    run = tmp_path / "run"
    train_here(corpus, run, f"train.max_steps={EPOCH}")
    assert curve(run) == curve(undisturbed)[:EPOCH]
    train_here(None, run, NUM_STEPS)
    assert curve(run) == curve(undisturbed)


@pytest.mark.slow
def test_two_torchrun_processes_resume_a_run_of_one(corpus, undisturbed, tmp_path):
    run = tmp_path / "run"
    kill_at_step(train_command(corpus, run, NUM_STEPS, "data.loader_processes=0"), run, 7)
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = train_command(None, run)
    command[command.index("train") : command.index("train")] = ["--"]  # torchrun takes --run for one of its own
    command[1:1] = together
    done = subprocess.run(command, capture_output=True, text=True, timeout=ENOUGH_S, env=quiet())
    assert done.returncode == 0, done.stderr
    assert_same_run(run, undisturbed)
