"""Words with times, and the shared operations on them: tokenising, joining, ordering.

Words come from subtitles, from speech recognition and from the corpus. After `in_order` they never overlap. Keep this
module free of file formats and of imports beyond the standard library.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Word:
    """A spoken token. `text` never starts or ends with white space and contains the punctuation that follows it."""

    text: str
    start_s: float
    end_s: float


_WIDE = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_OPENING = "「『（《〈【“‘［"
_TOKEN = re.compile(rf"[{_OPENING}]*[{_WIDE}][^\w\s{_OPENING}]*|(?:(?![{_WIDE}])\S)+")
_WIDE_END = re.compile(rf"[{_WIDE}\u3000-\u303f\uff00-\uffef]$")
_WIDE_START = re.compile(rf"[{_WIDE}\u3000-\u303f\uff00-\uffef]")


def tokens(text: str) -> list[tuple[int, int, str]]:
    """Split a text into words; return (start, end, word) with character offsets.

    Chinese and Japanese, which are written without spaces, are split into characters. Free-standing punctuation (the
    French "?", a dash) belongs to the word before it.
    """
    found: list[tuple[int, int, str]] = []
    for match in _TOKEN.finditer(text):
        if says_something(match[0]):
            found.append((match.start(), match.end(), match[0]))
        elif found:
            start, end, before = found[-1]
            gap = "" if match.start() == end else " "
            found[-1] = (start, match.end(), before + gap + match[0])
    return found


def join_words(texts: Iterable[str]) -> str:
    """Join words to running text: with a space between them, but none between Chinese or Japanese characters."""
    joined = ""
    for text in texts:
        tight = not joined or (_WIDE_END.search(joined[-1]) and _WIDE_START.match(text))
        joined += text if tight else f" {text}"
    return joined


def says_something(text: str) -> bool:
    """Return whether a text has a letter or digit, and so something that can be spoken."""
    return any(ch.isalnum() for ch in text)


def longest_s(text: str) -> float:
    """Return the seconds that a word takes when spoken slowly.

    It bounds words timed by tags: a tag marks the start of a word, not the start of the silence after it.
    """
    return 0.25 + 0.08 * len(text)


def in_order(words: Sequence[Word], cap: bool = False) -> list[Word]:
    """Make starts never decrease and ends never pass the next start; round times to 1 ms.

    Words with the same start share the time until the next one. `cap` bounds the length of each word by `longest_s`.
    """
    starts, high = [], 0.0
    for word in words:
        high = max(high, word.start_s)
        starts.append(high)
    ends = [max(word.end_s, start) for word, start in zip(words, starts, strict=True)]
    first = 0
    for k in range(1, len(words) + 1):
        if k == len(words) or starts[k] > starts[first]:
            if k - first > 1 or ends[first] <= starts[first]:
                _share(words, starts, ends, first, k, starts[k] if k < len(words) else math.inf, cap)
            first = k
    result = []
    for k, word in enumerate(words):
        end = min(ends[k], starts[k + 1] if k + 1 < len(words) else math.inf)
        end = min(end, starts[k] + longest_s(word.text)) if cap else end
        result.append(Word(word.text, round(starts[k], 3), round(end, 3)))
    return result


def _share(
    words: Sequence[Word], starts: list[float], ends: list[float], first: int, stop: int, limit: float, cap: bool
) -> None:
    """Spread words first..stop, which start together, over the time until they end or `limit`, the next start.

    `starts` and `ends` are changed in place.
    """
    slowest = starts[first] + sum(longest_s(word.text) for word in words[first:stop])
    end = min(limit, max(ends[first:stop]))
    if cap or end <= starts[first]:
        end = min(limit, slowest if end <= starts[first] else min(end, slowest))
    total, at = sum(len(word.text) for word in words[first:stop]), starts[first]
    step = (end - at) / max(1, total)
    for k in range(first, stop):
        starts[k], at = at, min(at + step * len(words[k].text), end)
        ends[k] = at
