"""`clipmill run pack` packs the existing clips with the current settings and runs no other stage."""

import io

import pytest
from rich.console import Console

from clipmill.cli.display import Terminal
from pipeline.engine.build import build
from shards.query.sql import open_manifest, rows_of
from tests.helpers.whole_corpus import build_whole, write_sources


@pytest.fixture
def corpus(tmp_path):
    build_whole(tmp_path / "corpus", write_sources(tmp_path / "list.jsonl", ["video-a", "video-b"]))
    return tmp_path / "corpus"


def pack(corpus, *settings, redo=False):
    return build(corpus, [], stages=["pack"], recipe=None, assignments=[*settings], command="test", redo=redo).pack


def packed(corpus) -> set[str]:
    with open_manifest(corpus) as connection:
        return {*rows_of(connection, "SELECT clip_id FROM samples")}


def test_shards_become_what_the_settings_want_now(corpus):
    assert pack(corpus).num_written == 0
    assert pack(corpus, redo=True).num_written > 0 and len(packed(corpus)) == 6
    assert pack(corpus, "pack.where=video_id = 'video-b'").num_samples == 3
    assert packed(corpus) == {"video-b.0", "video-b.1", "video-b.2"}


def test_changes_that_packing_alone_ignores_are_reported():
    for stages, is_reported in ((["pack"], True), (["score", "pack"], False), (["cut"], False)):
        console = Console(file=io.StringIO(), width=200)
        Terminal(console).plan({"score": {"done": 34, "pending": 8}}, stages)
        assert ("pending in other stages: score 8" in console.file.getvalue()) == is_reported
