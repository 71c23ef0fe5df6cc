"""Lists of spreadsheets, pandas and polars: quotes, line ends, encodings, names that differ by case, Arrow types."""

import contextlib
import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.base.errors import UserError
from pipeline.stages.ingest.ingest import IngestSettings, read_sources


def read(tmp_path, name: str, data):
    path = tmp_path / name
    if isinstance(data, pa.Table):
        pq.write_table(data, path)
    else:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_sources([str(path)], IngestSettings())


def titles(listed) -> dict[str, str]:
    return {row["url"].rpartition("/")[2]: row["title"] for row in listed.table.to_pylist()}


def lines_of(listed) -> list[tuple[str, str]]:
    return [(problem.location.rpartition(":")[2], problem.error_class) for problem in listed.problems]


# --- quotes


def test_a_quote_that_never_closes_costs_its_row(tmp_path):
    rows = ["plain", '"never closed', "next", '"quoted, well"', '"open', "last", '"two\nlines"', '"']
    data = "url,title\n" + "".join(f"http://h/{n},{row}\n" for n, row in enumerate(rows))
    listed = read(tmp_path, "a.csv", data)
    assert titles(listed) == {"0": "plain", "2": "next", "3": "quoted, well", "5": "last", "6": "two\nlines"}
    assert lines_of(listed) == [("3", "bad-line"), ("6", "bad-line"), ("9", "bad-line")]
    assert all("not closed" in problem.message for problem in listed.problems)
    listed = read(tmp_path, "a.tsv", data.replace(",", "\t"))
    assert lines_of(listed) == [("3", "bad-line"), ("6", "bad-line"), ("9", "bad-line")]


@pytest.mark.parametrize("last", ['closing"', '12"', '"quoted"', '"so, ""called"""'])
def test_a_quote_in_a_later_row_does_not_close_it(tmp_path, last):
    listed = read(tmp_path, "a.csv", f'url,title\nhttp://h/0,"open\nhttp://h/1,a\nhttp://h/2,{last}\nhttp://h/3,b\n')
    assert list(titles(listed)) == ["1", "2", "3"] and lines_of(listed) == [("2", "bad-line")]


def test_quotes_that_close_are_left_alone(tmp_path):
    rows = {'5" nails': '5" nails', '"a" b': "a b", '"a ""b"""': 'a "b"', '"x\n\ny, http"': "x\n\ny, http", '""': None}
    data = "url,title\n" + "".join(f"http://h/{n},{row}\n" for n, row in enumerate(rows))
    listed = read(tmp_path, "a.csv", data)
    assert (list(titles(listed).values()), listed.problems) == (list(rows.values()), [])


@given(st.lists(st.text(st.sampled_from('ab", \n'), max_size=8), max_size=8), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_rows_around_an_open_quote_are_read(tmp_path_factory, texts, at):
    """Quotes as a CSV writer sets them; one row among them is open."""
    rows = [f'http://h/{n},"{text.replace(chr(34), chr(34) * 2)}",x' for n, text in enumerate(texts)]
    rows.insert(at, 'http://h/open,"open,x')
    listed = read(tmp_path_factory.mktemp("l"), "a.csv", "url,title,z\n" + "\n".join(rows) + "\n")
    assert [url for url in listed.table["url"].to_pylist() if "open" not in url] == [
        f"http://h/{n}" for n in range(len(texts))
    ]
    assert [problem.error_class for problem in listed.problems] == ["bad-line"]


# --- line ends, separators, encodings


PLAIN = "url;title\nhttp://h/1;a, b\nhttp://h/2;ä\n"


@pytest.mark.parametrize("before", ["", "sep=;\n", '"sep=;"\n', "SEP=;\r\n"])
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be with mark"]
)
def test_lists_of_spreadsheets(tmp_path, before, end, encoding):
    text = before + PLAIN.replace("\n", end)
    data = ("\ufeff" + text).encode("utf-32-be") if "mark" in encoding else text.encode(encoding)
    listed = read(tmp_path, "a.csv", data)
    assert (titles(listed), listed.problems) == ({"1": "a, b", "2": "ä"}, [])


@pytest.mark.parametrize("delimiter", [";", "|", "\t", "^"])
def test_the_first_line_of_a_spreadsheet_names_the_delimiter(tmp_path, delimiter):
    listed = read(tmp_path, "a.csv", f"sep={delimiter}\nurl{delimiter}title\nhttp://h/1{delimiter}a,b,c\nbad\n")
    assert (titles(listed), lines_of(listed)) == ({"1": "a,b,c"}, [("3", "bad-line")])


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_other_lists_with_any_line_end(tmp_path, end):
    for name, lines in {
        "a.txt": ["http://h/1", "# x", "http://h/2"],
        "a.jsonl": ['{"url": "http://h/1"}', '"http://h/2"'],
    }.items():
        listed = read(tmp_path, name, end.join([*lines, ""]).encode("utf-16"))
        assert (listed.table["url"].to_pylist(), listed.problems) == (["http://h/1", "http://h/2"], [])


def test_joined_files_and_broken_encodings(tmp_path):
    listed = read(tmp_path, "a.txt", b"\xef\xbb\xbfhttp://h/1\n" * 2)
    assert (listed.table["url"].to_pylist(), listed.problems) == (["http://h/1"] * 2, [])
    listed = read(tmp_path, "a.txt", "http://h/1\n".encode("utf-16") + b"\x00")
    assert [problem.error_class for problem in listed.problems] == ["bad-encoding", "bad-url"]


# --- names that differ by case


def test_columns_that_differ_by_case_keep_their_own_values(tmp_path):
    row = {"id": "v", "url": "http://h/v", "title": "one", "Title": "two", "URL": "http://h/o", "a": "1", "A": "2"}
    left = {"Title": "two", "URL": "http://h/o", "a": "1", "A": "2"}
    for columns in (list(row), list(row)[::-1]):
        one = {name: row[name] for name in columns}
        for name, data in {
            "a.csv": ",".join(one) + "\n" + ",".join(one.values()) + "\n",
            "a.tsv": "\t".join(one) + "\n" + "\t".join(one.values()) + "\n",
            "a.jsonl": json.dumps(one),
            "a.json": json.dumps([one]),
            "a.parquet": pa.Table.from_pylist([one]),
        }.items():
            (found,) = read(tmp_path, name, data).table.to_pylist()
            assert (found["url"], found["title"], json.loads(found["extra"])) == ("http://h/v", "one", left), name


def test_a_json_row_keeps_the_keys_that_are_not_used(tmp_path):
    rows = [
        {"url": "http://h/1", "link": "http://l", "ID": 1, "id": None},
        {"link": "http://h/2", "video_id": "b", "id": "a"},
    ]
    listed = read(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert listed.table["url"].to_pylist() == ["http://h/1", "http://h/2"]
    assert listed.table["source_id"].to_pylist() == ["1", "a"]
    assert [json.loads(extra) for extra in listed.table["extra"].to_pylist()] == [
        {"link": "http://l"},
        {"video_id": "b"},
    ]


# --- Arrow


STRINGS = {
    "string": pa.string(),
    "large": pa.large_string(),
    "view": pa.string_view(),
    "binary": pa.binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "large dictionary": pa.dictionary(pa.int8(), pa.large_string()),
}


def cast(values: list, type: pa.DataType) -> pa.Array:
    return pa.array(values, pa.string()).cast(type)


@pytest.mark.parametrize("kind", STRINGS)
def test_every_kind_of_string_is_a_string(tmp_path, kind):
    type = STRINGS[kind]
    columns = {
        "id": ["a", None], "url": ["http://h/1", "http://h/2"], "title": ["t", ""], "note": ["n", None],
        "clips": ['[{"n": 0, "start_s": 1, "end_s": 4}]', "[['0:01', '0:04']]"], "texts": ['["said"]', None],
    }  # fmt: skip
    listed = read(tmp_path, "a.parquet", pa.table({name: cast(values, type) for name, values in columns.items()}))
    assert listed.problems == []
    assert listed.table.select(["source_id", "url", "title"]).to_pydict() == {
        "source_id": ["a", None], "url": ["http://h/1", "http://h/2"], "title": ["t", None],
    }  # fmt: skip
    assert listed.table["spans"].to_pylist() == [[{"n": 0, "start_s": 1.0, "end_s": 4.0}]] * 2
    assert listed.table["texts"].to_pylist() == [[{"n": 0, "text": "said"}], None]
    assert [extra and json.loads(extra) for extra in listed.table["extra"].to_pylist()] == [{"note": "n"}, None]


@pytest.mark.parametrize("outer", [pa.list_, pa.large_list, pa.list_view, pa.large_list_view])
@pytest.mark.parametrize("inner", [pa.string(), pa.large_string(), pa.string_view()])
def test_every_kind_of_list_is_a_list(tmp_path, outer, inner):
    table = pa.table(
        {
            "url": ["http://h/1"],
            "timestamps": pa.array([[["0:01", "0:02"], ["0:03", "0:04"]]], outer(outer(inner))),
            "captions": pa.array([["a", "b"]], outer(inner)),
            "tags": pa.array([["x", "y"]], outer(inner)),
        }
    )
    (row,) = read(tmp_path, "a.parquet", table).table.to_pylist()
    assert [(span["start_s"], span["end_s"]) for span in row["spans"]] == [(1.0, 2.0), (3.0, 4.0)]
    assert [text["text"] for text in row["texts"]] == ["a", "b"]
    assert json.loads(row["extra"]) == {"tags": ["x", "y"]}


def test_text_that_is_not_utf8_is_read_and_reported(tmp_path):
    """`bench.fuzz --seed 6` found this case."""
    wrong = pa.array([b"\xfcber", b"fine", None], pa.binary()).view(pa.string())
    listed = read(tmp_path, "a.parquet", pa.table({"url": ["http://h/1", "http://h/2", "http://h/3"], "title": wrong}))
    assert listed.table["title"].to_pylist() == ["\ufffdber", "fine", None]
    assert [problem.error_class for problem in listed.problems] == ["bad-encoding"]


def test_a_packed_list_takes_the_memory_of_its_content(tmp_path):
    """`bench.fuzz --seed 6` found that it took what a packed list is allowed to have."""
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"url\nhttp://h/1\n"))
    tracemalloc.start()
    try:
        assert read_sources([str(path)], IngestSettings()).table.num_rows == 1
        assert tracemalloc.get_traced_memory()[1] < 1 << 27
    finally:
        tracemalloc.stop()


def test_a_damaged_packed_list_is_the_users_mistake(tmp_path):
    """`bench.fuzz --seed 8` found this case."""
    data = gzip.compress("".join(f"http://h/{n}\n" for n in range(200)).encode(), mtime=0)
    for at in range(12, len(data), 7):
        (tmp_path / "a.txt.gz").write_bytes(data[:at] + bytes(reversed(data[at : at + 6])) + data[at + 6 :])
        with contextlib.suppress(UserError):
            read_sources([str(tmp_path / "a.txt.gz")], IngestSettings())
    (tmp_path / "a.txt.gz").write_bytes(data[:10] + b"\xff" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        read_sources([str(tmp_path / "a.txt.gz")], IngestSettings())


def test_bytes_that_are_no_text_are_kept(tmp_path):
    table = pa.table({"url": ["http://h/1"], "thumb": pa.array([b"\xff\xd8"], pa.binary())})
    assert json.loads(read(tmp_path, "a.parquet", table).table["extra"][0].as_py()) == {"thumb": "\\xFF\\xD8"}
