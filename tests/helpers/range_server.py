"""Serve byte ranges of files in memory over loopback HTTP, and record the requests."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Store:
    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, tuple[int, int] | None]] = field(default_factory=list)  # method, name, range
    num_failures: int = 0  # number of GETs to answer with 503
    ignores_ranges: bool = False
    drops_after: int | None = None  # bytes of a whole file, then the connection ends

    def ranges(self, name: str) -> list[tuple[int, int] | None]:
        """Return [start, end) of every GET of a file, None for a request of the whole file."""
        return [span for method, asked, span in self.requests if method == "GET" and asked == name]


@contextmanager
def serve_store(files: dict[str, bytes]) -> Iterator[Store]:
    store = Store(files=files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        store, name = self.store, self.path.lstrip("/")
        body, span = store.files.get(name), self._range()
        store.requests.append((self.command, name, span))
        if self.command == "GET" and store.num_failures:
            store.num_failures -= 1
            self._send(503, b"busy")
        elif body is None:
            self._send(404, b"nothing here")
        elif span is None:
            self._send(200, body, name)
        elif span[0] >= len(body):
            self._send(416, b"", name)
        else:
            end = min(span[1], len(body))
            headers = {"Content-Range": f"bytes {span[0]}-{end - 1}/{len(body)}"}
            self._send(206, body[span[0] : end], name, headers)

    def _range(self) -> tuple[int, int] | None:
        value = self.headers.get("Range", "")
        if not value.startswith("bytes=") or self.store.ignores_ranges:
            return None
        start, _, last = value.removeprefix("bytes=").partition("-")
        return int(start), int(last) + 1

    def _send(self, status: int, body: bytes, name: str = "", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", self.store.etags.get(name, '"one"'))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.store.drops_after is not None and status in (200, 206):
            self.wfile.write(body[: self.store.drops_after])
            self.close_connection = True
        else:
            self.wfile.write(body)
