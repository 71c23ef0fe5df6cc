"""A stop signal during an evaluation ends it after the current batch; the resumed run makes it and ends the same."""

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.training import assert_same_run, lines, small_corpus, train_here
from training.evaluation import retrieval
from training.run.folder import RunFolder

SETTINGS = ("train.max_steps=4", "eval.where=1 = 1", "eval.overlap=allow", "eval.every=2", "eval.batch_size=8")
NUM_BATCHES = 6  # of an evaluation of 48 clips


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus") / "corpus", 48)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train_here(corpus, run, *SETTINGS).reason == "done"
    return run


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_signal_ends_an_evaluation_after_its_batch(
    corpus: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run, encode, num_encoded = tmp_path / "run", retrieval.encode_clips, 0

    def interrupted(*arguments):
        nonlocal num_encoded
        num_encoded += 1
        if num_encoded == NUM_BATCHES * (step // 2) + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*arguments)

    monkeypatch.setattr(retrieval, "encode_clips", interrupted)
    report = train_here(corpus, run, *SETTINGS)
    monkeypatch.setattr(retrieval, "encode_clips", encode)
    assert (report.step, report.reason) == (step, "SIGTERM")
    assert num_encoded == NUM_BATCHES * (step // 2) + 2, "the evaluation continued after the signal"
    assert [line["step"] for line in lines(run, "eval.jsonl")] == list(range(0, step, 2))
    assert step == 0 or RunFolder(run).checkpoints.find_latest() == step
    assert train_here(None, run).reason == "done"
    assert_same_run(run, undisturbed)
    kept = ("step", "t2v", "v2t")
    ends = [[{key: line[key] for key in kept} for line in lines(folder, "eval.jsonl")] for folder in (run, undisturbed)]
    assert ends[0] == ends[1]
