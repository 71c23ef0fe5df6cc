"""Evaluation by one, two and three processes gives bit-identical features, each clip once."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.evaluations import (
    ALONE,
    damage,
    packed_corpus,
    selected,
    small_clip4clip,
    small_model,
    small_settings,
)
from tests.helpers.ranks import run_ranks
from training.data.selection import Selection
from training.evaluation.retrieval import EvalFeatures, EvaluationStopped, evaluate, features
from training.parallel.distributed import Process

SETTINGS = ("eval.batch_size=7", "eval.text=caption")  # 12 clips: 2 batches, the last one short


def run_rank(rank: int, world_size: int, selection_path: Path, folder: Path) -> None:
    group = dist.group.WORLD
    process = Process(torch.device("cpu"), rank, world_size, world_size, group, group)
    model, selection, settings = small_model(), Selection(selection_path), small_settings(*SETTINGS)
    made = features(model, selection, settings, process)
    metrics = evaluate(model, selection, settings, process, save_similarity=folder / f"sim-{world_size}.npz")
    pairs = features(small_clip4clip("tightTransf"), selection, settings, process).similarity_MN
    torch.save((made, metrics, pairs), folder / f"{world_size}.{rank}.pt")


def stop_rank(rank: int, world_size: int, selection_path: Path, folder: Path) -> None:
    """Evaluate while only the last process is asked to stop, at its first, second, … question, until it is too late."""
    group = dist.group.WORLD
    process = Process(torch.device("cpu"), rank, world_size, world_size, group, group)
    selection, settings = Selection(selection_path), small_settings(*SETTINGS)
    for name, model in {"vectors": small_model(), "pairs": small_clip4clip("tightTransf")}.items():
        num_stopped = 0
        for stop_at in range(1, 100):
            num_asked = 0

            def should_stop() -> bool:
                nonlocal num_asked
                num_asked += 1
                return process.sum(int(rank == world_size - 1 and num_asked == stop_at))[0] > 0  # noqa: B023

            try:
                evaluate(model, selection, settings, process, should_stop=should_stop)
                break
            except EvaluationStopped:
                num_stopped += 1
        (folder / f"{name}-{world_size}.{rank}").write_text(str(num_stopped))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])  # with 3 processes, one has no work
def test_all_processes_stop_after_the_batch_in_which_one_is_asked_to(tmp_path: Path, world_size: int) -> None:
    selection = selected(packed_corpus(tmp_path / "corpus", 12))
    run_ranks(world_size, stop_rank, world_size, selection.path, tmp_path)
    for name in ("vectors", "pairs"):
        counts = {int((tmp_path / f"{name}-{world_size}.{rank}").read_text()) for rank in range(world_size)}
        assert len(counts) == 1 and counts.pop() >= 5  # batches of clips and of texts, and blocks of both directions


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_features_and_metrics(tmp_path: Path) -> None:
    corpus = packed_corpus(tmp_path / "corpus", 12)
    selection = selected(corpus)
    damage(corpus, selection, 4)
    alone: EvalFeatures = features(small_model(), selection, small_settings(*SETTINGS), ALONE)
    metrics = evaluate(small_model(), selection, small_settings(*SETTINGS), ALONE)
    pairs = features(small_clip4clip("tightTransf"), selection, small_settings(*SETTINGS), ALONE).similarity_MN
    assert len(alone.clip_ids) == 11 and metrics["num_failures"] == 1
    for world_size in (2, 3):  # with 3 processes, one has no work
        run_ranks(world_size, run_rank, world_size, selection.path, tmp_path)
        for rank in range(world_size):
            made, theirs, their_pairs = torch.load(tmp_path / f"{world_size}.{rank}.pt", weights_only=False)
            assert (made.clip_ids, made.texts) == (alone.clip_ids, alone.texts)
            assert [f["clip_id"] for f in made.failures] == [f["clip_id"] for f in alone.failures]
            for name in ("video_ND", "text_MD", "text_to_video_M", "similarity_MN"):
                assert torch.equal(getattr(made, name), getattr(alone, name)), name
            assert theirs | {"failures": []} == metrics | {"failures": []}
            assert torch.equal(their_pairs, pairs)
    assert len(list(tmp_path.glob("sim-*.npz"))) == 2
