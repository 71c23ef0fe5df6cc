"""Plain WebDataset tars train like a corpus: found by pattern, read by range, grouped as in WebDataset."""

import json
import tempfile
from collections import Counter
from hashlib import sha256

import fsspec
import pyarrow as pa
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from clipmill.base.errors import UserError
from shards.packing.tar import Sample, read_member, write_tar
from tests.helpers.loaders import select
from tests.helpers.shards import make_corpus, pack
from tests.helpers.tars import write_members
from training.data.plain_tars import expand_braces, index_tars, is_tars
from training.data.selection import Selection, freeze, freeze_run
from training.data.selection_schema import SELECTION
from training.settings import DataSettings, EvalSettings

NUM_CLIPS = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = make_corpus(tmp_path_factory.mktemp("tars") / "corpus", NUM_CLIPS)
    pack(root)
    return root


def members(key, **content):
    return {f"{key}.{name.replace('_', '.')}": value for name, value in content.items()}


# --- The same as with a manifest


def test_our_own_shards_give_what_their_manifest_gives(corpus):
    with_manifest, without = select(corpus), select(f"{corpus}/shards/*.tar")
    assert without.schema.equals(SELECTION) and without.num_rows == NUM_CLIPS
    for name in SELECTION.names:
        if name not in ("shard", "subtitle", "duplicate_group", "mp4_sha256", "jpg_sha256"):
            assert without[name].to_pylist() == with_manifest[name].to_pylist(), name
    assert without["shard"].to_pylist() == [f"{corpus}/{path}" for path in with_manifest["shard"].to_pylist()]
    assert without["subtitle"].to_pylist() == with_manifest["subtitle"].to_pylist()
    assert without["duplicate_group"].to_pylist() == with_manifest["duplicate_group"].to_pylist()


def test_one_clip_of_each_duplicate_group_is_kept_as_with_the_manifest(corpus):
    with_manifest, without = (select(source, "NOT is_duplicate") for source in (corpus, f"{corpus}/shards/*.tar"))
    assert without["clip_id"].to_pylist() == with_manifest["clip_id"].to_pylist()
    assert 0 < without.num_rows < NUM_CLIPS


def test_near_duplicates_that_no_json_names_are_found_by_their_hashes(tmp_path):
    """As in shards of a corpus of several volumes, which may be near-duplicates of each other."""
    picture, other = [0x0F0F00FF12345678] * 3, [0x123456789ABCDEF0] * 3
    clips = {"a": picture, "b": other, "c": [picture[0] ^ 1, *picture[1:]], "d": None, "e": other}
    for n, (key, hashes) in enumerate(clips.items()):
        facts = {"clip_id": key, "phash": hashes and [f"{value:016x}" for value in hashes]}
        facts |= {"duplicate_group": "named"} if key == "e" else {}
        write_tar(tmp_path / f"{n}.tar", [Sample(key, {"mp4": b"video", "json": json.dumps(facts).encode()})])
    rows = select(f"{tmp_path}/*.tar")
    groups = dict(zip(rows["clip_id"].to_pylist(), rows["duplicate_group"].to_pylist(), strict=True))
    assert groups == {"a": "a", "b": None, "c": "a", "d": None, "e": "named"}
    for wrong in ("0f0f", ["xyz"], [1, 2, 3], ["f" * 16, "f" * 17], {"a": 1}):
        facts = json.dumps({"phash": wrong}).encode()
        write_tar(tmp_path / "0.tar", [Sample("a", {"mp4": b"video", "json": facts})])
        assert select(f"{tmp_path}/0.tar")["duplicate_group"].to_pylist() == [None]


def test_offsets_give_what_webdataset_reads(corpus):
    pattern = f"{corpus}/shards/{{000000..000007}}.tar"
    theirs = {sample["__key__"]: sample for sample in wds.WebDataset(pattern, shardshuffle=False)}
    ours = select(pattern)
    assert len(theirs) == ours.num_rows == NUM_CLIPS
    for row in ours.to_pylist():
        video_id, n = row["clip_id"].rsplit(".", 1)
        sample = theirs[f"{video_id}_{int(n):04d}"]
        assert read_member(row["shard"], row["mp4_offset"], row["mp4_bytes"]) == sample["mp4"]
        assert read_member(row["shard"], row["jpg_offset"], row["jpg_bytes"]) == sample["jpg"]
        assert row["subtitle"] == sample["txt"].decode()
        assert row["caption"] == json.loads(sample["json"]).get("caption")


def test_a_run_is_frozen_from_tars_and_held_out_clips_are_guarded(corpus, tmp_path):
    pattern = f"{corpus}/shards/*.tar"
    held_out = "video_id = (SELECT min(video_id) FROM catalog)"
    data = DataSettings(where="num_frames > 2")
    training, evaluation = freeze_run(tmp_path, pattern, data, EvalSettings(where=held_out, overlap="allow"))
    assert 0 < evaluation.num_clips < NUM_CLIPS and training.num_shared > 0
    trained = Selection(tmp_path / "selection.arrow")
    assert trained.root == "" and min(trained.column("num_frames").to_pylist()) > 2
    with pytest.raises(UserError, match="eval.overlap"):
        freeze_run(tmp_path, pattern, DataSettings(), EvalSettings(where=held_out))


def test_a_condition_on_an_unknown_column_lists_the_columns_of_tars(corpus):
    with pytest.raises(UserError, match="data.where.*motion(.|\n)*clip_id, video_id, shard"):
        select(f"{corpus}/shards/*.tar", "motion > 0.1")


def test_tars_of_a_bucket_are_read_there(corpus):
    memory = fsspec.filesystem("memory")
    for path in (corpus / "shards").glob("*.tar"):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    remote, local = select("memory://bucket/*.tar"), select(f"{corpus}/shards/*.tar")
    assert remote.drop_columns("shard").equals(local.drop_columns("shard"))
    assert remote["shard"][0].as_py() == "memory:///bucket/000000.tar"
    assert select("memory://bucket/{000000..000001}.tar").num_rows == 10


def test_renaming_or_growing_a_tar_changes_the_snapshot_only_with_its_clips(corpus, tmp_path):
    def snapshot(pattern):
        freeze(tmp_path / "s.arrow", pattern)
        return Selection(tmp_path / "s.arrow").snapshot

    whole = snapshot(f"{corpus}/shards/*.tar")
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (corpus / "shards").glob("*.tar"):
        (moved / path.name).write_bytes(path.read_bytes())
    assert snapshot(f"{moved}/*.tar") == whole
    assert snapshot(f"{moved}/{{000000..000006}}.tar") != whole


# --- What a pattern means


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{000000..000006..3}.tar", ["000000.tar", "000003.tar", "000006.tar"]),
        ("{2..0}.tar", ["2.tar", "1.tar", "0.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{x,{1..2}}.tar", ["x.tar", "1.tar", "2.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_mean_what_a_shell_takes_them_for(pattern, expected):
    assert sorted(expand_braces(pattern)) == sorted(expected)


def test_a_folder_is_a_corpus_and_a_tar_is_not(tmp_path):
    (tmp_path / "corpus.tar").mkdir()
    assert not is_tars(str(tmp_path)) and not is_tars(str(tmp_path / "corpus.tar")) and not is_tars("corpus")
    for pattern in ("a.tar", "s/{0..3}.tar", "s/*.tar", "s3://b/x-{00..10}.tar", "a.tar.gz", "{a,b}.tar"):
        assert is_tars(pattern), pattern


@pytest.mark.parametrize("pattern", ["absent.tar", "absent-*.tar", "absent-{0..3}.tar", "memory://absent/*.tar"])
def test_a_pattern_without_tars_is_an_error(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--corpus.*absent"):
        select(pattern)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_compressed_tars_are_refused(tmp_path, name):
    write_members(tmp_path / name, members("k", mp4=b"video"), mode="w:gz")
    with pytest.raises(UserError, match="compressed"):
        select(str(tmp_path / name))


# --- What a tar may hold


def test_members_are_grouped_by_the_first_dot_of_their_name(tmp_path):
    content = {
        "a/one.mp4": b"1",
        "a/one.txt": b"first",
        "a.b/one.MP4": b"22",
        "two.0.jpg": b"not the still",
        "two.jpeg": b"333",
        "two.webm": b"4444",
        "three.txt": b"no video",
        "README": b"no extension",
    }
    write_members(tmp_path / "x.tar", content)
    index = index_tars([str(tmp_path / "x.tar")])
    rows = index.samples.to_pylist()
    assert [(row["clip_id"], row["mp4_bytes"], row["jpg_bytes"], row["subtitle"]) for row in rows] == [
        ("a/one", 1, None, "first"),
        ("a.b/one", 2, None, None),
        ("two", 4, 3, None),
    ]
    assert [(problem.item_id, problem.error_class) for problem in index.problems] == [
        (f"{tmp_path}/x.tar/three.txt", "text-without-video")
    ]


@given(order=st.permutations([f"{key}.{name}" for key in ("a", "d/b", "c") for name in ("mp4", "txt", "json", "jpg")]))
def test_members_belong_together_wherever_they_lie_in_the_tar(order):
    """Written by `tar` without --sort=name, a tar holds all videos first and then all texts, or any order."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.tar"
        content = {"mp4": "v of {}", "txt": "said in {}", "json": '{{"caption": "seen in {}"}}', "jpg": "j of {}"}
        named = [(name, *name.split(".")) for name in order]
        write_members(path, [(name, content[kind].format(key).encode()) for name, key, kind in named])
        index = index_tars([path])
        assert index.problems == []
        rows = {row["clip_id"]: row for row in index.samples.to_pylist()}
        assert set(rows) == {"a", "d/b", "c"}
        for key, row in rows.items():
            assert (row["subtitle"], row["caption"]) == (f"said in {key}", f"seen in {key}")
            assert read_member(path, row["mp4_offset"], row["mp4_bytes"]) == f"v of {key}".encode()
            assert read_member(path, row["jpg_offset"], row["jpg_bytes"]) == f"j of {key}".encode()


def test_names_with_dots_are_samples_of_their_own(tmp_path):
    content = {
        "talk.12.mp4": b"1", "talk.12.txt": b"twelve", "talk.13.txt": b"thirteen", "talk.13.mp4": b"22",
        "d.e/v1.5 cut.webm": b"333", "d.e/v1.5 cut.json": b'{"caption": "seen"}',
    }  # fmt: skip
    write_members(tmp_path / "x.tar", content)
    index = index_tars([str(tmp_path / "x.tar")])
    assert [
        (row["clip_id"], row["mp4_bytes"], row["subtitle"], row["caption"]) for row in index.samples.to_pylist()
    ] == [
        ("talk.12", 1, "twelve", None),
        ("talk.13", 2, "thirteen", None),
        ("d.e/v1.5 cut", 3, None, "seen"),
    ]
    assert index.problems == []


def test_what_belongs_to_no_sample_is_named(tmp_path):
    content = {
        "a.mp4": b"1", "a.small.mp4": b"2", "a.small.txt": b"of the small one", "a.txt": b"of a",
        "b.mp4": b"3", "b.en.txt": b"in English", "texts/c.txt": b"elsewhere", "videos/c.mp4": b"4", "e.1.txt": b"none",
    }  # fmt: skip
    write_members(tmp_path / "x.tar", content)
    index = index_tars([str(tmp_path / "x.tar")])
    assert index.samples["clip_id"].to_pylist() == ["a", "b", "videos/c"]
    assert Counter(
        (problem.item_id.removeprefix(f"{tmp_path}/x.tar/"), problem.error_class) for problem in index.problems
    ) == {
        ("a.small", "unused-members"): 1,
        ("b.en", "unused-members"): 1,
        ("texts/c.txt", "text-without-video"): 1,
        ("e.1.txt", "text-without-video"): 1,
    }
    notes = freeze(tmp_path / "s.arrow", str(tmp_path / "x.tar")).notes()
    assert any("2 text-without-video" in note for note in notes)


def test_texts_and_ids_come_from_txt_and_json(tmp_path):
    facts = {"clip_id": "v.7", "video_id": "v", "caption": "c", "num_frames": 9, "subtitle": "not this"}
    content = members("k0", mp4=b"0", txt="größe".encode(), json=json.dumps(facts).encode())
    content |= members("k1", json=json.dumps({"text": "said", "captions": ["one", "two"]}).encode(), mp4=b"1")
    content |= members("k2", json=json.dumps({"caption": 5, "num_frames": "9", "clip_id": None}).encode(), mp4=b"2")
    content |= members("k3", json=b'{"subtitle": "\\ud800 half"}', mp4=b"3")
    write_members(tmp_path / "x.tar", content)
    rows = index_tars([str(tmp_path / "x.tar")]).samples.to_pylist()
    columns = ("clip_id", "video_id", "subtitle", "caption", "num_frames")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        ("v.7", "v", "größe", "c", 9),
        ("k1", "k1", "said", "one", None),
        ("k2", "k2", None, None, None),
        ("k3", "k3", "? half", None, None),
    ]


def test_repeated_keys_become_different_clips(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("0", "1"):
            write_members(
                tmp_path / folder / f"{name}.tar", members("k", mp4=b"x") | members(f"own{folder}{name}", mp4=b"y")
            )
    table = index_tars([str(tmp_path / "*/*.tar")]).samples
    ids = table["clip_id"].to_pylist()
    assert len(set(ids)) == 8 and {"owna0", "owna1", "ownb0", "ownb1"} <= set(ids)
    assert table["video_id"].to_pylist() == ids  # different clips with one key do not belong to one video
    (tmp_path / "b").rename(tmp_path / "c")
    assert "0/k" in index_tars([str(tmp_path / "a/*.tar")]).samples["clip_id"].to_pylist()


def test_long_names_and_extension_headers_are_followed(tmp_path):
    for format in ("pax", "gnu"):
        write_members(tmp_path / f"{format}.tar", members("ü" + 150 * "k", mp4=b"video", txt=b"text"), format=format)
        path = str(tmp_path / f"{format}.tar")
        (row,) = index_tars([path]).samples.to_pylist()
        assert row["clip_id"] == "ü" + 150 * "k" and row["subtitle"] == "text"
        assert read_member(path, row["mp4_offset"], row["mp4_bytes"]) == b"video"


def test_links_and_devices_are_neither_followed_nor_forgotten(tmp_path):
    write_members(
        tmp_path / "x.tar",
        members("good", mp4=b"video"),
        links={"evil.mp4": "/etc/passwd", "evil.txt": "/etc/shadow"},
        devices=["null.mp4"],
        folders=["folder"],
    )
    index = index_tars([str(tmp_path / "x.tar")])
    assert index.samples["clip_id"].to_pylist() == ["good"]
    assert Counter(problem.message for problem in index.problems) == {
        "2 links among its members": 1,
        "1 devices among its members": 1,
    }


# --- What is wrong becomes a row


@pytest.mark.parametrize("cut", [1, 300, 512, 700, 2000, 5000])
def test_the_readable_part_of_a_torn_tar_is_used(tmp_path, cut):
    content = {}
    for number in range(6):
        content |= members(f"k{number}", mp4=bytes([number]) * 700, txt=b"text")
    write_members(tmp_path / "whole.tar", content)
    whole = index_tars([str(tmp_path / "whole.tar")]).samples
    data = (tmp_path / "whole.tar").read_bytes().rstrip(b"\0")
    (tmp_path / "torn.tar").write_bytes(data[: len(data) - cut])
    index = index_tars([str(tmp_path / "torn.tar")])
    assert 0 < index.samples.num_rows <= whole.num_rows
    for row in index.samples.to_pylist():
        assert len(read_member(row["shard"], row["mp4_offset"], row["mp4_bytes"])) == 700
    assert [problem.error_class for problem in index.problems] == ["torn-tar"]
    choice = freeze(tmp_path / "s.arrow", str(tmp_path / "{torn,whole}.tar"))
    assert any("1 torn-tar" in note and "torn.tar" in note for note in choice.notes())


def test_rubbish_in_the_middle_ends_what_is_read(tmp_path):
    write_members(tmp_path / "x.tar", members("a", mp4=b"1") | members("b", mp4=b"2") | members("c", mp4=b"3"))
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[1024 : 1024 + 512] = b"\xff" * 512
    (tmp_path / "x.tar").write_bytes(data)
    index = index_tars([str(tmp_path / "x.tar")])
    assert index.samples["clip_id"].to_pylist() == ["a"]
    assert [problem.error_class for problem in index.problems] == ["torn-tar"]


def test_a_file_that_is_no_tar_is_a_row_where_others_are(tmp_path):
    write_members(tmp_path / "good.tar", members("a", mp4=b"1"))
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    index = index_tars([str(tmp_path / "*.tar")])
    assert index.samples.num_rows == 1
    assert sorted(problem.item_id for problem in index.problems) == [
        str(tmp_path / "bad.tar"),
        str(tmp_path / "empty.tar"),
    ]
    with pytest.raises(UserError, match="it picks no clip"):
        select(str(tmp_path / "bad.tar"))


def test_bad_texts_are_rows_and_the_clip_stays(tmp_path):
    content = members("a", mp4=b"1", json=b"{not json") | members("b", mp4=b"2", txt=b"\xff\xfe")
    content |= members("c", mp4=b"3", json=b"[1]") | members("d", mp4=b"4", txt=b"x" * (1 << 20) + b"x")
    write_members(tmp_path / "x.tar", content)
    index = index_tars([str(tmp_path / "x.tar")])
    assert index.samples.num_rows == 4 and index.samples["subtitle"].null_count == 4
    assert Counter(problem.error_class for problem in index.problems) == {
        "bad-json": 2,
        "bad-text": 1,
        "text-too-long": 1,
    }


def test_a_sample_with_one_member_twice_keeps_the_first(tmp_path):
    write_members(tmp_path / "x.tar", [("a.mp4", b"1"), ("a.mp4", b"22")])
    index = index_tars([str(tmp_path / "x.tar")])
    assert index.samples["mp4_bytes"].to_pylist() == [1]
    assert [problem.error_class for problem in index.problems] == ["repeated-member"]


def test_order_does_not_depend_on_which_tar_was_read_first(tmp_path):
    for number in range(20):
        write_members(tmp_path / f"{number:02d}.tar", members(f"k{number}", mp4=sha256(bytes([number])).digest()))
    tables = [index_tars([str(tmp_path / "*.tar")]).samples for _ in range(3)]
    assert tables[0]["clip_id"].to_pylist() == [f"k{number}" for number in range(20)]
    assert all(isinstance(table, pa.Table) and table.equals(tables[0]) for table in tables)
