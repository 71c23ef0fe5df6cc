"""`verify` finds every caption, score or text that was made from another clip."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.packing.verify import verify
from shards.query.sql import open_manifest
from tests.helpers.builds import ask
from tests.helpers.ledgers import FragmentCorpus
from tests.helpers.shards import change_manifest, list_members, make_corpus, pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = make_corpus(tmp_path_factory.mktemp("pairs") / "corpus")
    pack(root)
    return root


@pytest.fixture
def corpus(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "corpus")
    return tmp_path / "corpus"


def found(root) -> list[tuple[str, str]]:
    with open_manifest(root) as connection:
        return [(problem.kind, problem.item) for problem in verify(root, connection)]


def two_clips(root) -> tuple[str, str]:
    rows = ask(root, "SELECT clip_id FROM catalog WHERE caption IS NOT NULL AND shard IS NOT NULL ORDER BY 1 LIMIT 2")
    return rows[0][0], rows[1][0]


def swap(root, table: str, column: str, one: str, other: str) -> None:
    change_manifest(
        root,
        f"UPDATE {table} t SET {column} = o.{column} FROM {table} o WHERE o.clip_id = "
        f"CASE t.clip_id WHEN '{one}' THEN '{other}' ELSE '{one}' END AND t.clip_id IN ('{one}', '{other}')",
    )


@pytest.mark.parametrize("table, column", [("captions", "frame_sha256"), ("scores", "frame_sha256")])
def test_a_row_made_from_another_clip_is_found(corpus, table, column):
    one, other = two_clips(corpus)
    swap(corpus, table, column, one, other)
    assert {(kind, item) for kind, item in found(corpus)} == {("wrong-pair", one), ("wrong-pair", other)}


@pytest.mark.parametrize("table", ["spans", "sentences"])
def test_a_text_heard_in_other_bytes_of_the_video_is_found(corpus, table):
    [(clip_id,)] = ask(corpus, f"SELECT min(clip_id) FROM {table}")
    change_manifest(corpus, f"UPDATE {table} SET source_sha256 = 'other' WHERE clip_id = '{clip_id}'")
    assert found(corpus) == [("wrong-pair", clip_id)]


def test_a_reference_text_of_another_clip_is_found(corpus):
    one, _ = two_clips(corpus)
    change_manifest(corpus, f"INSERT INTO texts VALUES ('{one}', 0, 'a text', 'v', 'of another clip', 0)")
    assert found(corpus) == [("wrong-pair", one)]


def test_swapped_pictures_in_a_shard_are_found(corpus):
    """The caption's row and the manifest agree, but the bytes in the shard are another clip's."""
    shard = sorted((corpus / "shards").glob("*.tar"))[0]
    one, other = [member for member in list_members(shard) if member.name.endswith(".jpg")][:2]
    data = bytearray(shard.read_bytes())
    size = min(one.num_bytes, other.num_bytes)
    first, second = data[one.offset : one.offset + size], data[other.offset : other.offset + size]
    data[one.offset : one.offset + size], data[other.offset : other.offset + size] = second, first
    shard.write_bytes(data)
    assert sorted(found(corpus)) == sorted([("hash-mismatch", one.name), ("hash-mismatch", other.name)])


def test_rows_without_hashes_are_counted_not_reported_as_wrong(corpus):
    change_manifest(corpus, "UPDATE spans SET source_sha256 = NULL")
    assert found(corpus) == [("unknown-origin", "")]
    change_manifest(corpus, "ALTER TABLE spans DROP COLUMN source_sha256")
    assert found(corpus) == [("unknown-origin", "")]
    with open_manifest(corpus) as connection:
        [problem] = verify(corpus, connection)
        assert problem.is_warning and "rows of spans have no source_sha256" in problem.message


def test_a_caption_of_a_frame_that_the_clip_has_elsewhere_is_not_served(tmp_path):
    """Two clips' captions are exchanged in the fragments: both are left out, and neither is served for the other."""
    corpus = FragmentCorpus(tmp_path)
    corpus.add_sources("a", "b")
    corpus.work_off()
    before = corpus.served_captions()
    assert set(before) == {"a.0", "a.1", "b.0", "b.1"}
    corpus.ledger.close()
    for path in (tmp_path / "fragments" / "captions").glob("*.parquet"):
        rows = pq.read_table(path)
        swapped = {"a.0": "b.0", "b.0": "a.0"}
        ids = pa.array([swapped.get(clip_id, clip_id) for clip_id in rows["clip_id"].to_pylist()])
        pq.write_table(rows.set_column(rows.column_names.index("clip_id"), "clip_id", ids), path, compression="zstd")
    (tmp_path / ".clipmill" / "ledger.duckdb").unlink()
    corpus.open()
    served = corpus.served_captions()
    assert {clip: text for clip, text in served.items() if clip in ("a.0", "b.0")} == {}
    corpus.ledger.close()
