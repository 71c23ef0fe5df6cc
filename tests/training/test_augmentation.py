"""Augmentation is a function of (seed, step, row): the same in any process and chunk, alike in all frames of a clip."""

import pytest
import torch

from training.data.batch import Batch
from training.optim.augment import RANGE, augment, uniform

NUM_CLIPS = 400


def batch_of(num_clips: int = NUM_CLIPS) -> Batch:
    pixels = torch.randint(0, 256, (1, 3, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = pixels.expand(num_clips, -1, -1, -1, -1)
    ids, there = torch.zeros(num_clips, 3, dtype=torch.long), torch.ones(num_clips, dtype=torch.bool)
    return Batch(torch.arange(num_clips), pixels[:, :2], pixels[:, 2:], ids, ids, there, there, there)


def test_draws_are_uniform_and_of_every_row_its_own():
    draws = uniform(torch.arange(100_000), key=2**64 - 5)
    assert 0 <= draws.min() and draws.max() < 1 and len(draws.unique()) > 99_000
    assert draws.mean().item() == pytest.approx(0.5, abs=0.01) and draws.std().item() == pytest.approx(
        12**-0.5, abs=0.01
    )
    assert not torch.equal(draws, uniform(torch.arange(100_000), key=1))


def test_half_of_the_clips_are_mirrored_all_frames_alike():
    before = batch_of()
    after = augment(before, ["flip"], seed=0, step=3)
    mirrored = [
        torch.equal(clip, other.flip(-1)) for clip, other in zip(after.video_BT3SS, before.video_BT3SS, strict=True)
    ]
    stills = [
        torch.equal(clip, other.flip(-1)) for clip, other in zip(after.frame_B13SS, before.frame_B13SS, strict=True)
    ]
    assert mirrored == stills and 150 < sum(mirrored) < 250
    kept = [torch.equal(clip, other) for clip, other in zip(after.video_BT3SS, before.video_BT3SS, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))


@pytest.mark.parametrize("kind", ["brightness", "contrast"])
def test_light_changes_within_its_range(kind):
    before, after = batch_of(), augment(batch_of(), [kind], seed=0, step=0)
    assert after.video_BT3SS.dtype == torch.uint8
    change = after.video_BT3SS.float() - before.video_BT3SS.float()
    assert 0.5 * RANGE * 128 < change.abs().max() <= RANGE * 255 + 1
    assert len(after.video_BT3SS.flatten(1).unique(dim=0)) > 20, "clips differ"


def test_parts_of_a_batch_get_what_the_whole_gets():
    kinds = ["flip", "brightness", "contrast"]
    whole = augment(batch_of(), kinds, seed=1, step=9)
    parts = [augment(part, kinds, seed=1, step=9) for part in batch_of().split(7)]
    assert torch.equal(whole.video_BT3SS, torch.cat([part.video_BT3SS for part in parts]))
    assert torch.equal(whole.frame_B13SS, torch.cat([part.frame_B13SS for part in parts]))
    other = augment(batch_of(), kinds, seed=1, step=10)
    assert not torch.equal(whole.video_BT3SS, other.video_BT3SS)
