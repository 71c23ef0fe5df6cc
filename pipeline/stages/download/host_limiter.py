"""Per-host download limiter: concurrency cap, delay between starts, cool-down after HTTP 429.

`HostRateLimiter` is a plain object: the threads of one process use it directly, a cluster uses it as a named Ray actor.
In a build the driver asks for the turn of a source before it starts the download, which then has its lease already, so
that waiting costs neither a process nor a thread. A download calls `acquire(host, client)` until it returns 0, keeps
its lease alive with `renew` and returns it with `release`; a client that dies stops renewing and loses its lease.
Waiters are served in order of arrival. After a lockout (a release with a penalty) no download gets the host until the
cool-down is over; then a single client tries, and the others follow only when it has succeeded. For a host that stays
locked for `patience_s`, `acquire` returns `LOCKED_OUT` at once.
"""

import contextlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pipeline.stages.download.errors import DownloadError

LOCKED_OUT = -1.0  # returned by `acquire` for a host locked for too long
GRACE_S = 5.0  # a waiter this late counts as dead


@dataclass
class _Host:
    leases: dict[str, tuple[float, float]] = field(default_factory=dict)  # client → (renewed at, granted at)
    waiting: OrderedDict[str, float] = field(default_factory=OrderedDict)  # client → due to call again, as they arrived
    started_at: float = float("-inf")
    open_at: float = float("-inf")  # end of the cool-down
    locked_since: float | None = None  # first strike without a success since
    struck_at: float = float("-inf")
    strikes: int = 0


class HostRateLimiter:
    """Leases on hosts for downloads. Times are seconds of `clock`. Safe to call from several threads."""

    def __init__(
        self,
        per_host: int = 4,
        min_interval_s: float = 0.0,
        lease_s: float = 60.0,
        max_cooldown_s: float = 3600.0,
        patience_s: float = 7200.0,
        poll_s: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
    ):
        assert per_host >= 1 and lease_s > poll_s
        self.per_host = per_host
        self.min_interval_s = min_interval_s
        self.lease_s = lease_s
        self.max_cooldown_s = max_cooldown_s
        self.patience_s = patience_s
        self.poll_s = poll_s
        self._clock = clock
        self._hosts: dict[str, _Host] = {}
        self._lock = threading.Lock()

    def acquire(self, host: str, client: str) -> float:
        """Return 0.0 if the lease is granted, else the seconds after which to call again, or LOCKED_OUT.

        A waiter that calls again more than GRACE_S late loses its position in the queue.
        """
        with self._lock:
            now, state = self._clock(), self._hosts.setdefault(host, _Host())
            self._expire(state, now)
            if client in state.leases:
                return 0.0
            if state.locked_since is not None and now < state.open_at and now - state.locked_since >= self.patience_s:
                state.waiting.pop(client, None)
                return LOCKED_OUT
            state.waiting.setdefault(client, now)
            wait = self._wait(state, client, now)
            if wait > 0:
                state.waiting[client] = now + wait
                return wait
            del state.waiting[client]
            state.leases[client] = (now, now)
            state.started_at = now
            return 0.0

    def acquire_all(self, wanted: Sequence[tuple[str, str]]) -> list[float]:
        """Call `acquire` for each (host, client)."""
        return [self.acquire(host, client) for host, client in wanted]

    def renew(self, host: str, client: str) -> bool:
        """Keep a lease alive; return False if it has expired already."""
        with self._lock:
            now, state = self._clock(), self._hosts.setdefault(host, _Host())
            self._expire(state, now)
            if client not in state.leases:
                return False
            state.leases[client] = (now, state.leases[client][1])
            return True

    def renew_every_s(self) -> float:
        return self.lease_s / 3

    def release(self, host: str, client: str, penalty_s: float = 0.0) -> None:
        """Return a lease. A penalty starts a cool-down of `penalty_s`, doubled with every strike in a row."""
        with self._lock:
            now, state = self._clock(), self._hosts.setdefault(host, _Host())
            _renewed, granted_at = state.leases.pop(client, (now, float("-inf")))
            state.waiting.pop(client, None)
            if penalty_s > 0:
                self._strike(state, now, granted_at, penalty_s)
            elif granted_at > state.struck_at:  # a success that began after the last strike: the host serves again
                state.strikes, state.locked_since = 0, None

    def state(self) -> dict[str, dict]:
        """Return num_active, num_waiting, num_strikes and the remaining cooldown_s by host."""
        with self._lock:
            now = self._clock()
            return {
                name: {
                    "num_active": len(state.leases),
                    "num_waiting": len(state.waiting),
                    "num_strikes": state.strikes,
                    "cooldown_s": max(0.0, state.open_at - now),
                }
                for name, state in sorted(self._hosts.items())
            }

    def _expire(self, state: _Host, now: float) -> None:
        """Drop the leases and waiting entries of clients that died."""
        for client in [name for name, (renewed, _) in state.leases.items() if now - renewed > self.lease_s]:
            del state.leases[client]
        for client in [name for name, due in state.waiting.items() if now - due > GRACE_S]:
            del state.waiting[client]

    def _wait(self, state: _Host, client: str, now: float) -> float:
        """Return the seconds until `client` should call again, 0.0 if it is its turn now."""
        if now < state.open_at:
            return min(state.open_at - now, self.lease_s / 2)
        cap = 1 if state.strikes else self.per_host
        position = list(state.waiting).index(client)
        if position >= cap - len(state.leases):
            return self.poll_s
        opens = state.started_at + self.min_interval_s
        if now < opens:
            return min(opens - now, self.lease_s / 2)
        return self.poll_s if position and self.min_interval_s else 0.0

    def _strike(self, state: _Host, now: float, granted_at: float, penalty_s: float) -> None:
        if granted_at <= state.struck_at:  # several downloads that meet the same lockout count as one strike
            state.open_at = max(state.open_at, now + min(penalty_s, self.max_cooldown_s))
            return
        cooldown_s = min(penalty_s * 2**state.strikes, self.max_cooldown_s)
        state.open_at = max(state.open_at, now + cooldown_s)
        state.strikes += 1
        state.struck_at = now
        if state.locked_since is None:
            state.locked_since = now


def host_of(url: str) -> str:
    """Return the name under which a URL is rate-limited.

    It is the host without "www.", or SCHEME:BUCKET for an object store.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").removeprefix("www.")
    return host if parts.scheme.lower() in ("http", "https") else f"{parts.scheme.lower()}:{host}"


@dataclass
class Slot:
    """A lease on a host. Set `penalty_s` when the host refused the download."""

    penalty_s: float = 0.0


class HostBusy(Exception):
    """The turn of a download does not come soon. `wait_s`: seconds after which to ask again."""

    def __init__(self, wait_s: float):
        super().__init__(f"not before {wait_s:.1f} s from now")
        self.wait_s = wait_s


def locked_out(host: str) -> DownloadError:
    """Return the error of a download whose host stayed locked."""
    message = f"{host} has refused downloads for longer than download.lockout_patience_s; a later build retries"
    return DownloadError("rate-limited", message)


@contextlib.contextmanager
def hold(limiter, host: str, client: str, longest_wait_s: float = math.inf) -> Iterator[Slot]:
    """Wait for a lease on the host, renew it while the block runs, then return it.

    `limiter` is a HostRateLimiter or a Ray actor of one. Raises DownloadError "rate-limited" when the host has been
    locked for longer than the limiter's patience, HostBusy when the turn does not come within `longest_wait_s`.
    """
    waited_s = 0.0
    while wait_s := _call(limiter, "acquire", host, client):
        if wait_s == LOCKED_OUT:
            raise locked_out(host)
        waited_s += wait_s
        if waited_s > longest_wait_s:
            raise HostBusy(wait_s)
        time.sleep(wait_s)
    slot, done = Slot(), threading.Event()

    def keep_alive() -> None:
        while not done.wait(_call(limiter, "renew_every_s")):
            _call(limiter, "renew", host, client)

    keeper = threading.Thread(target=keep_alive, daemon=True)
    keeper.start()
    try:
        yield slot
    finally:
        done.set()
        keeper.join()
        _call(limiter, "release", host, client, slot.penalty_s)


def _call(limiter, method: str, *arguments):
    function = getattr(limiter, method)
    if not hasattr(function, "remote"):
        return function(*arguments)
    import ray

    return ray.get(function.remote(*arguments))
