"""`clipmill train` with odd data, several ways of running, and mistakes."""

import json
import signal
import subprocess
import sys
import time

import duckdb
import pytest

import clipmill.cli.app
from clipmill.base.errors import UserError
from tests.helpers.ranks import run_ranks
from tests.helpers.training import (
    Forked,
    assert_same_run,
    curve,
    lines,
    lines_so_far,
    losses,
    quiet,
    small_corpus,
    train_command,
    train_here,
)
from training.run.setup import Request
from training.trainer import Report, train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="module")
def plain_run(corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain") / "run"
    six_steps(corpus, run)
    return run


def six_steps(corpus, run, *settings: str) -> Report:
    return train_here(corpus, run, "train.max_steps=6", *settings)


@pytest.mark.slow
def test_every_log_line_shows_the_progress(plain_run):
    (line, *_), terms = lines(plain_run), ("subtitle_to_video", "video_to_caption", "frame_to_caption")
    wanted = {"step", "epoch", "loss", "lr", "logit_scale", "grad_norm", "samples_per_s", "data_wait", "mfu", "eta_s"}
    assert wanted | set(terms) <= line.keys()
    assert line["loss"] == pytest.approx(sum(line[key] for key in line if "_to_" in key), rel=1e-5)


@pytest.mark.slow
def test_sharded_averaged_recomputed_and_observed_it_is_the_same_run(corpus, plain_run, tmp_path):
    """The run has two processes with FSDP2, activation checkpointing, gradient caching, EMA and feedback."""
    options = ("train.parallel=fsdp", "train.activation_checkpointing=true", "train.chunk_size=2", "train.ema=0.9")
    run_ranks(2, _rank, corpus, tmp_path / "run", ("train.feedback=true", *options))
    assert_same_run(tmp_path / "run", plain_run)
    assert (tmp_path / "run/checkpoints/step-00000006/ema.safetensors").exists()
    feedback = duckdb.sql(f"SELECT sum(times_seen), count(loss) FROM '{tmp_path}/run/feedback.parquet'").fetchall()
    assert feedback[0][0] == 6 * 8 and feedback[0][1] > 0


def _rank(rank, corpus, run, settings) -> None:
    six_steps(corpus, run, *settings)


@pytest.mark.slow
def test_unreadable_samples_are_holes_and_rows(corpus, plain_run, tmp_path):
    broken = tmp_path / "corpus"
    subprocess.run(["cp", "-r", str(corpus), str(broken)], check=True)
    rows = duckdb.connect(str(broken / "manifest.duckdb"), read_only=True)
    spots = rows.execute("SELECT shard, mp4_offset, mp4_bytes FROM samples ORDER BY clip_id LIMIT 12").fetchall()
    rows.close()
    for shard, offset, size in spots:
        with open(broken / "shards" / shard, "r+b") as file:
            file.seek(offset)
            file.write(b"\0" * size)
    report = six_steps(broken, tmp_path / "run", "data.max_failures=0.5", "train.max_steps=15")
    assert report.step == 15
    failures = lines(tmp_path / "run", "failures.jsonl")
    assert len({row["item_id"] for row in failures}) == 12
    assert {row["stage"] for row in failures} == {"train"} and all(row["message"] for row in failures)
    assert curve(tmp_path / "run")[:6] == curve(plain_run), "holes do not move other samples"
    with pytest.raises(UserError, match=r"data\.max_failures"):
        six_steps(broken, tmp_path / "strict", "data.max_failures=0.01", "train.max_steps=15")


@pytest.mark.slow
def test_plain_tars_train_without_a_manifest(corpus, plain_run, tmp_path):
    report = six_steps(corpus / "shards" / "{000000..000023}.tar", tmp_path / "run", "data.apart=[]")
    assert report.reason == "done" and len(losses(tmp_path / "run")) == 6


@pytest.mark.slow
def test_a_run_keeps_what_it_froze_when_the_corpus_changes(corpus, plain_run, tmp_path):
    own = tmp_path / "corpus"
    subprocess.run(["cp", "-r", str(corpus), str(own)], check=True)
    six_steps(own, tmp_path / "run", "train.max_steps=3")
    with duckdb.connect(str(own / "manifest.duckdb")) as connection:
        connection.execute("UPDATE samples SET caption = 'something else'")
    train(Request(str(tmp_path / "run"), assignments=("train.max_steps=6",)))
    assert curve(tmp_path / "run") == curve(plain_run)


@pytest.mark.slow
def test_settings_that_make_it_another_run_are_refused_by_name(plain_run):
    with pytest.raises(UserError, match=r"train\.lr: 0\.0003 → 0\.1"):
        train(Request(str(plain_run), assignments=("train.lr=0.1",)))


@pytest.mark.slow
def test_held_out_clips_in_training_are_an_error_unless_allowed(corpus, tmp_path):
    held_out = "eval.where=clip_id IN (SELECT clip_id FROM clips ORDER BY clip_id LIMIT 10)"
    with pytest.raises(UserError, match=r"eval\.overlap"):
        six_steps(corpus, tmp_path / "run", held_out, "eval.overlap=error")
    six_steps(corpus, tmp_path / "run", held_out, "eval.overlap=exclude", "train.max_steps=1", "eval.text=caption")
    steps = [row["step"] for row in lines(tmp_path / "run", "eval.jsonl")]
    assert steps == [0, 1]


@pytest.mark.slow
def test_two_trainings_never_write_one_run(corpus, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    endless = ("train.max_steps=1000000", "data.loader_processes=0")
    first = Forked(train_command(corpus, run, *endless), output)
    try:
        while not lines_so_far(run):
            assert first.poll() is None, output.read_text()
            time.sleep(0.02)
        with pytest.raises(UserError, match=f"is being trained by process {first.pid}"):
            train_here(None, run)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()


def test_a_mistake_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-m", "clipmill", "train", "--run", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet())
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--corpus is missing" in done.stderr

    def error_of(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["clipmill", *command[3:], *arguments])
        assert clipmill.cli.app._run() == 2
        return capsys.readouterr().err

    assert "no manifest.duckdb" in error_of("--corpus", str(tmp_path))
    assert "train.batch_sizes: there is no such setting" in error_of("--corpus", "x", "--set", "train.batch_sizes=1")
    assert "--select or --where" in error_of("--corpus", "x", "--select", "SELECT 1", "--where", "true")


@pytest.mark.slow
def test_a_checkpoint_is_a_model_that_others_open(plain_run):
    from training.models.clip_vip.weights import load_model

    folder = plain_run / "checkpoints" / "step-00000006"
    assert load_model(folder).config.words
    assert json.loads((folder / "state.json").read_text())["state"]["plan"]["num_steps_done"] == 6
