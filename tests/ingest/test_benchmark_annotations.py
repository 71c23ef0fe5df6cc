"""The published annotation files become sources with split, reference texts and spans, as each protocol uses them."""

import json
import re
import shutil

import pyarrow as pa

from pipeline.stages.ingest.ingest import IngestSettings, ingest
from shards.corpus.schema import TABLES
from shards.corpus.source_ids import ID_PATTERN
from tests.helpers import benchmarks
from tests.helpers.benchmarks import DIDEMO_VIDEOS, LSMDC_CLIPS, MSVD_VIDEOS, VATEX_VIDEOS, put

NOTHING = TABLES["sources"].append(pa.field("unit", pa.string())).empty_table()
WHOLE = [{"n": 0, "start_s": 0.0, "end_s": None}]


def read(argument) -> dict[str, dict]:
    """Return the sources by their benchmark names; fail on any problem."""
    found = ingest([str(argument)], IngestSettings(), NOTHING)
    assert found.problems == []
    return {row["source_id"]: row for row in found.table.to_pylist()}


def texts(row: dict) -> list[str]:
    assert {entry["n"] for entry in row["texts"]} == {0} and row["spans"][0]["n"] == 0
    return [entry["text"] for entry in row["texts"]]


def splits(rows: dict[str, dict]) -> dict[str, str]:
    return {name: row["split"] for name, row in rows.items()}


def test_msrvtt_trains_on_all_sentences_and_tests_1ka_on_one(tmp_path):
    rows = read(f"msrvtt:{benchmarks.msrvtt(tmp_path)}")
    assert splits(rows) == {f"video{i}": "train" if i < 3 else "test" for i in range(5)}
    assert texts(rows["video1"]) == [f"caption {k} of 1" for k in range(20)]
    assert texts(rows["video3"]) == ["the one sentence, of 3"]
    assert all(row["spans"] == WHOLE and row["kind"] == "file" for row in rows.values())
    assert [row["video_id"] for row in rows.values()] == list(rows)
    extra = json.loads(rows["video1"]["extra"])
    assert (extra["benchmark"], extra["category"], extra["start_s"]) == ("msrvtt", 1, 137.72)


def test_msrvtt_7k_leaves_out_what_its_list_leaves_out(tmp_path):
    rows = read(f"msrvtt-7k:{benchmarks.msrvtt(tmp_path)}")
    assert splits(rows) == {"video0": "train", "video1": "train", "video3": "test", "video4": "test"}
    assert len(texts(rows["video0"])) == 20


def test_msrvtt_full_has_its_own_split_and_all_sentences_everywhere(tmp_path):
    rows = read(f"msrvtt-full:{benchmarks.msrvtt(tmp_path)}")
    assert splits(rows) == {"video0": "train", "video1": "train", "video2": "train", "video3": "val", "video4": "test"}
    assert {len(texts(row)) for row in rows.values()} == {20}


def test_msrvtt_in_the_two_files_of_its_first_release_says_the_same(tmp_path):
    benchmarks.msrvtt(tmp_path)
    expected = read(f"msrvtt-full:{tmp_path}")
    data = json.loads((tmp_path / "MSRVTT_data.json").read_text())
    (tmp_path / "MSRVTT_data.json").unlink()
    for name, chosen in (
        ("train_val_videodatainfo.json", ("train", "validate")),
        ("test_videodatainfo.json", ("test",)),
    ):
        videos = [video for video in data["videos"] if video["split"] in chosen]
        ids = {video["video_id"] for video in videos}
        sentences = [sentence for sentence in data["sentences"] if sentence["video_id"] in ids]
        put(tmp_path / "annotation" / name, {"videos": videos, "sentences": sentences})
    assert read(f"msrvtt-full:{tmp_path}") == expected


def test_the_lists_of_clip_vip_say_the_same(tmp_path):
    benchmarks.msrvtt(tmp_path)
    expected = {name: (row["split"], row["texts"]) for name, row in read(f"msrvtt:{tmp_path}").items()}
    train = [{"clip_id": f"video{i}", "text": [f"caption {k} of {i}" for k in range(20)]} for i in range(3)]
    test = [{"clip_id": f"video{i}", "text": f"the one sentence, of {i}"} for i in (3, 4)]
    for name, lines in (("train9k.jsonl", train), ("test1ka.jsonl", test)):
        put(tmp_path / name, "".join(json.dumps(line) + "\n" for line in lines))
    for name in ("MSRVTT_data.json", "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv"):
        (tmp_path / name).unlink()
    assert {name: (row["split"], row["texts"]) for name, row in read(f"msrvtt:{tmp_path}").items()} == expected


def test_msvd_has_many_sentences_and_three_lists(tmp_path):
    rows = read(f"msvd:{benchmarks.msvd(tmp_path)}")
    assert splits(rows) == dict(zip(MSVD_VIDEOS, ("train", "val", "test"), strict=True))
    assert texts(rows[MSVD_VIDEOS[0]]) == ["a bird 0", "a bird 1", "a bird 2"]


def test_msvd_as_text_and_as_collected_says_the_same(tmp_path):
    benchmarks.msvd(tmp_path)
    expected = read(f"msvd:{tmp_path}")
    (tmp_path / "raw-captions.pkl").unlink()
    lines = [f"{video} a bird {k}" for video in MSVD_VIDEOS for k in range(3)]
    path = put(tmp_path / "AllVideoDescriptions.txt", "\n".join(["# English only", "", *lines]))
    assert read(f"msvd:{tmp_path}") == expected
    path.unlink()
    columns = "VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description"
    cells = [(*video.rsplit("_", 2), k) for video in MSVD_VIDEOS for k in range(3)]
    table = [
        f'{v},{a},{b},1,clean,30,English,"a bird {k}"\n{v},{a},{b},1,clean,30,German,Vogel' for v, a, b, k in cells
    ]
    put(tmp_path / "video_corpus.csv", "\r\n".join([columns, *table]))
    assert read(f"msvd:{tmp_path}") == expected


def test_lsmdc_clips_are_files_with_dots_in_their_names(tmp_path):
    rows = read(f"lsmdc:{benchmarks.lsmdc(tmp_path)}")
    assert splits(rows) == dict(zip(LSMDC_CLIPS, ("train", "train", "test"), strict=True))
    assert texts(rows[LSMDC_CLIPS[0]]) == ['SOMEONE says "no".', "He leaves."]
    ids = {row["video_id"] for row in rows.values()}
    assert len(ids) == 3 and all(re.fullmatch(ID_PATTERN, video_id) for video_id in ids)


def test_didemo_is_a_paragraph_about_what_annotators_saw(tmp_path):
    rows = read(f"didemo:{benchmarks.didemo(tmp_path)}")
    assert splits(rows) == dict(zip(DIDEMO_VIDEOS, ("train", "test"), strict=True))
    assert texts(rows[DIDEMO_VIDEOS[0]]) == ["someone kicks the bug. the camera pans"]
    assert {tuple(row["spans"][0].values()) for row in rows.values()} == {(0, 0.0, 31.0)}


def test_didemo_s_lists_decide_where_they_are_there(tmp_path):
    benchmarks.didemo(tmp_path)
    put(tmp_path / "train_list.txt", f"{DIDEMO_VIDEOS[1]}\n")
    (tmp_path / "test_data.json").rename(tmp_path / "other.json")
    found = ingest([f"didemo:{tmp_path}"], IngestSettings(), NOTHING)
    assert found.table.num_rows == 0  # the listed video has no description, the described one is not listed
    assert [problem.error_class for problem in found.problems] == ["no-text"]


def test_didemo_moments_are_clips_of_the_pieces_that_most_chose(tmp_path):
    row = read(f"didemo-moments:{benchmarks.didemo(tmp_path)}")[DIDEMO_VIDEOS[0]]
    assert row["spans"] == [{"n": 0, "start_s": 20.0, "end_s": 25.0}, {"n": 1, "start_s": 0.0, "end_s": 10.0}]
    assert row["texts"] == [{"n": 0, "text": "someone kicks the bug."}, {"n": 1, "text": "the camera pans"}]


def test_activitynet_is_a_paragraph_and_val1_its_test(tmp_path):
    rows = read(f"activitynet:{benchmarks.activitynet(tmp_path)}")
    assert splits(rows) == {"v_QOlSCBRmfWY": "train", "v_uqiMw7tQ1Cc": "val1"}
    assert texts(rows["v_QOlSCBRmfWY"]) == ["A woman stands. She speaks."]
    assert texts(rows["v_uqiMw7tQ1Cc"]) == ["A weight lifting tutorial. He lifts."]
    assert rows["v_uqiMw7tQ1Cc"]["url"].endswith("/uqiMw7tQ1Cc.mkv") and rows["v_uqiMw7tQ1Cc"]["spans"] == WHOLE


def test_activitynet_moments_are_clips_with_their_timestamps(tmp_path):
    row = read(f"activitynet-moments:{benchmarks.activitynet(tmp_path)}")["v_QOlSCBRmfWY"]
    assert row["spans"] == [{"n": 0, "start_s": 0.0, "end_s": 15.5}, {"n": 1, "start_s": 10.0, "end_s": 25.5}]
    assert row["texts"] == [{"n": 0, "text": "A woman stands."}, {"n": 1, "text": "She speaks."}]


def test_vatex_has_ten_sentences_of_one_language(tmp_path):
    rows = read(f"vatex:{benchmarks.vatex(tmp_path)}")
    assert splits(rows) == dict(zip(VATEX_VIDEOS, ("train", "val"), strict=True))
    assert texts(rows[VATEX_VIDEOS[0]]) == [f"en {k}" for k in range(10)]
    assert texts(read(f"vatex-zh:{tmp_path}")[VATEX_VIDEOS[0]]) == [f"中 {k}" for k in range(10)]


def test_vatex_s_split_can_be_given_by_lists(tmp_path):
    benchmarks.vatex(tmp_path)
    put(tmp_path / "test_list.txt", "\n".join(VATEX_VIDEOS))
    assert set(splits(read(f"vatex:{tmp_path}")).values()) == {"test"}


def test_videos_may_lie_on_another_disk(tmp_path):
    benchmarks.msrvtt(tmp_path / "here")
    expected = read(f"msrvtt:{tmp_path / 'here'}")
    (tmp_path / "here" / "videos").rename(tmp_path / "disk")
    (tmp_path / "here" / "videos").symlink_to(tmp_path / "disk")
    linked = read(f"msrvtt:{tmp_path / 'here'}")
    assert [row["url"] for row in linked.values()] == [str(tmp_path / "disk" / f"{name}.mp4") for name in linked]
    assert [row["texts"] for row in linked.values()] == [row["texts"] for row in expected.values()]


def test_ids_do_not_depend_on_where_the_folder_lies(tmp_path):
    benchmarks.lsmdc(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    ids = [{n: row["video_id"] for n, row in read(f"lsmdc:{tmp_path / name}").items()} for name in ("a", "b")]
    assert ids[0] == ids[1]


def test_any_list_may_carry_split_and_texts(tmp_path):
    rows = [
        {"url": "http://h/1.mp4", "split": "test", "texts": ["one", " two "], "note": "kept"},
        {"url": "http://h/2.mp4", "split": "train", "clips": [{"n": 4, "start_s": 1, "end_s": 3}],
         "texts": [{"n": 4, "text": "of the piece"}]},
        {"url": "http://h/3.mp4"},
    ]  # fmt: skip
    put(tmp_path / "own.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = ingest([str(tmp_path / "own.jsonl")], IngestSettings(), NOTHING).table.to_pylist()
    assert (first["split"], first["spans"], texts(first)) == ("test", WHOLE, ["one", "two"])
    assert json.loads(first["extra"]) == {"note": "kept"}
    assert second["texts"] == [{"n": 4, "text": "of the piece"}] and second["spans"][0]["end_s"] == 3.0
    assert (third["split"], third["texts"], third["spans"]) == (None, None, None)
