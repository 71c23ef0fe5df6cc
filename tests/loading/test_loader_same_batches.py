"""Batches are the same for any number of processes and ranks, from any step."""

import numpy as np
import pytest
import torch
from psutil import Process

from tests.helpers.loaders import MAX_TOKENS, SIZE, WORDS, assert_all_equal, assert_equal, make_run
from training.data import epoch_files as epochs_module
from training.data.batch import Batch
from training.data.clip_frames import Picture, decode_clip, decode_still
from training.data.epoch_plan import PAD, locate, rank_slots, steps_in_epoch
from training.data.frame_sampling import eval_indices, middle_index, train_indices
from training.data.loader import requests_of
from training.data.range_reader import Range, ShardReader
from training.data.reader_pool import Request
from training.data.tokenizer import TextEncoder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def expected(run):
    """Read batches of slightly more than two epochs in this process."""
    return run.batches(0, 12)


@pytest.mark.parametrize("num_processes", [1, 3])
def test_number_of_processes_changes_nothing(run, expected, num_processes):
    assert_all_equal(run.batches(0, 12, num_processes), expected)


@pytest.mark.parametrize("start", [0, 3, 5, 7])
def test_reading_may_begin_anywhere(run, expected, start):
    assert steps_in_epoch(run.epochs.spec, 0) == 5  # so step 5 starts an epoch
    assert_all_equal(run.batches(start, 12, num_processes=2 * (start % 2)), expected[start:])


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_together_read_the_global_batch(run, expected, world_size):
    slots = [rank_slots(run.epochs.spec, rank, world_size) for rank in range(world_size)]
    shares = [run.batches(0, 4, slots=one) for one in slots]
    for step, whole in enumerate(expected[:4]):
        parts = [share[step] for share in shares]
        for name in ("rows_B", "video_BT3SS", "frame_B13SS", "video_mask_B", "subtitle_mask_B", "caption_mask_B"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
        for name in ("subtitle_BL", "caption_BL"):
            ids = [getattr(part, name) for part in parts]
            length = max(part.shape[1] for part in ids)
            padded = [torch.nn.functional.pad(part, (0, length - part.shape[1])) for part in ids]
            assert torch.equal(torch.cat(padded), getattr(whole, name)), name


def test_every_clip_once_an_epoch(run, expected):
    rows = torch.cat([batch.rows_B for batch in expected[:5]])
    assert sorted(rows.tolist()) == list(range(40))
    assert not torch.equal(rows, torch.cat([batch.rows_B for batch in expected[5:10]]))


def test_resuming_late_costs_no_more_than_beginning(run, monkeypatch):
    planned, write = [], epochs_module.write_epoch
    monkeypatch.setattr(epochs_module, "write_epoch", lambda *a: planned.append(a[2]) or write(*a))
    late = 1_000_000 // 5 * 5
    with run.loader(0) as loader:
        (batch,) = loader.batches(run.epochs, slice(0, 8), late, late + 1)
        assert planned == [200_000] and loader.num_read == 8
    assert locate(run.epochs.spec, late) == (200_000, 0) and len(batch) == 8


def test_a_sample_is_what_the_settings_say(run):
    """The expected sample is put together by hand."""
    (request,) = requests_of(run.epochs, slice(0, 8), 6, 7)
    (batch,) = run.batches(6, 7)
    clips = run.selection.take(request.rows).to_pylist()
    shards, picture = ShardReader(run.selection.root), Picture(SIZE)
    encode = TextEncoder(WORDS, MAX_TOKENS)
    assert request.epoch == 1
    for slot, clip in enumerate(clips):
        (data,) = shards.read([Range(clip["shard"], clip["mp4_offset"], clip["mp4_bytes"])])
        total = clip["num_frames"]
        indices = train_indices(total, 4, seed=run.data.seed, epoch=1, clip_id=clip["clip_id"])
        frames = decode_clip(data, lambda n, indices=indices: indices, picture)
        assert torch.equal(batch.video_BT3SS[slot].permute(0, 2, 3, 1), torch.from_numpy(frames))
        still = decode_clip(data, lambda n: [middle_index(n)], picture)
        assert torch.equal(batch.frame_B13SS[slot].permute(0, 2, 3, 1), torch.from_numpy(still))
        for text, ids_BL, mask_B in (
            (clip["subtitle"], batch.subtitle_BL, batch.subtitle_mask_B),
            (clip["caption"], batch.caption_BL, batch.caption_mask_B),
        ):
            assert bool(mask_B[slot]) == bool(text)
            ids = encode([text or ""])[0]
            assert torch.equal(ids_BL[slot], ids[: ids_BL.shape[1]]) and not ids[ids_BL.shape[1] :].any()


def test_without_jitter_every_epoch_sees_the_same_frames(run):
    row = np.array([7])
    for reader in (run.reader(jitter=False), run.reader(train=False)):
        first, later = (reader.read(row, epoch).batch() for epoch in (0, 1))
        assert_equal(first, later)
        clip = run.selection.take(row).to_pylist()[0]
        (data,) = ShardReader(run.selection.root).read([Range(clip["shard"], clip["mp4_offset"], clip["mp4_bytes"])])
        frames = decode_clip(data, lambda n: eval_indices(n, 4), Picture(SIZE))
        assert torch.equal(first.video_BT3SS[0].permute(0, 2, 3, 1), torch.from_numpy(frames))


def test_the_still_frame_may_be_the_captioned_one(run):
    reader = run.reader(still="captioned")
    part = reader.read(np.array([3]), 0)
    clip = run.selection.take([3]).to_pylist()[0]
    (data,) = ShardReader(run.selection.root).read([Range(clip["shard"], clip["jpg_offset"], clip["jpg_bytes"])])
    still = torch.from_numpy(decode_still(data, Picture(SIZE)))
    assert torch.equal(part.batch().frame_B13SS[0, 0].permute(1, 2, 0), still)
    middle = run.reader().read(np.array([3]), 0).batch()
    assert not torch.equal(middle.frame_B13SS, part.batch().frame_B13SS)
    assert torch.equal(middle.video_BT3SS, part.batch().video_BT3SS)


def test_the_text_column_is_a_setting(run):
    rows = np.arange(6)
    by_subtitle, by_caption = (run.reader(subtitle=name).read(rows, 0).batch() for name in ("subtitle", "caption"))
    assert torch.equal(by_caption.subtitle_BL, by_caption.caption_BL)
    assert torch.equal(by_subtitle.caption_BL, by_caption.caption_BL)


def test_holes_of_the_plan_stay_empty(run):
    rows = np.array([4, PAD, 9, PAD], np.uint32)
    for num_processes in (0, 2):
        with run.loader(num_processes) as loader:
            (batch,) = loader.read([Request(rows, 0)])
        assert batch.rows_B.tolist() == [4, -1, 9, -1]
        assert batch.video_mask_B.tolist() == [True, False, True, False]
        assert not batch.subtitle_mask_B[1] and not batch.caption_mask_B[1]
        assert not batch.video_BT3SS[1].any() and not batch.frame_B13SS[3].any()
        assert batch.video_BT3SS[0].any()


def test_texts_are_as_long_as_the_longest(run, expected):
    for batch in expected:
        for ids_BL in (batch.subtitle_BL, batch.caption_BL):
            ends = ids_BL.argmax(dim=1)
            assert int(ends.max()) == ids_BL.shape[1] - 1
            assert ids_BL.shape[1] <= MAX_TOKENS


def test_a_batch_may_be_small_or_uneven(run):
    requests = [Request(np.arange(n, dtype=np.uint32), 0) for n in (1, 7, 3, 20, 2)]
    with run.loader(0) as alone, run.loader(2, prefetch=4) as together:
        assert_all_equal(list(together.read(requests)), list(alone.read(requests)))


def test_evaluation_and_training_share_a_loader_in_turn(run, expected):
    with run.loader(2) as loader:
        for batch in loader.batches(run.epochs, slice(0, 8), 0, 9):
            assert_equal(batch, expected[0])
            break
        assert_all_equal(list(loader.batches(run.epochs, slice(0, 8), 2, 5)), expected[2:5])


@pytest.mark.parametrize("num_processes", [0, 2])
def test_no_shard_stays_open_when_it_ends(run, num_processes):
    before = open_shards()
    with run.loader(num_processes) as loader:
        next(loader.batches(run.epochs, slice(0, 8), 0, 5))
    assert open_shards() <= before


def open_shards() -> int:
    """Return the number of shards that this process holds open, including those of other tests."""
    return sum(file.path.endswith(".tar") for file in Process().open_files())


def test_the_waiting_time_is_reported(run):
    with run.loader(2) as loader:
        list(loader.batches(run.epochs, slice(0, 8), 0, 5))
        assert loader.times.decode_s > 0 and loader.times.read_s > 0 and loader.times.wait_s > 0
        assert loader.num_read == 40


def test_pixels_lie_as_a_gpu_copies_them(run):
    """Each array is dense, so that one copy suffices; permuting back to channels last is a view."""
    (batch,) = run.batches(0, 1)
    assert isinstance(batch, Batch)
    assert batch.video_BT3SS.permute(0, 1, 3, 4, 2).is_contiguous()
    assert batch.frame_B13SS.permute(0, 1, 3, 4, 2).is_contiguous()
    assert batch.video_BT3SS.shape == (8, 4, 3, SIZE, SIZE) and batch.video_BT3SS.dtype == torch.uint8


@pytest.mark.parametrize("num_processes", [0, 2])
def test_a_batch_that_is_kept_stays_as_it_is(run, expected, num_processes):
    """Memory is reused only when no part of its batch is referenced."""
    kept, copies = [], []
    with run.loader(num_processes) as loader:
        for step, batch in enumerate(loader.batches(run.epochs, slice(0, 8), 0, 12)):
            if step % 3 == 0:
                kept.append(batch.video_BT3SS[2, 1:, 0])  # a view of a view
                copies.append(kept[-1].clone())
            assert_equal(batch, expected[step])
            del batch
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


def test_memory_is_used_again(run):
    with run.loader(0) as loader:
        places = [
            batch.video_BT3SS.data_ptr() for batch in loader.batches(run.epochs, slice(0, 8), 0, 12) for _ in range(1)
        ]
    assert len(set(places)) <= 3
