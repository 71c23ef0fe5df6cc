"""Read subtitle files into words with times: VTT, SRT, TTML and YouTube's json3 here, ASS/SSA and others by pysubs2.

The four common formats are read here because pysubs2 1.8 takes a payload line with exactly two word-time tags for a
timing line, drops a cue's last line when it is a number, keeps cue ids and notes as text, and refuses
`00:00:04 --> 00:00:07` (SRT without milliseconds) and TTML's `dur`, frames and ticks.

Any bytes may come in. The result is text with times in order, or ItemError "subtitle-unreadable". A file passes
through: bytes → text (`decode`) → cues (`read_subtitles`, cleaned and repaired, each repair counted) → words
(`words_of`), one token each, without overlaps. A new format is a reader in `_READERS`.
"""

import codecs
import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from pydantic import field_validator

from clipmill.base.errors import ItemError
from clipmill.base.settings import Settings
from pipeline.stages.transcribe.words import Word, in_order, says_something, tokens

MAX_FILE_BYTES = 64 << 20  # ten hours of json3 are 8 MB: a larger file is not a subtitle file
MAX_TIME_S = 100 * 3600.0  # a cue later than this has a broken time
CHARS_PER_S = 15.0  # ordinary speaking speed, from which a cue without an end gets its length
MAX_CHARS_PER_S = 40.0  # faster than anyone speaks: cues that would need it are merged


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
    # A Python codec name, if the encoding is known (gbk, cp1251 …). auto: byte order mark, then UTF-8, UTF-16, cp1252.
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
    """The cues of a subtitle file, repaired."""

    cues: tuple[Cue, ...]  # in time order, start_s < end_s, none blank
    format: str
    language: str | None = None  # from the file's own header
    repairs: dict[str, int] = field(default_factory=dict)  # number of repairs by kind


# --- bytes to text -------------------------------------------------------------------------------------------------


def decode(data: bytes, encoding: str = "auto") -> tuple[str, bool]:
    """Return the text of a file, and whether its encoding was guessed. Never fails: broken bytes are replaced."""
    for bom, name in _BOMS:
        if data.startswith(bom):
            return data[len(bom) :].decode(name, "replace"), False
    if encoding != "auto":
        return data.decode(encoding, "replace"), False
    if name := _utf16_without_bom(data):
        return data.decode(name, "replace"), True
    text = data.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    # A few bad bytes in a file full of good multi-byte characters are damage, not another encoding.
    if broken == 0 or broken < sum(ch > "\x7f" for ch in text) - broken:
        return text.replace("\ufffd", ""), broken > 0
    try:
        return data.decode("cp1252"), True
    except UnicodeDecodeError:
        return data.decode("latin-1"), True


_BOMS = (  # the UTF-32 marks begin with the UTF-16 ones, so they come first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def _utf16_without_bom(data: bytes) -> str | None:
    """Recognise UTF-16 by its zero bytes at every other position: timing lines are ASCII in any language."""
    head = data[:2000]
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) < len(head) / 8 or min(even, odd) > max(even, odd) / 4:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


# --- text to cues --------------------------------------------------------------------------------------------------


def read_subtitles(
    source: str | Path | bytes, format: str | None = None, settings: SubtitleSettings | None = None
) -> Cues:
    """Read a subtitle file (a path, or its bytes) into cues, cleaned by `settings` and repaired.

    The content decides the format; `format` is used only if the content is not recognised. A valid file without
    speech gives no cues. Raises ItemError "subtitle-unreadable".
    """
    settings = settings or SubtitleSettings()
    if isinstance(source, bytes):
        data = source
    else:
        try:
            with open(source, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise unreadable(f"{Path(source).name}: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise unreadable(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB, which no subtitle file is")
    text, guessed = decode(data, settings.encoding)
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    format = sniff(text) or format or "unknown"
    repairs = Counter({"encoding-guessed": 1} if guessed else {})
    language, raw = _READERS.get(format, _read_other)(text, settings)
    cues = _repaired([replace(cue, text=clean(cue.text, settings)) for cue in raw], repairs)
    if settings.roll_up == "collapse" or (settings.roll_up == "auto" and format != "json3"):
        cues = _collapse_roll_up(cues, repairs, always=settings.roll_up == "collapse")
    return Cues(tuple(cues), format, language, dict(sorted((+repairs).items())))


def unreadable(why: str) -> ItemError:
    """Return the ItemError of a subtitle file that cannot be used."""
    return ItemError("subtitle-unreadable", why)


def sniff(text: str) -> str | None:
    """Recognise the format of a subtitle text by its content; return None if that fails."""
    head = text[:4000].lstrip("\ufeff \t\n")
    if head.startswith("WEBVTT"):
        return "vtt"
    if head.startswith("{") and '"events"' in text:
        return "json3"
    if re.search(r"<(?:\w+:)?tt[\s>]", head):
        return "ttml"
    if "[Script Info]" in head:
        return "ass"
    if head[:200].upper().startswith("<SAMI"):
        return "sami"
    return "srt" if _TIMING.search(text) else None


_CLOCK = r"(-?)(?:(\d{1,6}):)?(\d{1,3}):(\d{1,2})(?:[.,:](\d{1,9}))?"
_TIMING = re.compile(rf"^[ \t]*{_CLOCK}[ \t]*-{{1,2}}>[ \t]*{_CLOCK}(?=\s|$)", re.M)
_VTT_SKIPPED = re.compile(r"(?:NOTE|STYLE|REGION)\b")
_TIME_TAG = re.compile(rf"<{_CLOCK}>")


def _seconds(sign: str, hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    value = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction or 0}")
    return -value if sign else value


def _read_blocks(text: str, settings: SubtitleSettings) -> tuple[str | None, list[Cue]]:
    """Read VTT or SRT, payload lines between timing lines; return the header's language and the raw cues."""
    timings = list(_TIMING.finditer(text))
    if not timings and not text.lstrip().startswith("WEBVTT"):
        raise unreadable("it has no timing line such as 00:00:01.000 --> 00:00:02.000")
    ends = [*(match.start() for match in timings), len(text)][1:]
    cues = []
    for match, end in zip(timings, ends, strict=True):
        newline = text.find("\n", match.end())
        payload = text[newline + 1 : end] if 0 <= newline < end else ""
        groups = match.groups()
        lines = _payload_lines(payload, last=end == len(text))
        cues.append(_cue(_seconds(*groups[:5]), _seconds(*groups[5:]), "\n".join(lines), settings))
    header = re.search(r"^Language:\s*([\w-]+)", text[: timings[0].start()] if timings else text, re.M)
    return (header[1] if header else None), cues


def _payload_lines(payload: str, last: bool) -> list[str]:
    """Return a cue's own lines, without the id of the next cue and without VTT notes and styles.

    A blank line does not end a payload: SRT files have blank lines inside cues, and editors strip the single space with
    which YouTube's VTT begins a cue.
    """
    blocks = [block.strip("\n").split("\n") for block in re.split(r"\n[ \t]*\n", f"\n{payload}") if block.strip()]
    touches_next = not last and not re.search(r"\n[ \t]*\n$", f"\n{payload}")
    if touches_next and blocks:
        alone = len(blocks[-1]) == 1 and (len(blocks) > 1 or payload.startswith("\n"))
        if alone or blocks[-1][-1].strip().isdigit():
            blocks[-1] = blocks[-1][:-1]
    return [line for block in blocks if block and not _VTT_SKIPPED.match(block[0]) for line in block]


_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|\{\\[^{}]*\}")
_VOICE = re.compile(r"<v(?:\.[^\s>]*)?\s+([^<>]*)>")
_RUBY_TEXT = re.compile(r"<rt\b[^<>]*>.*?(?:</rt>|$)", re.S)
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff]")


def _cue(start_s: float, end_s: float, payload: str, settings: SubtitleSettings) -> Cue:
    """Make a cue of marked-up text: word-time tags become marks, entities become characters."""
    pieces = _TIME_TAG.split(_RUBY_TEXT.sub("", payload))  # text, then (5 clock groups, text) per tag
    times = [start_s] + [_seconds(*pieces[k : k + 5]) for k in range(1, len(pieces), 6)]
    return _joined(start_s, end_s, [(at, _plain(text, settings)) for at, text in zip(times, pieces[::6], strict=True)])


def _joined(start_s: float, end_s: float, pieces: Sequence[tuple[float, str]]) -> Cue:
    """Make a cue of (start_s, text) pieces; a single piece carries no word times."""
    text, marks = "", []
    for at, piece in pieces:
        marks.append(Mark(len(text), at))
        text += piece
    return Cue(start_s, end_s, text, tuple(marks) if len(marks) > 1 else ())


def _plain(text: str, settings: SubtitleSettings) -> str:
    """Remove markup as the settings ask, replace entities, and drop invisible characters."""
    if settings.speakers == "keep":
        text = _VOICE.sub(lambda match: f"{match[1].strip()}: ", text)
    if settings.markup == "remove":
        text = _TAG.sub("", text)
    else:  # YouTube's <c> only carries the word times
        text = re.sub(r"</?c(?:\.[^<>]*)?>", "", text)
    return _INVISIBLE.sub("", html.unescape(text))


def _read_json3(text: str, settings: SubtitleSettings) -> tuple[str | None, list[Cue]]:
    """Read YouTube's json3: events with a start and a duration in ms, made of segments with offsets from the start."""
    try:
        events = json.loads(text)["events"]
        return None, [_json3_cue(event) for event in events if event.get("segs")]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise unreadable(f"it is not valid json3 ({type(error).__name__}: {error})") from error


def _json3_cue(event: dict) -> Cue:
    """Make a cue of an event; it has word times if any segment has an offset."""
    start_ms = float(event.get("tStartMs", 0))
    end_ms = start_ms + float(event.get("dDurationMs", 0))
    timed = any("tOffsetMs" in segment for segment in event["segs"])
    pieces = [
        ((start_ms + float(segment.get("tOffsetMs", 0))) / 1000, _INVISIBLE.sub("", str(segment.get("utf8", ""))))
        for segment in event["segs"]
    ]
    if not timed:
        pieces = [(start_ms / 1000, "".join(piece for _, piece in pieces))]
    return _joined(start_ms / 1000, end_ms / 1000, pieces)


def _read_ttml(text: str, settings: SubtitleSettings) -> tuple[str | None, list[Cue]]:
    """Read TTML of any version: each <p> is a cue, and its times are relative to those of the enclosing elements."""
    if "<!ENTITY" in text:
        raise unreadable("it declares XML entities, which could expand without limit")
    try:
        root = ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))
        cues = list(_ttml_cues(root, 0.0, _ttml_rates(root)))
    except (ElementTree.ParseError, ValueError, ArithmeticError, RecursionError) as error:
        raise unreadable(f"it is not valid TTML ({error})") from error
    return root.get("{http://www.w3.org/XML/1998/namespace}lang") or None, cues


def _ttml_rates(root: ElementTree.Element) -> dict[str, float]:
    """Return frames ("f") and ticks ("t") per second, as the root element declares them; raises ValueError."""
    found = {name.rpartition("}")[2]: value for name, value in root.attrib.items()}
    frames = float(found.get("frameRate", 30))
    numerator, denominator = (float(part) for part in found.get("frameRateMultiplier", "1 1").replace(":", " ").split())
    rates = {"f": frames * numerator / denominator, "t": float(found.get("tickRate", frames))}
    if not all(math.isfinite(rate) and rate > 0 for rate in rates.values()):
        raise ValueError("its frame or tick rate is not a positive number")
    return rates


def _ttml_cues(element: ElementTree.Element, offset_s: float, rates: dict[str, float]) -> Iterator[Cue]:
    """Yield the cues in an element whose parent begins at `offset_s`."""
    begin_s = offset_s + _ttml_time(element.get("begin", "0s"), rates)
    if element.tag.rpartition("}")[2] == "p":
        if element.get("dur"):
            end_s = begin_s + _ttml_time(element.get("dur", ""), rates)
        else:
            end_s = offset_s + _ttml_time(element.get("end"), rates) if element.get("end") else begin_s
        yield Cue(begin_s, end_s, _INVISIBLE.sub("", _ttml_text(element).strip()))
        return
    for child in element:
        yield from _ttml_cues(child, begin_s, rates)


def _ttml_text(element: ElementTree.Element) -> str:
    """Return the text in an element, with white space collapsed and <br/> as a line break."""
    if element.tag.rpartition("}")[2] == "br":
        return "\n"
    text = re.sub(r"\s+", " ", element.text or "")
    return text + "".join(_ttml_text(child) + re.sub(r"\s+", " ", child.tail or "") for child in element)


def _ttml_time(expression: str, rates: dict[str, float]) -> float:
    """Convert a clock time (HH:MM:SS[.fraction | :frames]) or a count with a unit (h m s ms f t) to seconds."""
    if match := re.fullmatch(r"\s*(-?[\d.]+)(h|m|s|ms|f|t)\s*", expression):
        units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "f": 1 / rates["f"], "t": 1 / rates["t"]}
        return float(match[1]) * units[match[2]]
    match = re.fullmatch(r"\s*(-?)(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)(?::(\d+(?:\.\d+)?))?\s*", expression)
    if not match:
        raise ValueError(f"not a time: {expression!r}")
    value = int(match[2] or 0) * 3600 + int(match[3]) * 60 + float(match[4]) + float(match[5] or 0) / rates["f"]
    return -value if match[1] else value


def _read_other(text: str, settings: SubtitleSettings) -> tuple[str | None, list[Cue]]:
    """Read ASS/SSA, SAMI, MicroDVD and the other formats of pysubs2."""
    import pysubs2

    if "<!ENTITY" in text:
        raise unreadable("it declares XML entities, which could expand without limit")  # pysubs2 may parse it as XML
    try:
        events = pysubs2.SSAFile.from_string(text, format_=sniff(text)).events
    except (pysubs2.exceptions.Pysubs2Error, *_LIBRARY_ERRORS) as error:
        raise unreadable(f"its format is not recognised ({type(error).__name__}: {error})") from error
    spoken = [event for event in events if not event.is_comment and not event.is_drawing]
    return None, [_cue(event.start / 1000, event.end / 1000, event.plaintext, settings) for event in spoken]


# pysubs2 checks little, so that broken files raise any of these.
_LIBRARY_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, SyntaxError)
_READERS = {"vtt": _read_blocks, "srt": _read_blocks, "json3": _read_json3, "ttml": _read_ttml}


# --- unspoken text -------------------------------------------------------------------------------------------------

_BRACKETED = re.compile(r"\[[^\[\]]{0,80}\]|［[^［］]{0,80}］|【[^【】]{0,80}】")
_NOTES = re.compile("[♩♪♫♬🎵🎶]+")
_PARENTHESIS = re.compile(r"[(（]([^()（）]{1,60})[)）]")
_SOUND = re.compile(
    r"\b(?:applau|music|laugh|chuckl|giggl|cheer|sigh|gasp|cough|cry|crie|sob|scream|shout|whisper|grunt|groan|clap|"
    r"whistl|beep|buzz|ring|bark|bang|crash|inaudible|indistinct|unintelligible|silence|crowd|audience|sing)\w*",
    re.I,
)
_CHEVRONS = re.compile(r"(?:(?<=\s)|^)(?:>{2,4}|»)(?=\s|\w|$)", re.M)
_DASH = re.compile(r"^[ \t]*[-‐–—](?!\d)(?=\s*\S)", re.M)
_CAPITALS = r"[^\W\d_a-zà-ÿ][A-ZÀ-Þ0-9.'’&-]+(?: [A-ZÀ-Þ0-9][A-ZÀ-Þ0-9.'’&-]*){0,2}"
_NAME = re.compile(  # in text that is all capitals a colon proves nothing, so a lower-case letter has to follow
    rf"^[ \t]*(?:{_CAPITALS}|(?i:speaker|interviewer|narrator) ?\d{{0,2}}):(?=\s+[^\n]*[^\W\d_A-ZÀ-Þ]|\s*$)",
    re.M,
)


def clean(text: str, settings: SubtitleSettings) -> str:
    """Replace text that the settings remove by spaces, character by character, so that offsets stay valid."""
    if settings.sounds == "remove":
        text = _NOTES.sub(_blank, _BRACKETED.sub(_blank, text))
        text = _PARENTHESIS.sub(lambda match: _blank(match) if _is_sound(match, text) else match[0], text)
    if settings.speakers == "remove":
        text = _NAME.sub(_blank, _DASH.sub(_blank, _CHEVRONS.sub(_blank, text)))
    return text


def _blank(match: re.Match) -> str:
    """Return spaces of the match's length; line breaks stay."""
    return re.sub(r"[^\n]", " ", match[0])


def _is_sound(match: re.Match, text: str) -> bool:
    """Return whether a parenthesis describes a sound: it names one, is words in capitals, or is the whole line."""
    content = match[1].strip()
    if len(content.split()) > 4:
        return False
    line = text[text.rfind("\n", 0, match.start()) + 1 : (text + "\n").find("\n", match.end())]
    return bool(_SOUND.search(content)) or (content.isupper() and " " in content) or line.strip() == match[0]


# --- repairs -------------------------------------------------------------------------------------------------------


def _repaired(cues: Iterable[Cue], repairs: Counter) -> list[Cue]:
    """Return the cues that have words, in time order, each with 0 ≤ start < end and its marks inside."""
    placed = [kept for cue in cues if says_something(cue.text) and (kept := _placed(cue, repairs))]
    ordered = sorted(placed, key=lambda cue: cue.start_s)
    repairs["unsorted"] += sum(a.start_s > b.start_s for a, b in pairwise(placed))
    starts = [cue.start_s for cue in ordered]
    repaired = []
    for k, cue in enumerate(ordered):
        later = next((start for start in starts[k + 1 : k + 9] if start > cue.start_s), math.inf)
        end_s = cue.end_s
        if end_s <= cue.start_s:
            end_s = min(cue.start_s + max(0.3, len(cue.text) / CHARS_PER_S), later)
        repairs["overlap"] += end_s > later
        repaired.append(_with_marks_inside(replace(cue, end_s=end_s), repairs))
    return repaired


def _placed(cue: Cue, repairs: Counter) -> Cue | None:
    """Clip a cue to start at 0 or later; None if its time is impossible. An impossible end becomes the start."""
    start_s, end_s = cue.start_s, cue.end_s
    if not 0 <= start_s < MAX_TIME_S:  # also NaN
        absurd = not start_s < MAX_TIME_S
        repairs["absurd-time" if absurd else "negative-time"] += 1
        if absurd or not end_s > 0:
            return None
        start_s = 0.0
    if not end_s < MAX_TIME_S:
        repairs["absurd-time"] += 1
        end_s = start_s
    elif end_s <= start_s:
        repairs["zero-length" if end_s == start_s else "reversed-time"] += 1
        end_s = start_s
    return replace(cue, start_s=start_s, end_s=end_s)


def _with_marks_inside(cue: Cue, repairs: Counter) -> Cue:
    """Clamp word times into the cue and into order: a tag outside its cue is broken."""
    marks, before = [], cue.start_s
    for mark in cue.marks:
        at = min(max(mark.start_s if mark.start_s == mark.start_s else before, before), cue.end_s)
        repairs["tag-out-of-order"] += at != mark.start_s
        before = at
        marks.append(replace(mark, start_s=at))
    return replace(cue, marks=tuple(marks))


# --- roll-up -------------------------------------------------------------------------------------------------------

TOUCHING_S = 0.5  # a rolled-up line stays on the screen; the same words after a longer break are said again
MAX_SHOWN = 200  # words compared: no caption carries over more


def _collapse_roll_up(cues: list[Cue], repairs: Counter, always: bool) -> list[Cue]:
    """Reduce each cue to the words that it adds to the cue before (docs/methods/hd_vila.md section 2.1 step 1).

    Automatic captions show the previous line above the new one, often with a 10 ms cue of the new line alone between.
    Text is carried over when the previous cue ends with the words that this one begins with, up to the end of a line or
    the whole previous cue. If most cues do not do that, the file does not roll up, and repeated words were spoken
    twice; `always` collapses such a file, too.
    """
    touching = [b.start_s - a.end_s <= TOUCHING_S for a, b in pairwise(cues)]
    carried = [0] + [_carried_chars(a, b) if near else 0 for (a, b), near in zip(pairwise(cues), touching, strict=True)]
    rolled = sum(count > 0 for count in carried)
    least = 1 if any(cue.marks for cue in cues) else 2
    if not always and rolled < max(least, sum(touching) / 2):
        return cues
    repairs["rolled-up"] += rolled
    rests = (_without_start(cue, count) if count else cue for cue, count in zip(cues, carried, strict=True))
    return [cue for cue in rests if says_something(cue.text)]


def _carried_chars(before: Cue, cue: Cue) -> int:
    """Return how many characters at the start of `cue` are carried over from the cue before it."""
    shown = [text for _, _, text in tokens(before.text)]
    num_shown, shown = len(shown), shown[-MAX_SHOWN:]
    # Text with a word time is new. The first mark does not count: it is the start of the cue itself.
    first_timed = next((mark.offset for mark in cue.marks if mark.offset > 0), len(cue.text))
    own = [(end, text) for _, end, text in tokens(cue.text) if end <= first_timed]
    for count in range(min(len(shown), len(own)), 0, -1):
        end = own[count - 1][0]
        ends_line = not cue.text[end:].strip(" \t") or cue.text[end:].lstrip(" \t").startswith("\n")
        if (ends_line or count == num_shown) and shown[-count:] == [text for _, text in own[:count]]:
            return end
    return 0


def _without_start(cue: Cue, offset: int) -> Cue:
    """Return the cue without the text before `offset`, and without the marks of that text."""
    if not cue.marks:
        return replace(cue, text=cue.text[offset:])
    marks = [replace(mark, offset=mark.offset - offset) for mark in cue.marks if mark.offset >= offset]
    return replace(cue, text=cue.text[offset:], marks=(Mark(0, cue.start_s), *marks))


# --- cues to words -------------------------------------------------------------------------------------------------


def words_of(cues: Cues | Sequence[Cue]) -> tuple[list[Word], Literal["tags", "cues", "none"]]:
    """Return each word once with its time, and the source of the times: word tags, or interpolation in the cues.

    Without tags a word's share of its cue is its share of the characters. Words are in order and end no later than the
    next one starts; times are rounded to 1 ms.
    """
    shown = _without_overlaps(list(cues.cues if isinstance(cues, Cues) else cues))
    timed = [(cue, _cue_words(cue)) for cue in shown]
    num_tagged = sum(len(words) for cue, words in timed if cue.marks)
    words = [word for _, words in timed for word in words]
    if not words:
        return [], "none"
    tagged = 2 * num_tagged >= len(words)
    return in_order(words, cap=num_tagged > 0), "tags" if tagged else "cues"


def _without_overlaps(cues: list[Cue]) -> list[Cue]:
    """End untagged cues where the next one starts; merge cues that are too short to be spoken one after the other."""
    result: list[Cue] = []
    for cue in cues:
        while result and not result[-1].marks and cue.start_s < result[-1].end_s:
            before = result[-1]
            if cue.start_s - before.start_s >= len(before.text) / MAX_CHARS_PER_S:
                result[-1] = replace(before, end_s=cue.start_s)
                break
            if cue.marks:
                break
            result.pop()
            both = f"{before.text}\n{cue.text}"
            cue = Cue(before.start_s, max(before.end_s, cue.end_s), both)
        result.append(cue)
    return result


def _cue_words(cue: Cue) -> list[Word]:
    """Return the cue's words, each from the time of its first character to that of its last."""
    bounds = list(cue.marks) or [Mark(0, cue.start_s)]
    starts, ends = [0.0] * len(cue.text), [0.0] * len(cue.text)
    for k, mark in enumerate(bounds):
        following = bounds[k + 1] if k + 1 < len(bounds) else None
        stop = following.offset if following else len(cue.text)
        end_s = mark.end_s
        if end_s is None:
            end_s = following.start_s if following else max(cue.end_s, mark.start_s)
        visible = [i for i in range(mark.offset, stop) if not cue.text[i].isspace()]
        step = (end_s - mark.start_s) / max(1, len(visible))
        for n, i in enumerate(visible):
            starts[i], ends[i] = mark.start_s + n * step, mark.start_s + (n + 1) * step
    return [Word(text, starts[start], ends[end - 1]) for start, end, text in tokens(cue.text)]
