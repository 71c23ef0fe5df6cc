"""Keep clips of one group (video, near-duplicates) out of one batch: deal them apart, find conflicts, swap them away.

A group array gives each clip a code; equal codes must not meet in a step. Several arrays apply at once. Rows are those
of `training.data.epoch_plan`: uint32 row numbers [steps, batch], `PAD` for holes.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from clipmill.base.errors import UserError
from training.data.stateless_random import mix

OnConflict = Literal["error", "keep"]
Codes = NDArray[np.uint32]
Groups = list[Codes | None]  # None: every clip is its own group, for rows that occur twice

NONE = np.uint32(2**32 - 1)  # code of clips in no group; also the row number of a hole
_RANDOM_TRIES = 64
_MOST_FAILURES = 1000  # consecutive failures, under "keep", after which the remaining conflicts stay


class _Shape(Protocol):
    num_streams: int
    window_steps: int


def as_groups(groups: Sequence[NDArray[np.integer]]) -> Groups:
    """Code groups as uint32: unchanged if they fit, else hashed (a collision only separates clips needlessly)."""
    return [_codes_of(np.asarray(group)) for group in groups]


def codes_of_rows(codes: Codes | None, rows: NDArray[np.uint32]) -> Codes:
    """Return the codes of rows, `NONE` for holes."""
    if codes is None:
        return rows
    of_rows = codes.take(rows, mode="clip")
    of_rows[rows == NONE] = NONE
    return of_rows


def deal_keys(codes_PN: Codes, rows_PN: NDArray[np.uint32], key: int) -> NDArray[np.uint64]:
    """Hash rows [P, N] so that rows of a group in the same stream are equal: sorting brings a group together.

    The hash depends on the stream, because otherwise a group's clips in two streams would be dealt to the same steps.
    """
    # row numbers of clips without group are offset, so that they never equal a group's code
    values = np.where(codes_PN == NONE, rows_PN + np.uint64(1 << 32), codes_PN)
    streams = np.arange(len(rows_PN), dtype=np.uint64)[:, None] << np.uint64(33)
    return mix(values + streams, key)


def num_repeated(codes_SB: Codes) -> NDArray[np.int64]:
    """Count the slots of each step whose code already occurs in that step: [steps]."""
    ordered = np.sort(codes_SB, axis=1)
    return np.count_nonzero((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NONE), axis=1)


def repair(
    rows: NDArray[np.uint32], groups: Groups, steps: NDArray[np.int64], key: int, shape: _Shape, on_conflict: OnConflict
) -> None:
    """Swap rows in place until none of `steps` holds a group twice; each swap reduces the number of pairs.

    With one kind of group such a swap always exists while no group has more clips than there are steps: a step without
    the group that cannot give a clip holds pairs itself. With several kinds, or a larger group, it may not exist:
    `on_conflict` then raises UserError ("error") or leaves the pair ("keep").
    """
    failures = 0
    for step in steps.tolist():
        for slot in _repeated_slots(rows[step], groups):
            # repeated, because the clip that a swap brings in may share a group with the step as well
            while _conflicts(rows, groups, step, slot):
                swapped = _swap_at_random(rows, groups, step, slot, key, shape)
                if not swapped and failures < _MOST_FAILURES:
                    swapped = _swap_anywhere(rows, groups, step, slot, key, on_conflict)
                failures = 0 if swapped else failures + 1
                if not swapped and on_conflict == "error":
                    raise UserError(
                        f"step {step} must hold two clips of one group: no swap separates them. "
                        "Allowed: a smaller batch_size, fewer kinds of groups, or unmet 'keep'"
                    )
                if not swapped:
                    break
            if failures >= _MOST_FAILURES:
                return


def _codes_of(group: NDArray[np.integer]) -> Codes:
    if group.dtype == np.uint32:
        return group
    fits = group.size == 0 or int(group.max()) < NONE
    codes = np.empty(len(group), np.uint32)
    for start in range(0, len(group), 1 << 16):  # in pieces, to bound the memory of temporaries
        part = group[start : start + (1 << 16)]
        none = part < 0 if part.dtype.kind == "i" else part == np.iinfo(part.dtype).max
        hashed = part if fits else np.minimum(mix(part, 0) >> np.uint64(32), NONE - 1)
        codes[start : start + len(part)] = np.where(none, NONE, hashed)
    return codes


def _repeated_slots(step_rows: NDArray[np.uint32], groups: Groups) -> list[int]:
    """Return the slots whose group, of any kind, already occurs in an earlier slot."""
    slots: set[int] = set()
    for codes in groups:
        of_rows = codes_of_rows(codes, step_rows)
        order = np.argsort(of_rows, kind="stable")
        ordered = of_rows[order]
        slots |= set(order[1:][(ordered[1:] == ordered[:-1]) & (ordered[1:] != NONE)].tolist())
    return sorted(slots)


def _conflicts(rows: NDArray[np.uint32], groups: Groups, step: int, slot: int, clip: np.uint32 | None = None) -> int:
    """Count the kinds of group that `clip` (None: the slot's own) shares with the other slots of the step."""
    clips = rows[step, slot : slot + 1] if clip is None else np.array([clip])
    total = 0
    for codes in groups:
        code = codes_of_rows(codes, clips)[0]
        if code != NONE:
            same = codes_of_rows(codes, rows[step]) == code
            same[slot] = False
            total += int(same.any())
    return total


def _conflicts_of(
    rows: NDArray[np.uint32], groups: Groups, step: int, slot: int, clips: NDArray[np.uint32]
) -> NDArray[np.int64]:
    """Count `_conflicts` for each of `clips`, vectorised."""
    others = np.delete(rows[step], slot)
    total = np.zeros(len(clips), np.int64)
    for codes in groups:
        of_clips = codes_of_rows(codes, clips)
        total += np.isin(of_clips, codes_of_rows(codes, others)) & (of_clips != NONE)
    return total


def _swap_at_random(rows: NDArray[np.uint32], groups: Groups, step: int, slot: int, key: int, shape: _Shape) -> bool:
    """Try random swaps that leave neither clip in conflict, first within the window and stream, so reads stay local."""
    num_steps, batch = rows.shape
    draws = mix(np.arange(2 * _RANDOM_TRIES) + (step * batch + slot) * 2 * _RANDOM_TRIES, key).reshape(-1, 2)
    window = step - step % shape.window_steps
    window_size = min(shape.window_steps, num_steps - window)
    per_stream = batch // shape.num_streams
    for attempt, (first, second) in enumerate(draws.tolist()):
        if attempt < _RANDOM_TRIES // 4:
            other = window + first % window_size
            other_slot = slot - slot % per_stream + second % per_stream
        else:
            other, other_slot = first % num_steps, second % batch
        clip = rows[other, other_slot]
        if other == step or clip == NONE:
            continue
        if _conflicts(rows, groups, other, other_slot, rows[step, slot]) == 0:
            if _conflicts(rows, groups, step, slot, clip) == 0:
                rows[step, slot], rows[other, other_slot] = clip, rows[step, slot]
                return True
    return False


def _swap_anywhere(
    rows: NDArray[np.uint32], groups: Groups, step: int, slot: int, key: int, on_conflict: OnConflict
) -> bool:
    """Make the first swap in any step, holes included, that reduces the number of pairs; search all steps if needed."""
    num_steps, batch = rows.shape
    own = rows[step, slot]
    kinds = [codes for codes in groups if codes is not None and codes[own] != NONE]
    size = max((int(np.count_nonzero(codes == codes[own])) for codes in kinds), default=0)
    if size > num_steps:
        if on_conflict == "keep":
            return False
        raise UserError(
            f"{size} selected clips belong to one group, but an epoch has {num_steps} steps: two would share a batch. "
            "Allowed: a smaller batch_size, a selection with fewer clips per group, or unmet 'keep'"
        )
    mine = _conflicts(rows, groups, step, slot)
    start = int(mix(np.array([step * batch + slot]), key)[0] % np.uint64(num_steps))
    for other in (*range(start, num_steps), *range(start)):
        if other == step:
            continue
        arriving = _conflicts_of(rows, groups, step, slot, rows[other])
        for other_slot in np.flatnonzero(arriving <= mine).tolist():
            theirs = _conflicts(rows, groups, other, other_slot)
            leaving = _conflicts(rows, groups, other, other_slot, rows[step, slot])
            if arriving[other_slot] + leaving < mine + theirs:
                rows[step, slot], rows[other, other_slot] = rows[other, other_slot], rows[step, slot]
                return True
    return False
