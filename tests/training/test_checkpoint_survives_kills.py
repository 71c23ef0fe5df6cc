"""A checkpoint is complete or absent after kills, full disks and damage, and the latest few are kept."""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipmill.base.errors import UserError
from clipmill.base.settings import digest
from tests.helpers.clip_vip import tiny_config, tiny_model
from tests.helpers.pickles import HostilePickle
from training.models.clip_vip.weights import load_clip_vip, load_model
from training.models.registry import writer
from training.run import checkpoints as run_checkpoints
from training.run.checkpoints import Checkpoint, Checkpoints


def tensors_of(step: int) -> dict[str, Tensor]:
    """Return weights derived from their step."""
    state = {name: torch.full_like(tensor, step / 7) for name, tensor in tiny_model().state_dict().items()}
    return state | {"logit_scale": torch.tensor(2.0)}


def optimiser_of(step: int) -> dict[str, dict[str, Any]]:
    return {"vision.class_embedding": {"step": step, "exp_avg": torch.full([32], float(step))}}


def save(checkpoints: Checkpoints, step: int, **options: Any) -> Path:
    return checkpoints.save(
        step,
        writer(tiny_model()),
        tensors_of(step),
        state={"plan": {"num_steps_done": step}},
        optimiser=optimiser_of(step),
        random={"cpu": torch.tensor([step])},
        ema=tensors_of(step + 1),
        **options,
    )


def assert_is_of_step(checkpoint: Checkpoint, step: int) -> None:
    assert checkpoint.step == step and checkpoint.state == {"plan": {"num_steps_done": step}}
    for path, expected in ((checkpoint.weights, tensors_of(step)), (checkpoint.averaged, tensors_of(step + 1))):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_clip_vip(path).state_dict().items())
    values = checkpoint.optimiser["vision.class_embedding"]
    assert values["step"] == step and torch.equal(values["exp_avg"], torch.full([32], float(step)))
    assert checkpoint.random["cpu"].tolist() == [step]


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.find_latest() is None
    path = save(checkpoints, 100)
    assert path == tmp_path / "step-00000100" and checkpoints.find_latest() == 100
    assert_is_of_step(checkpoints.load(100), 100)
    assert sorted(os.listdir(path)) == [
        *("config.json", "ema.json", "ema.safetensors", "model.safetensors", "state.json", "training.pt")
    ]


def test_weights_of_a_checkpoint_open_as_a_model(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path), 3)
    for model, step in ((load_model(path), 3), (load_clip_vip(path / "ema.safetensors"), 4)):
        assert model.config == tiny_config()
        assert torch.equal(model.vision.class_embedding, tensors_of(step)["vision.class_embedding"])


def test_log_scale_is_clamped_in_checkpoints(tmp_path: Path) -> None:
    high = tensors_of(1) | {"logit_scale": torch.tensor(9.0)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, writer(tiny_model()), high, state={}, optimiser={}, random={}, ema=high)
    for path in (checkpoints.load(1).weights, checkpoints.load(1).averaged):
        assert load_clip_vip(path).logit_scale.exp().item() == pytest.approx(200)


def test_attached_files_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = save(checkpoints, 1, attach={"extra.txt": lambda file: file.write_text("hello") and None})
    assert (checkpoints.load(1).path / "extra.txt").read_text() == "hello"
    (path / "extra.txt").write_text("hellO")
    assert "extra.txt is not what was written" in checkpoints.problem(1)


def test_the_latest_few_are_kept_and_those_asked_for(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 8):
        save(checkpoints, step, keep=2, also_keep=[3])
    assert checkpoints.steps() == [3, 6, 7]
    save(checkpoints, 8, keep=1)
    assert checkpoints.steps() == [8]


def test_the_checkpoint_just_written_stays_whatever_else_is_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 50)
    save(checkpoints, 20, keep=1)
    assert 20 in checkpoints.steps()


def test_saving_a_step_again_leaves_the_whole_checkpoint_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    before = (save(checkpoints, 5) / "state.json").stat()
    assert (save(checkpoints, 5) / "state.json").stat().st_ino == before.st_ino


# -- damage ------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "state.json", "ema.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(name: str, damage: Any, tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, said.append)
    save(checkpoints, 10)
    damage(save(checkpoints, 20) / name)
    assert checkpoints.find_latest() == 10
    assert len(said) == 1 and "step-00000020 is skipped" in said[0] and name in said[0]
    assert_is_of_step(checkpoints.load(10), 10)


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, lambda line: None)
    save(checkpoints, 10)
    truncate(save(checkpoints, 20) / "training.pt")
    assert checkpoints.find_latest() == 10
    save(checkpoints, 25, keep=2)
    assert checkpoints.steps() == [10, 25]


def test_a_damaged_checkpoint_is_written_again_when_its_step_comes(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, lambda line: None)
    save(checkpoints, 10)
    truncate(save(checkpoints, 20) / "training.pt")
    assert checkpoints.find_latest() == 10
    save(checkpoints, 20)
    assert checkpoints.find_latest() == 20


def test_nothing_whole_left_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, lambda line: None)
    for step in (1, 2):
        truncate(save(checkpoints, step) / "model.safetensors")
    with pytest.raises(UserError, match="no checkpoint is whole .*step-00000002: model.safetensors has .* bytes"):
        checkpoints.find_latest()


def test_a_newer_format_is_refused_and_not_taken_for_damage(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path), 1) / "state.json"
    newer = json.loads(path.read_text()) | {"format": 2}
    del newer["digest"]
    path.write_text(json.dumps(newer | {"digest": digest(newer)}))
    with pytest.raises(UserError, match="format 2"):
        Checkpoints(tmp_path).find_latest()


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    evil = {"a": {"exp_avg": HostilePickle(tmp_path / "ran")}}
    checkpoints.save(1, writer(tiny_model()), tensors_of(1), state={}, optimiser=evil, random={})
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.load(1)
    assert not (tmp_path / "ran").exists()


# -- interrupted saves -------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, keep=1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_checkpoints, "_seal", full)
    with pytest.raises(OSError, match="No space left"):
        save(checkpoints, 2, keep=1)
    assert os.listdir(tmp_path) == ["step-00000001"] and checkpoints.find_latest() == 1


# A save changes the folder through Python's own functions, which an audit hook sees. The two large files that native
# code writes are interrupted by a limit of the file size.
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.fsync")


def save_and_die(folder: Path, step: int, at_change: int | None, at_bytes: int | None) -> None:
    """Save in this process, which is killed before the nth change of the folder or at a number of written bytes."""
    num_changes = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal num_changes
        if event in CHANGES and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            num_changes += 1
            if num_changes == at_change:
                os.kill(os.getpid(), signal.SIGKILL)

    sync = os.fsync
    os.fsync = lambda handle: (sys.audit("os.fsync", handle), sync(handle))
    if at_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (at_bytes, at_bytes))
    sys.addaudithook(count)
    save(Checkpoints(folder), step, keep=2)


def killed(*arguments: Any) -> bool:
    """Run `save_and_die` in a forked process, which starts fast; return whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            save_and_die(*arguments)
        finally:  # skip pytest's exit handlers
            os._exit(sys.exception() is not None)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL, -signal.SIGXFSZ)
    return code != 0


@pytest.mark.slow
def test_kills_at_any_moment_always_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    """After a kill before each change of the folder and within each file, the previous or this checkpoint is complete.

    The places of the kills do not depend on the machine's speed.
    """
    torch.set_num_threads(1)
    folder, interrupted, last = tmp_path / "run", 0, 2
    for step in (1, 2):
        save(Checkpoints(folder), step)
    sizes = [file.stat().st_size for file in (folder / "step-00000002").iterdir()]
    places = [(None, size // 2) for size in sizes] + [(number, None) for number in range(1, 1000)]
    for place in places:
        done = not killed(folder, last + 1, *place)
        interrupted += any(name.startswith(".tmp-") for name in os.listdir(folder))
        checkpoints = Checkpoints(folder, pytest.fail)
        saved = checkpoints.find_latest()
        assert saved in (last, last + 1) and (saved == last + 1 or not done)
        assert_is_of_step(checkpoints.load(saved), saved)
        checkpoints.sweep()
        assert all(name.startswith("step-") for name in os.listdir(folder))
        last = saved
        if done:
            break
    assert done and interrupted >= 10, "the kills missed the saves"
