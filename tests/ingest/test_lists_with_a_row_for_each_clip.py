"""Rows of one video add their spans, in whatever notation; columns that look like spans are read or reported."""

import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.build import session
from pipeline.stages.ingest.ingest import IngestSettings, ingest, read_sources
from pipeline.stages.ingest.stage import ingest_sources
from shards.corpus.fragments import fragment_path
from tests.ingest.test_ingest_ids_and_units import NOTHING

URL = "http://h.example/1.mp4"


def read(tmp_path, name: str, data, **options):
    path = tmp_path / name
    pq.write_table(data, path) if isinstance(data, pa.Table) else path.write_text(data)
    return read_sources([str(path)], IngestSettings(**options))


def times(listed) -> list:
    return [
        spans and [(span["start_s"], span["end_s"]) for span in spans] for spans in listed.table["spans"].to_pylist()
    ]


def texts(listed) -> list:
    return [given and [(text["n"], text["text"]) for text in given] for given in listed.table["texts"].to_pylist()]


def classes(listed) -> list[str]:
    return [problem.error_class for problem in listed.problems]


# --- notations


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("start", "end"), ("start_s", "end_s"), ("start_time", "end_time"), ("Start Time", "End Time"),
        ("startTime", "endTime"), ("start_sec", "end_sec"), ("start_seconds", "end_seconds"), ("begin", "end"),
        ("t_start", "t_end"), ("time_start", "time_end"), ("start_timestamp", "stop_timestamp"),
        ("clip_start", "clip_end"),
        ("Start_timestamp", "End_timestamp"), ("segment_start", "segment_end"), ("begin_s", "finish"), ("from", "to"),
        ("starts", "ends"), ("start.time", "stop.time"), ("video_start_sec", "video_end_sec"),
    ],
)  # fmt: skip
def test_start_and_end_columns_go_by_the_names_of_real_lists(tmp_path, start, end):
    row = {"url": URL, start: "12.5", end: "00:01:02.250", "score": "0.5"}
    for name, data in {
        "a.csv": ",".join(row) + "\n" + ",".join(row.values()) + "\n",
        "a.tsv": "\t".join(row) + "\n" + "\t".join(row.values()) + "\n",
        "a.jsonl": json.dumps(row),
        "a.json": json.dumps([row]),
        "a.parquet": pa.Table.from_pylist([row]),
    }.items():
        listed = read(tmp_path, name, data)
        assert (times(listed), listed.problems) == ([[(12.5, 62.25)]], []), name
        assert json.loads(listed.table["extra"][0].as_py()) == {"score": "0.5"}


@pytest.mark.parametrize(
    ("start", "end", "values", "expected"),
    [
        ("start_ms", "end_ms", (1500, 4000), (1.5, 4.0)), ("begin_msec", "end_msec", (1500, 4000.5), (1.5, 4.0005)),
        ("start_time_ms", "end_time_ms", ("1500", "4000"), (1.5, 4.0)),
        ("start_us", "end_us", (1_500_000, 4_000_000), (1.5, 4.0)),
        ("start", "end", (1e-5, 12345678.9), (1e-5, 12345678.9)), ("start", "end", ("1500ms", "4 s"), (1.5, 4.0)),
        ("start", "end", ("1:02", "1:00:00,5"), (62.0, 3600.5)),
        ("start_ms", "end_ms", ("00:00:01.5", "4000"), (1.5, 4.0)),
        ("start", "end", [pa.scalar(micros, pa.duration("us")) for micros in (1_500_000, 4_000_000)], (1.5, 4.0)),
        ("start", "end", [pa.scalar(micros, pa.time64("us")) for micros in (1_500_000, 4_000_000)], (1.5, 4.0)),
    ],
)  # fmt: skip
def test_times_have_the_unit_that_name_or_type_says(tmp_path, start, end, values, expected):
    table = pa.table({"url": [URL], start: pa.array([values[0]]), end: pa.array([values[1]])})
    listed = read(tmp_path, "a.parquet", table)
    assert (times(listed), listed.problems) == ([[expected]], [])


PANDA = "[['0:00:08.708', '0:00:20.687'], ['0:00:22.000', '0:00:30.5']]"


def test_pandas_notation_gives_spans_with_their_captions(tmp_path):
    """A column holds a Python list of [start, end], another the captions in the same order."""
    row = {
        "videoID": "v",
        "url": URL,
        "timestamp": PANDA,
        "caption": "['a man', \"it's raining\"]",
        "score": "[0.4, 0.3]",
    }
    for name, data in {
        "a.csv": "videoID,url,timestamp,caption,score\n"
        + ",".join('"' + v.replace('"', '""') + '"' for v in row.values()),
        "a.jsonl": json.dumps(row),
        "a.parquet": pa.Table.from_pylist([row]),
        "b.parquet": pa.Table.from_pylist([row | {"timestamp": eval(PANDA), "caption": ["a man", "it's raining"]}]),  # noqa: S307
    }.items():
        listed = read(tmp_path, name, data)
        assert (times(listed), listed.problems) == ([[(8.708, 20.687), (22.0, 30.5)]], []), name
        assert texts(listed) == [[(0, "a man"), (1, "it's raining")]], name


@pytest.mark.parametrize(
    "value",
    [
        "[1, 4]", "['0:00:01', '0:00:04']", "(1.0, 4.0)", "[[1, 4]]", "((1, 4),)", "0:01 --> 0:04", "1.0 - 4.0",
        "0:01-0:04",
        '[{"start": 1, "end": 4}]', '{"begin_ms": 1000, "end_ms": 4000}', '[{"startTime": "0:01", "stopTime": "4s"}]',
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", ["timestamp", "span", "segments", "intervals", "time_range"])
def test_a_column_of_spans_is_read_in_every_notation(tmp_path, column, value):
    listed = read(tmp_path, "a.jsonl", json.dumps({"url": URL, column: value}))
    assert (times(listed), listed.problems) == ([[(1.0, 4.0)]], [])


def test_lists_of_starts_and_of_ends_are_pairs(tmp_path):
    listed = read(tmp_path, "a.jsonl", json.dumps({"url": URL, "start": [1, 5], "end": [3, 8], "text": ["a", "b"]}))
    assert (times(listed), texts(listed)) == ([[(1.0, 3.0), (5.0, 8.0)]], [[(0, "a"), (1, "b")]])


def test_objects_in_the_clip_list_bring_their_texts(tmp_path):
    clips = [{"start": 1, "end": 2, "caption": "x"}, {"start": 3, "end": 4}, {"start": 5, "end": 6, "text": "y"}]
    listed = read(tmp_path, "a.jsonl", json.dumps({"url": URL, "clips": clips}))
    assert (times(listed), texts(listed)) == ([[(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]], [[(0, "x"), (2, "y")]])


def test_bad_and_missing_times(tmp_path):
    rows = ["1,3", ",", "5,", ",7", "4,2", "x,3", "-1,3", "nan,3"]
    data = "url,start,end,caption\n" + "".join(f"http://h/{n},{row},c{n}\n" for n, row in enumerate(rows))
    listed = read(tmp_path, "a.csv", data)
    assert listed.table["url"].to_pylist() == ["http://h/0", "http://h/1"]
    assert times(listed) == [[(1.0, 3.0)], None]
    assert classes(listed) == ["bad-span"] * 6
    assert json.loads(listed.table["extra"][1].as_py()) == {"caption": "c1"}, "a text without a span is a column"


def test_captions_that_do_not_match_their_spans_are_reported(tmp_path):
    listed = read(
        tmp_path, "a.jsonl", json.dumps({"url": URL, "timestamps": [[1, 2], [3, 4]], "captions": ["only one"]})
    )
    assert (times(listed), texts(listed), classes(listed)) == ([[(1.0, 2.0), (3.0, 4.0)]], [None], ["bad-text"])


def test_what_looks_like_spans_and_is_not_read_is_said(tmp_path):
    for row in (
        {"start_frame": 10, "end_frame": 50}, {"start": 5}, {"end_s": 7}, {"scenes": [[1, 2], [3, 4]]},
        {"span": "10-20"}, {"shots": "[('0:00:01', '0:00:04')]"}, {"timestamps": [1, 2, 3]},
    ):  # fmt: skip
        listed = read(tmp_path, "a.jsonl", json.dumps({"url": URL} | row))
        assert (times(listed), classes(listed)) == ([None], ["unread-spans"]), row
        assert next(iter(row)) in listed.problems[0].message
        assert json.loads(listed.table["extra"][0].as_py()) == row
        assert read(tmp_path, "a.jsonl", json.dumps({"url": URL} | row), read_spans=False).problems == []
    assert classes(read(tmp_path, "a.txt", f"{URL}#t=10,20\n")) == ["unread-spans"]


@pytest.mark.parametrize(
    "row",
    [
        {"timestamp": "2024-05-01 10:00:00"}, {"timestamp": 1714557600}, {"start": "2024-05-01"},
        {"friend": 3, "trend": 4}, {"bbox": [[0, 0], [10, 10]]}, {"duration": 12.5}, {"segments": "intro, outro"},
        {"upload": "2024-05", "time": "2024-05"},
    ],
)  # fmt: skip
def test_other_columns_are_no_spans(tmp_path, row):
    for name, data in {
        "a.jsonl": json.dumps({"url": URL} | row),
        "a.parquet": pa.Table.from_pylist([{"url": URL} | row]),
    }.items():
        listed = read(tmp_path, name, data)
        assert (times(listed), listed.problems) == ([None], [])
        assert json.loads(listed.table["extra"][0].as_py()).keys() == row.keys()


def test_the_setting_keeps_columns_as_they_are(tmp_path):
    listed = read(tmp_path, "a.csv", f"url,start,end\n{URL},1,3\n", read_spans=False)
    assert (times(listed), listed.problems) == ([None], [])
    assert json.loads(listed.table["extra"][0].as_py()) == {"start": "1", "end": "3"}


# --- rows of one video


def make(folder, rows: list[dict], known: pa.Table = NOTHING):
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ingest([str(path)], IngestSettings(), known)


def clip(n: int, **more) -> dict:
    return {"url": f"http://h/{n % 2}.mp4", "start": n, "end": n + 1.5, "caption": f"caption {n}", "score": n, **more}


def test_each_row_adds_its_span_its_text_and_its_columns(tmp_path):
    found = make(
        tmp_path, [clip(0, title="t"), clip(2, title="other"), clip(4, title="t", score=0), clip(2, caption="more")]
    )
    (row,) = found.table.to_pylist()
    assert [(span["n"], span["start_s"]) for span in row["spans"]] == [(0, 0.0), (1, 2.0), (2, 4.0)]
    assert [(text["n"], text["text"]) for text in row["texts"]] == [
        (0, "caption 0"), (1, "caption 2"), (2, "caption 4"), (1, "more"),
    ]  # fmt: skip
    assert row["title"] == "t"
    assert json.loads(row["extra"]) == {"score": 0, "by_span": {"1": {"score": 2, "title": "other"}}}
    assert (found.num_seen, found.num_added, found.num_duplicates, found.problems) == (4, 3, 0, [])


def test_numbers_that_are_taken_are_replaced(tmp_path):
    rows = [
        {"url": URL, "clip": [{"clip_id": f"x.{n}.mp4", "span": [start, start + 1]}]}
        for n, start in ((0, 1), (0, 5), (7, 9), (0, 1), (1, 20))
    ]
    (row,) = make(tmp_path, rows).table.to_pylist()
    assert [(span["n"], span["start_s"]) for span in row["spans"]] == [(0, 1.0), (1, 5.0), (7, 9.0), (3, 20.0)]


def test_a_row_without_spans_takes_none_away(tmp_path):
    for rows in ([clip(0), {"url": clip(0)["url"]}], [{"url": clip(0)["url"]}, clip(0)]):
        assert [len(row["spans"]) for row in make(tmp_path, rows).table.to_pylist()] == [1]


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 12))
@settings(max_examples=25, deadline=None)
def test_in_two_lists_or_in_one_the_same_spans_come_out(tmp_path_factory, picks, cut):
    folder = tmp_path_factory.mktemp("l")
    rows = [clip(n) for n in picks]
    whole = make(folder, rows)
    first = make(folder, rows[:cut])
    second = make(folder, rows, known=first.table)
    merged = {
        row["video_id"]: row
        for table in (first.table, second.grown, second.table)
        if table
        for row in table.to_pylist()
    }
    for row in whole.table.to_pylist():
        assert {**merged[row["video_id"]], "unit": None} == {**row, "unit": None}
    again = make(folder, rows, known=whole.table)
    assert again.num_duplicates == len(rows) and not (again.grown.num_rows if again.grown else 0)
    for row in whole.table.to_pylist():
        assert all(a["n"] != b["n"] for a, b in pairwise(row["spans"]))


# --- a later list


def test_a_later_list_adds_spans_to_known_videos_and_to_no_others(tmp_path):
    """The commit of the sources is replaced."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("".join(json.dumps(clip(n)) + "\n" for n in (0, 1, 2)))
    two.write_text("".join(json.dumps(clip(n)) + "\n" for n in (3, 1, 8)))
    root = tmp_path / "corpus"

    def sources(current) -> dict[str, tuple]:
        rows = current.ledger.connection.sql("SELECT url, unit, ordinal, spans FROM sources").fetchall()
        return {url: (unit, ordinal, [span["start_s"] for span in spans]) for url, unit, ordinal, spans in rows}

    with session(root, None, [], "test", create=True) as (current, _):
        ingest_sources(current, [str(one)])
        before = [*(root / "fragments").glob("*/*.parquet")]
        assert [values[2] for values in sources(current).values()] == [[0.0, 2.0], [1.0]]
        report = ingest_sources(current, [str(two)])
        assert (report.num_new, report.num_grown, report.num_added, report.num_duplicates) == (0, 2, 2, 1)
        expected = {"http://h/0.mp4": ("u000000", 0, [0.0, 2.0, 8.0]), "http://h/1.mp4": ("u000000", 1, [1.0, 3.0])}
        assert sources(current) == expected
        names = [path.stem for path in (root / "fragments" / "sources").iterdir()]
        assert len(names) == 1 and not any(path.exists() for path in before)
        assert fragment_path(root, "ledger", names[0]).exists()
        report = ingest_sources(current, [str(one), str(two)])
        assert (report.num_new, report.num_grown, report.num_duplicates) == (0, 0, 6)
        assert [path.stem for path in (root / "fragments" / "sources").iterdir()] == names


def test_a_kill_before_the_earlier_commit_is_removed_changes_nothing(tmp_path, monkeypatch):
    path, root = tmp_path / "list.jsonl", tmp_path / "corpus"
    for n in (0, 2, 4):
        path.write_text(json.dumps(clip(n)))
        with session(root, None, [], "test", create=True) as (current, _), monkeypatch.context() as patch:
            if n == 4:

                def killed(*_):
                    raise KeyboardInterrupt

                patch.setattr(type(current.corpus.files), "remove", killed)
                with pytest.raises(KeyboardInterrupt):
                    ingest_sources(current, [str(path)])
            else:
                ingest_sources(current, [str(path)])
    assert len([*(root / "fragments" / "sources").iterdir()]) == 2
    with session(root, None, [], "test", create=False) as (current, _):
        ((spans,),) = current.ledger.connection.sql("SELECT spans FROM sources").fetchall()
        assert [span["start_s"] for span in spans] == [0.0, 2.0, 4.0]
        assert len([*(root / "fragments" / "sources").iterdir()]) == 1


def test_only_a_video_whose_spans_grew_is_pending(tmp_path):
    path, root = tmp_path / "list.jsonl", tmp_path / "corpus"
    with session(root, None, [], "test", create=True) as (current, _):
        keys = []
        for rows in ([clip(0), clip(1)], [clip(0), clip(1), clip(0)], [clip(3)]):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            ingest_sources(current, [str(path)])
            current.refresh_state()
            found = current.ledger.connection.sql("SELECT url, md5(spans::VARCHAR), item_id FROM sources ORDER BY url")
            downloads = current.ledger.connection.sql("SELECT key FROM input_download ORDER BY item_id").fetchall()
            keys.append((found.fetchall(), downloads))
    assert keys[0] == keys[1]
    assert keys[1][0][0] == keys[2][0][0] and keys[1][0][1] != keys[2][0][1]
    assert keys[1][1] == keys[2][1], "no video is downloaded again"
