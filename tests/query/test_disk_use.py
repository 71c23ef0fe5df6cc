"""`stats` lists the bytes of every kind of file, and what keeping less would free."""

import io
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from clipmill.cli.app import app
from pipeline.engine.build import build
from shards.query.disk import disk_use, kind_of
from shards.query.sql import open_manifest
from shards.query.statistics import render, report
from tests.helpers.builds import ask
from tests.helpers.whole_corpus import VIDEOS, source_bytes


@pytest.fixture
def corpus(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "corpus"))


def use_of(corpus: Path):
    with open_manifest(corpus) as connection:
        return disk_use(corpus, connection)


def test_every_file_is_of_one_kind_and_the_sizes_are_those_on_the_disk(corpus):
    arguments = {"recipe": None, "command": "test", "stages": ["pack"]}
    build(corpus, [], assignments=["pack.where=video_id = 'video-a'"], pack="few", **arguments)
    use = use_of(corpus)
    assert list(use.kinds) == ["sources", "clips", "shards", "shards/few", "fragments", "manifest", "cache", "other"]
    for kind in ("sources", "clips", "shards/few", "fragments"):
        files = [path for path in (corpus / kind).rglob("*") if path.is_file()]
        assert use.kinds[kind] == (len(files), sum(path.stat().st_size for path in files)), kind
    main = [path for path in (corpus / "shards").iterdir() if path.is_file()]
    assert use.kinds["shards"] == (len(main), sum(path.stat().st_size for path in main))
    everything = [path for path in corpus.rglob("*") if path.is_file()]
    assert (use.num_files, use.num_bytes) == (len(everything), sum(path.stat().st_size for path in everything))


def test_what_a_setting_would_free_is_what_it_frees(corpus):
    use = use_of(corpus)
    freed = use.freed["download.keep_sources=false"]
    assert freed == sum(len(source_bytes(video)) for video in VIDEOS)
    for (path,) in ask(corpus, "SELECT path FROM videos WHERE video_id IN ('video-a', 'video-b')"):
        (corpus / path).unlink()
    assert use_of(corpus).freed["download.keep_sources=false"] == freed - 10_000
    arguments = {"recipe": None, "command": "test", "stages": ["pack"]}
    build(corpus, [], assignments=["download.keep_sources=false"], **arguments)
    after = use_of(corpus)
    assert after.freed["download.keep_sources=false"] == 0
    assert use.kinds["sources"][1] - after.kinds["sources"][1] == freed


def test_deleting_packed_clips_frees_what_is_said(corpus):
    arguments = {"recipe": None, "command": "test", "stages": ["pack"]}
    build(corpus, [], assignments=["pack.where=video_id <> 'video-a'"], **arguments)
    use = use_of(corpus)
    assert 0 < use.freed["pack.keep_clips=false"] < use.kinds["clips"][1], "the tar with video-a's clips would stay"
    build(corpus, [], assignments=["pack.keep_clips=false"], **arguments)
    after = use_of(corpus)
    assert use.kinds["clips"][1] - after.kinds["clips"][1] == use.freed["pack.keep_clips=false"]
    assert after.freed["pack.keep_clips=false"] == 0


def test_the_command_prints_them(corpus):
    output = CliRunner().invoke(app, ["stats", str(corpus)]).output
    assert "Files" in output and "fragments" in output and "download.keep_sources=false would free 40 KB" in output


def test_a_report_without_a_listing_has_no_such_table(corpus):
    console = Console(file=io.StringIO(), width=100)
    with open_manifest(corpus) as connection:
        render(report(connection), console)
    assert "keep_sources" not in console.file.getvalue()


@given(st.lists(st.text("ab.0-/", max_size=12), max_size=4))
def test_any_path_has_a_kind(parts):
    kind = kind_of("/".join(["shards", *parts]))
    assert kind == "shards" or kind.startswith(("shards/", "other"))
    assert kind_of("/".join(parts)) in ("other", "shards", "sources", "clips", "fragments", "manifest", "cache")
