"""Frame indices and resized pixels equal the reference tables; jitter stays in its range."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.base.errors import UserError
from tests.helpers.clip_vip import numbers
from training.data.frame_sampling import (
    eval_indices,
    jitter_ranges,
    middle_index,
    paced_indices,
    resize,
    train_indices,
)
from training.models.encode import CLIP_MEAN, CLIP_STD, normalise


def test_test_mode_indices_equal_the_published_table() -> None:
    table = numbers("schedule", "frames.json")
    for num_taken, rows in table["test_mode"].items():
        for num_frames, expected in rows.items():
            assert eval_indices(int(num_frames), int(num_taken)).tolist() == expected
    for num_frames, expected in table["clips_2x6_test"].items():
        assert eval_indices(int(num_frames), 12).tolist() == expected
    for example in table["float_truncation"]["examples"]:
        assert eval_indices(example["total"], example["n"]).tolist() == example["reference"]


def test_middle_frame_equals_the_published_table() -> None:
    for num_frames, expected in numbers("schedule", "frames.json")["middle_frame"].items():
        assert middle_index(int(num_frames)) == expected


def test_jitter_has_the_published_range_and_reaches_its_ends() -> None:
    for num_taken, rows in numbers("schedule", "frames.json")["train_mode"].items():
        for num_frames, expected in rows.items():
            ranges = jitter_ranges(int(num_frames), int(num_taken))
            assert [list(r) for r in ranges] == [expected["start_range"], expected["end_range"]]
    rows = numbers("schedule", "frames.json")["train_mode"]["12"]
    for num_frames in ("1", "13", "34", "150"):
        drawn = np.stack([train_indices(int(num_frames), 12, seed=0, epoch=0, clip_id=f"v.{i}") for i in range(4000)])
        assert drawn.min(0).tolist() == rows[num_frames]["observed_min"]
        assert drawn.max(0).tolist() == rows[num_frames]["observed_max"]


@given(st.integers(1, 2000), st.sampled_from([1, 2, 3, 12, 32]), st.integers(0, 2**63), st.integers(0, 100))
def test_jittered_indices_are_sorted_within_the_clip_and_span_most_of_it(
    num_frames: int, num_taken: int, seed: int, epoch: int
) -> None:
    indices = train_indices(num_frames, num_taken, seed=seed, epoch=epoch, clip_id="v.0")
    assert indices.shape == (num_taken,) and indices.dtype == np.int64
    assert (np.diff(indices) >= 0).all() and indices[0] >= 0 and indices[-1] < num_frames
    if num_taken >= 3:
        assert indices[-1] - indices[0] + 1 >= num_frames - 2 * (num_frames // (num_taken - 1))


@given(st.integers(1, 3000), st.integers(1, 64))
def test_test_mode_indices_are_sorted_and_span_the_clip(num_frames: int, num_taken: int) -> None:
    indices = eval_indices(num_frames, num_taken)
    assert (np.diff(indices) >= 0).all() and indices[0] == 0
    assert indices[-1] == (num_frames - 1 if num_taken > 1 else 0)


@given(st.integers(1, 3000), st.sampled_from([3.0, 2.5, 12.5, 24.0, 29.97, 1.0, 0.5]), st.integers(1, 64))
def test_paced_indices_are_what_is_shown_at_each_second(num_frames: int, fps: float, most: int) -> None:
    indices = paced_indices(num_frames, fps, frames_per_s=1.0, most=10_000)
    whole_s = np.arange(len(indices))
    assert indices[0] == 0 and indices[-1] < num_frames
    assert (np.abs(indices / fps - whole_s) <= 1 / fps + 1e-6).all() and (indices / fps <= whole_s + 1e-6).all()
    assert len(indices) >= num_frames / fps - 1e-5 > len(indices) - 1 - 1e-5
    thinned = paced_indices(num_frames, fps, frames_per_s=1.0, most=most)
    assert len(thinned) == min(most, len(indices)) and thinned[0] == 0
    assert set(thinned.tolist()) <= set(indices.tolist())


def test_paced_indices_of_clips_at_the_rate_they_are_cut_at() -> None:
    assert paced_indices(10, 3.0, frames_per_s=1.0, most=12).tolist() == [0, 3, 6, 9]
    assert paced_indices(9, 3.0, frames_per_s=1.0, most=12).tolist() == [0, 3, 6]
    assert paced_indices(90, 3.0, frames_per_s=1.0, most=4).tolist() == [0, 27, 57, 87]  # of 30, as published
    assert paced_indices(2, 3.0, frames_per_s=6.0, most=12).tolist() == [0, 0, 1, 1]


def test_the_first_frame_is_always_sampled() -> None:
    assert paced_indices(30, 3.0, frames_per_s=1e-9, most=12).tolist() == [0]


def test_jitter_is_a_function_of_seed_epoch_and_clip() -> None:
    drawn = {
        (seed, epoch, clip): tuple(train_indices(300, 12, seed=seed, epoch=epoch, clip_id=clip))
        for seed in (0, 1)
        for epoch in (0, 1)
        for clip in ("a.0", "a.1")
    }
    assert len(set(drawn.values())) == len(drawn)
    assert drawn[0, 0, "a.0"] == (7, 31, 56, 81, 106, 131, 155, 180, 205, 230, 255, 280)


def test_a_single_jittered_frame_comes_from_anywhere_in_the_clip() -> None:
    drawn = {int(train_indices(5, 1, seed=0, epoch=0, clip_id=str(i))[0]) for i in range(200)}
    assert drawn == {0, 1, 2, 3, 4}


def test_counts_below_one_are_refused() -> None:
    for arguments in ((0, 12), (5, 0)):
        with pytest.raises(UserError, match="at least 1"):
            eval_indices(*arguments)


def picture(height: int, width: int) -> torch.Tensor:
    """Return ramps in three directions, in which any crop, flip or squash is visible."""
    y = torch.linspace(0, 255, height)[:, None].expand(height, width)
    x = torch.linspace(0, 255, width)[None].expand(height, width)
    return torch.stack([y, x, (x + y) / 2]).round().to(torch.uint8)


def test_squashing_keeps_all_of_the_picture_and_cropping_its_middle() -> None:
    wide = picture(32, 96)[None].repeat(2, 1, 1, 1)
    squashed, cropped = resize(wide, 16), resize(wide, 16, fit="crop")
    assert squashed.shape == cropped.shape == (2, 3, 16, 16) and squashed.dtype == torch.uint8
    assert squashed[0, 1, 8, 0] < 12 and squashed[0, 1, 8, -1] > 243
    assert 70 < cropped[0, 1, 8, 0] < 100 and 155 < cropped[0, 1, 8, -1] < 185
    assert resize(picture(96, 32), 16, fit="crop").shape == (3, 16, 16)
    assert resize(picture(33, 47), 16, fit="crop").shape == (3, 16, 16)
    same = picture(16, 16)
    assert torch.equal(resize(same, 16), same)


def test_squashed_pixels_equal_the_golden_ones() -> None:
    """The golden pixels fix bicubic resizing with antialiasing and rounding to uint8 against accidental changes."""
    pixels = resize(picture(30, 45), 6)
    assert pixels[0, :, 0].tolist() == [19, 61, 106, 149, 194, 236]
    assert pixels[1, 0].tolist() == [20, 61, 106, 149, 194, 235]
    plain = resize(picture(30, 45).float(), 6, antialias=False)
    assert (plain.round() != pixels).any()


def test_uint8_and_float_resizing_agree_within_rounding() -> None:
    noise = torch.randint(0, 256, (2, 3, 50, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ours = resize(noise, 24).float()
    exact = resize(noise.double(), 24).clamp(0, 255)
    assert (ours - exact).abs().max() <= 1.0


@settings(max_examples=30)
@given(st.integers(8, 60), st.integers(8, 60), st.sampled_from(["squash", "crop"]))
def test_any_shape_becomes_the_square(height: int, width: int, fit: str) -> None:
    assert resize(picture(height, width), 16, fit=fit).shape == (3, 16, 16)


def test_normalised_pixels_have_clips_mean_and_deviation() -> None:
    pixels = torch.stack([torch.full((2, 2), value, dtype=torch.uint8) for value in (0, 128, 255)])
    expected = [(v / 255 - m) / s for v, m, s in zip((0, 128, 255), CLIP_MEAN, CLIP_STD, strict=True)]
    assert normalise(pixels)[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert normalise(pixels).dtype == torch.float32
    assert normalise(pixels.double())[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-14)
    assert normalise(pixels, dtype=torch.bfloat16).dtype == torch.bfloat16
