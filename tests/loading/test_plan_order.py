"""A plan gives every clip once and the same batches for any number of processes, and resumes by arithmetic."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clipmill.base.errors import UserError
from training.data import stateless_random as counting
from training.data.epoch_plan import (
    PAD,
    PlanSpec,
    epoch_rows,
    hash_groups,
    hash_selection,
    locate,
    num_conflicts,
    num_steps_done,
    open_epoch,
    rank_slots,
    remainder_rows,
    state_dict,
    steps_before,
    steps_in_epoch,
    write_epoch,
)
from training.data.stateless_random import permutation, sample

SELECTION = hash_selection("snapshot", ["a.0", "a.1", "b.0"])


def spec_of(num_clips: int = 1000, batch_size: int = 64, **changes: Any) -> PlanSpec:
    return PlanSpec(num_clips=num_clips, batch_size=batch_size, selection_hash=SELECTION, **changes)


@st.composite
def specs(draw: Any, tails: tuple[str, ...] = ("drop", "pad", "carry")) -> PlanSpec:
    batch = draw(st.sampled_from([1, 2, 4, 6, 12, 16]))
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    tail = draw(st.sampled_from(tails))
    return spec_of(
        num_clips=draw(st.integers(1 if tail == "pad" else batch, 300)),
        batch_size=batch,
        seed=draw(st.integers(0, 5)),
        tail=tail,
        num_streams=draw(st.sampled_from(divisors)),
        block_size=draw(st.sampled_from([1, 3, 16])),
        window_steps=draw(st.sampled_from([1, 2, 5, 64])),
    )


@given(specs(), st.integers(0, 3))
def test_every_clip_once_per_epoch_but_for_the_tail(spec: PlanSpec, epoch: int) -> None:
    rows = epoch_rows(spec, epoch)
    assert rows.shape == (steps_in_epoch(spec, epoch), spec.batch_size)
    seen = Counter(rows[rows != PAD].tolist())
    expected = Counter(range(spec.num_clips))
    tail = Counter(remainder_rows(spec, epoch).tolist())
    assert len(tail) == len(remainder_rows(spec, epoch)) < spec.batch_size
    if spec.tail == "pad":
        assert seen == expected
        assert (rows == PAD).sum() == rows.size - spec.num_clips and (rows[:-1] != PAD).all()
    elif spec.tail == "drop":
        assert seen == expected - tail
    else:
        arriving = Counter(remainder_rows(spec, epoch - 1).tolist()) if epoch else Counter()
        assert seen == expected - tail + arriving


@given(specs(tails=("carry",)))
def test_carrying_over_sees_every_clip_equally_often_in_the_long_run(spec: PlanSpec) -> None:
    num_epochs = 4
    seen: Counter[int] = Counter()
    for epoch in range(num_epochs):
        seen.update(epoch_rows(spec, epoch).ravel().tolist())
    seen.update(remainder_rows(spec, num_epochs - 1).tolist())
    assert set(seen.values()) == {num_epochs} and len(seen) == spec.num_clips


@given(specs(tails=("carry",)), st.integers(1, 3))
def test_no_batch_holds_a_carried_clip_twice(spec: PlanSpec, epoch: int) -> None:
    assume(spec.num_clips >= 4 * spec.batch_size)
    for batch in epoch_rows(spec, epoch):
        assert len(set(batch.tolist())) == spec.batch_size


@given(specs(), st.integers(0, 400))
def test_a_position_is_one_integer(spec: PlanSpec, position: int) -> None:
    epoch, step = locate(spec, position)
    assert 0 <= step < steps_in_epoch(spec, epoch)
    assert steps_before(spec, epoch) + step == position
    boundary = steps_before(spec, epoch + 1)
    assert boundary - steps_before(spec, epoch) == steps_in_epoch(spec, epoch)
    assert locate(spec, boundary)[1] == 0 and locate(spec, boundary)[0] >= epoch + 1


@given(specs(), st.integers(0, 2))
def test_any_number_of_processes_that_divides_the_streams_gives_the_same_batches(spec: PlanSpec, epoch: int) -> None:
    rows = epoch_rows(spec, epoch)
    for world_size in range(1, spec.num_streams + 1):
        if spec.num_streams % world_size:
            with pytest.raises(UserError, match="allowed"):
                rank_slots(spec, 0, world_size)
            continue
        shares = [rows[:, rank_slots(spec, rank, world_size)] for rank in range(world_size)]
        assert len({share.shape for share in shares}) == 1
        assert np.array_equal(np.concatenate(shares, axis=1), rows)


@given(specs(), st.integers(0, 10), st.integers(0, 10))
def test_resuming_anywhere_continues_the_same_sequence(spec: PlanSpec, stop: int, more: int) -> None:
    epochs: dict[int, np.ndarray] = {}

    def batches(first: int, last: int) -> list[list[int]]:
        located = [locate(spec, position) for position in range(first, last)]
        for epoch, _ in located:
            epochs.setdefault(epoch, epoch_rows(spec, epoch))
        return [epochs[epoch][step].tolist() for epoch, step in located]

    state = json.loads(json.dumps(state_dict(spec, stop)))
    resumed = num_steps_done(spec, state)
    assert batches(0, stop) + batches(resumed, stop + more) == batches(0, stop + more)


def test_a_state_of_another_plan_is_refused_by_the_setting_that_differs() -> None:
    state = state_dict(spec_of(), 7)
    assert (state["epoch"], state["step"], num_steps_done(spec_of(), state)) == (0, 7, 7)
    for changes in ({"seed": 1}, {"tail": "pad"}, {"num_streams": 8}, {"block_size": 4}, {"groups_hash": "x"}):
        with pytest.raises(UserError, match=next(iter(changes))):
            num_steps_done(spec_of(**changes), state)
    with pytest.raises(UserError, match="num_clips"):
        num_steps_done(spec_of(num_clips=999), state)
    with pytest.raises(UserError, match="version"):
        num_steps_done(spec_of(), state | {"version": 0})


def test_order_depends_on_selection_seed_and_epoch_and_on_nothing_else() -> None:
    base = epoch_rows(spec_of(), 0)
    assert np.array_equal(base, epoch_rows(spec_of(), 0))
    others = [
        epoch_rows(spec_of(), 1),
        epoch_rows(spec_of(seed=1), 0),
        epoch_rows(PlanSpec(1000, 64, hash_selection("snapshot 2", ["a.0"])), 0),
    ]
    assert all(not np.array_equal(base, other) for other in others)


def test_first_rows_of_a_plan_are_golden() -> None:
    """A change here changes the order of every run: raise the plan's version and note it in the changelog."""
    assert epoch_rows(spec_of(), 0)[0, :8].tolist() == [816, 841, 868, 297, 18, 25, 130, 439]
    blocks = spec_of(num_clips=100_000, block_size=16, num_streams=8, window_steps=32, tail="carry")
    assert epoch_rows(blocks, 1)[0, :8].tolist() == [37686, 86718, 86717, 41268, 80144, 2896, 80037, 98567]
    assert spec_of().fingerprint == "bcf21ca185d392ae"


def test_the_order_is_the_same_in_another_process() -> None:
    program = (
        "from training.data.epoch_plan import *; import hashlib;"
        f"spec = PlanSpec(2_000_000, 500, {SELECTION!r}, block_size=1);"
        "print(hashlib.sha256(epoch_rows(spec, 3).tobytes()).hexdigest())"
    )
    root = Path(__file__).resolve().parents[2]
    runs = [subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, check=True) for _ in "ab"]
    assert runs[0].stdout == runs[1].stdout != b""


def test_blocks_keep_neighbours_together_and_windows_bound_what_is_open() -> None:
    spec = spec_of(num_clips=64 * 200, block_size=32, num_streams=4, window_steps=16)
    rows = epoch_rows(spec, 0).astype(int)
    window = rows[:16, rank_slots(spec, 0, 4)]
    open_blocks = len(np.unique(window // 32))
    assert open_blocks <= 16 * 16 // 32 + 1  # against 123 or so were they scattered
    scattered = epoch_rows(spec_of(num_clips=64 * 200, num_streams=4, window_steps=16), 0).astype(int)
    assert len(np.unique(scattered[:16, :16] // 32)) > 150


def test_a_full_shuffle_looks_like_one() -> None:
    """Neighbours in the list end up as far apart as by chance, and every step covers the whole selection."""
    for num_clips in (4096, 2**21):  # sorted, and by the Feistel network
        spec = spec_of(num_clips=num_clips, batch_size=256)
        rows = epoch_rows(spec, 0).ravel().astype(np.float64) / num_clips
        assert abs(np.abs(np.diff(rows)).mean() - 1 / 3) < 0.01
        assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.05
        assert np.abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.05


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permutation_is_one(count: int, key: int) -> None:
    assert np.array_equal(np.sort(permutation(count, key)), np.arange(count))
    whole = counting._SORTED_UP_TO
    try:
        counting._SORTED_UP_TO = 0
        assert np.array_equal(np.sort(permutation(count, key)), np.arange(count))
    finally:
        counting._SORTED_UP_TO = whole


@given(st.integers(1, 500), st.data())
def test_sample_is_distinct_and_of_the_size_asked_for(count: int, data: Any) -> None:
    size = data.draw(st.integers(0, count))
    drawn = sample(count, size, key=data.draw(st.integers(0, 100)))
    assert len(set(drawn.tolist())) == size and all(0 <= value < count for value in drawn)


# --- Groups


def assert_parted(rows: np.ndarray, *groups: np.ndarray) -> None:
    for batch in rows:
        for codes in groups:
            members = codes[batch[batch != PAD]]
            members = (
                members[members != np.iinfo(codes.dtype).max] if codes.dtype.kind == "u" else members[members >= 0]
            )
            assert len(np.unique(members)) == len(members)


@settings(max_examples=60)
@given(specs(), st.integers(0, 2), st.data())
def test_no_batch_holds_two_clips_of_one_group_whenever_there_is_room(spec: PlanSpec, epoch: int, data: Any) -> None:
    """With one kind of group, none larger than the number of steps, a solution always exists, so there is no error."""
    assume(spec.tail != "carry" or epoch == 0)
    num_steps = steps_in_epoch(spec, epoch)
    sizes = data.draw(st.lists(st.integers(1, num_steps), min_size=1, max_size=30))
    codes = np.repeat(np.arange(len(sizes)), sizes)[: spec.num_clips]
    codes = np.concatenate([codes, np.full(spec.num_clips - len(codes), -1)])
    codes = codes[permutation(spec.num_clips, data.draw(st.integers(0, 3)))]
    grouped = PlanSpec(**{**vars(spec), "groups_hash": hash_groups([codes])})
    rows = epoch_rows(grouped, epoch, [codes])
    assert_parted(rows, codes)
    assert num_conflicts(rows, [codes]) == 0
    plain = epoch_rows(spec, epoch)
    assert sorted(rows.ravel().tolist()) == sorted(plain.ravel().tolist())


def test_a_clip_that_a_swap_brings_in_is_parted_too() -> None:
    """A case of the test above: the only swap that reduces conflicts brings in a clip that shares a group itself."""
    spec = spec_of(199, 12, seed=1, tail="drop", num_streams=3, block_size=1, window_steps=5)
    sizes = [1, 9, 12, 12, 15, 11, 16, 16, 4, 1, 5, 4, 7, 12]
    codes = np.repeat(np.arange(len(sizes)), sizes)
    codes = np.concatenate([codes, np.full(199 - len(codes), -1)])[permutation(199, 0)]
    changed = {"selection_hash": "8fa140db6b017c85c7384a1899e7c1eb", "groups_hash": hash_groups([codes])}
    assert_parted(epoch_rows(PlanSpec(**{**vars(spec), **changed}), 1, [codes]), codes)


@pytest.mark.parametrize("tail", ["drop", "pad", "carry"])
@pytest.mark.parametrize("block_size", [1, 64])
def test_videos_and_near_duplicates_are_kept_apart_at_once(tail: str, block_size: int) -> None:
    num_clips = 20_000
    videos = np.arange(num_clips) // 20  # 20 clips a video, side by side
    duplicates = np.full(num_clips, -1)
    scattered = permutation(num_clips, 5)[:2000]
    duplicates[scattered] = np.arange(2000) // 4
    groups = [videos, duplicates]
    spec = spec_of(num_clips, 128, tail=tail, block_size=block_size, num_streams=16, groups_hash=hash_groups(groups))
    for epoch in (0, 1):
        rows = epoch_rows(spec, epoch, groups)
        assert_parted(rows, *groups)
        assert np.array_equal(rows, epoch_rows(spec, epoch, groups))
    # prove that the check can fail: without exclusive groups, pairs meet
    unasked = epoch_rows(spec_of(num_clips, 128, tail=tail, block_size=block_size, num_streams=16), 0)
    assert num_conflicts(unasked, groups) > 100


def test_parting_groups_keeps_the_shuffle_local() -> None:
    num_clips = 64 * 400
    videos = np.arange(num_clips) // 8
    spec = spec_of(num_clips, 64, block_size=32, num_streams=4, window_steps=16, groups_hash=hash_groups([videos]))
    rows = epoch_rows(spec, 0, [videos]).astype(int)
    opened = [len(np.unique(rows[start : start + 16, :16] // 32)) for start in range(0, 400, 16)]
    assert np.mean(opened) < 12  # 9 without groups


def test_inseparable_clips_are_an_error_or_stay_and_are_counted() -> None:
    videos = np.zeros(64, dtype=np.int64)
    videos[32:] = np.arange(1, 33)
    grouped = {"groups_hash": hash_groups([videos])}
    with pytest.raises(UserError, match="32 selected clips belong to one group, but an epoch has 8 steps"):
        epoch_rows(spec_of(64, 8, **grouped), 0, [videos])
    kept = epoch_rows(spec_of(64, 8, unmet="keep", **grouped), 0, [videos])
    assert sorted(kept.ravel().tolist()) == list(range(64))
    assert num_conflicts(kept, [videos]) == 32 - 8


def test_wide_and_unsigned_group_codes_mean_the_same() -> None:
    videos = np.arange(2000) // 10
    for codes in (videos, videos.astype(np.uint32), videos.astype(np.uint64) * 2**40, videos.astype(np.int32)):
        spec = spec_of(2000, 40, groups_hash=hash_groups([codes]))
        assert num_conflicts(epoch_rows(spec, 0, [codes]), [videos]) == 0


def test_groups_of_another_selection_are_refused() -> None:
    videos = np.arange(1000)
    with pytest.raises(UserError, match="groups_hash"):
        epoch_rows(spec_of(), 0, [videos])
    with pytest.raises(UserError, match=r"\[1000\]"):
        epoch_rows(spec_of(groups_hash="x"), 0, [videos[:10]])


# --- Files and settings


def test_a_written_epoch_opens_memory_mapped_and_equal(tmp_path: Path) -> None:
    spec = spec_of(tail="pad")
    path = write_epoch(tmp_path, spec, 2)
    before = path.stat().st_mtime_ns
    rows = open_epoch(tmp_path, spec, 2)
    assert isinstance(rows, np.memmap) and not rows.flags.writeable
    assert np.array_equal(rows, epoch_rows(spec, 2))
    write_epoch(tmp_path, spec, 2)
    assert path.stat().st_mtime_ns == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UserError, match="does not exist"):
        open_epoch(tmp_path, spec_of(tail="pad", seed=9), 2)


def test_selection_hash_sees_snapshot_ids_and_their_order() -> None:
    hashes = {
        hash_selection("s", ["a", "b"]),
        hash_selection("s", ["b", "a"]),
        hash_selection("t", ["a", "b"]),
        hash_selection("s", ["ab"]),
        hash_selection("s", np.array([1, 2])),
    }
    assert len(hashes) == 5


def test_impossible_settings_are_named() -> None:
    for changes, words in (
        ({"batch_size": 0}, "batch_size"),
        ({"num_streams": 7}, "num_streams 7 does not divide batch_size 64"),
        ({"num_clips": 10}, "tail 'pad'"),
        ({"tail": "repeat"}, "drop, pad, carry"),
        ({"unmet": "ignore"}, "error, keep"),
        ({"num_clips": 2**32}, "num_clips"),
    ):
        with pytest.raises(UserError, match=words):
            spec_of(**changes)
