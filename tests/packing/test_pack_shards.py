"""Packing the same clips with a seed gives the same bytes after any history; wrong media never become a sample."""

import json
import os
import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from clipmill.base.errors import UserError
from shards.packing import pack as packing
from shards.packing.index import read_index, read_stamp, refresh_index
from shards.packing.pack import (
    PackSettings,
    commit_shards,
    pending_shards,
    plan_shards,
    select_samples,
    write_shard,
)
from shards.packing.tar import read_member
from shards.query.sql import open_manifest
from tests.helpers.shards import (
    change_manifest,
    list_members,
    make_corpus,
    pack,
    publish_samples,
    shard_bytes,
    shard_rows,
)

SETTINGS = PackSettings(shard_bytes=1_000_000, max_samples=5)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("pack") / "corpus")


@pytest.fixture
def corpus(unpacked, tmp_path):
    return shutil.copytree(unpacked, tmp_path / "corpus")


def plans_of(root, settings=SETTINGS):
    with open_manifest(root) as connection:
        return plan_shards(select_samples(connection, settings), settings)


def samples_table(clip_ids, num_bytes=1000):
    count = len(clip_ids)
    return pa.table(
        {
            "clip_id": pa.array(clip_ids, pa.string()),
            "mp4_bytes": pa.array([num_bytes] * count, pa.int64()),
            "jpg_bytes": pa.array([10] * count, pa.int64()),
            "txt_bytes": pa.array([5] * count, pa.int64()),
            "content": pa.array([f"digest of {clip_id}" for clip_id in clip_ids], pa.string()),
        }
    )


CLIP_IDS = st.lists(
    st.builds(lambda video, n: f"{video}.{n}", st.text("abcXYZ019_-", min_size=1, max_size=11), st.integers(0, 50)),
    unique=True,
    max_size=60,
)


@settings(deadline=None, max_examples=50)
@given(CLIP_IDS, st.integers(0, 5), st.randoms(use_true_random=False), st.integers(1, 20), st.integers(1, 40))
def test_a_plan_depends_on_the_clips_and_the_seed_not_on_their_order(clip_ids, seed, random, max_samples, kilobytes):
    limits = PackSettings(seed=seed, max_samples=max_samples, shard_bytes=1_000_000)
    num_bytes = kilobytes * 20_000
    plans = plan_shards(samples_table(clip_ids, num_bytes), limits)
    shuffled = random.sample(clip_ids, len(clip_ids))
    again = plan_shards(samples_table(shuffled, num_bytes), limits)
    assert [(p.name, p.key, p.clip_ids) for p in plans] == [(p.name, p.key, p.clip_ids) for p in again]
    planned = [clip_id for plan in plans for clip_id in plan.clip_ids.to_pylist()]
    assert sorted(planned) == sorted(clip_ids)
    assert [plan.name for plan in plans] == [f"{number:06d}.tar" for number in range(len(plans))]
    for plan in plans:
        assert 1 <= len(plan.clip_ids) <= max_samples
        assert len(plan.clip_ids) == 1 or len(plan.clip_ids) * num_bytes <= limits.shard_bytes


def test_another_seed_is_another_order_and_neighbours_are_spread():
    clip_ids = [f"v{video}.{n}" for video in range(40) for n in range(25)]
    orders = [plan_shards(samples_table(clip_ids), PackSettings(seed=seed))[0].clip_ids.to_pylist() for seed in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    same_video = sum(a.split(".")[0] == b.split(".")[0] for a, b in zip(orders[0], orders[0][1:], strict=False))
    assert same_video < 60  # 25 of 999 are expected of a shuffle, 960 of none


def test_a_sample_holds_the_clip_its_frame_its_subtitle_and_everything_else(corpus):
    pack(corpus)
    with open_manifest(corpus) as connection:
        rows = connection.sql(
            "SELECT s.*, c.text, c.phash, c.sha256, c.frame_sha256, c.tar, c.mp4_offset AS clip_offset, c.frames "
            "FROM samples s JOIN clips c USING (clip_id)"
        )
        rows = rows.to_arrow_table().to_pylist()
    assert len(rows) == 12
    for row in rows:
        tar = corpus / "shards" / row["shard"]
        member = {ext: read_member(tar, row[f"{ext}_offset"], row[f"{ext}_bytes"]) for ext in packing.EXTENSIONS}
        frame = row["frames"][0]
        assert member["mp4"] == read_member(corpus / row["tar"], row["clip_offset"], row["mp4_bytes"])
        assert member["jpg"] == read_member(corpus / row["tar"], frame["offset"], frame["num_bytes"])
        values = json.loads(member["json"])
        assert member["txt"].decode() == row["text"] == values["subtitle"]
        assert (values["clip_id"], values["num_frames"]) == (row["clip_id"], row["num_frames"])
        assert (values["mp4_sha256"], values["jpg_sha256"]) == (row["sha256"], row["frame_sha256"])
        assert [int(value, 16) for value in values["phash"]] == row["phash"]
        assert None not in values.values()
        assert list(values) == sorted(values)


def test_packing_again_writes_nothing_and_packing_elsewhere_gives_the_same_bytes(corpus, tmp_path):
    pack(corpus)
    before = shard_bytes(corpus)
    assert pending_shards(corpus, plans_of(corpus)) == []
    pack(corpus)
    assert shard_bytes(corpus) == before
    other = make_corpus(tmp_path / "other")
    pack(other)
    assert shard_bytes(other) == before


def test_the_order_in_which_shards_are_written_does_not_show(corpus, tmp_path):
    pack(corpus)
    other = make_corpus(tmp_path / "other")
    with open_manifest(other) as connection:
        plans = plans_of(other)
        for plan in reversed(plans):
            write_shard(plan, shard_rows(connection, plan), other)
    commit_shards(other, plans)
    assert shard_bytes(other) == shard_bytes(corpus)


def test_new_captions_change_the_index_and_no_tar(corpus):
    pack(corpus)
    before = shard_bytes(corpus)
    change_manifest(corpus, "UPDATE captions SET text = text || ' again', score = -9 WHERE current")
    plans = plans_of(corpus)
    assert pending_shards(corpus, plans) == []
    with open_manifest(corpus) as connection:
        texts = connection.sql("SELECT clip_id, caption, captioner, caption_score FROM catalog").to_arrow_table()
    assert [refresh_index(corpus / "shards" / plan.index_name, texts) for plan in plans] == [True] * len(plans)
    assert [refresh_index(corpus / "shards" / plan.index_name, texts) for plan in plans] == [False] * len(plans)
    after = shard_bytes(corpus)
    assert [after[plan.name] for plan in plans] == [before[plan.name] for plan in plans]
    captions = dict(zip(texts["clip_id"].to_pylist(), texts["caption"].to_pylist(), strict=True))
    for plan in plans:
        rows = read_index(corpus / "shards" / plan.index_name)
        assert rows["caption"].to_pylist() == [captions[clip_id] for clip_id in rows["clip_id"].to_pylist()]
        assert set(rows["caption_score"].to_pylist()) <= {-9.0, None}
        assert read_stamp(corpus / "shards" / plan.index_name).plan_key == plan.key


def test_a_clip_whose_caption_had_failed_is_packed_anew_once_it_has_one(corpus, tmp_path):
    quiet = shutil.copytree(corpus, tmp_path / "quiet")
    pack(quiet)
    with open_manifest(corpus) as connection:
        clip_id = plans_of(corpus)[0].clip_ids[0].as_py()
        caption = connection.sql(f"SELECT * FROM captions WHERE clip_id = '{clip_id}'").to_arrow_table()
    _fail_caption(corpus, clip_id, transient=True)
    pack(corpus)
    without = shard_bytes(corpus)
    assert [name for name in without if without[name] != shard_bytes(quiet)[name]] == ["000000.parquet", "000000.tar"]
    pack(corpus)
    assert shard_bytes(corpus) == without, "there is nothing to do while it is pending"
    _heal_caption(corpus, caption)
    assert [plan.name for plan in pending_shards(corpus, plans_of(corpus))] == ["000000.tar"]
    pack(corpus)
    assert shard_bytes(corpus) == shard_bytes(quiet)


def test_a_failed_recaptioning_packs_nothing_anew(corpus):
    pack(corpus)
    with duckdb.connect(str(corpus / "manifest.duckdb")) as connection:
        connection.execute("INSERT INTO failures BY NAME SELECT 'caption' AS stage, clip_id AS item_id FROM clips")
    assert pending_shards(corpus, plans_of(corpus)) == []


def _fail_caption(root: Path, clip_id: str, transient: bool) -> None:
    with duckdb.connect(str(root / "manifest.duckdb")) as connection:
        connection.execute("DELETE FROM captions WHERE clip_id = ?", [clip_id])
        row = "SELECT 'caption' AS stage, ? AS item_id, 'worker-died' AS error_class, ? AS transient"
        connection.execute(f"INSERT INTO failures BY NAME {row}", [clip_id, transient])


def _heal_caption(root: Path, caption: pa.Table) -> None:
    with duckdb.connect(str(root / "manifest.duckdb")) as connection:
        connection.register("caption", caption)
        connection.execute("INSERT INTO captions BY NAME FROM caption")
        connection.execute("DELETE FROM failures WHERE stage = 'caption'")


def test_a_changed_subtitle_repacks_exactly_its_shard(corpus):
    plans = pack(corpus)
    clip_id = plans[1].clip_ids[2].as_py()
    change_manifest(corpus, f"UPDATE clips SET text = 'something else' WHERE clip_id = '{clip_id}'")
    assert [plan.name for plan in pending_shards(corpus, plans_of(corpus))] == [plans[1].name]


def test_a_smaller_selection_removes_what_is_left_over(corpus):
    assert len(pack(corpus)) == 3
    plans = pack(corpus, PackSettings(max_samples=5, where="num_frames = 2"))
    assert len(plans) == 1
    assert sorted(shard_bytes(corpus)) == ["000000.parquet", "000000.tar"]
    assert set(read_index(corpus / "shards/000000.parquet")["num_frames"].to_pylist()) == {2}
    pack(corpus, PackSettings(where="false"))
    assert shard_bytes(corpus) == {}


class Killed(BaseException):
    pass


def test_killed_anywhere_the_next_run_ends_in_the_same_bytes(corpus, tmp_path, monkeypatch):
    """Repacking with other settings is killed before its first rename or removal, before its second, and so on."""
    changed = PackSettings(shard_bytes=1_000_000, max_samples=7, seed=3)
    reference = shutil.copytree(corpus, tmp_path / "reference")
    pack(reference, changed)
    wanted = sorted(path.name for path in (reference / "shards").iterdir())
    pack(corpus)  # repacking replaces 3 shards by 2
    for step in range(100):
        copy = shutil.copytree(corpus, tmp_path / f"killed-{step}")
        if not _dies_at(step, lambda root=copy: pack(root, changed), monkeypatch):
            break
        pack(copy, changed)
        assert shard_bytes(copy) == shard_bytes(reference), f"killed before step {step}"
        assert sorted(path.name for path in (copy / "shards").iterdir()) == wanted
    assert 12 < step < 99


def _dies_at(step, work, monkeypatch) -> bool:
    """Run `work` until the step-th rename or removal of a file; return False if it ends earlier."""
    count = iter(range(1000))

    def dying(real):
        def call(*arguments, **options):
            if next(count) == step:
                raise Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "replace"), (shutil, "rmtree")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            work()
        except Killed:
            return True
    return False


def test_a_rerun_after_a_kill_reuses_complete_shards(corpus):
    plans = plans_of(corpus)
    with open_manifest(corpus) as connection:
        write_shard(plans[0], shard_rows(connection, plans[0]), corpus)
    assert [plan.name for plan in pending_shards(corpus, plans_of(corpus))] == [plan.name for plan in plans[1:]]


def test_a_deleted_or_truncated_shard_is_written_again(corpus):
    plans = pack(corpus)
    before = shard_bytes(corpus)
    (corpus / "shards/000000.tar").unlink()
    (corpus / "shards/000001.parquet").write_bytes(b"torn")
    with open(corpus / "shards/000002.tar", "r+b") as file:
        file.truncate(512)
    assert pending_shards(corpus, plans_of(corpus)) and len(pending_shards(corpus, plans_of(corpus))) == len(plans)
    pack(corpus)
    assert shard_bytes(corpus) == before


@pytest.mark.parametrize("column, kind", [("sha256", "mp4"), ("frames", "jpg")])
def test_media_that_are_not_the_clips_become_a_failure_never_a_sample(corpus, column, kind):
    clip_id = plans_of(corpus)[0].clip_ids[1].as_py()
    wrong = "'0000'" if column == "sha256" else "[{time_s: 0.0, sha256: '0000', \"offset\": 512, num_bytes: 9}]"
    change_manifest(corpus, f"UPDATE clips SET {column} = {wrong} WHERE clip_id = '{clip_id}'")
    plans = plans_of(corpus)
    plan = next(plan for plan in plans if clip_id in plan.clip_ids.to_pylist())
    with open_manifest(corpus) as connection:
        written = write_shard(plan, shard_rows(connection, plan), corpus)
    assert [(failed, error.error_class) for failed, error in written.failures] == [(clip_id, "hash-mismatch")]
    assert f"the {kind} at" in written.failures[0][1].message
    assert clip_id not in written.index["clip_id"].to_pylist()
    assert written.index["position"].to_pylist() == list(range(len(plan.clip_ids) - 1))
    assert plan not in pending_shards(corpus, plans)
    assert plan in pending_shards(corpus, plans, retry_missing=True)


def test_a_missing_clips_tar_fails_its_clips_only(corpus):
    change_manifest(corpus, "UPDATE clips SET tar = 'clips/gone.tar' WHERE num_frames = 3")
    settings = PackSettings()
    with open_manifest(corpus) as connection:
        [plan] = plan_shards(select_samples(connection, settings), settings)
        written = write_shard(plan, shard_rows(connection, plan), corpus)
    assert {error.error_class for _, error in written.failures} == {"tar-missing"}
    assert len(written.failures) == 3 and written.index.num_rows == 9


def test_members_can_be_left_out_and_their_order_in_the_setting_does_not_matter(corpus):
    assert PackSettings(members=("txt", "mp4")) == PackSettings(members=("mp4", "txt"))
    pack(corpus, PackSettings(members=("txt", "mp4")))
    names = [member.name for member in list_members(corpus / "shards/000000.tar")]
    assert {name.rpartition(".")[2] for name in names} == {"mp4", "txt"}
    assert read_index(corpus / "shards/000000.parquet")["json_offset"].null_count == 12


def test_a_local_source_is_named_without_its_folder(corpus):
    change_manifest(corpus, "UPDATE videos SET kind = 'file', url = '/home/someone/talks/a.mp4'")
    pack(corpus)
    row = read_index(corpus / "shards/000000.parquet").to_pylist()[0]
    text = read_member(corpus / "shards/000000.tar", row["json_offset"], row["json_bytes"])
    assert json.loads(text)["url"] == "a.mp4" and b"someone" not in text


def test_a_select_is_a_selection_too(corpus):
    where = "SELECT clip_id FROM clips ORDER BY num_bytes DESC, clip_id LIMIT 4 -- the largest"
    [plan] = plans_of(corpus, PackSettings(where=where))
    assert len(plan.clip_ids) == 4


@pytest.mark.parametrize(
    "where",
    ["nonsense >", "no_such_column = 1", "true); DROP TABLE clips; --", "SELECT video_id FROM videos", "n = 'x'"],
)
def test_a_wrong_condition_names_the_setting_and_the_columns(corpus, where):
    with pytest.raises(UserError, match="pack.where") as failure:
        plans_of(corpus, PackSettings(where=where))
    assert "caption_similarity" in str(failure.value) or "'x'" in str(failure.value)


@pytest.mark.parametrize("wrong", [{"members": []}, {"members": ["avi"]}, {"shard_bytes": 5}, {"max_samples": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        PackSettings(**wrong)


def test_the_manifest_can_list_samples_straight_from_the_indexes(corpus):
    plans = pack(corpus)
    publish_samples(corpus)
    with open_manifest(corpus) as connection:
        rows = connection.sql("SELECT clip_id FROM samples ORDER BY shard, position").fetchall()
    assert [row[0] for row in rows] == [clip_id for plan in plans for clip_id in plan.clip_ids.to_pylist()]
