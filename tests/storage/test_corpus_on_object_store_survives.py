"""A corpus in a store survives its builder: killed at any write, resumed elsewhere, with one writer at a time."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("moto", reason="no S3 server: moto is not installed")

from clipmill.base.errors import ItemError, UserError  # noqa: E402
from clipmill.base.file_lock import system_name  # noqa: E402
from clipmill.base.settings import Settings  # noqa: E402
from pipeline.engine.build import build, session  # noqa: E402
from pipeline.maintenance.forget import compact, find, forget  # noqa: E402
from pipeline.runtime.task import Outcome, Task, commit  # noqa: E402
from shards.corpus.folder import Corpus  # noqa: E402
from shards.storage import lease as store_lock  # noqa: E402
from shards.storage.lease import KEY, StoreLock, is_held  # noqa: E402
from shards.storage.mirror import for_reading  # noqa: E402
from shards.storage.s3 import Changed, Store  # noqa: E402
from tests.helpers.builds import tables  # noqa: E402
from tests.helpers.stores import build_in, content, keys, keys_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("machine")

NUM_VIDEOS = 2


@pytest.fixture
def stale_at_once(monkeypatch):
    """Treat a lock that is not renewed as stale at once."""
    monkeypatch.setattr(store_lock, "STALE_S", 0.0)


@pytest.fixture(scope="module")
def quiet(server, tmp_path_factory):
    """Build without interruption; return (the store's content, its keys, tables) and the number of writes."""
    folder, url = tmp_path_factory.mktemp("quiet"), "s3://corpora/quiet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPMILL_MIRROR", str(folder / "mirror"))
        server.requests.clear()
        build_in(url, folder, NUM_VIDEOS)
        num_writes = sum(method != "GET" and method != "HEAD" for method, _ in server.requests)
        yield outcome(url), num_writes


def outcome(url: str):
    return content(url), keys(url), tables(for_reading(url, "manifest.duckdb"))


class Death:
    """Answer every request with 503 from a chosen write on, as if the builder had died."""

    def __init__(self, comes):
        self.comes, self.num_writes, self.has_come = comes, 0, False

    def __call__(self, method: str, path: str) -> int | None:
        self.num_writes += method not in ("GET", "HEAD")
        self.has_come = self.has_come or (method not in ("GET", "HEAD") and self.comes(self.num_writes, path))
        return 503 if self.has_come else None


def die_and_resume_elsewhere(url: str, comes, server, machine, folder: Path) -> None:
    server.spoil = death = Death(comes)
    with pytest.raises(UserError):
        build_in(url, folder, NUM_VIDEOS)
    assert death.has_come
    server.spoil = lambda method, path: None
    machine("another machine")
    build_in(url, folder, NUM_VIDEOS)


@pytest.mark.parametrize(
    "lost",
    ["clips/cut-", "manifest.duckdb", "shards/000000-000001.tar"],
)
def test_dead_before_this_object_is_there_it_ends_the_same(lost, quiet, server, machine, stale_at_once, tmp_path):
    url = f"s3://corpora/dead-{lost.replace('/', '-')}"
    die_and_resume_elsewhere(url, lambda number, path: lost in path, server, machine, tmp_path)
    assert outcome(url) == quiet[0]


@pytest.mark.slow
def test_dead_at_any_write_it_ends_the_same(quiet, server, machine, stale_at_once, tmp_path):
    for number in random.Random(7).sample(range(2, quiet[1] - 2), 2):
        machine("first machine")
        url = f"s3://corpora/dead-at-{number}"
        die_and_resume_elsewhere(url, lambda count, path, at=number: count == at, server, machine, tmp_path)
        assert outcome(url) == quiet[0], f"dead at write {number} of {quiet[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["shards/000000-000000.parquet", "fragments/ledger/cut-"])
def test_dead_while_compacting_it_ends_the_same(lost, server, machine, stale_at_once, tmp_path):
    folder, url = tmp_path / "folder", f"s3://corpora/compacted-{lost[:6]}"
    for corpus in (folder, url):
        build_in(corpus, tmp_path, 3)
        forget(corpus, find(corpus, ["video-b"], [], None), None)
    compact(folder)
    server.spoil = death = Death(lambda number, path: lost in path)
    with pytest.raises(UserError):
        compact(url)
    assert death.has_come
    server.spoil = lambda method, path: None
    machine("another machine")
    compact(url)
    there = content(url)
    assert there == {key: (folder / key).read_bytes() for key in there}
    assert keys(url) == {key for key in keys_of(folder) if not key.startswith("sources/")}
    assert tables(for_reading(url, "manifest.duckdb")) == tables(folder)


@pytest.mark.parametrize("method, lost", [("PUT", "/fragments/merged/"), ("DELETE", "/fragments/ledger/caption-")])
def test_dead_while_merging_it_ends_the_same(method, lost, server, machine, stale_at_once, tmp_path):
    """The head was not sent, or was sent and some fragments are left."""
    arguments = {"stages": ["score"], "recipe": None, "assignments": ["engine.merge_commits=1"], "command": "test"}
    urls = [f"s3://corpora/merged-{method.lower()}-{number}" for number in range(2)]
    build_in(urls[0], tmp_path, NUM_VIDEOS)
    for key in Store.of(urls[0]).list():  # the times in ledgers are the same in both
        if not key.startswith(".clipmill/"):
            Store.of(urls[1]).write(key, Store.of(urls[0]).read(key).data)
    build(urls[0], [], **arguments)

    def dies(asked: str, path: str) -> int | None:
        died.append(bool(died and died[-1]) or (asked == method and lost in path))
        return 503 if died[-1] else None

    died: list[bool] = []
    machine("second machine")
    server.spoil = dies
    with pytest.raises(UserError):
        build(urls[1], [], **arguments)
    server.spoil = lambda method, path: None
    assert died[-1]
    machine("another machine")
    build(urls[1], [], **arguments)
    ours, theirs = ({key: Store.of(url).read(key).data for key in keys(url)} for url in urls)
    assert {key for key in ours if ours[key] != theirs.get(key)} <= {"manifest.duckdb"} and ours.keys() == theirs.keys()


def test_a_tombstone_that_was_not_sent_goes_up_with_the_next_build(server, tmp_path):
    url = "s3://corpora/unsent"
    build_in(url, tmp_path, NUM_VIDEOS)
    server.spoil = Death(lambda number, path: "fragments/forgotten/" in path)
    with pytest.raises(UserError):
        forget(url, find(url, ["video-b"], [], None), None)
    server.spoil = lambda method, path: None
    assert not Store.of(url).list("fragments/forgotten/")
    with session(url, None, [], "test", create=False):
        assert Store.of(url).list("fragments/forgotten/")


def test_a_commit_whose_ledger_did_not_arrive_never_happened(server, machine, stale_at_once, tmp_path):
    url = "s3://corpora/half"
    server.spoil = Death(lambda number, path: "fragments/ledger/cut-" in path)
    with pytest.raises(UserError):
        build_in(url, tmp_path, NUM_VIDEOS)
    server.spoil = lambda method, path: None
    assert [key for key in keys(url) if key.startswith("clips/")], "its media were uploaded"
    machine("another machine")
    with session(url, None, [], "test", create=False) as (current, _):
        current.refresh_state()
        assert current.ledger.counts()["cut"] == {"pending": NUM_VIDEOS}
    assert not [key for key in keys(url) if "cut-" in key]


BUILDS = """
import sys
sys.path[:0] = {paths}
from pathlib import Path
from tests.helpers.stores import build_in
build_in({url!r}, Path({folder!r}), {num_videos})
"""


@pytest.mark.slow
def test_killed_with_sigkill_and_begun_again_at_once_from_an_empty_mirror(quiet, server, machine, tmp_path):
    """The lock of a killed process of this host is free at once."""
    url, killed = "s3://corpora/killed", threading.Event()
    code = BUILDS.format(paths=sys.path, url=url, folder=str(tmp_path), num_videos=NUM_VIDEOS)
    victim = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])

    def kill_at_the_cut(method: str, path: str) -> int | None:
        if "fragments/clips/cut-" in path and not killed.is_set():
            killed.set()
            os.kill(victim.pid, signal.SIGKILL)
            return 503
        return None

    server.spoil = kill_at_the_cut
    assert victim.wait(600) == -signal.SIGKILL
    machine("another machine")
    build_in(url, tmp_path, NUM_VIDEOS)
    assert outcome(url) == quiet[0]


# --- One writer


def hold(url: str, **changes) -> None:
    """Hold the lock as a process of another machine does."""
    lock = StoreLock(Store.of(url))
    lock._write(0.0)
    said = json.loads(lock.store.read(KEY).data) | {"machine": "elsewhere", "host": "elsewhere", "pid": 7} | changes
    lock.store.write(KEY, json.dumps(said).encode())


def test_a_second_writer_is_refused_and_learns_who_writes(machine, tmp_path):
    url = "s3://corpora/two"
    with Corpus(url).writer():
        machine("another machine")
        said = rf"being written by process {os.getpid()} on {socket.gethostname()} since \d{{4}}-\d\d-\d\d .* UTC"
        with pytest.raises(UserError, match=said):
            build(url, [], stages=["ingest"], recipe=None, assignments=[], command="test")
        assert is_held(Store.of(url))
    assert not is_held(Store.of(url))
    with Corpus(url).writer():
        pass


def test_one_of_many_simultaneous_writers_gets_the_lock():
    store, taken, refused = Store.of("s3://corpora/many"), [], []

    def attempt() -> None:
        lock = StoreLock(store)
        try:
            lock.take()
            taken.append(lock)
        except UserError:
            refused.append(lock)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].release()


def test_the_lock_of_a_writer_on_another_machine_ends_only_by_time(monkeypatch):
    url = "s3://corpora/elsewhere"
    hold(url)
    with pytest.raises(UserError, match=r"process 7 on elsewhere .* it counts as dead after 120 s"):
        StoreLock(Store.of(url)).take()
    monkeypatch.setattr(store_lock, "STALE_S", 0.0)
    lock = StoreLock(Store.of(url))
    lock.take()
    lock.release()


def test_the_lock_of_a_dead_process_of_this_machine_is_free_at_once():
    url, child = "s3://corpora/dead-here", subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    hold(url, machine=system_name(), pid=child.pid)
    lock = StoreLock(Store.of(url))
    lock.take()
    lock.release()


def test_a_writer_that_lost_its_lock_writes_nothing_more(machine, tmp_path):
    url = "s3://corpora/lost"
    corpus = Corpus(url)
    corpus.create()
    with pytest.raises(UserError, match=r"the lock was lost \(process 7 on elsewhere"), corpus.writer():
        corpus.save_settings({"whose": "mine"})
        hold(url)
        lock = corpus.files.guard.__self__
        lock._renew()
        before = Store.of(url).list()
        corpus.save_settings({"whose": "late"})
    assert {**Store.of(url).list()} == before
    assert is_held(Store.of(url)), "the other process's lock is kept"


def test_a_worker_that_outlived_its_build_commits_nothing_once_another_writes():
    url = "s3://corpora/outlived"
    corpus = Corpus(url)
    corpus.create()
    with corpus.writer():
        before = corpus.lock_owner
    root, kinds = str(corpus.root), ("while nobody else writes", "while another does")
    items = [{"item_id": kind, "key": "k", "attempts": 0, "cost": 1} for kind in kinds]
    first, second = (
        Task("segment", "u0", [item], Settings(), "f", root, "run", corpus.store, before) for item in items
    )
    commit(first, [Outcome(kinds[0], failure=ItemError("internal-error", ""))], [])
    hold(url)
    with pytest.raises(UserError, match="another process is writing the corpus"):
        commit(second, [Outcome(kinds[1], failure=ItemError("internal-error", ""))], [])
    assert list(Store.of(url).list("fragments/")) == [f"fragments/ledger/{first.name}.parquet"]


def test_a_writer_cut_off_from_the_store_stops_before_others_may_begin(server, monkeypatch):
    monkeypatch.setattr(store_lock, "FENCED_S", 0.0)
    lock = StoreLock(Store.of("s3://corpora/silent"))
    lock.take()
    server.spoil = lambda method, path: 503
    with pytest.raises(UserError, match="did not answer in time"):
        lock.check()
    server.spoil = lambda method, path: None
    lock.release()


def test_a_late_manifest_does_not_replace_a_newer_one(machine, tmp_path):
    """This holds although the sender does not know yet that it lost the lock."""
    url = "s3://corpora/late"
    build_in(url, tmp_path, NUM_VIDEOS)
    with pytest.raises(UserError, match="the lock was lost"):
        with session(url, None, [], "late", create=False) as (late, _):
            newer = Store.of(url).write("manifest.duckdb", b"newer")
            hold(url)
            late.corpus.files.guard.__self__._etag = "gone"
            late.publish()
    assert Store.of(url).head("manifest.duckdb").etag == newer


def test_a_store_that_ignores_conditions_is_refused(monkeypatch):
    write = Store.write
    monkeypatch.setattr(Store, "write", lambda store, key, data, **conditions: write(store, key, data))
    with pytest.raises(UserError, match="does not support conditional writes"):
        StoreLock(Store.of("s3://corpora/old")).take()


def test_conditional_writes_are_refused_by_the_store_that_tests_use():
    """All tests above depend on this."""
    store = Store.of("s3://corpora/conditions")
    first = store.write("key", b"1", if_none_match=True)
    with pytest.raises(Changed):
        store.write("key", b"2", if_none_match=True)
    second = store.write("key", b"2", if_match=first)
    with pytest.raises(Changed):
        store.write("key", b"3", if_match=first)
    assert store.read("key").data == b"2" and store.head("key").etag == second


def test_a_writer_is_fenced_before_its_lock_may_be_taken_over(server, machine, monkeypatch):
    """At the age at which another process may take the lock, one that is cut off has stopped, with time to spare."""
    url, clock = "s3://corpora/fenced", store_lock._now
    lock = StoreLock(Store.of(url))
    lock.take()
    spare_s = store_lock.BEAT_S  # for a request that was sent at the last moment
    monkeypatch.setattr(store_lock, "_now", lambda: clock() + store_lock.STALE_S - spare_s)
    server.spoil = lambda method, path: 503
    with pytest.raises(UserError, match="the lock was lost"):
        lock.check()
    server.spoil = lambda method, path: None
    monkeypatch.setattr(store_lock, "_now", clock)
    lock.release()
