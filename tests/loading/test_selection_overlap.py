"""Training excludes held-out videos, their copies and near-duplicates unless the settings allow them."""

import shutil

import pytest

from clipmill.base.errors import UserError
from tests.helpers.manifests import make_manifest
from tests.helpers.shards import change_manifest
from training.data.selection import Selection, freeze_run
from training.data.selection_schema import EVAL_FILE, SELECTION_FILE
from training.settings import DataSettings, EvalSettings

NUM_CLIPS = 600  # 20 videos of 30


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap") / "corpus"
    folder.mkdir()
    make_manifest(folder / "manifest.duckdb", NUM_CLIPS)
    change_manifest(folder, "UPDATE scores SET duplicate_group = NULL")
    return folder


@pytest.fixture
def corpus(made, tmp_path):
    return shutil.copytree(made, tmp_path / "corpus")


def videos(corpus):
    """Return all videos in the order of the list."""
    from shards.query.sql import open_manifest, rows_of

    with open_manifest(corpus) as connection:
        return rows_of(connection, "SELECT video_id FROM videos ORDER BY ordinal")


def run(corpus, where, held_out, overlap):
    folder = corpus.parent / "run"
    training, _ = freeze_run(folder, corpus, DataSettings(where=where), EvalSettings(where=held_out, overlap=overlap))
    return training, Selection(folder / SELECTION_FILE), Selection(folder / EVAL_FILE)


def ids(selection, column="video_id"):
    return set(selection.column(column).to_pylist())


@pytest.mark.parametrize("overlap", ["error", "exclude", "allow"])
def test_selections_that_share_nothing_are_left_alone(corpus, overlap):
    first, *others = videos(corpus)
    training, trained, held_out = run(corpus, f"video_id <> '{first}'", f"video_id = '{first}'", overlap)
    assert ids(held_out) == {first} and ids(trained) == set(others)
    assert training.num_excluded == training.num_shared == 0


def test_a_shared_video_is_an_error_that_says_what_to_do(corpus):
    first, second, *_ = videos(corpus)
    with pytest.raises(UserError) as caught:
        run(corpus, "", f"video_id IN ('{first}', '{second}') AND n < 15", "error")
    text = str(caught.value)
    assert "share 2 videos" in text and f"{first}." in text and "eval.overlap = exclude" in text
    assert not (corpus.parent / "run" / SELECTION_FILE).exists()


def test_excluded_clips_are_counted_and_removed(corpus):
    first, second, *others = videos(corpus)
    training, trained, held_out = run(corpus, "", f"video_id IN ('{first}', '{second}') AND n < 15", "exclude")
    assert ids(trained) == set(others) and ids(held_out) == {first, second}
    assert trained.num_clips + training.num_excluded > trained.num_clips == training.num_clips
    assert f"{training.num_excluded} clips left out" in training.notes()[0]


def test_allowed_clips_stay_and_are_counted(corpus):
    first = videos(corpus)[0]
    training, trained, held_out = run(corpus, "", f"video_id = '{first}'", "allow")
    assert ids(held_out) < ids(trained) and training.num_shared == held_out.num_clips
    assert "share a video" in training.notes()[0]


def test_a_near_duplicate_in_another_video_counts(corpus):
    first, second, third, *_ = videos(corpus)
    alike = ", ".join(f"'{video}.{n}'" for video in (first, second) for n in (0, 1, 2))
    change_manifest(corpus, f"UPDATE scores SET duplicate_group = 'g' WHERE clip_id IN ({alike})")
    change_manifest(corpus, f"UPDATE scores SET duplicate_group = 'h' WHERE clip_id LIKE '{third}.%'")
    clean = f"video_id <> '{first}'"
    with pytest.raises(UserError, match="share 0 videos or 1 near-duplicate groups"):
        run(corpus, clean, f"video_id = '{first}'", "error")
    training, trained, _ = run(corpus, clean, f"video_id = '{first}'", "exclude")
    kept = ids(trained, "clip_id")
    assert training.num_excluded and not kept & {f"{second}.{n}" for n in (0, 1, 2)}
    assert third in ids(trained)  # a group without clips in the evaluation


def test_a_copy_of_a_held_out_video_counts_as_the_video(corpus):
    """The video was recognised as a copy after its clips were packed."""
    first, second, third, *_ = videos(corpus)
    change_manifest(corpus, f"UPDATE videos SET duplicate_of = '{first}' WHERE video_id IN ('{second}', '{third}')")
    for held_out in (first, second):
        _, trained, evaluated = run(corpus, "", f"video_id = '{held_out}'", "exclude")
        assert ids(evaluated) == {held_out} and not ids(trained) & {first, second, third}


def test_an_empty_training_selection_is_an_error(corpus):
    first = videos(corpus)[0]
    with pytest.raises(UserError, match="eval.overlap = exclude: all"):
        run(corpus, f"video_id = '{first}'", f"video_id = '{first}' AND n < 4", "exclude")


def test_a_mistake_in_the_held_out_condition_names_it(corpus):
    with pytest.raises(UserError, match="^eval.where"):
        run(corpus, "", "no_such_column = 1", "error")


def test_without_a_held_out_condition_there_is_no_second_file(corpus, tmp_path):
    training, held_out = freeze_run(tmp_path / "run", corpus, DataSettings(), EvalSettings())
    assert held_out is None and not (tmp_path / "run" / EVAL_FILE).exists()
    assert Selection(tmp_path / "run" / SELECTION_FILE).num_clips == training.num_clips
