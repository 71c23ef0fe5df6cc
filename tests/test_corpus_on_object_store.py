"""A corpus in an S3 store: the same as in a folder, from any machine, whatever becomes of the one that built it."""

from pathlib import Path

import pytest

pytest.importorskip("moto", reason="no S3 server: moto is not installed")

from store_support import BUCKET, KEYS, StoreServer, build_in, content  # noqa: E402

from pipeline import store_lock  # noqa: E402
from pipeline.build import build, status  # noqa: E402
from pipeline.corpus import Corpus  # noqa: E402
from pipeline.errors import UserError  # noqa: E402
from pipeline.stages import STAGE_NAMES  # noqa: E402
from shards import store as stores  # noqa: E402
from shards.files import for_reading  # noqa: E402
from shards.sql import open_manifest  # noqa: E402
from shards.store import Store  # noqa: E402
from tests.build_support import tables  # noqa: E402


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        running = StoreServer()
        patch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        patch.setenv("AWS_MAX_ATTEMPTS", "2")
        stores._client(running.endpoint).create_bucket(Bucket=BUCKET)
        yield running
        running.close()


@pytest.fixture(autouse=True)
def served(server):
    yield server
    server.spoil = lambda method, path: None


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes this process a machine that has nothing yet."""

    def begin(name: str) -> Path:
        monkeypatch.setenv("CLIPMILL_MIRROR", str(tmp_path / name))
        return tmp_path / name

    begin("first")
    return begin


@pytest.fixture(scope="module")
def stored(server, tmp_path_factory):
    """The URL of a whole corpus, for tests that only look."""
    folder, url = tmp_path_factory.mktemp("stored"), f"s3://{BUCKET}/whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPMILL_MIRROR", str(folder / "builder"))
        build_in(url, folder)
    return url


def content_of(folder: Path) -> dict[str, bytes]:
    names = [path for part in ("shards", "clips") for path in (folder / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


def test_it_has_the_bytes_and_rows_of_a_corpus_in_a_folder(stored, whole, machine):
    there = content(stored)
    assert {key: data for key, data in there.items() if not key.startswith("sources/")} == content_of(whole)
    assert tables(for_reading(stored, "manifest.duckdb")) == tables(whole)


def test_another_machine_has_nothing_to_do(stored, machine):
    before = Store.of(stored).list("fragments/")
    machine("another")
    report = build(stored, [], stages=STAGE_NAMES, recipe=None, assignments=[], command="test")
    assert not report.did_something and report.pack.num_samples == 24
    assert Store.of(stored).list("fragments/") == before
    assert status(stored, []).pack == {"packed": 24, "to_pack": 0}


def test_sql_asks_it(stored, machine):
    with open_manifest(stored) as connection:
        assert connection.execute("SELECT count(*) FROM samples").fetchall() == [(24,)]


def test_a_second_writer_is_refused_and_told_who_writes(stored, machine):
    with Corpus(stored).writer():
        machine("another")
        with pytest.raises(UserError, match=r"is being written by process \d+ on .* since .* UTC"):
            build(stored, [], stages=["cut"], recipe=None, assignments=[], command="test")
        assert store_lock.is_held(Store.of(stored))
    assert not store_lock.is_held(Store.of(stored))
