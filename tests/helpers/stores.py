"""Run an S3 server on loopback whose answers a test may change, and list the corpora in it."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shards.storage import s3 as stores
from shards.storage.s3 import Store
from tests.helpers.whole_corpus import VIDEOS, build_whole, write_sources

BUCKET = "corpora"
# Set at collection, since Ray's workers inherit the environment in which the session's Ray was started.
KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}
os.environ.update(KEYS)
PATIENCE = {"AWS_MAX_ATTEMPTS": "1"}  # a changed answer stays changed, so retries and waits are useless
Spoil = Callable[[str, str], int | None]  # (method, path) → a status to answer with, None: serve it


class StoreServer:
    """Serve moto's S3 through a layer that counts requests and passes each to `spoil`, which may change the answer."""

    def __init__(self):
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.app = DomainDispatcherApplication(create_backend_app)
        self.spoil: Spoil = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self.server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def _serve(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        status = self.spoil(method, path)
        if status is None:
            return self.app(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(f"{status} spoilt", [("Content-Length", "0")])
        return [b""]

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()


@contextmanager
def serving() -> Iterator[StoreServer]:
    """Run a server with a bucket, and set the environment variables that clients read."""
    server = StoreServer()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**PATIENCE, "AWS_ENDPOINT_URL": server.endpoint}.items():
            patch.setenv(name, value)
        stores._make_client(server.endpoint, os.getpid()).create_bucket(Bucket=BUCKET)
        yield server
    server.close()


def keys(url: str) -> set[str]:
    """Return the keys in the store, without those specific to a run."""
    return {key for key in Store.of(url).list() if not key.startswith(("fragments/runs/", ".clipmill/"))}


def keys_of(folder: Path) -> set[str]:
    """Return the files of a corpus that its copy in a store has too; only the download stage uploads sources."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith(("fragments/runs/", ".clipmill/", "sources/"))}


def content(url: str) -> dict[str, bytes]:
    """Return the objects of a corpus in shards, clips and sources."""
    store = Store.of(url)
    keys = [key for key in store.list() if key.startswith(("shards/", "clips/", "sources/"))]
    return {key: store.read(key).data for key in keys}


def build_in(corpus: str | Path, folder: Path, num_videos: int = len(VIDEOS)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    build_whole(corpus, write_sources(folder / "list.jsonl", VIDEOS[:num_videos]))
