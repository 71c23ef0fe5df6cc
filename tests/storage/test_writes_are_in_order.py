"""Renames, flushes and locks come in the promised order, whatever a reader, a second writer or a power cut meets."""

import fcntl
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipmill.base import file_lock
from clipmill.base.atomic_file import write_text
from clipmill.base.file_lock import lock_file, take_named_lock
from shards.corpus.fragments import ledger_row, table_schema, write_commit
from shards.corpus.manifest import publish
from shards.corpus.schema import LEDGER
from shards.corpus.tombstones import hash_of, write_tombstones
from tests.helpers.ledgers import FragmentCorpus

NAMES = ("rename", "replace", "link")  # calls that put a file under its name


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, object]]:
    """Record the renames and flushes of this process in order: ("rename", target), ("fsync", inode)."""
    seen: list[tuple[str, object]] = []

    def recorded(name: str):
        original = getattr(os, name)

        def call(old, new, **kwargs):
            original(old, new, **kwargs)
            seen.append(("rename", Path(new)))

        return call

    for name in NAMES:
        monkeypatch.setattr(os, name, recorded(name))
    flush = os.fsync

    def fsync(descriptor) -> None:
        flush(descriptor)
        seen.append(("fsync", os.fstat(descriptor).st_ino))

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def published(root: Path, video_id: str) -> FragmentCorpus:
    corpus = FragmentCorpus(root)
    corpus.add_sources(video_id)
    corpus.refresh_state()
    publish(corpus.ledger)
    return corpus


def test_an_open_manifest_keeps_its_bytes_when_a_new_one_is_published(tmp_path):
    """A copy into place would change the file under its readers, and show a half-written one to new readers."""
    corpus = published(tmp_path, "a")
    path = tmp_path / "manifest.duckdb"
    with open(path, "rb") as reader:
        before = path.read_bytes()
        corpus.add_sources("b", unit="u000001")
        corpus.refresh_state()
        publish(corpus.ledger)
        assert reader.read() == before != path.read_bytes()
        assert os.fstat(reader.fileno()).st_nlink == 0, "the old file has lost its name, and no byte"
    corpus.ledger.close()


def test_a_file_that_is_replaced_keeps_its_bytes_for_those_who_read_it(tmp_path):
    write_text(tmp_path / "x", "old")
    with open(tmp_path / "x") as reader:
        write_text(tmp_path / "x", "new, and longer")
        assert reader.read() == "old"


def test_a_ledger_fragment_is_never_there_without_all_that_it_names(tmp_path, monkeypatch):
    """Checked after every rename, which is when a kill or another host's reader would find it."""
    found = []

    def check() -> None:
        for fragment in (tmp_path / "fragments" / "ledger").glob("[!.]*.parquet"):
            outputs = json.loads(pq.read_schema(fragment).metadata[b"clipmill.outputs"])
            found.append({name: (tmp_path / name).stat().st_size for name in outputs} == outputs)

    for name in NAMES:
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _original=original, **k: (_original(*a, **k), check())[0])
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "x.tar").write_bytes(b"media")
    stamp = {"item_id": "v", "unit": "u000000", "key": "k"}
    rows = {
        table: pa.Table.from_pylist([stamp | {"video_id": "v"}], table_schema(table)) for table in ("spans", "clips")
    }
    ledger = pa.Table.from_pylist([ledger_row("cut", "v", "k", run_id="r", num_rows=2)], LEDGER)
    write_commit(tmp_path, "cut-u000000-abc", rows, ledger, ["clips/x.tar"])
    assert found and all(found)


def test_a_tombstone_is_on_the_disk_when_forget_returns(tmp_path, calls):
    path = write_tombstones(tmp_path, [{"video_hash": hash_of("a"), "url_hash": "", "places": []}])
    content, folder = ("fsync", path.stat().st_ino), ("fsync", path.parent.stat().st_ino)
    renamed = calls.index(("rename", path))
    assert content in calls[:renamed], "else a power cut leaves an empty file under the name"
    assert folder in calls[renamed:], "else a power cut takes the name away"


@pytest.fixture
def replaced(monkeypatch):
    """Let another process remove and make a lock file, and lock it, while this one waits for the old one's lock."""
    waits: list[Path] = []
    others = []
    take = file_lock.take_lock

    def swap_then_take(file, patience_s: float = 1.0) -> bool:
        path = Path(file.name)
        if path.name == "lock" and not waits:
            path.unlink()
            others.append(open(path, "w"))
            others[0].write("process 1 on another machine since then")
            others[0].flush()
            fcntl.flock(others[0], fcntl.LOCK_EX)
        waits.append(path)
        return take(file, min(patience_s, 0.1))

    monkeypatch.setattr(file_lock, "take_lock", swap_then_take)
    yield waits
    for file in others:
        file.close()


def test_the_lock_of_a_file_that_has_lost_its_name_is_not_the_lock(tmp_path, replaced):
    with pytest.raises(TimeoutError), lock_file(tmp_path / "lock", 0.1):
        pytest.fail("two processes have the lock")
    assert len(replaced) == 2, "it waited for the new file, too"


def test_the_named_lock_of_a_file_that_has_lost_its_name_is_not_the_lock(tmp_path, replaced):
    assert take_named_lock(tmp_path / "lock", "process 2 on here since now") is None
    assert (tmp_path / "lock").read_text() == "process 1 on another machine since then"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        write_text(tmp_path / "x", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
