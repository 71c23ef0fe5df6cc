"""Which addresses a download may connect to, and for how long.

A URL in a list, a redirect or a subtitle link must not make this machine talk to itself, to its neighbours or to a
cloud's metadata service. A `Gate` resolves a name once, refuses the name when any of its addresses is not a public
one, and connects to exactly the addresses it checked, so that a second look-up cannot smuggle in another. The gate
also ends every connection of its download at a deadline, whatever state it is in.

Covered: everything that goes through `requests` or yt-dlp's request director, every redirect hop of it included. Not
covered: what a proxy connects to (a target is checked by name before it is handed over, where it resolves here at all)
and object stores, whose address comes from the user's own configuration.
"""

import ipaddress
import socket
import threading
import time

from pipeline.stages.download.errors import DownloadError

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, looking into IPv4 addresses wrapped in IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return ip.is_global and not (ip.is_multicast or ip.is_reserved)
    inner = _embedded_v4(ip)
    if inner is not None:
        return is_public(str(inner))
    return ip in _GLOBAL_V6 and ip.is_global


def _embedded_v4(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address a mapped, compatible, NAT64 or 6to4 address stands for (Teredo is not global anyway)."""
    if ip.ipv4_mapped or ip.sixtofour:
        return ip.ipv4_mapped or ip.sixtofour
    if ip in _NAT64 or (ip in _COMPATIBLE and int(ip) > 1):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return None


def resolve(host: str, port: int | None, allow_private: bool) -> list[tuple]:
    """getaddrinfo's entries of a host. Raises DownloadError: unknown-host, private-address."""
    try:
        entries = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        no_answer = getattr(error, "errno", None) == socket.EAI_AGAIN
        raise DownloadError("unknown-host", f"{host}: {error}", transient=no_answer) from error
    refused = [] if allow_private else sorted({entry[4][0] for entry in entries if not is_public(entry[4][0])})
    if refused:
        raise DownloadError(
            "private-address",
            f"{host} is {', '.join(refused)}, not a public address (download.allow_private_addresses allows it)",
        )
    return entries


class Gate:
    """All connections of one download: to checked addresses only, none of them open after `timeout_s`.

    Use as a context manager. Safe to use from several threads.
    """

    def __init__(self, allow_private: bool, timeout_s: float):
        self.allow_private = allow_private
        self.deadline = time.monotonic() + timeout_s
        self.timeout_s = timeout_s
        self.expired = False
        self._handles: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(timeout_s, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> "Gate":
        self._timer.start()
        return self

    def __exit__(self, *_exc) -> None:
        self._timer.cancel()
        with self._lock:
            for handle in self._handles:
                handle.close()
            self._handles.clear()

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            for handle in self._handles:
                _shut(handle)

    def check(self) -> None:
        """Raises DownloadError "timeout" once the deadline has passed."""
        if self.expired or time.monotonic() >= self.deadline:
            raise DownloadError("timeout", f"not done within {self.timeout_s:.0f} s")

    def connect(self, host: str, port: int, timeout: float | None, options=(), allow_private: bool | None = None):
        """A connected TCP socket. Raises DownloadError for the address, OSError for the connection."""
        self.check()
        allowed = self.allow_private if allow_private is None else allow_private
        error: OSError | None = None
        for family, kind, protocol, _name, address in resolve(host, port, allowed):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(timeout)
                for option in options or ():
                    sock.setsockopt(*option)
                sock.connect(address)
                self._watch(sock)
                return sock
            except OSError as failure:
                sock.close()
                error = failure
        assert error is not None  # getaddrinfo never gives an empty list
        raise error

    def _watch(self, sock: socket.socket) -> None:
        """Keep a second handle on the connection: TLS detaches the first, and the deadline must reach it anyway."""
        handle = sock.dup()
        with self._lock:
            self._handles.append(handle)
            if self.expired:
                _shut(handle)

    def mount(self, session) -> None:
        """Make every adapter of a requests session connect through this gate, to proxies too (these unchecked)."""
        for adapter in session.adapters.values():
            adapter.poolmanager.pool_classes_by_scheme = _pool_classes(self, self.allow_private)
            original = adapter.proxy_manager_for

            def proxied(proxy, _original=original, **kwargs):
                manager = _original(proxy, **kwargs)
                if not proxy.lower().startswith("socks"):
                    manager.pool_classes_by_scheme = _pool_classes(self, True)
                return manager

            adapter.proxy_manager_for = proxied


def _shut(handle: socket.socket) -> None:
    try:
        handle.shutdown(socket.SHUT_RDWR)
    except OSError:  # already closed by the other side: nothing left to end
        return


def _pool_classes(gate: Gate, allow_private: bool) -> dict:
    """urllib3 connection pools whose connections are the gate's."""
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

    def connect(self):
        try:
            return gate.connect(self._dns_host, self.port, self.timeout, self.socket_options, allow_private)
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"connecting to {self.host} timed out") from error
        except OSError as error:
            raise NewConnectionError(self, f"{self.host}: {error}") from error

    plain = type("GatedHTTPConnection", (HTTPConnection,), {"_new_conn": connect})
    secure = type("GatedHTTPSConnection", (HTTPSConnection,), {"_new_conn": connect})
    return {
        "http": type("GatedHTTPPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("GatedHTTPSPool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }
