"""Fuzz downloads with mutated answers of servers: `python -m bench.fuzz --target answers`.

Each case is a pure function of (seed, number): the answers of a server to the requests of one download, some of them
mutated in their headers or bodies, cut off, or exchanged for another's. The server is on this machine's loopback
address, and no other address is connected to. A download may return a file or raise an error with a class; anything
else is a finding, as is one that takes longer than its limits allow, or leaves a file under a final name or a
connection behind.
"""

import contextlib
import gzip
import itertools
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

from clipmill.base.errors import ItemError
from pipeline.stages.download import address_guard
from pipeline.stages.download.errors import DownloadError
from pipeline.stages.download.fetch import DownloadSettings, fetch

SETTINGS = DownloadSettings(
    allow_private_addresses=True, timeout_s=20, stall_timeout_s=1, answer_timeout_s=3, retries=2, backoff_s=0.001,
    cooldown_s=0.001, lockout_retries=1, lockout_patience_s=0, max_bytes=1 << 22,
)  # fmt: skip
LIMIT_S = 120.0  # of a case, on a busy machine
WORDS = [b"\xb2", b"-1", b"0", b"9" * 30, b"\xff\xfe", b"*", b"bytes", b"%", b"%zz", b"\0", b" ", b",", b";", b"://"]
WORDS += [b"1e999", b"gzip, gzip", b"chunked", b"W/", b'"', b"\r\n", b"\n", b"../", b"[::1", b"\xc3\xa9", b"x" * 9000]


def make_answers(port: int) -> dict[str, bytes]:
    """Return answers of every kind that a download meets, written out."""
    body = bytes.fromhex("00000018667479706d703432000000006d703432") + bytes(4) + bytes(range(256)) * 200
    half, size, tag = body[: len(body) // 2], len(body), 'ETag: "one"\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT'
    date = "Date: Tue, 02 Jan 2024 00:00:00 GMT"
    packed, page = gzip.compress(body), b"<html><video src='/v.mp4'></video></html>"
    segments = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/s.ts\n#EXT-X-ENDLIST\n"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:5000], body[5000:])) + b"0\r\n\r\n"

    def answer(line: str, content: bytes = b"", *headers: str) -> bytes:
        fields = [f"Content-Length: {len(content)}", "Content-Type: video/mp4", date, *headers]
        return (
            f"HTTP/1.1 {line}\r\n".encode() + "".join(f"{field}\r\n" for field in fields).encode() + b"\r\n" + content
        )

    chunked = f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{tag}\r\n{date}\r\n\r\n".encode() + chunks
    rest = f"Content-Range: bytes {len(half)}-{size - 1}/{size}"
    return {
        "whole": answer("200 OK", body, tag),
        "broken": answer("200 OK", body, tag)[: -len(half)],
        "rest": answer("206 Partial Content", body[len(half) :], tag, rest),
        "beyond": answer("416 Range Not Satisfiable", b"", f"Content-Range: bytes */{size}"),
        "chunked": chunked,
        "gzip": answer("200 OK", packed, tag, "Content-Encoding: gzip"),
        "hint": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + answer("200 OK", body),
        "moved": answer("302 Found", b"", f"Location: http://127.0.0.1:{port}/caf\u00e9/%d0%b2.mp4"),
        "relative": answer("301 Moved", b"", "Location: ../x%20y.mp4?a=1"),
        "locked": answer("429 Too Many Requests", b"", "Retry-After: 0"),
        "busy": answer("503 Service Unavailable", b"", "Retry-After: Mon, 01 Jan 1990 00:00:00 GMT"),
        "page": answer("200 OK", page, "Content-Type: text/html"),
        "playlist": answer("200 OK", segments, "Content-Type: application/vnd.apple.mpegurl"),
    }


def mutated_answer(raw: bytes, rng: random.Random) -> bytes:
    """Apply one to four mutations, most of them to the headers, which may stay valid but for a value."""
    content = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        end = content.find(b"\r\n\r\n") + 4
        at = rng.randrange(max(1, end if rng.random() < 0.8 and end > 4 else len(content)))
        word = rng.choice(WORDS)
        match rng.randrange(6):
            case 0:
                content[at : at + 1] = rng.randbytes(1)
            case 1:
                content[at:at] = word
            case 2:  # the value of a header
                lines = [n for n in range(end - 2) if content[n : n + 2] == b": "]
                start = rng.choice(lines) + 2 if lines else at
                stop = content.find(b"\r\n", start)
                content[start : stop if stop > 0 else start] = word
            case 3:  # a header again, or nowhere
                lines = bytes(content[: max(0, end - 4)]).split(b"\r\n")
                line = rng.choice(lines)
                again = rng.random() < 0.5
                content[: max(0, end - 4)] = b"\r\n".join([*lines, line] if again else [x for x in lines if x != line])
            case 4:
                del content[at : at + rng.choice((1, 4, 64))]
            case 5:
                del content[rng.randrange(len(content) + 1) :]
    return bytes(content)


@contextlib.contextmanager
def _server(script: Iterator[tuple[bytes, bool]]) -> Iterator[int]:
    """Serve an answer of the script to each connection; it is held open after its answer where the script says so."""
    listener, over = socket.create_server(("127.0.0.1", 0), backlog=50), threading.Event()

    def serve(connection: socket.socket, raw: bytes, stays: bool) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(raw)
            if stays:
                over.wait(30)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                threading.Thread(target=serve, args=(connection, *next(script)), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        over.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _script(rng: random.Random, answers: Callable[[], dict[str, bytes]]) -> Iterator[tuple[bytes, bool]]:
    known = answers()
    for number in itertools.count():
        raw = known[rng.choice(sorted(known))] if number < 12 else known["whole"]
        yield (mutated_answer(raw, rng) if rng.random() < 0.7 else raw), rng.random() < 0.05


def _loopback_only(host: str, port: int | None, _allow_private: bool, _refused=()) -> list[tuple]:
    if host.strip("[]") not in ("127.0.0.1", "localhost"):
        raise DownloadError("private-address", f"{host}: this test connects to this machine only")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


def run_case(seed: int, number: int, folder: Path) -> str:
    """Run one case in `folder`; return its outcome: "ok", an error's class, or "FINDING: …"."""
    rng, ports = random.Random(f"answers:{seed}:{number}"), []
    script = _script(rng, lambda: make_answers(ports[0]))
    extension = rng.choice(("mp4", "mp4", "mp4", "m3u8", ""))
    probe = partial(SimpleNamespace, container="mp4", as_row=dict)
    begun, outcome = time.monotonic(), "ok"
    with _server(script) as port, mock.patch.object(address_guard, "resolve", _loopback_only):
        ports.append(port)
        url = f"http://127.0.0.1:{port}/v{'.' * bool(extension)}{extension}"
        source = {"video_id": "v", "url": url, "kind": "url"}
        try:
            row = fetch(source, folder, SETTINGS, probe=lambda path: probe())
            if not (folder.parent / row["path"]).stat().st_size == row["num_bytes"] > 0:
                outcome = "FINDING: the file has not the size of its row"
        except ItemError as error:
            outcome = error.error_class
            if left := [path.name for path in folder.iterdir() if not path.name.startswith("v.part")]:
                outcome = f"FINDING: {error.error_class}, and {left} are left"
        except Exception as error:
            outcome = f"FINDING: {type(error).__name__}: {error}"
    if time.monotonic() - begun > LIMIT_S:
        outcome = f"FINDING: it took {time.monotonic() - begun:.0f} s"
    return outcome


def fuzz_answers(seed: int, numbers: Iterator[int], tally) -> None:
    """Run the cases of these numbers, and count their outcomes in a `bench.fuzz.Tally`."""
    descriptors = 0
    with contextlib.suppress(KeyboardInterrupt):  # report the cases done so far
        for number in numbers:
            begun = time.monotonic()
            with TemporaryDirectory() as folder:
                outcome = run_case(seed, number, Path(folder, "sources"))
            found, _, _ = outcome.partition(":")
            tally.outcomes["answers", found] += 1
            if found == "FINDING":
                tally.findings.append(f"--target answers --seed {seed} --only {number}: {outcome}")
            tally.num_cases += 1
            tally.slowest_s = max(tally.slowest_s, time.monotonic() - begun)
            descriptors = descriptors or len(os.listdir("/proc/self/fd")) + 20
    if tally.num_cases > 1 and len(os.listdir("/proc/self/fd")) > descriptors:
        tally.findings.append(f"escape: {len(os.listdir('/proc/self/fd'))} files and connections are open at the end")
