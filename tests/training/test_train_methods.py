"""Related methods use the same trainer: they train, resume from a checkpoint and are evaluated."""

import json

import pytest

from clipmill.cli.evaluate import run_eval
from tests.helpers.shards import change_manifest
from tests.helpers.training import SMALL, losses, small_corpus
from training.data.frame_sampling import drawn_text
from training.launch import launch_training
from training.run.folder import RunFolder
from training.run.setup import Request
from training.trainer import train

METHODS = {
    "clip4clip, LSTM and 3-D patches": [
        "model.method=clip4clip",
        "model.clip4clip={head: seqLSTM, stem: 3d, frozen_layers: 1}",
    ],
    "clip4clip, mean": ["model.method=clip4clip"],
    "clip4clip, transformer": ["model.method=clip4clip", "model.clip4clip={head: seqTransf}"],
    "clip4clip, pairs": ["model.method=clip4clip", "model.clip4clip={head: tightTransf}"],
    "texts of neighbours": ["train.loss=mil_nce", "data.neighbours=1"],
    "unipt": ["model.method=unipt", "model.pooling=mean"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_resumes_and_is_searched(corpus, tmp_path, method):
    settings = (*SMALL, "train.loss=vs", *METHODS[method], "train.ema=0.9", "data.loader_processes=0")
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


@pytest.mark.slow
def test_fine_tuning_draws_one_of_a_clips_texts_at_every_visit_and_is_searched_by_all(corpus, tmp_path):
    """One run is post-pretrained on a corpus with reference texts like a benchmark's, another fine-tuned from it."""
    change_manifest(
        corpus,
        """
        DELETE FROM texts;
        INSERT INTO texts BY NAME SELECT clip_id, video_id, n, 'text ' || n || ' of a red circle' AS text
        FROM samples, range(4) r(n)
        """,
    )
    settings = [*SMALL, "train.max_steps=2", "data.loader_processes=0"]
    first, second = tmp_path / "first", tmp_path / "second"
    launch_training(str(corpus), first, recipe="demo", assignments=settings)
    fine = [*settings, "data.subtitle=texts", "eval.text=texts", "train.loss=vs"]
    launch_training(str(corpus), second, recipe="demo", init=str(first), assignments=fine)
    assert RunFolder(second).load().settings["model"]["init"].endswith("step-00000002")
    metrics = run_eval(run=second, corpus=corpus, where="true", format="json")
    assert metrics["num_texts"] == 4 * metrics["num_videos"] and metrics["v2t"]["num_queries"] == metrics["num_videos"]


def test_over_the_epochs_every_text_of_a_clip_is_drawn():
    draws = [drawn_text(4, seed=0, epoch=epoch, clip_id="a.0") for epoch in range(40)]
    assert set(draws) == {0, 1, 2, 3}
    assert draws == [drawn_text(4, seed=0, epoch=epoch, clip_id="a.0") for epoch in range(40)]
