"""Near-duplicate groups equal those of a brute-force search in any order; flat frames form no group."""

from contextlib import contextmanager

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shards.corpus import clip_groups
from shards.corpus.manifest import _OWN_TABLES
from shards.corpus.near_duplicates import DuplicateSettings, duplicate_groups, near_duplicate_labels
from tests.helpers.builds import ask
from tests.helpers.manifests import make_manifest
from tests.helpers.shards import change_manifest
from tests.helpers.whole_corpus import CLIPS_PER_VIDEO, VIDEOS


def brute_force(hashes, radius, frame_radius):
    """Return [N] the smallest row of each row's component, by comparing all pairs and spreading labels."""
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])  # [N, N, 3]
    near = (bits.sum(2, dtype=int) <= radius) & (bits.max(2, initial=0) <= frame_radius)
    labels = np.arange(len(hashes))
    while True:
        spread = np.array([labels[row].min() for row in near], dtype=labels.dtype)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def near_hashes(seed, count, num_families, max_flips):
    """Return random hashes and copies with up to `max_flips` flipped bits, at distances on both sides of the radius."""
    random = np.random.default_rng(seed)
    families = random.integers(0, 2**64, (num_families, 3), dtype=np.uint64)
    hashes = families[random.integers(0, num_families, count)]
    for row in hashes:
        for bit in random.integers(0, 192, random.integers(0, max_flips + 1)):
            row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return hashes


def table_of(hashes, clip_ids=None):
    clip_ids = clip_ids or [f"v{n:05d}.0" for n in range(len(hashes))]
    return pa.table(
        {
            "clip_id": pa.array(clip_ids, pa.string()),
            "phash": pa.array([row.tolist() for row in hashes], pa.list_(pa.uint64())),
        }
    )


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.integers(1, 60),
    st.integers(1, 6),
    st.integers(0, 14),
    st.integers(0, 24),
    st.integers(0, 12),
)
def test_groups_are_those_of_a_brute_force_search(seed, count, num_families, max_flips, radius, frame_radius):
    hashes = near_hashes(seed, count, num_families, max_flips)
    assert (
        near_duplicate_labels(hashes, radius, frame_radius).tolist()
        == brute_force(hashes, radius, frame_radius).tolist()
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_groups_do_not_depend_on_the_order_of_the_rows(seed, random):
    table = table_of(near_hashes(seed, 40, 8, 8))
    order = random.sample(range(table.num_rows), table.num_rows)
    assert duplicate_groups(table).equals(duplicate_groups(table.take(order)))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=8),
    st.integers(1, 8),
    st.sampled_from([1, 5, 1000]),
)
def test_groups_that_grow_and_shrink_are_those_of_one_search(seed, changes, num_families, at_once):
    """Each change gives a volume other clips, perhaps none; groups merge, gain members and fall apart."""
    with duckdb.connect() as connection, patched(clip_groups, CLIPS_AT_ONCE=at_once, CLIPS_STREAMED=3):
        connection.execute("ATTACH ':memory:' AS manifest")
        for table, columns in {**_OWN_TABLES, "scores": "clip_id VARCHAR, duplicate_group VARCHAR"}.items():
            connection.execute(f"CREATE TABLE manifest.{table} ({columns})")
        connection.execute("CREATE TABLE manifest.clips (volume INTEGER, clip_id VARCHAR, phash UBIGINT[])")
        for number, (volume, count) in enumerate(changes):
            hashes = near_hashes(seed + number % 3, count, num_families, 8)
            table = table_of(hashes, [f"{(n * 7 + volume) % 13:02}.{volume}.{n}" for n in range(count)])
            for name in ("scores", "clips"):
                ids = f"SELECT clip_id FROM manifest.clips WHERE volume = {volume}"
                connection.execute(f"DELETE FROM manifest.{name} WHERE clip_id IN ({ids})")
            if count:
                connection.execute(f"INSERT INTO manifest.clips SELECT {volume}, clip_id, phash FROM 'table'")
                connection.execute("INSERT INTO manifest.scores SELECT clip_id, NULL FROM 'table'")
            old = connection.execute(f"SELECT grouped FROM manifest.volumes WHERE volume = {volume}").fetchall()
            connection.execute(f"DELETE FROM manifest.volumes WHERE volume = {volume}")
            if count or number % 2:  # an empty volume is removed every second time
                row = [volume, str(number), old[0][0] if old else None]
                connection.execute("INSERT INTO manifest.volumes VALUES (?, ?, ?)", row)
            if number % 3:  # sometimes two volumes change at once
                clip_groups.update_groups(connection)
        clip_groups.update_groups(connection)
        everything = connection.sql("SELECT clip_id, phash FROM manifest.clips").to_arrow_table()
        expected = duplicate_groups(everything).to_pylist()
        for table in ("clip_groups", "scores"):
            found = (
                f"SELECT clip_id, duplicate_group FROM manifest.{table} WHERE duplicate_group IS NOT NULL ORDER BY 1"
            )
            assert connection.sql(found).to_arrow_table().to_pylist() == expected
        assert connection.sql("SELECT bool_and(grouped = content) FROM manifest.volumes").fetchall()[0][0] is not False


@contextmanager
def patched(module, **values):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(module, name, value)
        yield


def test_a_group_is_named_by_its_smallest_clip_and_single_clips_are_not_listed():
    a, b = np.random.default_rng(0).integers(0, 2**64, (2, 3), dtype=np.uint64)
    groups = duplicate_groups(table_of([b, a, a, a ^ np.uint64(1)], ["alone.0", "z.0", "m.3", "n.1"]))
    assert groups.to_pylist() == [
        {"clip_id": "m.3", "duplicate_group": "m.3"},
        {"clip_id": "n.1", "duplicate_group": "m.3"},
        {"clip_id": "z.0", "duplicate_group": "m.3"},
    ]


def test_one_differing_frame_is_enough_to_be_another_clip():
    a = np.random.default_rng(0).integers(0, 2**64, 3, dtype=np.uint64)
    b = a.copy()
    b[2] ^= np.uint64(0b1111111)  # 7 bits of one frame: within the radius of 12, not within 6 a frame
    assert duplicate_groups(table_of([a, b])).num_rows == 0
    assert duplicate_groups(table_of([a, b]), DuplicateSettings(frame_radius=7)).num_rows == 2


def test_black_white_and_plain_clips_make_no_monster_group():
    random = np.random.default_rng(0)
    flat = [0, 1 << 63, (1 << 64) - 1, 0x8000000000008000]
    clips = [[flat[n % 4], flat[n % 3], int(random.integers(0, 2**63))] for n in range(500)]
    assert duplicate_groups(table_of(np.array(clips, dtype=np.uint64))).num_rows == 0
    fade = random.integers(0, 2**64, 3, dtype=np.uint64)
    fade[0] = 0  # a fade from black: two frames with a picture still distinguish copies from other clips
    assert duplicate_groups(table_of([fade, fade])).num_rows == 2


def test_clips_without_three_hashes_are_left_out():
    row = np.random.default_rng(0).integers(0, 2**64, 3, dtype=np.uint64).tolist()
    table = pa.table(
        {"clip_id": list("abcde"), "phash": pa.array([row, None, [], row[:2], row], pa.list_(pa.uint64()))}
    )
    assert duplicate_groups(table)["clip_id"].to_pylist() == ["a", "e"]
    assert duplicate_groups(table.slice(0, 0)).num_rows == 0


def test_many_alike_clips_cost_little_memory_and_time():
    """1,500 clips in one component make a million pairs, most of which are skipped once joined."""
    random = np.random.default_rng(0)
    hashes = np.repeat(random.integers(0, 2**64, (1, 3), dtype=np.uint64), 1500, axis=0)
    for row in hashes:
        for bit in random.integers(0, 192, 4):
            row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    assert set(near_duplicate_labels(hashes, 12, 6).tolist()) == {0}


@pytest.mark.parametrize("wrong", [{"radius": -1}, {"radius": 100}, {"frame_radius": 65}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        DuplicateSettings(**wrong)


def test_the_catalog_marks_every_clip_of_a_group_but_the_one_to_keep(whole):
    groups = ask(whole, "SELECT clip_id, is_duplicate FROM catalog WHERE duplicate_group = 'video-b.0' ORDER BY 1")
    assert groups == [("video-b.0", False), ("video-e.0", True)]
    num_clips = len(VIDEOS) * CLIPS_PER_VIDEO
    assert ask(whole, "SELECT count(*), count(is_duplicate) FROM catalog") == [(num_clips, num_clips)]
    assert ask(whole, "SELECT count(*) FROM catalog WHERE NOT is_duplicate") == [(num_clips - 1,)]


def test_a_clip_without_scores_is_no_duplicate(tmp_path):
    make_manifest(tmp_path / "manifest.duckdb", 100)
    assert ask(tmp_path, "SELECT count(*) FROM catalog WHERE is_duplicate") == [(2,)]
    change_manifest(tmp_path, "DELETE FROM scores")
    assert ask(tmp_path, "SELECT count(*) FROM catalog WHERE NOT is_duplicate") == [(100,)]
