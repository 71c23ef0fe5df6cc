"""Near-duplicate clips, found from their perceptual hashes.

A clip has three 64-bit hashes: of its first, middle and last frame. Two clips are near-duplicates when no hash differs
in more than `frame_radius` bits and the three together in no more than `radius`. All such pairs are found: the 192 bits
are cut into `radius // 2 + 1` bands, so two clips within the radius differ in at most one bit in at least one band, and
for each band every pair with at most one differing bit is looked up and then checked in full. Groups are the connected
components of these pairs, so two members of a group may be further apart than the radius.

Flat frames (black, white, one colour, a plain gradient) look alike in unrelated clips. A hash is called flat
when fewer than `MIN_BITS` of its bits are set, or fewer are unset; a clip with two flat hashes or three is in no group.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from pydantic import Field

from clipmill.base.settings import Settings

NUM_HASHES, HASH_BITS = 3, 64
MIN_BITS = 8  # a hash of a structured picture has about 32 bits set
PAIRS_AT_ONCE = 1 << 21  # candidate pairs held at a time: bounds memory for any number of similar clips
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
    clip_ids, hashes = _usable(table)
    labels = near_duplicate_labels(hashes, settings.radius, settings.frame_radius)
    sizes = np.bincount(labels, minlength=len(labels))
    grouped = np.flatnonzero(sizes[labels] > 1)
    return pa.table({"clip_id": clip_ids.take(grouped), "duplicate_group": clip_ids.take(labels[grouped])})


def near_duplicate_labels(hashes: np.ndarray, radius: int, frame_radius: int) -> np.ndarray:
    """Map [N, 3] uint64 to [N]: the smallest row number of the connected component that each row belongs to."""
    distinct, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    labels = np.arange(len(distinct))
    for a, b in _candidates(distinct, max(radius // 2 + 1, MIN_BANDS)):
        apart = labels[a] != labels[b]  # pairs of one group are not checked again: a big group costs no memory
        a, b = a[apart], b[apart]
        distances = np.bitwise_count(distinct[a] ^ distinct[b])
        near = (distances.sum(axis=1, dtype=np.int32) <= radius) & (distances.max(axis=1, initial=0) <= frame_radius)
        labels = _join(labels, a[near], b[near])
    smallest = np.full(len(distinct), len(hashes))
    np.minimum.at(smallest, labels, first)
    return smallest[labels][inverse.reshape(-1)]


def _usable(table: pa.Table) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Return clips with three hashes of which at most one is flat, in order of clip_id, and their [N, 3] hashes."""
    table = table.select(["clip_id", "phash"]).sort_by("clip_id")
    lengths = table["phash"].combine_chunks().value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    table = table.filter(pa.array(lengths == NUM_HASHES))
    hashes = table["phash"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.uint64)
    hashes = hashes.reshape(-1, NUM_HASHES)
    num_set = np.bitwise_count(hashes)
    flat = (num_set < MIN_BITS) | (num_set > HASH_BITS - MIN_BITS)
    usable = flat.sum(axis=1) < 2
    return table["clip_id"].filter(pa.array(usable)), hashes[usable]


def _candidates(hashes: np.ndarray, num_bands: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield row pairs that differ in at most one bit of at least one band, in portions; some more than once."""
    bits = np.unpackbits(hashes.astype(">u8").view(np.uint8), axis=1)  # [N, 192]
    for columns in np.array_split(np.arange(bits.shape[1]), num_bands):
        weights = np.uint64(1) << np.arange(len(columns), dtype=np.uint64)
        values = bits[:, columns] @ weights  # [N]
        order = np.argsort(values, kind="stable")
        distinct, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
        several = np.flatnonzero(counts > 1)
        yield from _products(order, starts[several], counts[several], starts[several], counts[several])
        for weight in weights:
            unset = np.flatnonzero((distinct & weight) == 0)
            partner = np.minimum(np.searchsorted(distinct, distinct[unset] | weight), len(distinct) - 1)
            hit = distinct[partner] == distinct[unset] | weight
            a, b = unset[hit], partner[hit]
            yield from _products(order, starts[a], counts[a], starts[b], counts[b])


def _products(
    order: np.ndarray, starts_a: np.ndarray, counts_a: np.ndarray, starts_b: np.ndarray, counts_b: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all pairs (row of bucket a, row of bucket b) over all bucket pairs; buckets are runs of `order`."""
    ends = np.cumsum(counts_a * counts_b)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, PAIRS_AT_ONCE):
        number = np.arange(start, min(start + PAIRS_AT_ONCE, total))
        bucket = np.searchsorted(ends, number, side="right")
        within = number - (ends[bucket] - counts_a[bucket] * counts_b[bucket])
        i, j = np.divmod(within, counts_b[bucket])
        yield order[starts_a[bucket] + i], order[starts_b[bucket] + j]


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
