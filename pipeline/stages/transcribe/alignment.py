"""Words of a text found again among words with times, by dynamic time warping.

docs/methods/hd_vila.md section 2.1 step 4. Needed where the text is not the timed words themselves: a manual transcript
against the word times of the automatic captions, or a transcript whose punctuation was restored by something that also
rewrites words.

Letters: u_1..u_m are the words of the text, w_1..w_n the timed words. The cost of a pair is 0 for words that are equal
after normalisation, else their edit distance divided by the longer length; steps (1,1), (1,0), (0,1); u_i is compared
with words at most `band` away from the diagonal. Costs are integers in 1/10,000, so that totals and ties are exact.
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
MATCHED = 0.5  # a pair that differs in more than half of its letters is no match
_MAX_CHARS = 63  # compare no more characters of a word: a long run of text without spaces must not cost time
_BLOCK = 256  # words of the text whose costs are computed together
_FAR = np.int64(1) << 50


@dataclass(frozen=True)
class Alignment:
    """The cheapest path: pair k says that u[rows[k]] is spoken with w[columns[k]], at costs[k] in 0..1."""

    rows: np.ndarray  # int64, never decreasing, every word of the text at least once
    columns: np.ndarray  # int64, never decreasing, every timed word at least once
    costs: np.ndarray  # float64

    @property
    def total(self) -> float:
        return float(self.costs.sum())

    def word_costs(self, num_words: int) -> np.ndarray:
        """Mean cost of the pairs of each word of the text."""
        pairs = np.bincount(self.rows, minlength=num_words)
        return np.bincount(self.rows, weights=self.costs, minlength=num_words) / np.maximum(pairs, 1)


def normalise(text: str) -> str:
    """What two spellings of a word have in common: no case, no punctuation, one Unicode form."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return ("".join(ch for ch in folded if ch.isalnum()) or folded.strip())[:_MAX_CHARS]


def band_of(num_text: int, num_timed: int) -> int:
    """max(50, 0.05 n), at most `MAX_BAND`, but never so narrow that the ends cannot be joined."""
    wanted = min(max(50, -(-num_timed // 20)), MAX_BAND)
    return max(wanted, -(-num_timed // num_text))


def align(text: Sequence[str], timed: Sequence[str]) -> Alignment:
    """The cheapest alignment of a text with timed words, neither empty. A second or two for 20,000 words."""
    u, w = [normalise(word) for word in text], [normalise(word) for word in timed]
    assert u and w, "nothing to align"
    windows = _windows(len(u), len(w))
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


def _windows(m: int, n: int) -> list[tuple[int, int]]:
    """For each word of the text, the timed words it is compared with: the diagonal's, plus and minus the band."""
    band = band_of(m, n)
    centres = [i * (n - 1) // (m - 1) if m > 1 else 0 for i in range(m)]
    return [(max(0, centre - band), min(n, centre + band + 1)) for centre in centres]


class _Row(NamedTuple):
    """How each cell of a row was reached, one bit per cell: from the left, else from above, else diagonally."""

    left: np.ndarray
    above: np.ndarray


def _step(buffer: np.ndarray, cost: np.ndarray, start: int, stop: int, first: bool) -> _Row:
    """One row of the recurrence D[j] = c[j] + min(D'[j-1], D'[j], D[j-1]) as whole-array operations.

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
    buffer[start] = _FAR  # left of the window nothing may be reached any more
    return row


def _trace(u: list[str], w: list[str], windows: list[tuple[int, int]], bits: list[_Row]) -> Alignment:
    i, j = len(u) - 1, len(w) - 1
    path = [(i, j)]
    while i or j:
        place = j - windows[i][0]
        byte, mask = place >> 3, 0x80 >> (place & 7)
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
    """Cost of every pair of normalised words, int64 [len(text), len(timed)] in 1/10,000."""
    patterns, row_of = np.unique(np.array(text, dtype=object), return_inverse=True)
    targets, column_of = np.unique(np.array(timed, dtype=object), return_inverse=True)
    distance = cdist(patterns, targets, scorer=Levenshtein.distance, dtype=np.int64)
    longer = np.maximum(_lengths(patterns)[:, None], _lengths(targets)[None])
    return np.rint(distance * SCALE / np.maximum(longer, 1)).astype(np.int64)[row_of][:, column_of]


def _lengths(words: Sequence[str]) -> np.ndarray:
    return np.array([len(word) for word in words], np.int64)


def retime(words: Sequence[Word], timed: Sequence[Word]) -> tuple[list[Word], np.ndarray]:
    """The words of a text with the times of the timed words they align with, and each word's mean cost.

    A word takes the times of its cheapest pairs. One that matches nothing keeps its own time, moved between those of
    the matches around it.
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
    """Words without a match placed by their own times, clamped between the matches before and after."""
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
