"""Start Ray on this machine, or join the cluster that a setting or RAY_ADDRESS names."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from clipmill.base.errors import UserError

JOIN_ATTEMPTS = 4
JOIN_PAUSE_S = 3.0


def start_ray(
    address: str | None = None, cpus: int | None = None, *, setting: str = "", show_output: bool = False
) -> bool:
    """Connect this process to Ray; return whether it was not connected before, so that the caller must disconnect it.

    Args:
        address: cluster to join ("auto", "ray://HOST:PORT"); None: the one in RAY_ADDRESS, else start Ray here
        cpus: CPUs that Ray may use when it starts here; None: all
        setting: name of the setting that gave the address, for the error message
        show_output: print the workers' output here

    Raises:
        UserError: the cluster does not answer. The first node asked may just have died, so joining is tried again.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send usage statistics to its makers
    import ray

    if ray.is_initialized():
        return False
    options = {"logging_level": "ERROR", "log_to_driver": show_output, "ignore_reinit_error": True}
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        ray.init(num_cpus=cpus, include_dashboard=False, **options)
        return True
    for attempt in range(1, JOIN_ATTEMPTS + 1):
        try:
            ray.init(address=address, **options)
            return True
        except ConnectionError as error:
            if attempt == JOIN_ATTEMPTS:
                names = f"{setting} or RAY_ADDRESS" if setting else "RAY_ADDRESS"
                raise UserError(f"{names}: the Ray cluster at {address} cannot be joined ({error}).") from error
            time.sleep(JOIN_PAUSE_S)
    raise AssertionError("unreachable")


@contextmanager
def ray_cluster(
    address: str | None = None, cpus: int | None = None, *, setting: str = "", show_output: bool = False
) -> Iterator[None]:
    """Hold a connection to Ray for the block; see `start_ray`. A connection that was there before stays."""
    started = start_ray(address, cpus, setting=setting, show_output=show_output)
    try:
        yield
    finally:
        if started:
            import ray

            ray.shutdown()
