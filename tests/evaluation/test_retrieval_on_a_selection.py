"""Retrieval evaluation on real clips of a packed corpus: its queries, its results and the clips it leaves out."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors import safe_open

from clipmill.base.errors import UserError
from tests.helpers.evaluations import (
    ALONE,
    damage,
    packed_corpus,
    selected,
    small_clip4clip,
    small_model,
    small_settings,
)
from training.data.loader import Loader
from training.data.reader_pool import Request
from training.data.sample_reader import SampleReader
from training.data.selection import Selection
from training.evaluation.metrics import retrieval_metrics
from training.evaluation.retrieval import EvalFeatures, evaluate, features, queries
from training.models.encode import normalise, text_encoder


@pytest.fixture(scope="module")
def selection(tmp_path_factory) -> Selection:
    """Freeze a selection in which clip .5 has the text of .4, .7 has no text and .8 no caption."""
    sql = """
        UPDATE clips SET text = (SELECT text FROM clips WHERE n = 4) WHERE n = 5;
        UPDATE clips SET text = ' ' WHERE n = 7;
        DELETE FROM captions WHERE clip_id LIKE '%.8';
    """
    return selected(packed_corpus(tmp_path_factory.mktemp("eval") / "corpus", 12, sql))


def clip(made: EvalFeatures, n: int) -> int:
    """Return the row of clip .n among the candidates."""
    return next(row for row, clip_id in enumerate(made.clip_ids) if clip_id.endswith(f".{n}"))


def test_features_are_those_of_every_clip_and_text_encoded_alone(selection: Selection) -> None:
    model, settings = small_model(), small_settings()
    made = features(model, selection, settings, ALONE)
    encoder = text_encoder(model.config, 24)
    reader = SampleReader(selection, settings.data, encoder, 32, train=False)
    by_id = {clip_id: row for row, clip_id in enumerate(selection.column("clip_id").to_pylist())}
    table = selection.take(range(12)).to_pylist()
    requests = [Request(np.array([by_id[clip_id]]), 0) for clip_id in made.clip_ids]
    with torch.no_grad(), Loader(reader, num_processes=0) as loader:
        for feature, batch in zip(made.video_ND, loader.read(requests), strict=True):
            video = normalise(batch.video_BT3SS)
            torch.testing.assert_close(feature, model.encode_video(video)[0], rtol=0, atol=1e-6)
        for text, feature, video in zip(made.texts, made.text_MD, made.text_to_video_M, strict=True):
            torch.testing.assert_close(feature, model.encode_text(encoder([text]))[0], rtol=0, atol=1e-6)
            assert table[by_id[made.clip_ids[video]]]["subtitle"] == text
    assert len(made.clip_ids) == len(set(made.clip_ids)) == 12 and not made.failures
    assert made.video_ND.dtype == made.text_MD.dtype == torch.float32
    torch.testing.assert_close(made.similarity_MN, made.text_MD @ made.video_ND.T, rtol=0, atol=1e-6)


def test_evaluation_takes_the_evenly_spaced_frames_and_never_jitters(selection: Selection) -> None:
    model = small_model()
    plain = features(model, selection, small_settings("data.jitter=false"), ALONE)
    jittered = features(model, selection, small_settings("data.jitter=true", "data.seed=7"), ALONE)
    assert torch.equal(plain.video_ND, jittered.video_ND)


def test_the_metrics_are_those_of_the_features(selection: Selection) -> None:
    model, settings = small_model(), small_settings()
    metrics, made = evaluate(model, selection, settings, ALONE), features(model, selection, settings, ALONE)
    expected = retrieval_metrics(made.text_MD @ made.video_ND.T, made.text_to_video_M)
    for direction in ("t2v", "v2t"):
        assert metrics[direction]["num_queries"] == expected[direction]["num_queries"] == 11
        assert metrics["chance"][direction]["r1"] == 1 / {"t2v": 12, "v2t": 11}[direction]
    assert set(metrics) >= {"t2v", "v2t", "chance"} and "t2v_dsl" not in metrics
    assert {"t2v_dsl", "v2t_dsl"} < set(evaluate(model, selection, settings, ALONE, dsl="per_direction"))
    json.dumps(metrics)


def test_a_clip_without_text_is_found_but_does_not_ask(selection: Selection) -> None:
    metrics, made = (function(small_model(), selection, small_settings(), ALONE) for function in (evaluate, features))
    assert metrics["num_videos"] == 12 and metrics["num_texts"] == 11 and metrics["num_without_text"] == 1
    assert clip(made, 7) not in made.text_to_video_M
    captioned = evaluate(small_model(), selection, small_settings("eval.text=caption"), ALONE)
    assert (captioned["text"], captioned["num_texts"], captioned["num_without_text"]) == ("caption", 11, 1)


def test_the_same_sentence_of_two_clips_is_exactly_as_near_and_counts_against_both(selection: Selection) -> None:
    metrics, made = (function(small_model(), selection, small_settings(), ALONE) for function in (evaluate, features))
    [text] = [text for text, count in Counter(made.texts).items() if count > 1]
    first, second = (row for row, other in enumerate(made.texts) if other == text)
    assert {int(made.text_to_video_M[row]) for row in (first, second)} == {clip(made, 4), clip(made, 5)}
    assert torch.equal(made.similarity_MN[first], made.similarity_MN[second])
    assert metrics["num_repeated_texts"] == 2
    # from video to text, each of the two clips has two equally similar texts, so neither can be first
    perfect = torch.eye(12)[made.text_to_video_M]
    perfect[[first, second]] = perfect[first] + perfect[second]
    assert retrieval_metrics(perfect, made.text_to_video_M)["v2t"]["r1"] == 9 / 11


def test_texts_that_are_the_same_to_the_model_are_exactly_as_near(tmp_path: Path) -> None:
    """They differ in case, punctuation, unknown words or only behind the cut."""
    sql = """
        UPDATE clips SET text = 'Red, blue!' WHERE n = 1;
        UPDATE clips SET text = 'red blue' WHERE n = 2;
        UPDATE clips SET text = 'red zebra' WHERE n = 3;
        UPDATE clips SET text = 'red giraffe' WHERE n = 4;
        UPDATE clips SET text = repeat('sea ', 30) || 'left' WHERE n = 5;
        UPDATE clips SET text = repeat('sea ', 30) || 'right' WHERE n = 6;
    """
    selection = selected(packed_corpus(tmp_path / "corpus", 9, sql))
    metrics, made = (
        function(small_model(), selection, small_settings("eval.batch_size=2"), ALONE)
        for function in (evaluate, features)
    )
    asked = {made.clip_ids[video].rpartition(".")[2]: row for row, video in enumerate(made.text_to_video_M)}
    for one, other in (("1", "2"), ("3", "4"), ("5", "6")):
        assert torch.equal(made.similarity_MN[asked[one]], made.similarity_MN[asked[other]])
    assert metrics["num_repeated_texts"] == 6 and len(made.distinct_M.unique()) == 6


def test_several_texts_of_a_clip_are_asked_one_by_one() -> None:
    lists = pa.chunked_array([[["one", "two"], None, []], [["three", "", " "], ["four", None]]])
    rows, texts = queries(lists)
    assert rows.tolist() == [0, 0, 3, 4] and texts == ["one", "two", "three", "four"]
    rows, texts = queries(pa.chunked_array([["a", None, "", "b"]]))
    assert rows.tolist() == [0, 3] and texts == ["a", "b"]


def test_an_unreadable_clip_is_left_out_counted_and_reported(tmp_path: Path) -> None:
    corpus = packed_corpus(tmp_path / "corpus", 12)
    selection, model = selected(corpus), small_model()
    whole = features(model, selection, small_settings(), ALONE)
    broken = {damage(corpus, selection, row) for row in (0, 7)}
    made = features(model, selection, small_settings(), ALONE)
    assert {failure["clip_id"] for failure in made.failures} == broken
    assert all(failure["error_class"] and failure["message"] for failure in made.failures)
    kept = [row for row, clip_id in enumerate(whole.clip_ids) if clip_id not in broken]
    assert made.clip_ids == [whole.clip_ids[row] for row in kept]
    torch.testing.assert_close(made.video_ND, whole.video_ND[kept], rtol=0, atol=1e-6)
    assert len(made.texts) == 10
    for text, video in zip(made.texts, made.text_to_video_M, strict=True):
        asked = {t: whole.clip_ids[v] for t, v in zip(whole.texts, whole.text_to_video_M, strict=True)}
        assert asked[text] == made.clip_ids[video]
    metrics = evaluate(model, selection, small_settings(), ALONE)
    assert (metrics["num_videos"], metrics["num_failures"]) == (10, 2)
    assert [failure["clip_id"] for failure in metrics["failures"]] == [f["clip_id"] for f in made.failures]


def test_an_empty_ranking_is_reported(tmp_path: Path) -> None:
    corpus = packed_corpus(tmp_path / "corpus", 3, "UPDATE clips SET text = ''")
    selection = selected(corpus)
    with pytest.raises(UserError, match="eval.text = 'subtitle'.*3 could be read"):
        evaluate(small_model(), selection, small_settings(), ALONE)
    for row in range(3):
        damage(corpus, selection, row)
    with pytest.raises(UserError, match="0 could be read and 3 could not"):
        evaluate(small_model(), selection, small_settings("eval.text=caption"), ALONE)


@pytest.mark.parametrize("head", ["meanP", "seqLSTM", "seqTransf", "tightTransf"])
def test_clip4clip_heads_rank_by_their_own_similarity(selection: Selection, head: str) -> None:
    """Frames and texts are encoded once; tightTransf then scores every pair, the others compare a vector per video."""
    model, settings = small_clip4clip(head).eval(), small_settings()
    made = features(model, selection, settings, ALONE)
    reader = SampleReader(selection, settings.data, text_encoder(model.config, 24), 32, train=False)
    with torch.no_grad(), Loader(reader, num_processes=0) as loader:
        [batch] = loader.read([Request(np.arange(12), 0)])
        frames = model.frame_features(normalise(batch.video_BT3SS))
        texts = model.text_features(text_encoder(model.config, 24)(made.texts))
        scores = model.similarity(texts, frames)
    by_id = {clip_id: row for row, clip_id in enumerate(selection.column("clip_id").to_pylist())}
    scores = scores[:, [by_id[clip_id] for clip_id in made.clip_ids]]
    scale = 1 if head == "tightTransf" else model.logit_scale.exp().item()
    torch.testing.assert_close(made.similarity_MN * scale, scores, rtol=1e-5, atol=1e-5)
    assert made.video_ND.shape == ((12, 4, 16) if head == "tightTransf" else (12, 16))


def test_the_model_is_left_as_it_was(selection: Selection) -> None:
    model = small_model()
    for training in (True, False):
        model.train(training)
        evaluate(model, selection, small_settings(), ALONE)
        assert model.training is training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_loader_processes_change_nothing(selection: Selection) -> None:
    model = small_model()
    seen = []
    alone = features(model, selection, small_settings(), ALONE)
    together = features(
        model,
        selection,
        small_settings("data.loader_processes=2"),
        ALONE,
        lambda done, total: seen.append((done, total)),
    )
    assert torch.equal(alone.video_ND, together.video_ND) and alone.clip_ids == together.clip_ids
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_bf16_stays_near_and_gives_unit_vectors(selection: Selection) -> None:
    model = small_model()
    exact = features(model, selection, small_settings(), ALONE)
    half = features(model, selection, small_settings("train.precision=bf16"), ALONE)
    for name in ("video_ND", "text_MD"):
        torch.testing.assert_close(getattr(half, name), getattr(exact, name), rtol=0, atol=0.05)
        torch.testing.assert_close(
            getattr(half, name).norm(dim=1), torch.ones(len(getattr(half, name))), atol=1e-5, rtol=0
        )


def test_saved_similarities_open_without_pickles(selection: Selection, tmp_path: Path) -> None:
    model, settings = small_model(), small_settings()
    made = features(model, selection, settings, ALONE)
    for name in ("sim.npz", "sim.safetensors"):
        evaluate(model, selection, settings, ALONE, save_similarity=tmp_path / "new" / name)
    with np.load(tmp_path / "new" / "sim.npz", allow_pickle=False) as saved:
        npz = {key: saved[key] for key in saved.files}
    assert npz["clip_ids"].tolist() == made.clip_ids and npz["texts"].tolist() == made.texts
    with safe_open(tmp_path / "new" / "sim.safetensors", "np") as saved:
        header = {key: json.loads(value) for key, value in saved.metadata().items()}
        tensors = {key: saved.get_tensor(key) for key in saved.keys()}
    assert header == {"clip_ids": made.clip_ids, "texts": made.texts}
    for arrays in (npz, tensors):
        assert np.array_equal(arrays["similarity"], made.similarity_MN.numpy())
        assert np.array_equal(arrays["text_to_video"], made.text_to_video_M.numpy())
    with pytest.raises(UserError, match=r"\.npz or \.safetensors"):
        evaluate(model, selection, settings, ALONE, save_similarity=tmp_path / "sim.csv")
