"""A run folder records its settings, refuses changes that make another run, and has one writer at a time."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from clipmill.base.errors import UserError
from training.run.folder import RunFolder, RunRecord
from training.run.settings import RunSettings, resolve


def settings(*assignments: str) -> RunSettings:
    return resolve(None, None, list(assignments))


def begin(root: Path, *assignments: str) -> RunFolder:
    folder = RunFolder(root)
    folder.create()
    folder.save(RunRecord("corpus", "clipmill train …", "abc", settings(*assignments).model_dump(mode="json")))
    return folder


def begin_with_checkpoint(root: Path, *assignments: str) -> RunFolder:
    folder = begin(root, *assignments)
    (folder.checkpoints.folder / "step-00000010").mkdir()
    return folder


def test_a_run_remembers_how_it_was_begun(tmp_path: Path) -> None:
    begin(tmp_path / "run", "train.lr=1e-3", "train.lr_factors={logit_scale: 10}", "data.apart=[video]")
    folder = RunFolder(tmp_path / "run").require()
    record = folder.load()
    assert (record.corpus, record.command, record.selection_hash) == ("corpus", "clipmill train …", "abc")
    assert resolve(record.settings, None, []).train.lr == 1e-3
    assert folder.changes(resolve(record.settings, None, [])) == []


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        RunFolder(tmp_path).require()


def test_a_folder_with_other_things_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(UserError, match="not empty and not a run"):
        RunFolder(tmp_path).create()
    assert os.listdir(tmp_path) == ["holiday.jpg"]


def test_a_run_that_was_killed_before_it_began_can_begin(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.selection_path.write_text("half prepared")
    RunFolder(tmp_path / "run").create()


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").create()


@pytest.mark.parametrize("content", ["", "[]", "format: 1\n", ": :", "format: 2\nsettings: {}\n"])
def test_a_broken_or_newer_record_is_an_error(content: str, tmp_path: Path) -> None:
    folder = begin(tmp_path)
    folder.record_path.write_text(content)
    with pytest.raises(UserError, match=r"run\.yaml cannot be read|run format 2"):
        folder.load()


# -- changes of settings -----------------------------------------------------------------------------------------------


def test_settings_that_make_another_run_are_refused_with_old_and_new_values(tmp_path: Path) -> None:
    folder = begin_with_checkpoint(tmp_path, "train.lr=1e-3", "data.num_frames=8")
    with pytest.raises(UserError) as error:
        folder.changes(settings("train.lr=2e-3", "data.num_frames=12", "train.checkpoint_every=7"))
    assert "train.lr: 0.001 → 0.002" in str(error.value) and "data.num_frames: 8 → 12" in str(error.value)
    assert "checkpoint_every" not in str(error.value)


@pytest.mark.parametrize(
    "assignment", ["model.init=demo", "train.batch_size=8", "data.seed=1", "train.loss=vs", "eval.where=true"]
)
def test_every_setting_that_decides_a_result_is_fixed(assignment: str, tmp_path: Path) -> None:
    folder = begin_with_checkpoint(tmp_path)
    with pytest.raises(UserError, match=re.escape(assignment.partition("=")[0])):
        folder.changes(settings(assignment))


def test_how_the_work_is_done_may_change(tmp_path: Path) -> None:
    folder = begin_with_checkpoint(tmp_path)
    free = ["data.loader_processes=3", "train.chunk_size=4", "train.parallel=fsdp", "data.max_failures=0.5"]
    assert folder.changes(settings(*free)) == [
        "data.max_failures: 0.01 → 0.5",
        "data.loader_processes: None → 3",
        "train.chunk_size: None → 4",
        "train.parallel: ddp → fsdp",
    ]


@pytest.mark.parametrize("assignment", ["train.max_steps=5", "train.max_steps=500", "train.epochs=2"])
def test_a_run_may_be_made_longer_or_shorter_and_says_what_that_does(assignment: str, tmp_path: Path) -> None:
    folder = begin_with_checkpoint(tmp_path, "train.max_steps=100")
    [line] = folder.changes(settings("train.max_steps=100", assignment))
    assert line.startswith(assignment.partition("=")[0]) and "learning rate" in line


def test_before_the_first_checkpoint_everything_may_change(tmp_path: Path) -> None:
    folder = begin(tmp_path, "train.lr=1e-3")
    assert folder.changes(settings("train.lr=2e-3")) == ["train.lr: 0.001 → 0.002"]


def test_a_setting_that_the_run_did_not_know_yet_has_its_default(tmp_path: Path) -> None:
    folder = begin_with_checkpoint(tmp_path)
    saved = settings().model_dump(mode="json")
    del saved["train"]["grad_clip"]
    folder.save(RunRecord("corpus", "", "abc", saved))
    assert folder.changes(settings()) == []
    with pytest.raises(UserError, match=r"train.grad_clip: 5.0 → 1.0"):
        folder.changes(settings("train.grad_clip=1"))


# -- one writer --------------------------------------------------------------------------------------------------------


def test_two_trainings_never_write_one_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path).writer():
        with pytest.raises(UserError, match=f"being trained by process {os.getpid()} on"):
            with RunFolder(tmp_path).writer(patience_s=0):
                pass
    with RunFolder(tmp_path).writer(patience_s=0):
        pass


def hold_forever(root: Path, report: int, fork_again: bool) -> None:
    with RunFolder(root).writer():
        child = os.fork() if fork_again else -1
        if child != 0:
            os.write(report, child.to_bytes(4, signed=True))
        time.sleep(1000)


@pytest.mark.parametrize("fork_again", [False, True])
def test_the_lock_of_a_killed_training_is_free_though_its_children_live(fork_again: bool, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        hold_forever(tmp_path, writer, fork_again)
        os._exit(0)
    child = int.from_bytes(os.read(reader, 4), signed=True)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        with RunFolder(tmp_path).writer(patience_s=1):
            pass
    finally:
        if child > 0:
            os.kill(child, signal.SIGKILL)


def test_a_writer_sweeps_up_after_a_killed_one(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    (folder.checkpoints.folder / ".tmp-00000010-1").mkdir()
    (folder.checkpoints.folder / ".tmp-123-best.json").write_text("half")
    (tmp_path / ".tmp-123-run.yaml").write_text("half")
    (folder.plan_path / ".tmp-123-epoch").write_text("half")
    with folder.writer():
        assert not list(tmp_path.rglob(".tmp-*"))
    assert folder.exists
