"""A build killed after its last commit and before it publishes: the next build publishes and packs."""

import shutil

import pytest

from pipeline.engine.build import build, session
from pipeline.engine.registry import stage_names
from pipeline.stages import pack as pack_stage
from pipeline.stages.ingest.stage import ingest_sources
from tests.helpers.builds import hashes, snapshot, tables
from tests.helpers.whole_corpus import SETTINGS, VIDEOS, write_sources


@pytest.fixture(scope="module")
def early_manifest(tmp_path_factory):
    """Return the first manifest that a build publishes: the sources only."""
    folder = tmp_path_factory.mktemp("early")
    with session(folder / "corpus", None, SETTINGS, "test", create=True) as (current, _):
        ingest_sources(current, [str(write_sources(folder / "list.jsonl", VIDEOS))])
        current.publish()
    return folder / "corpus" / "manifest.duckdb"


def build_again(corpus):
    return build(corpus, [], stages=stage_names(), recipe=None, assignments=[], command="test")


@pytest.mark.parametrize("packed", [False, True])
def test_the_next_build_publishes_unpublished_commits(whole, early_manifest, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_stage, "FEW_SHARDS", 1000)  # written in this process
    corpus = shutil.copytree(whole, tmp_path / "corpus")
    shutil.copy(early_manifest, corpus / "manifest.duckdb")
    if not packed:
        shutil.rmtree(corpus / "shards")
    report = build_again(corpus)
    assert report.engine.num_done == 0 and report.pack.num_written == (0 if packed else report.pack.num_shards)
    assert hashes(corpus / "shards") == hashes(whole / "shards") and tables(corpus) == tables(whole)
    settled = snapshot(corpus)
    assert not build_again(corpus).did_something and snapshot(corpus) == settled
