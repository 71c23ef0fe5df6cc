"""Every format of a source list gives the same sources; a bad line is one problem with its line number."""

import gzip
import io
import json
import os

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.base.errors import UserError
from pipeline.stages.ingest.ingest import IngestSettings, read_sources
from tests.helpers.call_count import count_calls

SETTINGS = IngestSettings()
ROWS = [
    {"url": "http://h.example/1.mp4", "id": "one", "title": "First, with comma", "License": "CC BY", "note": "x"},
    {"url": "https://youtu.be/dQw4w9WgXcQ", "id": "two", "title": "Zweites »ü«", "License": "", "note": ""},
]


def read(tmp_path, name: str, data, **options):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_sources([str(path)], IngestSettings(**options))


def lines_of(listed) -> list[tuple[str, str]]:
    return [(problem.location.rpartition("/")[2], problem.error_class) for problem in listed.problems]


def urls(listed) -> list[str]:
    return listed.table["url"].to_pylist()


def as_csv(delimiter: str) -> str:
    def cell(value: str) -> str:
        return f'"{value}"' if delimiter in value else value

    lines = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    return "\n".join(delimiter.join(cell(value) for value in line) for line in lines) + "\n"


def packed(data: str) -> bytes:
    return gzip.compress(data.encode())


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


TABLES = {
    "a.csv": as_csv(","), "b.csv": as_csv(";"), "c.csv": as_csv(",").replace("\n", "\r\n"), "a.tsv": as_csv("\t"),
    "a.csv.gz": packed(as_csv(",")), "utf16.tsv": as_csv("\t").encode("utf-16"),
    "bom.csv": as_csv(",").encode("utf-8-sig"),
    "a.jsonl": "\n".join(map(json.dumps, ROWS)), "a.jsonl.gz": packed("\n".join(map(json.dumps, ROWS))),
    "a.ndjson": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), "a.json": json.dumps(ROWS, indent=1),
    "lines.json": "\n".join(map(json.dumps, ROWS)), "a.parquet": parquet(pa.Table.from_pylist(ROWS)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_all_table_formats_say_the_same(tmp_path, name):
    listed = read(tmp_path, name, TABLES[name])
    assert listed.problems == []
    assert urls(listed) == [row["url"] for row in ROWS]
    for column, values in {
        "source_id": ["one", "two"], "title": [row["title"] for row in ROWS], "licence": ["CC BY", None],
        "kind": ["url", "url"], "category": [None, None], "spans": [None, None],
    }.items():  # fmt: skip
        assert listed.table[column].to_pylist() == values
    extras = [json.loads(extra) if extra else {} for extra in listed.table["extra"].to_pylist()]
    assert [extra.get("note") or None for extra in extras] == ["x", None]


@pytest.mark.parametrize("name", ["video_url", "webpage_url", "LINK", "Url", " url "])
def test_the_url_column_goes_by_many_names(tmp_path, name):
    assert urls(read(tmp_path, "a.csv", f"{name},x\nhttp://h/1.mp4,2\n")) == ["http://h/1.mp4"]
    assert urls(read(tmp_path, "a.jsonl", json.dumps({name: "http://h/1.mp4"}))) == ["http://h/1.mp4"]


def test_columns_can_be_named(tmp_path):
    listed = read(tmp_path, "a.csv", "url,where,key\nx,http://h/1.mp4,k1\n", url_column="where", id_column="key")
    assert (urls(listed), listed.table["source_id"].to_pylist()) == (["http://h/1.mp4"], ["k1"])


def test_a_table_without_a_url_column_is_the_users_mistake(tmp_path):
    for name, data in {
        "a.csv": "name,size\nx,1\n",
        "a.parquet": parquet(pa.table({"name": ["x"]})),
        "e.csv": "\n",
    }.items():
        with pytest.raises(UserError, match="ingest.url_column"):
            read(tmp_path, name, data)


def test_arguments_that_are_not_there_are_the_users_mistake(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    (tmp_path / "torn.csv.gz").write_bytes(packed(as_csv(","))[:20])
    (tmp_path / "torn.json").write_text('[{"url": ')
    for argument in ("none.csv", "*.webm", "empty", "notes.docx", "torn.parquet", "torn.csv.gz", "torn.json"):
        with pytest.raises(UserError, match="SOURCES"):
            read_sources([str(tmp_path / argument)], SETTINGS)


def test_a_plain_list_has_one_address_per_line(tmp_path):
    (tmp_path / "here.mp4").write_bytes(b"x")
    data = "# a comment\nhttp://h/1.mp4\n\n  s3://b/k.mp4  \r\nhere.mp4\n" + (tmp_path / "here.mp4").as_uri() + "\n"
    listed = read(tmp_path, "a.txt", data)
    assert listed.problems == []
    assert urls(listed) == ["http://h/1.mp4", "s3://b/k.mp4", *[str(tmp_path / "here.mp4")] * 2]
    assert listed.table["kind"].to_pylist() == ["url", "url", "file", "file"]


def test_bad_lines_are_problems_with_their_place_and_stop_nothing(tmp_path):
    listed = read(
        tmp_path,
        "a.txt",
        "http://h/1.mp4\nno such thing\nhttp://\nhttp://a b/c\nhttp://[::1\nhttp://h:x/\nhttp://h/2.mp4",
    )
    assert urls(listed) == ["http://h/1.mp4", "http://h/2.mp4"]
    assert lines_of(listed) == [(f"a.txt:{n}", "bad-url") for n in (2, 3, 4, 5, 6)]
    listed = read(tmp_path, "a.csv", 'url,t\nhttp://h/1.mp4,"a\nb"\nhttp://h/x.mp4\n,y\nhttp://h/2.mp4,z\n')
    assert urls(listed) == ["http://h/1.mp4", "http://h/2.mp4"]
    assert lines_of(listed) == [("a.csv:3", "bad-line"), ("a.csv:4", "missing-url")]
    text = '{"url": "http://h/1.mp4"}\n{broken\n\n[1]\n7\n"http://h/2.mp4"\n{"title": "t"}\n{"url": null}\n'
    listed = read(tmp_path, "a.jsonl", text)
    assert urls(listed) == ["http://h/1.mp4", "http://h/2.mp4"]
    assert lines_of(listed) == [
        ("a.jsonl:2", "bad-line"), ("a.jsonl:4", "bad-line"), ("a.jsonl:5", "bad-line"),
        ("a.jsonl:7", "missing-url"), ("a.jsonl:8", "missing-url"),
    ]  # fmt: skip


def test_a_list_in_another_encoding_is_read_and_reported(tmp_path):
    listed = read(tmp_path, "a.csv", "url,title\nhttp://h/1.mp4,über\n".encode("latin-1"))
    assert listed.table["title"].to_pylist() == ["über"]
    assert [problem.error_class for problem in listed.problems] == ["bad-encoding"]


def test_standard_input(monkeypatch):
    for data, expected in {"http://h/1.mp4\nhttp://h/2.mp4\n": 2, '{"url": "http://h/1.mp4"}\n': 1, "": 0}.items():
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
        assert read_sources(["-"], SETTINGS).table.num_rows == expected


def test_addresses_and_files_as_arguments(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"x")
    (tmp_path / "v.srt").write_text("x")
    listed = read_sources(
        ["https://h/1.mp4", "s3://b/k", str(tmp_path / "v.mp4"), (tmp_path / "v.mp4").as_uri()], SETTINGS
    )
    assert listed.table["kind"].to_pylist() == ["url", "url", "file", "file"]
    assert listed.table["subtitle"].to_pylist() == [None, None, *[str(tmp_path / "v.srt")] * 2]


# --- HD-VILA


def hd_vila(clips: list, **more) -> str:
    return json.dumps(
        {"video_id": "QMi8x8o55Ns", "url": "https://www.youtube.com/watch?v=QMi8x8o55Ns", "clip": clips, **more}
    )


def test_hd_vila_lists_give_spans(tmp_path):
    clips = [
        {"clip_id": "QMi8x8o55Ns.1.mp4", "span": ["00:00:17.759", "00:00:23.279"]},
        {"clip_id": "QMi8x8o55Ns.16.mp4", "span": ["00:04:52.140", "00:05:03.350"], "unknown": 1},
        {"clip_id": "QMi8x8o55Ns.3.mp4", "span": ["1:00:00", "100:00:00.7"]},
        {"clip_id": "QMi8x8o55Ns.4", "span": ["00:00:17.7", "00:00:17.75"]},
    ]
    listed = read(tmp_path, "part0.jsonl", hd_vila(clips, other="kept") + "\n" + hd_vila([]).replace("Ns", "N0"))
    assert listed.problems == []
    assert listed.table["spans"].to_pylist() == [
        [
            {"n": 1, "start_s": 17.759, "end_s": 23.279}, {"n": 16, "start_s": 292.14, "end_s": 303.35},
            {"n": 3, "start_s": 3600.0, "end_s": 360000.7}, {"n": 4, "start_s": 17.7, "end_s": 17.75},
        ],
        [],
    ]  # fmt: skip
    assert json.loads(listed.table["extra"][0].as_py()) == {"other": "kept"}


@given(st.lists(st.tuples(st.integers(0, 359_999_999), st.integers(0, 3)), min_size=30, max_size=60))
@settings(max_examples=5, deadline=None)
def test_times_are_parsed_to_the_decimal(tmp_path_factory, times):
    """With any number of decimals, the value is the double nearest to the text."""
    clips, expected = [], []
    for n, (millis, dropped) in enumerate(times):
        whole, fraction = divmod(millis, 1000)
        digits = f"{fraction:03d}"[: 3 - dropped]
        text = f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}" + (f".{digits}" if digits else "")
        clips.append({"clip_id": f"x.{n}.mp4", "span": [text, "100000:00:00"]})
        expected.append(float(f"{whole}.{digits or 0}"))
    listed = read(tmp_path_factory.mktemp("l"), "a.jsonl", hd_vila(clips))
    assert [span["start_s"] for span in listed.table["spans"].to_pylist()[0]] == expected


@pytest.mark.parametrize(
    "clip",
    [
        {"clip_id": "x.mp4", "span": ["00:00:01", "00:00:02"]},
        {"clip_id": "x.1.mp4", "span": ["00:00:02", "00:00:01"]},
        {"clip_id": "x.1.mp4", "span": ["-1", "00:00:01"]},
        {"clip_id": "x.1.mp4", "span": ["a", "b"]},
        {"clip_id": "x.1.mp4", "span": ["00:00:01"]},
        {"clip_id": "x.1.mp4"},
        {"clip_id": "x.99999999999.mp4", "span": ["0", "1"]},
        7,
        None,
    ],
)
def test_a_bad_span_is_a_problem_and_the_others_stay(tmp_path, clip):
    good = {"clip_id": "x.7.mp4", "span": ["00:00:01", "00:00:02"]}
    listed = read(tmp_path, "a.jsonl", hd_vila([clip, good, good]) + "\n" + hd_vila([clip]).replace("Ns", "N0"))
    assert [[span["n"] for span in spans] for spans in listed.table["spans"].to_pylist()] == [[7]]
    assert lines_of(listed) == [("a.jsonl:1", "bad-span"), ("a.jsonl:1", "bad-span"), ("a.jsonl:2", "bad-span")]


@pytest.mark.parametrize("clip", ["3", '"x"', "{}", "[[[1]]]"])
def test_a_clip_field_that_is_no_list_of_spans(tmp_path, clip):
    listed = read(tmp_path, "a.jsonl", f'{{"url": "http://h/1.mp4", "clip": {clip}}}\n{{"url": "http://h/2.mp4"}}')
    assert (urls(listed), lines_of(listed)) == (["http://h/2.mp4"], [("a.jsonl:1", "bad-span")])


def test_spans_from_a_table(tmp_path):
    spans = [{"n": 2, "start_s": 1.5, "end_s": 3.25}]
    data = parquet(
        pa.Table.from_pylist([{"url": "http://h/1.mp4", "spans": spans}, {"url": "http://h/2.mp4", "spans": None}])
    )
    assert read(tmp_path, "a.parquet", data).table["spans"].to_pylist() == [spans, None]


# --- folders


def test_a_folder_gives_its_videos_with_their_side_cars(tmp_path):
    for name in (
        "b/2.MP4",
        "a/1.mkv",
        "z.webm",
        "notes.md",
        "a/1.en.vtt",
        "a/1.srt",
        "z.de.vtt",
        ".hidden.mp4",
        "zz.vtt",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    listed = read_sources([str(tmp_path)], SETTINGS)
    assert [os.path.relpath(url, tmp_path) for url in urls(listed)] == ["a/1.mkv", "b/2.MP4", "z.webm"]
    found = [path and os.path.relpath(path, tmp_path) for path in listed.table["subtitle"].to_pylist()]
    assert found == ["a/1.srt", None, "z.de.vtt"]
    assert listed.problems == []
    assert urls(read_sources([str(tmp_path / "*" / "*.mkv")], SETTINGS)) == [str(tmp_path / "a" / "1.mkv")]


def test_links_do_not_lead_out_of_a_folder(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "s.mp4").write_bytes(b"x")
    (tmp_path / "secret" / "s.vtt").write_bytes(b"x")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"x")
    (folder / "inside.mp4").symlink_to(folder / "a.mp4")
    (folder / "b.mp4").symlink_to(tmp_path / "secret" / "s.mp4")
    (folder / "a.vtt").symlink_to(tmp_path / "secret" / "s.vtt")
    (folder / "c").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to(folder)
    listed = read_sources([str(folder)], SETTINGS)
    assert [os.path.basename(url) for url in urls(listed)] == ["a.mp4", "inside.mp4"]
    assert listed.table["subtitle"].to_pylist() == [None, None]
    assert sorted(lines_of(listed)) == [
        ("a.vtt", "unsafe-symlink"),
        ("b.mp4", "unsafe-symlink"),
        ("c", "unsafe-symlink"),
    ]


# --- hostile text


@given(st.lists(st.text(max_size=40), max_size=8))
@settings(max_examples=20, deadline=None)
def test_any_text_as_a_list_never_crashes(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("l")
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    read(folder, "a.txt", text)
    read(folder, "a.csv", b"url,title\n" + text)
    read(folder, "a.jsonl", b'{"url": "http://h/1"}\n' + text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["url", "id", "clip", "title", "x'y", "a/b~c", "\0"]), json_values), max_size=5
    )
)
@settings(max_examples=20, deadline=None)
def test_any_json_as_a_list_never_crashes(tmp_path_factory, rows):
    data = "\n".join(json.dumps(row) for row in rows) if rows else "{}"
    listed = read(tmp_path_factory.mktemp("l"), "a.jsonl", data)
    assert listed.table.num_rows + len({p.location for p in listed.problems}) >= len(rows)


def test_json_nested_without_end_is_a_bad_line_or_a_row(tmp_path):
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        deep = opening * 100_000 + "1" + closing * 100_000
        data = f'{{"url": "http://h/1.mp4"}}\n{{"url": "http://h/2.mp4", "x": {deep}}}\n{deep}\n'
        assert urls(read(tmp_path, "a.jsonl", data))[0] == "http://h/1.mp4"


def test_two_hundred_thousand_lines_take_seconds(tmp_path):
    """Python handles no single line, which would cost at least a call each; the bench measures the time."""
    data = "\n".join(f"https://cdn{i % 10}.example.com:8443/v/{i}.mp4?token={i}" for i in range(200_000))
    listed, num_calls = count_calls(read, tmp_path, "a.txt", data)
    assert listed.table.num_rows == 200_000 and num_calls < 20_000


def test_duckdb_reads_no_extension_from_the_network():
    """The readers need DuckDB's JSON functions, which must come with it."""
    with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as connection:
        assert connection.sql("SELECT json_valid('{}')").fetchall() == [(True,)]
