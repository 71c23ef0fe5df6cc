"""The related methods go through the same trainer: trained, resumed from a checkpoint, evaluated."""

import json

import pytest
from training_support import SMALL, losses, small_corpus

from training.eval_command import run_eval
from training.prepare import Request
from training.trainer import train

METHODS = {
    "clip4clip, mean": ["model.method=clip4clip"],
    "clip4clip, transformer": ["model.method=clip4clip", "model.clip4clip={head: seqTransf}"],
    "unipt": ["model.method=unipt", "model.pooling=mean"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_resumes_and_is_searched(corpus, tmp_path, method):
    settings = (*SMALL, *METHODS[method], "train.loss=vs", "train.ema=0.9", "data.loader_processes=0")
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(Request(str(whole), str(corpus), "demo", (*settings, "train.max_steps=4")))
    train(Request(str(run), str(corpus), "demo", (*settings, "train.max_steps=4", "train.checkpoint_every=1")))
    for folder in (run / "checkpoints").glob("step-0000000[34]"):
        (folder / "state.json").write_text("torn")
    (run / "log.jsonl").write_text("".join((run / "log.jsonl").read_text().splitlines(keepends=True)[:2]))
    train(Request(str(run)))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)
    for averaged in (False, True):
        metrics = run_eval(run=run, corpus=corpus, where="true", ema=averaged, format="json")
        assert metrics["num_videos"] == 120 and json.dumps(metrics)
