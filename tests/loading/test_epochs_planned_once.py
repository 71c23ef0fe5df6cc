"""An epoch is planned by one process of a host when first needed, and is the same for every process."""

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

import training.data.epoch_files
from clipmill.base.errors import UserError
from clipmill.base.file_lock import lock_file
from tests.helpers.manifests import make_manifest
from training.data.epoch_files import Epochs, plan_spec
from training.data.epoch_plan import PAD, epoch_rows, plan_path, rank_slots, remainder_rows, steps_in_epoch
from training.data.selection import Selection, freeze
from training.settings import DataSettings


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("epochs")
    make_manifest(folder / "manifest.duckdb", 900)
    freeze(folder / "selection.arrow", folder)
    return Selection(folder / "selection.arrow")


def epochs_of(selection, folder, batch_size=16, **data):
    settings = DataSettings(**data)
    return Epochs(folder, plan_spec(selection, settings, batch_size), selection.path, settings.apart)


@pytest.mark.parametrize("tail", ["drop", "pad", "carry"])
def test_steps_of_a_run_are_those_of_its_epochs_one_after_the_other(selection, tmp_path, tail):
    epochs = epochs_of(selection, tmp_path, tail=tail)
    groups = selection.groups(("video", "duplicate"))
    expected = np.concatenate([epoch_rows(epochs.spec, epoch, groups) for epoch in range(3)])
    for step in (0, 1, steps_in_epoch(epochs.spec, 0) - 1, steps_in_epoch(epochs.spec, 0), len(expected) - 1):
        rows = epochs.rows(step)
        assert rows.dtype == np.uint32 and rows.shape == (16,) and np.array_equal(rows, expected[step])


def test_no_batch_holds_two_clips_of_a_video(selection, tmp_path):
    epochs = epochs_of(selection, tmp_path)
    videos = selection.column("video_id").to_pylist()
    for rows in epochs.epoch(0):
        assert len({videos[row] for row in rows}) == 16
    assert epochs.describe(0)["num_conflicts"] == 0


def test_inseparable_clips_are_counted_or_an_error(selection, tmp_path):
    """The batch has more slots than there are videos."""
    kept = epochs_of(selection, tmp_path, batch_size=100, unmet="keep")
    num_videos = len(set(selection.column("video_id").to_pylist()))
    assert num_videos < 100
    assert kept.describe(0)["num_conflicts"] >= (100 - num_videos) * steps_in_epoch(kept.spec, 0)
    with pytest.raises(UserError, match="unmet"):
        epochs_of(selection, tmp_path, batch_size=100, unmet="error").rows(0)


@pytest.mark.parametrize("tail, left, holes", [("drop", True, 0), ("pad", False, True), ("carry", True, 0)])
def test_an_epoch_is_described_in_numbers(selection, tmp_path, tail, left, holes):
    epochs = epochs_of(selection, tmp_path, tail=tail, batch_size=32)
    said = epochs.describe(0)
    num_left = selection.num_clips % 32
    assert said["num_clips"] == selection.num_clips and said["num_steps"] == steps_in_epoch(epochs.spec, 0)
    assert said["num_left"] == (num_left if left else 0) == len(remainder_rows(epochs.spec, 0)) * left
    assert said["num_holes"] == ((32 - num_left) if holes else 0) == np.count_nonzero(epochs.epoch(0) == PAD)


def test_any_number_of_processes_that_divides_the_batch_may_take_part(selection, tmp_path):
    spec = epochs_of(selection, tmp_path).spec
    for world_size in (1, 2, 4, 8, 16):
        assert rank_slots(spec, world_size - 1, world_size).stop == 16


def test_a_batch_that_the_selection_cannot_fill_names_the_settings(selection, tmp_path):
    with pytest.raises(UserError, match="train.batch_size = 2000.*data.tail = pad"):
        epochs_of(selection, tmp_path, batch_size=2000)
    assert epochs_of(selection, tmp_path, batch_size=2000, tail="pad").rows(0).shape == (2000,)


def test_another_selection_has_another_order(selection, tmp_path):
    freeze(tmp_path / "other.arrow", selection.root, "num_words > 5")
    other = plan_spec(Selection(tmp_path / "other.arrow"), DataSettings(), 16)
    assert other.fingerprint != plan_spec(selection, DataSettings(), 16).fingerprint
    assert plan_spec(selection, DataSettings(apart=()), 16).groups_hash == ""


# --- Who plans


def _rows(epochs, step, log, results):
    planned = training.data.epoch_files.write_epoch

    def write_epoch(*arguments):
        if not plan_path(*arguments[:3]).exists():
            with open(log, "a") as file:
                file.write(f"{os.getpid()}\n")
        return planned(*arguments)

    training.data.epoch_files.write_epoch = write_epoch
    results.put(epochs.rows(step).tolist())


def test_of_many_processes_one_plans_and_all_read_the_same(selection, tmp_path):
    epochs, context = epochs_of(selection, tmp_path / "plan"), multiprocessing.get_context("fork")
    log, results = tmp_path / "log", context.Queue()
    processes = [context.Process(target=_rows, args=(epochs, 3, log, results)) for _ in range(6)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    assert all(answer == answers[0] for answer in answers) and len(log.read_text().split()) == 1
    assert [path.suffix for path in (tmp_path / "plan").iterdir() if path.name != ".lock"] == [".npy"]


def test_a_process_killed_while_planning_does_not_block_the_others(selection, tmp_path):
    epochs, context = epochs_of(selection, tmp_path), multiprocessing.get_context("fork")
    ready = context.Event()

    def plans_forever():
        with lock_file(epochs.folder / ".lock"):
            ready.set()
            multiprocessing.Event().wait()

    process = context.Process(target=plans_forever)
    process.start()
    assert ready.wait(timeout=600)
    process.kill()
    process.join()
    assert epochs.rows(0).shape == (16,)


def test_it_pickles_without_what_it_has_open(selection, tmp_path):
    epochs = epochs_of(selection, tmp_path)
    rows = epochs.rows(7)
    copy = pickle.loads(pickle.dumps(epochs))
    assert len(pickle.dumps(epochs)) < 2000 and np.array_equal(copy.rows(7), rows)


def test_epochs_long_past_are_removed(selection, tmp_path):
    epochs = epochs_of(selection, tmp_path)
    per_epoch = steps_in_epoch(epochs.spec, 0)
    held = epochs.epoch(0)
    first = held[0].copy()
    for epoch in range(3):
        epochs.rows(epoch * per_epoch)
    assert epochs.tidy(before_epoch=2) == 2 and epochs.tidy(before_epoch=2) == 0
    assert [path.name for path in sorted(Path(tmp_path).glob("*.npy"))] == [plan_path(tmp_path, epochs.spec, 2).name]
    assert np.array_equal(held[0], first)  # processes that have it open can still read it
    assert np.array_equal(epochs.rows(0), first)  # and it can be planned again


def test_a_selection_that_changed_under_the_plan_is_noticed(selection, tmp_path):
    freeze(tmp_path / "s.arrow", selection.root)
    epochs = epochs_of(Selection(tmp_path / "s.arrow"), tmp_path)
    freeze(tmp_path / "s.arrow", selection.root, "num_words > 5")
    with pytest.raises(UserError, match="s.arrow"):
        epochs.rows(0)
