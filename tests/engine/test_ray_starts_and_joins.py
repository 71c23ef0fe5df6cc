"""Ray starts alone and bounded, and joins only clusters that want a token. Clusters are stand-ins: no Ray runs."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
import ray

from clipmill.base import ray_cluster
from clipmill.base.errors import UserError
from clipmill.base.ray_cluster import start_ray

TOKEN = "0123456789abcdef"


class Calls(list):
    """Stands for `ray.init`: keeps its options, and does what the test says."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    def __call__(self, **options):
        self.append(options)
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome:
            outcome()


@pytest.fixture
def init(monkeypatch, tmp_path):
    """Replace Ray's own start; give the user a home without a token."""
    calls = Calls()
    monkeypatch.setattr(ray, "init", calls)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_cluster, "_read_environment_again", lambda: None)
    monkeypatch.setattr(ray_cluster, "JOIN_PAUSE_S", 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
    return calls


@contextmanager
def cluster(token: str | None):
    """Answer any question of gRPC as a cluster does: to everybody, or only to those who know the token."""

    def answer(_request, context):
        given = dict(context.invocation_metadata()).get("authorization")
        if token and given != f"Bearer {token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    class Handler(grpc.GenericRpcHandler):
        def service(self, _details):
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("address", [None, "local"])
def test_without_an_address_no_other_cluster_is_joined(init, address):
    assert start_ray(address, cpus=2)
    assert [(call["address"], call["num_cpus"]) for call in init] == [("local", 2)]


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_open_cluster_is_joined_only_if_a_setting_says_so(init, form):
    with cluster(None) as place:
        address = form.format(place)
        with pytest.raises(
            UserError, match=r"engine.address .*no token authentication.*engine.allow_open_cluster=true"
        ):
            start_ray(address, setting="engine.address")
        with pytest.raises(UserError, match=r"train.allow_open_cluster=true"):
            start_ray(address, setting="--address")
        os.environ["RAY_ADDRESS"] = address
        with pytest.raises(UserError, match="RAY_ADDRESS: .*no token authentication"):
            start_ray()
        assert init == []
        assert start_ray(address, setting="engine.address", allow_open=True)
    assert [call["address"] for call in init] == [address]


@pytest.mark.parametrize("where", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "home"])
def test_a_cluster_with_a_token_is_joined_with_the_users_token(init, where, tmp_path, monkeypatch):
    def give(token: str) -> None:
        path = tmp_path / (".ray/auth_token" if where == "home" else "token")
        path.parent.mkdir(exist_ok=True)
        path.write_text(token + "\n")
        if where != "home":
            monkeypatch.setenv(where, token if where == "RAY_AUTH_TOKEN" else str(path))

    with cluster(TOKEN) as place:
        with pytest.raises(UserError, match="wants a token, and this user has none: save what `ray get-auth-token`"):
            start_ray(place, setting="engine.address")
        give("another-token")
        with pytest.raises(UserError, match="wants another token"):
            start_ray(place, setting="engine.address", allow_open=True)
        assert init == []
        give(TOKEN)
        assert start_ray(place, setting="engine.address")
    assert len(init) == 1 and os.environ["RAY_AUTH_MODE"] == "token"


def test_a_cluster_that_does_not_answer_is_one_line(init, capfd):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"the Ray cluster at {place} cannot be joined \(.*refused\)\.$"):
            start_ray(place, setting="engine.address")
    assert init == [] and capfd.readouterr().err.count("trying again") == ray_cluster.JOIN_ATTEMPTS - 1


def test_an_address_for_jobs_is_not_one_of_a_cluster(init):
    with pytest.raises(UserError, match="give auto, HOST:PORT or ray://HOST:PORT"):
        start_ray("http://127.0.0.1:8265", setting="engine.address")


def test_a_start_that_fails_is_tried_again_and_ends_in_one_line(init, capfd):
    init.outcomes = [Exception("The current node timed out during startup.\n" + "more\n" * 40), RuntimeError("x")]
    assert start_ray()
    assert len(init) == 3 and capfd.readouterr().err.count("\n") == 2
    init.outcomes = [Exception("The current node timed out during startup.\n" + "more\n" * 40)] * 3
    with pytest.raises(UserError) as failed:
        start_ray()
    assert "\n" not in str(failed.value) and "(The current node timed out during startup)" in str(failed.value)
    assert len(init) == 6


def test_a_start_that_hangs_is_ended(init, monkeypatch):
    monkeypatch.setattr(ray_cluster, "START_TIMEOUT_S", 0.1)
    handler, (left_s, _) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    init.outcomes = [threading.Event().wait] * 3
    with pytest.raises(UserError, match="cannot be started on this machine .no answer within"):
        start_ray()
    assert signal.getsignal(signal.SIGALRM) == handler, "another timer of this process runs on"
    assert 0 <= signal.getitimer(signal.ITIMER_REAL)[0] <= left_s


def test_ctrl_c_ends_a_start(init):
    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)

    init.outcomes = [interrupted]
    with pytest.raises(KeyboardInterrupt):
        start_ray()
    assert len(init) == 1
