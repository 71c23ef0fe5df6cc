"""Retrieval ranks, ties, several captions per video and dual softmax, against the reference and its known errors."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.base.errors import UserError
from tests.helpers.clip_vip import numbers, tensors
from training.evaluation import metrics as evaluate
from training.evaluation.metrics import chance, dual_softmax, ranks_of, retrieval_metrics
from training.evaluation.retrieval import CosineBlocks

SQUARE = ("square", "ties_quantised", "ties_some", "ties_constant")
TIED = SQUARE[1:]


def assert_metrics(ours: dict[str, float], published: dict[str, Any]) -> None:
    for key in ("r1", "r5", "r10", "medr", "meanr"):
        assert ours[key] == pytest.approx(published[key], rel=1e-6), key


def assert_percent(ours: dict[str, float], published: dict[str, Any]) -> None:
    """Compare with a row in CLIP4Clip's names: recalls in percent, and MR the median rank."""
    for key in ("R1", "R5", "R10"):
        assert ours[key.lower()] * 100 == pytest.approx(published[key], rel=1e-6), key
    assert ours["medr"] == published["MedianR"] == published["MR"]
    assert ours["meanr"] == pytest.approx(published["MeanR"], rel=1e-6)


def test_without_ties_both_directions_equal_the_reference() -> None:
    sim = tensors("metrics", "metrics.safetensors")["square/sim"]
    published = numbers("metrics", "metrics.json")["square"]["xpretrain"]
    ours = retrieval_metrics(sim, dsl="published")
    assert set(ours) == {"t2v", "v2t", "t2v_dsl", "v2t_dsl"}
    for direction, metrics in published.items():
        assert_metrics(ours[direction], metrics)
    assert ours["t2v"]["num_queries"] == 200


def test_each_direction_of_dual_softmax_is_normalised_over_its_own_queries() -> None:
    """The reference ranks video to text on the matrix normalised over texts, which hardly changes the ranks."""
    data = tensors("metrics", "metrics.safetensors")
    sim = data["square/sim"].numpy()
    np.testing.assert_allclose(dual_softmax(sim, axis=0), data["square/sim_dsl"].numpy(), rtol=1e-5, atol=1e-6)
    ours, published = retrieval_metrics(sim, dsl="per_direction"), retrieval_metrics(sim, dsl="published")
    assert ours["t2v_dsl"] == published["t2v_dsl"]
    assert published["v2t_dsl"] == published["v2t"] and ours["v2t_dsl"] != ours["v2t"]
    transposed = retrieval_metrics(sim.T, dsl="per_direction")
    assert (ours["v2t"], ours["v2t_dsl"]) == (transposed["t2v"], transposed["t2v_dsl"])


def test_dual_softmax_of_a_hand_made_matrix() -> None:
    sim = np.array([[0.50, 0.49, 0.0], [0.60, 0.55, 0.0], [0.0, 0.0, 0.3]])
    assert ranks_of(sim, np.arange(3)).tolist() == [1, 2, 1]  # text 1 prefers video 0
    # but video 0 is even closer to text 1 than to text 0: e^10 to 1 down its column, e^6 to 1 down that of video 1
    over_texts = dual_softmax(sim, axis=0)
    assert over_texts[0, 0] == pytest.approx(0.5 / (1 + np.exp(10)), rel=1e-9)
    assert over_texts[1, 1] == pytest.approx(0.55 / (1 + np.exp(-6)), rel=1e-9)
    assert over_texts[2, 2] == pytest.approx(0.3, rel=1e-9)


def listed_ranks(sim: np.ndarray) -> np.ndarray:
    """Return ranks as the reference does: one per position whose value equals that of the query's answer."""
    descending = np.sort(-sim, axis=1)
    return np.where(descending == -np.diag(sim)[:, None])[1] + 1.0


def published_dual_softmax(sim: np.ndarray) -> np.ndarray:
    """Compute in float32 as the reference does, where more values tie than in float64."""
    weights = np.exp(np.float32(100) * sim - (np.float32(100) * sim).max(axis=0))
    return sim * (weights / weights.sum(axis=0))


@pytest.mark.parametrize("case", SQUARE)
def test_published_numbers_list_tied_queries_several_times(case: str) -> None:
    """Published entries have our ranks, but list a query once per equal value where values tie."""
    sim = tensors("metrics", "metrics.safetensors")[f"{case}/sim"].numpy()
    dsl = published_dual_softmax(sim)
    published = numbers("metrics", "metrics.json")[case]
    for direction, matrix in {"t2v": sim, "v2t": sim.T, "t2v_dsl": dsl, "v2t_dsl": dsl.T}.items():
        listed = listed_ranks(matrix)
        assert_metrics(evaluate.summarise(listed), published["xpretrain"][direction])
        if direction in published["clip4clip"]:
            assert_percent(evaluate.summarise(listed), published["clip4clip"][direction])
            assert len(listed) == published["clip4clip"][direction]["ranks_listed"]


@pytest.mark.parametrize("case", TIED)
def test_a_query_has_one_rank_where_the_reference_counts_several(case: str) -> None:
    """Both rules agree without ties; with ties, the published totals are divided by the longer list."""
    sim = tensors("metrics", "metrics.safetensors")[f"{case}/sim"]
    published = numbers("metrics", "metrics.json")[case]["clip4clip"]
    ours = retrieval_metrics(sim)
    for direction in ("t2v", "v2t"):
        listed, num_queries = published[direction]["ranks_listed"], ours[direction]["num_queries"]
        assert num_queries == len(sim) <= listed
        if num_queries < listed:
            assert ours[direction]["meanr"] != pytest.approx(published[direction]["MeanR"])
            assert ours[direction]["r1"] != pytest.approx(published[direction]["R1"] / 100)
        else:
            assert_percent(ours[direction], published[direction])


def test_tie_rules_bound_each_other_and_a_constant_matrix_shows_them() -> None:
    constant = tensors("metrics", "metrics.safetensors")["ties_constant/sim"]
    by_rule = {ties: retrieval_metrics(constant, ties=ties)["t2v"] for ties in ("pessimistic", "mean", "optimistic")}
    assert by_rule["pessimistic"]["r1"] == by_rule["pessimistic"]["r10"] == 0
    assert [by_rule[ties]["meanr"] for ties in by_rule] == [20.0, 10.5, 1.0]
    assert by_rule["optimistic"]["r1"] == 1  # hence the pessimistic default: a constant model scores 100 % here


def test_several_captions_per_video_equal_the_reference() -> None:
    data = tensors("metrics", "metrics.safetensors")
    published = numbers("metrics", "metrics.json")["multi"]
    sim, owner = data["multi/sim"], data["multi/video_of_sentence"]
    assert np.bincount(owner).tolist() == published["captions_per_video"]
    ours = retrieval_metrics(sim, owner, dsl="published")
    assert_metrics(ours["t2v"], published["xpretrain_compute_metrics_multi"]["t2v"])
    assert_metrics(ours["t2v_dsl"], published["xpretrain_compute_metrics_multi"]["t2v_dsl"])
    for direction in ("t2v", "v2t"):
        assert_percent(ours[direction], published["clip4clip"][direction])
        assert ours[direction]["num_queries"] == {"t2v": len(sim), "v2t": 40}[direction]
    ranks = ranks_of(sim.numpy(), owner.numpy())
    assert np.std(ranks) == pytest.approx(published["clip4clip"]["t2v"]["Std_Rank"])
    nearest = evaluate._nearest_of_group(sim.numpy(), owner.numpy())
    assert np.array_equal(nearest.T, data["multi/v2t_sim_max"].float().numpy())


def test_the_median_of_an_even_number_of_ranks_is_the_mean_of_the_middle_two() -> None:
    """CLIP4Clip's multi-caption evaluation takes torch's median, the lower one."""
    ranks = np.array([1.0, 2.0, 5.0, 9.0])
    assert evaluate.summarise(ranks)["medr"] == 3.5
    assert torch.from_numpy(ranks).median() == 2


def test_chance_is_what_random_similarities_give_on_average() -> None:
    generator = np.random.default_rng(0)
    owner = np.repeat(np.arange(12), generator.integers(1, 6, 12))  # groups of unlike sizes
    draws = [retrieval_metrics(generator.normal(size=(len(owner), 12)), owner) for _ in range(400)]
    for direction in ("t2v", "v2t"):
        expected = chance(12)
        for key in ("r1", "r5", "r10", "meanr"):
            mean = np.mean([draw[direction][key] for draw in draws])
            assert mean == pytest.approx(expected[key], rel=0.05), (direction, key)
        assert np.mean([draw[direction]["medr"] for draw in draws]) == pytest.approx(expected["medr"], rel=0.05)
    assert chance(3)["r5"] == 1


def test_ids_decide_and_not_positions() -> None:
    data = tensors("metrics", "metrics.safetensors")
    sim, owner = data["multi/sim"].numpy(), data["multi/video_of_sentence"].numpy()
    generator = np.random.default_rng(0)
    texts, videos = generator.permutation(len(sim)), generator.permutation(sim.shape[1])
    where = np.argsort(videos)
    shuffled = retrieval_metrics(sim[texts][:, videos], where[owner[texts]])
    assert shuffled == retrieval_metrics(sim, owner)


def test_a_video_without_text_competes_but_does_not_ask() -> None:
    sim = np.array([[0.5, 0.1, 0.9], [0.2, 0.6, 0.3]])
    metrics = retrieval_metrics(sim, [0, 1])
    assert metrics["t2v"]["r1"] == 0.5 and metrics["t2v"]["meanr"] == 1.5
    assert metrics["v2t"]["num_queries"] == 2 and metrics["v2t"]["r1"] == 1


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_ranks_equal_counting_and_do_not_depend_on_the_chunks(num_texts: int, num_videos: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    sim = generator.integers(0, 4, (num_texts, num_videos)).astype(np.float32)
    owner = generator.integers(0, num_videos, num_texts)
    ranks = ranks_of(sim, owner)
    for row, video, rank in zip(sim, owner, ranks, strict=True):
        assert rank == sum(value >= row[video] for value in row)
    whole = evaluate._CHUNK
    try:
        evaluate._CHUNK = 3
        assert np.array_equal(ranks_of(sim, owner), ranks)
    finally:
        evaluate._CHUNK = whole


def test_tensors_of_any_precision_are_taken() -> None:
    sim = torch.eye(12)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert retrieval_metrics(sim.to(dtype).requires_grad_())["t2v"]["r1"] == 1


def test_wrong_matrices_are_named() -> None:
    for arguments, words in (
        ((np.zeros((2, 3)),), "text_to_video"),
        ((np.zeros((2, 3)), [0, 3]), "column 3"),
        ((np.zeros((2, 3)), [0]), "2 integers"),
        ((np.full((2, 2), np.nan),), "NaN"),
        ((np.zeros((0, 0)),), "texts, videos"),
    ):
        with pytest.raises(UserError, match=words):
            retrieval_metrics(*arguments)
    with pytest.raises(UserError, match="pessimistic"):
        retrieval_metrics(np.eye(2), ties="kind")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_blocks_of_any_size_have_the_metrics_of_the_whole_matrix(data: st.DataObject) -> None:
    """Texts repeat, videos may have several or none, and features repeat, so that there are ties."""
    num_videos = data.draw(st.integers(1, 9))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    owner = generator.integers(0, num_videos, data.draw(st.integers(1, 20)))
    distinct = generator.integers(0, 6, len(owner))
    text_UD, video_ND = (
        torch.nn.functional.normalize(torch.from_numpy(generator.integers(-1, 2, (n, 3)) + 0.5).float(), dim=1)
        for n in (6, num_videos)
    )
    whole = ((text_UD.double() @ video_ND.double().T).float())[distinct].numpy()
    blocks = CosineBlocks(text_UD, torch.from_numpy(distinct), video_ND)
    for dsl in (None, "per_direction", "published"):
        expected = whole_matrix_metrics(whole, owner, dsl)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "_BLOCK", data.draw(st.integers(1, 200)))
            assert retrieval_metrics(blocks, owner, dsl=dsl) == expected
            assert retrieval_metrics(whole, owner, dsl=dsl) == expected


def whole_matrix_metrics(sim: np.ndarray, owner: np.ndarray, dsl: str | None) -> dict[str, Any]:
    """Rank a whole matrix in one piece, as the definition says."""

    def of(matrix: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
        asked = np.unique(owner)
        nearest = np.stack([matrix[owner == video].max(axis=0)[asked] for video in asked])
        forth = [(row >= row[own]).sum() for row, own in zip(matrix, owner, strict=True)]
        back = [(column >= column[own]).sum() for own, column in enumerate(nearest.T)]
        return evaluate.summarise(np.array(forth, float)), evaluate.summarise(np.array(back, float))

    metrics = dict(zip(("t2v", "v2t"), of(sim), strict=True))
    if dsl is not None:
        metrics["t2v_dsl"] = of(dual_softmax(sim, axis=0))[0]
        metrics["v2t_dsl"] = of(dual_softmax(sim, axis=0 if dsl == "published" else 1))[1]
    return metrics


def test_ranking_never_makes_the_whole_matrix() -> None:
    shapes = []

    class Watched(CosineBlocks):
        def row_blocks(self):
            yield from self.watched(super().row_blocks())

        def column_blocks(self):
            yield from self.watched(super().column_blocks())

        def watched(self, blocks):
            for part, block in blocks:
                shapes.append(block.size)
                yield part, block

    features = torch.nn.functional.normalize(torch.randn(4000, 8), dim=1)
    retrieval_metrics(Watched(features, torch.arange(4000), features))
    assert max(shapes) <= evaluate._BLOCK < 4000**2 and sum(shapes) == 2 * 4000**2
