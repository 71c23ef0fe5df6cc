"""`clipmill sql DIR --export FILE` writes the whole corpus as one DuckDB file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clipmill.base.errors import UserError
from clipmill.cli.app import app
from shards.query.export import export
from tests.helpers.builds import ask

# A plain client, in a process that knows nothing of this project.
CLIENT = """
import duckdb, sys
connection = duckdb.connect(sys.argv[1], read_only=True)
print(connection.sql("SELECT count(*), count(caption), count(shard) FROM catalog").fetchall())
print(connection.sql("SELECT num_videos FROM totals").fetchall())
"""


def test_the_file_opens_in_a_plain_client_from_another_folder(whole, tmp_path):
    result = CliRunner().invoke(app, ["sql", str(whole), "--export", str(tmp_path / "one.duckdb")])
    assert result.exit_code == 0 and "one.duckdb" in result.output
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(tmp_path / "one.duckdb", elsewhere / "moved.duckdb")
    command = [sys.executable, "-I", "-c", CLIENT, "moved.duckdb"]
    process = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=True)
    assert process.stdout == "[(24, 24, 24)]\n[(8,)]\n"
    assert os.listdir(elsewhere) == ["moved.duckdb"]


def test_a_file_is_replaced_only_with_force_and_as_a_whole(whole, tmp_path, monkeypatch):
    file = tmp_path / "one.duckdb"
    file.write_text("of the user")
    with pytest.raises(UserError, match="--force"):
        export(whole, file)

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shards.query.export.copy_file", full)
        with pytest.raises(OSError, match="No space"):
            export(whole, file, force=True)
    assert file.read_text() == "of the user" and os.listdir(tmp_path) == ["one.duckdb"]
    export(whole, file, force=True)
    assert file.read_bytes() == (whole / "manifest.duckdb").read_bytes()


def test_mistakes_say_what_to_do(whole, tmp_path):
    with pytest.raises(UserError, match="name a file"):
        export(whole, tmp_path)
    with pytest.raises(UserError, match="the manifest of this corpus"):
        export(whole, whole / "manifest.duckdb", force=True)
    with pytest.raises(UserError, match="does not exist"):
        export(whole, tmp_path / "no" / "one.duckdb")
    with pytest.raises(UserError, match=r"has no manifest\.duckdb"):
        export(tmp_path, tmp_path / "one.duckdb")
    result = CliRunner().invoke(app, ["sql", str(whole), "SELECT 1", "--export", str(tmp_path / "one.duckdb")])
    assert isinstance(result.exception, UserError) and not (tmp_path / "one.duckdb").exists()


def test_the_manifest_is_not_changed(whole, tmp_path):
    before = (whole / "manifest.duckdb").read_bytes()
    export(whole, tmp_path / "one.duckdb")
    assert ask(whole, "SELECT count(*) FROM clips") == [(24,)]
    assert (whole / "manifest.duckdb").read_bytes() == before
