"""Split words into sentences: at punctuation if the transcript has any, else at pauses, none longer than a limit.

Automatic captions often have no punctuation. The setting `punctuate` plugs in a function that restores it: it gets all
words of a transcript as a list of strings and returns the punctuated text as one string. It may change words, because
the result is aligned to the word times again. A model with a limited context has to make its own windows. Example:
`--set segment.punctuate=my_package.restore:punctuate`.

Words come in as `in_order` leaves them. Rules about lengths of clips belong in `segment`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from clipmill.base.errors import ItemError, UserError
from clipmill.base.plugins import load_attribute
from clipmill.base.settings import Settings, setting
from pipeline.stages.transcribe.words import Word, join_words, tokens


class SentenceSettings(Settings):
    """Settings of finding sentences in words."""

    # Seconds of silence that end a sentence in a transcript without punctuation. Breathing takes less than 0.6 s.
    pause_s: float = Field(0.6, gt=0)
    # Seconds of silence that always end a sentence, and that no span crosses. 3 s is longer than pauses in a sentence.
    max_gap_s: float = Field(3.0, gt=0)
    # Longer sentences are split at a pause or comma. 50 words: few spoken sentences are longer.
    max_words: int = Field(50, ge=2)
    # With fewer full stops than one per this many words, a transcript counts as unpunctuated. Sentences of 80 words
    # are rarer than transcripts without punctuation.
    words_per_stop: int = Field(80, ge=1)
    # "module:function" that restores punctuation; null: punctuation stays as it is.
    punctuate: str | None = setting(None, pattern=r"^[\w.]+:\w+$", reaches="runs code")


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence, as a range of words."""

    text: str
    first_word: int  # index into the words
    last_word: int  # inclusive


def split_sentences(words: Sequence[Word], settings: SentenceSettings | None = None) -> list[Sentence]:
    """Split words into sentences, in order, each word in exactly one."""
    settings = settings or SentenceSettings()
    if not words:
        return []
    stops = [ends_sentence(words, k) for k in range(len(words))]
    if sum(stops) * settings.words_per_stop < len(words):
        stops = [gap_after(words, k) > settings.pause_s for k in range(len(words))]
    ends = [k for k, stop in enumerate(stops) if stop or gap_after(words, k) > settings.max_gap_s]
    sentences, first = [], 0
    for last in [*ends, len(words) - 1]:
        if first <= last:
            sentences += split_long(words, first, last, settings.max_words)
        first = last + 1
    return [sentence_of(words, first, last) for first, last in sentences]


def sentence_of(words: Sequence[Word], first: int, last: int) -> Sentence:
    """Make a sentence of the words first..last, both included."""
    return Sentence(join_words(word.text for word in words[first : last + 1]), first, last)


def gap_after(words: Sequence[Word], k: int) -> float:
    """Return the seconds of silence between word k and the next; 0 after the last."""
    return words[k + 1].start_s - words[k].end_s if k + 1 < len(words) else 0.0


_CLOSING = "\"'”’»)]}」』）】》〉"
_OPENING = "\"'“‘«([{「『（【¿¡-–—"
_NEVER = frozenset("mr mrs ms dr prof st mt vs fig e.g i.e sen rep gen capt lt col sgt rev hon gov approx dept".split())
_SELDOM = frozenset(
    "etc inc ltd co corp jr sr bros a.m p.m u.s u.k u.n e.u ph.d m.d b.a m.a d.c jan feb aug sept oct nov dec".split()
)
_HARD = re.compile(r"[!?！？。｡؟।॥。]$|[^.]\?!$")


def ends_sentence(words: Sequence[Word], k: int) -> bool:
    """Return whether word k ends a sentence, by its punctuation and by the next word."""
    text = words[k].text.rstrip(_CLOSING)
    following = words[k + 1].text.lstrip(_OPENING) if k + 1 < len(words) else ""
    if _HARD.search(text):
        return True
    if text.endswith(("…", "...")):
        return not following[:1].islower()
    if not text.endswith("."):
        return False
    return not _is_abbreviation(text.lstrip(_OPENING)[:-1], following, first=k == 0)


def _is_abbreviation(stem: str, following: str, first: bool) -> bool:
    """Return whether the full stop after `stem` belongs to the word: a title, an initial, a list number."""
    lower = stem.casefold()
    if lower in _NEVER or (first and stem.isdigit()):
        return True
    if lower == "no":
        return following[:1].isdigit()
    if len(stem) == 1 and stem.isalpha() and stem.isupper() and stem != "I":
        return True
    dotted = lower in _SELDOM or re.fullmatch(r"(?:\w\.)+\w", stem) is not None
    return dotted and following[:1].islower()


def break_cost(words: Sequence[Word], k: int) -> float:
    """Return the cost of a cut after word k: 0 at a sentence's end, low at pauses and commas, 1 inside a phrase."""
    if k + 1 >= len(words) or ends_sentence(words, k):
        return 0.0
    comma = words[k].text.rstrip(_CLOSING).endswith((",", ";", ":", "，", "、", "；", "：", "–", "—"))
    pause = min(1.0, max(0.0, gap_after(words, k)) / 0.6)
    return (0.4 if comma else 1.0) * (1.0 - 0.9 * pause)


def split_long(words: Sequence[Word], first: int, last: int, max_words: int) -> list[tuple[int, int]]:
    """Split words first..last into pieces of at most `max_words`, at the cheapest cuts, those in the middle first."""
    pieces, waiting = [], [(first, last)]
    while waiting:
        first, last = waiting.pop()
        count = last - first + 1
        if count <= max_words:
            pieces.append((first, last))
            continue
        margin = max(1, count // 5)
        candidates = range(first + margin - 1, last - margin + 1)
        centre = (first + last - 1) / 2
        cut = min(candidates, key=lambda k: (break_cost(words, k) + abs(k - centre) / count, k))
        waiting += [(cut + 1, last), (first, cut)]
    return pieces


def restore_punctuation(words: Sequence[Word], settings: SentenceSettings) -> tuple[list[Word], list[float]]:
    """Restore punctuation by the plugged-in function; return the words with their times, and their alignment costs.

    Without such a function the words are returned as they are, at cost 0. Raises UserError if the setting does not
    name a function, ItemError "punctuation-failed" if the function fails or returns no words.
    """
    if settings.punctuate is None or not words:
        return list(words), [0.0] * len(words)
    from pipeline.stages.transcribe.alignment import retime

    restorer = load_attribute("segment.punctuate", settings.punctuate)
    if not callable(restorer):
        raise UserError(f"setting segment.punctuate = {settings.punctuate}: it must name a function.")
    try:
        text = restorer([word.text for word in words])
    except Exception as error:  # a plug-in may raise anything, and only this transcript fails
        raise ItemError("punctuation-failed", f"{settings.punctuate}: {type(error).__name__}: {error}") from error
    restored = [Word(token, 0.0, 0.0) for _, _, token in tokens(text)] if isinstance(text, str) else []
    if not restored:
        problem = f"{settings.punctuate} returned {type(text).__name__} without words; it has to return the text as str"
        raise ItemError("punctuation-failed", problem)
    timed, costs = retime(restored, words)
    return timed, costs.tolist()
