"""A whole Ray build into an S3 store starts on one machine and continues on another."""

import pytest

pytest.importorskip("moto", reason="no S3 server: moto is not installed")

from shards.storage.mirror import for_reading  # noqa: E402
from shards.storage.s3 import Store  # noqa: E402
from tests.helpers.builds import PLAIN, build_here, tables  # noqa: E402
from tests.helpers.stores import content, serving  # noqa: E402

pytestmark = pytest.mark.slow


def test_a_build_that_changes_machines_is_the_build_of_a_folder(built, world, local_ray, tmp_path, monkeypatch):
    """The second machine starts empty: its workers fetch videos to cut, and clips to caption and pack."""
    url, (folder, _) = "s3://corpora/built", built
    with serving():
        monkeypatch.setenv("CLIPMILL_MIRROR", str(tmp_path / "first"))
        build_here(url, [str(world.sources)], *PLAIN, stages=("ingest", "download"))
        monkeypatch.setenv("CLIPMILL_MIRROR", str(tmp_path / "second"))
        build_here(url, [], *PLAIN)
        there = content(url)
        assert {key for key in there if key.startswith("sources/")} == {
            str(path.relative_to(folder)) for path in (folder / "sources").rglob("*") if path.is_file()
        }
        shards = {path.name: path.read_bytes() for path in (folder / "shards").glob("*.*")}
        assert {key.removeprefix("shards/"): data for key, data in there.items() if "shards/" in key} == shards
        assert tables(for_reading(url, "manifest.duckdb")) == tables(folder)
        before = Store.of(url).list("fragments/")
        assert not build_here(url, [], *PLAIN).did_something
        assert Store.of(url).list("fragments/") == before
