"""Start Ray on this machine, or join the cluster that a setting or RAY_ADDRESS names."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from clipmill.base.errors import UserError

# Ray puts sockets below its temporary folder, and the system limits the path of a socket.
SOCKET = "/ray/session_2026-11-29_16-30-50_123456_1234567/sockets/plasma_store.10"
MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107  # bytes
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
        require_short_temporary_folder()
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


def require_short_temporary_folder() -> None:
    """Raise UserError if the folder that RAY_TMPDIR or TMPDIR names is too long a path for Ray's sockets."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if folder := os.environ.get(name):
            longest = MAX_SOCKET_PATH - len(SOCKET)
            if len(os.fsencode(os.path.abspath(folder))) > longest:
                raise UserError(
                    f"{name} = {folder}: its path is too long for Ray's sockets. Set RAY_TMPDIR to a folder whose path "
                    f"has at most {longest} bytes."
                )
            return


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
