"""Exit codes: 0 done, 1 something failed in this run, 2 a mistake, 3 a crash, 130 an interrupt that says what to do."""

import array
import errno
import fcntl
import os
import signal
import subprocess
import sys
import termios

import pytest

from clipmill.base.errors import ItemError, UserError
from clipmill.base.ray_cluster import require_short_temporary_folder
from clipmill.cli import app
from pipeline.engine.build import BuildReport, build
from shards.corpus.folder import Corpus
from tests.helpers.ledgers import FragmentCorpus


@pytest.fixture
def run(monkeypatch):
    """Return a function that runs a command line in this process and returns its exit code."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run in parallel

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["clipmill", *map(str, words)])
        return app._run()

    yield run
    signal.signal(signal.SIGINT, before)


def interrupt_in_a_library():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("the query was interrupted") from None


def raises(error):
    def command(*_args, **_kwargs):
        raise error

    return command


@pytest.mark.parametrize(
    "command, code, text",
    [
        (raises(UserError("a mistake")), 2, "clipmill: a mistake"),
        (raises(KeyError("a defect")), 3, "KeyError: 'a defect'"),
        (raises(AssertionError("an invariant")), 3, "report the traceback"),
        (raises(SystemExit(1)), 3, "SystemExit"),  # of a library
        (raises(OSError(errno.EIO, "Input/output error")), 3, "Input/output error"),
        (raises(OSError(errno.ENOSPC, "No space left on device")), 3, "Committed work is safe"),
        (raises(BrokenPipeError(errno.EPIPE, "Broken pipe")), 141, ""),
        (raises(KeyboardInterrupt()), 130, "interrupted. Run the same command again to resume."),
        (raises(EOFError()), 130, "interrupted"),
        (lambda *_: interrupt_in_a_library(), 130, "interrupted. Run the same command again to resume."),
        (lambda *_: None, 0, ""),
    ],
)
def test_every_end_of_a_command_has_its_exit_code_and_1_is_none_of_them(run, monkeypatch, capsys, command, code, text):
    monkeypatch.setattr("clipmill.cli.display.show_status", command)
    assert run("status", "corpus") == code
    assert text in capsys.readouterr().err


def test_a_mistake_in_the_options_is_2(run, capsys):
    assert run("status") == 2 and run("status", "--colour") == 2 and run("buidl") == 2
    assert run("status", "--help") == 0


def test_ctrl_c_prints_the_promised_line(tmp_path):
    command = [sys.executable, "-m", "clipmill", "build", "-", "--corpus", str(tmp_path / "corpus")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes)
    process.stdin.write("http://127.0.0.1:9/a.mp4\n")
    process.stdin.flush()
    unread = array.array("i", [1])
    while unread[0]:  # until the command has begun to read its sources
        fcntl.ioctl(process.stdin, termios.FIONREAD, unread)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert said.strip() == "clipmill: interrupted. Run the same command again to resume."


def test_a_failure_counts_in_the_run_in_which_it_happens_and_is_told_afterwards(tmp_path, run, capsys):
    listed, corpus = tmp_path / "list.jsonl", tmp_path / "corpus"
    listed.write_text("{not json\n")
    assert run("build", listed, "--corpus", corpus) == 1
    assert "bad-line" in capsys.readouterr().out
    assert run("build", listed, "--corpus", corpus) == 0
    assert "1 failed in earlier runs" in capsys.readouterr().out
    assert run("build", "--corpus", corpus) == 0
    assert "1 failed in earlier runs" in capsys.readouterr().out
    assert run("status", corpus) == 0 and "bad-line" in capsys.readouterr().out
    listed.write_text("{not json\n{nor this\n")
    assert run("build", listed, "--corpus", corpus) == 1


def test_the_ledger_knows_the_run_of_a_failure(tmp_path):
    corpus = FragmentCorpus(tmp_path)
    corpus.add_sources("a", "b")
    corpus.fail["download:b"] = ItemError("not-found", "404")
    corpus.work_off(["download"])
    corpus.refresh_state()
    assert corpus.ledger.standing_failures("run1") == [("download", "not-found", 1, "b: 404")]
    assert corpus.ledger.standing_failures("run2") == []
    assert corpus.ledger.standing_failures() == [("download", "not-found", 1, "b: 404")]
    corpus.ledger.close()
    assert BuildReport(num_old_failures=1).exit_code == 0


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_too_long_for_sockets_is_a_mistake_that_names_it(monkeypatch, tmp_path, name):
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(variable, raising=False)
    require_short_temporary_folder()
    monkeypatch.setenv(name, str(tmp_path / ("a_long_name_for_a_folder_" * 6)))
    with pytest.raises(UserError, match=f"{name} = .*too long .* RAY_TMPDIR"):
        require_short_temporary_folder()
    monkeypatch.setenv(name, "/tmp/short")
    require_short_temporary_folder()


# --- Settings are saved only by a command that is not refused


@pytest.fixture
def corpus(tmp_path):
    listed = tmp_path / "bad.jsonl"
    listed.write_text("{not json\n")
    build(tmp_path / "corpus", [str(listed)], stages=["ingest"], recipe=None, assignments=[], command="test")
    return tmp_path / "corpus"


def recipe(tmp_path, text: str):
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    "words",
    [
        ["build", "--set", "pack.where=no_such_column > 1"],
        ["build", "--set", "pack.where=title = 'x"],
        ["build", "--set", "pack.where=SELECT video_id FROM catalog"],
        ["run", "pack", "--set", "pack.where=DROP TABLE clips"],
        ["build", "--set", "cut.fps=fast"],
        ["build", "--set", "cut.fsp=3"],
        ["run", "caption", "--set", "caption.captioner=null"],
        ["run", "cut", "--set", "cut.fps=2", "--where", "no_such_column"],
        ["build", "absent.jsonl", "--set", "cut.fps=2"],
        ["build", "--recipe", "RECIPE"],
        ["build", "--recipe", "absent.yaml"],
    ],
)
def test_a_refused_command_leaves_the_settings_as_they_were(run, corpus, tmp_path, words):
    before = (corpus / "corpus.yaml").read_bytes()
    made = str(recipe(tmp_path, "cut: {fps: 2}\npack: {where: 'no_such_column > 1'}\n"))
    assert run(*(made if word == "RECIPE" else word for word in words), "--corpus", corpus) == 2
    assert (corpus / "corpus.yaml").read_bytes() == before
    assert run("status", corpus) == 0


def test_a_condition_that_fails_on_a_row_is_refused_before_it_is_saved(run, whole_copy):
    before = (whole_copy / "corpus.yaml").read_bytes()
    assert run("build", "--corpus", whole_copy, "--set", "pack.where=title::INTEGER > 3") == 2
    assert (whole_copy / "corpus.yaml").read_bytes() == before
    assert run("build", "--corpus", whole_copy, "--set", "pack.where=clip_id = 'video-a.0'") == 0
    assert "video-a.0" in (whole_copy / "corpus.yaml").read_text()


@pytest.fixture
def whole_copy(whole, tmp_path):
    import shutil

    return shutil.copytree(whole, tmp_path / "copy")


# --- A corpus is made only when it is meant


@pytest.mark.parametrize(
    "words",
    [
        ["build", "--corpus", "DIR"],
        ["build", "--corpus", "DIR", "--recipe", "demo"],
        ["build", "EMPTY", "--corpus", "DIR"],
        ["build", "absent.txt", "--corpus", "DIR"],
        ["build", "http://127.0.0.1:9/a.mp4", "--corpus", "DIR", "--set", "pack.where=no_such_column"],
        ["run", "cut", "--corpus", "DIR"],
        ["status", "DIR"],
        ["sql", "DIR", "SELECT 1"],
        ["stats", "DIR"],
        ["verify", "DIR"],
        ["forget", "DIR", "--video", "a", "--yes"],
        ["compact", "DIR"],
        ["explain", "DIR", "a"],
        ["train", "--corpus", "DIR", "--run", "RUN"],
        ["plan", "--corpus", "DIR"],
        ["eval", "--model", "demo", "--corpus", "DIR"],
        ["edit", "--corpus", "DIR", "--model", "demo", "--out", "RUN"],
    ],
)
def test_a_mistyped_corpus_is_a_mistake_and_is_not_made(run, tmp_path, capsys, words):
    (tmp_path / "empty.txt").write_text("# nothing here\n")
    paths = {"DIR": tmp_path / "mistyped", "EMPTY": tmp_path / "empty.txt", "RUN": tmp_path / "run"}
    assert run(*(paths.get(word, word) for word in words)) == 2
    assert not (tmp_path / "mistyped").exists()
    assert capsys.readouterr().err.startswith("clipmill: ")


def test_a_new_corpus_is_announced(run, tmp_path, capsys):
    (tmp_path / "list.jsonl").write_text("{not json\n")
    assert run("build", tmp_path / "list.jsonl", "--corpus", tmp_path / "new") == 1
    assert f"new corpus {tmp_path / 'new'}" in capsys.readouterr().out.replace("\n", "")
    assert Corpus(tmp_path / "new").exists
