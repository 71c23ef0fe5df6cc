"""One writer among containers that share a folder, a kernel and a host name, but not their process ids."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from clipmill.base.errors import UserError
from clipmill.base.file_lock import is_this_system, owner_has_died, process_name, system_name
from pipeline.engine import registry
from shards.corpus.folder import Corpus, lock_owner
from shards.corpus.ledger import Ledger
from shards.corpus.volume_files import remove_cache

WRITES = """
import sys
sys.path[:0] = {paths}
from pipeline.engine import registry
from shards.corpus.folder import Corpus
from shards.corpus.ledger import Ledger
with Corpus({root!r}).writer():
    ledger = Ledger(Corpus({root!r}).root, registry.stages())
    print("writes", flush=True)
    sys.stdin.read()
"""
OPENS = """
import duckdb, sys
connection = duckdb.connect({path!r})
print("open", flush=True)
sys.stdin.read()
"""
LOCKS_AND_FORKS = """
import fcntl, os, sys
file = open({path!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
if os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    made = Corpus(tmp_path / "corpus")
    made.create()
    made.save_settings({})
    return made


@contextmanager
def running(script: str, *wrapper: str):
    """Start a process that prints a line when it is ready; yield (process, line); end it with its children."""
    command = [*wrapper, sys.executable, "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    try:
        yield process, process.stdout.readline().strip()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def container() -> list[str]:
    """Return the command that runs another one in a pid namespace of its own, on this host name."""
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("pid namespaces cannot be made here")
    return command


def one_line(lock) -> None:
    """Rewrite a lock as versions without the line of the system do."""
    lock.write_text(lock.read_text().splitlines()[0])


@pytest.mark.parametrize("earlier_version", [False, True])
def test_a_writer_in_another_container_keeps_the_lock_and_its_ledger(corpus, container, earlier_version):
    script = WRITES.format(paths=sys.path, root=str(corpus.root))
    with running(script, *container) as (_, said):
        assert said == "writes"
        lock, ledger = corpus.private / "lock", corpus.private / "ledger.duckdb"
        if earlier_version:
            one_line(lock)
        number = int(lock.read_text().split()[1])
        before = lock.stat().st_ino, ledger.stat().st_ino
        assert f"on {socket.gethostname()} " in lock.read_text() and number < 50, "a process id of the container"
        for _ in range(2):
            with pytest.raises(UserError, match=f"being written by process {number} on"), corpus.writer():
                pass
        assert corpus.is_being_written() and (lock.stat().st_ino, ledger.stat().st_ino) == before
    with corpus.writer():
        assert not corpus.writer_name() or str(os.getpid()) in corpus.writer_name()


def test_a_writer_outside_keeps_the_lock_from_a_container(corpus, container):
    code = f"import sys; sys.path[:0] = {sys.path}\nfrom shards.corpus.folder import Corpus\n"
    code += f"with Corpus({str(corpus.root)!r}).writer(): pass"
    with corpus.writer():
        before = (corpus.private / "lock").stat().st_ino
        refused = subprocess.run([*container, sys.executable, "-c", code], capture_output=True, text=True)
        assert refused.returncode and f"being written by process {os.getpid()} on" in refused.stderr
        assert (corpus.private / "lock").stat().st_ino == before
        assert lock_owner(corpus.root, None) == corpus.lock_owner


def test_two_containers_with_equal_process_ids_have_different_names(container):
    code = f"import sys; sys.path[:0] = {sys.path}\n"
    code += "from clipmill.base.file_lock import process_name; print(process_name())"
    command = [*container, sys.executable, "-c", code]
    names = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    (one, first), (two, second) = (name.splitlines() for name in names)
    assert one.split()[:4] == two.split()[:4] and first != second


@pytest.mark.parametrize("earlier_version", [False, True])
def test_the_lock_that_a_dead_owners_child_holds_is_taken_over(corpus, earlier_version):
    lock = corpus.private / "lock"
    with running(LOCKS_AND_FORKS.format(path=str(lock))) as (owner, _):
        assert owner.wait() == 0
        lock.write_text(process_name().replace(f"process {os.getpid()} ", f"process {owner.pid} "))
        if earlier_version:
            one_line(lock)
        assert owner_has_died(lock)
        with corpus.writer():
            assert lock.read_text() == corpus.lock_owner


def test_waiting_for_a_lock_does_not_make_its_owner_dead(corpus):
    """Every process that waits has the file open, too."""
    lock = corpus.private / "lock"
    lock.write_text(f"process {2**22 + 1} on {socket.gethostname()} since then")
    with open(lock):
        assert not owner_has_died(lock)
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert owner_has_died(lock)


def test_a_system_is_known_by_boot_namespace_host_and_machine():
    ours = system_name()
    boot, namespace, host, *machine = ours.split()
    assert is_this_system(ours) and is_this_system(f"{boot} {namespace} {host}"), "the form of earlier versions"
    others = [f"other {namespace} {host}", f"{boot} pid:[1] {host}", f"{boot} {namespace} other", "", host]
    others += [f"{boot} {namespace} {host} other"] if machine else []
    assert not any(map(is_this_system, others))


def test_a_ledger_that_another_process_has_open_is_not_torn(corpus):
    path = corpus.private / "ledger.duckdb"
    with running(OPENS.format(path=str(path))) as (_, said):
        assert said == "open"
        before = path.stat().st_ino
        with pytest.raises(UserError, match="in use by another process"):
            Ledger(corpus.root, registry.stages())
        with pytest.raises(UserError, match="in use by another process"):
            remove_cache(corpus.root)
        assert path.stat().st_ino == before
    path.write_bytes(b"torn" * 5000)
    Ledger(corpus.root, registry.stages()).close()
    assert path.stat().st_size > 20_000, "a torn one is made again"
