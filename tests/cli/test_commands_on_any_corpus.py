"""Commands on a copy without the cache folder and empty folders, and `status` whatever is wrong."""

import shutil
import signal
import sys
from pathlib import Path

import pytest

from clipmill.cli import app
from pipeline.engine.build import session, status
from pipeline.stages.ingest.stage import ingest_sources
from shards.corpus.folder import Corpus
from tests.helpers.builds import write_list


@pytest.fixture
def run(monkeypatch):
    """Return a function that runs a command line in this process and returns its exit code."""
    before = signal.getsignal(signal.SIGINT)

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["clipmill", *map(str, words)])
        return app._run()

    yield run
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """Return a copy as a download leaves it: no hidden folder and no empty ones."""
    corpus = shutil.copytree(whole, tmp_path / "corpus", ignore=shutil.ignore_patterns(".*"))
    for folder in [path for path in corpus.rglob("*") if path.is_dir() and not any(path.iterdir())]:
        folder.rmdir()
    assert not (corpus / ".clipmill").exists()
    return corpus


@pytest.mark.parametrize(
    "words",
    [
        ["status", "DIR"],
        ["status", "DIR", "--set", "cut.fps=2"],
        ["sql", "DIR", "-- how many\nSELECT count(*) FROM samples"],
        ["verify", "DIR", "--no-decode"],
        ["explain", "DIR", "video-a.1"],
        ["forget", "DIR", "--video", "video-c", "--yes"],
        ["compact", "DIR"],
        ["build", "--corpus", "DIR"],
        ["run", "pack", "--corpus", "DIR"],
        ["plan", "--corpus", "DIR", "--recipe", "demo", "--gpu", "H100", "--set", "train.batch_size=4"],
    ],
)
def test_a_copy_without_the_cache_folder_is_a_corpus(run, copy, capsys, words):
    code = run(*(copy if word == "DIR" else word for word in words))
    assert code == 0, capsys.readouterr().err


def counts(corpus: Path) -> dict[str, int]:
    return {stage: by.get("done", 0) for stage, by in status(corpus, []).counts.items()}


DONE = {"download": 8, "transcribe": 8, "segment": 8, "cut": 8, "caption": 24, "score": 24}


def spoil(corpus: Path, old: str, new: str) -> None:
    path = corpus / "corpus.yaml"
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("    where: ''", "    where: no_such_column > 1", "no_such_column"),
        ("    where: ''", "    where: title::INTEGER > 1", "pack.where"),
        ("    fps: 3.0", "    fps: fast", "cut.fps"),
        ("    fps: 3.0", "    fps: 3.0\n    unknown: 1", "cut.unknown"),
        ("settings:", "sets:", "cannot be read"),
        ("pretrained: datacomp_xl_s13b_b90k", "pretrained: /absent/weights.pt", "weights.pt"),
    ],
)
def test_status_answers_whatever_the_saved_settings_are(run, copy, capsys, old, new, said):
    spoil(copy, old, new)
    assert run("status", copy) == 0
    out = capsys.readouterr().out
    assert "problem" in out and said in out
    assert counts(copy) == DONE


def test_status_answers_while_another_process_writes(run, copy, capsys):
    with Corpus(copy).writer():
        before = sorted(copy.rglob("[!.]*.*"))
        assert run("status", copy) == 0
        assert "being written by process" in capsys.readouterr().out
        assert run("status", copy, "--set", "cut.fps=2") == 0
        assert counts(copy) == DONE
        assert [path for path in sorted(copy.rglob("[!.]*.*")) if path.name != "lock.takeover"] == before


def test_status_answers_in_a_folder_that_cannot_be_written(run, copy, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Corpus, "alone_here", refuse)
    assert run("status", copy) == 0 and counts(copy) == DONE
    assert not (copy / ".clipmill").exists()


def test_status_makes_a_torn_manifest_again(run, copy):
    (copy / "manifest.duckdb").write_bytes(b"torn" * 4000)
    assert run("status", copy) == 0
    assert run("sql", copy, "SELECT count(*) FROM samples") == 0


def test_status_shows_no_progress_of_an_earlier_build(run, copy, capsys):
    Corpus(copy).create()
    Corpus(copy).write_progress({"run_id": "old", "elapsed_s": 5, "stages": {}})
    with Corpus(copy).writer():
        assert run("status", copy) == 0
        assert "run old" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["-hXy1z2", "--a-b", "-", "-json", "--json1"])
def test_an_id_may_begin_with_a_dash(run, tmp_path, capsys, name):
    listed = write_list(tmp_path / "list.jsonl", [{"id": name, "url": "http://127.0.0.1:9/a.mp4"}])
    corpus = tmp_path / "corpus"
    with session(corpus, None, [], "test", create=True) as (current, _):
        ingest_sources(current, [str(listed)])
        current.publish()
    assert run("explain", corpus, name) == 0, capsys.readouterr().err
    assert f"source {name}" in capsys.readouterr().out
    assert run("explain", "--json", corpus, name) == 0 and run("explain", corpus, "--", name) == 0
    assert run("forget", corpus, "--video", name, "--dry-run") == 0
    assert run("forget", corpus, f"--video={name}", "--yes") == 0
    assert run("explain", corpus, name) == 0
    assert "forgotten at" in capsys.readouterr().out
