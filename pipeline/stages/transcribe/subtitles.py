"""Read subtitle files into words with times.

Any bytes may come in. The result is text with times in order, or ItemError "subtitle-unreadable". A file passes
through: bytes → text (`encodings.decode`) → cues (a reader of `READERS`, then cleaned and repaired, each repair
counted) → words (`words_of`), one token each, without overlaps. One bad cue never costs the others. A new format is a
reader in `READERS` and a line in `sniff`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pipeline.stages.transcribe.caption_blocks import ARROW, COMMA, STAMP, read_commas, read_srt, read_stamps, read_vtt
from pipeline.stages.transcribe.cues import Cue, Cues, Mark, Reading, SubtitleSettings, unreadable
from pipeline.stages.transcribe.encodings import decode
from pipeline.stages.transcribe.line_formats import MICRODVD, read_ass, read_json3, read_microdvd, read_other
from pipeline.stages.transcribe.words import Word, in_order, says_something, tokens
from pipeline.stages.transcribe.xml_formats import read_sami, read_timedtext, read_ttml

MAX_FILE_BYTES = 64 << 20  # ten hours of json3 are 8 MB: a larger file is not a subtitle file
MAX_TIME_S = 100 * 3600.0  # a cue later than this has a broken time
CHARS_PER_S = 15.0  # ordinary speaking speed, from which a cue without an end gets its length
MAX_CHARS_PER_S = 40.0  # faster than anyone speaks: cues that would need it are merged

# A reader returns the language that the text's header names, and its raw cues, which `finished` cleans and repairs.
READERS: dict[str, Callable[[str, Reading], tuple[str | None, list[Cue]]]] = {
    "vtt": read_vtt,
    "srt": read_srt,
    "sbv": read_commas,
    "subviewer": read_commas,
    "subviewer1": read_stamps,
    "ttml": read_ttml,
    "srv3": read_timedtext,
    "json3": read_json3,
    "ass": read_ass,
    "sami": read_sami,
    "microdvd": read_microdvd,
}
WITHOUT_ROLL_UP = ("json3", "srv3")  # YouTube repeats no line in these


def read_subtitles(
    source: str | Path | bytes,
    format: str | None = None,
    settings: SubtitleSettings | None = None,
    *,
    language: str | None = None,
    fps: float | None = None,
) -> Cues:
    """Read a subtitle file (a path, or its bytes) into cues, cleaned by `settings` and repaired.

    The content decides the format; `format` is used only if the content is not recognised. `language` is the code of
    the language that the text is probably in, which helps to find its encoding; `fps` is the frame rate of the video,
    which times in frames need. A valid file without speech gives no cues. Raises ItemError "subtitle-unreadable".
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
    decoded = decode(data, settings.encoding, language)
    text = decoded.text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").replace("\ufeff", "")
    format = sniff(text) or format or "unknown"
    reading = Reading(settings, fps)
    reading.repairs.update({"encoding-guessed": int(decoded.guessed), "broken-bytes": decoded.num_broken})
    named, raw = READERS.get(format, read_other)(text, reading)
    return replace(finished(raw, format, reading, named), encoding=decoded.encoding, encoding_guessed=decoded.guessed)


def finished(raw: Iterable[Cue], format: str, reading: Reading, language: str | None = None) -> Cues:
    """Clean and repair a reader's cues, and collapse roll-up captions."""
    settings, repairs = reading.settings, reading.repairs
    cues = _repaired([replace(cue, text=clean(cue.text, settings)) for cue in raw], repairs)
    if settings.roll_up == "collapse" or (settings.roll_up == "auto" and format not in WITHOUT_ROLL_UP):
        cues = _collapse_roll_up(cues, repairs, always=settings.roll_up == "collapse")
    return Cues(tuple(cues), format, language, dict(sorted((+repairs).items())))


_TIMINGS = {
    "srt": ARROW,
    "sbv": COMMA,
    "subviewer1": STAMP,
    "microdvd": MICRODVD,
    "mpl2": re.compile(r"^\[\d+\]\[\d+\]", re.M),
    "tmp": re.compile(r"^\d{1,2}:\d{2}:\d{2}:\S", re.M),
}


def sniff(text: str) -> str | None:
    """Recognise the format of a subtitle text by its content; return None if that fails."""
    head = text[:4000].lstrip("\ufeff \t\n")
    if head.startswith("WEBVTT"):
        return "vtt"
    if head.startswith("{") and '"events"' in text:
        return "json3"
    if re.search(r"<(?:\w+:)?tt[\s>]", head):
        return "ttml"
    if re.search(r"<(?:timedtext|transcript)[\s>]", head):
        return "srv3"
    if re.search(r"^\[(?:Script Info|V4\+? Styles|Events)\]", text, re.M | re.I):
        return "ass"
    if re.search(r"<SAMI[\s>]", head[:1000], re.I):
        return "sami"
    found = {name: match.start() for name, pattern in _TIMINGS.items() if (match := pattern.search(text))}
    first = min(found, key=found.__getitem__, default=None)
    return "subviewer" if first == "sbv" and re.match(r"\[[A-Z]", head) else first


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
