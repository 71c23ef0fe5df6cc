"""Serve a folder over HTTP on loopback, with byte ranges and faults on request. Stdlib only.

Requests are untrusted: only files inside the folder are served. `faults.json` in the folder (or the `faults` argument)
defines faults by path relative to the folder:

  "status": 503            return this status instead of the file
  "cut_after_bytes": n     close the connection after n bytes of the body, although the header announced more
  "extra_bytes": n         announce n bytes more than the file has; for n < 0, announce and send n fewer
  "delay_s": x             wait before responding
  "content_type": "…"      send this content type
  "times": n               only for the first n requests of the path (GET and HEAD alike); by default for all
"""

import email.utils
import hashlib
import json
import mimetypes
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

Faults = Mapping[str, Mapping[str, Any]]

CONTENT_TYPES = {
    ".mp4": "video/mp4",
    ".mkv": "video/x-matroska",
    ".webm": "video/webm",
    ".mov": "video/quicktime",
    ".ts": "video/mp2t",
    ".vtt": "text/vtt; charset=utf-8",
    ".srt": "application/x-subrip",
    ".json3": "application/json",
    ".jsonl": "application/jsonl",
}
CHUNK_BYTES = 1 << 16


@contextmanager
def serve(folder: str | Path, port: int = 0, faults: Faults | None = None) -> Iterator[str]:
    """Serve `folder` on 127.0.0.1 from a thread until the block ends. Yields the base URL without a trailing slash."""
    folder = Path(folder).resolve()
    if faults is None:
        listed = folder / "faults.json"
        faults = json.loads(listed.read_text()) if listed.exists() else {}
    server = _Server(("127.0.0.1", port), folder, faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], folder: Path, faults: Faults):
        self.folder, self.faults = folder, faults
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def fault(self, name: str) -> Mapping[str, Any]:
        """Return the fault for this request of the file `name`, and count the request."""
        fault = self.faults.get(name, {})
        with self._lock:
            self._seen[name] += 1
            return fault if self._seen[name] <= fault.get("times", self._seen[name]) else {}

    def find(self, name: str) -> Path | None:
        """Return the file of that name, None if it is outside of the folder.

        Links and ".." are resolved first.
        """
        try:
            path = (self.folder / name).resolve()
            return path if path.is_relative_to(self.folder) and path.is_file() else None
        except (OSError, ValueError):  # an impossible file name: too long, or with a zero byte
            return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open between requests
    server_version = "demo-world"
    sys_version = ""
    server: _Server

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the client records what it fetched."""

    def _answer(self, with_body: bool) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        fault = self.server.fault(name)
        time.sleep(fault.get("delay_s", 0.0))
        if "status" in fault:
            return self._send_status(HTTPStatus(fault["status"]))
        path = self.server.find(name)
        if path is None:
            return self._send_status(HTTPStatus.NOT_FOUND)
        with path.open("rb") as file:
            self._send_file(path, file, fault, with_body)

    def _send_file(self, path: Path, file: BinaryIO, fault: Mapping[str, Any], with_body: bool) -> None:
        """Send headers, and the body if asked, for the requested range of a file, with the given fault."""
        stat = path.stat()
        etag = f'"{hashlib.sha256(f"{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]}"'
        asked = self.headers.get("Range")
        if self.headers.get("If-Range", etag) != etag:
            asked = None
        if asked is None and self.headers.get("If-None-Match") == etag:
            return self._send_status(HTTPStatus.NOT_MODIFIED, {"ETag": etag})
        span = _byte_range(asked, stat.st_size)
        if span is None:
            whole = {"Content-Range": f"bytes */{stat.st_size}"}
            return self._send_status(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, whole)
        start, stop, partial = span
        extra = fault.get("extra_bytes", 0)
        announced = max(0, stop - start + extra)
        stop = min(stop, start + announced)
        self.send_response(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{start + announced - 1}/{stat.st_size + extra}")
        content_type = CONTENT_TYPES.get(path.suffix.lower()) or mimetypes.guess_type(path.name)[0]
        self.send_header("Content-Type", fault.get("content_type", content_type or "application/octet-stream"))
        self.send_header("Content-Length", str(announced))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        self.send_header("Last-Modified", email.utils.formatdate(stat.st_mtime, usegmt=True))
        self.end_headers()
        self.close_connection |= extra > 0  # otherwise the client waits for the rest
        if with_body:
            self._send_bytes(file, start, stop, fault.get("cut_after_bytes"))

    def _send_bytes(self, file: BinaryIO, start: int, stop: int, cut_after_bytes: int | None) -> None:
        left = stop - start
        if cut_after_bytes is not None and cut_after_bytes < left:
            left, self.close_connection = cut_after_bytes, True
        file.seek(start)
        try:
            while left > 0:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:  # the file became shorter meanwhile: the client gets a short body
                    self.close_connection = True
                    return
                self.wfile.write(chunk)
                left -= len(chunk)
        except (BrokenPipeError, ConnectionResetError):  # the client closed the connection
            self.close_connection = True

    def _send_status(self, status: HTTPStatus, headers: Mapping[str, str] | None = None) -> None:
        """Send a status with a page of one line, as web servers do."""
        body = b"" if status == HTTPStatus.NOT_MODIFIED else f"<h1>{status.value} {status.phrase}</h1>\n".encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _byte_range(header: str | None, size: int) -> tuple[int, int, bool] | None:
    """Return (start, stop, True if partial) for a Range header, None if it cannot be satisfied.

    See RFC 9110, 14.1.

    Several ranges, other units and malformed headers get the whole file, which the RFC allows.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").strip())
    if not match or match.groups() == ("", ""):
        return 0, size, False
    first, last = match.groups()
    if first == "":  # "bytes=-N" asks for the last N bytes
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1 if last else size)
        if last and int(last) < int(first):
            return 0, size, False
    return (start, stop, True) if start < stop else None
