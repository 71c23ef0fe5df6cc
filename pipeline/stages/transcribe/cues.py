"""Cues: what every subtitle reader returns, and the shared steps from marked-up text to a cue.

Any characters may come in. A cue's text has no markup unless the settings keep it, and no invisible characters.
"""

import codecs
import html
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from pydantic import field_validator

from clipmill.base.errors import ItemError
from clipmill.base.settings import Settings


class SubtitleSettings(Settings):
    """Settings of reading subtitle files: their encoding, and which parts of their text are kept."""

    # Speaker labels (">> ", "- ", "JOHN:", <v Name>). Removed by default: they are not spoken.
    speakers: Literal["remove", "keep"] = "remove"
    # Descriptions of sounds ("[Music]", "(applause)") and ♪ signs. Removed by default: they are not spoken either.
    sounds: Literal["remove", "keep"] = "remove"
    # Formatting such as <i>, <font …> or {\an8}. Tags with word times are always removed, because they become times.
    markup: Literal["remove", "keep"] = "remove"
    # Cues that repeat the line before them, as automatic captions do. auto: collapse files in which most cues do so.
    roll_up: Literal["auto", "collapse", "keep"] = "auto"
    # A Python codec name, if the encoding is known (gbk, cp1251 …). auto: byte order mark, then UTF-8, UTF-16, or a
    # guess among the encodings of the file's language.
    encoding: str = "auto"

    @field_validator("encoding")
    @classmethod
    def _known_codec(cls, name: str) -> str:
        if name != "auto":
            try:
                codecs.lookup(name)
            except LookupError:
                raise ValueError('must be "auto" or a codec name that Python knows, such as utf-8 or gbk') from None
        return name


@dataclass(frozen=True, slots=True)
class Mark:
    """A word time: the text from character `offset` on is spoken from `start_s` (to `end_s` if that is known)."""

    offset: int
    start_s: float
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class Cue:
    """A piece of subtitle text with the time it is shown, in seconds."""

    start_s: float
    end_s: float
    text: str  # lines separated by \n
    marks: tuple[Mark, ...] = ()  # in order of offset; empty if the file has no word times


@dataclass(frozen=True)
class Cues:
    """The cues of a subtitle file or track, repaired."""

    cues: tuple[Cue, ...]  # in time order, start_s < end_s, none blank
    format: str
    language: str | None = None  # from the file's own header
    repairs: dict[str, int] = field(default_factory=dict)  # number of repairs by kind
    encoding: str | None = None  # Python's name of it; None: the source was text already
    encoding_guessed: bool = False  # neither the file nor the settings name the encoding, and it is not UTF-8


@dataclass
class Reading:
    """Context of reading one text: settings, the frame rate of the video, and a count of repairs."""

    settings: SubtitleSettings
    fps: float | None = None  # of the video, for times in frames
    repairs: Counter[str] = field(default_factory=Counter)


def unreadable(why: str) -> ItemError:
    """Return the ItemError of a subtitle file that cannot be used."""
    return ItemError("subtitle-unreadable", why)


Item = TypeVar("Item")
BAD_CUE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)  # raised for one malformed cue


def each_cue(items: Iterable[Item], make: Callable[[Item], Cue | None], reading: Reading) -> list[Cue]:
    """Make a cue of each item; one that cannot be made is counted as the repair "bad-cue" and left out.

    Raises ItemError "subtitle-unreadable" if none of the items is good and at least one is bad.
    """
    cues, failure, num_good = [], None, 0
    for item in items:
        try:
            cue = make(item)
        except BAD_CUE as error:
            reading.repairs["bad-cue"] += 1
            failure = error
            continue
        num_good += 1
        if cue is not None:
            cues.append(cue)
    if failure is not None and not num_good:
        raise unreadable(f"none of its cues can be read ({type(failure).__name__}: {failure})"[:300]) from failure
    return cues


# --- marked-up text ------------------------------------------------------------------------------------------------

CLOCK = r"(-?)(?:(\d{1,6}):)?(\d{1,3}):(\d{1,2})(?:[.,:](\d{1,9}))?"
_TIME_TAG = re.compile(rf"<{CLOCK}>")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|\{\\[^{}]*\}")
_VOICE = re.compile(r"<v(?:\.[^\s>]*)?\s+([^<>]*)>")
_RUBY_TEXT = re.compile(r"<rt\b[^<>]*>.*?(?:</rt>|$)", re.S)
# Control characters, halves of surrogate pairs and U+FFFD cannot be spoken; some of them cannot even be stored.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ud800-\udfff"
    "\ufeff\ufff9-\uffff]"
)
_BIG_NUMBER = re.compile(r"&#(?:[xX]0*[0-9a-fA-F]{7,}|0*[0-9]{8,});?")  # beyond Unicode, or beyond what int() takes


def seconds(sign: str, hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    """Convert the groups of `CLOCK` to seconds."""
    value = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction or 0}")
    return -value if sign else value


def marked_up_cue(start_s: float, end_s: float, payload: str, settings: SubtitleSettings) -> Cue:
    """Make a cue of marked-up text: word-time tags become marks, entities become characters."""
    pieces = _TIME_TAG.split(_RUBY_TEXT.sub("", payload))  # text, then (5 clock groups, text) per tag
    times = [start_s] + [seconds(*pieces[k : k + 5]) for k in range(1, len(pieces), 6)]
    return joined(start_s, end_s, [(at, _plain(text, settings)) for at, text in zip(times, pieces[::6], strict=True)])


def joined(start_s: float, end_s: float, pieces: Sequence[tuple[float, str]]) -> Cue:
    """Make a cue of (start_s, text) pieces; a single piece carries no word times."""
    text, marks = "", []
    for at, piece in pieces:
        marks.append(Mark(len(text), at))
        text += visible(piece)
    return Cue(start_s, end_s, text, tuple(marks) if len(marks) > 1 else ())


def moved(cue: Cue, offset_s: float) -> Cue:
    """Return the cue `offset_s` seconds later."""
    if not offset_s:
        return cue
    marks = tuple(
        Mark(mark.offset, mark.start_s + offset_s, None if mark.end_s is None else mark.end_s + offset_s)
        for mark in cue.marks
    )
    return Cue(cue.start_s + offset_s, cue.end_s + offset_s, cue.text, marks)


def visible(text: str) -> str:
    """Remove characters that are neither seen nor spoken."""
    return _INVISIBLE.sub("", text)


def unescape(text: str) -> str:
    """Replace character references as HTML does; one to an impossible character becomes nothing."""
    return html.unescape(_BIG_NUMBER.sub("", text))


def _plain(text: str, settings: SubtitleSettings) -> str:
    """Remove markup as the settings ask, and replace character references."""
    if settings.speakers == "keep":
        text = _VOICE.sub(lambda match: f"{match[1].strip()}: ", text)
    if settings.markup == "remove":
        text = _TAG.sub("", text)
    else:  # YouTube's <c> only carries the word times
        text = re.sub(r"</?c(?:\.[^<>]*)?>", "", text)
    return unescape(text)
