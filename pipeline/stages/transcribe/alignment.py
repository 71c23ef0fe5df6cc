"""Align the words of a text with words that have times, by dynamic time warping (docs/methods/hd_vila.md, 2.1 step 4).

Two callers need it: a manual transcript takes word times from automatic captions, and a transcript whose punctuation
was restored takes its times from the words before. The text may differ from the timed words in any way.

Letters: u_1..u_m are the words of the text, w_1..w_n the timed words. The cost of a pair is 0 for words that are equal
after normalisation, else their edit distance divided by the longer length. Steps are (1,1), (1,0) and (0,1); u_i is
compared with words at most `band` away from the diagonal. Costs are integers in 1/10,000, so that totals and ties are
exact. Reading words from files belongs in `subtitles`.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from pipeline.stages.transcribe.words import Word, in_order

SCALE = 10_000
MAX_BAND = 1000  # some 7 minutes of speech: bounds memory to 250 bytes per word
MATCHED = 0.5  # a pair that differs in more than half of its letters does not match
_MAX_CHARS = 63  # characters compared per word, so that a long run of text without spaces costs no time
_BLOCK = 256  # words of the text per cost matrix, which bounds its memory
_FAR = np.int64(1) << 50


@dataclass(frozen=True)
class Alignment:
    """The cheapest path: pair k aligns word rows[k] of the text with timed word columns[k], at costs[k] in 0..1."""

    rows: np.ndarray  # int64, never decreasing, every word of the text at least once
    columns: np.ndarray  # int64, never decreasing, every timed word at least once
    costs: np.ndarray  # float64

    @property
    def total(self) -> float:
        """Return the sum of the costs of all pairs."""
        return float(self.costs.sum())

    def word_costs(self, num_words: int) -> np.ndarray:
        """Return the mean cost of each word's pairs, float64 [num_words]."""
        pairs = np.bincount(self.rows, minlength=num_words)
        return np.bincount(self.rows, weights=self.costs, minlength=num_words) / np.maximum(pairs, 1)


def normalise(text: str) -> str:
    """Return the form in which two spellings of a word are equal: folded case, no punctuation, NFKC."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return ("".join(ch for ch in folded if ch.isalnum()) or folded.strip())[:_MAX_CHARS]


def band_of(num_text: int, num_timed: int) -> int:
    """Return how many words from the diagonal pairs are compared: max(50, 0.05 n), at most `MAX_BAND`."""
    wanted = min(max(50, -(-num_timed // 20)), MAX_BAND)
    return max(wanted, -(-num_timed // num_text))  # a narrower band would not connect the two ends


def align(text: Sequence[str], timed: Sequence[str]) -> Alignment:
    """Return the cheapest alignment of a text with timed words, neither empty; 20,000 words take a second or two."""
    u, w = [normalise(word) for word in text], [normalise(word) for word in timed]
    assert u and w, "nothing to align"
    band = band_of(len(u), len(w))
    centres = [i * (len(w) - 1) // (len(u) - 1) if len(u) > 1 else 0 for i in range(len(u))]
    windows = [(max(0, centre - band), min(len(w), centre + band + 1)) for centre in centres]
    bits: list[_Row] = []
    buffer = np.full(len(w) + 1, _FAR, np.int64)  # buffer[j + 1]: cost of the best path to (row before, j)
    for first in range(0, len(u), _BLOCK):
        rows = range(first, min(first + _BLOCK, len(u)))
        low = windows[rows[0]][0]
        costs = pair_costs(u[first : first + _BLOCK], w[low : windows[rows[-1]][1]])
        for i in rows:
            start, stop = windows[i]
            bits.append(_step(buffer, costs[i - first, start - low : stop - low], start, stop, i == 0))
    return _trace(u, w, windows, bits)


class _Row(NamedTuple):
    """Back-pointers of one row, a bit per cell: reached from the left, else from above, else diagonally."""

    left: np.ndarray
    above: np.ndarray


def _step(buffer: np.ndarray, cost: np.ndarray, start: int, stop: int, first: bool) -> _Row:
    """Compute one row of the recurrence D[j] = c[j] + min(D'[j-1], D'[j], D[j-1]) as whole-array operations.

    `buffer` holds the row before and is overwritten with this one, in the columns start..stop.

    With S the running sum of c, D[j] - S[j] is the running minimum of min(D'[k-1], D'[k]) - S[k-1] over k <= j.
    Ties are broken towards the diagonal, then from above.
    """
    diagonal, above = buffer[start:stop], buffer[start + 1 : stop + 1]
    entry = np.minimum(diagonal, above)
    if first:
        entry = np.concatenate([[np.int64(0)], entry[1:]])
    sums = np.cumsum(cost, dtype=np.int64)
    best = sums + np.minimum.accumulate(entry - (sums - cost))
    row = _Row(np.packbits(best < entry + cost), np.packbits(above < diagonal))
    buffer[start + 1 : stop + 1] = best
    buffer[start] = _FAR  # no later path may enter left of the window
    return row


def _trace(u: list[str], w: list[str], windows: list[tuple[int, int]], bits: list[_Row]) -> Alignment:
    """Follow the back-pointers from the last pair to the first."""
    i, j = len(u) - 1, len(w) - 1
    path = [(i, j)]
    while i or j:
        column = j - windows[i][0]
        byte, mask = column >> 3, 0x80 >> (column & 7)
        if bits[i].left[byte] & mask:
            j -= 1
        elif bits[i].above[byte] & mask:
            i -= 1
        else:
            i, j = i - 1, j - 1
        path.append((i, j))
    path.reverse()
    pairs = {(u[i], w[j]) for i, j in path}
    cost = {pair: int(pair_costs([pair[0]], [pair[1]])[0, 0]) if pair[0] != pair[1] else 0 for pair in sorted(pairs)}
    rows, columns = np.array(path, np.int64).T
    return Alignment(rows, columns, np.array([cost[u[i], w[j]] for i, j in path]) / SCALE)


def pair_costs(text: Sequence[str], timed: Sequence[str]) -> np.ndarray:
    """Return the cost of every pair of normalised words, int64 [len(text), len(timed)] in 1/10,000."""
    patterns, row_of = np.unique(np.array(text, dtype=object), return_inverse=True)
    targets, column_of = np.unique(np.array(timed, dtype=object), return_inverse=True)
    distance = cdist(patterns, targets, scorer=Levenshtein.distance, dtype=np.int64)
    longer = np.maximum(_lengths(patterns)[:, None], _lengths(targets)[None])
    return np.rint(distance * SCALE / np.maximum(longer, 1)).astype(np.int64)[row_of][:, column_of]


def _lengths(words: Sequence[str]) -> np.ndarray:
    return np.array([len(word) for word in words], np.int64)


def retime(words: Sequence[Word], timed: Sequence[Word]) -> tuple[list[Word], np.ndarray]:
    """Give the words of a text the times of the timed words they align with; return also each word's mean cost 0..1.

    A word takes the times of its cheapest pairs. A word without a match keeps its own time, clamped between the matches
    around it.
    """
    alignment = align([word.text for word in words], [word.text for word in timed])
    starts, ends = np.full(len(words), np.nan), np.full(len(words), np.nan)
    best = np.full(len(words), np.inf)
    np.minimum.at(best, alignment.rows, alignment.costs)
    for i, j, cost in zip(alignment.rows, alignment.columns, alignment.costs, strict=True):
        if cost <= MATCHED and cost == best[i]:
            starts[i] = timed[j].start_s if np.isnan(starts[i]) else starts[i]
            ends[i] = timed[j].end_s
    return in_order(_between_matches(words, starts, ends)), alignment.word_costs(len(words))


def _between_matches(words: Sequence[Word], starts: np.ndarray, ends: np.ndarray) -> list[Word]:
    """Place words without a match by their own times, clamped between the matches before and after."""
    before = np.fmax.accumulate(np.where(np.isnan(ends), -np.inf, ends))
    after = np.fmin.accumulate(np.where(np.isnan(starts), np.inf, starts)[::-1])[::-1]
    placed = []
    for k, word in enumerate(words):
        start, end = starts[k], ends[k]
        if np.isnan(start):
            start = min(max(word.start_s, before[k]), after[k])
            end = min(max(word.end_s, start), after[k])
        placed.append(Word(word.text, float(start), float(end)))
    return placed
