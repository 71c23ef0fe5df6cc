"""Near-duplicate clips, found from their perceptual hashes.

A clip has three 64-bit hashes: of its first, middle and last frame. Two clips are near-duplicates when no hash differs
in more than `frame_radius` bits and the three together in no more than `radius`. All such pairs are found: the 192 bits
are cut into `radius // 2 + 1` bands, so two clips within the radius differ in at most one bit in at least one band, and
for each band every pair with at most one differing bit is looked up and then checked in full. Groups are the connected
components of these pairs, so two members of a group may be further apart than the radius.

`GroupedClips` keeps the groups of a corpus up to date: it looks up the clips that are new, and streams past them those
that are not.

Flat frames (black, white, one colour, a plain gradient) look alike in unrelated clips. A hash is called flat
when fewer than `MIN_BITS` of its bits are set, or fewer are unset; a clip with two flat hashes or three is in no group.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
from pydantic import Field

from clipmill.base.settings import Settings

NUM_HASHES, HASH_BITS = 3, 64
MIN_BITS = 8  # a hash of a structured picture has about 32 bits set
PAIRS_AT_ONCE = 1 << 21  # candidate pairs held at a time: bounds memory for any number of similar clips
MAX_FILTER_BITS = 1 << 27
MIN_BANDS = 4  # no band is wider than 48 bits


class DuplicateSettings(Settings):
    """Settings of finding near-duplicate clips by their hashes."""

    # Most bits of 192 in which the hashes of near-duplicates differ. Different clips differ in 96 on average.
    radius: int = Field(12, ge=0, le=24)
    # Most bits of 64 in which the hash of each of the three frames differs, so that no single frame differs alone.
    frame_radius: int = Field(6, ge=0, le=24)


def duplicate_groups(table: pa.Table, settings: DuplicateSettings | None = None) -> pa.Table:
    """Map (clip_id, phash) to (clip_id, duplicate_group) of clips that have near-duplicates, in order of clip_id.

    A group is named by its smallest clip_id. Clips without three hashes are left out. The order of the rows does not
    matter.
    """
    settings = settings or DuplicateSettings()
    clip_ids, hashes = _usable(table.sort_by("clip_id"))
    labels = near_duplicate_labels(hashes, settings.radius, settings.frame_radius)
    sizes = np.bincount(labels, minlength=len(labels))
    grouped = np.flatnonzero(sizes[labels] > 1)
    return pa.table({"clip_id": clip_ids.take(grouped), "duplicate_group": clip_ids.take(labels[grouped])})


def near_duplicate_labels(hashes: np.ndarray, radius: int, frame_radius: int) -> np.ndarray:
    """Map [N, 3] uint64 to [N]: the smallest row number of the connected component that each row belongs to."""
    distinct, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    labels = np.arange(len(distinct))
    for a, b in _candidates(distinct, _bands(radius)):
        apart = labels[a] != labels[b]  # pairs of one group are not checked again: a big group costs no memory
        a, b = a[apart], b[apart]
        near = _is_near(distinct[a], distinct[b], radius, frame_radius)
        labels = _join(labels, a[near], b[near])
    smallest = np.full(len(distinct), len(hashes))
    np.minimum.at(smallest, labels, first)
    return smallest[labels][inverse.reshape(-1)]


class Lookup:
    """Find which of any number of further clips are near some given ones. Its memory depends on the given ones alone.

    hashes  [N, 3] uint64 of the given clips
    """

    def __init__(self, hashes: np.ndarray, settings: DuplicateSettings):
        self.hashes, self.settings = hashes, settings
        self.bands = [_Band(hashes, bits) for bits in _bands(settings.radius)]

    def pairs(self, hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the near pairs (rows of the given clips, rows of these), in portions; some more than once."""
        for band in self.bands:
            for given, rows in band.candidates(hashes):
                near = _is_near(self.hashes[given], hashes[rows], self.settings.radius, self.settings.frame_radius)
                yield given[near], rows[near]


class _Band:
    """One band of the given clips: their values in order, and a filter that most other clips do not pass."""

    def __init__(self, hashes: np.ndarray, bits: range):
        self.bits = bits
        values = _values(hashes, bits)
        self.order = np.argsort(values, kind="stable")
        self.distinct, self.starts, self.counts = np.unique(values[self.order], return_index=True, return_counts=True)
        self.flips = np.concatenate([np.zeros(1, np.uint64), np.uint64(1) << np.arange(len(bits), dtype=np.uint64)])
        places = min(max(self.distinct.size * self.flips.size * 32, 1 << 16), MAX_FILTER_BITS)
        self.mask = np.uint64((1 << (places - 1).bit_length()) - 1)
        is_set = np.zeros(int(self.mask) + 1, bool)
        for flip in self.flips:
            is_set[(self.distinct ^ flip) & self.mask] = True
        self.filter = np.packbits(is_set, bitorder="little")

    def candidates(self, hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield pairs (given row, row) that differ in at most one bit of the band, in portions."""
        if not self.distinct.size:
            return
        values = _values(hashes, self.bits)
        places = values & self.mask
        passed = np.flatnonzero(self.filter[places >> np.uint64(3)] >> (places & np.uint64(7)).astype(np.uint8) & 1)
        values = values[passed]
        for flip in self.flips:
            found = np.minimum(np.searchsorted(self.distinct, values ^ flip), self.distinct.size - 1)
            hit = self.distinct[found] == values ^ flip
            ones = np.ones(int(hit.sum()), np.int64)
            yield from _products(
                self.order, self.starts[found[hit]], self.counts[found[hit]], np.arange(ones.size), ones, passed[hit]
            )


class GroupedClips:
    """The near-duplicate groups of clips that come in portions, given how the earlier ones are grouped.

    A clip that is near one of an earlier group joins it, and may join two of them. The result is that of one search
    over all clips, whatever the portions.
    """

    def __init__(self, table: pa.Table, settings: DuplicateSettings | None = None):
        """Take (clip_id, phash) of the new clips."""
        self.settings = settings or DuplicateSettings()
        clip_ids, hashes = _usable(table.sort_by("clip_id"))
        self.clip_ids = clip_ids.to_pylist()
        self.labels = near_duplicate_labels(hashes, self.settings.radius, self.settings.frame_radius)  # [N]: a row
        distinct, first = np.unique(hashes, axis=0, return_index=True)
        self.first, self.lookup = first, Lookup(distinct, self.settings)
        self.met: set[tuple[int, str]] = set()  # (label, id of an earlier clip that is near one of that label)

    def meet(self, table: pa.Table) -> None:
        """Look at (clip_id, phash) of earlier clips."""
        clip_ids, hashes = _usable(table)
        for given, rows in self.lookup.pairs(hashes):
            pairs = np.unique(np.stack([self.labels[self.first[given]], rows], axis=1), axis=0)
            ids = clip_ids.take(pairs[:, 1]).to_pylist()
            self.met.update(zip(pairs[:, 0].tolist(), ids, strict=True))

    def groups(self, group_of: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        """Return (clip → group of the new clips and those that join them, old name → new name of the groups they join).

        group_of  earlier clip → group, for the ids in `met` that are in one
        """
        names = sorted({group_of.get(clip_id, clip_id) for _, clip_id in self.met})
        number = {name: len(self.clip_ids) + n for n, name in enumerate(names)}
        nodes = [*self.clip_ids, *names]
        edges = [(label, number[group_of.get(clip_id, clip_id)]) for label, clip_id in sorted(self.met)]
        labels = np.concatenate([self.labels, np.arange(len(self.clip_ids), len(nodes))])
        if edges:
            labels = _join(labels, *np.array(edges).T)
        members: dict[int, list[int]] = {}
        for node, label in enumerate(labels.tolist()):
            members.setdefault(label, []).append(node)
        new: dict[str, str] = {}
        renamed: dict[str, str] = {}
        known = set(group_of.values())
        for of_label in members.values():
            if len(of_label) == 1:
                continue
            name = min(nodes[node] for node in of_label)
            for node in of_label:
                if node < len(self.clip_ids) or nodes[node] not in known:
                    new[nodes[node]] = name
                elif nodes[node] != name:
                    renamed[nodes[node]] = name
        return new, renamed


def _usable(table: pa.Table) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Return the clips with three hashes of which at most one is flat, and their [N, 3] hashes."""
    table = table.select(["clip_id", "phash"])
    lengths = table["phash"].combine_chunks().value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    table = table.filter(pa.array(lengths == NUM_HASHES))
    hashes = table["phash"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.uint64)
    hashes = hashes.reshape(-1, NUM_HASHES)
    num_set = np.bitwise_count(hashes)
    flat = (num_set < MIN_BITS) | (num_set > HASH_BITS - MIN_BITS)
    usable = flat.sum(axis=1) < 2
    return table["clip_id"].filter(pa.array(usable)), hashes[usable]


def _is_near(a: np.ndarray, b: np.ndarray, radius: int, frame_radius: int) -> np.ndarray:
    distances = np.bitwise_count(a ^ b)
    return (distances.sum(axis=1, dtype=np.int32) <= radius) & (distances.max(axis=1, initial=0) <= frame_radius)


def _bands(radius: int) -> list[range]:
    """Return the bands as ranges of the 192 bits."""
    parts = np.array_split(np.arange(NUM_HASHES * HASH_BITS), max(radius // 2 + 1, MIN_BANDS))
    return [range(int(part[0]), int(part[-1]) + 1) for part in parts]


def _values(hashes: np.ndarray, bits: range) -> np.ndarray:
    """Return [N] the bits of a band as numbers."""
    values = np.zeros(len(hashes), np.uint64)
    for word in range(bits.start // HASH_BITS, (bits.stop - 1) // HASH_BITS + 1):
        start, stop = max(bits.start, word * HASH_BITS), min(bits.stop, (word + 1) * HASH_BITS)
        part = hashes[:, word] >> np.uint64((word + 1) * HASH_BITS - stop)
        part &= np.uint64((1 << (stop - start)) - 1)
        values |= part << np.uint64(bits.stop - stop)
    return values


def _candidates(hashes: np.ndarray, bands: list[range]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield row pairs that differ in at most one bit of at least one band, in portions; some more than once."""
    for bits in bands:
        values = _values(hashes, bits)
        order = np.argsort(values, kind="stable")
        distinct, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
        several = np.flatnonzero(counts > 1)
        yield from _products(order, starts[several], counts[several], starts[several], counts[several])
        for weight in np.uint64(1) << np.arange(len(bits), dtype=np.uint64):
            unset = np.flatnonzero((distinct & weight) == 0)
            partner = np.minimum(np.searchsorted(distinct, distinct[unset] | weight), len(distinct) - 1)
            hit = distinct[partner] == distinct[unset] | weight
            a, b = unset[hit], partner[hit]
            yield from _products(order, starts[a], counts[a], starts[b], counts[b])


def _products(
    order: np.ndarray,
    starts_a: np.ndarray,
    counts_a: np.ndarray,
    starts_b: np.ndarray,
    counts_b: np.ndarray,
    order_b: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all pairs (row of bucket a, row of bucket b) over all bucket pairs, in portions.

    Buckets are runs of `order`, those of b of `order_b` if it is given.
    """
    order_b = order if order_b is None else order_b
    ends = np.cumsum(counts_a * counts_b)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, PAIRS_AT_ONCE):
        number = np.arange(start, min(start + PAIRS_AT_ONCE, total))
        bucket = np.searchsorted(ends, number, side="right")
        within = number - (ends[bucket] - counts_a[bucket] * counts_b[bucket])
        i, j = np.divmod(within, counts_b[bucket])
        yield order[starts_a[bucket] + i], order_b[starts_b[bucket] + j]


def _join(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the labels after adding edges (a, b); each component is labelled by its smallest row."""
    while len(a):
        low, high = np.minimum(labels[a], labels[b]), np.maximum(labels[a], labels[b])
        np.minimum.at(labels, high, low)
        while not np.array_equal(jumped := labels[labels], labels):
            labels = jumped
        apart = labels[a] != labels[b]
        a, b = a[apart], b[apart]
    return labels
