"""Plan the order in which training reads a selection, as pure functions of integers and hashes.

An example: 1,000 selected clips, batches of 64, two processes with three loader workers each.

1. The selection is a table in a fixed order; a clip is its row number, 0 … 999. `selection_hash` is the hash of the
   snapshot and of the clip ids in that order. The plan needs nothing else of the clips, so any process can plan.
2. An epoch has ⌊1000/64⌋ = 15 full steps. The remaining 40 rows are drawn at random for each epoch (`remainder_rows`):
   `drop` leaves them out of this epoch, `pad` gives them a 16th step with 24 holes (`PAD`), `carry` moves them to the
   next epoch, which then deals 40 more rows. The number of steps is arithmetic, known before step 0.
3. Neighbouring rows (of a shard) stay together in blocks of `block_size`. The blocks are permuted to one long list of
   rows, which is cut into P = `num_streams` equal pieces, the canonical streams.
4. A stream reads its piece window by window. A window is `window_steps` steps long; its rows are shuffled and dealt to
   these steps. So a stream has only the blocks of one window open, and with blocks of 1 the order is a full shuffle.
5. Streams 0 … P-1 deal the slots 0 … 63 of a step in this order, independent of the number of processes. Of W
   processes (W divides P), process r reads the slots of its P/W streams, a contiguous slice (`rank_slots`). Rows do not
   depend on other reads, so a process may share its slots among workers in any way.
6. The position of a run is one integer, the number of steps done. `locate` converts it to (epoch, step); resuming there
   replays nothing. `state_dict` adds the settings and hashes of the plan.
7. If asked, no batch holds two clips of one group (video, near-duplicates): `training.data.batch_constraints` deals a
   group's clips to different steps and swaps away the rest. Unavoidable conflicts are an error, or counted (`unmet`).

An epoch of 100 million clips is a 400 MB file; every process opens it memory-mapped.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from clipmill.base.atomic_file import atomic_file
from clipmill.base.errors import UserError
from training.data.batch_constraints import (
    Groups,
    OnConflict,
    as_groups,
    codes_of_rows,
    deal_keys,
    num_repeated,
    repair,
)
from training.data.stateless_random import in_threads, key_of, order_of, permutation, sample

Tail = Literal["drop", "pad", "carry"]
Rows = NDArray[np.uint32]

PAD = np.uint32(2**32 - 1)  # a hole: no clip, masked in the loss
_VERSION = 1  # of the order: raised whenever the same settings give another order


@dataclass(frozen=True)
class PlanSpec:
    """Parameters of the order of all epochs. Field names are part of fingerprints and checkpoints."""

    num_clips: int
    batch_size: int  # global
    selection_hash: str  # of the snapshot and the clip ids, see `hash_selection`

    seed: int = 0
    tail: Tail = "drop"
    num_streams: int = 0  # P; 0: batch_size, so that any number of processes that divides the batch may take part
    block_size: int = 1  # neighbouring rows that stay together: raise it to read shards in longer pieces
    window_steps: int = 64  # steps over which a stream mixes its blocks

    groups_hash: str = ""  # of the groups that must not meet in a batch, see `hash_groups`; "": none
    unmet: OnConflict = "error"  # treatment of a pair that no order can separate

    def __post_init__(self) -> None:
        if self.num_streams == 0:
            object.__setattr__(self, "num_streams", self.batch_size)
        for name in ("num_clips", "batch_size", "num_streams", "block_size", "window_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_clips + self.block_size >= PAD:
            raise UserError(f"num_clips is {self.num_clips}; a plan numbers fewer than {PAD - self.block_size} clips")
        if self.tail not in get_args(Tail):
            raise UserError(f"tail is {self.tail!r}; allowed: {', '.join(get_args(Tail))}")
        if self.unmet not in get_args(OnConflict):
            raise UserError(f"unmet is {self.unmet!r}; allowed: {', '.join(get_args(OnConflict))}")
        if self.batch_size % self.num_streams:
            raise UserError(f"num_streams {self.num_streams} does not divide batch_size {self.batch_size}")
        if self.tail != "pad" and self.num_clips < self.batch_size:
            raise UserError(
                f"batch_size {self.batch_size} is more than the {self.num_clips} selected clips; "
                "allowed: a smaller batch_size, or tail 'pad'"
            )

    @property
    def fingerprint(self) -> str:
        return f"{key_of(_VERSION, asdict(self)):016x}"

    def key(self, epoch: int, purpose: str) -> int:
        """Return the key of one kind of decision in one epoch. It does not depend on batch shape or tail."""
        return key_of(_VERSION, self.selection_hash, self.seed, epoch, purpose)


# --- Arithmetic: steps, positions, shares


def steps_in_epoch(spec: PlanSpec, epoch: int) -> int:
    if spec.tail == "pad":
        return -(-spec.num_clips // spec.batch_size)
    return (_carried(spec, epoch) + spec.num_clips) // spec.batch_size


def steps_before(spec: PlanSpec, epoch: int) -> int:
    """Count the steps of all epochs before this one."""
    if spec.tail == "carry":
        return epoch * spec.num_clips // spec.batch_size
    return epoch * steps_in_epoch(spec, 0)


def locate(spec: PlanSpec, num_steps_done: int) -> tuple[int, int]:
    """Return (epoch, step within it) of the next step; at the end of an epoch, step 0 of the next."""
    if spec.tail == "carry":
        epoch = (num_steps_done * spec.batch_size + spec.batch_size - 1) // spec.num_clips
    else:
        epoch = num_steps_done // steps_in_epoch(spec, 0)
    return epoch, num_steps_done - steps_before(spec, epoch)


def rank_slots(spec: PlanSpec, rank: int, world_size: int) -> slice:
    """Return the slots of every batch that a process reads, those of its streams."""
    if spec.num_streams % world_size:
        allowed = [n for n in range(1, spec.num_streams + 1) if spec.num_streams % n == 0]
        raise UserError(f"{world_size} processes cannot share {spec.num_streams} streams; allowed: {allowed}")
    share = spec.batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def state_dict(spec: PlanSpec, num_steps_done: int) -> dict[str, Any]:
    """Return a run's position and its plan as plain JSON."""
    epoch, step = locate(spec, num_steps_done)
    return {"num_steps_done": num_steps_done, "epoch": epoch, "step": step, "version": _VERSION, "spec": asdict(spec)}


def num_steps_done(spec: PlanSpec, state: dict[str, Any]) -> int:
    """Return the position of a saved state. Raises UserError if its plan differs; process counts may differ."""
    if state["version"] != _VERSION:
        raise UserError(
            f"cannot resume: the run's plan has version {state['version']}, this clipmill makes version {_VERSION}"
        )
    for field in fields(spec):
        saved, current = state["spec"][field.name], getattr(spec, field.name)
        if saved != current:
            raise UserError(f"cannot resume: the run was planned with {field.name} = {saved!r}, now it is {current!r}")
    return state["num_steps_done"]


def hash_selection(snapshot: str, clip_ids: Iterable[str] | NDArray[np.integer]) -> str:
    """Hash the snapshot and the ids of the selected clips in their order: strings, or an integer array."""
    digest = hashlib.blake2b(snapshot.encode() + b"\0", digest_size=16)
    if isinstance(clip_ids, np.ndarray):
        digest.update(np.ascontiguousarray(clip_ids).view(np.uint8))
    else:
        for clip_id in clip_ids:
            digest.update(clip_id.encode() + b"\0")
    return digest.hexdigest()


def hash_groups(groups: Sequence[NDArray[np.integer]]) -> str:
    """Hash the group arrays given to `epoch_rows`; "" for none."""
    if not groups:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for group in groups:
        digest.update(f"{group.dtype}{group.shape}".encode())
        digest.update(np.ascontiguousarray(group).view(np.uint8))
    return digest.hexdigest()


# --- The order


def epoch_rows(spec: PlanSpec, epoch: int, groups: Sequence[NDArray[np.integer]] = ()) -> Rows:
    """Plan an epoch: row numbers [steps, batch_size], `PAD` for holes.

    groups  for each kind of group an integer array [num_clips]: clips with equal values must not share a batch;
            negative (or an unsigned type's largest) values belong to no group. `spec.groups_hash` must match.
    Raises UserError if no order satisfies this and `spec.unmet` is "error".
    """
    coded = _checked_groups(spec, groups)
    if _carried(spec, epoch):
        coded = [*coded, None]  # a carried row occurs twice in the epoch: not in the same batch
    num_steps = steps_in_epoch(spec, epoch)
    rows = np.full((num_steps, spec.batch_size), PAD)
    listed = _listed_rows(spec, epoch).reshape(spec.num_streams, -1)
    suspects = in_threads(
        lambda start: _deal_window(spec, epoch, listed, start, rows, coded), range(0, num_steps, spec.window_steps)
    )
    if spec.tail == "pad":
        rest = remainder_rows(spec, epoch)
        rows[-1, : len(rest)] = rest
        suspects.append(np.array([num_steps - 1]))
    if coded:
        # without groups only carried rows can conflict, which in an epoch of one step cannot be avoided
        on_conflict = spec.unmet if groups else "keep"
        repair(rows, coded, np.unique(np.concatenate(suspects)), spec.key(epoch, "repair"), spec, on_conflict)
    return rows


def remainder_rows(spec: PlanSpec, epoch: int) -> NDArray[np.int64]:
    """Draw the rows that do not fill a step of this epoch: dropped, padded, or carried over to the next."""
    num_left = (_carried(spec, epoch) + spec.num_clips) % spec.batch_size
    return sample(spec.num_clips, num_left, spec.key(epoch, "tail"))


def num_conflicts(rows: Rows, groups: Sequence[NDArray[np.integer]]) -> int:
    """Count the slots whose clip's group already occurs in the batch: 0 unless `unmet` is "keep"."""
    coded = as_groups(groups)
    windows = (rows[start : start + 64] for start in range(0, len(rows), 64))
    return sum(int(num_repeated(codes_of_rows(codes, window)).sum()) for window in windows for codes in coded)


def _carried(spec: PlanSpec, epoch: int) -> int:
    """Count the rows that an epoch takes over from the previous one."""
    return epoch * spec.num_clips % spec.batch_size if spec.tail == "carry" else 0


def _listed_rows(spec: PlanSpec, epoch: int) -> Rows:
    """List the rows of the full steps, block after block: the concatenation of the streams' pieces."""
    num_blocks = -(-spec.num_clips // spec.block_size)
    listed = permutation(num_blocks, spec.key(epoch, "blocks"))
    if spec.block_size > 1:
        listed = (listed[:, None] * np.uint32(spec.block_size) + np.arange(spec.block_size, dtype=np.uint32)).ravel()
        listed = listed[listed < spec.num_clips]
    listed = np.delete(listed, _positions(listed, remainder_rows(spec, epoch)))
    if _carried(spec, epoch):
        listed = np.concatenate([remainder_rows(spec, epoch - 1).astype(np.uint32), listed])
    return listed


def _positions(listed: Rows, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Find a few rows in a long list, by a table of their low bits that fits into the cache."""
    table = np.zeros(1 << 16, dtype=bool)
    table[wanted & 0xFFFF] = True
    likely = [
        start + np.flatnonzero(table[listed[start : start + 65536] & 0xFFFF]) for start in range(0, len(listed), 65536)
    ]
    positions = np.concatenate([*likely, np.zeros(0, np.int64)])
    return positions[np.isin(listed[positions], wanted)]


def _deal_window(spec: PlanSpec, epoch: int, listed: Rows, start: int, rows: Rows, coded: Groups) -> NDArray[np.int64]:
    """Fill the steps of `rows` from `start` on with every stream's window; return the steps with a group twice.

    A stream's rows are ordered by a hash of their first group and dealt one per step in turn, so that the clips of a
    group go to different steps; a clip without group has its own hash. Then the steps are permuted.
    """
    per_step = spec.batch_size // spec.num_streams
    window_PN = np.ascontiguousarray(listed[:, start * per_step : (start + spec.window_steps) * per_step])
    num_steps = window_PN.shape[1] // per_step
    codes = [codes_of_rows(group, window_PN) for group in coded]
    order_PN = order_of(deal_keys(codes[0] if codes else window_PN, window_PN, spec.key(epoch, "deal")))
    steps = permutation(num_steps, key_of(spec.key(epoch, "steps"), start))

    def deal(values_PN: Rows) -> Rows:
        dealt = np.take_along_axis(values_PN, order_PN, axis=1).reshape(spec.num_streams, per_step, num_steps)
        return dealt.transpose(2, 0, 1)[steps].reshape(num_steps, spec.batch_size)

    rows[start : start + num_steps] = deal(window_PN)
    repeated = sum((num_repeated(deal(of_rows)) for of_rows in codes), start=np.zeros(num_steps, np.int64))
    return start + np.flatnonzero(repeated)


def _checked_groups(spec: PlanSpec, groups: Sequence[NDArray[np.integer]]) -> Groups:
    for group in groups:
        if group.shape != (spec.num_clips,) or group.dtype.kind not in "iu":
            raise UserError(f"groups hold {group.dtype} {group.shape}; allowed: integers [{spec.num_clips}]")
    if hash_groups(groups) != spec.groups_hash:
        raise UserError("groups_hash does not match these groups: the plan was made for other groups")
    return as_groups(groups)


# --- The file


def plan_path(folder: str | Path, spec: PlanSpec, epoch: int) -> Path:
    """Return the path of an epoch's file; the name has the fingerprint of the settings."""
    return Path(folder) / f"plan-{spec.fingerprint}-{epoch:05d}.npy"


def write_epoch(folder: str | Path, spec: PlanSpec, epoch: int, groups: Sequence[NDArray[np.integer]] = ()) -> Path:
    """Plan an epoch into its file, whole or not at all; keep an existing file."""
    path = plan_path(folder, spec, epoch)
    if path.exists():
        return path
    with atomic_file(path, fsync=True) as file:
        np.save(file, epoch_rows(spec, epoch, groups))
    return path


def open_epoch(folder: str | Path, spec: PlanSpec, epoch: int) -> Rows:
    """Open an epoch [steps, batch_size], memory-mapped and read-only, at a cost that does not depend on its size."""
    path = plan_path(folder, spec, epoch)
    if not path.exists():
        raise UserError(f"{path} does not exist; write_epoch makes it")
    rows = np.load(path, mmap_mode="r")
    assert rows.shape == (steps_in_epoch(spec, epoch), spec.batch_size) and rows.dtype == np.uint32
    return rows
