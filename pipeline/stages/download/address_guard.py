"""Egress guard: the addresses that a download may connect to, its deadline, and its least rate.

Input is untrusted: a URL in a list, a redirect or a subtitle link must not make this machine connect to itself, to its
local network or to a cloud's metadata service. An `EgressGuard` resolves a name once, refuses it if any of its
addresses is not public, and connects only to the addresses it checked, so that a second look-up cannot return another
one (DNS rebinding). At the deadline it ends every connection of its download.

Covered: all requests made through `requests` or yt-dlp's request director, including every redirect. Not covered: the
connections of a proxy (the target is checked by name first, if it resolves here), object stores, whose address comes
from the user's own configuration, and an address of a router that leads back here: name it in
download.refused_networks.
"""

import contextlib
import http.client
import ipaddress
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

from pipeline.stages.download.errors import DownloadError

# IANA's registries of special-purpose addresses (RFC 6890, as of 2026), and what clouds put at other addresses.
_REFUSED_V4 = [
    ipaddress.ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's host; Oracle's metadata service is in 192.0.0.0/24, Alibaba's in 100.64.0.0/10
        *("161.26.0.0/16", "166.8.0.0/14"),  # services inside IBM's cloud
        "192.80.8.124/32",  # Equinix Metal's metadata service
    )
]
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")  # all other IPv6 addresses are refused
_REFUSED_V6 = [
    ipaddress.ip_network(network)
    for network in (
        "2001::/23",  # IETF protocols: Teredo, benchmarking, ORCHID
        *("2001:db8::/32", "3fff::/20"),  # documentation
        "3ffe::/16",  # the former 6bone
    )
]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")
_ISATAP = {0x00005EFE, 0x02005EFE}  # RFC 5214: the third quarter of the address; the fourth is an IPv4 address

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def is_public(address: str) -> bool:
    """Return True for an address of the public internet.

    An IPv6 address that embeds an IPv4 address (mapped, compatible, NAT64, 6to4, ISATAP) is judged by that one, too.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return not any(ip in network for network in _REFUSED_V4)
    embedded = embedded_v4(ip)
    if embedded is not None and not is_public(str(embedded)):
        return False
    if ip.ipv4_mapped or ip in _NAT64 or ip in _COMPATIBLE:
        return embedded is not None
    return ip in _GLOBAL_V6 and not any(ip in network for network in _REFUSED_V6)


def embedded_v4(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address to which packets for this IPv6 address are sent in the end, if there is one."""
    found = ip.ipv4_mapped or ip.sixtofour
    holds_one = ip in _NAT64 or (ip in _COMPATIBLE and int(ip) > 1) or (int(ip) >> 32) & 0xFFFFFFFF in _ISATAP
    return found or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if holds_one else None)


def is_own(address: str) -> bool:
    """Return True for an address of this machine, public or not, by the route that a packet to it would take.

    A packet from a machine to itself has one address at both ends. Nothing is sent.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = (embedded_v4(ip) if ip.version == 6 else None) or ip
    try:
        with socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect((str(ip), 9))
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]) == ip
    except OSError:  # no route to it: the connection fails as well
        return False


def why_refused(address: str, refused_networks: Sequence[Network] = ()) -> str | None:
    """Return why an address must not be connected to, None if it may."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    spellings = [ip, *([embedded] if ip.version == 6 and (embedded := embedded_v4(ip)) else [])]
    if any(spelling in network for spelling in spellings for network in refused_networks):
        return "is in download.refused_networks"
    if not is_public(address):
        return "is not a public address"
    return "is an address of this machine" if is_own(address) else None


def resolve(host: str, port: int | None, allow_private: bool, refused_networks: Sequence[Network] = ()) -> list[tuple]:
    """Return getaddrinfo's entries for a host. Raises DownloadError: unknown-host, private-address."""
    try:
        entries = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        no_answer = getattr(error, "errno", None) == socket.EAI_AGAIN
        raise DownloadError("unknown-host", f"cannot resolve host {host}: {error}", transient=no_answer) from error
    for address in () if allow_private else sorted({entry[4][0] for entry in entries}):
        if reason := why_refused(address, refused_networks):
            raise DownloadError(
                "private-address",
                f"{host} resolves to {address}, which {reason}; "
                "set download.allow_private_addresses: true if it is meant",
            )
    return entries


class LeastRate:
    """End a download whose bytes arrive at less than `bytes_per_s` over `window_s` of waiting for them.

    Only the time inside `measure` counts, so a slow disk or a chosen rate limit is not held against the server.
    bytes_per_s = 0 ends nothing.
    """

    def __init__(self, bytes_per_s: float, window_s: float, clock: Callable[[], float] = time.monotonic):
        self.bytes_per_s, self.window_s, self._clock = bytes_per_s, window_s, clock
        self._num_bytes, self._waited_s = 0, 0.0

    def measure(self, read: Callable[[], bytes]) -> bytes:
        """Return what `read` returns. Raises DownloadError "stalled" after a window with too few bytes."""
        if self._waited_s >= self.window_s:  # found before a read, so that no bytes are lost that have arrived
            self._check(self._num_bytes / self._waited_s)
            self._num_bytes, self._waited_s = 0, 0.0
        begun = self._clock()
        data = read()
        self._waited_s += self._clock() - begun
        self._num_bytes += len(data)
        return data

    def _check(self, rate: float) -> None:
        if rate < self.bytes_per_s:
            raise DownloadError(
                "stalled",
                f"{rate:,.0f} bytes per second over {self._waited_s:.0f} s, fewer than download.min_bytes_per_s "
                f"= {self.bytes_per_s:,.0f}",
            )


class EgressGuard:
    """Connections of one download: to checked addresses only, and none stays open after `timeout_s`.

    A context manager, safe to use from several threads. `least_rate` is for the readers of bodies.
    """

    def __init__(
        self,
        allow_private: bool,
        timeout_s: float,
        least_rate: LeastRate | None = None,
        refused_networks: Sequence[Network] = (),
    ):
        self.allow_private = allow_private
        self.refused_networks = refused_networks
        self.least_rate = least_rate or LeastRate(0, timeout_s)
        self.deadline = time.monotonic() + timeout_s
        self.timeout_s = timeout_s
        self.expired: DownloadError | None = None
        # Referred to weakly, so that a connection that its user has closed is closed, and costs no file descriptor.
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._timer = threading.Timer(timeout_s, self._expire, [self._out_of_time()])
        self._timer.daemon = True

    def __enter__(self) -> "EgressGuard":
        self._timer.start()
        return self

    def __exit__(self, *_exc) -> None:
        self._timer.cancel()
        self._shut_all()

    def _out_of_time(self) -> DownloadError:
        return DownloadError("timeout", f"not finished within {self.timeout_s:.0f} s (download.timeout_s)")

    def _expire(self, reason: DownloadError) -> None:
        with self._lock:
            self.expired = self.expired or reason
        self._shut_all()

    def _shut_all(self) -> None:
        with self._lock:
            open_now = list(self._sockets)
        for sock in open_now:
            _shut(sock)

    def _track(self, sock: socket.socket) -> None:
        """Make the deadline reach this connection, also if it has passed already."""
        with self._lock:
            self._sockets.add(sock)
            expired = self.expired
        if expired:
            _shut(sock)

    def check(self) -> None:
        """Raise DownloadError "timeout" if the deadline has passed, "stalled" if an answer took too long."""
        if self.expired:
            raise self.expired
        if time.monotonic() >= self.deadline:
            raise self._out_of_time()

    @contextlib.contextmanager
    def answer_within(self, limit_s: float) -> Iterator[None]:
        """End the download if the block, which waits for the headers of an answer, takes longer.

        A server that sends a byte of a header now and then never runs into the limit of a single read.
        """
        reason = DownloadError("stalled", f"no complete answer within {limit_s:.0f} s (download.answer_timeout_s)")
        timer = threading.Timer(limit_s, self._expire, [reason])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def connect(self, host: str, port: int, timeout: float | None, options=(), allow_private: bool | None = None):
        """Return a connected TCP socket.

        Raises DownloadError for a refused address, OSError for a failed connection.
        """
        self.check()
        allowed = self.allow_private if allow_private is None else allow_private
        error: OSError | None = None
        for family, kind, protocol, _name, address in resolve(host, port, allowed, self.refused_networks):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(timeout)
                for option in options or ():
                    sock.setsockopt(*option)
                sock.connect(address)
                self._track(sock)
                return sock
            except OSError as failure:
                sock.close()
                error = failure
        assert error is not None  # getaddrinfo never returns an empty list
        raise error

    @contextlib.contextmanager
    def handshake(self, sock: socket.socket) -> Iterator[None]:
        """Let the deadline reach a connection during its TLS handshake, which takes the descriptor from the socket."""
        with sock.dup() as handle:
            self._track(handle)
            yield

    def mount(self, session) -> None:
        """Make every adapter of a requests session connect through this guard.

        The address of a proxy itself is not checked: it comes from the user's settings.
        """
        for adapter in session.adapters.values():
            adapter.poolmanager.pool_classes_by_scheme = _pool_classes(self, self.allow_private)
            original = adapter.proxy_manager_for

            def proxied(proxy, _original=original, **kwargs):
                manager = _original(proxy, **kwargs)
                if not proxy.lower().startswith("socks"):
                    manager.pool_classes_by_scheme = _pool_classes(self, True)
                return manager

            adapter.proxy_manager_for = proxied


def _shut(sock: socket.socket) -> None:
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # a TLS socket's own method would change it under its reader
    except OSError:  # closed already
        return


class _Answer(http.client.HTTPResponse):
    """A response after any number of interim ones (1xx): http.client skips 100 only and takes 103 for the answer."""

    MAX_INTERIM = 100

    def begin(self) -> None:
        for _ in range(self.MAX_INTERIM):
            super().begin()
            if not (100 <= self.status < 200 and self.status != 101):
                return
            self.headers = self.msg = None  # as before `begin`
        raise http.client.HTTPException(f"more than {self.MAX_INTERIM} interim answers")


def _pool_classes(guard: EgressGuard, allow_private: bool) -> dict:
    """Return urllib3 connection pool classes by scheme, which connect through the guard."""
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

    def new_connection(self):
        try:
            return guard.connect(self._dns_host, self.port, self.timeout, self.socket_options, allow_private)
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"connecting to {self.host} timed out") from error
        except OSError as error:
            raise NewConnectionError(self, f"{self.host}: {error}") from error

    class Secure(HTTPSConnection):
        response_class = _Answer
        handshakes = contextlib.ExitStack()

        def _new_conn(self):
            sock = new_connection(self)
            self.handshakes = contextlib.ExitStack()
            self.handshakes.enter_context(guard.handshake(sock))
            return sock

        def connect(self):
            try:
                super().connect()
                guard._track(getattr(self.sock, "socket", self.sock))  # TLS inside TLS wraps a socket
            finally:
                self.handshakes.close()

    plain = type("GuardedHTTPConnection", (HTTPConnection,), {"_new_conn": new_connection, "response_class": _Answer})
    return {
        "http": type("GuardedHTTPPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("GuardedHTTPSPool", (HTTPSConnectionPool,), {"ConnectionCls": Secure}),
    }
