"""Downloads connect to public addresses only, despite odd spellings, redirects and changing name look-ups."""

import http.server
import ipaddress
import socket
import threading

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from clipmill.base.errors import ItemError
from pipeline.stages.download import address_guard
from pipeline.stages.download.address_guard import EgressGuard, is_public, resolve
from pipeline.stages.download.fetch import DownloadSettings, fetch
from tests.helpers.http import media_server

PRIVATE = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
    "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
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
    "address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]
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


def test_the_deadline_ends_a_connection_that_is_waiting_for_bytes():
    """The read has no limit of its own that matters: only the guard can end it, and the server learns of it."""
    with socket.create_server(("127.0.0.1", 0)) as server, EgressGuard(True, timeout_s=3) as guard:
        waiting = guard.connect("127.0.0.1", server.getsockname()[1], timeout=120)
        peer, _ = server.accept()
        peer.settimeout(120)
        with waiting, peer:
            assert waiting.recv(1) == b"", "ended by the guard, not by its own limit"
            assert peer.recv(1) == b""
        with pytest.raises(ItemError, match="not finished within 3 s"):
            guard.check()
