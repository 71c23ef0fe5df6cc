"""A selection file gives any of its rows in any process, and is either complete or absent."""

import multiprocessing
import pickle

import numpy as np
import pyarrow as pa
import pytest

import training.data.selection
from clipmill.base.errors import UserError
from tests.helpers.loaders import select
from tests.helpers.manifests import make_manifest
from training.data.selection import Selection, freeze
from training.data.selection_schema import SELECTION

NUM_CLIPS = 3000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    make_manifest(folder / "manifest.duckdb", NUM_CLIPS)
    return folder


@pytest.fixture(scope="module")
def selection(corpus):
    """Freeze the selection in many small batches, so that groups cross their borders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.data.selection, "_SHARD_ROWS", 1000)
        patch.setattr(training.data.selection, "_BATCH_ROWS", 100)
        freeze(corpus / "selection.arrow", corpus)
    return Selection(corpus / "selection.arrow")


def test_batches_change_nothing(corpus, selection):
    assert selection._reader.num_record_batches > 20
    whole = select(corpus)
    assert selection.num_clips == whole.num_rows
    for name in SELECTION.names:
        assert selection.column(name).to_pylist() == whole[name].to_pylist()


def test_pieces_of_the_corpus_give_the_same_hash(corpus, selection, tmp_path):
    freeze(tmp_path / "whole.arrow", corpus)
    whole = Selection(tmp_path / "whole.arrow")
    assert (whole.hash, whole.snapshot) == (selection.hash, selection.snapshot)


@pytest.mark.parametrize("size", [0, 1, 16, 700])
def test_rows_come_in_the_order_asked_for(selection, size):
    rows = np.random.default_rng(size).integers(0, selection.num_clips, size)
    table = selection.take(rows)
    assert table.schema.equals(SELECTION) and table.num_rows == size
    everything = selection.column("clip_id").to_pylist()
    assert table["clip_id"].to_pylist() == [everything[row] for row in rows]


def test_a_row_may_be_asked_for_twice(selection):
    assert selection.take([5, 2500, 5])["clip_id"].to_pylist() == [
        selection.column("clip_id")[row].as_py() for row in (5, 2500, 5)
    ]


@pytest.mark.parametrize("row", [-1, 10**6])
def test_a_row_that_is_not_there_is_no_clip(selection, row):
    with pytest.raises(IndexError):
        selection.take([0, row])


def test_groups_are_numbered_as_first_seen(selection):
    videos, duplicates = selection.groups(("video", "duplicate"))
    numbers: dict = {}
    expected = [numbers.setdefault(value, len(numbers)) for value in selection.column("video_id").to_pylist()]
    assert videos.tolist() == expected and videos.dtype == np.int32
    named = selection.column("duplicate_group").to_pylist()
    assert [code < 0 for code in duplicates.tolist()] == [name is None for name in named]
    assert len(set(zip(duplicates.tolist(), named, strict=True))) == len(set(named))
    assert selection.groups(()) == []


def _clip_ids(selection: Selection) -> list[str]:
    return selection.take([1, 700])["clip_id"].to_pylist()


def test_another_process_opens_it_by_its_path(selection):
    assert len(pickle.dumps(selection)) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_clip_ids, (selection,)) == _clip_ids(selection)


def test_a_freeze_that_fails_leaves_what_was_there(corpus, selection, tmp_path, monkeypatch):
    path = tmp_path / "selection.arrow"
    freeze(path, corpus, "num_words > 30")
    before = path.read_bytes()

    def fails(samples, choice):
        yield pa.RecordBatch.from_pylist([], SELECTION)
        raise OSError("no space left")

    monkeypatch.setattr(training.data.selection, "selected_rows", fails)
    with pytest.raises(OSError, match="no space left"):
        freeze(path, corpus)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_torn_or_foreign_file_is_an_error(selection, tmp_path):
    path = tmp_path / "torn.arrow"
    path.write_bytes(selection.path.read_bytes()[:-100])
    with pytest.raises(UserError, match="torn.arrow"):
        Selection(path)
    with pa.ipc.new_file(path, pa.schema([("x", pa.int64())])):
        pass
    with pytest.raises(UserError, match="not a selection"):
        Selection(path)
    with pytest.raises(UserError, match="absent.arrow"):
        Selection(tmp_path / "absent.arrow")
