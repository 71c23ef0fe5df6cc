"""Work that hangs or kills its worker is stopped, recorded, counted over runs and finally quarantined."""

import faulthandler
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.runtime.watchdog import FOLDER, reporting, sweep_reports, take_report, time_limit
from pipeline.stages.download.fetch import DownloadSettings
from tests.helpers.builds import ask, build_here
from tests.helpers.http import media_server
from tests.helpers.media import flat_video

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("ingest", "download", "transcribe", "segment", "cut", "caption")


@pytest.mark.slow
def test_poisonous_videos_cost_themselves_and_are_quarantined(tmp_path, local_ray):
    """One clip always hangs the captioner, one always kills its process; both share a unit with a sound clip."""
    folder, corpus, antidote = tmp_path / "videos", tmp_path / "corpus", tmp_path / "antidote"
    folder.mkdir()
    for name, luma in (("hangs", 0x10), ("kills", 0xF0), ("sound", 0x80)):
        flat_video(folder / f"{name}.mp4", luma)
    settings = [
        "ingest.unit_videos=3", "transcribe.whisper=null", "segment.mode=shots",
        "caption.captioner=tests.helpers.poison:Poisoned",
        f"caption.options={{antidote: {antidote}}}", "caption.timeout_base_s=1000", "caption.timeout_per_image_s=0.1",
        "engine.max_attempts=1", "engine.model_workers=2",
    ]  # fmt: skip
    build_here(corpus, [str(folder)], *settings, stages=STAGES)
    assert ask(corpus, "SELECT clip_id LIKE 'sound-%' FROM captions") == [(True,)]
    failures = "SELECT split_part(item_id, '-', 1), error_class, attempts, quarantined FROM failures ORDER BY 1"
    assert ask(corpus, failures) == [("hangs", "timeout", 1, True), ("kills", "worker-died", 1, True)]
    ((message,),) = ask(corpus, "SELECT message FROM failures WHERE error_class = 'timeout'")
    assert "captioning 1 images took more than 1,000 s" in message and "poison.py" in message, "where it hung"

    antidote.touch()
    report = build_here(corpus, [], recipe=None, stages=["caption"], where="quarantined")
    assert report.pending_before["caption"] == {"done": 1, "pending": 2}
    assert ask(corpus, "SELECT count(*) FROM captions") == [(3,)] and ask(corpus, failures) == []
    assert list((corpus / ".clipmill" / "hung").iterdir()) == []


HANG = """
import re, sys, threading, time
from pathlib import Path
from pipeline.runtime.watchdog import reporting, time_limit
root, way = Path(sys.argv[1]), sys.argv[2]
with reporting(root, "cut-u1"):
    with time_limit(2000, "the whole of it"), time_limit(1000 if way == "ends" else 0.2, "one small thing"):
        if way == "lock":
            re.match(r"(a+)+$", "a" * 60 + "b")
        time.sleep(0 if way == "ends" else 1000)
    pass  # their ends
print("through")
"""


@pytest.mark.parametrize("way, code", [("lock", 1), ("sleep", 1), ("ends", 0)])
def test_a_worker_that_hangs_ends_whatever_it_hangs_in(tmp_path, way, code):
    run = subprocess.run([sys.executable, "-c", HANG, tmp_path, way], cwd=ROOT, capture_output=True, timeout=900)
    assert (run.returncode, run.stdout) == (code, b"" if code else b"through\n")
    report = take_report(tmp_path, "cut-u1")
    if code:
        assert report.startswith("one small thing took more than 0 s\nTimeout") and "File" in report
    assert take_report(tmp_path, "cut-u1") is None


def test_a_limit_is_armed_until_its_block_ends(tmp_path, monkeypatch):
    """The earliest of several limits applies; after the last block no limit remains that could stop later work."""
    armed: list[float] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda after_s, **options: armed.append(after_s))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", armed.clear)

    def armed_for() -> str:
        return "".join((tmp_path / FOLDER / "cut-u1.txt").read_text() for _ in armed)

    with reporting(tmp_path, "cut-u1"):
        with time_limit(2000, "the whole of it"):
            with time_limit(1000, "one small thing"):
                assert armed_for() == "one small thing took more than 1,000 s\n"
            assert armed_for() == "the whole of it took more than 2,000 s\n"
        assert armed == []


def test_a_worker_that_dies_of_something_else_leaves_no_report_of_a_hang(tmp_path):
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    code = HANG.replace("    pass  # their ends\n", f"        {killed}\n")
    assert subprocess.run([sys.executable, "-c", code, tmp_path, "ends"], cwd=ROOT, timeout=900).returncode == -9
    assert (tmp_path / ".clipmill" / "hung" / "cut-u1.txt").exists()
    assert take_report(tmp_path, "cut-u1") is None
    sweep_reports(tmp_path)
    assert list((tmp_path / ".clipmill").iterdir()) == []


DOWNLOAD = """
import re, sys
from pathlib import Path
from pipeline.stages.download import fetch as download
from pipeline.runtime.watchdog import reporting, time_limit
download.GRACE_S = 1.0
download.time_limit = lambda limit_s, what: time_limit(limit_s if what.startswith("downloading") else 1000, what)
def hang(*_args, **_kwargs):
    re.match(r"(a+)+$", "a" * 60 + "b")
download.download_http = hang
settings = download.DownloadSettings(timeout_s=0.2, allow_private_addresses=True)
with reporting(Path(sys.argv[1]), "download-u1"):
    download.fetch({"video_id": "v", "url": sys.argv[2], "kind": "url"}, Path(sys.argv[1]) / "sources", settings)
"""


def test_a_download_that_computes_for_ever_is_ended(tmp_path):
    """Connections end at download.timeout_s by themselves; a computation that hangs is stopped shortly after."""
    with media_server() as server:
        url = server.add("/a.mp4", b"x")
        run = subprocess.run(
            [sys.executable, "-c", DOWNLOAD, tmp_path, url], cwd=ROOT, capture_output=True, timeout=900
        )
    report = take_report(tmp_path, "download-u1")
    assert report and report.startswith(f"downloading {url} took more than"), run.stderr
    assert run.returncode == 1


def test_limits_are_settings_that_change_no_fingerprint():
    assert (
        DownloadSettings().fingerprint() == DownloadSettings(timeout_s=1, probe_timeout_s=1, max_bytes=1).fingerprint()
    )
