"""Reference texts are served only with the clips they describe; corpora without them stay unchanged."""

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipmill.base.errors import ItemError
from pipeline.stages.segment.segment import SegmentSettings, segment_video
from shards.corpus.fragments import fragment_path, table_schema, write_commit
from shards.corpus.manifest import is_current, publish
from shards.corpus.schema import LEDGER
from shards.packing.pack import FIXED, PackSettings, select_samples
from shards.query.sql import open_manifest
from tests.helpers.ledgers import STAGES, FragmentCorpus
from tests.helpers.shards import change_manifest, make_corpus, pack


class Benchmark(FragmentCorpus):
    """Make a corpus of videos with the spans of their list, or of another `origin`."""

    origin = "given"

    def add(self, video_id: str, texts: list[tuple[int, str]] | None, split: str | None = "test") -> None:
        known = self.ledger.connection.execute("SELECT count(*) FROM sources").fetchall()[0][0]
        row = {"item_id": video_id, "unit": "u000000", "key": "i", "video_id": video_id, "url": f"/v/{video_id}"}
        row |= {"kind": "file", "ordinal": known, "split": split}
        row["texts"] = texts and [{"n": n, "text": text} for n, text in texts]
        table = pa.Table.from_pylist([row], table_schema("sources"))
        write_commit(self.root, f"ingest-{known}", {"sources": table}, LEDGER.empty_table(), [])
        self.ledger.load([f"ingest-{known}"])

    def segment(self, item: dict) -> dict:
        rows = super().segment(item)
        for row in rows["spans"]:
            row["origin"] = self.origin
        return rows

    def ask(self, sql: str) -> list[tuple]:
        self.refresh_state()
        publish(self.ledger)
        with open_manifest(self.root) as connection:
            return connection.execute(sql).fetchall()


@pytest.fixture
def corpus(tmp_path):
    corpus = Benchmark(tmp_path)
    yield corpus
    corpus.ledger.close()


def test_each_clip_has_its_own_texts_in_their_order(corpus):
    corpus.add("a", [(1, "second piece"), (0, "z first"), (0, "a first"), (7, "of a piece that was not cut")])
    corpus.work_off()
    texts = corpus.ask("SELECT clip_id, n, text, video_id FROM texts")
    assert texts == [("a.0", 0, "z first", "a"), ("a.0", 1, "a first", "a"), ("a.1", 0, "second piece", "a")]
    rows = corpus.ask("SELECT clip_id, split, texts, text, num_words FROM catalog ORDER BY 1")
    assert rows[0] == ("a.0", "test", ["z first", "a first"], "z first", 2)
    assert rows[1] == ("a.1", "test", ["second piece"], "second piece", 2)


def test_spans_of_another_making_do_not_get_texts_about_given_ones(corpus):
    corpus.origin = "shots"
    corpus.add("a", [(0, "about the whole video")])
    corpus.work_off()
    assert corpus.ask("SELECT * FROM texts") == []
    assert corpus.ask("SELECT texts, text FROM catalog WHERE clip_id = 'a.0'") == [(None, "text 0")]


def test_a_unit_by_itself_has_the_same_texts_as_in_the_whole(corpus):
    corpus.add("a", [(0, "one"), (1, "two")])
    corpus.work_off()
    corpus.refresh_state(units=["u000000"])
    rows = corpus.ledger.connection.execute("SELECT clip_id, text FROM current_clips ORDER BY 1").fetchall()
    assert rows == [("a.0", "one"), ("a.1", "two")]


def test_equal_files_are_two_videos_where_they_have_texts_and_copies_where_not(corpus):
    for video_id, texts in (("a", [(0, "one")]), ("b", [(0, "two")]), ("c", None), ("d", None)):
        corpus.add(video_id, texts, split="train")
        corpus.bytes_of[video_id] = "the same bytes"
    corpus.work_off()
    assert corpus.ask("SELECT video_id, duplicate_of FROM videos ORDER BY 1") == [
        ("a", None), ("b", None), ("c", None), ("d", "c"),
    ]  # fmt: skip
    assert corpus.ask("SELECT clip_id, text FROM texts") == [("a.0", "one"), ("b.0", "two")]


def test_splits_are_counted(corpus):
    corpus.add("a", [(0, "same"), (0, "same"), (0, "other")], split="train")
    corpus.add("b", [(0, "same")], split="test")
    corpus.add("c", [(0, "lost")], split="test")
    corpus.fail["download:c"] = ItemError("not-found", "gone")
    corpus.work_off()
    columns = "split, num_videos, num_clips, num_texts, num_repeated_texts"
    assert corpus.ask(f"SELECT {columns} FROM splits") == [("test", 2, 2, 1, 0), ("train", 1, 2, 3, 2)]


def test_a_corpus_of_an_earlier_version_loads_and_its_manifest_is_published_anew(corpus):
    corpus.add_sources("a")
    path = fragment_path(corpus.root, "sources", "ingest-u000000-0")
    pq.write_table(pq.read_table(path).drop_columns(["split", "texts"]), path)
    corpus.ledger.load(["ingest-u000000-0"])
    corpus.work_off()
    assert corpus.ask("SELECT clip_id, split, texts, text FROM catalog ORDER BY 1")[0] == ("a.0", None, None, "text 0")
    assert is_current(corpus.root) and not corpus.work_off(STAGES)
    with duckdb.connect(str(corpus.root / "manifest.duckdb")) as connection:
        connection.execute("COMMENT ON VIEW catalog IS NULL")
    assert not is_current(corpus.root)
    (corpus.root / "manifest.duckdb").unlink()
    assert not is_current(corpus.root)


def test_shards_of_clips_without_split_and_texts_keep_their_keys(tmp_path):
    root = make_corpus(tmp_path / "corpus", 4)
    change_manifest(
        root,
        "UPDATE videos SET split = 'test'; INSERT INTO texts BY NAME "
        "SELECT clip_id, 0 AS n, 'one' AS text, video_id FROM clips ORDER BY clip_id LIMIT 1",
    )
    with open_manifest(root) as connection:
        marked = dict(zip(*select_samples(connection, PackSettings()).select(["clip_id", "content"]), strict=True))
    change_manifest(root, "UPDATE videos SET split = NULL; DELETE FROM texts")
    columns = ", ".join(f"'{name}': {name}" for name in (*FIXED, "sha256", "frame_sha256", "phash", "kind"))
    with open_manifest(root) as connection:
        plain = dict(zip(*select_samples(connection, PackSettings()).select(["clip_id", "content"]), strict=True))
        before = dict(
            connection.execute(f"SELECT clip_id, md5(to_json({{{columns}}})::VARCHAR) FROM catalog").fetchall()
        )
    assert {str(clip): str(content) for clip, content in plain.items()} == before
    assert len({*map(str, marked.values())} - {*before.values()}) == 4
    pack(root)


def test_a_given_span_without_an_end_goes_to_the_end_of_the_video():
    given = [{"n": 0, "start_s": 0.0, "end_s": None}]
    (span,) = segment_video("v", [], 12.34, given, None, SegmentSettings()).spans
    assert (span["start_s"], span["end_s"], span["origin"]) == (0.0, 12.34, "given")
    for unknown in (None, 0.0):
        with pytest.raises(ItemError, match="unknown-duration"):
            segment_video("v", [], unknown, given, None, SegmentSettings())
