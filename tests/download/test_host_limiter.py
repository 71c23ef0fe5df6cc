"""The host rate limiter: cap per host, order of arrival, delays, pauses after lockouts, leases of dead processes."""

import threading

import pytest

from clipmill.base.errors import ItemError
from pipeline.stages.download.host_limiter import GRACE_S, LOCKED_OUT, HostRateLimiter, hold, host_of


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_limiter(**options) -> tuple[HostRateLimiter, Clock]:
    clock = Clock()
    return HostRateLimiter(**{"poll_s": 0.1, **options}, clock=clock), clock


def test_no_more_holders_than_the_cap_and_each_host_has_its_own():
    limiter, _ = make_limiter(per_host=2)
    assert [limiter.acquire("a", holder) > 0 for holder in "xyz"] == [False, False, True]
    assert limiter.acquire("b", "x") == 0.0
    limiter.release("a", "x")
    assert limiter.acquire("a", "z") == 0.0
    assert limiter.state()["a"]["num_active"] == 2


def test_waiters_are_served_in_order_of_arrival():
    limiter, _ = make_limiter(per_host=1)
    assert limiter.acquire("a", "first") == 0.0
    assert limiter.acquire("a", "second") > 0 and limiter.acquire("a", "third") > 0
    limiter.release("a", "first")
    assert limiter.acquire("a", "third") > 0, "the second asked earlier"
    assert limiter.acquire("a", "second") == 0.0


def test_a_waiter_that_stops_asking_loses_its_place():
    limiter, clock = make_limiter(per_host=1, lease_s=60)
    limiter.acquire("a", "first"), limiter.acquire("a", "dead"), limiter.acquire("a", "third")
    limiter.release("a", "first")
    clock.now += GRACE_S + 1
    assert limiter.acquire("a", "third") == 0.0


def test_starts_keep_their_distance():
    limiter, clock = make_limiter(per_host=4, min_interval_s=2.0)
    assert limiter.acquire("a", "x") == 0.0
    assert limiter.acquire("a", "y") == 2.0
    clock.now += 1.5
    assert limiter.acquire("a", "y") == 0.5
    clock.now += 0.5
    assert limiter.acquire("a", "z") > 0, "y is first in the queue"
    assert limiter.acquire("a", "y") == 0.0


def test_a_dead_holder_loses_its_lease_and_a_living_one_keeps_it():
    limiter, clock = make_limiter(per_host=2, lease_s=60)
    limiter.acquire("a", "dead"), limiter.acquire("a", "alive")
    clock.now += 50
    assert limiter.renew("a", "alive")
    clock.now += 20
    assert limiter.acquire("a", "next") == 0.0
    assert not limiter.renew("a", "dead")
    assert limiter.state()["a"]["num_active"] == 2
    limiter.release("a", "dead")
    assert limiter.state()["a"]["num_active"] == 2, "a late release frees no other lease"


def test_a_lockout_pauses_the_whole_queue_and_lets_one_try_first():
    limiter, clock = make_limiter(per_host=2)
    limiter.acquire("a", "x")
    limiter.release("a", "x", penalty_s=30)
    assert 0 < limiter.acquire("a", "x") <= 30 and 0 < limiter.acquire("a", "y") <= 30
    assert limiter.acquire("b", "x") == 0.0, "other hosts are not affected"
    clock.now += 30
    assert limiter.acquire("a", "x") == 0.0
    assert limiter.acquire("a", "y") > 0, "one tries, the others wait for its result"
    limiter.release("a", "x")
    assert limiter.acquire("a", "y") == 0.0 and limiter.acquire("a", "z") == 0.0


def test_strikes_in_a_row_double_the_pause_up_to_the_limit():
    limiter, clock = make_limiter(per_host=1, max_cooldown_s=100)
    pauses = []
    for _ in range(4):
        assert limiter.acquire("a", "x") == 0.0
        limiter.release("a", "x", penalty_s=20)
        pauses.append(limiter.state()["a"]["cooldown_s"])
        clock.now += pauses[-1]
    assert pauses == [20, 40, 80, 100]
    limiter.acquire("a", "x")
    limiter.release("a", "x")
    limiter.acquire("a", "x")
    limiter.release("a", "x", penalty_s=20)
    assert limiter.state()["a"]["cooldown_s"] == 20, "a success forgives"


def test_one_lockout_met_by_several_downloads_is_one_strike():
    limiter, _ = make_limiter(per_host=4)
    for holder in "wxyz":
        limiter.acquire("a", holder)
    for holder in "wxyz":
        limiter.release("a", holder, penalty_s=10)
    assert limiter.state()["a"] == {"num_active": 0, "num_waiting": 0, "num_strikes": 1, "cooldown_s": 10}


def test_a_download_that_began_before_the_lockout_does_not_forgive_it():
    limiter, clock = make_limiter(per_host=2)
    limiter.acquire("a", "x"), limiter.acquire("a", "y")
    clock.now += 1
    limiter.release("a", "x", penalty_s=10)
    limiter.release("a", "y")
    assert limiter.state()["a"]["num_strikes"] == 1


def test_a_host_locked_for_too_long_is_not_waited_for():
    limiter, clock = make_limiter(per_host=1, patience_s=100, max_cooldown_s=60)
    for _ in range(3):
        assert limiter.acquire("a", "x") == 0.0
        limiter.release("a", "x", penalty_s=60)
        clock.now += 60
    assert limiter.acquire("a", "x") == 0.0
    limiter.release("a", "x", penalty_s=60)
    assert limiter.acquire("a", "y") == LOCKED_OUT
    with pytest.raises(ItemError, match="rate-limited"), hold(limiter, "a", "z"):
        raise AssertionError("not reached")
    clock.now += 60
    assert limiter.acquire("a", "y") == 0.0, "after the pause one may try again"


def test_threads_never_exceed_the_cap_and_all_get_through():
    limiter = HostRateLimiter(per_host=3, poll_s=0.005)
    lock, active, most, done = threading.Lock(), [0], [0], []
    together = threading.Barrier(3)  # the maximum number at once does not depend on the machine's speed

    def work(i: int) -> None:
        for round_ in range(3):
            with hold(limiter, "host", f"{i}-{round_}"):
                with lock:
                    active[0] += 1
                    most[0] = max(most[0], active[0])
                if round_ == 0:
                    together.wait()
                with lock:
                    active[0] -= 1
        done.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(12)) and most[0] == 3
    assert limiter.state()["host"]["num_active"] == 0 and limiter.state()["host"]["num_waiting"] == 0


def test_a_long_download_keeps_its_lease():
    class Renewed(HostRateLimiter):
        renewals = threading.Semaphore(0)

        def renew_every_s(self) -> float:
            return 0.001

        def renew(self, host: str, holder: str) -> bool:
            kept = super().renew(host, holder)
            self.renewals.release()
            return kept

    clock = Clock()
    limiter = Renewed(per_host=1, lease_s=60, clock=clock)
    with hold(limiter, "a", "long"):
        for _ in range(4):
            clock.now += 50
            while limiter.renewals.acquire(blocking=False):
                pass
            for _ in range(2):  # the first may have begun before
                limiter.renewals.acquire()
            assert limiter.acquire("a", "other") > 0
    assert HostRateLimiter(lease_s=60).renew_every_s() <= 30, "one renewal may fail"


def test_a_failure_gives_the_host_back():
    limiter, _ = make_limiter(per_host=1)
    with pytest.raises(ZeroDivisionError), hold(limiter, "a", "x") as slot:
        slot.penalty_s = 5
        1 / 0  # noqa: B018
    assert limiter.state()["a"]["num_active"] == 0 and limiter.state()["a"]["cooldown_s"] == 5


def test_a_remote_limiter_is_called_through_its_handle(monkeypatch):
    """The handle of a Ray actor has methods with `.remote`, whose results come from `ray.get`."""
    import ray

    class Method:
        def __init__(self, function):
            self.function = function

        def remote(self, *arguments):
            return self.function, arguments

    class Handle:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return Method(getattr(self.inner, name))

    monkeypatch.setattr(ray, "get", lambda call: call[0](*call[1]))
    inner = HostRateLimiter(per_host=1)
    with hold(Handle(inner), "a", "x"):
        assert inner.state()["a"]["num_active"] == 1
    assert inner.state()["a"]["num_active"] == 0


def test_what_counts_as_one_host():
    assert host_of("https://www.Example.com:8080/a") == host_of("http://example.com/b") == "example.com"
    assert host_of("s3://bucket/key") == "s3:bucket"
