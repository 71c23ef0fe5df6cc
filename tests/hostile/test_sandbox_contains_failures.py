"""A sandbox limits real crashes, hangs, memory use, huge files and dead parents to the call that caused them."""

import ctypes
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clipmill.base.errors import ItemError
from clipmill.media.sandbox import Sandbox
from tests.helpers.processes import is_running, wait_until_gone

MB = 2**20
ROOT = Path(__file__).resolve().parents[2]
ENOUGH_S = 600  # for any call: one that takes longer hangs


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(memory_bytes=400 * MB, file_bytes=5 * MB) as sandbox:
        yield sandbox


# ---- functions that run inside ---------------------------------------------------------------------------------------


def add(a, b=0):
    return a + b


def pid():
    return os.getpid()


def die_of(number):
    os.kill(os.getpid(), number)


def read_address_zero():
    ctypes.string_at(0)


def hang_holding_the_interpreter_lock():
    re.match(r"(a+)+$", "a" * 60 + "b")


def balloon(megabytes):
    return len(bytearray(megabytes * MB))


def reserve_without_touching(megabytes):
    import mmap

    return len(mmap.mmap(-1, megabytes * MB, prot=mmap.PROT_READ))


def write_file(path, megabytes):
    Path(path).write_bytes(bytes(megabytes * MB))


def fail_with(error):
    raise error


def start_sleeper_and(path, what):
    child = subprocess.Popen(["sleep", "1000"])
    Path(f"{path}.new").write_text(str(child.pid))
    os.rename(f"{path}.new", path)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(1000)


def threads_allowed():
    return os.environ["OPENBLAS_NUM_THREADS"]


def not_picklable():
    return lambda: None


# ---- properties ------------------------------------------------------------------------------------------------------


def test_returns_results_and_keeps_its_child(sandbox):
    assert sandbox.call(add, 2, b=3, timeout_s=ENOUGH_S) == 5
    assert sandbox.call(pid, timeout_s=ENOUGH_S) == sandbox.call(pid, timeout_s=ENOUGH_S) != os.getpid()
    assert len(sandbox.call(add, b"x" * 3 * MB, b=b"y", timeout_s=ENOUGH_S)) == 3 * MB + 1
    assert sandbox.call(threads_allowed, timeout_s=ENOUGH_S) == "1"


def test_a_parent_may_have_thousands_of_files_open():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] != resource.RLIM_INFINITY and limits[1] < 3000:
        pytest.skip(f"this machine allows a process {limits[1]} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 3000), limits[1]))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(2000)]
    try:
        with Sandbox() as sandbox:
            assert sandbox.call(add, 2, b=3, timeout_s=ENOUGH_S) == 5
    finally:
        for fd in files:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGILL])
def test_a_crash_is_a_decoder_crash_and_the_next_call_works(sandbox, number):
    before = sandbox.call(pid, timeout_s=ENOUGH_S)
    with pytest.raises(ItemError) as caught:
        sandbox.call(die_of, number, timeout_s=ENOUGH_S)
    assert caught.value.error_class == "decoder-crash" and number.name in caught.value.message
    assert sandbox.call(pid, timeout_s=ENOUGH_S) != before


def test_a_real_invalid_read_is_contained(sandbox):
    with pytest.raises(ItemError, match="decoder-crash"):
        sandbox.call(read_address_zero, timeout_s=ENOUGH_S)


@pytest.mark.parametrize("function, args", [(hang_holding_the_interpreter_lock, ()), (time.sleep, (1000,))])
def test_a_hang_ends_at_the_time_limit(sandbox, function, args):
    process_id = sandbox.call(pid, timeout_s=ENOUGH_S)
    with pytest.raises(ItemError) as caught:
        sandbox.call(function, *args, timeout_s=0.5)
    assert caught.value.error_class == "timeout"
    assert wait_until_gone([process_id])


def test_memory_beyond_the_limit_is_refused(sandbox):
    with pytest.raises(ItemError) as caught:
        sandbox.call(balloon, 500, timeout_s=ENOUGH_S)
    assert caught.value.error_class == "out-of-memory"
    assert sandbox.call(balloon, 500, timeout_s=ENOUGH_S, memory_bytes=900 * MB) == 500 * MB
    assert sandbox.call(balloon, 50, timeout_s=ENOUGH_S) == 50 * MB


def test_a_low_limit_holds_for_its_own_call_only():
    with Sandbox() as sandbox:
        child = sandbox.call(pid, timeout_s=ENOUGH_S)
        with pytest.raises(ItemError, match="out-of-memory"):
            sandbox.call(balloon, 50, timeout_s=ENOUGH_S, memory_bytes=20 * MB)
        assert sandbox.call(len, bytes(100 * MB), timeout_s=ENOUGH_S) == 100 * MB
        assert sandbox.call(pid, timeout_s=ENOUGH_S) == child


def test_address_space_that_is_never_written_does_not_count(sandbox):
    assert sandbox.call(reserve_without_touching, 4000, timeout_s=ENOUGH_S) == 4000 * MB


def test_a_death_that_only_the_kernel_explains_counts_as_memory(sandbox):
    with pytest.raises(ItemError, match="out-of-memory"):
        sandbox.call(die_of, signal.SIGKILL, timeout_s=ENOUGH_S)


def test_a_huge_file_is_refused(sandbox, tmp_path):
    sandbox.call(write_file, tmp_path / "small", 4, timeout_s=ENOUGH_S)
    with pytest.raises(ItemError) as caught:
        sandbox.call(write_file, tmp_path / "large", 6, timeout_s=ENOUGH_S)
    assert caught.value.error_class == "output-too-large"
    assert (tmp_path / "large").stat().st_size <= 5 * MB


def test_item_errors_come_back_as_they_are(sandbox):
    with pytest.raises(ItemError) as caught:
        sandbox.call(fail_with, ItemError("rate-limited", "slow down", transient=True), timeout_s=ENOUGH_S)
    assert (caught.value.error_class, caught.value.message, caught.value.transient) == (
        "rate-limited",
        "slow down",
        True,
    )


@pytest.mark.parametrize(
    "error, error_class, transient",
    [
        (ValueError("what a pity"), "internal-error", False),
        (OSError(28, "No space left on device"), "disk-full", True),
        (MemoryError(), "out-of-memory", False),
    ],
)
def test_other_exceptions_become_item_errors(sandbox, error, error_class, transient):
    with pytest.raises(ItemError) as caught:
        sandbox.call(fail_with, error, timeout_s=ENOUGH_S)
    assert (caught.value.error_class, caught.value.transient) == (error_class, transient)
    if error_class == "internal-error":
        assert "what a pity" in caught.value.message and "fail_with" in caught.value.message


def test_a_result_that_cannot_travel_is_an_error_and_not_a_crash(sandbox):
    with pytest.raises(ItemError, match="internal-error"):
        sandbox.call(not_picklable, timeout_s=ENOUGH_S)


@pytest.mark.parametrize("what, error_class", [("crash", "decoder-crash"), ("hang", "timeout")])
def test_whatever_the_child_started_dies_with_it(sandbox, tmp_path, what, error_class):
    limit_s = 1 if what == "hang" else ENOUGH_S
    while not (tmp_path / "pid").exists():  # a slow machine may not reach the hang within the limit
        with pytest.raises(ItemError) as caught:
            sandbox.call(start_sleeper_and, tmp_path / "pid", what, timeout_s=limit_s)
        limit_s *= 2
    assert caught.value.error_class == error_class
    assert wait_until_gone([int((tmp_path / "pid").read_text())])


def test_children_are_replaced_after_a_number_of_calls():
    with Sandbox(calls_per_child=2) as sandbox:
        seen = [sandbox.call(pid, timeout_s=ENOUGH_S) for _ in range(4)]
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert wait_until_gone(seen)


def test_calls_from_several_threads_queue(sandbox):
    results = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(sandbox.call(add, i, timeout_s=ENOUGH_S))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(8))


def test_a_child_survives_the_thread_that_started_it():
    with Sandbox() as sandbox:
        seen = []
        thread = threading.Thread(target=lambda: seen.append(sandbox.call(pid, timeout_s=ENOUGH_S)))
        thread.start()
        thread.join()
        assert sandbox.call(pid, timeout_s=ENOUGH_S) == seen[0]


def test_a_sandbox_travels_as_its_limits(sandbox):
    with pickle.loads(pickle.dumps(sandbox)) as copy:
        assert copy.memory_bytes == 400 * MB and copy.call(pid, timeout_s=ENOUGH_S) != sandbox.call(
            pid, timeout_s=ENOUGH_S
        )


def test_a_busy_child_dies_with_its_parent(tmp_path):
    """This holds even if the child holds the interpreter lock and the parent is killed by SIGKILL."""
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
import tests.hostile.test_sandbox_contains_failures as functions
from clipmill.media.sandbox import Sandbox
sandbox = Sandbox()
print(sandbox.call(functions.pid, timeout_s={ENOUGH_S}), flush=True)
sandbox.call(functions.hang_holding_the_interpreter_lock, timeout_s={ENOUGH_S})
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    process_id = int(parent.stdout.readline())
    time.sleep(0.3)
    assert is_running(process_id)
    parent.kill()
    parent.wait()
    assert wait_until_gone([process_id])


def test_start_up_is_cheap(sandbox):
    """A child starts in well under a second because it imports very little."""
    with Sandbox() as fresh:
        modules = fresh.call(loaded, timeout_s=ENOUGH_S)
    assert not {"numpy", "av", "torch", "ray", "pyarrow", "pydantic"} & modules


def loaded():
    """Return the child's top-level modules without this test module's own imports."""
    return {name for name in sys.modules if "." not in name} - {"pytest"}
