"""`clipmill run pack`: shards as the settings want them now, from what is cut already; no other stage is asked for."""

import pytest
from whole_corpus_support import build_whole, write_sources

from pipeline.build import build
from shards.sql import open_manifest, rows_of


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
