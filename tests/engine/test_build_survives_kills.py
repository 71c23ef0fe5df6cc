"""A build that is killed with SIGKILL, again and again at arbitrary moments, ends in the bytes of a quiet one."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.builds import PLAIN, SMALL, build_here, clipmill, hashes, snapshot, tables

pytestmark = pytest.mark.slow


def command(sources, corpus) -> list[str]:
    settings = [word for setting in (*SMALL, *PLAIN) for word in ("--set", setting)]
    build = ["build", str(sources), "--corpus", str(corpus), "--recipe", "demo"]
    return [sys.executable, "-m", "clipmill", *build, *settings]


def stages_seen(corpus) -> int:
    """How far a build has got: the number of commits."""
    return len(list((corpus / "fragments" / "ledger").glob("[!.]*.parquet")))


@contextmanager
def one_video_waiting(world):
    """The server keeps one video waiting, so that a build runs for as long as it takes to ask about it and kill it."""
    waiting = next(row["file"] for row in world.truth.values() if row["works"] and row["broken"] is None)
    world.faults[waiting] = {"delay_s": 60}
    try:
        yield
    finally:
        del world.faults[waiting]


@contextmanager
def a_build_to_be_killed(world, corpus, **environment: str):
    """The command, with its process group killed when the block ends."""
    process = subprocess.Popen(
        command(world.sources, corpus),
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


def wait_for(reached, process, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def asked(world, local_ray, tmp_path_factory) -> tuple[Path, dict]:
    """A corpus whose build was asked about while it ran, and was killed then; and what was answered.

    It is killed alone: Ray, which it had joined, goes on. The other build below takes its Ray with it.
    """
    cluster = local_ray.get_runtime_context().gcs_address
    corpus, answers = tmp_path_factory.mktemp("asked") / "corpus", {}
    count = ("sql", corpus, "SELECT count(*) AS n FROM videos", "--format", "csv")
    with one_video_waiting(world), a_build_to_be_killed(world, corpus, RAY_ADDRESS=cluster) as process:
        wait_for(lambda: (corpus / "manifest.duckdb").exists(), process)
        answers["early"] = clipmill(*count)
        wait_for(lambda: stages_seen(corpus) >= 3, process)
        answers["later"], answers["status"] = clipmill(*count), clipmill("status", corpus)
        answers["second"] = clipmill("build", "--corpus", corpus)
        assert process.poll() is None, "the build was over before it could be asked"
    return corpus, answers


def test_asking_works_while_a_build_is_running(asked, world):
    _, answers = asked
    for answer in (answers["early"], answers["later"]):
        assert answer.stdout.split() == ["n", str(len(world.truth))], answer.stderr
    assert "A build is running" in answers["status"].stdout and "download" in answers["status"].stdout
    assert answers["second"].returncode == 2 and "is being written by process" in answers["second"].stderr


def test_kills_at_any_moment_leave_no_trace_in_the_corpus(built, asked, world, tmp_path):
    """Killed once while one video kept it waiting, once a little after it has gone on, and then left alone."""
    corpus, rng = shutil.copytree(asked[0], tmp_path / "corpus"), random.Random(5)
    reached = [stages_seen(corpus)]
    with a_build_to_be_killed(world, corpus) as process:
        wait_for(lambda: stages_seen(corpus) >= max(9, reached[0] + 2), process)
        time.sleep(rng.uniform(0, 0.5))
    reached.append(stages_seen(corpus))
    assert build_here(corpus, [str(world.sources)], *PLAIN).exit_code == 1  # the links that are made to fail
    quiet = built[0]
    assert reached[0] < stages_seen(corpus), "the first kill came too late to prove anything"
    assert hashes(corpus / "shards") == hashes(quiet / "shards")
    assert tables(corpus) == tables(quiet)
    leftovers = [name for name in snapshot(corpus) if ".tmp-" in name or ".next" in name or ".part" in name]
    assert leftovers == []
    owned = {path.name for path in (corpus / "fragments" / "ledger").glob("*.parquet")}
    for table in ("clips", "captions", "scores", "transcripts", "spans"):
        files = {path.name for path in (corpus / "fragments" / table).glob("*.parquet")}
        assert files <= owned, f"orphans in {table}"
