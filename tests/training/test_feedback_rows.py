"""Training feedback per clip: correct numbers, one count per visit, the same on many processes, joinable by SQL."""

import os
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from shards.query.sql import open_manifest
from tests.helpers.ranks import run_ranks
from tests.helpers.shards import make_corpus, pack
from training.clip_feedback import Feedback, row_feedback
from training.data.batch import Batch
from training.data.selection import Selection, freeze

NUM_CLIPS, BATCH, DIM = 10, 6, 4
SCALE = torch.tensor(2.0)


def features(step: int, source: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + source)
    return normalize(torch.empty(BATCH, DIM).normal_(generator=generator), dim=1)


def batch_of(step: int) -> Batch:
    """Make a batch of six of the ten clips in any order; slot 1 is unreadable and slot 2 empty by plan."""
    rows = torch.randperm(NUM_CLIPS, generator=torch.Generator().manual_seed(step))[:BATCH]
    rows[2] = -1
    nothing = torch.zeros(BATCH, 1)
    masks = torch.ones(3, BATCH, dtype=torch.bool)
    masks[:, 1] = masks[:, 2] = False
    masks[1, 3] = masks[2, 4] = False  # one clip without subtitle, one without caption
    masks[1:, 5] = False  # and one without either
    return Batch(rows, nothing, nothing, nothing, nothing, *masks)


def add(feedback: Feedback, step: int, slots: slice = slice(0, BATCH)) -> None:
    batch = batch_of(step)
    part = Batch(*(getattr(batch, name)[slots] for name in batch.__dataclass_fields__))
    feedback.add(part, *(features(step, source)[slots] for source in range(3)), SCALE)


def table(feedback: Feedback, selection: Selection, path: Path) -> dict[str, dict[str, Any]]:
    feedback.write(path, selection)
    return {row.pop("clip_id"): row for row in pq.read_table(path).to_pylist()}


def expected(steps: list[int], ids: list[str]) -> dict[str, dict[str, Any]]:
    """Compute the table clip by clip with plain loops."""
    rows: dict[str, dict[str, Any]] = {}
    losses: dict[str, list[float]] = {}
    for step in steps:
        batch, (video, *texts) = batch_of(step), (features(step, source) for source in range(3))
        for slot in torch.nonzero(batch.video_mask_B).flatten().tolist():
            clip_id = ids[batch.rows_B[slot]]
            row = rows.setdefault(
                clip_id, {"times_seen": 0, "subtitle_similarity": None, "caption_similarity": None, "loss": None}
            )
            row["times_seen"] += 1
            of_texts = []
            for name, text, mask in zip(
                ("subtitle", "caption"), texts, (batch.subtitle_mask_B, batch.caption_mask_B), strict=True
            ):
                if mask[slot]:
                    present = torch.nonzero(mask & batch.video_mask_B).flatten()
                    logits = SCALE.exp() * video[slot] @ text[present].T
                    target = (present == slot).nonzero().flatten()
                    of_texts.append(cross_entropy(logits[None], target).item())
                    row[f"{name}_similarity"] = pytest.approx((video[slot] @ text[slot]).item(), abs=1e-5)
            if of_texts:
                losses.setdefault(clip_id, []).append(float(np.mean(of_texts)))
                row["loss"] = pytest.approx(float(np.mean(losses[clip_id])), rel=1e-4)
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", NUM_CLIPS)
    pack(root)
    return root


@pytest.fixture(scope="module")
def selection(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Selection:
    path = tmp_path_factory.mktemp("run") / "selection.arrow"
    freeze(path, corpus)
    return Selection(path)


@pytest.fixture
def ids(selection: Selection) -> list[str]:
    return selection.column("clip_id").to_pylist()


def test_the_table_is_what_plain_loops_give(selection: Selection, ids: list[str], tmp_path: Path) -> None:
    feedback = Feedback(NUM_CLIPS)
    for step in range(5):
        add(feedback, step)
        if step in (1, 2):
            feedback.collect()
    feedback.collect()
    assert table(feedback, selection, tmp_path / "feedback.parquet") == expected([0, 1, 2, 3, 4], ids)


def test_many_steps_between_two_checkpoints(selection: Selection, ids: list[str], tmp_path: Path) -> None:
    """There are more steps than are kept on the device."""
    feedback = Feedback(NUM_CLIPS)
    for step in range(300):
        add(feedback, step)
    feedback.collect()
    assert table(feedback, selection, tmp_path / "feedback.parquet") == expected(list(range(300)), ids)


def test_steps_taken_again_after_a_resume_are_not_counted_twice(
    selection: Selection, ids: list[str], tmp_path: Path
) -> None:
    first = Feedback(NUM_CLIPS)
    add(first, 0)
    add(first, 1)
    first.collect()
    first.save(tmp_path / "feedback.npz")
    add(first, 2)
    first.collect()  # steps after the checkpoint are lost with the process
    second = Feedback(NUM_CLIPS)
    second.load(tmp_path / "feedback.npz")
    for step in (2, 3):
        add(second, step)
    second.collect()
    assert table(second, selection, tmp_path / "feedback.parquet") == expected([0, 1, 2, 3], ids)


def test_a_source_that_was_not_encoded_has_nothing(selection: Selection) -> None:
    batch = batch_of(0)
    masks = (batch.video_mask_B, batch.subtitle_mask_B, batch.caption_mask_B)
    both = row_feedback(*(features(0, source) for source in range(3)), *masks, SCALE)
    only = row_feedback(features(0, 0), features(0, 1), None, *masks, SCALE)
    assert only.caption_similarity.isnan().all()
    torch.testing.assert_close(only.subtitle_similarity, both.subtitle_similarity, equal_nan=True)
    assert only.loss.isnan().tolist() == both.subtitle_similarity.isnan().tolist()


def test_features_of_missing_rows_may_be_anything() -> None:
    batch = batch_of(0)
    masks = (batch.video_mask_B, batch.subtitle_mask_B, batch.caption_mask_B)
    clean = row_feedback(*(features(0, source) for source in range(3)), *masks, SCALE)
    video, subtitle, caption = (features(0, source) for source in range(3))
    video[1] = subtitle[3] = caption[4] = torch.nan
    torch.testing.assert_close(row_feedback(video, subtitle, caption, *masks, SCALE), clean, equal_nan=True)


def test_sql_joins_the_table_with_the_corpus(
    corpus: Path, selection: Selection, ids: list[str], tmp_path: Path
) -> None:
    feedback = Feedback(NUM_CLIPS)
    add(feedback, 0)
    feedback.collect()
    path = tmp_path / "feedback.parquet"
    feedback.write(path, selection)
    query = """
        SELECT clip_id, f.times_seen, v.title FROM clips JOIN feedback f USING (clip_id) JOIN videos v USING (video_id)
        WHERE f.loss IS NOT NULL ORDER BY f.subtitle_similarity
    """
    with open_manifest(corpus, {"feedback": path}) as connection:
        rows = connection.execute(query).fetchall()
    assert {row[0] for row in rows} == {
        clip_id for clip_id, row in expected([0], ids).items() if row["loss"] is not None
    }
    with duckdb.connect(str(corpus / "manifest.duckdb"), read_only=True) as connection:
        joined = connection.execute(query.replace("feedback f", f"'{path}' f")).fetchall()
    assert joined == rows


def test_the_table_is_replaced_whole(selection: Selection, tmp_path: Path) -> None:
    feedback = Feedback(NUM_CLIPS)
    path = tmp_path / "feedback.parquet"
    for step in range(2):
        add(feedback, step)
        feedback.collect()
        feedback.write(path, selection)
    assert os.listdir(tmp_path) == ["feedback.parquet"]


def run_rank(rank: int, folder: Path) -> None:
    feedback = Feedback(NUM_CLIPS, dist.group.WORLD)
    for step in range(5):
        add(feedback, step, slice(rank * 3, rank * 3 + 3))
        if step == 2:
            feedback.collect()
    feedback.collect()
    if feedback.is_first:
        feedback.save(folder / "feedback.npz")


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(selection: Selection, ids: list[str], tmp_path: Path) -> None:
    run_ranks(2, run_rank, tmp_path)
    feedback = Feedback(NUM_CLIPS)
    feedback.load(tmp_path / "feedback.npz")
    assert table(feedback, selection, tmp_path / "feedback.parquet") == expected([0, 1, 2, 3, 4], ids)
