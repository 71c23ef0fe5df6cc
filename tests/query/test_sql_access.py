"""SQL on a corpus: read-only, limited to the manifest, with four output formats that are safe to display."""

import csv
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.sql import read_queries
from clipmill.base.errors import UserError
from clipmill.base.text import visible
from shards.query.prompt import prompt
from shards.query.sql import open_manifest, rows_of, run_query, selection
from tests.helpers.manifests import make_manifest

NUM_CLIPS = 600


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sql")
    make_manifest(folder / "manifest.duckdb", NUM_CLIPS)
    return folder


@pytest.fixture
def connection(corpus):
    with open_manifest(corpus) as connection:
        yield connection


def answer(connection, sql, format="table"):
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="")
    count = run_query(connection, sql, format, out)
    out.flush()
    return count, out.buffer.getvalue()


@pytest.mark.parametrize("title, sql", read_queries(), ids=[title[:12] for title, _ in read_queries()])
def test_the_ten_queries_answer(connection, title, sql):
    count, text = answer(connection, sql)
    assert count > 0 and text.strip()


def test_there_are_ten_queries():
    assert [title.split(".")[0] for title, _ in read_queries()] == [str(n) for n in range(1, 11)]


@pytest.mark.parametrize(
    "sql",
    [
        "COPY clips TO '{tmp}/x.csv'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "FROM '/etc/passwd'",
        "FROM glob('/etc/*')",
        "FROM read_parquet('http://127.0.0.1:9/x.parquet')",
        "ATTACH '{tmp}/x.duckdb'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET memory_limit = '1TB'",
        "CREATE TABLE t AS SELECT 1",
        "CREATE TABLE memory.t AS SELECT 1",
        "INSERT INTO clips SELECT * FROM clips",
        "DELETE FROM clips",
        "DROP VIEW catalog",
        "EXPLAIN ANALYZE DELETE FROM clips",
        "EXPLAIN ANALYZE COPY clips TO '{tmp}/x.csv'",
        "EXPORT DATABASE '{tmp}/x'",
        "SELECT 1; DROP VIEW catalog",
        "PREPARE p AS DELETE FROM clips",
        "USE memory",
        "SELEC 1",
        "SELECT no_such_column FROM clips",
        "SELECT connection",
        "FROM corpus",
        "SELECT 'x'::INT",
        "",
    ],
)
def test_nothing_but_reading_the_manifest_is_possible(corpus, connection, tmp_path, sql):
    before = (corpus / "manifest.duckdb").read_bytes()
    with pytest.raises(UserError):
        answer(connection, sql.format(tmp=tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert (corpus / "manifest.duckdb").read_bytes() == before


@pytest.mark.parametrize("sql", ["SHOW TABLES", "DESCRIBE clips", "SUMMARIZE totals", "EXPLAIN SELECT 1", "VALUES (1)"])
def test_what_reads_is_allowed(connection, sql):
    assert answer(connection, sql)[0] > 0


def test_no_manifest_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="manifest.duckdb"):
        open_manifest(tmp_path)
    (tmp_path / "manifest.duckdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(UserError, match="cannot be opened"):
        open_manifest(tmp_path)


def test_a_manifest_published_meanwhile_is_seen_by_new_readers_only(tmp_path):
    """This holds in one process too, where DuckDB would return the file that is already open."""
    make_manifest(tmp_path / "manifest.duckdb", 30)
    with open_manifest(tmp_path) as before:
        make_manifest(tmp_path / "next.duckdb", 60)
        os.replace(tmp_path / "next.duckdb", tmp_path / "manifest.duckdb")
        with open_manifest(tmp_path) as after, open_manifest(tmp_path) as another:
            assert [rows_of(c, "SELECT count(*) FROM catalog") for c in (before, after, another)] == [[30], [60], [60]]


def test_a_reader_works_while_another_process_has_the_manifest_open(corpus, connection):
    code = (
        f"from shards.query.sql import *; print(rows_of(open_manifest({str(corpus)!r}), 'SELECT count(*) FROM clips'))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == f"[{NUM_CLIPS}]", done.stderr


# -- formats --------------------------------------------------------------------------------------------------------

NASTY = "SELECT chr(27) || '[2J' || chr(155) || '31m' AS title, '[bold]x[/]' AS markup, chr(8238) || 'gpj' AS name"


def test_a_table_cannot_steer_the_terminal(connection):
    text = answer(connection, NASTY)[1].decode()
    assert not set("\x1b\x9b\u202e\x07") & set(text)
    assert "\\x1b[2J" in text and "\\u202e" in text and "[bold]x[/]" in text


@given(st.text())
def test_visible_text_is_printable_and_plain_text_stays_as_it_is(text):
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in visible(text))
    assert visible("größe 数 «a»") == "größe 数 «a»"


def test_a_long_table_says_how_much_there_is(connection):
    count, text = answer(connection, "SELECT clip_id FROM clips ORDER BY 1")
    assert count == NUM_CLIPS
    assert text.decode().count("\n") < 60 and "first 50 of 600 rows" in text.decode()


def test_wide_rows_are_shown_one_value_a_line(connection, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = answer(connection, "SELECT * FROM catalog LIMIT 2")[1].decode()
    assert "row 2" in text and "caption_similarity" in text
    assert max(map(len, text.splitlines())) <= 80


def test_numbers_are_readable_in_a_table_and_exact_elsewhere(connection):
    sql = "SELECT 1234567 AS n, 1.0 / 3 AS share, 18446744073709551615::UBIGINT AS hash, NULL AS nothing, true AS yes"
    table = answer(connection, sql)[1].decode()
    assert "1,234,567" in table and "0.3333" in table and "NULL" in table
    [row] = json.loads(answer(connection, sql, "json")[1])
    assert row == {"n": 1234567, "share": 1 / 3, "hash": 2**64 - 1, "nothing": None, "yes": True}
    [fields] = list(csv.DictReader(io.StringIO(answer(connection, sql, "csv")[1].decode())))
    assert fields == {"n": "1234567", "share": str(1 / 3), "hash": str(2**64 - 1), "nothing": "", "yes": "True"}


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+2", "@SUM(A1)", "\t=1"])
def test_csv_text_cannot_become_a_formula(connection, text):
    sql = "SELECT '" + text + '\' AS "=evil", -5 AS number'
    rows = list(csv.reader(io.StringIO(answer(connection, sql, "csv")[1].decode(), newline="")))
    assert rows == [["'=evil", "number"], ["'" + text, "-5"]]


def test_csv_text_cannot_begin_a_row_of_its_own(connection):
    data = answer(connection, "SELECT 'a' || chr(13) || '=1' || chr(10) || '=2' AS text, 1 AS n", "csv")[1].decode()
    assert list(csv.reader(io.StringIO(data, newline=""))) == [["text", "n"], ["a\\x0d=1\n=2", "1"]]


def test_csv_and_json_keep_text_and_nested_values(connection):
    sql = "SELECT 'a \"quoted\", line' || chr(10) || 'ü' AS text, [1, 2] AS list, {'day': DATE '2026-01-02'} AS struct"
    [fields] = list(csv.DictReader(io.StringIO(answer(connection, sql, "csv")[1].decode(), newline="")))
    assert fields == {"text": 'a "quoted", line\nü', "list": "[1, 2]", "struct": '{"day": "2026-01-02"}'}
    [row] = json.loads(answer(connection, sql, "json")[1])
    assert row == {"text": 'a "quoted", line\nü', "list": [1, 2], "struct": {"day": "2026-01-02"}}
    nasty = answer(connection, NASTY, "json")[1].decode()
    assert not set("\x1b\x9b\u202e") & set(nasty) and json.loads(nasty)[0]["title"] == "\x1b[2J\x9b31m"


def test_json_is_an_array_even_if_empty_and_equal_names_stay_distinct(connection):
    assert json.loads(answer(connection, "SELECT 1 WHERE false", "json")[1]) == []
    assert json.loads(answer(connection, "SELECT 1 AS n, 2 AS n", "json")[1]) == [{"n": 1, "n_1": 2}]
    assert json.loads(answer(connection, "SELECT 'nan'::DOUBLE AS x", "json")[1]) == [{"x": None}]


def test_parquet_keeps_types_and_all_rows(connection):
    data = answer(connection, "SELECT clip_id, duration_s, phash FROM clips ORDER BY clip_id", "parquet")[1]
    table = pq.read_table(io.BytesIO(data))
    assert table.num_rows == NUM_CLIPS
    assert [str(kind) for kind in table.schema.types] == ["string", "double", "list<element: uint64>"]


def test_an_unknown_format_names_the_choices(connection):
    with pytest.raises(UserError, match="table, csv, json, parquet"):
        answer(connection, "SELECT 1", "xml")


# -- selections and the prompt --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where, count",
    [
        ("", NUM_CLIPS),
        ("n = 0;", NUM_CLIPS // 30),
        ("n = 0 OR n = 1 -- comment", NUM_CLIPS // 15),
        ("SELECT clip_id FROM clips LIMIT 7", 7),
        ("WITH x AS (SELECT clip_id FROM clips LIMIT 3) FROM x", 3),
    ],
)
def test_a_selection_is_a_condition_or_a_query(connection, where, count):
    assert len(rows_of(connection, f"SELECT clip_id FROM ({selection(where)})")) == count


def test_a_query_without_clip_id_does_not_select_everything(connection):
    with pytest.raises(UserError, match="clip_id"):
        rows_of(connection, f"SELECT clip_id FROM ({selection('SELECT video_id FROM videos')})")


def test_no_query_and_no_terminal_is_a_hint(connection):
    with pytest.raises(UserError, match="SELECT \\* FROM funnel"):
        prompt(connection)


def test_the_prompt_answers_forgives_mistakes_and_ends(corpus, tmp_path):
    """The test types on a pseudo-terminal."""
    typed = (
        ".tables\nSELECT count(*) AS n\nFROM clips;\nSELEC 1;\n.schema totals\n.nonsense\nSELECT 6 * 7 AS m\n\n.quit\n"
    )
    master, slave = pty.openpty()
    code = f"from shards.query.prompt import *; from shards.query.sql import *; prompt(open_manifest({str(corpus)!r}))"
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
    )
    os.close(slave)
    os.write(master, typed.encode())
    text = read_terminal(master)
    process.wait(timeout=600)
    assert process.returncode == 0, text
    for expected in ("funnel", "600", "Parser Error", "words_per_sentence", ".nonsense is not a command", "42"):
        assert expected in text
    assert "FROM clips;" in (tmp_path / "clipmill" / "sql_history").read_text()


def read_terminal(master) -> str:
    """Read the output of a terminal until it is closed."""
    chunks = []
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # EIO: the other end is closed
            chunk = b""
        if not chunk:
            os.close(master)
            return b"".join(chunks).decode()
        chunks.append(chunk)
