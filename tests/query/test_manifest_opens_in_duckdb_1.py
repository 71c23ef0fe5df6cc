"""The manifest has the file format of DuckDB 1.0, so that clients of every version since then open it.

A file of a newer format is refused by them before they read a table. By hand, a real client:
`uv run --isolated --no-project --with duckdb==1.0.0,pytz python` and `SELECT * FROM catalog`.
"""

from pathlib import Path

import duckdb

from tests.helpers.whole_corpus import VIDEOS, build_whole, write_sources

FORMAT_OF_1_0 = 64  # the number in the main header; DuckDB 1.0's own is 64, later formats have higher ones


def test_a_published_manifest_has_the_format_of_duckdb_1_0(tmp_path: Path) -> None:
    build_whole(tmp_path / "corpus", write_sources(tmp_path / "sources.jsonl", VIDEOS[:2]))
    path = tmp_path / "corpus" / "manifest.duckdb"
    header = path.read_bytes()[:20]  # a checksum of 8 bytes, the name, the number
    assert header[8:12] == b"DUCK" and int.from_bytes(header[12:20], "little") == FORMAT_OF_1_0
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{path}' AS manifest (READ_ONLY)")
        [[tags]] = connection.sql("SELECT tags FROM duckdb_databases() WHERE database_name = 'manifest'").fetchall()
        assert tags["storage_version"].startswith("v1.0.0")
        assert connection.sql("SELECT count(*) FROM manifest.catalog").fetchall() == [(6,)]
