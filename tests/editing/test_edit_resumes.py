"""`clipmill edit` gives the same rows when it is interrupted and resumed, and rolls back rounds that do not help."""

import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

import pipeline.editing.worker
from clipmill.base.errors import UserError
from pipeline.editing.clips import Items
from pipeline.editing.students import Students
from tests.helpers.edits import EAGER, copy_of, edit, edit_command, edit_tables, edits, rows
from tests.helpers.training import ENOUGH_S, Forked, die_at_rename
from training.data.selection import Selection, freeze_run
from training.editing.rounds import fold_of
from training.settings import DataSettings, EvalSettings

SMALL = ("train.batch_size=4", "train.threads=1", "train.tensorboard=false", "data.num_frames=2")
SMALL += ("data.loader_processes=0", "edit.holdout=0.55")


@pytest.fixture(scope="module")
def whole(numbered, tmp_path_factory):
    """Run two rounds without interruption; return the rows and tars they write."""
    folder = tmp_path_factory.mktemp("whole")
    corpus = copy_of(numbered, folder)
    edit(corpus, folder / "edit", rounds=2, trains=False)
    return edit_tables(corpus), tars_of(corpus)


def tars_of(corpus: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((corpus / "clips").glob("edit-*.tar"))}


@pytest.mark.slow
def test_the_same_rows_and_bytes_on_two_workers(numbered, whole, local_ray, tmp_path):
    """The second round runs without workers: starting them costs seconds of imports in each round."""
    corpus = copy_of(numbered, tmp_path)
    edit(corpus, tmp_path / "edit", rounds=1, trains=False, workers=2)
    edit(None, tmp_path / "edit", rounds=2, trains=False, model=None)
    assert (edit_tables(corpus), tars_of(corpus)) == whole


def test_an_editing_interrupted_anywhere_ends_in_the_same_rows_and_bytes(numbered, whole, tmp_path, monkeypatch):
    corpus, out = copy_of(numbered, tmp_path), tmp_path / "edit"
    edit_unit, calls = pipeline.editing.worker.Editor.edit, []

    def interrupted(self, job):
        calls.append(job.unit)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return edit_unit(self, job)

    monkeypatch.setattr(pipeline.editing.worker.Editor, "edit", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            edit(corpus, out, rounds=2, trains=False)
    edit(corpus, out, rounds=2, trains=False)
    assert len(calls) == 2 * 2 + 2  # only the interrupted ones of 2 units in 2 rounds are done again
    assert (edit_tables(corpus), tars_of(corpus)) == whole
    edit(corpus, out, rounds=2, trains=False)
    assert edit_tables(corpus) == whole[0]


@pytest.mark.slow
def test_a_killed_edit_resumes_to_the_same_rows(numbered, whole, tmp_path):
    corpus, out = copy_of(numbered, tmp_path), tmp_path / "edit"
    settings = [part for setting in EAGER for part in ("--set", setting)]
    command = edit_command("--corpus", corpus, "--model", "demo", "--out", out, "--no-train", "--rounds", 2, *settings)
    process = Forked(command, tmp_path / "output", partial(die_at_rename, "ledger/edit-u", nth=2))
    assert process.wait(timeout=ENOUGH_S) == -signal.SIGKILL, (tmp_path / "output").read_text()
    assert len(list((corpus / "fragments" / "ledger").glob("edit-u*"))) == 1
    edit(corpus, out, rounds=2, trains=False)
    assert (edit_tables(corpus), tars_of(corpus)) == whole


def test_more_rounds_continue_from_the_recorded_ones(numbered, whole, tmp_path):
    corpus = copy_of(numbered, tmp_path)
    assert len(edit(corpus, tmp_path / "edit", rounds=1, trains=False)) == 2
    assert len(edit(None, tmp_path / "edit", rounds=2, trains=False, model=None)) == 3
    tables = edit_tables(corpus)
    assert tables["clip_edits"] == whole[0]["clip_edits"] and tables["edited_clips"] == whole[0]["edited_clips"]


def test_another_command_on_the_same_folder_is_refused(numbered, tmp_path):
    corpus, out = copy_of(numbered, tmp_path), tmp_path / "edit"
    edit(corpus, out)
    before = edit_tables(corpus)
    with pytest.raises(UserError, match=r"started with other options:\n  edit.rings: 1 → 2"):
        edit(corpus, out, "edit.rings=2")
    with pytest.raises(UserError, match="where:  → n = 0"):
        edit(corpus, out, where="n = 0")
    with pytest.raises(UserError, match="trains: False → True"):
        edit(corpus, out, rounds=1, trains=True)
    with pytest.raises(UserError, match="is not empty and holds no editing"):
        edit(corpus, corpus)
    with pytest.raises(UserError, match="--corpus and --model are missing"):
        edit(None, tmp_path / "other")
    with pytest.raises(UserError, match="--rounds -1"):
        edit(corpus, tmp_path / "other", rounds=-1)
    assert edit_tables(corpus) == before


# -- with students, whose runs are replaced by listed reports ----------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Replace students by copies of the teacher, one byte longer each round, with listed validation results."""
    scores: list[float] = []

    def weights(self: Students, round_number: int) -> list[Path]:
        path = self.options.out / f"student-{round_number}.safetensors" if round_number else self.options.teacher_path
        if not path.exists():
            shutil.copyfile(self.options.teacher_path, path)
            change(path, round_number)
        return [path]

    monkeypatch.setattr(Students, "validate", lambda self, weights: scores.pop(0))
    monkeypatch.setattr(Students, "train", lambda self, round_number: scores.pop(0))
    monkeypatch.setattr(Students, "weights", weights)
    return scores


def change(path: Path, seed: int) -> None:
    """Overwrite the file with other weights of the same shapes."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    generator = torch.Generator().manual_seed(seed)
    noisy = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    save_file(noisy, path, metadata)


def test_a_round_without_improvement_is_rolled_back_exactly(numbered, tmp_path, scripted):
    corpus, out = copy_of(numbered, tmp_path), tmp_path / "edit"
    scripted += [0.1, 0.2, 0.15, 0.3]
    played = edit(corpus, out, "edit.holdout=0.55", rounds=3, trains=True)
    assert [row["outcome"] for row in played] == ["warm-up", "kept", "rolled-back", "kept"]
    assert [row["validation"] for row in played] == [0.1, 0.2, 0.15, 0.3]
    teachers = [row["teacher"] for row in played]
    assert teachers[0] == teachers[1] != teachers[2] == teachers[3]  # it takes over only after an improvement
    assert [row["step_scale"] for row in played[1:]] == [1, 1, 0.5]
    by_round = {n: {r["clip_id"]: r for r in edits(corpus) if r["round"] == n} for n in (1, 2, 3)}
    for clip_id, row in by_round[3].items():  # the third round continues from the first, whatever the second did
        start_s, end_s = by_round[1][clip_id]["start_s"], by_round[1][clip_id]["end_s"]
        step = 0.5 * max(0.5, 0.1 * (end_s - start_s))
        assert max(abs(row["start_s"] - start_s), abs(row["end_s"] - end_s)) <= step + 1e-9
    spans = {clip_id: (row["start_s"], row["end_s"]) for clip_id, row in by_round[3].items()}
    assert read_as(corpus, tmp_path, "accepted") == spans
    assert read_as(corpus, tmp_path, 2) == {k: (row["start_s"], row["end_s"]) for k, row in by_round[2].items()}


def read_as(corpus: Path, folder: Path, which: str | int) -> dict[str, tuple[float, float]]:
    """Return the boundaries that training reads for edited clips."""
    freeze_run(folder, corpus, DataSettings(edits=which), EvalSettings())
    selection = Selection(folder / "selection.arrow")
    sql = "SELECT tar, mp4_offset, span_start_s, span_end_s FROM {} "
    places = [row for table in ("edited_clips", "clips") for row in rows(corpus, sql.format(table))]
    spans = {(row["tar"], row["mp4_offset"]): (row["span_start_s"], row["span_end_s"]) for row in places}
    samples = {row["clip_id"]: row for row in rows(corpus, "SELECT clip_id, span_start_s, span_end_s FROM clips")}
    read = {}
    edited = {row["clip_id"] for row in edits(corpus)}
    for row in selection.take(range(selection.num_clips)).to_pylist():
        own = samples[row["clip_id"]]
        if row["clip_id"] in edited:
            read[row["clip_id"]] = spans.get(
                (row["shard"], row["mp4_offset"]), (own["span_start_s"], own["span_end_s"])
            )
    return read


def test_a_student_that_became_the_teacher_is_restored(numbered, tmp_path, scripted):
    corpus, out = copy_of(numbered, tmp_path), tmp_path / "edit"
    scripted += [0.1, 0.2, 0.3]
    edit(corpus, out, "edit.holdout=0.55", rounds=1, trains=True)
    edit(corpus, out, "edit.holdout=0.55", rounds=2, trains=True)
    again = copy_of(numbered, tmp_path / "again")
    scripted[:] = [0.1, 0.2, 0.3]
    edit(again, tmp_path / "other", "edit.holdout=0.55", rounds=2, trains=True)
    assert edit_tables(again) == edit_tables(corpus)


def test_missing_student_weights_are_an_error(numbered, tmp_path, scripted, monkeypatch):
    corpus = copy_of(numbered, tmp_path)
    scripted += [0.1, 0.2]
    edit(corpus, tmp_path / "edit", "edit.holdout=0.55", rounds=1, trains=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"round-01 does not exist, but the corpus has that round .* started in"):
        edit(corpus, tmp_path / "other", "edit.holdout=0.55", rounds=1, trains=True)


def test_videos_held_out_for_the_student_are_not_edited(numbered, tmp_path, scripted):
    corpus, out = copy_of(numbered, tmp_path), tmp_path / "edit"
    scripted += [0.1, 0.2]
    edit(corpus, out, "edit.holdout=0.55", rounds=1, trains=True)
    items = Items(out / "clips.arrow")
    assert items.held_out_videos and not items.held_out_videos & {row["video_id"] for row in edits(corpus)}
    with pytest.raises(UserError, match="edit.holdout = 0.001: none of the .* is held out to validate"):
        edit(corpus, tmp_path / "other", "edit.holdout=0.001", rounds=1, trains=True)


def test_a_round_that_collapses_is_recorded_untrained_and_is_the_last(numbered, tmp_path, scripted):
    corpus = copy_of(numbered, tmp_path)
    scripted += [0.1]
    played = edit(
        corpus, tmp_path / "edit", "edit.holdout=0.55", "edit.max_median_change=0.0001", rounds=3, trains=True
    )
    assert [row["outcome"] for row in played] == ["warm-up", "collapsed"] and not scripted
    with pytest.raises(UserError, match="editing .* kept no round"):
        freeze_run(tmp_path, corpus, DataSettings(edits="accepted"), EvalSettings())


def test_each_fold_is_edited_by_the_teacher_of_the_other(numbered, tmp_path, monkeypatch):
    def begin(self: Students) -> list[Path]:
        paths = [self.options.out / f"fold-{fold}.safetensors" for fold in self.folds]
        for fold, path in enumerate(paths):
            shutil.copyfile(self.options.teacher_path, path)
            change(path, fold)
        return paths

    monkeypatch.setattr(Students, "begin", begin)
    corpus = copy_of(numbered, tmp_path)
    [warm_up, _] = edit(corpus, tmp_path / "edit", "edit.folds=2")
    teachers = warm_up["teacher"].split("+")
    assert len(set(teachers)) == 2
    for row in edits(corpus):
        assert row["teacher"] == teachers[1 - fold_of(row["video_id"])]


@pytest.mark.slow
def test_the_command_edits_trains_a_student_and_its_clips_train_a_run(numbered, tmp_path):
    corpus, out = copy_of(numbered, tmp_path), tmp_path / "edit"
    settings = [part for setting in (*EAGER, *SMALL) for part in ("--set", setting)]
    options = ["--corpus", corpus, "--model", "demo", "--recipe", "demo", "--out", out, "--rounds", 1, *settings]
    assert Forked(edit_command(*options), tmp_path / "output").wait(timeout=ENOUGH_S) == 0
    output = (tmp_path / "output").read_text()
    assert "round 1, " in output and "student validation R@1" in output
    [warm_up, played] = rows(corpus, "SELECT * FROM edit_rounds ORDER BY round")
    assert played["outcome"] == ("kept" if played["validation"] > warm_up["validation"] else "rolled-back")
    student = Selection(out / "round-01" / "selection.arrow")
    accepted = {row["clip_id"] for row in edits(corpus) if row["accepted"]}
    table = student.take(range(student.num_clips)).to_pylist()
    assert {row["clip_id"] for row in table if row["shard"].startswith("clips/edit-")} == accepted
    assert not {row["video_id"] for row in table} & Items(out / "clips.arrow").held_out_videos
