"""Benchmarks with missing or damaged parts give an error or a counted row, never a substitute."""

import json
import os
import pickle
import random

import pyarrow as pa
import pytest

from clipmill.base.errors import UserError
from pipeline.stages.ingest.ingest import IngestSettings, ingest
from shards.corpus.schema import TABLES
from tests.helpers import benchmarks
from tests.helpers.benchmarks import DIDEMO_VIDEOS, LSMDC_CLIPS, MSVD_VIDEOS, put

NOTHING = TABLES["sources"].append(pa.field("unit", pa.string())).empty_table()


def read(*arguments, known=NOTHING):
    return ingest([str(argument) for argument in arguments], IngestSettings(), known)


def problems(found) -> list[tuple[str, str]]:
    return [(problem.location.rpartition("/")[2], problem.error_class) for problem in found.problems]


def change_json(path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    put(path, data)


def test_a_missing_video_is_one_row_with_its_place_and_the_others_stay(tmp_path):
    benchmarks.msrvtt(tmp_path)
    (tmp_path / "videos" / "video1.mp4").unlink()
    (tmp_path / "videos" / "video4.mp4").unlink()
    found = read(f"msrvtt:{tmp_path}")
    assert problems(found) == [
        ("MSRVTT_train.9k.csv:3", "missing-video"),
        ("MSRVTT_JSFUSION_test.csv:3", "missing-video"),
    ]
    assert found.table["source_id"].to_pylist() == ["video0", "video2", "video3"]
    put(tmp_path / "videos" / "video1.mp4")
    again = read(f"msrvtt:{tmp_path}", known=found.table)
    assert again.table["source_id"].to_pylist() == ["video1"] and len(again.problems) == 1


def test_no_video_at_all_is_the_users_mistake(tmp_path):
    benchmarks.msrvtt(tmp_path)
    (tmp_path / "videos").rename(tmp_path.parent / "elsewhere")
    with pytest.raises(UserError, match="none of its 5 videos is below .*video0"):
        read(f"msrvtt:{tmp_path}")


def test_a_folder_without_annotation_files_is_the_users_mistake(tmp_path):
    for name in ("msrvtt", "msrvtt-full", "msvd", "lsmdc", "didemo", "activitynet-moments", "vatex"):
        with pytest.raises(UserError, match=rf"{name}:.*no annotation file found; it needs"):
            read(f"{name}:{tmp_path}")
    with pytest.raises(UserError, match="not a folder"):
        read(f"msrvtt:{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match="msrvtt-7k"):  # an allowed value
        read(f"msrvt:{tmp_path}")


def test_torn_json_names_file_and_line(tmp_path):
    benchmarks.msrvtt(tmp_path)
    path = tmp_path / "MSRVTT_data.json"
    data = json.dumps(json.loads(path.read_text()), indent=1)
    line = data[: len(data) // 2].count("\n") + 1
    put(path, data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"MSRVTT_data\.json:{line}: not JSON"):
        read(f"msrvtt:{tmp_path}")


@pytest.mark.parametrize("content", ["[]", '{"videos": []}', '{"videos": {}, "sentences": []}', "[" * 100_000, "7"])
def test_json_of_another_shape_is_named(tmp_path, content):
    benchmarks.msrvtt(tmp_path)
    put(tmp_path / "MSRVTT_data.json", content)
    with pytest.raises(UserError, match="MSRVTT_data.json"):
        read(f"msrvtt:{tmp_path}")


def test_a_table_without_its_column_is_named_with_what_it_has(tmp_path):
    benchmarks.msrvtt(tmp_path)
    put(tmp_path / "MSRVTT_train.9k.csv", "id\nvideo0\n")
    with pytest.raises(UserError, match=r"MSRVTT_train\.9k\.csv:1: no column video_id.*there is id"):
        read(f"msrvtt:{tmp_path}")


def test_files_that_name_no_video_are_the_users_mistake(tmp_path):
    benchmarks.lsmdc(tmp_path)
    (tmp_path / "LSMDC16_challenge_1000_publictect.csv").unlink()
    put(tmp_path / "LSMDC16_annos_training.csv", "columns,with,commas\n")
    with pytest.raises(UserError, match=r"name no video .*training\.csv:1: 1 columns instead of 6"):
        read(f"lsmdc:{tmp_path}")


def test_unknown_ids_are_counted_once_each(tmp_path):
    benchmarks.msrvtt(tmp_path)
    stray = [{"caption": f"stray {k}", "video_id": "video99", "sen_id": 900 + k} for k in range(3)]
    change_json(tmp_path / "MSRVTT_data.json", lambda data: data["sentences"].extend(stray))
    put(tmp_path / "MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo77\n")
    put(tmp_path / "videos" / "video77.mp4")
    found = read(f"msrvtt:{tmp_path}")
    assert problems(found) == [("100", "unknown-id"), ("MSRVTT_train.9k.csv:3", "no-text")]
    assert found.table["source_id"].to_pylist() == ["video0", "video3", "video4"]


def test_empty_captions_are_dropped_and_counted(tmp_path):
    benchmarks.msrvtt(tmp_path, num_captions=3)

    def spoil(data):
        data["sentences"][1]["caption"] = "  "
        data["sentences"][2]["caption"] = None
        data["sentences"][8]["caption"] = "half a smile \ud83d"
        del data["sentences"][4]["caption"]
        data["sentences"][5] = "no object"

    change_json(tmp_path / "MSRVTT_data.json", spoil)
    found = read(f"msrvtt:{tmp_path}")
    classes = ["bad-line", "empty-text", "bad-text", "bad-text", "bad-text"]
    assert [problem.error_class for problem in found.problems] == classes
    assert len({problem.location for problem in found.problems}) == 5  # each is a row of its own
    texts = {row["source_id"]: [t["text"] for t in row["texts"]] for row in found.table.to_pylist()}
    assert (texts["video0"], texts["video1"]) == (["caption 0 of 0"], ["caption 0 of 1"])


def test_duplicate_captions_are_kept_and_counted(tmp_path):
    benchmarks.msrvtt(tmp_path, num_captions=3)

    def repeat(data):
        for n in (1, 2, 4):
            data["sentences"][n]["caption"] = "caption 0 of 0"

    change_json(tmp_path / "MSRVTT_data.json", repeat)
    found = read(f"msrvtt:{tmp_path}")
    assert found.problems == []
    assert found.splits() == [("train", 3, 9, 4), ("test", 2, 2, 0)]
    assert [entry["text"] for entry in found.table["texts"][0].as_py()] == ["caption 0 of 0"] * 3


def test_a_video_in_two_splits_is_refused_with_both_places(tmp_path):
    benchmarks.msrvtt(tmp_path)
    with open(tmp_path / "MSRVTT_train.9k.csv", "a") as file:
        file.write("video3\n")
    with pytest.raises(UserError, match=r"JSFUSION_test\.csv:2: video3 is in split test, but in train at .*9k\.csv:5"):
        read(f"msrvtt:{tmp_path}")


def test_another_protocol_over_the_same_videos_wants_its_own_corpus(tmp_path):
    benchmarks.msrvtt(tmp_path)
    first = read(f"msrvtt:{tmp_path}")
    assert read(f"msrvtt:{tmp_path}", known=first.table).num_duplicates == 5
    for arguments, known in (
        ([f"msrvtt-full:{tmp_path}"], first.table),
        ([f"msrvtt:{tmp_path}", f"msrvtt-full:{tmp_path}"], NOTHING),
        ([f"msrvtt:{tmp_path}"], read(tmp_path / "videos").table),  # would keep the videos without split and texts
    ):
        with pytest.raises(UserError, match="a corpus of its own"):
            read(*arguments, known=known)
    assert read(f"msrvtt:{tmp_path}", tmp_path / "videos").num_duplicates == 5  # which has no splits


def test_two_files_for_one_video_and_one_file_for_two_are_no_video(tmp_path):
    benchmarks.msrvtt(tmp_path)
    put(tmp_path / "small" / "video0.webm")
    assert problems(read(f"msrvtt:{tmp_path}")) == [("MSRVTT_train.9k.csv:2", "ambiguous-video")]
    benchmarks.didemo(tmp_path / "didemo")
    other = DIDEMO_VIDEOS[1].replace(".mov", ".avi")
    change_json(tmp_path / "didemo" / "test_data.json", lambda rows: rows.append({**rows[0], "video": other}))
    assert problems(read(f"didemo:{tmp_path / 'didemo'}")) == [("1", "ambiguous-video")]


def test_an_annotation_file_that_is_there_twice_is_the_users_mistake(tmp_path):
    benchmarks.msrvtt(tmp_path)
    put(tmp_path / "old" / "MSRVTT_data.json", "{}")
    with pytest.raises(UserError, match="exists twice"):
        read(f"msrvtt:{tmp_path}")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    benchmarks.msrvtt(tmp_path / "here")
    video = tmp_path / "here" / "videos" / "video0.mp4"
    video.rename(tmp_path / "secret.mp4")
    video.symlink_to(tmp_path / "secret.mp4")
    assert problems(read(f"msrvtt:{tmp_path / 'here'}")) == [
        ("video0.mp4", "unsafe-symlink"),
        ("MSRVTT_train.9k.csv:2", "missing-video"),
    ]


class _Runs:
    def __reduce__(self):
        return os.system, ("touch pickle_was_run",)


def pickles() -> dict[str, bytes]:
    return {
        "code": pickle.dumps({MSVD_VIDEOS[0]: [_Runs()]}),
        "class": pickle.dumps({MSVD_VIDEOS[0]: [ValueError("x")]}),
        "torn": pickle.dumps({MSVD_VIDEOS[0]: [["a"]]})[:-9],
        "empty": b"",
        "text": b"not a pickle at all",
        "reduce": b"\x80\x02]U\x01a\x85R.",
        "memo": b"\x80\x02]r\xff\xff\xff\xff.",  # an entry number that would take gigabytes
        "bytearray": b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b"x.",
        "a list": pickle.dumps([["a"]]),
        "no list of sentences": pickle.dumps({MSVD_VIDEOS[0]: "a bird"}),
    }


@pytest.mark.parametrize("name", pickles())
def test_a_pickle_of_anything_but_plain_lists_is_refused_and_nothing_runs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    benchmarks.msvd(tmp_path)
    put(tmp_path / "raw-captions.pkl", pickles()[name])
    if name == "memo":  # well-formed otherwise: an empty list, where a dict is expected
        with pytest.raises(UserError, match="expected a dict"):
            read(f"msvd:{tmp_path}")
        return
    with pytest.raises(UserError, match="raw-captions.pkl"):
        read(f"msvd:{tmp_path}")
    assert not (tmp_path / "pickle_was_run").exists()


def test_captions_of_unlisted_videos_and_videos_without_captions(tmp_path):
    benchmarks.msvd(tmp_path)
    put(
        tmp_path / "raw-captions.pkl",
        pickle.dumps({MSVD_VIDEOS[0]: [["a"], []], "gone_1_2": [["b"]], MSVD_VIDEOS[1]: []}),
    )
    found = read(f"msvd:{tmp_path}")
    assert [problem.error_class for problem in found.problems] == ["empty-text", "unknown-id", "no-text", "no-text"]
    assert found.table["source_id"].to_pylist() == [MSVD_VIDEOS[0]]


def test_bad_lines_of_lsmdc_are_rows(tmp_path):
    benchmarks.lsmdc(tmp_path)
    with open(tmp_path / "LSMDC16_annos_training.csv", "ab") as file:
        file.write(
            b"only one column\n\n" + f"{LSMDC_CLIPS[1]}\t1\t2\t3\t4\t\n".encode() + b"x\t1\t2\t3\t4\tA caf\xe9.\n"
        )
    found = read(f"lsmdc:{tmp_path}")
    assert problems(found) == [
        ("LSMDC16_annos_training.csv", "bad-encoding"),
        ("LSMDC16_annos_training.csv:4", "bad-line"),
        ("LSMDC16_annos_training.csv:6#sentence", "empty-text"),
        ("LSMDC16_annos_training.csv:7", "missing-video"),
    ]
    assert found.table.num_rows == 3


def test_moments_without_usable_times_are_rows(tmp_path):
    benchmarks.activitynet(tmp_path)

    def spoil(data):
        data["v_QOlSCBRmfWY"]["timestamps"] = [[5.0, 5.0], [1, 2]]

    change_json(tmp_path / "train.json", spoil)
    change_json(tmp_path / "val_1.json", lambda data: data["v_uqiMw7tQ1Cc"].update(timestamps=[[1, 2]]))
    found = read(f"activitynet-moments:{tmp_path}")
    assert [problem.error_class for problem in found.problems] == ["bad-span", "bad-span", "no-text"]
    (row,) = found.table.to_pylist()
    assert row["spans"] == [{"n": 1, "start_s": 1.0, "end_s": 2.0}] and row["texts"] == [
        {"n": 1, "text": "She speaks."}
    ]


def test_texts_of_a_list_that_cannot_be_used_are_rows(tmp_path):
    values = ["no list", ["", "good", 7, {"n": 3, "text": "of no span"}], None]
    lines = [json.dumps({"url": f"http://h/{n}.mp4", "texts": value}) for n, value in enumerate(values)]
    found = read(put(tmp_path / "own.jsonl", "\n".join(lines)))
    assert [(problem.location.rpartition("own.jsonl")[2], problem.error_class) for problem in found.problems] == [
        (":1#/texts/0", "bad-text"),
        (":2#/texts/0", "empty-text"),
        (":2#/texts/2", "bad-text"),
        (":2#/texts/3", "bad-text"),
    ]
    assert found.table["texts"].to_pylist() == [None, [{"n": 0, "text": "good"}], None]
    assert found.table["spans"].to_pylist() == [None, [{"n": 0, "start_s": 0.0, "end_s": None}], None]


STRANGE = [None, -2.5, True, "", " ", [], {}, [[]], {"a": 1}, float("nan"), "\ud83d", "a\nb", "../../x", "\0", 10**30]
LAYOUTS = {
    name: getattr(benchmarks, name.partition("-")[0])
    for name in ("msrvtt", "msrvtt-full", "msvd", "lsmdc", "didemo", "didemo-moments", "activitynet-moments", "vatex")
}


def spoil(path, rng) -> None:
    """Replace one value of a JSON file, or a few bytes of any other file."""
    if path.suffix == ".json":
        data = {"all": json.loads(path.read_text())}
        holder, key = data, "all"
        while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.8:
            holder = holder[key]
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key] = rng.choice(STRANGE)
        put(path, json.dumps(data["all"]))
    else:
        data = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        put(path, bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.3 else data))


@pytest.mark.parametrize("name", LAYOUTS)
def test_whatever_the_files_hold_there_are_sources_with_texts_rows_or_an_error(tmp_path, name):
    for seed in range(40):
        rng, folder = random.Random(f"{name} {seed}"), LAYOUTS[name](tmp_path / str(seed))
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".csv", ".txt", ".pkl"))
        spoil(rng.choice(files), rng)
        try:
            found = read(f"{name}:{folder}")
        except UserError:
            continue
        places = [problem.location for problem in found.problems]
        assert len(places) == len(set(places))  # otherwise a row would hide another
        for row in found.table.to_pylist():
            assert row["split"] and row["texts"]
            assert {text["n"] for text in row["texts"]} <= {span["n"] for span in row["spans"]}
