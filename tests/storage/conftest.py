"""Fixtures for corpora in an object store: an S3 server, and a machine with an empty mirror."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def server():
    """Run an S3 server with a bucket for the tests of a module."""
    from tests.helpers.stores import serving

    with serving() as running:
        yield running


@pytest.fixture
def machine(server, tmp_path, monkeypatch):
    """Give this process an empty mirror, so that every test starts on a new machine."""

    def begin(name: str) -> Path:
        monkeypatch.setenv("CLIPMILL_MIRROR", str(tmp_path / name))
        return tmp_path / name

    begin("first machine")
    yield begin
    server.spoil = lambda method, path: None
