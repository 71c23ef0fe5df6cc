"""Commands on a corpus whose fragments are merged: it is verified, explained, repaired and compacted like any other."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bench.same_corpus import orphans
from pipeline.engine.build import build, session
from pipeline.engine.registry import stage_names
from pipeline.maintenance.forget import compact
from pipeline.maintenance.verify import verify_with_sandbox
from shards.corpus.merged import merged_volumes, read_head
from shards.packing.deep_verify import repair_of
from shards.packing.tar import read_member
from shards.query.explain import explain
from tests.helpers.builds import ask, tables
from tests.packing.test_forget_leaves_nothing import GONE, KILLED, commit_edits, forget_video, lasting, traces
from tests.storage.test_merged_volumes import flip, loose, merged_files
from training.data.relocation import RelocationIndex

AT_ONCE = ["engine.merge_commits=1"]


def build_all(root: Path, *assignments: str):
    return build(root, [], stages=stage_names(), recipe=None, assignments=list(assignments), command="test")


@pytest.fixture(scope="module")
def merged(whole, tmp_path_factory) -> Path:
    root = Path(shutil.copytree(whole, tmp_path_factory.mktemp("merged") / "corpus"))
    commit_edits(root)
    build_all(root, *AT_ONCE)
    return root


@pytest.fixture
def corpus(merged, tmp_path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "corpus"))


def deep(root: Path) -> list:
    return [problem for problem in verify_with_sandbox(root, False, Console(quiet=True), deep=True)[0]]


def test_a_build_merges_what_is_done_unless_it_is_little(whole, merged, tmp_path):
    small = Path(shutil.copytree(whole, tmp_path / "small"))
    assert not build_all(small).did_something and merged_volumes(small) == []
    assert merged_volumes(merged) == [0] and loose(merged) == set()
    files = merged_files(merged)
    assert not build_all(merged, *AT_ONCE).did_something and merged_files(merged) == files
    assert tables(merged)["clips"] == tables(whole)["clips"]
    assert orphans(merged) == [] and deep(merged) == []


def test_it_is_explained_as_before(whole, merged):
    for name in ("video-b", "video-b.1"):
        before, after = explain(whole, name), explain(merged, name)
        edits = [row for row in after.attempts if row["stage"] == "edit"]
        assert [row for row in after.attempts if row not in edits] == before.attempts and len(before.attempts) > 5
    assert len(edits) == 1 and edits[0]["commit"] in read_head(merged, 0).commits


@pytest.mark.parametrize("table", ["captions", "ledger", "merged"])
def test_verify_finds_a_damaged_file_and_a_build_mends_it(corpus, table):
    build_all(corpus)
    [path] = (corpus / "fragments" / table).glob("merged-*.parquet")
    files = merged_files(corpus)
    flip(path)
    [problem] = [problem for problem in deep(corpus) if problem.path == str(path.relative_to(corpus))]
    assert problem.kind == "damaged" and "clipmill build" in repair_of(problem, str(corpus))
    assert not build_all(corpus, "engine.check_bytes=0").did_something
    assert merged_files(corpus) == files and deep(corpus) == []


def test_a_missing_file_of_rows_or_tar_is_a_problem(corpus):
    [path] = (corpus / "fragments" / "spans").glob("merged-*.parquet")
    path.unlink()
    next((corpus / "clips").glob("cut-*.tar")).unlink()
    kinds = {problem.path.split("/")[0]: problem.kind for problem in deep(corpus) if problem.kind == "missing-file"}
    assert kinds == {"fragments": "missing-file", "clips": "missing-file"}
    shutil.rmtree(corpus / ".clipmill")
    with session(corpus, None, [], "test", create=False) as (current, _):
        current.refresh_state()
        counts = current.ledger.counts()
        assert list(current.ledger.damaged) == [str(path.relative_to(corpus))]
    assert counts["segment"] == {"pending": 8} and "pending" not in counts["download"]


@pytest.fixture(scope="module")
def compacted(merged, tmp_path_factory) -> Path:
    root = Path(shutil.copytree(merged, tmp_path_factory.mktemp("compacted") / "corpus"))
    forget_video(root, GONE)
    compact(root)
    return root


def test_a_forgotten_video_leaves_nothing_in_merged_files(compacted, merged):
    assert traces(compacted, GONE, []) == [] and orphans(compacted) == []
    rest = ask(merged, f"SELECT clip_id, sha256 FROM clips WHERE video_id <> '{GONE}' ORDER BY 1")
    assert ask(compacted, "SELECT clip_id, sha256 FROM clips ORDER BY 1") == rest
    [(clip_id, sha256, tar, offset, size)] = ask(
        compacted, "SELECT clip_id, sha256, tar, mp4_offset, num_bytes FROM edited_clips"
    )
    [place] = RelocationIndex(compacted).find([bytes.fromhex(sha256)])
    data = read_member(compacted / place.shard, place.offset, place.num_bytes)
    assert clip_id == "video-a.1" and read_member(compacted / tar, offset, size) == data
    assert deep(compacted) == []


def test_what_remains_is_merged_again(compacted, tmp_path):
    root = Path(shutil.copytree(compacted, tmp_path / "corpus"))
    before = tables(root)
    assert loose(root)
    assert not build_all(root, *AT_ONCE).did_something
    assert not loose(root)
    shutil.rmtree(root / ".clipmill")
    assert not build_all(root, *AT_ONCE).did_something and tables(root) == before and deep(root) == []


@pytest.mark.slow
def test_killed_while_compacting_it_ends_in_the_same_bytes(corpus, compacted):
    """Compacting is killed several times, each time before the nth file is renamed or removed."""
    forget_video(corpus, GONE)
    for number in (25, 40, 20):
        script = KILLED.format(paths=sys.path, calls=number, root=str(corpus))
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
        assert process.returncode == -signal.SIGKILL, process.stderr
    compact(corpus)
    assert lasting(corpus) == lasting(compacted) and traces(corpus, GONE, []) == []
