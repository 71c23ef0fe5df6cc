"""Words to sentences: at punctuation where the transcript has it, else at pauses, and nowhere longer than a limit.

Automatic captions often have no punctuation. A punctuation restorer can be plugged in (`punctuate`): a function that
gets all words of a transcript as a list of strings and answers with the punctuated text as one string. It may change
words; the result is aligned to the word times again. A model that sees only so many words at a time makes its own
windows. Example: `--set segment.punctuate=my_package.restore:punctuate`.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import Field

from clipmill.base.errors import ItemError, UserError
from clipmill.base.settings import Settings
from pipeline.stages.transcribe.words import Word, join_words, tokens


class SentenceSettings(Settings):
    pause_s: float = Field(0.6, gt=0)  # without punctuation a longer pause ends a sentence; breathing takes less
    max_gap_s: float = Field(3.0, gt=0)  # a longer silence always ends a sentence, and no span reaches across it
    max_words: int = Field(50, ge=2)  # longer sentences are broken at a pause or comma: few people speak longer ones
    words_per_stop: int = Field(80, ge=1)  # with fewer stops than one per so many words there is no punctuation
    # "module:function" that restores punctuation; None: none is restored
    punctuate: str | None = Field(None, pattern=r"^[\w.]+:\w+$")


@dataclass(frozen=True, slots=True)
class Sentence:
    text: str
    first_word: int  # index into the words
    last_word: int  # inclusive


def split_sentences(words: Sequence[Word], settings: SentenceSettings | None = None) -> list[Sentence]:
    """Sentences that cover the words, each word in exactly one, in order."""
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
            sentences += broken_up(words, first, last, settings.max_words)
        first = last + 1
    return [sentence_of(words, first, last) for first, last in sentences]


def sentence_of(words: Sequence[Word], first: int, last: int) -> Sentence:
    return Sentence(join_words(word.text for word in words[first : last + 1]), first, last)


def gap_after(words: Sequence[Word], k: int) -> float:
    """Silence in seconds between word k and the next; 0 after the last."""
    return words[k + 1].start_s - words[k].end_s if k + 1 < len(words) else 0.0


_CLOSING = "\"'”’»)]}」』）】》〉"
_OPENING = "\"'“‘«([{「『（【¿¡-–—"
_NEVER = frozenset("mr mrs ms dr prof st mt vs fig e.g i.e sen rep gen capt lt col sgt rev hon gov approx dept".split())
_SELDOM = frozenset(
    "etc inc ltd co corp jr sr bros a.m p.m u.s u.k u.n e.u ph.d m.d b.a m.a d.c jan feb aug sept oct nov dec".split()
)
_HARD = re.compile(r"[!?！？。｡؟।॥。]$|[^.]\?!$")


def ends_sentence(words: Sequence[Word], k: int) -> bool:
    """Whether word k ends a sentence by its punctuation and by what follows it."""
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
    """Whether the full stop after `stem` belongs to the word: titles, initials, list numbers."""
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
    """How much ending a piece after word k hurts: 0 at a sentence's end, less at pauses and commas, 1 amid a phrase."""
    if k + 1 >= len(words) or ends_sentence(words, k):
        return 0.0
    comma = words[k].text.rstrip(_CLOSING).endswith((",", ";", ":", "，", "、", "；", "：", "–", "—"))
    pause = min(1.0, max(0.0, gap_after(words, k)) / 0.6)
    return (0.4 if comma else 1.0) * (1.0 - 0.9 * pause)


def broken_up(words: Sequence[Word], first: int, last: int, max_words: int) -> list[tuple[int, int]]:
    """first..last in pieces of at most `max_words`, each cut made where it hurts least, the middle before the ends."""
    pieces, waiting = [], [(first, last)]
    while waiting:
        first, last = waiting.pop()
        count = last - first + 1
        if count <= max_words:
            pieces.append((first, last))
            continue
        margin = max(1, count // 5)
        places = range(first + margin - 1, last - margin + 1)
        centre = (first + last - 1) / 2
        cut = min(places, key=lambda k: (break_cost(words, k) + abs(k - centre) / count, k))
        waiting += [(cut + 1, last), (first, cut)]
    return pieces


def restore_punctuation(words: Sequence[Word], settings: SentenceSettings) -> tuple[list[Word], list[float]]:
    """The words as the restorer writes them with the times of the given ones, and each word's alignment cost.

    Without a restorer: the words as they are, at cost 0. Raises UserError when the setting names nothing that can be
    called, ItemError "punctuation-failed" when the restorer fails on this transcript or answers with no words.
    """
    if settings.punctuate is None or not words:
        return list(words), [0.0] * len(words)
    from pipeline.stages.transcribe.alignment import retime

    restorer = load_restorer(settings.punctuate)
    try:
        text = restorer([word.text for word in words])
    except Exception as error:  # somebody else's model: whatever it raises is this transcript's failure
        raise ItemError("punctuation-failed", f"{settings.punctuate}: {type(error).__name__}: {error}") from error
    restored = [Word(token, 0.0, 0.0) for _, _, token in tokens(text)] if isinstance(text, str) else []
    if not restored:
        raise ItemError("punctuation-failed", f"{settings.punctuate} answered {type(text).__name__} without words")
    timed, costs = retime(restored, words)
    return timed, costs.tolist()


def load_restorer(path: str) -> Callable[[list[str]], str]:
    module, _, name = path.partition(":")
    try:
        restorer = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"setting segment.punctuate = {path!r}: {error}; give module:function.") from error
    if not callable(restorer):
        raise UserError(f"setting segment.punctuate = {path!r} is a {type(restorer).__name__}; give module:function.")
    return restorer
