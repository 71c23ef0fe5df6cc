"""SQL selects the clips, order and texts of a run; mistakes name their setting."""

import os
import shutil
from hashlib import sha256

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipmill.base.errors import UserError
from shards.packing.index import refresh_index
from shards.packing.tar import read_member
from shards.query.sql import open_manifest
from tests.helpers.loaders import select
from tests.helpers.shards import change_manifest, make_corpus, pack, publish_samples
from training.data.epoch_plan import hash_selection
from training.data.selection import Selection, freeze
from training.data.selection_schema import SELECTION

NUM_CLIPS = 40


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = make_corpus(tmp_path_factory.mktemp("selected") / "corpus", NUM_CLIPS)
    pack(root)
    return root


@pytest.fixture
def corpus(packed, tmp_path):
    """Copy the corpus for a test that changes it."""
    return shutil.copytree(packed, tmp_path / "corpus")


def ask(corpus, sql):
    with open_manifest(corpus) as connection:
        return connection.sql(sql).fetchall()


def frozen(path, corpus, where="", **options):
    freeze(path, corpus, where, **options)
    return Selection(path)


# --- Which clips


def test_no_condition_means_every_sample_in_the_order_of_the_shards(packed):
    table = select(packed)
    expected = ask(packed, "SELECT clip_id, 'shards/' || shard, mp4_offset FROM samples ORDER BY shard, mp4_offset")
    assert table.schema.equals(SELECTION)
    assert list(zip(*(table[n].to_pylist() for n in ("clip_id", "shard", "mp4_offset")), strict=True)) == expected
    assert len(expected) == NUM_CLIPS and table["shard"].to_pylist() == sorted(table["shard"].to_pylist())


def test_offsets_point_at_the_clips_own_bytes(packed):
    hashes = dict(ask(packed, "SELECT clip_id, [mp4_sha256, jpg_sha256] FROM samples"))
    for row in select(packed).to_pylist():
        media = [read_member(packed / row["shard"], row[f"{m}_offset"], row[f"{m}_bytes"]) for m in ("mp4", "jpg")]
        assert [sha256(data).hexdigest() for data in media] == hashes[row["clip_id"]]


@pytest.mark.parametrize(
    "where",
    [
        "num_words > 10 AND motion < 0.2",
        "SELECT clip_id FROM clips WHERE num_words > 10 AND motion < 0.2",
        "with k as (select * from catalog) SELECT clip_id, 1 AS n FROM k WHERE num_words > 10 AND motion < 0.2;",
        "num_words > 10 AND motion < 0.2 -- a comment",
    ],
)
def test_a_condition_and_a_query_pick_the_same(packed, where):
    expected = ask(packed, "SELECT clip_id FROM clips WHERE num_words > 10 AND motion < 0.2")
    assert 0 < len(expected) < NUM_CLIPS
    assert sorted(select(packed, where)["clip_id"].to_pylist()) == sorted(row[0] for row in expected)


def test_a_query_that_names_a_clip_twice_gives_it_once(packed):
    twice = "SELECT clip_id FROM clips UNION ALL SELECT clip_id FROM clips"
    assert select(packed, twice).equals(select(packed))


def test_a_selection_may_join_a_table_of_feedback(packed, tmp_path):
    clip_ids = [row[0] for row in ask(packed, "SELECT clip_id FROM samples ORDER BY 1")]
    pq.write_table(pa.table({"clip_id": clip_ids, "loss": range(NUM_CLIPS)}), tmp_path / "feedback.parquet")
    where = "SELECT clip_id FROM feedback WHERE loss < 7"
    table = select(packed, where, tables={"feedback": tmp_path / "feedback.parquet"})
    assert sorted(table["clip_id"].to_pylist()) == clip_ids[:7]


def test_clips_that_are_in_no_shard_are_counted(corpus, tmp_path):
    change_manifest(corpus, "DELETE FROM samples WHERE shard = '000000.tar'")
    num_left = ask(corpus, "SELECT count(*) FROM samples")[0][0]
    choice = freeze(tmp_path / "s.arrow", corpus, "true")
    assert (choice.num_clips, choice.num_unpacked) == (num_left, NUM_CLIPS - num_left)
    assert [f"{NUM_CLIPS - num_left} selected clips are in no shard" in note for note in choice.notes()] == [True]


# --- Mistakes


@pytest.mark.parametrize("setting", ["data.where", "eval.where"])
@pytest.mark.parametrize(
    "where, message",
    [
        ("no_such_column > 1", "no_such_column"),
        ("SELECT video_id FROM clips", "clip_id"),
        ("num_words >", "syntax error"),
        ("true); DROP TABLE clips; SELECT (1", "One statement"),
        ("num_words < 0", "it picks no clip"),
        ("text::INT > 3", "Could not convert"),  # found only when a row is reached
        ("SELECT clip_id FROM read_parquet('/etc/passwd')", "disabled"),
    ],
)
def test_a_mistake_names_its_setting(packed, setting, where, message):
    with pytest.raises(UserError, match=message) as caught:
        select(packed, where, setting=setting)
    assert str(caught.value).startswith(setting)


def test_clips_of_which_none_is_packed_say_how_to_pack_them(corpus, tmp_path):
    change_manifest(corpus, "DELETE FROM samples")
    with pytest.raises(UserError, match=rf"picks {NUM_CLIPS} clips.*clipmill run pack"):
        freeze(tmp_path / "s.arrow", corpus, "true")
    assert not (tmp_path / "s.arrow").exists()


def test_a_folder_without_a_manifest_is_an_error(tmp_path):
    with pytest.raises(UserError, match="manifest.duckdb"):
        select(tmp_path)


# --- What it is known by


def test_the_hash_is_that_of_the_snapshot_and_the_ids_in_order(packed, tmp_path):
    selection = frozen(tmp_path / "s.arrow", packed, "num_words > 10")
    assert selection.hash == hash_selection(selection.snapshot, selection.column("clip_id").to_pylist())


def test_a_corpus_that_moved_has_the_same_hash(corpus, tmp_path):
    before = frozen(tmp_path / "before.arrow", corpus)
    os.rename(corpus, tmp_path / "elsewhere")
    after = frozen(tmp_path / "after.arrow", tmp_path / "elsewhere")
    assert (before.root, after.root) == (str(corpus), str(tmp_path / "elsewhere"))
    assert (before.hash, before.snapshot) == (after.hash, after.snapshot)


@pytest.mark.parametrize("column", ["mp4_sha256", "jpg_sha256"])
def test_other_bytes_of_one_clip_change_the_snapshot(corpus, tmp_path, column):
    before = frozen(tmp_path / "before.arrow", corpus)
    change_manifest(corpus, f"UPDATE samples SET {column} = 'other' WHERE position = 2 AND shard = '000001.tar'")
    after = frozen(tmp_path / "after.arrow", corpus)
    assert before.snapshot != after.snapshot and before.hash != after.hash


def test_clips_beyond_the_selection_do_not_change_it(corpus, tmp_path):
    before = frozen(tmp_path / "before.arrow", corpus, "num_words > 10")
    change_manifest(corpus, "UPDATE samples SET mp4_sha256 = 'other' WHERE clip_id IN "
                            "(SELECT clip_id FROM clips WHERE num_words <= 10)")  # fmt: skip
    assert frozen(tmp_path / "after.arrow", corpus, "num_words > 10").hash == before.hash


# --- Texts


def test_a_recaptioned_corpus_is_used_without_packing_again(corpus, tmp_path):
    before = frozen(tmp_path / "before.arrow", corpus)
    clip_ids = before.column("clip_id").to_pylist()
    tars = {path: path.read_bytes() for path in (corpus / "shards").glob("*.tar")}
    texts = pa.table({"clip_id": clip_ids, "caption": [f"new caption of {clip_id}" for clip_id in clip_ids]})
    for path in (corpus / "shards").glob("*.parquet"):
        refresh_index(path, texts)
    publish_samples(corpus)
    after = frozen(tmp_path / "after.arrow", corpus)
    assert after.column("caption").to_pylist() == texts["caption"].to_pylist()
    assert Selection(tmp_path / "before.arrow").column("caption").to_pylist() != texts["caption"].to_pylist()
    assert after.hash == before.hash  # the order of training does not depend on texts
    assert tars == {path: path.read_bytes() for path in tars}


def test_texts_are_those_of_the_samples(packed):
    table = select(packed)
    rows = ask(packed, "SELECT clip_id, subtitle, caption, num_frames FROM samples ORDER BY shard, mp4_offset")
    assert (
        list(zip(*(table[n].to_pylist() for n in ("clip_id", "subtitle", "caption", "num_frames")), strict=True))
        == rows
    )
    groups = "SELECT duplicate_group FROM samples p LEFT JOIN scores s USING (clip_id) ORDER BY p.shard, mp4_offset"
    assert table["duplicate_group"].to_pylist() == [row[0] for row in ask(packed, groups)]
