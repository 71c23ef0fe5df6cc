"""The commands of the README's section "On a cluster" work, on a head that runs on this machine."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers.builds import PLAIN, SMALL, ask, sound_sources

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SECTION = (ROOT / "README.md").read_text().partition("## On a cluster")[2].partition("\n## ")[0]
COMMANDS = re.search(r"```\n(.*?)```", SECTION, re.DOTALL)[1].replace("\\\n", " ").splitlines()
COMMANDS = [command.partition(" #")[0].strip() for command in COMMANDS]


def command(start: str) -> list[str]:
    """Return the words of the one README command that begins so."""
    (found,) = (each for each in COMMANDS if each.startswith(start))
    return shlex.split(found)


@contextmanager
def head(environment: dict[str, str], folder: Path) -> Iterator[tuple[str, str]]:
    """Run what `ray up` runs on a head; yield (address of the cluster, of its dashboard). Ends what it started.

    On a busy machine Ray gives its own parts too little time to start, so a head that ends at once is started again.
    """
    words = [str(BIN / "ray"), "start", "--head", "--block", "--port=0", "--dashboard-port=0", "--num-cpus=2"]
    words += ["--include-dashboard=true", "--disable-usage-stats"]
    for attempt in range(5):
        log = folder / f"{attempt}.log"
        with log.open("wb") as output:
            # Ports of its own for all that has a fixed one, because another Ray on this machine may have taken it.
            own = [f"--temp-dir={folder}/{attempt}", f"--ray-client-server-port={free_port()}"]
            own += [f"--dashboard-agent-listen-port={free_port()}"]
            process = subprocess.Popen(
                [*words, *own], env=environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            if found := started(process, log):
                yield found
                return
        finally:
            end_all(folder)
            process.wait()
    pytest.fail(f"no head started: {log.read_text()}")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def end_all(folder: Path) -> None:
    """End the processes of a head, each of which has its folder in its command line."""
    family = [each for each in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(each.info["cmdline"] or [])]
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(family, 30)


def started(process: subprocess.Popen, log: Path) -> tuple[str, str] | None:
    """Wait until a head serves; return the addresses of the cluster and its dashboard, None if the head ended."""
    while process.poll() is None:
        text = re.sub(r"\x1b\[[\d;]*m", "", log.read_text())
        address, dashboard = (
            re.search(r"--address='([\d.:]+)'", text),
            re.search(r"\s([\d.]+:\d+)\n.*If connection to the", text),
        )
        if address and dashboard and "block forever" in text:
            return None if "exited unexpectedly" in text else (address[1], f"http://{dashboard[1]}")
        time.sleep(0.2)
    return None


def status_of(url: str, token: str | None = None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_cluster_is_started_used_and_closed_to_others(world, tmp_path):
    folder = Path(tempfile.mkdtemp(prefix="cmr-"))  # a short path, because Ray's sockets are below it
    kept = ("PATH", "LANG", "OMP_NUM_THREADS", "XDG_STATE_HOME")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "RAY_worker_register_timeout_seconds": "600"}

    def run(words: list[str], **more: str) -> subprocess.CompletedProcess:
        words = [str(BIN / words[0]), *words[1:]]
        return subprocess.run(words, env=environment | more, capture_output=True, text=True, cwd=tmp_path, timeout=1200)

    generated = run(command("ray get-auth-token"))
    token = (tmp_path / ".ray" / "auth_token").read_text().strip()
    assert generated.returncode == 0 and token
    (export,) = (each for each in COMMANDS if each.startswith("export"))
    environment |= dict([export.removeprefix("export ").split("=", 1)])

    with head(environment, folder) as (address, dashboard):
        print(f"dashboard: {dashboard}")
        assert status_of(f"{dashboard}/api/jobs/") == 401, "others are refused"
        assert status_of(f"{dashboard}/api/jobs/", token) == 200
        assert status_of(dashboard) == 200, "the page that asks for the token"

        (tmp_path / "videos.jsonl").write_text(json.dumps(sound_sources(world)[0]) + "\n")
        submit = command("ray job submit")
        submit[submit.index("--address") + 1] = dashboard
        entry = submit.index("--") + 1
        assert submit[entry].endswith("/clipmill") and submit[entry + 1] == "build"
        build = [str(BIN / "clipmill"), "build", str(tmp_path / "videos.jsonl"), "--corpus", str(tmp_path / "corpus")]
        build += ["--recipe", "demo", *(word for each in (*SMALL, *PLAIN) for word in ("--set", each))]
        submitted = run([*submit[:entry], *build])
        while "No available agent to submit job" in submitted.stderr:  # Ray's own part for jobs starts after the head
            submitted = run([*submit[:entry], *build])
        assert submitted.returncode == 0, submitted.stdout[-4000:] + submitted.stderr[-4000:]
        assert "succeeded" in submitted.stdout
        assert ask(tmp_path / "corpus", "SELECT count(*) > 0 FROM samples") == [(True,)]
        assert run(["clipmill", "status", str(tmp_path / "corpus")]).returncode == 0

        stranger = {"HOME": str(tmp_path / "stranger"), "RAY_AUTH_MODE": "", "RAY_ADDRESS": address}
        refused = run(["clipmill", *build[1:], "--corpus", str(tmp_path / "other")], **stranger)
        assert refused.returncode == 2 and "wants a token" in refused.stderr, refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
