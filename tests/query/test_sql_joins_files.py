"""`clipmill sql --table NAME=FILE` joins a file, such as training's feedback, with the manifest."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from clipmill.base.errors import UserError
from shards.query.sql import named_tables, open_manifest, rows_of
from tests.helpers.manifests import make_manifest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joined")
    make_manifest(folder / "manifest.duckdb", 60)
    return folder


@pytest.fixture
def feedback(corpus):
    with open_manifest(corpus) as connection:
        clip_ids = rows_of(connection, "SELECT clip_id FROM clips ORDER BY 1")
    return pa.table({"clip_id": clip_ids, "loss": [float(number) for number in range(60)]})


def write(table, path):
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        lines = (f'{{"clip_id": "{row["clip_id"]}", "loss": {row["loss"]}}}\n' for row in table.to_pylist())
        path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".arrow"])
def test_a_file_is_a_table_beside_the_manifests(corpus, feedback, tmp_path, suffix):
    path = write(feedback, tmp_path / f"it's{suffix}")
    sql = "SELECT f.loss FROM catalog JOIN feedback f USING (clip_id) WHERE f.loss < 5 ORDER BY 1"
    with open_manifest(corpus, {"feedback": path}) as connection:
        assert rows_of(connection, sql) == [0, 1, 2, 3, 4]
        path.unlink()  # it was copied before file access ended
        assert rows_of(connection, "SELECT count(*) FROM feedback") == [60]


def test_queries_cannot_open_files_beside_the_tables(corpus, feedback, tmp_path):
    path = write(feedback, tmp_path / "feedback.parquet")
    with open_manifest(corpus, {"feedback": path}) as connection:
        for sql in (f"SELECT * FROM '{path}'", f"COPY feedback TO '{tmp_path}/x.csv'", "DROP TABLE feedback"):
            with pytest.raises(UserError):
                rows_of(connection, sql)


@pytest.mark.parametrize(
    "name, file, message",
    [
        ("clips", "feedback.parquet", "already"),
        ("Catalog", "feedback.parquet", "already"),
        ("_hidden", "feedback.parquet", "NAME=FILE"),
        ("a b", "feedback.parquet", "NAME=FILE"),
        ("feedback", "absent.parquet", "no such file"),
        ("feedback", "feedback.txt", "allowed are files in"),
        ("feedback", "broken.parquet", "cannot be read as a table"),
        ("feedback", "broken.arrow", "cannot be read as a table"),
    ],
)
def test_a_mistake_names_the_option(corpus, feedback, tmp_path, name, file, message):
    write(feedback, tmp_path / "feedback.parquet")
    for other in ("feedback.txt", "broken.parquet", "broken.arrow"):
        (tmp_path / other).write_text("nothing of the kind")
    with pytest.raises(UserError, match=message) as caught:
        open_manifest(corpus, {name: tmp_path / file})
    assert str(caught.value).startswith(f"--table {name}=")


def test_options_are_names_and_files():
    assert {name: str(path) for name, path in named_tables(["a=x.parquet", "b=y=z.csv"]).items()} == {
        "a": "x.parquet",
        "b": "y=z.csv",
    }
    for wrong in (["a"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(UserError, match="--table a"):
            named_tables(wrong)


def test_the_command_joins_a_file(corpus, feedback, tmp_path):
    path = write(feedback, tmp_path / "feedback.parquet")
    sql = "SELECT count(*) AS n FROM clips JOIN feedback USING (clip_id) WHERE loss >= 50"
    command = [sys.executable, "-m", "clipmill", "sql", str(corpus), sql, "--format", "csv", "--table"]
    done = subprocess.run([*command, f"feedback={path}"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["n", "10"]
    assert subprocess.run([*command, "feedback"], capture_output=True, text=True).returncode == 2
