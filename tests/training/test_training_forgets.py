"""A training run finds its selected samples after they move, and skips those that were forgotten since."""

import shutil

import numpy as np
import pytest
import torch

import shards.corpus.tombstones
import training.data.relocation
from pipeline.engine.build import session
from pipeline.maintenance.forget import compact, find, forget
from tests.helpers.loaders import MAX_TOKENS, SIZE, remove_hashes
from tests.helpers.whole_corpus import VIDEOS, pack_here
from training.data.loader import Loader
from training.data.reader_pool import Request
from training.data.sample_reader import HOLE, SampleReader
from training.data.selection import Selection, freeze
from training.data.selection_schema import SELECTION
from training.data.tokenizer import TextEncoder
from training.settings import DataSettings

WORDS = ("password", "video", "part", "picture")


@pytest.fixture(autouse=True)
def no_interval_between_checks(monkeypatch):
    """Look for tombstones and moved files at every access instead of once a second."""
    monkeypatch.setattr(shards.corpus.tombstones, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(training.data.relocation, "LOOK_EVERY_S", 0.0)


@pytest.fixture
def corpus(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "corpus")
    freeze(tmp_path / "selection.arrow", tmp_path / "corpus")
    return tmp_path / "corpus"


def open_reader(corpus) -> SampleReader:
    data = DataSettings(num_frames=2, apart=())
    return SampleReader(Selection(corpus.parent / "selection.arrow"), data, TextEncoder(WORDS, MAX_TOKENS), SIZE)


def rows_of(reader: SampleReader, *video_ids: str) -> list[int]:
    ids = reader.selection.column("video_id").to_pylist()
    return [row for row, video_id in enumerate(ids) if video_id in video_ids]


def read_all(reader: SampleReader):
    return reader.read(np.arange(reader.selection.num_clips), 0)


def test_a_running_run_skips_it_from_then_on(corpus):
    reader = open_reader(corpus)
    before = read_all(reader)
    assert before.failures == []
    forget(corpus, find(corpus, ["video-b"], [], None), None)
    after = read_all(reader)
    gone = rows_of(reader, "video-b")
    assert [(failure.row, failure.error.error_class) for failure in after.failures] == [
        (row, "forgotten") for row in gone
    ]
    assert not after.video_mask_B[gone].any() and not after.subtitle_mask_B[gone].any()
    assert not after.pixels.frames_BTSS3[gone].any() and not after.pixels.stills_B1SS3[gone].any()
    kept = np.setdiff1d(np.arange(reader.selection.num_clips), gone)
    assert torch.equal(after.pixels.frames_BTSS3[kept], before.pixels.frames_BTSS3[kept])


def test_what_moved_when_the_corpus_was_compacted_is_found_again(corpus):
    before = read_all(open_reader(corpus))
    old = Selection(corpus.parent / "selection.arrow").column("mp4_offset").to_pylist()
    forget(corpus, find(corpus, ["video-b"], [], None), None)
    compact(corpus)
    reader = open_reader(corpus)
    after = read_all(reader)
    gone = rows_of(reader, "video-b")
    kept = np.setdiff1d(np.arange(reader.selection.num_clips), gone)
    assert {failure.row for failure in after.failures} == set(gone)
    assert torch.equal(after.pixels.frames_BTSS3[kept], before.pixels.frames_BTSS3[kept])
    assert torch.equal(after.pixels.stills_B1SS3[kept], before.pixels.stills_B1SS3[kept])
    freeze(corpus.parent / "anew.arrow", corpus)
    now = Selection(corpus.parent / "anew.arrow")
    moved = dict(zip(now.column("clip_id").to_pylist(), now.column("mp4_offset").to_pylist(), strict=True))
    was = dict(zip(reader.selection.column("clip_id").to_pylist(), old, strict=True))
    assert any(moved[clip_id] != was[clip_id] for clip_id in moved), "nothing moved, so nothing was proved"


def test_what_moved_when_the_corpus_was_packed_anew_is_found_again(corpus):
    reader = open_reader(corpus)
    before = read_all(reader)
    with session(corpus, None, ["pack.seed=5", "pack.max_samples=7"], "test", create=False) as (current, _):
        current.refresh_state()
        current.publish()
        assert pack_here(current).num_written
        current.publish()
    for same in (reader, open_reader(corpus)):
        after = read_all(same)
        assert after.failures == [] and torch.equal(after.pixels.frames_BTSS3, before.pixels.frames_BTSS3)


def test_other_bytes_are_a_failure_and_never_a_sample(corpus):
    reader = open_reader(corpus)
    one, other = reader.selection.take([0, 1]).to_pylist()
    path, size = corpus / one["shard"], min(one["mp4_bytes"], other["mp4_bytes"])
    data = bytearray(path.read_bytes())
    data[one["mp4_offset"] : one["mp4_offset"] + size] = data[other["mp4_offset"] : other["mp4_offset"] + size]
    path.write_bytes(data)
    [failure] = read_all(reader).failures
    assert (failure.row, failure.error.error_class) == (0, "hash-mismatch")


def test_forgotten_clips_do_not_end_a_run(corpus):
    forget(corpus, find(corpus, VIDEOS[:6], [], None), None)
    reader, reported = open_reader(corpus), []
    requests = [Request(np.arange(reader.selection.num_clips, dtype=np.uint32), epoch) for epoch in range(6)]
    with Loader(reader, num_processes=0, max_failures=0.0, on_failures=reported.extend) as loader:
        batches = list(loader.read(requests))
    assert len(batches) == 6 and loader.num_failed == 0 and loader.reasons["forgotten"] == len(reported) == 6 * 18
    assert all((batch.rows_B != HOLE).sum() == 24 for batch in batches)


def test_a_new_selection_is_without_it(corpus, tmp_path):
    forget(corpus, find(corpus, ["video-b"], [], None), None)
    freeze(tmp_path / "new.arrow", corpus)
    assert "video-b" not in Selection(tmp_path / "new.arrow").column("video_id").to_pylist()


def test_selections_without_hashes_are_read(corpus, tmp_path):
    remove_hashes(tmp_path / "selection.arrow")
    selection = Selection(tmp_path / "selection.arrow")
    assert selection.take([3]).schema.equals(SELECTION) and selection.take([3])["mp4_sha256"].null_count == 1
    assert read_all(open_reader(corpus)).failures == []
