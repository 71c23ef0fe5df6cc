"""Hostile queries and texts: a query reads the manifest only, and a text is displayed without side effects."""

import csv
import io
import json
import os
from pathlib import Path

import duckdb
import pytest
from rich.console import Console

from clipmill.base.console import print_failures
from clipmill.base.errors import UserError
from clipmill.base.text import visible
from shards.query.sql import open_manifest, run_query
from shards.query.statistics import render, report
from tests.helpers.builds import clipmill
from tests.helpers.manifests import make_manifest
from training.run.plots import bars, save

STEER = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\nfake line\u202egpj.exe\u200b\ufeff\U000e0041"
STEERING = set("\x1b\x07\x9b\r\u202e\u200b\ufeff\U000e0041")
FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x")']


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Make a manifest with hostile titles, categories, texts and failures."""
    root = tmp_path_factory.mktemp("hostile")
    make_manifest(root / "manifest.duckdb", 30)
    with duckdb.connect(str(root / "manifest.duckdb")) as connection:
        connection.execute("UPDATE videos SET title = ?, category = ?", [STEER, f"[bold]{STEER}[/]"])
        connection.execute("UPDATE failures SET message = ?, error_class = ?", [STEER, STEER])
        for row, formula in enumerate(FORMULAS):
            connection.execute(
                "UPDATE captions SET text = ? WHERE clip_id = (SELECT clip_id FROM clips ORDER BY 1 LIMIT 1 OFFSET ?)",
                [formula, row],
            )
    (root / "other.duckdb").unlink(missing_ok=True)
    with duckdb.connect(str(root / "other.duckdb")) as connection:
        connection.execute("CREATE TABLE secret AS SELECT 42 AS answer")
    (root / "secret.csv").write_text("a\n1\n")
    return root


ATTACKS = [
    "SELECT getenv('HOME')",
    "FROM read_text('{root}/secret.csv')",
    "FROM read_blob('{root}/secret.csv')",
    "FROM sniff_csv('{root}/secret.csv')",
    "FROM read_csv(['{root}/secret.csv'])",
    "FROM '{root}/other.duckdb'",
    "FROM read_duckdb('{root}/other.duckdb', table_name = 'secret')",
    "FROM parquet_metadata('{root}/x.parquet')",
    "FROM glob('{root}/*')",
    "FROM read_json('http://127.0.0.1:9/x.json')",
    "FROM read_parquet('s3://bucket/x.parquet')",
    "FROM 'https://127.0.0.1:9/x.csv'",
    "FROM duckdb_secrets()",
    "FROM which_secret('s3://x', 's3')",
    "FROM enable_logging('QueryLog', storage = 'file', storage_config = {{'path': '{root}/log'}})",
    "FROM enable_profiling()",
    "FROM query('COPY clips TO ''{root}/x.csv''')",
    "FROM query('FROM read_text(''{root}/secret.csv'')')",
    "FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''{root}/secret.csv'')'))",
    "FROM arrow_scan(1, 2, 3)",
    "FROM python_map_function(1)",
    "EXPLAIN ANALYZE FROM read_text('{root}/secret.csv')",
    "WITH x AS MATERIALIZED (FROM read_text('{root}/secret.csv')) FROM x",
    "SELECT (SELECT content FROM read_text('{root}/secret.csv'))",
    "PIVOT (FROM read_text('{root}/secret.csv')) ON filename",
    "CREATE SECRET s (TYPE s3)",
    "CREATE PERSISTENT SECRET s (TYPE s3)",
    "SET VARIABLE x = 1",
    "RESET lock_configuration",
    "PRAGMA enable_profiling = 'json'",
    "CALL pragma_database_size()",
    "IMPORT DATABASE '{root}'",
    "COPY (SELECT 1) TO '{root}/x'",
    "COPY clips FROM PROGRAM 'id'",
    "ATTACH ':memory:' AS m",
    "DETACH manifest",
    "UPDATE clips SET text = ''",
    "MERGE INTO clips USING clips c ON true WHEN MATCHED THEN DELETE",
    "TRUNCATE clips",
    "ALTER TABLE clips DROP text",
    "CREATE MACRO f() AS 1",
    "CREATE TEMP TABLE t AS SELECT 1",
    "VACUUM",
    "BEGIN",
    "SELECT 1; SELECT 2",
]


@pytest.mark.parametrize("sql", ATTACKS)
def test_a_query_reaches_nothing_but_the_manifest(corpus, sql):
    before = {path.name: path.read_bytes() for path in corpus.iterdir()}
    with open_manifest(corpus) as connection, pytest.raises(UserError):
        run_query(connection, sql.format(root=corpus), "json", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert {path.name: path.read_bytes() for path in corpus.iterdir()} == before


def test_asking_for_a_file_by_name_is_allowed_and_only_that_file(corpus):
    with open_manifest(corpus, {"mine": corpus / "secret.csv"}) as connection:
        out = io.StringIO()
        assert run_query(connection, "SELECT a FROM mine", "csv", out) == 1 and out.getvalue() == "a\n1\n"
        with pytest.raises(UserError):
            run_query(connection, f"FROM '{corpus}/secret.csv'", "csv", io.StringIO())


@pytest.mark.parametrize("format", ["table", "csv", "json"])
def test_no_format_steers_a_terminal(corpus, format):
    out = io.StringIO()
    with open_manifest(corpus) as connection:
        run_query(connection, f'SELECT title, title AS "{STEER}" FROM videos LIMIT 2', format, out)
    shown = set(out.getvalue())
    assert not shown & (STEERING if format == "table" else set("\x1b\x07\x9b\r\u202e"))
    assert "owned" in out.getvalue()


def test_csv_of_every_formula_is_text_in_a_spreadsheet(corpus):
    out = io.StringIO()
    with open_manifest(corpus) as connection:
        run_query(connection, "SELECT text FROM captions", "csv", out)
    cells = [row[0] for row in csv.reader(io.StringIO(out.getvalue()))]
    assert not [cell for cell in cells if cell[:1] in "=+-@\t\r" and cell]
    assert len([cell for cell in cells if cell.startswith("'") or cell.startswith("\\x0d")]) >= len(FORMULAS)


def test_json_is_json_whatever_is_in_it(corpus):
    out = io.StringIO()
    with open_manifest(corpus) as connection:
        run_query(connection, "SELECT title FROM videos LIMIT 1", "json", out)
    assert json.loads(out.getvalue())[0]["title"] == STEER


def test_statistics_and_failures_show_texts_as_they_are(corpus):
    out = io.StringIO()
    with open_manifest(corpus) as connection:
        render(report(connection), Console(file=out, force_terminal=False, width=120))
    console = Console(file=out, width=200)
    print_failures(console, [("download", STEER, 1, f"v: {STEER} [red]x[/] [link=http://x]y[/]")])
    assert not set(out.getvalue()) & STEERING and "[link=http://x]" in out.getvalue()


def test_an_error_cannot_steer_the_terminal(corpus):
    """DuckDB's messages quote the values that they complain about."""
    done = clipmill("sql", corpus, "SELECT title::INT FROM videos")
    assert done.returncode == 2 and "owned" in done.stderr
    assert not set(done.stderr) & STEERING


def test_a_drawing_shows_markup_as_text(tmp_path):
    script = "<script>alert(1)</script>\"'&"
    drawing = save(bars(script, {script: {script: 1.0}}, y_label=script), tmp_path / "x.svg").read_text()
    assert "<script" not in drawing and "&lt;script&gt;" in drawing


def test_invisible_characters_are_shown():
    assert visible("a\u200bb\u00ad\ufeff\U000e0041") == "a\\u200bb\\xad\\ufeff\\U000e0041"
    assert visible("👩\u200d👩 می\u200cخواهم") == "👩\u200d👩 می\u200cخواهم", "joiners are part of scripts and emoji"
    assert visible("two\nlines", keep="\n") == "two\nlines"


def test_the_environment_is_not_in_the_manifest(corpus, monkeypatch):
    monkeypatch.setenv("CLIPMILL_TEST_TOKEN", "s3cr3t-t0k3n")
    with open_manifest(corpus) as connection:
        out = io.StringIO()
        run_query(connection, "SELECT name, value FROM duckdb_settings()", "csv", out)
    assert os.environ["CLIPMILL_TEST_TOKEN"] not in out.getvalue()
