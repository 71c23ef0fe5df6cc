"""Serve media over loopback HTTP with scripted faults such as dropped connections and wrong lengths."""

import gzip
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import imageio_ffmpeg


@dataclass
class Route:
    """Describe the answers of one path; each request consumes one element of a list, then the route has no fault."""

    body: bytes = b""
    content_type: str | None = "video/mp4"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True  # answer Range requests with 206
    etag: str | None = '"one"'
    drops: list[int] = field(default_factory=list)  # close the connection after this many bytes of the body
    failures: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # (status, headers) answered first
    stall_after: int | None = None  # send this many bytes, then nothing until the server is closed
    length_delta: int = 0  # added to the true Content-Length
    short_lengths: list[int] = field(default_factory=list)  # subtracted from it
    bytes_per_s: int | None = None
    together: threading.Barrier | None = None  # answer once this many requests are waiting
    gzipped: bool = False
    announce: bool = True  # whether to send Content-Length


class MediaServer:
    """Serve the `routes` at `url(path)`, and record (path, headers) of every request in `requests`."""

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.closing = threading.Event()
        self.num_active = 0
        self.max_active = 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"media": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def add(self, path: str, body: bytes = b"", **options) -> str:
        self.routes[path] = Route(body, **options)
        return self.url(path)

    def requests_for(self, path: str) -> list[dict[str, str]]:
        """Return the headers of every request for a path, in order."""
        return [headers for asked, headers in self.requests if asked.partition("?")[0] == path]

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def media_server() -> Iterator[MediaServer]:
    server = MediaServer()
    try:
        yield server
    finally:
        server.close()


@dataclass
class ScriptedServer:
    """Requests to a `scripted_server` as (target, headers), in order."""

    port: int = 0
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that disconnect, as some tests do; report any other error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    media: MediaServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args) -> None:
        pass

    def do_GET(self) -> None:
        media = self.media
        with media.lock:
            media.requests.append((self.path, dict(self.headers.items())))
            media.num_active += 1
            self.active = 1
            media.max_active = max(media.max_active, media.num_active)
        try:
            self._answer(media.routes.get(self.path.partition("?")[0], Route(b"nothing here", "text/plain", 404)))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self._leave()

    def _leave(self) -> None:
        """Mark the connection inactive before the last byte is sent, so that its client is not counted twice."""
        with self.media.lock:
            self.media.num_active -= self.active
        self.active = 0

    def _answer(self, route: Route) -> None:
        if route.together is not None:
            route.together.wait()
        if route.failures:
            status, headers = route.failures.pop(0)
            self._send(status, headers, b"come back later", Route(content_type="text/plain", etag=None))
            return
        body, status, headers = route.body, route.status, dict(route.headers)
        start = self._range_start(route)
        if start is not None and start >= len(body):
            self._send(416, {"Content-Range": f"bytes */{len(body)}"}, b"<h1>416</h1>", Route(etag=None))
            return
        if start is not None:
            status, body = 206, body[start:]
            headers["Content-Range"] = f"bytes {start}-{len(route.body) - 1}/{len(route.body)}"
        self._send(status, headers, body, route)

    def _range_start(self, route: Route) -> int | None:
        value = self.headers.get("Range", "")
        if not route.ranges or not value.startswith("bytes="):
            return None
        if "If-Range" in self.headers and self.headers["If-Range"] != route.etag:
            return None
        return int(value.removeprefix("bytes=").partition("-")[0])

    def _send(self, status: int, headers: dict[str, str], body: bytes, route: Route) -> None:
        self.send_response(status)
        if route.gzipped:
            body, headers = gzip.compress(body), {**headers, "Content-Encoding": "gzip"}
        if route.content_type:
            self.send_header("Content-Type", route.content_type)
        if route.etag:
            self.send_header("ETag", route.etag)
        for name, value in headers.items():
            self.send_header(name, value)
        if route.short_lengths and route.body:
            body = body[: -route.short_lengths.pop(0)]
        if route.announce:
            self.send_header("Content-Length", str(len(body) + route.length_delta))
        if route.length_delta or not route.announce:
            self.send_header("Connection", "close")
        self.end_headers()
        self._write(body, route)

    def _write(self, body: bytes, route: Route) -> None:
        drop = route.drops.pop(0) if route.drops and route.body else None
        body = body if drop is None else body[:drop]
        step = max(1, route.bytes_per_s // 20) if route.bytes_per_s else 1 << 16
        sent = 0
        while sent < len(body):
            if route.stall_after is not None and sent >= route.stall_after:
                self.media.closing.wait()
                break
            end = min(sent + step, len(body), len(body) if route.stall_after is None else route.stall_after)
            if end == len(body):
                self._leave()
            self.wfile.write(body[sent:end])
            sent = end
            if route.bytes_per_s and sent < len(body):
                time.sleep(0.05)
        if drop is not None or route.length_delta or not route.announce:
            self.close_connection = True


@contextmanager
def scripted_server(answer: Callable[[str, dict[str, str], Callable[[bytes], None]], None]) -> Iterator[ScriptedServer]:
    """Serve answers written out byte by byte: `answer(target, headers, send)` is called for every connection.

    Header names are in lower case. A connection takes one request and is closed after its answer.
    """
    listener, server = socket.create_server(("127.0.0.1", 0), backlog=50), ScriptedServer()
    server.port = listener.getsockname()[1]

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                part = connection.recv(65536)
                if not part:
                    return
                data += part
            line, *lines = data.decode("latin-1").split("\r\n")
            target = line.split(" ")[1]
            headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
            server.requests.append((target, headers))
            answer(target, headers, connection.sendall)

    def accept() -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def http_answer(status: str, body: bytes = b"", cut: int | None = None, **headers: str | int | None) -> bytes:
    """Write an HTTP answer out. `cut`: send only this many bytes of the body; a header that is None is left out.

    Underscores in names of headers become hyphens.
    """
    date = {"Date": "Tue, 02 Jan 2024 00:00:00 GMT"}
    fields = {"Connection": "close", "Content-Type": "video/mp4", "Content-Length": len(body), **date}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}\r\n".encode() for name, value in fields.items() if value is not None]
    return b"".join([f"HTTP/1.1 {status}\r\n".encode(), *lines, b"\r\n", body[:cut]])


def make_video(path: Path, *, duration_s: float = 1.0, size: str = "160x120", audio_only: bool = False) -> bytes:
    """Encode a small video of noise (some hundred kilobytes), or sound only, with FFmpeg."""
    noise = f"nullsrc=s={size}:r=10:d={duration_s},geq=random(1)*255:128:128"
    source = f"sine=d={duration_s}" if audio_only else noise
    codec = ["-c:a", "aac"] if audio_only else ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", source, *codec]
    command += ["-threads", "1", "-movflags", "+faststart" if path.suffix in (".mp4", ".m4a") else "+write_colr"]
    command = command if path.suffix in (".mp4", ".m4a", ".mov") else command[:-2]
    subprocess.run([*command, str(path)], check=True, stdin=subprocess.DEVNULL)
    return path.read_bytes()
