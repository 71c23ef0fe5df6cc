"""Egress guard: the addresses that a download may connect to, and its deadline.

Input is untrusted: a URL in a list, a redirect or a subtitle link must not make this machine connect to itself, to its
local network or to a cloud's metadata service. An `EgressGuard` resolves a name once, refuses it if any of its
addresses is not public, and connects only to the addresses it checked, so that a second look-up cannot return another
one (DNS rebinding). At the deadline it ends every connection of its download.

Covered: all requests made through `requests` or yt-dlp's request director, including every redirect. Not covered: the
connections of a proxy (the target is checked by name first, if it resolves here) and object stores, whose address comes
from the user's own configuration.
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
    """Return True for an address of the public internet.

    An IPv6 address that embeds an IPv4 address is judged as that IPv4 address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:  # Teredo addresses embed one too, but are not global anyway
        embedded = ip.ipv4_mapped or ip.sixtofour
        if embedded is None and (ip in _NAT64 or (ip in _COMPATIBLE and int(ip) > 1)):
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is None:
            return ip in _GLOBAL_V6 and ip.is_global
        ip = embedded
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def resolve(host: str, port: int | None, allow_private: bool) -> list[tuple]:
    """Return getaddrinfo's entries for a host. Raises DownloadError: unknown-host, private-address."""
    try:
        entries = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        no_answer = getattr(error, "errno", None) == socket.EAI_AGAIN
        raise DownloadError("unknown-host", f"cannot resolve host {host}: {error}", transient=no_answer) from error
    refused = [] if allow_private else sorted({entry[4][0] for entry in entries if not is_public(entry[4][0])})
    if refused:
        raise DownloadError(
            "private-address",
            f"{host} resolves to {', '.join(refused)}, which is not a public address; "
            "set download.allow_private_addresses: true if it is meant",
        )
    return entries


class EgressGuard:
    """Connections of one download: to checked addresses only, and none stays open after `timeout_s`.

    A context manager, safe to use from several threads.
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

    def __enter__(self) -> "EgressGuard":
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
        """Raise DownloadError "timeout" if the deadline has passed."""
        if self.expired or time.monotonic() >= self.deadline:
            raise DownloadError("timeout", f"not finished within {self.timeout_s:.0f} s (download.timeout_s)")

    def connect(self, host: str, port: int, timeout: float | None, options=(), allow_private: bool | None = None):
        """Return a connected TCP socket.

        Raises DownloadError for a refused address, OSError for a failed connection.
        """
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
                handle = sock.dup()  # TLS detaches the socket, and the deadline must still reach the connection
                with self._lock:
                    self._handles.append(handle)
                    if self.expired:
                        _shut(handle)
                return sock
            except OSError as failure:
                sock.close()
                error = failure
        assert error is not None  # getaddrinfo never returns an empty list
        raise error

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


def _shut(handle: socket.socket) -> None:
    try:
        handle.shutdown(socket.SHUT_RDWR)
    except OSError:  # already closed by the other side
        return


def _pool_classes(guard: EgressGuard, allow_private: bool) -> dict:
    """Return urllib3 connection pool classes by scheme, which connect through the guard."""
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

    def connect(self):
        try:
            return guard.connect(self._dns_host, self.port, self.timeout, self.socket_options, allow_private)
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"connecting to {self.host} timed out") from error
        except OSError as error:
            raise NewConnectionError(self, f"{self.host}: {error}") from error

    plain = type("GuardedHTTPConnection", (HTTPConnection,), {"_new_conn": connect})
    secure = type("GuardedHTTPSConnection", (HTTPSConnection,), {"_new_conn": connect})
    return {
        "http": type("GuardedHTTPPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("GuardedHTTPSPool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }
