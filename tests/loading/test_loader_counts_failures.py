"""Unreadable samples become masked holes and failures, leave other samples alone, and end a run over its budget."""

import shutil
import struct

import numpy as np
import pytest
import torch

from clipmill.base.errors import UserError
from tests.helpers.loaders import make_run, open_run, settle
from tests.helpers.range_server import serve_store
from tests.helpers.shards import change_manifest
from training.data import shard_cache
from training.data.loader import Loader
from training.data.reader_pool import Request
from training.data.selection import Selection


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(healthy, tmp_path):
    """Make a run on a copy of the corpus that the test may damage."""
    corpus = tmp_path / "corpus"
    shutil.copytree(healthy.corpus, corpus)
    return open_run(tmp_path, corpus, hashed=False)


def _shards(run) -> list[str]:
    return run.selection.take(np.arange(40))["shard"].to_pylist()


def _overwrite(run, row: int, data: bytes, at: int = 0) -> None:
    clip = run.selection.take([row]).to_pylist()[0]
    with open(run.corpus / clip["shard"], "r+b") as file:
        file.seek(clip["mp4_offset"] + at)
        file.write(data[: clip["mp4_bytes"]])


def _read_all(run, num_processes: int = 0, **changes):
    failures = []
    reader = run.reader(**changes)
    batches = run.batches(0, 5, num_processes, reader=reader, on_failures=failures.extend)
    return batches, failures


def _assert_only(run, healthy, batches, broken: set[int]) -> None:
    """Assert that exactly the rows `broken` are holes and all others are unchanged."""
    whole = healthy.batches(0, 5)
    for batch, good in zip(batches, whole, strict=True):
        assert torch.equal(batch.rows_B, good.rows_B)
        for slot, row in enumerate(batch.rows_B.tolist()):
            if row in broken:
                assert not batch.video_mask_B[slot] and not batch.subtitle_mask_B[slot]
                assert not batch.caption_mask_B[slot]
                assert not batch.video_BT3SS[slot].any() and not batch.frame_B13SS[slot].any()
            else:
                assert batch.video_mask_B[slot]
                assert torch.equal(batch.video_BT3SS[slot], good.video_BT3SS[slot])
                assert bool(batch.caption_mask_B[slot]) == bool(good.caption_mask_B[slot])


@pytest.mark.parametrize("num_processes", [0, 2])
def test_a_missing_shard_is_as_many_failures_as_it_has_samples(run, healthy, num_processes):
    shards = _shards(run)
    (run.corpus / shards[0]).unlink()
    lost = {row for row, shard in enumerate(shards) if shard == shards[0]}
    batches, failures = _read_all(run, num_processes)
    _assert_only(run, healthy, batches, lost)
    assert {failure.row for failure in failures} == lost and len(failures) == len(lost) == 5
    assert {failure.error.error_class for failure in failures} == {"shard-missing"}
    ids = run.selection.take(np.arange(40))["clip_id"].to_pylist()
    assert all(failure.clip_id == ids[failure.row] for failure in failures)


def test_a_shard_cut_short_keeps_its_first_samples(run, healthy):
    clip = run.selection.take([2]).to_pylist()[0]
    with open(run.corpus / clip["shard"], "r+b") as file:
        file.truncate(clip["mp4_offset"] + clip["mp4_bytes"] - 1)
    lost = {row for row, shard in enumerate(_shards(run)) if shard == clip["shard"] and row >= 2}
    batches, failures = _read_all(run)
    _assert_only(run, healthy, batches, lost)
    assert {failure.error.error_class for failure in failures} == {"truncated-shard"}


@pytest.mark.parametrize(
    ("data", "error_class"),
    [
        (bytes(100_000), "not-a-video"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n" + bytes(100_000), "not-a-video"),
        (np.random.default_rng(0).bytes(100_000), "not-a-video"),
    ],
)
def test_a_file_that_is_not_a_video_is_a_failure(run, healthy, data, error_class):
    _overwrite(run, 17, data)
    batches, failures = _read_all(run, 2)
    _assert_only(run, healthy, batches, {17})
    assert [(failure.row, failure.error.error_class) for failure in failures] == [(17, error_class)]


def test_damaged_pictures_are_a_failure(run, healthy):
    """The container is intact and its pictures are zeros."""
    clip = run.selection.take([17]).to_pylist()[0]
    with open(run.corpus / clip["shard"], "rb") as file:
        file.seek(clip["mp4_offset"])
        data = file.read(clip["mp4_bytes"])
    begin = data.index(b"mdat")
    (size,) = struct.unpack_from(">I", data, begin - 4)
    _overwrite(run, 17, bytes(size - 8), begin + 4)
    batches, failures = _read_all(run)
    _assert_only(run, healthy, batches, {17})
    assert failures[0].error.error_class == "undecodable"


def test_the_captioned_frame_must_be_there_where_it_is_asked_for(run):
    change_manifest(run.corpus, "UPDATE samples SET jpg_offset = NULL, jpg_bytes = NULL WHERE clip_id IN "
                    "(SELECT clip_id FROM samples ORDER BY shard, mp4_offset LIMIT 3)")  # fmt: skip
    run = open_run(run.corpus.parent / "again", run.corpus)
    captions = run.selection.take(np.arange(3))["caption"].to_pylist()
    batches, failures = _read_all(run, still="captioned")
    assert {failure.row for failure in failures} == {row for row in range(3) if captions[row]}
    assert all(failure.error.error_class == "no-still" for failure in failures)
    _, failures = _read_all(run, still="middle")
    assert not failures


def test_a_clip_without_text_is_no_failure(run):
    change_manifest(run.corpus, "UPDATE samples SET subtitle = NULL, caption = '  ' WHERE clip_id IN "
                    "(SELECT clip_id FROM samples ORDER BY shard, mp4_offset LIMIT 3)")  # fmt: skip
    run = open_run(run.corpus.parent / "again", run.corpus)
    part = run.reader().read(np.arange(5), 0)
    assert not part.failures and part.video_mask_B.all()
    assert not part.subtitle_mask_B[:3].any() and not part.caption_mask_B[:3].any()
    texts = run.selection.take(np.arange(5))
    assert part.subtitle_mask_B[3:].tolist() == [bool(text) for text in texts["subtitle"].to_pylist()[3:]]


def test_too_many_failures_end_the_run_and_say_why(run):
    shards = _shards(run)
    for shard in sorted(set(shards))[:2]:
        (run.corpus / shard).unlink()
    _overwrite(run, 39, bytes(100_000))
    with run.loader(0, max_failures=0.2) as loader:
        with pytest.raises(UserError) as raised:
            list(loader.batches(run.epochs, slice(0, 8), 0, 1000))
        assert 100 <= loader.num_read <= 108
    message = str(raised.value)
    assert "data.max_failures = 0.2" in message and "shard-missing" in message and "not-a-video" in message


def test_a_run_within_its_failure_budget_continues(run):
    (run.corpus / _shards(run)[0]).unlink()
    batches = run.batches(0, 50, max_failures=0.2)
    assert len(batches) == 50
    assert sum(int(batch.video_mask_B.sum()) for batch in batches) == 350


def test_no_budget_at_all_ends_the_run_at_the_first_judgement(run):
    _overwrite(run, 17, bytes(100_000))
    with run.loader(0, max_failures=0.0) as loader:
        with pytest.raises(UserError, match="1 of|2 of|3 of"):
            list(loader.batches(run.epochs, slice(0, 8), 0, 1000))


def test_failures_are_reported_before_their_batch(run):
    _overwrite(run, 17, bytes(100_000))
    reported = []
    with run.loader(2, on_failures=reported.extend) as loader:
        for batch in loader.batches(run.epochs, slice(0, 8), 0, 5):
            hole = (batch.rows_B[~batch.video_mask_B]).tolist()
            assert not hole or reported[-1].row == hole[0]
    assert len(reported) == 1


def test_the_same_corpus_from_a_store_through_a_cache(healthy, tmp_path, monkeypatch):
    """Batches equal those of local files, and in the end no requests reach the store."""
    files = {path.relative_to(healthy.corpus).as_posix(): path.read_bytes() for path in healthy.corpus.glob("*/*.tar")}
    monkeypatch.setattr(shard_cache, "MOST_SHARE", 0.1)  # these clips are small compared with their members' headers
    expected = healthy.batches(0, 5)
    with serve_store(files) as store:
        remote = Selection(healthy.selection.path)
        remote.root = store.url
        for cache in (None, str(tmp_path / "cache")):
            reader = healthy.reader(cache_dir=cache, cache_bytes=10_000_000)
            reader.selection = remote
            with Loader(reader, num_processes=0) as loader:
                for _ in range(2):
                    requests = [Request(batch.rows_B.numpy(), 0) for batch in expected]
                    for batch, whole in zip(loader.read(requests), expected, strict=True):
                        assert torch.equal(batch.video_BT3SS, whole.video_BT3SS)
                    if cache:
                        settle(reader.shards.cache)
                    num_requests = len(store.requests)
        list(Loader(reader, num_processes=0).read(requests))
        assert len(store.requests) == num_requests
        assert reader.shards.cache.num_fetched > 0


def test_how_much_of_a_shard_a_run_wants(healthy):
    table = healthy.selection.take(np.arange(40))
    for still, names in (("middle", ["mp4_bytes"]), ("captioned", ["mp4_bytes", "jpg_bytes"])):
        reader = healthy.reader(still=still)
        for shard in sorted(set(_shards(healthy))):
            rows = [row for row in table.to_pylist() if row["shard"] == shard]
            assert reader.wanted_bytes(shard) == sum(row[name] for row in rows for name in names)
        assert reader.wanted_bytes("shards/none.tar") == 0
