"""A corpus has one writer at a time, whose death is recognised, and its readers see complete snapshots."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from clipmill.base.errors import ItemError, UserError
from clipmill.base.file_lock import lock_file
from clipmill.base.settings import Settings
from pipeline.engine.build import Silent, build
from pipeline.runtime.task import Outcome, Task, commit
from pipeline.stages.download.fetch import DownloadSettings
from pipeline.stages.download.stage import run_download
from shards.corpus.folder import Corpus
from shards.corpus.fragments import sweep_temporaries
from shards.corpus.tombstones import hash_of, write_tombstones
from shards.query.sql import open_manifest
from tests.helpers.builds import build_here
from tests.helpers.shards import mp4_bytes

HOLDS = """
import os, sys, time
sys.path[:0] = {paths}
from shards.corpus.folder import Corpus
with Corpus({root!r}).writer():
    if {forks} and os.fork() == 0:
        os.write(1, f"child {{os.getpid()}}\\n".encode())
        time.sleep(1000)
        os._exit(0)
    os.write(1, b"held\\n")
    time.sleep(1000)
"""

PUBLISHES = """
import sys
sys.path[:0] = {paths}
from pathlib import Path
from tests.helpers.ledgers import FragmentCorpus
from shards.corpus.manifest import publish
corpus = FragmentCorpus(Path({root!r}))
number = 0
while True:
    corpus.add_sources(f"v{{number}}a", f"v{{number}}b", unit=f"u{{number:06d}}")
    corpus.work_off(["download", "transcribe"])
    corpus.refresh_state()
    publish(corpus.ledger)
    print("published", flush=True)
    number += 1
"""


@contextmanager
def process(script: str, **values):
    """Start a real process; kill it with SIGKILL at the end."""
    code = script.format(paths=sys.path, **values)
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        running.kill()
        running.wait()
        running.stdout.close()


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    made = Corpus(tmp_path / "corpus")
    made.create()
    made.save_settings({})
    return made


def test_a_second_writer_learns_who_writes_where_and_since_when(corpus):
    with process(HOLDS, root=str(corpus.root), forks=False) as holder:
        holder.stdout.readline()
        with pytest.raises(UserError, match="is being written by") as refused:
            build(corpus.root, [], stages=["cut"], recipe=None, assignments=[], command="test")
        assert corpus.is_being_written()
    said = rf"process {holder.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    assert re.search(said, str(refused.value))


def test_the_lock_of_a_killed_process_is_free(corpus):
    with process(HOLDS, root=str(corpus.root), forks=False) as holder:
        holder.stdout.readline()
    assert not corpus.is_being_written()
    with corpus.writer():
        assert f"process {os.getpid()} on" in (corpus.private / "lock").read_text()


def test_a_lock_that_only_a_dead_holders_child_keeps_is_taken_over(corpus):
    with process(HOLDS, root=str(corpus.root), forks=True) as holder:
        said = {holder.stdout.readline().strip(), holder.stdout.readline().strip()}
        child = int(next(line for line in said if line.startswith("child")).split()[1])
        with pytest.raises(UserError, match="is being written by"), corpus.writer():
            pass
    try:
        os.kill(child, 0)
        with corpus.writer():
            assert f"process {os.getpid()} on" in (corpus.private / "lock").read_text()
            with pytest.raises(UserError, match=f"process {os.getpid()} "), Corpus(corpus.root).writer():
                pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_file_belongs_to_one_thread_at_a_time_and_is_then_removed(tmp_path):
    inside, most = [], []

    def enter(number: int) -> None:
        for _ in range(20):
            with lock_file(tmp_path / "lock", 30, remove=True):
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(4)))
    assert len(most) == 80 and max(most) == 1
    assert list(tmp_path.iterdir()) == []


def failing(corpus: Corpus, video_id: str, holder: str) -> tuple[Task, list[Outcome]]:
    item = {"item_id": video_id, "key": "k", "attempts": 0, "cost": 1}
    work = Task("segment", "u000000", [item], Settings(), "f", str(corpus.root), "run", lock_owner=holder)
    return work, [Outcome(video_id, failure=ItemError("internal-error", "its files were swept"))]


def test_a_worker_that_outlived_its_build_commits_nothing_once_another_writes(corpus):
    """Its failures, caused by the other's clean-up, would otherwise be recorded or undo the other's work."""
    with corpus.writer():
        before = corpus.lock_owner
    first = commit(*failing(corpus, "a", before), [])  # the build is dead, but there is no other writer
    with process(HOLDS, root=str(corpus.root), forks=False) as holder:
        holder.stdout.readline()
        for _ in ("while the other lives", "and when it is dead, too"):
            with pytest.raises(UserError, match="another process is writing the corpus"):
                commit(*failing(corpus, "b", before), [])
            holder.kill()
            holder.wait()
    assert [path.stem for path in (corpus.root / "fragments" / "ledger").iterdir()] == [first.name]


def test_a_download_of_an_earlier_build_publishes_nothing(corpus, tmp_path, monkeypatch):
    """It does not start one either, and its partial file is left for the next build."""
    film, folder = tmp_path / "film.mp4", corpus.root / "sources" / "u000000"
    film.write_bytes(mp4_bytes(1, 3, 0))
    source = {"video_id": "a", "url": str(film), "kind": "file", "subtitle": None, "language": None}
    item = {"item_id": "a", "key": "k", "attempts": 0, "cost": 1, **source}
    settings = DownloadSettings(reference_local_files=False)

    def download_as(holder: str) -> list[str]:
        outcomes, _ = run_download(
            Task("download", "u000000", [item], settings, "f", str(corpus.root), "run", lock_owner=holder)
        )
        assert outcomes[0].failure is None
        return [path.name for path in folder.iterdir()]

    def probe_while_another_begins(sandbox, probe, path, timeout_s):
        (corpus.private / "lock").write_text("process 1 on another machine since then")

    with corpus.writer():
        holder = corpus.lock_owner
        with monkeypatch.context() as patch, pytest.raises(UserError, match="another process is writing"):
            patch.setattr("clipmill.media.sandbox.Sandbox.call", probe_while_another_begins)
            download_as(holder)
        assert [path.name for path in folder.rglob("*")] == ["a.part", "media"]
        shutil.rmtree(folder / "a.part")
        with pytest.raises(UserError, match="another process is writing"):
            download_as(holder)
        assert list(folder.iterdir()) == []
    with corpus.writer():
        assert download_as(corpus.lock_owner) == ["a.mp4"]


@pytest.mark.slow
def test_a_build_whose_corpus_another_process_has_taken_over_ends(local_ray, tmp_path):
    """The engine passes its lock's owner to the workers."""

    class TakesOver(Silent):
        def plan(self, counts, stages) -> None:
            (tmp_path / "corpus" / ".clipmill" / "lock").write_text("process 1 on another machine since then")

    film = tmp_path / "film.mp4"
    film.write_bytes(mp4_bytes(1, 3, 0))
    with pytest.raises(UserError, match="another process is writing the corpus"):
        build_here(tmp_path / "corpus", [str(film)], stages=["ingest", "download"], display=TakesOver())
    assert list((tmp_path / "corpus" / "fragments" / "downloads").glob("*.parquet")) == []


@pytest.mark.slow
def test_readers_see_whole_snapshots_while_a_build_publishes(tmp_path):
    """Every video of a snapshot is downloaded and transcribed, and videos come in pairs, even after a kill.

    A tombstone needs no lock: the publishing process finds it without being notified.
    """
    facts = (
        "SELECT count(*), count(path), count(transcript_origin), count(DISTINCT unit) * 2, max(ordinal) + 1 FROM videos"
    )
    with process(PUBLISHES, root=str(tmp_path)) as writer:
        writer.stdout.readline()
        with open_manifest(tmp_path) as first:
            seen = [first.execute(facts).fetchall()[0]]
            while len(set(seen)) < 3:
                assert writer.poll() is None
                with open_manifest(tmp_path) as connection:
                    seen.append(connection.execute(facts).fetchall()[0])
            assert first.execute(facts).fetchall()[0] == seen[0], "an open reader keeps its snapshot"
        write_tombstones(tmp_path, [{"video_hash": hash_of("v0a"), "url_hash": "", "places": []}])
        while "v0a" in ids_in(tmp_path):
            assert writer.stdout.readline(), "the process has ended"
    assert all(len(set(counts)) == 1 for counts in seen), set(seen)
    assert "v0a" not in ids_in(tmp_path) and "v0b" in ids_in(tmp_path)


def ids_in(root) -> list[str]:
    with open_manifest(root) as connection:
        return [row[0] for row in connection.execute("SELECT video_id FROM videos").fetchall()]


def test_what_a_killed_publisher_left_is_swept(corpus):
    for name in (".tmp-99-manifest.duckdb", "fragments/clips/.tmp-99-x.parquet", ".clipmill/.tmp-99-progress.json"):
        (corpus.root / name).parent.mkdir(exist_ok=True)
        (corpus.root / name).write_bytes(b"half")
    assert sweep_temporaries(corpus.root) == 3
    assert not list(corpus.root.rglob(".tmp-*"))
