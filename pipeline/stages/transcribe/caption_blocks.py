"""Readers of the formats with a timing line per cue: WebVTT, SRT, SBV and SubViewer.

pysubs2 1.8 takes a payload line with exactly two word-time tags for a timing line, drops a cue's last line when it is a
number, keeps cue ids and notes as text, and refuses `00:00:04 --> 00:00:07` (SRT without milliseconds). It has no
reader for SBV and SubViewer.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from pipeline.stages.transcribe.cues import CLOCK, Cue, Reading, marked_up_cue, moved, seconds, unreadable

ARROW = re.compile(rf"^[ \t]*{CLOCK}[ \t]*-{{1,2}}>[ \t]*{CLOCK}(?=\s|$)", re.M)
COMMA = re.compile(rf"^[ \t]*{CLOCK}[ \t]*,[ \t]*{CLOCK}[ \t]*$", re.M)  # SBV, SubViewer 2
STAMP = re.compile(r"^[ \t]*\[(\d{1,3}):(\d{1,2}):(\d{1,2})\][ \t]*$", re.M)  # SubViewer 1
# A comment or style block of WebVTT (W3C, WebVTT 1, section 4.1). It follows a blank line, never a timing line.
_VTT_BLOCK = re.compile(r"NOTE(?:[ \t]|$)|(?:STYLE|REGION)[ \t]*$")

Read = tuple[str | None, list[Cue]]  # the language in the file's header, the raw cues


def read_srt(text: str, reading: Reading) -> Read:
    """Read SRT."""
    return None, _blocks(text, ARROW, reading)


def read_commas(text: str, reading: Reading) -> Read:
    """Read SBV or SubViewer 2."""
    return None, _blocks(re.sub(r"\[br\]", "\n", text, flags=re.I), COMMA, reading)


def read_stamps(text: str, reading: Reading) -> Read:
    """Read SubViewer 1: a line with a time begins each text, and another one ends it."""
    stamps = list(STAMP.finditer(text))
    times = [int(match[1]) * 3600.0 + int(match[2]) * 60 + int(match[3]) for match in stamps]
    texts = [text[a.end() : b.start()].strip().replace("|", "\n") for a, b in zip(stamps, stamps[1:], strict=False)]
    return None, [
        marked_up_cue(start_s, end_s, line, reading.settings)
        for start_s, end_s, line in zip(times, times[1:], texts, strict=False)
        if line
    ]


def _blocks(text: str, timing: re.Pattern, reading: Reading, is_vtt: bool = False) -> list[Cue]:
    """Return the cues of payload lines between timing lines."""
    timings = list(timing.finditer(text))
    if not timings and not is_vtt:
        raise unreadable("it has no timing line such as 00:00:01.000 --> 00:00:02.000")
    ends = [*(match.start() for match in timings), len(text)][1:]
    cues = []
    for match, end in zip(timings, ends, strict=True):
        newline = text.find("\n", match.end())
        payload = text[newline + 1 : end] if 0 <= newline < end else ""
        groups = match.groups()
        lines = _payload_lines(payload, last=end == len(text), is_vtt=is_vtt)
        cues.append(marked_up_cue(seconds(*groups[:5]), seconds(*groups[5:]), "\n".join(lines), reading.settings))
    return cues


def _payload_lines(payload: str, last: bool, is_vtt: bool) -> list[str]:
    """Return a cue's own lines, without the id of the next cue and without VTT notes and styles.

    A blank line does not end a payload: SRT files have blank lines inside cues, and editors strip the single space with
    which YouTube's VTT begins a cue.
    """
    follows_timing = not re.match(r"[ \t]*(?:\n|$)", payload)
    blocks = [block.strip("\n").split("\n") for block in re.split(r"\n[ \t]*\n", f"\n{payload}") if block.strip()]
    touches_next = not last and not re.search(r"\n[ \t]*\n$", f"\n{payload}")
    if touches_next and blocks:
        alone = len(blocks[-1]) == 1 and (len(blocks) > 1 or payload.startswith("\n"))
        if alone or blocks[-1][-1].strip().isdigit():
            blocks[-1] = blocks[-1][:-1]
    return [
        line
        for number, block in enumerate(blocks)
        if block and not (is_vtt and (number or not follows_timing) and _VTT_BLOCK.match(block[0]))
        for line in block
    ]


# --- WebVTT --------------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"(?:^|\n)WEBVTT(?:[ \t][^\n]*)?(?=\n|$)")
_HEADER_LINE = re.compile(rf"[A-Za-z][\w-]*[ \t]*[:=]|{ARROW.pattern}")
_MAP = re.compile(r"^X-TIMESTAMP-MAP[ \t]*=[ \t]*(.*)$", re.M)
_TICKS_PER_S = 90_000  # of MPEG-2 systems
_TICKS = 1 << 33  # after this many the clock begins again, every 26.5 hours
_SAME_S = 0.005  # times in two segments differ by rounding


def read_vtt(text: str, reading: Reading) -> Read:
    """Read WebVTT, also segments of a stream put one behind another, each with its own header."""
    language, cues, previous = None, [], None
    for header, offset_s, body in _pieces(text):
        named = re.search(r"^Language:[ \t]*([\w-]+)", header, re.M)
        language = language or (named[1] if named else None)
        piece = [moved(cue, offset_s) for cue in _blocks(body, ARROW, reading, is_vtt=True)]
        cues += piece if previous is None else _without_repeats(previous, cues, piece)
        previous = piece or previous
    return language, cues


def _pieces(text: str) -> Iterator[tuple[str, float, str]]:
    """Yield (header, seconds to add to its cues' times, cues) of each segment.

    X-TIMESTAMP-MAP (RFC 8216, section 3.5) puts a segment's local time on the stream's MPEG-2 clock. That clock starts
    anywhere, so the segments are placed relative to the first one, whose times stay as they are written.
    """
    # Segments joined byte by byte may lack the line break between them.
    text = re.sub(r"(?<=\S)(?=WEBVTT[ \t]*\n(?:\n|X-TIMESTAMP-MAP))", "\n\n", text)
    starts = [match.start() for match in _HEADER.finditer(text) if _is_header(text, match)] or [0]
    clock: float | None = None  # MPEG-2 time in seconds, without wrapping, at which the last segment's time is zero
    first = 0.0
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        piece = text[start:end].lstrip("\n")
        blank = re.search(r"\n[ \t]*\n", piece)
        timing = ARROW.search(piece)
        head_end = min(blank.start() if blank else len(piece), timing.start() if timing else len(piece))
        header = piece[:head_end]
        if mapped := _mapped(header):
            if clock is None:
                clock = first = mapped[0] - mapped[1]
            else:
                lead = (mapped[0] - mapped[1] - clock) % (_TICKS / _TICKS_PER_S)
                clock += lead if lead < _TICKS / _TICKS_PER_S / 2 else lead - _TICKS / _TICKS_PER_S
        yield header, (clock or 0.0) - first, piece[head_end:]


def _is_header(text: str, match: re.Match) -> bool:
    """Return whether a line is the header of a segment, not speech.

    Header lines or a blank line follow it, and it does not follow a timing line. With a title it follows a blank line.
    """
    before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
    after = text[match.end() + 1 : match.end() + 200].partition("\n")[0]
    if ARROW.match(before):
        return False
    stands_alone = match[0].strip() == "WEBVTT" or not before.strip()
    return bool(_MAP.match(after) or (stands_alone and (not after.strip() or _HEADER_LINE.match(after))))


def _mapped(header: str) -> tuple[float, float] | None:
    """Return the (MPEG-2 time, local time) of a header's X-TIMESTAMP-MAP in seconds; None without a valid one."""
    found = _MAP.search(header)
    ticks = re.search(r"MPEGTS[ \t]*:[ \t]*(\d{1,20})", found[1]) if found else None
    local = re.search(rf"LOCAL[ \t]*:[ \t]*{CLOCK}", found[1]) if found else None
    return (int(ticks[1]) % _TICKS / _TICKS_PER_S, seconds(*local.groups())) if ticks and local else None


def _without_repeats(previous: list[Cue], cues: list[Cue], piece: list[Cue]) -> list[Cue]:
    """Return the cues of a segment that are new; one that the segment before shows too is in both of them.

    Packagers repeat such a cue with the same times, or cut it in two at the border: then the first part in `cues`
    is extended.
    """
    seen = {key for cue in previous for key in _times_about(cue)}
    kept: list[Cue] = []
    for cue in piece:
        if (cue.text, round(cue.start_s * 100), round(cue.end_s * 100)) in seen:
            continue
        last = cues[-1] if cues and not kept else None
        touches = last and last.text == cue.text and abs(cue.start_s - last.end_s) < _SAME_S
        if touches and not last.marks and not cue.marks:
            cues[-1] = replace(last, end_s=cue.end_s)
            continue
        kept.append(cue)
    return kept


def _times_about(cue: Cue) -> list[tuple[str, int, int]]:
    """Return a cue's text and times in 1/100 s, and those that differ from it by rounding."""
    start, end = round(cue.start_s * 100), round(cue.end_s * 100)
    return [(cue.text, start + a, end + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
