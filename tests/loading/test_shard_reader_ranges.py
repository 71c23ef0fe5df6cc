"""Members read by byte range: the right bytes from any store in few requests, and an error for each broken member."""

import os

import fsspec
import numpy as np
import pytest

from clipmill.base.errors import ItemError, UserError
from tests.helpers.range_server import serve_store
from training.data import range_reader as shard_reader
from training.data.range_reader import LOCAL_GAP_BYTES, REMOTE_GAP_BYTES, Range, ShardReader

SHARDS = {
    f"shards/{number:06d}.tar": np.random.default_rng(number).bytes(3_000_000 + 1000 * number) for number in range(3)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "shards").mkdir()
    for name, data in SHARDS.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def store():
    with serve_store(dict(SHARDS)) as store:
        yield store


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(shard_reader, "_PAUSES_S", (0.0, 0.0, 0.0))


def _some_ranges(count: int, seed: int = 0) -> list[Range]:
    random = np.random.default_rng(seed)
    names = list(SHARDS)
    return [
        Range(names[random.integers(3)], int(random.integers(0, 2_900_000)), int(random.integers(1, 100_000)))
        for _ in range(count)
    ]


def _expected(ranges: list[Range]) -> list[bytes]:
    return [SHARDS[shard][offset : offset + num_bytes] for shard, offset, num_bytes in ranges]


def _error_class(answer) -> str:
    assert isinstance(answer, ItemError)
    return answer.error_class


def test_any_ranges_in_any_order_from_a_folder(folder):
    ranges = _some_ranges(50)
    assert [bytes(data) for data in ShardReader(str(folder)).read(ranges + ranges[:5])] == _expected(
        ranges + ranges[:5]
    )


def test_any_ranges_from_a_store(store):
    ranges = _some_ranges(50)
    assert [bytes(data) for data in ShardReader(store.url).read(ranges)] == _expected(ranges)


def test_any_ranges_from_memory():
    for name, data in SHARDS.items():
        with fsspec.open(f"memory://bucket/{name}", "wb") as file:
            file.write(data)
    ranges = _some_ranges(20)
    assert [bytes(data) for data in ShardReader("memory://bucket").read(ranges)] == _expected(ranges)


def test_shards_named_by_whole_paths_and_urls_need_no_root(folder, store):
    name = "shards/000001.tar"
    ranges = [
        Range(f"{folder}/{name}", 10, 20),
        Range(f"file://{folder}/{name}", 10, 20),
        Range(f"{store.url}/{name}", 10, 20),
    ]
    assert [bytes(data) for data in ShardReader("").read(ranges)] == [SHARDS[name][10:30]] * 3


def test_neighbours_are_one_request(store):
    name = "shards/000000.tar"
    near = [Range(name, 200_000, 1000), Range(name, 0, 1000), Range(name, 101_000, 5000)]
    ShardReader(store.url).read(near)
    assert store.ranges(name) == [(0, 201_000)]


def test_what_lies_far_apart_is_not_read_along(store):
    name = "shards/000000.tar"
    far = [Range(name, 0, 1000), Range(name, 1000 + REMOTE_GAP_BYTES + 1, 1000)]
    ShardReader(store.url).read(far)
    assert sorted(store.ranges(name)) == [(0, 1000), (1_001_001, 1_002_001)]


def test_all_of_a_shard_in_one_go_is_one_request(store):
    name = "shards/000002.tar"
    members = [Range(name, offset, 90_000) for offset in range(0, 3_000_000, 100_000)]
    ShardReader(store.url).read(members)
    assert store.ranges(name) == [(0, 2_990_000)]


def test_local_neighbours_are_one_read(folder, monkeypatch):
    sizes = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: sizes.append(size) or pread(fd, size, at))
    name = "shards/000000.tar"
    ShardReader(str(folder)).read([Range(name, 0, 1000), Range(name, 1000 + LOCAL_GAP_BYTES, 1000)])
    ShardReader(str(folder)).read([Range(name, 0, 1000), Range(name, 1001 + LOCAL_GAP_BYTES, 1000)])
    assert sizes == [2000 + LOCAL_GAP_BYTES, 1000, 1000]


@pytest.mark.parametrize("remote", [False, True])
def test_a_missing_shard_costs_its_own_members_only(folder, store, remote):
    good = Range("shards/000000.tar", 5, 100)
    answers = ShardReader(store.url if remote else str(folder)).read([good, Range("shards/999999.tar", 0, 10), good])
    assert [bytes(answers[0]), bytes(answers[2])] == _expected([good, good])
    assert _error_class(answers[1]) == "shard-missing"


@pytest.mark.parametrize("remote", [False, True])
def test_a_short_shard_costs_the_members_behind_its_end(folder, store, remote):
    name, size = "shards/000000.tar", len(SHARDS["shards/000000.tar"])
    ranges = [Range(name, size - 100, 100), Range(name, size - 50, 100), Range(name, size + 5, 10)]
    answers = ShardReader(store.url if remote else str(folder)).read(ranges)
    assert bytes(answers[0]) == SHARDS[name][-100:]
    assert [_error_class(answer) for answer in answers[1:]] == ["truncated-shard"] * 2


def test_a_store_that_is_busy_for_a_moment_is_asked_again(store):
    store.num_failures = 2
    ranges = [Range(name, 0, 100) for name in SHARDS]
    assert [bytes(data) for data in ShardReader(store.url).read(ranges)] == _expected(ranges)


def test_a_store_that_stays_busy_is_an_error(store):
    store.num_failures = 1000
    (answer,) = ShardReader(store.url).read([Range("shards/000000.tar", 0, 100)])
    assert _error_class(answer) == "shard-unreadable" and "503" in answer.message


def test_a_server_without_ranges_is_recognised(store):
    store.ignores_ranges = True
    (answer,) = ShardReader(store.url).read([Range("shards/000000.tar", 0, 100)])
    assert _error_class(answer) == "shard-unreadable" and "ranges" in answer.message


def test_a_connection_that_breaks_off_is_never_taken_for_the_data(store):
    store.drops_after = 50
    (answer,) = ShardReader(store.url).read([Range("shards/000000.tar", 0, 100)])
    assert _error_class(answer) in ("shard-unreadable", "truncated-shard")


def test_more_shards_than_may_be_open(folder, monkeypatch):
    monkeypatch.setattr(shard_reader, "_OPEN_FILES", 2)
    reader, before = ShardReader(str(folder)), len(os.listdir("/proc/self/fd"))
    for seed in range(5):
        ranges = _some_ranges(10, seed)
        assert [bytes(data) for data in reader.read(ranges)] == _expected(ranges)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_unknown_scheme_is_the_users_mistake():
    with pytest.raises(UserError, match="nowhere://"):
        ShardReader("nowhere://bucket").read([Range("shards/000000.tar", 0, 1)])
