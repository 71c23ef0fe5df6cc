"""Downloads connect to public addresses only, despite odd spellings, redirects and changing name look-ups."""

import http.server
import ipaddress
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

import psutil
import pytest
import requests
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from clipmill.base.errors import ItemError
from pipeline.stages.download import address_guard
from pipeline.stages.download.address_guard import EgressGuard, is_own, is_public, resolve, why_refused
from pipeline.stages.download.fetch import DownloadSettings, fetch
from tests.helpers.http import media_server

PRIVATE = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32", "161.26.0.0/16", "166.8.0.0/14", "192.80.8.124/32",
]  # fmt: skip
PRIVATE_V6 = [
    "::/128", "::1/128", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "2001::/23", "2001::/32", "2001:1::1/128",
    "2001:2::/48", "2001:3::/32", "2001:10::/28", "2001:20::/28", "2001:30::/28", "2001:db8::/32", "3ffe::/16",
    "3fff::/20", "4000::/2", "5f00::/16", "8000::/1", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
    "::ffff:0:0:0/96",
]  # fmt: skip
SETTINGS = DownloadSettings(retries=0, timeout_s=600)


@st.composite
def private_v4(draw) -> ipaddress.IPv4Address:
    network = ipaddress.ip_network(draw(st.sampled_from(PRIVATE)))
    return network[draw(st.integers(0, network.num_addresses - 1))]


@given(private_v4())
def test_private_addresses_are_refused_however_they_are_wrapped(ip):
    number = int(ip)
    assert not is_public(str(ip))
    assert not is_public(f"::ffff:{ip}")
    assert not is_public(f"64:ff9b::{ip}")
    assert not is_public(str(ipaddress.IPv6Address(0x2002 << 112 | number << 80)))  # 6to4
    assert not is_public(str(ipaddress.IPv6Address(number)))  # compatible
    for isatap in (0x00005EFE, 0x02005EFE):
        assert not is_public(str(ipaddress.IPv6Address(0x26064700 << 96 | isatap << 32 | number)))


@given(st.sampled_from(PRIVATE_V6), st.integers(0, 2**128 - 1))
def test_special_ipv6_networks_are_refused(network, offset):
    found = ipaddress.ip_network(network)
    assert not is_public(str(found[offset % found.num_addresses]))


@pytest.mark.parametrize(
    "address",
    [
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "2001:db8::1",
        "169.254.169.254",
        "2001::1",
    ],
)
def test_special_addresses_are_refused(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "93.184.215.14", "168.63.129.15", "192.0.1.1", "192.88.98.1", "203.0.112.1", "2606:4700::1111"]
    + ["::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1", "2001:200::1", "3ffd::1"],
)
def test_public_addresses_are_allowed(address):
    assert is_public(address)


def refusal(url: str, tmp_path, **columns) -> ItemError:
    with pytest.raises(ItemError) as caught:
        fetch({"video_id": "v", "url": url, "kind": "url", **columns}, tmp_path / "sources", SETTINGS)
    return caught.value


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "0", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_a_link_to_this_machine_is_refused_without_a_request(host, tmp_path):
    with media_server() as server:
        server.add("/a.mp4", b"secret")
        error = refusal(server.url("/a.mp4", host), tmp_path)
        assert (error.error_class, error.transient) == ("private-address", False)
        assert server.requests == []


def pretend(monkeypatch, addresses: dict[str, list[str]]) -> list[str]:
    """Answer name look-ups from a table (one entry per look-up, the last repeated); return the requested names."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        asked.append(host)
        if host not in addresses:
            return real(host, port, *args, **kwargs)
        found = addresses[host].pop(0) if len(addresses[host]) > 1 else addresses[host][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found.split()]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.fixture
def public_loopback(monkeypatch):
    """Let 127.0.0.2 stand for a public address, so that the test needs no other machine."""
    real = is_public
    monkeypatch.setattr(address_guard, "is_public", lambda ip: ip == "127.0.0.2" or real(ip))


def own_addresses() -> list[str]:
    """Return this machine's addresses, as its interfaces have them."""
    found = [address for entries in psutil.net_if_addrs().values() for address in entries]
    return [entry.address for entry in found if entry.family in (socket.AF_INET, socket.AF_INET6)]


def test_this_machine_is_refused_under_each_of_its_addresses(monkeypatch):
    """Also where its own address is a public one."""
    monkeypatch.setattr(address_guard, "is_public", lambda ip: True)
    own = [address for address in own_addresses() if not address.startswith(("127.", "fe80"))]
    for address in ["127.0.0.1", *own]:
        assert is_own(address), address
        with pytest.raises(ItemError, match="an address of this machine"):
            resolve(address, 80, allow_private=False)
        if "." in address:
            assert is_own(f"::ffff:{address}") and is_own(f"64:ff9b::{address}")
    assert not is_own("8.8.8.8") and not is_own("2606:4700::1111")
    assert resolve("127.0.0.1", 80, allow_private=True)


@pytest.mark.parametrize("address", ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"])
def test_networks_of_the_settings_are_refused_however_they_are_spelt(address):
    networks = DownloadSettings(refused_networks=["8.8.8.0/24"]).refused_networks
    with pytest.raises(ItemError, match="refused_networks"):
        resolve(address, 80, False, networks)
    assert why_refused("8.8.9.1", networks) is None
    assert DownloadSettings().fingerprint() == DownloadSettings(refused_networks=["8.8.8.0/24"]).fingerprint()


class Redirecting:
    """Answer every request with a redirect, on an address of its own."""

    def __init__(self, address, target: str):
        outer = self
        self.num_requests = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_args):
                pass

            def do_GET(self):
                outer.num_requests += 1
                self.send_response(302)
                self.send_header("Location", target)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.server = http.server.HTTPServer(address, Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def test_a_redirect_to_a_private_address_is_refused(monkeypatch, public_loopback, tmp_path):
    pretend(monkeypatch, {"public.example": ["127.0.0.2"]})
    with media_server() as inside:
        secret = inside.add("/secret.mp4", b"secret")
        listener = Redirecting(("127.0.0.2", 0), secret)
        try:
            error = refusal(f"http://public.example:{listener.port}/a.mp4", tmp_path)
        finally:
            listener.close()
        assert error.error_class == "private-address" and listener.num_requests == 1
        assert inside.requests == []


def test_a_second_look_up_cannot_change_the_address(monkeypatch, public_loopback):
    """The name is looked up once, and the connection goes to the checked address."""
    asked = pretend(monkeypatch, {"rebind.example": ["127.0.0.2", "127.0.0.1"]})
    listener = socket.create_server(("127.0.0.2", 0))
    try:
        with EgressGuard(allow_private=False, timeout_s=600) as guard:
            connection = guard.connect("rebind.example", listener.getsockname()[1], 600)
            assert connection.getpeername()[0] == "127.0.0.2"
            connection.close()
    finally:
        listener.close()
    assert asked == ["rebind.example"]


def test_one_private_address_among_public_ones_is_enough(monkeypatch):
    pretend(monkeypatch, {"mixed.example": ["8.8.8.8 10.0.0.1"]})
    with pytest.raises(ItemError, match="10.0.0.1"):
        resolve("mixed.example", 80, allow_private=False)


def test_a_subtitle_link_is_guarded_too(monkeypatch, tmp_path):
    video = tmp_path / "v.mp4"
    video.write_bytes(b"x")
    with media_server() as server:
        subtitle = server.add("/secret.vtt", b"WEBVTT\n")
        with pytest.raises(ItemError) as caught:
            fetch({"video_id": "v", "url": str(video), "kind": "file", "subtitle": subtitle}, tmp_path / "s", SETTINGS)
        assert server.requests == []
    assert caught.value.error_class == "not-a-video"  # the video; the subtitle is noted


def test_the_guard_covers_every_use_of_the_session(tmp_path):
    with (
        media_server() as server,
        EgressGuard(allow_private=False, timeout_s=600) as guard,
        requests.Session() as session,
    ):
        guard.mount(session)
        with pytest.raises(ItemError, match="private-address"):
            session.get(server.add("/a", b"x"))
        assert server.requests == []


def test_allowing_private_addresses_allows_them(tmp_path):
    with (
        media_server() as server,
        EgressGuard(allow_private=True, timeout_s=600) as guard,
        requests.Session() as session,
    ):
        guard.mount(session)
        assert session.get(server.add("/a", b"x")).content == b"x"


def test_a_failed_look_up_is_retryable_and_an_unknown_name_is_not(monkeypatch):
    def fail(code):
        def getaddrinfo(*_args, **_kwargs):
            raise socket.gaierror(code, "no")

        return getaddrinfo

    for code, transient in ((socket.EAI_AGAIN, True), (socket.EAI_NONAME, False)):
        monkeypatch.setattr(socket, "getaddrinfo", fail(code))
        with pytest.raises(ItemError) as caught:
            resolve("h.example", 80, allow_private=False)
        assert (caught.value.error_class, caught.value.transient) == ("unknown-host", transient)


def test_behind_a_proxy_the_target_is_still_checked(tmp_path):
    with media_server() as server:
        settings = SETTINGS.model_copy(update={"proxy": server.url("")})
        with pytest.raises(ItemError) as caught:
            fetch({"video_id": "v", "url": "http://10.0.0.1/a.mp4", "kind": "url"}, tmp_path / "s", settings)
        assert caught.value.error_class == "private-address" and server.requests == []
        with pytest.raises(ItemError) as caught:
            fetch({"video_id": "v", "url": "http://8.8.8.8/a.mp4", "kind": "url"}, tmp_path / "s", settings)
        assert caught.value.error_class == "not-found", "the proxy itself may be private"
        assert server.requests[0][0] == "http://8.8.8.8/a.mp4"


# --- the deadline


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Return the files of a certificate for 127.0.0.1 that it signs itself, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=2))
    signed = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    files = [folder / "certificate.pem", folder / "key.pem"]
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    unencrypted = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files[1].write_bytes(key.private_bytes(pem, pkcs8, unencrypted))
    return files


@contextmanager
def silent_server(begin, context: ssl.SSLContext | None = None) -> Iterator[tuple[int, threading.Event]]:
    """Serve one connection, send `begin`, then nothing; yield (port, event of the client having closed it)."""
    closed = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(60)
            with context.wrap_socket(connection, server_side=True) if context else connection as stream:
                if begin is not None:
                    stream.recv(65536)
                    stream.sendall(begin)
                with suppress(ConnectionError, ssl.SSLEOFError):
                    while stream.recv(65536):
                        pass
                closed.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: serve(listener.accept()[0]), daemon=True)
        thread.start()
        yield listener.getsockname()[1], closed
        thread.join(60)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("begin", [None, b"", b"HTTP/1.1 200 OK\r\nX: ", HEAD, HEAD + b"x" * 10])
def test_the_deadline_closes_every_connection_whatever_it_waits_for(scheme, begin, certificate):
    """Nothing else ends it: the client would wait for 600 s, the server for 60 s, and that is seen."""
    context = None
    if scheme == "https" and begin is not None:  # None: the server never answers, not even the handshake
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
    ended: list[Exception] = []

    def read(guard: EgressGuard, port: int) -> None:
        with requests.Session() as session:
            guard.mount(session)
            try:
                url = f"{scheme}://127.0.0.1:{port}/"
                session.get(url, timeout=600, verify=certificate[0], stream=True).raw.read()
                guard.check()  # a connection that was shut may read as an end
            except (requests.RequestException, urllib3.exceptions.HTTPError, ItemError) as error:
                ended.append(error)

    with silent_server(begin, context) as (port, closed), EgressGuard(allow_private=True, timeout_s=0.5) as guard:
        client = threading.Thread(target=read, args=(guard, port), daemon=True)
        client.start()
        assert closed.wait(30), "the connection is still open"
        client.join(60)
        assert ended and guard.expired.error_class == "timeout"


def test_a_connection_made_at_the_deadline_is_closed(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener, EgressGuard(allow_private=True, timeout_s=600) as guard:
        real = guard._track
        monkeypatch.setattr(guard, "_track", lambda sock: (guard._expire(guard._out_of_time()), real(sock)))
        connection = guard.connect("127.0.0.1", listener.getsockname()[1], 60)
        assert connection.recv(1) == b""
        connection.close()
        with pytest.raises(ItemError, match="timeout"):
            guard.connect("127.0.0.1", listener.getsockname()[1], 60)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("closes", [True, False], ids=["a connection each", "one connection"])
def test_a_connection_that_is_closed_keeps_no_file_descriptor(closes):
    """A long stream of segments is more connections than a process may have open."""
    with (
        media_server() as server,
        EgressGuard(allow_private=True, timeout_s=600) as guard,
        requests.Session() as session,
    ):
        guard.mount(session)
        url = server.add("/a", b"x", headers={"Connection": "close"} if closes else {})
        session.get(url)
        before = num_descriptors()
        most = max(num_descriptors() for _ in range(100) if session.get(url).content)
        assert most <= before + 3, "each request may be about to close, on both sides"
        assert len(guard._sockets) <= 2


def test_a_tls_connection_that_is_closed_keeps_no_file_descriptor(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with EgressGuard(allow_private=True, timeout_s=600) as guard, requests.Session() as session:
        guard.mount(session)
        before = num_descriptors()
        for _ in range(5):
            with silent_server(HEAD.replace(b"1000", b"2") + b"ok", context) as (port, closed):
                assert session.get(f"https://127.0.0.1:{port}/", verify=certificate[0], timeout=60).content == b"ok"
                session.close()
                assert closed.wait(30)
        assert num_descriptors() <= before + 1
