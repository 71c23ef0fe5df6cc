"""Sources that wait for the turn of their host, in the driver: a source takes no place before it can be downloaded.

Which host may be asked how often is known to the `HostRateLimiter`, which all processes of a cluster share. This queue
knows which sources to ask for, and when: of each host the first one, once the time is over that the limiter named.
"""

import heapq
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable

from pipeline.engine.pools import InFlightTask


class HostQueue:
    """Tasks of one item each, by host in order of arrival. Times are seconds of `clock`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._hosts: OrderedDict[str, deque[InFlightTask]] = OrderedDict()  # the host that was longest not asked first
        self._ask_at: dict[str, float] = {}  # host → when to ask again
        self._later: list[tuple[float, int, InFlightTask]] = []  # heap of tasks that wait for a time of their own
        self._order = 0
        self._units: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._units.total()

    def add(self, flight: InFlightTask, wait_s: float = 0.0) -> None:
        """Add a task, which is not asked for within the next `wait_s` seconds."""
        self._units[flight.task.unit] += 1
        if wait_s > 0:
            self._order += 1
            heapq.heappush(self._later, (self._clock() + wait_s, self._order, flight))
        else:
            self._hosts.setdefault(flight.host, deque()).append(flight)

    def ask_now(self, host: str) -> None:
        """Ask for this host again at once: a download from it has ended."""
        self._ask_at.pop(host, None)

    def due(self, limit: int) -> list[InFlightTask]:
        """Return the first task of each host that may be asked now, at most `limit`."""
        now = self._clock()
        while self._later and self._later[0][0] <= now:
            flight = heapq.heappop(self._later)[-1]
            self._hosts.setdefault(flight.host, deque()).append(flight)
        hosts = [host for host in self._hosts if self._ask_at.get(host, now) <= now]
        for host in hosts[:limit]:
            self._hosts.move_to_end(host)
        return [self._hosts[host][0] for host in hosts[:limit]]

    def wait(self, flight: InFlightTask, wait_s: float) -> None:
        """Leave a task that was due where it is, and its host alone for `wait_s` seconds."""
        self._ask_at[flight.host] = self._clock() + wait_s

    def remove(self, flight: InFlightTask) -> None:
        """Remove a task that was due."""
        tasks = self._hosts[flight.host]
        assert tasks.popleft() is flight
        self._units[flight.task.unit] -= 1
        if not tasks:
            del self._hosts[flight.host]
            self._ask_at.pop(flight.host, None)

    def next_in_s(self) -> float:
        """Return the seconds until a task is due, infinity if there is none."""
        now = self._clock()
        times = [self._ask_at.get(host, now) for host in self._hosts] + [entry[0] for entry in self._later[:1]]
        return max(0.0, min(times, default=float("inf")) - now)
