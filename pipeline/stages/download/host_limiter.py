"""How hard a host is asked: a cap of downloads at once, a pause between starts, a queue that stops when it says so.

`HostGovernor` is a plain object: used by the threads of one process as it is, or by a whole cluster as a Ray named
actor. Who wants to download asks `acquire(host, holder)` until it answers 0, keeps its lease alive with `renew` and
gives it back with `release`; a holder that dies stops renewing and loses its lease. Waiters are served in order of
arrival. After a lockout (a release with a penalty) nobody gets the host until the cool-down is over; then one holder
tries, and only when it succeeds do the others follow. A host that stays locked for `patience_s` answers `LOCKED_OUT`
at once.
"""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pipeline.stages.download.errors import DownloadError

LOCKED_OUT = -1.0  # acquire's answer when waiting is not worth it
GRACE_S = 5.0  # a waiter this late is taken for dead


@dataclass
class _Host:
    leases: dict[str, tuple[float, float]] = field(default_factory=dict)  # holder → (renewed at, granted at)
    waiting: OrderedDict[str, float] = field(default_factory=OrderedDict)  # holder → asks again by, in order of arrival
    started_at: float = float("-inf")
    open_at: float = float("-inf")  # end of the cool-down
    locked_since: float | None = None  # first strike without a success since
    struck_at: float = float("-inf")
    strikes: int = 0


class HostGovernor:
    """Times are seconds of `clock`. Safe to call from several threads."""

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

    def acquire(self, host: str, holder: str) -> float:
        """0.0: granted. Positive: ask again after so many seconds. LOCKED_OUT: do not wait.

        A waiter that does not ask again when it was told to loses its place.
        """
        with self._lock:
            now, state = self._clock(), self._hosts.setdefault(host, _Host())
            self._expire(state, now)
            if holder in state.leases:
                return 0.0
            if self._gave_up(state, now):
                state.waiting.pop(holder, None)
                return LOCKED_OUT
            state.waiting.setdefault(holder, now)
            wait = self._wait(state, holder, now)
            if wait > 0:
                state.waiting[holder] = now + wait
                return wait
            del state.waiting[holder]
            state.leases[holder] = (now, now)
            state.started_at = now
            return 0.0

    def renew(self, host: str, holder: str) -> bool:
        """Keep a lease alive; False when it is lost already."""
        with self._lock:
            now, state = self._clock(), self._hosts.setdefault(host, _Host())
            self._expire(state, now)
            if holder not in state.leases:
                return False
            state.leases[holder] = (now, state.leases[holder][1])
            return True

    def renew_every_s(self) -> float:
        return self.lease_s / 3

    def release(self, host: str, holder: str, penalty_s: float = 0.0) -> None:
        """Give the host back. A penalty starts a cool-down: as long as it says, doubled with every strike in a row."""
        with self._lock:
            now, state = self._clock(), self._hosts.setdefault(host, _Host())
            _renewed, granted_at = state.leases.pop(holder, (now, float("-inf")))
            state.waiting.pop(holder, None)
            if penalty_s > 0:
                self._strike(state, now, granted_at, penalty_s)
            elif granted_at > state.struck_at:  # a success that began after the last strike: the host serves again
                state.strikes, state.locked_since = 0, None

    def state(self) -> dict[str, dict]:
        """Per host: num_active, num_waiting, num_strikes, cooldown_s left."""
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
        for holder in [name for name, (renewed, _) in state.leases.items() if now - renewed > self.lease_s]:
            del state.leases[holder]
        for holder in [name for name, due in state.waiting.items() if now - due > GRACE_S]:
            del state.waiting[holder]

    def _gave_up(self, state: _Host, now: float) -> bool:
        return state.locked_since is not None and now < state.open_at and now - state.locked_since >= self.patience_s

    def _wait(self, state: _Host, holder: str, now: float) -> float:
        if now < state.open_at:
            return min(state.open_at - now, self.lease_s / 2)
        cap = 1 if state.strikes else self.per_host
        place = list(state.waiting).index(holder)
        if place >= cap - len(state.leases):
            return self.poll_s
        opens = state.started_at + self.min_interval_s
        if now < opens:
            return min(opens - now, self.lease_s / 2)
        return self.poll_s if place and self.min_interval_s else 0.0

    def _strike(self, state: _Host, now: float, granted_at: float, penalty_s: float) -> None:
        if granted_at <= state.struck_at:  # one lockout met by several downloads at once is one strike
            state.open_at = max(state.open_at, now + min(penalty_s, self.max_cooldown_s))
            return
        cooldown_s = min(penalty_s * 2**state.strikes, self.max_cooldown_s)
        state.open_at = max(state.open_at, now + cooldown_s)
        state.strikes += 1
        state.struck_at = now
        if state.locked_since is None:
            state.locked_since = now


def host_of(url: str) -> str:
    """What the governor counts by: the host without "www.", or SCHEME:BUCKET of an object store."""
    parts = urlsplit(url)
    host = (parts.hostname or "").removeprefix("www.")
    return host if parts.scheme.lower() in ("http", "https") else f"{parts.scheme.lower()}:{host}"


@dataclass
class Slot:
    """A held host. Set `penalty_s` when it locked us out."""

    penalty_s: float = 0.0


@contextlib.contextmanager
def hold(governor, host: str, holder: str) -> Iterator[Slot]:
    """Wait for the host, keep it while the block runs, give it back. `governor`: a HostGovernor or a Ray actor of it.

    Raises DownloadError "rate-limited" when the host is locked out for longer than the governor's patience.
    """
    while wait := _call(governor, "acquire", host, holder):
        if wait == LOCKED_OUT:
            raise DownloadError("rate-limited", f"{host} has refused for so long that its queue is not waited for")
        time.sleep(wait)
    slot, done = Slot(), threading.Event()
    keeper = threading.Thread(target=_keep, args=(governor, host, holder, done), daemon=True)
    keeper.start()
    try:
        yield slot
    finally:
        done.set()
        keeper.join()
        _call(governor, "release", host, holder, slot.penalty_s)


def _keep(governor, host: str, holder: str, done: threading.Event) -> None:
    while not done.wait(_call(governor, "renew_every_s")):
        _call(governor, "renew", host, holder)


def _call(governor, method: str, *arguments):
    function = getattr(governor, method)
    if not hasattr(function, "remote"):
        return function(*arguments)
    import ray

    return ray.get(function.remote(*arguments))
