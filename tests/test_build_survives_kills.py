"""A build that is killed with SIGKILL, again and again at arbitrary moments, ends in the bytes of a quiet one."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from pipeline.demo.server import serve
from pipeline.demo.world import write_sources
from tests.build_support import SMALL, clipmill, hashes, snapshot, tables

pytestmark = pytest.mark.slow


def command(sources, corpus) -> list[str]:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    build = ["build", str(sources), "--corpus", str(corpus), "--recipe", "demo"]
    return [sys.executable, "-m", "pipeline.cli", *build, *settings]


def stages_seen(corpus) -> int:
    """How far a build has got: the number of commits."""
    return len(list((corpus / "fragments" / "ledger").glob("[!.]*.parquet")))


def has_manifest(corpus) -> bool:
    return (corpus / "manifest.duckdb").exists()


@pytest.fixture
def slow_sources(world, tmp_path):
    """The world from a server that keeps one video waiting, so that a build of it is still running for a while."""
    waiting = next(row["file"] for row in world.truth.values() if row["works"] and row["broken"] is None)
    with serve(world.folder, faults={waiting: {"delay_s": 25}}) as base_url:
        write_sources(world.folder, base_url, tmp_path / "slow.jsonl")
        yield tmp_path / "slow.jsonl"


def test_asking_works_while_a_build_is_running(world, slow_sources, tmp_path):
    corpus = tmp_path / "corpus"
    process = subprocess.Popen(command(slow_sources, corpus), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not has_manifest(corpus) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        early = clipmill("sql", corpus, "SELECT count(*) AS n FROM videos", "--format", "csv")
        while stages_seen(corpus) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        answer = clipmill("sql", corpus, "SELECT count(*) AS n FROM videos", "--format", "csv")
        status = clipmill("status", corpus)
        second = clipmill("build", "--corpus", corpus)
        assert process.poll() is None, "the build was over before it could be asked"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert early.stdout.split() == answer.stdout.split() == ["n", str(len(world.truth))], early.stderr + answer.stderr
    assert "A build is running" in status.stdout and "download" in status.stdout
    assert second.returncode == 2 and "is being written by process" in second.stderr


def test_kills_at_any_moment_leave_no_trace_in_the_corpus(built, world, tmp_path):
    corpus, rng = tmp_path / "corpus", random.Random(5)
    reached = []
    for target in (3, 9):  # commits after which this attempt is killed, a little later
        process = subprocess.Popen(command(world.sources, corpus), stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 120
        while process.poll() is None and stages_seen(corpus) < target and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reached.append(stages_seen(corpus))
    done = subprocess.run(command(world.sources, corpus), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr  # 1: the links that are made to fail
    quiet = built[0]
    assert reached[0] < stages_seen(corpus), "the first kill came too late to prove anything"
    assert hashes(corpus / "shards") == hashes(quiet / "shards")
    assert tables(corpus) == tables(quiet)
    leftovers = [name for name in snapshot(corpus) if ".tmp-" in name or ".next" in name or name.endswith(".part")]
    assert leftovers == []
    owned = {path.name for path in (corpus / "fragments" / "ledger").glob("*.parquet")}
    for table in ("clips", "captions", "scores", "transcripts", "spans"):
        files = {path.name for path in (corpus / "fragments" / table).glob("*.parquet")}
        assert files <= owned, f"orphans in {table}"
