"""Texts of neighbouring clips are frozen with the selection and read with the clip by any process."""

import numpy as np
import pytest
import torch

from clipmill.base.errors import UserError
from tests.helpers.loaders import MAX_TOKENS, SIZE, WORDS
from tests.helpers.shards import change_manifest, make_corpus, pack
from training.data.epoch_plan import PAD
from training.data.loader import Loader, Request, SampleReader
from training.data.selection import Selection, freeze_run
from training.data.tokenizer import TextEncoder
from training.run.settings import resolve
from training.settings import DataSettings, EvalSettings


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Make two videos of 30 clips, the second in reverse order; clip 7 of each has no text, 11 is in no shard."""
    root = make_corpus(tmp_path_factory.mktemp("neighbours") / "corpus", 60)
    text = "concat(if(n % 2 = 0, 'red', 'blue'), ' circle ', n, ' ', video_id)"
    change_manifest(root, f"UPDATE clips SET text = if(n = 7, '', {text})")
    pack(root)
    second = "(SELECT max(video_id) FROM videos WHERE video_id IN (SELECT video_id FROM clips))"
    change_manifest(root, f"UPDATE clips SET span_start_s = 1000 - span_start_s WHERE video_id = {second}")
    change_manifest(root, "DELETE FROM samples WHERE clip_id LIKE '%.11'")
    return root


def freeze(folder, corpus, num: int, where: str = "") -> Selection:
    freeze_run(folder, corpus, DataSettings(neighbours=num, where=where), EvalSettings())
    return Selection(folder / "selection.arrow")


def expected(corpus, num: int) -> dict[str, list[str | None]]:
    """Find the neighbours by plain loops over the clips of each video in time order."""
    from shards.query.sql import open_manifest

    sql = (
        "SELECT video_id, clip_id, subtitle FROM samples JOIN clips USING (clip_id, video_id) ORDER BY span_start_s, n"
    )
    with open_manifest(corpus) as connection:
        rows = connection.execute(sql).fetchall()
    found = {}
    for video in {row[0] for row in rows}:
        clips = [row[1:] for row in rows if row[0] == video]
        for place, (clip_id, _) in enumerate(clips):
            around = [at for k in range(1, num + 1) for at in (place - k, place + k)]
            found[clip_id] = [clips[at][1] if 0 <= at < len(clips) else None for at in around]
    return found


def by_id(selection: Selection) -> dict[str, list[str | None]]:
    return dict(zip(selection.column("clip_id").to_pylist(), selection.column("neighbours").to_pylist(), strict=True))


@pytest.mark.parametrize("num", [1, 2])
def test_they_are_the_nearest_in_time_whether_selected_or_not(corpus, tmp_path, num) -> None:
    whole, some = freeze(tmp_path / "a", corpus, num), freeze(tmp_path / "b", corpus, num, where="n % 3 = 0")
    assert by_id(whole) == expected(corpus, num) and len(by_id(whole)) == 58
    assert by_id(some) == {clip: texts for clip, texts in by_id(whole).items() if clip in by_id(some)}
    assert freeze(tmp_path / "c", corpus, 0).column("neighbours").null_count == 58


def test_plain_tars_have_them_by_the_numbers_of_their_clips(corpus, tmp_path) -> None:
    selection = freeze(tmp_path, f"{corpus}/shards/*.tar", 1, where="clip_id NOT LIKE '%.11'")
    texts = by_id(selection)
    first = min(selection.column("video_id").to_pylist())
    assert texts[f"{first}.5"] == [f"red circle 4 {first}", f"red circle 6 {first}"]
    assert texts[f"{first}.0"] == [None, f"blue circle 1 {first}"]


def test_a_batch_has_their_ids_in_every_process(corpus, tmp_path) -> None:
    selection, texts = freeze(tmp_path, corpus, 1), TextEncoder(WORDS, MAX_TOKENS)
    data = DataSettings(num_frames=2, neighbours=1)
    rows = np.append(np.arange(20), PAD).astype(np.uint32)
    batches = []
    for num_processes in (0, 1):
        reader = SampleReader(selection, data, texts, SIZE)
        with Loader(reader, num_processes=num_processes) as loader:
            batches += list(loader.read([Request(rows, 0)]))
    alone, read_apart = batches
    assert torch.equal(alone.neighbour_BNL, read_apart.neighbour_BNL)
    assert torch.equal(alone.neighbour_mask_BN, read_apart.neighbour_mask_BN)
    wanted = [*selection.column("neighbours").to_pylist()[:20], [None, None]]
    assert alone.neighbour_mask_BN.tolist() == [[bool(text) for text in pair] for pair in wanted]
    ids_ML = texts([text or "" for pair in wanted for text in pair])
    length = alone.neighbour_BNL.shape[2]
    assert torch.equal(alone.neighbour_BNL.flatten(0, 1), ids_ML[:, :length]) and not ids_ML[:, length:].any()
    assert [part.neighbour_BNL.shape[:2] for part in alone.split(8)] == [(8, 2), (8, 2), (5, 2)]


def test_evaluation_asks_with_the_own_text_alone(corpus, tmp_path) -> None:
    reader = SampleReader(
        freeze(tmp_path, corpus, 1),
        DataSettings(num_frames=2, neighbours=1),
        TextEncoder(WORDS, MAX_TOKENS),
        SIZE,
        train=False,
    )
    assert reader.read([0, 1], 0).batch().neighbour_mask_BN.shape == (2, 0)


@pytest.mark.parametrize(
    "assignments, words",
    [
        (["train.loss=vs"], "data.neighbours = 1 is for train.loss = mil_nce"),
        (["train.loss=mil_nce", "data.subtitle=caption"], "data.subtitle"),
        (["train.loss=mil_nce", "data.apart=[duplicate]"], "data.apart"),
    ],
)
def test_settings_that_do_not_go_together_are_named(assignments, words) -> None:
    with pytest.raises(UserError, match=words):
        resolve(None, "demo", ["data.neighbours=1", *assignments])
    assert resolve(None, "clip4clip_milnce", []).data.neighbours == 1
