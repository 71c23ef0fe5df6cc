"""Batches stay the same when loader processes die; a sample that kills two of them becomes a failure."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clipmill.base.errors import UserError
from tests.helpers.loaders import (
    StuckReader,
    UnstartableReader,
    assert_all_equal,
    deadly_reader,
    make_run,
)
from tests.helpers.processes import descendants, loader_processes, wait_until_gone
from training.data import reader_pool as loader_pool
from training.data.loader import requests_of
from training.data.reader_pool import Request
from training.data.selection import Selection


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def expected(run):
    return run.batches(0, 30)


def test_killed_processes_change_nothing(run, expected):
    seen, killed = [], 0
    with run.loader(2, prefetch=8) as loader:
        for step, batch in enumerate(loader.batches(run.epochs, slice(0, 8), 0, 30)):
            seen.append(batch)
            if step in (2, 9, 17):
                for process in loader_processes()[: 1 + step % 2]:
                    os.kill(process, signal.SIGKILL)
                    killed += 1
        assert killed >= 3
    assert_all_equal(seen, expected)


def test_a_sample_that_kills_once_is_read_again(run, expected, tmp_path):
    reader = deadly_reader(run, tmp_path, 5, 23, times=1)
    assert_all_equal(run.batches(0, 5, 2, reader=reader), expected[:5])
    assert reader.num_deaths(5) == 2 and reader.num_deaths(23) == 2  # it died once and survived once


@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_sample_that_kills_twice_is_a_failure(run, expected, tmp_path, num_processes):
    reader = deadly_reader(run, tmp_path, 5, 6, 23)
    failures = []
    batches = run.batches(0, 5, num_processes, reader=reader, on_failures=failures.extend)
    assert {failure.row for failure in failures} == {5, 6, 23}
    assert {failure.error.error_class for failure in failures} == {"decoder-died"}
    assert "SIGSEGV" in failures[0].error.message
    assert [reader.num_deaths(row) for row in (5, 6, 23)] == [2, 2, 2]
    for batch, whole in zip(batches, expected, strict=False):
        for slot, row in enumerate(whole.rows_B.tolist()):
            assert bool(batch.video_mask_B[slot]) == (row not in (5, 6, 23))
            if row not in (5, 6, 23):
                assert (batch.video_BT3SS[slot] == whole.video_BT3SS[slot]).all()


def test_processes_that_cannot_start_end_the_run(run):
    with pytest.raises(UserError, match=r"exit code 3.*data\.loader_processes"):
        run.batches(0, 5, 2, reader=run.reader(kind=UnstartableReader))


def advance_clock_of_stuck_readers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Advance the clock by hours between two checks of a stuck `StuckReader` process, and not for others."""
    now, hours, is_stuck = [0.0], itertools.count(1), loader_pool._Worker.is_stuck

    def look(worker) -> bool:
        now[0] = 3600.0 * next(hours) if (folder / f"stuck-{worker.process.pid}").exists() else 0.0
        try:
            return is_stuck(worker)
        finally:
            now[0] = 0.0

    monkeypatch.setattr(loader_pool, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(loader_pool._Worker, "is_stuck", look)


@pytest.mark.slow
def test_a_sample_that_never_ends_is_a_failure(run, tmp_path, monkeypatch):
    advance_clock_of_stuck_readers(tmp_path, monkeypatch)
    failures = []
    reader = deadly_reader(run, tmp_path, 23, kind=StuckReader)
    batches = run.batches(0, 5, 2, reader=reader, on_failures=failures.extend)
    assert [failure.row for failure in failures] == [23] and "SIGKILL" in failures[0].error.message
    assert sum(int(batch.video_mask_B.sum()) for batch in batches) == 39


def test_a_broken_invariant_is_no_failure_row(run):
    with run.loader(1) as loader:
        with pytest.raises(RuntimeError, match="IndexError"):
            list(loader.read([Request(np.array([4_000]), 0)]))


SCRIPT = """
import sys
sys.path[:0] = {path!r}
if __name__ == "__main__":  # but not loader processes, which import this file
    from pathlib import Path
    from tests.helpers.loaders import open_run
    run = open_run(Path({folder!r}), Path({corpus!r}))
    loader = run.loader(2)
    for step, batch in enumerate(loader.batches(run.epochs, slice(0, 8), 0, 100_000)):
        print("batch", flush=True)
        if step == 3:
            {then}
"""


def _start(run, folder, then: str) -> subprocess.Popen:
    script = folder / "parent.py"
    script.write_text(SCRIPT.format(path=sys.path, folder=str(folder), corpus=str(run.corpus), then=then))
    return subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )


@pytest.mark.slow
def test_processes_end_with_their_parent(run, tmp_path):
    """This holds even if the parent is killed and cannot clean up."""
    parent = _start(run, tmp_path, "import time; time.sleep(1000)")
    assert parent.stdout.readline() == "batch\n"
    family = descendants(parent.pid)
    assert len(family) >= 3
    parent.kill()
    parent.communicate()
    assert wait_until_gone(family)


@pytest.mark.slow
@pytest.mark.parametrize(("then", "said"), [("sys.exit(3)", ""), ("raise RuntimeError('enough')", "enough")])
def test_ending_in_the_middle_of_reading_is_quiet(run, tmp_path, then, said):
    """An exception or an exit that leaves the loader open neither hangs nor prints anything more."""
    parent = _start(run, tmp_path, then)
    _, errors = parent.communicate(timeout=600)
    assert parent.returncode == (1 if said else 3)
    assert errors.count("Traceback") == bool(said) and said in errors


def test_a_process_that_changes_its_directory_still_reads(run, expected, tmp_path, monkeypatch):
    """Relative paths are resolved when the selection is opened."""
    monkeypatch.chdir(run.selection.path.parent)
    reader = run.reader()
    reader.selection = Selection("selection.arrow")
    with run.loader(2, reader=reader) as loader:
        batches = loader.batches(run.epochs, slice(0, 8), 0, 5)
        first = next(batches)
        assert_all_equal([first, *batches], expected[:5])


def test_processes_that_read_import_no_pandas(run):
    """pyarrow would import it for a numpy array, which costs each process a second."""
    with run.loader(1) as loader:
        next(loader.batches(run.epochs, slice(0, 8), 0, 100))
        [process] = loader_processes()
        assert "/pandas/" not in Path(f"/proc/{process}/maps").read_text()


def test_no_process_outlives_the_loader(run):
    with run.loader(2) as loader:
        next(loader.batches(run.epochs, slice(0, 8), 0, 100))
        during = loader_processes()
        assert len(during) == 2
    assert wait_until_gone(during)


def test_a_failing_plan_raises_where_batches_are_requested(run):
    def requests():
        yield from requests_of(run.epochs, slice(0, 8), 0, 2)
        raise UserError("no further plan")

    with run.loader(2) as loader:
        with pytest.raises(UserError, match="no further plan"):
            list(loader.read(requests()))


def test_reading_ahead_stops_when_there_is_no_room(run, expected):
    """Processes read ahead until the queues are full."""
    with run.loader(1, prefetch=8) as loader:
        seen = []
        for batch in loader.batches(run.epochs, slice(0, 8), 0, 6):
            seen.append(batch)
            time.sleep(0.05)
        assert_all_equal(seen, expected[:6])
