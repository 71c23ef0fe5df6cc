"""A build killed with SIGKILL repeatedly ends in the same bytes as an undisturbed build."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.builds import PLAIN, SMALL, build_here, clipmill, hashes, snapshot, tables

pytestmark = pytest.mark.slow

PATIENT = "download.stall_timeout_s=3600"  # with a server that keeps it waiting


# Runs the command, and kills its process group once the driver has a number of commits.
DIES = """
import os, signal
from clipmill.cli import app as cli
from pipeline.engine import driver as engine
note, num_commits = engine.Engine._note_commits, 0
def note_and_die(self, commits):
    global num_commits
    note(self, commits)
    num_commits += len(commits)
    if num_commits >= {num_commits}:
        os.killpg(0, signal.SIGKILL)
engine.Engine._note_commits = note_and_die
cli.main()
"""


def command(sources, corpus) -> list[str]:
    settings = [word for setting in (*SMALL, *PLAIN, PATIENT) for word in ("--set", setting)]
    return ["build", str(sources), "--corpus", str(corpus), "--recipe", "demo", *settings]


def num_commits_of(corpus) -> int:
    """Return the number of commits, a measure of the build's progress."""
    return len(list((corpus / "fragments" / "ledger").glob("[!.]*.parquet")))


@contextmanager
def one_video_held_back(world):
    """Hold back one video on the server, so that the build still runs when the test queries and kills it."""
    waiting = next(row["file"] for row in world.truth.values() if row["works"] and row["broken"] is None)
    over = threading.Event()

    class Waits(dict):
        def get(self, key, default=None):
            if key == "delay_s":
                over.wait()
            return default

    world.faults[waiting] = Waits()
    try:
        yield
    finally:
        del world.faults[waiting]
        over.set()


@contextmanager
def running_build(world, corpus, code: str = "from clipmill.cli.app import main; main()", **environment: str):
    """Start the command; kill its process group when the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command(world.sources, corpus)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | environment,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(reached, process) -> None:
    while not reached():
        assert process.poll() is None, "the process has ended"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def queried_and_killed(world, local_ray, tmp_path_factory) -> tuple[Path, dict]:
    """Query a corpus while its build runs, then kill the build; return the corpus and the answers.

    Only the build is killed: the Ray that it joined keeps running. The build in the next test is killed with its Ray.
    """
    cluster = local_ray.get_runtime_context().gcs_address
    corpus, answers = tmp_path_factory.mktemp("asked") / "corpus", {}
    count = ("sql", corpus, "SELECT count(*) AS n FROM videos", "--format", "csv")
    with one_video_held_back(world), running_build(world, corpus, RAY_ADDRESS=cluster) as process:
        wait_for(lambda: (corpus / "manifest.duckdb").exists(), process)
        answers["early"] = clipmill(*count)
        wait_for(lambda: num_commits_of(corpus) >= 3, process)
        answers["later"], answers["status"] = clipmill(*count), clipmill("status", corpus)
        answers["second"] = clipmill("build", "--corpus", corpus)
        assert process.poll() is None, "the build ended before it could be queried"
    return corpus, answers


def test_queries_work_while_a_build_is_running(queried_and_killed, world):
    _, answers = queried_and_killed
    for answer in (answers["early"], answers["later"]):
        assert answer.stdout.split() == ["n", str(len(world.truth))], answer.stderr
    assert "A build has been running" in answers["status"].stdout and "download" in answers["status"].stdout
    assert answers["second"].returncode == 2 and "is being written by process" in answers["second"].stderr


def test_kills_at_any_moment_leave_no_trace_in_the_corpus(built, queried_and_killed, world, tmp_path):
    """The build is killed once while it waits for a video, once after it has resumed, and then runs to its end."""
    corpus = shutil.copytree(queried_and_killed[0], tmp_path / "corpus")
    reached = [num_commits_of(corpus)]
    with running_build(world, corpus, DIES.format(num_commits=3)) as process:
        assert process.wait(1200) == -signal.SIGKILL
    reached.append(num_commits_of(corpus))
    report = build_here(corpus, [str(world.sources)], *PLAIN)
    assert report.failures or report.num_old_failures  # the links that are made to fail
    quiet = built[0]
    assert reached[0] < reached[1] < num_commits_of(corpus), "a kill came too late to prove anything"
    assert hashes(corpus / "shards") == hashes(quiet / "shards")
    assert tables(corpus) == tables(quiet)
    leftovers = [name for name in snapshot(corpus) if ".tmp-" in name or ".next" in name or ".part" in name]
    assert leftovers == []
    owned = {path.name for path in (corpus / "fragments" / "ledger").glob("*.parquet")}
    for table in ("clips", "captions", "scores", "transcripts", "spans"):
        files = {path.name for path in (corpus / "fragments" / table).glob("*.parquet")}
        assert files <= owned, f"orphans in {table}"
