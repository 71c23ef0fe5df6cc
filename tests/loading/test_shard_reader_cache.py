"""The cache of remote shards fetches a shard once, stays under its cap, and never serves a torn copy."""

import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.loaders import settle
from tests.helpers.range_server import serve_store
from training.data.range_reader import Range, ShardReader
from training.data.shard_cache import ShardCache

SIZE = 1_000_000
SHARDS = {f"shards/{number:06d}.tar": np.random.default_rng(number).bytes(SIZE) for number in range(6)}
NAMES = list(SHARDS)


@pytest.fixture
def store():
    with serve_store(dict(SHARDS)) as store:
        yield store


def _read(reader: ShardReader, names: list[str], offset: int = 100) -> None:
    """Read a member of each shard and check it."""
    answers = reader.read([Range(name, offset, 5000) for name in names])
    for name, answer in zip(names, answers, strict=True):
        assert bytes(answer) == SHARDS[name][offset : offset + 5000]


def _copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def test_a_shard_is_fetched_once_and_read_locally_from_then_on(store, tmp_path):
    cache = ShardCache(tmp_path / "cache", 10 * SIZE)
    reader = ShardReader(store.url, cache)
    _read(reader, NAMES[:2])  # from the store, without waiting for a whole shard
    settle(cache)
    assert [path.stat().st_size for path in _copies(tmp_path / "cache")] == [SIZE, SIZE]
    num_requests = len(store.requests)
    for offset in range(0, 900_000, 100_000):
        _read(reader, NAMES[:2], offset)
    assert len(store.requests) == num_requests and cache.num_fetched == 2


def test_another_process_finds_the_copies(store, tmp_path):
    for _ in range(2):
        cache = ShardCache(tmp_path, 10 * SIZE)
        reader = ShardReader(store.url, cache)
        _read(reader, NAMES[:2])
        settle(cache)
    assert cache.num_fetched == 0
    before = len(store.requests)
    _read(reader, NAMES[:2])
    assert len(store.requests) == before


@pytest.mark.parametrize(("wanted", "num_copies"), [(SIZE // 3, 0), (SIZE // 2, 0), (SIZE // 2 + 1, 1)])
def test_a_shard_is_fetched_whole_only_where_most_of_it_is_wanted(store, tmp_path, wanted, num_copies):
    cache = ShardCache(tmp_path, 10 * SIZE)
    reader = ShardReader(store.url, cache, wanted=lambda shard: wanted)
    for _ in range(2):
        _read(reader, NAMES[:1])
        settle(cache)
    assert len(_copies(tmp_path)) == num_copies


def test_the_share_is_asked_for_once(store, tmp_path):
    asked = []
    cache = ShardCache(tmp_path, 10 * SIZE)
    reader = ShardReader(store.url, cache, wanted=lambda shard: asked.append(shard) or 0)
    for _ in range(3):
        _read(reader, NAMES[:2])
        settle(cache)
    assert sorted(asked) == NAMES[:2]


def test_the_cap_holds_and_what_is_in_use_stays(store, tmp_path):
    cache = ShardCache(tmp_path, int(2.5 * SIZE))
    reader = ShardReader(store.url, cache)
    for _ in range(3):
        for name in NAMES:
            _read(reader, [name])
            settle(cache)
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2.5 * SIZE
    assert len(_copies(tmp_path)) == 2 and cache.num_fetched == 2


def test_the_longest_unused_copies_make_room(store, tmp_path):
    cache = ShardCache(tmp_path, int(2.5 * SIZE), idle_s=0.0)
    reader = ShardReader(store.url, cache)
    kept = {}
    for name in NAMES[:2]:
        _read(reader, [name])
        settle(cache)
        (kept[name],) = set(_copies(tmp_path)) - set(kept.values())
        time.sleep(0.02)
    _read(reader, NAMES[:1])  # the first is used again, so the second is evicted
    time.sleep(0.02)
    _read(reader, NAMES[2:3])
    settle(cache)
    assert kept[NAMES[0]].exists() and not kept[NAMES[1]].exists() and len(_copies(tmp_path)) == 2
    _read(reader, NAMES)


def test_a_shard_larger_than_the_cache_is_read_by_ranges(store, tmp_path):
    cache = ShardCache(tmp_path, SIZE - 1)
    reader = ShardReader(store.url, cache)
    _read(reader, NAMES)
    settle(cache)
    _read(reader, NAMES)
    assert not _copies(tmp_path)


def test_a_copy_cut_short_is_not_served_but_fetched_anew(store, tmp_path):
    cache = ShardCache(tmp_path, 10 * SIZE)
    reader = ShardReader(store.url, cache)
    _read(reader, NAMES[:1])
    settle(cache)
    (copy,) = _copies(tmp_path)
    _read(reader, NAMES[:1], 900_000)
    os.truncate(copy, 1000)
    _read(reader, NAMES[:1], 900_000)
    settle(cache)
    _read(reader, NAMES[:1], 900_000)
    assert copy.stat().st_size == SIZE


def test_a_copy_removed_meanwhile_is_fetched_anew(store, tmp_path):
    cache = ShardCache(tmp_path, 10 * SIZE)
    reader = ShardReader(store.url, cache)
    for _ in range(3):
        _read(reader, NAMES[:1])
        settle(cache)
        for copy in _copies(tmp_path):
            copy.unlink()
    assert cache.num_fetched == 3


def test_a_shard_written_anew_under_its_name_is_another_shard(store, tmp_path):
    cache = ShardCache(tmp_path, 10 * SIZE)
    reader = ShardReader(store.url, cache)
    _read(reader, NAMES[:1])
    settle(cache)
    store.files[NAMES[0]] = SHARDS[NAMES[1]]
    store.etags[NAMES[0]] = '"two"'
    later = ShardCache(tmp_path, 10 * SIZE)
    reader = ShardReader(store.url, later)
    for _ in range(2):
        (data,) = reader.read([Range(NAMES[0], 0, 1000)])
        settle(later)
    assert bytes(data) == SHARDS[NAMES[1]][:1000] and len(_copies(tmp_path)) == 2


def test_a_fetch_that_breaks_off_leaves_nothing(store, tmp_path):
    cache = ShardCache(tmp_path, 10 * SIZE)
    reader = ShardReader(store.url, cache)
    store.drops_after = 6000
    with pytest.warns(UserWarning, match="is not kept"):
        _read(reader, NAMES[:1])
        settle(cache)
    assert not _copies(tmp_path) and not list(tmp_path.glob("fetching-*"))
    store.drops_after = None
    _read(reader, NAMES[:1])


def test_what_a_killed_process_left_half_is_cleared_away(store, tmp_path):
    half = tmp_path / "fetching-dead"
    half.write_bytes(bytes(2 * SIZE))
    with open(tmp_path / "fetching-alive", "wb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        alive.truncate(SIZE)
        cache = ShardCache(tmp_path, int(2.5 * SIZE))
        reader = ShardReader(store.url, cache)
        _read(reader, NAMES[:2])
        settle(cache)
        assert not half.exists() and (tmp_path / "fetching-alive").exists()
        assert len(_copies(tmp_path)) == 1  # the other half of the space is taken by live processes


def _hammer(url: str, folder: str, max_bytes: int, seed: int, outcome) -> None:
    reader = ShardReader(url, ShardCache(folder, max_bytes, idle_s=0.0))
    random = np.random.default_rng(seed)
    try:
        for _ in range(60):
            _read(reader, [NAMES[random.integers(len(NAMES))] for _ in range(4)], int(random.integers(0, 900_000)))
        outcome.put(None)
    except AssertionError as error:
        outcome.put(str(error))


@pytest.mark.slow
def test_several_processes_under_a_tight_cap_read_only_true_bytes(store, tmp_path):
    context = multiprocessing.get_context("spawn")
    outcome = context.Queue()
    processes = [
        context.Process(target=_hammer, args=(store.url, str(tmp_path), int(2.5 * SIZE), seed, outcome))
        for seed in range(3)
    ]
    for process in processes:
        process.start()
    assert [outcome.get(timeout=600) for _ in processes] == [None] * 3
    for process in processes:
        process.join()
    assert sum(path.stat().st_size for path in _copies(tmp_path)) <= 2.5 * SIZE
