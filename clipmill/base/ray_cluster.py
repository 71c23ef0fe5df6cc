"""Start Ray on this machine, or join the cluster that a setting or RAY_ADDRESS names.

A cluster without token authentication lets everybody who reaches its ports run code on all of its nodes, so it is
joined only if a setting says so. A Ray that starts here has a token.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clipmill.base.errors import UserError

# Ray puts sockets below its temporary folder, and the system limits the path of a socket.
SOCKET = "/ray/session_2026-11-29_16-30-50_123456_1234567/sockets/plasma_store.10"
MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107  # bytes
JOIN_ATTEMPTS = 4
JOIN_PAUSE_S = 3.0
ANSWER_TIMEOUT_S = 10.0  # of one question to a cluster
START_ATTEMPTS = 3
START_TIMEOUT_S = 180.0  # of one attempt; an idle machine needs 5 s
SAY_AFTER_S = 15.0
_HINT = "generate one with `ray get-auth-token --generate`, and start all nodes with RAY_AUTH_MODE=token"


def start_ray(
    address: str | None = None,
    cpus: int | None = None,
    *,
    setting: str = "",
    allow_open: bool = False,
    show_output: bool = False,
) -> bool:
    """Connect this process to Ray; return whether it was not connected before, so that the caller must disconnect it.

    Args:
        address: cluster to join ("auto", "HOST:PORT", "ray://HOST:PORT"); None: the one in RAY_ADDRESS, else, or for
            "local", start Ray here
        cpus: CPUs that Ray may use when it starts here; None: all
        setting: name of the setting that gave the address, for the error message
        allow_open: join a cluster without token authentication, too
        show_output: print the workers' output here

    Raises:
        UserError: Ray does not start; the cluster does not answer, has no token authentication, or wants another
            token. Both are tried again a few times: the first node asked may just have died.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send usage statistics to its makers
    import ray

    if ray.is_initialized():
        return False
    options = {"logging_level": "ERROR", "log_to_driver": show_output, "ignore_reinit_error": True}
    address = address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        require_short_temporary_folder()
        # Without an address Ray would join whatever /tmp/ray/ray_current_cluster names, which may be anybody's.
        _attempts(START_ATTEMPTS, 0, lambda: _init(address="local", num_cpus=cpus, include_dashboard=False, **options),
                  "Ray cannot be started on this machine", _START_ADVICE)  # fmt: skip
        return True
    names = f"{setting} or RAY_ADDRESS" if setting else "RAY_ADDRESS"

    def join() -> None:
        _check_cluster(address, allow_open, names, setting)
        _init(address=address, **options)

    _attempts(JOIN_ATTEMPTS, JOIN_PAUSE_S, join, f"{names}: the Ray cluster at {address} cannot be joined", "")
    return True


_START_ADVICE = "; look for free memory and space in /tmp (or set RAY_TMPDIR), and into /tmp/ray/session_latest/logs"


def _attempts(num_attempts: int, pause_s: float, attempt, failed: str, advice: str) -> None:
    """Call `attempt` until it succeeds. Raises UserError, of one line, after the last failure."""
    import ray

    for number in range(1, num_attempts + 1):
        try:
            with _say_if_slow("Waiting for Ray …"):
                return attempt()
        except UserError:
            raise
        except Exception as error:  # Ray raises RuntimeError, OSError, ConnectionError and plain Exception
            with suppress(Exception):
                ray.shutdown()
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            if number == num_attempts:
                raise UserError(f"{failed} ({first_line}){advice}.") from error
            print(f"clipmill: {failed} ({first_line}); trying again.", file=sys.stderr, flush=True)
            time.sleep(pause_s)


def _init(**options) -> None:
    """Call `ray.init` with a time limit, where the thread allows one. Ctrl-C interrupts it as any Python code."""
    import ray

    if threading.current_thread() is not threading.main_thread():
        ray.init(**options)
        return

    def expire(*_) -> None:
        raise TimeoutError(f"no answer within {START_TIMEOUT_S:.0f} s")

    handler, started = signal.signal(signal.SIGALRM, expire), time.monotonic()
    left_s, every_s = signal.setitimer(signal.ITIMER_REAL, START_TIMEOUT_S)
    try:
        ray.init(**options)
    finally:
        signal.signal(signal.SIGALRM, handler)
        left_s = max(0.001, left_s - (time.monotonic() - started)) if left_s else 0  # of somebody else's timer
        signal.setitimer(signal.ITIMER_REAL, left_s, every_s)


@contextmanager
def _say_if_slow(text: str) -> Iterator[None]:
    timer = threading.Timer(SAY_AFTER_S, lambda: print(f"clipmill: {text}", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_cluster(address: str, allow_open: bool, names: str, setting: str) -> None:
    """Ask a cluster without a token. Raises ConnectionError if it is silent, UserError if it is open to everybody.

    Where it refuses, this process presents the token of its user from now on.
    """
    place = _host_and_port(address)
    if place is None:
        raise UserError(f"{names} = {address}: give auto, HOST:PORT or ray://HOST:PORT; `ray job` alone takes http://.")
    if not _is_refused(place):
        if not allow_open:
            allowed = (
                f"{setting.partition('.')[0]}.allow_open_cluster" if "." in setting else "train.allow_open_cluster"
            )
            raise UserError(
                f"{names}: the Ray cluster at {address} has no token authentication, so everybody who reaches it can "
                f"run code on its nodes: {_HINT}; or set {allowed}=true if nobody else can reach it."
            )
        return
    token = own_token()
    if token is None or _is_refused(place, token):
        problem = "wants another token than this user's" if token else "wants a token, and this user has none"
        raise UserError(
            f"{names}: the Ray cluster at {address} {problem}: save what `ray get-auth-token` prints on its head as "
            "~/.ray/auth_token, or set RAY_AUTH_TOKEN_PATH."
        )
    use_token()


def use_token() -> None:
    """Make this process and its children present the user's token, also if Ray has been imported already."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        os.environ["RAY_AUTH_MODE"] = "token"
        _read_environment_again()


def _read_environment_again() -> None:
    from ray._raylet import Config

    Config.initialize("")


def own_token() -> str | None:
    """Return the token that Ray would present, from the same places in the same order; None if there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    try:
        return Path(path).read_text().strip() or None
    except OSError:
        return None


def _host_and_port(address: str) -> str | None:
    """Return HOST:PORT of a cluster, None for an address of another form. Raises ConnectionError for "auto"."""
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        found = canonicalize_bootstrap_address("auto")
        if not found:
            raise ConnectionError("no cluster runs on this machine")
        return found
    place = address.removeprefix("ray://")
    host, _, port = place.rpartition(":")
    return place if host and port.isdigit() and "/" not in place else None


def _is_refused(place: str, token: str | None = None) -> bool:
    """Return whether a cluster refuses a question with this token, or without one.

    Raises ConnectionError if it does not answer.
    """
    import grpc

    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(f"{place}: {error.strerror or error}") from error
    metadata = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive", None, None)
        try:
            ask(b"", timeout=ANSWER_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return True
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise ConnectionError(f"{place}: {error.details() or error.code()}") from error
    return False


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
    address: str | None = None,
    cpus: int | None = None,
    *,
    setting: str = "",
    allow_open: bool = False,
    show_output: bool = False,
) -> Iterator[None]:
    """Hold a connection to Ray for the block; see `start_ray`. A connection that was there before stays."""
    started = start_ray(address, cpus, setting=setting, allow_open=allow_open, show_output=show_output)
    try:
        yield
    finally:
        if started:
            import ray

            ray.shutdown()
