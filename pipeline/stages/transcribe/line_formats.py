"""Readers of the formats with a line per cue (ASS, SSA, MicroDVD) and of YouTube's json3; others by pysubs2.

pysubs2 1.8 gives up an ASS file for one bad style or time and ignores its Format line, and it skips the cues of
MicroDVD without an end. It reads single ASS texts here, and the formats MPL2 and TMPlayer.
"""

import json
import math
import re

from pipeline.stages.transcribe.cues import BAD_CUE, Cue, Reading, each_cue, joined, marked_up_cue, unreadable

Read = tuple[str | None, list[Cue]]  # the language in the file's header, the raw cues


# --- ASS and SSA ---------------------------------------------------------------------------------------------------

ASS_FIELDS = ("Layer", "Start", "End", "Style", "Name", "MarginL", "MarginR", "MarginV", "Effect", "Text")
_ASS_TIME = re.compile(r"(-?)(\d{1,4}):(\d{1,3}):(\d{1,2})(?:[.:,](\d{1,3}))?")
_DRAWING = re.compile(r"\{[^{}]*\\p[1-9][^{}]*\}.*?(?=\{[^{}]*\\p0|$)", re.S)
_SYLLABLE = re.compile(r"\\[kK][fot]?(\d{1,6})")


def read_ass(text: str, reading: Reading) -> Read:
    """Read ASS or SSA: the Dialogue lines, whose fields the last Format line names."""
    lines, fields, in_events = [], [name.lower() for name in ASS_FIELDS], True
    for line in text.split("\n"):
        key, colon, value = line.strip().partition(":")
        if re.fullmatch(r"\[[^\]]+\]", line.strip()):
            in_events = line.strip().lower() == "[events]"
        elif in_events and colon and key.lower() == "format":
            named = [name.strip().lower() for name in value.split(",")]
            fields = named if {"start", "end", "text"} <= set(named) else fields
        elif in_events and colon and key.lower() == "dialogue":
            lines.append((fields, value.strip()))
    return None, each_cue(lines, lambda line: _dialogue(*line, reading), reading)


def _dialogue(fields: list[str], line: str, reading: Reading) -> Cue:
    values = line.split(",", len(fields) - 1)
    if len(values) < len(fields):
        raise ValueError(f"{len(values)} of {len(fields)} fields in a Dialogue line")
    row = dict(zip(fields, values, strict=True))
    return ass_cue(_ass_seconds(row["start"]), _ass_seconds(row["end"]), row["text"], reading)


def _ass_seconds(value: str) -> float:
    match = _ASS_TIME.fullmatch(value.strip())
    if not match:
        raise ValueError(f"not a time: {value[:40]!r}")
    total = int(match[2]) * 3600 + int(match[3]) * 60 + int(match[4]) + float(f"0.{match[5] or 0}")
    return -total if match[1] else total


def ass_cue(start_s: float, end_s: float, text: str, reading: Reading) -> Cue:
    r"""Make a cue of an ASS text; the karaoke tags \k, \kf and \ko become word times."""
    import pysubs2

    text = _DRAWING.sub("", text)
    at, pieces = start_s, []
    for block in re.split(r"(?=\{[^{}]*\\[kK][fot]?\d)", text):
        tags = re.match(r"\{[^{}]*\}", block)
        pieces.append((at, pysubs2.SSAEvent(text=block).plaintext))
        at += sum(int(length) for length in _SYLLABLE.findall(tags[0] if tags else "")) / 100
    if not pieces[0][1].strip() and len(pieces) > 1:
        pieces = pieces[1:]
    if len(pieces) == 1:
        return marked_up_cue(start_s, end_s, pieces[0][1], reading.settings)
    return joined(start_s, end_s, _whole_words(pieces))


def _whole_words(pieces: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Join the syllables of one word: a word begins where its first syllable does."""
    words: list[tuple[float, str]] = []
    for at, piece in pieces:
        if words and not words[-1][1][-1:].isspace() and not piece[:1].isspace() and words[-1][1] and piece.isascii():
            words[-1] = (words[-1][0], words[-1][1] + piece)
        else:
            words.append((at, piece))
    return words


# --- MicroDVD ------------------------------------------------------------------------------------------------------

MICRODVD = re.compile(r"^[ \t]*\{[ \t]*(\d{1,9})[ \t]*\}[ \t]*\{[ \t]*(\d{0,9})[ \t]*\}(.*)$", re.M)
_MICRODVD_TAG = re.compile(r"\{[A-Za-z]:[^{}]*\}")
SLOWEST_FPS, FASTEST_FPS = 5.0, 500.0


def read_microdvd(text: str, reading: Reading) -> Read:
    """Read MicroDVD, whose times are frames: of the rate in its first line, else of the video's rate."""
    lines = [match.groups() for match in MICRODVD.finditer(text)]
    fps = _own_rate(lines[0]) if lines else None
    if fps:
        lines = lines[1:]
    fps = fps or reading.fps
    if not fps or not SLOWEST_FPS <= fps <= FASTEST_FPS:
        raise unreadable(
            "its times are frame numbers (MicroDVD), and neither its first line nor the video's header gives a frame "
            "rate; put a first line such as {1}{1}23.976 into the file"
        )

    def cue(line: tuple[str, str, str]) -> Cue:
        start_s = int(line[0]) / fps
        shown = "\n".join(part.strip().removeprefix("/") for part in _MICRODVD_TAG.sub("", line[2]).split("|"))
        return marked_up_cue(start_s, int(line[1]) / fps if line[1] else start_s, shown, reading.settings)

    return None, each_cue(lines, cue, reading)


def _own_rate(line: tuple[str, str, str]) -> float | None:
    """Return the frame rate that a first line such as {1}{1}23.976 gives."""
    number = re.fullmatch(r"\s*(\d{1,3}(?:[.,]\d{1,9})?)\s*(?:fps)?\s*", line[2], re.I)
    if not number or line[:2] not in (("1", "1"), ("0", "0"), ("0", "1"), ("1", "")):
        return None
    rate = float(number[1].replace(",", "."))
    return rate if SLOWEST_FPS <= rate <= FASTEST_FPS else None


# --- json3 ---------------------------------------------------------------------------------------------------------


def read_json3(text: str, reading: Reading) -> Read:
    """Read YouTube's json3: events with a start and a duration in ms, made of segments with offsets from the start."""
    try:
        events = json.loads(text, parse_int=float)["events"]
        events = [event for event in events if not isinstance(event, dict) or event.get("segs")]
    except (*BAD_CUE, RecursionError) as error:
        raise unreadable(f"it is not valid json3 ({type(error).__name__}: {error})"[:300]) from error
    return None, each_cue(events, _json3_cue, reading)


def _json3_cue(event: dict) -> Cue:
    """Make a cue of an event; it has word times if any segment has an offset."""
    start_ms = _finite(event.get("tStartMs", 0))
    end_ms = start_ms + _finite(event.get("dDurationMs", 0))
    timed = any("tOffsetMs" in segment for segment in event["segs"])
    pieces = [
        ((start_ms + _finite(segment.get("tOffsetMs", 0))) / 1000, str(segment.get("utf8", "")))
        for segment in event["segs"]
    ]
    if not timed:
        pieces = [(start_ms / 1000, "".join(piece for _, piece in pieces))]
    return joined(start_ms / 1000, end_ms / 1000, pieces)


def _finite(value: float | str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("a time that is not a number")
    return number


# --- the rest ------------------------------------------------------------------------------------------------------

# pysubs2 checks little, so that broken files raise any of these.
_LIBRARY_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, SyntaxError)
LIBRARY_FORMATS = ("mpl2", "tmp")


def read_other(text: str, reading: Reading) -> Read:
    """Read MPL2 and TMPlayer by pysubs2. Raises ItemError for every other text."""
    import pysubs2

    try:
        format = pysubs2.formats.autodetect_format(text)
        if format not in LIBRARY_FORMATS:
            raise unreadable(f"its format is not recognised ({format})")
        events = pysubs2.SSAFile.from_string(text, format_=format).events
    except (pysubs2.exceptions.Pysubs2Error, *_LIBRARY_ERRORS) as error:
        raise unreadable(f"its format is not recognised ({type(error).__name__}: {error})"[:300]) from error
    return None, [
        marked_up_cue(event.start / 1000, event.end / 1000, event.plaintext, reading.settings) for event in events
    ]
