"""A stage from another package, given as an entry point, gets settings, a table and a column like a built-in one."""

import json
import shutil
import sys

import pytest
from typer.testing import CliRunner

from clipmill.base.errors import UserError
from clipmill.cli.app import app
from clipmill.cli.explain import told
from pipeline.engine import registry
from pipeline.engine.build import build, status
from pipeline.engine.settings import resolve
from shards.corpus import schema
from shards.packing.tar import read_member
from shards.packing.verify import verify
from shards.query.explain import explain
from shards.query.sql import open_manifest
from tests.helpers.builds import ask
from tests.helpers.shards import change_manifest, list_members
from tests.helpers.whole_corpus import CLIPS_PER_VIDEO, VIDEOS

NUM_CLIPS = len(VIDEOS) * CLIPS_PER_VIDEO
MODULE = "tests.helpers.toy_stage"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Register the toy stage as the entry point of an installed package, and unregister it after the test."""
    installed = tmp_path / "site" / "toy-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\ntoy = {MODULE}:TOY\n")
    known = [
        (tables, dict(tables)) for tables in (schema._FRAGMENTS, schema._PUBLISHED, schema.TABLES, schema.MANIFEST)
    ]
    monkeypatch.syspath_prepend(str(installed.parent))
    registry.all_stages.cache_clear()
    yield
    registry.all_stages.cache_clear()
    sys.modules.pop(MODULE)
    for tables, before in known:
        tables.clear()
        tables.update(before)


@pytest.fixture
def corpus(whole, tmp_path, toy, local_ray):
    return shutil.copytree(whole, tmp_path / "corpus")


def run(corpus, *assignments, stages=("toy",), **options):
    return build(corpus, [], stages=stages, recipe=None, assignments=list(assignments), command="test", **options)


def test_it_has_settings_and_is_offered(toy):
    assert registry.stage_names() == (*(stage.name for stage in registry.STAGES[:-1]), "toy", "pack")
    settings = resolve(None, None, ["toy.scale=3"])
    assert settings.toy.scale == 3 and list(settings.model_dump())[-3:] == ["toy", "pack", "engine"]
    with pytest.raises(UserError, match="setting toy.scal: there is no such setting; known .*are unit, scale"):
        resolve(None, None, ["toy.scal=3"])
    assert "score, toy" in " ".join(CliRunner().invoke(app, ["run", "--help"]).stdout.replace("│", " ").split())


@pytest.mark.slow
def test_it_runs_where_it_is_pending_and_its_column_is_in_sql_and_in_samples(corpus):
    before = status(corpus, []).counts
    assert before.pop("toy") == {"pending": NUM_CLIPS}
    assert all(set(by_status) == {"done"} for by_status in before.values())
    assert run(corpus).engine.num_done == NUM_CLIPS
    sizes = dict(ask(corpus, "SELECT clip_id, frame_size FROM catalog JOIN frame_sizes USING (clip_id, frame_size)"))
    assert len(sizes) == NUM_CLIPS and sizes == dict(ask(corpus, "SELECT clip_id, frames[1].num_bytes FROM clips"))

    assert not run(corpus).did_something
    assert run(corpus, "toy.scale=2").engine.num_done == NUM_CLIPS
    assert dict(ask(corpus, "SELECT clip_id, frame_size FROM catalog")) == {c: 2 * n for c, n in sizes.items()}
    assert run(corpus, where="clip_id = 'video-a.0'").engine.num_done == 1
    assert status(corpus, []).counts["toy"] == {"done": NUM_CLIPS} and status(corpus, ["toy.unit=null"]).off == ["toy"]

    assert status(corpus, []).pack["to_pack"] == 0, "a late column makes no shard pending"
    assert run(corpus, stages=("pack",), redo=True).pack.num_samples == NUM_CLIPS
    [json_member] = [m for m in list_members(corpus / "shards/000000-000000.tar") if m.name.endswith(".json")][:1]
    sample = json.loads(read_member(corpus / "shards/000000-000000.tar", json_member.offset, json_member.num_bytes))
    assert sample["frame_size"] == 2 * sizes[sample["clip_id"]]

    story = explain(corpus, "video-c.1")
    assert [row["stage"] for row in story.attempts][-2:] == ["toy", "toy"]
    assert story.stages["frame_sizes"][0]["frame_size"] == 2 * sizes["video-c.1"]
    assert any("frame_size " in line for line in told(story))
    assert any("toy of clips: 6 done" in line for line in told(explain(corpus, "video-c")))
    with open_manifest(corpus) as connection:
        assert verify(corpus, connection) == []
    change_manifest(corpus, "UPDATE frame_sizes SET frame_sha256 = 'other' WHERE clip_id = 'video-c.1'")
    with open_manifest(corpus) as connection:
        wrong = {(problem.kind, problem.item) for problem in verify(corpus, connection)}
    assert wrong == {("wrong-pair", "video-c.1")}


@pytest.mark.slow
def test_without_its_package_the_corpus_says_which_settings_it_does_not_know(corpus, monkeypatch):
    run(corpus)
    monkeypatch.setattr(registry, "ENTRY_POINTS", "none.of.these")
    registry.all_stages.cache_clear()
    assert "setting toy: there is no such setting" in status(corpus, []).problems[0]
    with pytest.raises(UserError, match="setting toy: there is no such setting"):
        run(corpus)
