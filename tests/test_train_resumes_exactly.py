"""A run that is killed, stopped or resumed elsewhere ends as one that was left alone: same batches, same losses.

What is killed or stopped is the real command in a process of its own; what is left alone runs here.
"""

import signal
import subprocess

import pytest
from training_support import (
    assert_same_run,
    curve,
    kill_at_step,
    lines,
    quiet,
    small_corpus,
    train_command,
    train_here,
)

NUM_STEPS = "train.max_steps=32"  # an epoch has 15


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train_here(corpus, run, NUM_STEPS)
    assert [step for step, _ in curve(run)] == list(range(1, 33))
    return run


@pytest.mark.slow
def test_killed_and_resumed_with_other_loader_processes(corpus, undisturbed, tmp_path):
    """Within an epoch, at its end, and right after the next one's beginning."""
    run = tmp_path / "run"
    for step, loaders in ((3, 0), (15, 2), (16, 0)):
        command = train_command(corpus, run, NUM_STEPS, f"data.loader_processes={loaders}")
        assert kill_at_step(command, run, step, anew=step == 3) == -signal.SIGKILL
    train_here(None, run, "data.loader_processes=3")
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_a_signal_saves_and_ends_the_run_cleanly(corpus, undisturbed, tmp_path):
    run = tmp_path / "run"
    for step, number in zip((7, 14, 21), (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), strict=True):
        command = train_command(corpus, run, NUM_STEPS, f"data.loader_processes={int(step == 7)}")
        assert kill_at_step(command, run, step, number) == 0, number.name
        stopped_at = lines(run)[-1]["step"]
        assert (run / "checkpoints" / f"step-{stopped_at:08d}").is_dir(), number.name
    train_here(None, run)
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_exactly_at_the_epochs_end_the_next_epoch_follows(corpus, undisturbed, tmp_path):
    run = tmp_path / "run"
    train_here(corpus, run, "train.max_steps=15")
    assert curve(run) == curve(undisturbed)[:15]
    train_here(None, run, NUM_STEPS)
    assert curve(run) == curve(undisturbed)


@pytest.mark.slow
def test_two_processes_of_torchrun_go_on_with_what_one_began(corpus, undisturbed, tmp_path):
    run = tmp_path / "run"
    kill_at_step(train_command(corpus, run, NUM_STEPS, "data.loader_processes=0"), run, 8)
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = train_command(None, run)
    command[command.index("train") : command.index("train")] = ["--"]  # torchrun takes --run for one of its own
    command[1:1] = together
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=quiet())
    assert done.returncode == 0, done.stderr
    assert_same_run(run, undisturbed)
