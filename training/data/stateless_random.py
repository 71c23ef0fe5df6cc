"""Random numbers as pure functions of integers, the same on every platform and numpy version.

A value is a function of a key and a counter, so it can be computed anywhere and in any order. numpy's own generators
may change their streams between versions; these must not, because the order of every epoch depends on them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Result = TypeVar("Result")

_GOLDEN, _MIX1, _MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_CHUNK = 1 << 16  # elements at a time, which fit into the CPU's cache
_SORTED_UP_TO = 1 << 20
_ROUNDS = 8


def key_of(*parts: Any) -> int:
    """Hash any JSON-able values to a 64-bit key."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(values: NDArray[np.integer], key: int) -> Words:
    """Hash each value under a key (splitmix64's finaliser), uniformly over 64 bits."""
    z = values.astype(np.uint64) * _GOLDEN + np.uint64(key)
    z ^= z >> np.uint64(30)
    z *= _MIX1
    z ^= z >> np.uint64(27)
    z *= _MIX2
    z ^= z >> np.uint64(31)
    return z


def order_of(hashes: Words) -> NDArray[np.int64]:
    """Order positions along the last axis by their hash, equal hashes by position.

    Positions replace the low bits of the hashes, because sorting such keys is several times faster than an argsort.
    """
    num_low_bits = np.uint64(max(1, hashes.shape[-1] - 1).bit_length())
    keys = (hashes >> num_low_bits) << num_low_bits | np.arange(hashes.shape[-1], dtype=np.uint64)
    keys.sort(axis=-1)
    return (keys & np.uint64((1 << int(num_low_bits)) - 1)).astype(np.int64)


def permutation(count: int, key: int) -> NDArray[np.uint32]:
    """Draw a random order of 0 … count-1. A large one comes from a Feistel network, without a sort."""
    assert count < 2**32
    if count <= _SORTED_UP_TO:
        return order_of(mix(np.arange(count, dtype=np.uint64), key)).astype(np.uint32)
    side = int(np.ceil(np.sqrt(count)))
    # [side] random shifts in [0, side) for each round: a table small enough for the cache
    keys = [key_of(key, number) for number in range(_ROUNDS)]
    tables = [(mix(np.arange(side), round_key) % np.uint64(side)).astype(np.int64) for round_key in keys]
    order = np.empty(count, np.uint32)

    def fill(start: int) -> None:
        values = np.arange(start, min(start + _CHUNK, count))
        moved = _feistel(values, side, tables)
        while (outside := moved >= count).any():  # the square has up to 2·side more cells than needed
            moved[outside] = _feistel(moved[outside], side, tables)
        order[start : start + len(values)] = moved

    in_threads(fill, range(0, count, _CHUNK))
    return order


def in_threads(function: Callable[[int], Result], items: Iterable[int]) -> list[Result]:
    """Map a function over items in threads, in order; numpy releases the interpreter's lock, so they overlap."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _feistel(values: NDArray[np.int64], side: int, tables: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Map [0, side²) onto itself: row and column shift each other in turns, modulo side."""
    left, right = np.divmod(values, side)
    for table in tables:
        left += np.take(table, right)
        # left mod side, for values below 2·side: the smaller of both candidates as unsigned numbers
        np.minimum(left.view(np.uint64), (left - side).view(np.uint64), out=left.view(np.uint64))
        left, right = right, left
    return left * side + right


def sample(count: int, num_taken: int, key: int) -> NDArray[np.int64]:
    """Draw [num_taken] distinct values of 0 … count-1, in random order, without visiting all of them."""
    if num_taken * 4 > count:
        return permutation(count, key)[:num_taken].astype(np.int64)
    drawn = np.zeros(0, np.int64)
    for number in range(num_taken + 64):
        counters = np.arange(2 * num_taken + 16) + number * (2 * num_taken + 16)
        drawn = np.concatenate([drawn, (mix(counters, key) % np.uint64(count)).astype(np.int64)])
        _, first = np.unique(drawn, return_index=True)
        drawn = drawn[np.sort(first)]
        if len(drawn) >= num_taken:
            break
    return drawn[:num_taken]
