"""The local mirror of a store stays intact while workers write to it and other commands read it."""

import pytest

pytest.importorskip("moto", reason="no S3 server: moto is not installed")

from shards.storage.mirror import Mirror  # noqa: E402
from shards.storage.s3 import Object, Store  # noqa: E402

SENT, LOST, ON_ITS_WAY = "sources/u000000/sent.mp4", "sources/u000000/lost.mp4", "fragments/clips/on-its-way.parquet"


def write(mirror: Mirror, relative: str, data: bytes = b"bytes") -> None:
    path = mirror.root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_readers_keep_the_files_that_workers_are_about_to_upload(server, tmp_path):
    store = Store.of("s3://corpora/looked-at")
    worker, looker = Mirror(tmp_path, store), Mirror(tmp_path, store)
    for relative in (SENT, LOST):
        write(worker, relative)
        worker.upload(relative)
    store.delete(LOST)
    write(worker, ON_ITS_WAY)
    with looker.local_only():
        looker.pull()
    worker.upload(ON_ITS_WAY)
    assert {*store.list()} == {SENT, ON_ITS_WAY}
    assert not (tmp_path / LOST).exists()  # no worker is about to upload it


def test_readers_keep_the_notes_that_workers_rely_on(server, tmp_path):
    store = Store.of("s3://corpora/noted")
    worker, looker = Mirror(tmp_path, store), Mirror(tmp_path, store)
    write(worker, LOST)
    worker.upload(LOST)
    assert LOST in worker._read_notes()
    store.delete(LOST)
    with looker.local_only():
        looker.pull()
    write(worker, SENT)
    worker.upload(SENT)
    assert SENT in worker._read_notes()


def test_a_manifest_made_locally_for_reading_gives_way_to_the_stores(server, tmp_path):
    store = Store.of("s3://corpora/published")
    looker = Mirror(tmp_path, store)
    store.write("manifest.duckdb", b"theirs")
    with looker.local_only():
        write(looker, "manifest.duckdb", b"of before")
        looker.pull()
    assert (tmp_path / "manifest.duckdb").read_bytes() == b"theirs"


def test_the_writer_removes_files_that_the_store_lacks(server, tmp_path):
    store = Store.of("s3://corpora/written")
    writer = Mirror(tmp_path, store)
    write(writer, ON_ITS_WAY)
    writer.pull()
    assert not (tmp_path / ON_ITS_WAY).exists()


class Listed(dict):
    """List a store's objects and count the iterations."""

    num_times = 0

    def __iter__(self):
        self.num_times += 1
        return super().__iter__()


def test_a_refresh_costs_one_listing(tmp_path):
    mirror = Mirror(tmp_path, Store("bucket", "prefix/"))
    there = Listed()
    for number in range(100):
        write(mirror, relative := f"sources/u000000/{number}.mp4")
        mirror._note(relative, (tmp_path / relative).stat(), etag := f'"{number}"')
        there[relative] = Object(5, etag)
    mirror.store = type("Listing", (), {"list": lambda self: there})()
    mirror.pull()
    assert len(mirror._read_notes()) == 100
    assert there.num_times < 10
