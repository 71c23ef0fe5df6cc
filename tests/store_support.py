"""An S3 server on loopback whose answers a test may spoil, and corpora in it."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from whole_corpus_support import VIDEOS, build_whole, write_sources

from shards.store import Store

BUCKET = "corpora"
KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}
Spoil = Callable[[str, str], int | None]  # (method, path) → a status to answer with, None: serve it


class StoreServer:
    """moto's S3 behind a door that counts and spoils. `spoil` is asked for every request."""

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


def content(url: str) -> dict[str, bytes]:
    """Every object of a corpus that is not of one run alone."""
    store = Store.of(url)
    keys = [key for key in store.list() if key.startswith(("shards/", "clips/", "sources/"))]
    return {key: store.read(key).data for key in keys}


def build_in(corpus: str | Path, folder: Path, **options) -> None:
    build_whole(corpus, write_sources(folder / "list.jsonl", VIDEOS), **options)
