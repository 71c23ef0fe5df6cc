"""Check that exit codes and the systemd unit are as docs/cluster.md says."""

import configparser
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipmill.cli.app import CRASHED, INTERRUPTED
from pipeline.engine.build import session

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/cluster.md").read_text()
SECTION = PAGE.partition("## A driver that is started again by itself")[2].partition("\n## ")[0]
UNIT = re.search(r"```ini\n(.*?)```", SECTION, re.DOTALL)[1]


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False)  # `Environment` comes twice
    parser.optionxform = str
    parser.read_string(UNIT)
    return parser


def clipmill(*words: object, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "clipmill", *map(str, words)], capture_output=True, text=True, **more)


def test_the_unit_restarts_what_heals_and_nothing_else():
    service = unit()["Service"]
    never = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert service["Restart"] == "on-failure" and never == {2, INTERRUPTED} and not never & {1, CRASHED}
    codes = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in re.findall(r"\| \d+ .*", SECTION)}
    assert {code for code, again in codes.items() if again.startswith("no")} == {"0", *map(str, never)}
    assert {code for code, again in codes.items() if again.startswith("yes")} == {"1", str(CRASHED)}
    assert service["KillSignal"] == "SIGINT", "the build ends itself, with the code that is not restarted"


def test_the_units_command_is_one_that_clipmill_knows(tmp_path):
    words = shlex.split(unit()["Service"]["ExecStart"])
    assert words[1:2] == ["build"]
    ended = clipmill(*words[1:-1], tmp_path / "corpus")  # its list is not on this machine
    assert ended.returncode == 2 and "/mnt/lists/videos.parquet" in ended.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not on this machine")
def test_systemd_reads_the_unit(tmp_path):
    text = UNIT.replace(unit()["Service"]["ExecStart"].split()[0], shutil.which("true")).replace("User=ubuntu\n", "")
    (tmp_path / "clipmill-build.service").write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "clipmill-build.service")]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    assert "clipmill-build.service:" not in said, said


def test_a_second_driver_is_a_mistake(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    with session(tmp_path / "corpus", None, [], "test", create=True):
        ended = clipmill("build", tmp_path / "bad.jsonl", "--corpus", tmp_path / "corpus")
    assert ended.returncode == 2 and "writ" in ended.stderr


KILLED = """
import os, signal, sys
def watch(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("manifest.duckdb"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from clipmill.cli.app import main
main()
"""


def test_a_killed_driver_is_continued_and_failures_end_in_0(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    words = ["build", tmp_path / "bad.jsonl", "--corpus", tmp_path / "corpus"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert clipmill(*words).returncode in (0, 1)  # 1 if the killed run had not committed the failure yet
    assert clipmill(*words).returncode == 0
