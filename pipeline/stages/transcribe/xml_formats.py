"""Readers of the formats with tags around the text: TTML, YouTube's timedtext (srv1, srv2, srv3) and SAMI.

pysubs2 1.8 refuses TTML's `dur`, frames and ticks, and does not read timedtext; its SAMI reader mixes languages.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from pipeline.stages.transcribe.cues import (
    Cue,
    Mark,
    Reading,
    each_cue,
    joined,
    marked_up_cue,
    unescape,
    unreadable,
    visible,
)
from pipeline.stages.transcribe.words import says_something, tokens

Read = tuple[str | None, list[Cue]]  # the language in the file's header, the raw cues
Element = ElementTree.Element


# --- XML that may be broken ----------------------------------------------------------------------------------------

_REFERENCE = re.compile(r"&(?:(#[0-9]+|#[xX][0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]{0,31});)?")
_CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.S)
_NO_XML_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def parse_xml(text: str, reading: Reading) -> Element:
    """Parse an XML text into elements whose names have no namespace.

    Impossible characters are left out and unknown references are text. A text whose tags do not match is parsed as
    HTML is, and the repair "broken-xml" is counted. Raises ItemError for entities of the text's own.
    """
    if "<!ENTITY" in text:
        raise unreadable("it declares XML entities, which could expand without limit")
    text = _CDATA.sub(lambda match: escape(match[1]), re.sub(r"^\s*<\?xml[^>]*\?>", "", text))
    text = _REFERENCE.sub(_known_reference, _NO_XML_CHARACTER.sub("", text))
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError):
        reading.repairs["broken-xml"] += 1
        root = _LenientParser().parse(text)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {**element.attrib, **{_local(name): value for name, value in element.attrib.items()}}
    return root


def _known_reference(match: re.Match) -> str:
    """Return a reference as XML that expat accepts: the character itself, or nothing for an impossible one."""
    if match[1] is None:
        return "&amp;"
    character = unescape(match[0])
    return escape(match[0] if character == match[0] else _NO_XML_CHARACTER.sub("", character))


def _local(name: object) -> str:
    """Return a name without its namespace, whether {URI}name or prefix:name; "" for comments and instructions."""
    return re.split("[}:]", name)[-1] if isinstance(name, str) else ""


class _LenientParser(HTMLParser):
    """Build elements from tags that need not match, as browsers do."""

    CDATA_CONTENT_ELEMENTS = ()
    RCDATA_CONTENT_ELEMENTS = ()
    DEEPEST = 200

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.builder = ElementTree.TreeBuilder()
        self.open = ["document"]

    def parse(self, text: str) -> Element:
        """Return an element "document" that holds everything."""
        self.builder.start("document", {})
        self.feed(text)
        self.close()
        while self.open:
            self.builder.end(self.open.pop())
        return self.builder.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag.rpartition(":")[2] in ("p", "text") and tag in self.open:
            self.handle_endtag(tag)  # a cue does not contain cues
        if len(self.open) >= self.DEEPEST:
            raise RecursionError
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while (ended := self.open.pop()) != tag:
                self.builder.end(ended)
            self.builder.end(ended)

    def handle_data(self, data: str) -> None:
        self.builder.data(data)


# --- TTML ----------------------------------------------------------------------------------------------------------

_UNSPOKEN = ("metadata", "desc", "title", "copyright", "agent", "set", "animate", "head")
_RUBY_NOTES = ("text", "textContainer", "delimiter")


def read_ttml(text: str, reading: Reading) -> Read:
    """Read TTML of any version (W3C, TTML2, sections 8 and 12): each <p>, or timed <span> in it, is a cue.

    Times are relative to the enclosing element, or to the element before in a sequence (timeContainer="seq"), and end
    with it. Several documents may stand one behind another.
    """
    documents = re.split(r"(?=<\?xml\b)|(?<=</tt>)\s*(?=<tt[\s>])", text.strip())
    language, cues = None, []
    for document in documents:
        if not document.strip():
            continue
        try:
            root = parse_xml(document, reading)
            found = list(_TtmlReader(root, reading).cues())
        except RecursionError as error:
            raise unreadable("its elements are nested too deeply") from error
        except (ValueError, ArithmeticError) as error:
            raise unreadable(f"it is not valid TTML ({error})") from error
        language = language or next((one.get("lang") for one in root.iter("tt") if one.get("lang")), None)
        cues += found
    bad = {kind: reading.repairs[kind] for kind in ("bad-cue", "no-time") if reading.repairs[kind]}
    if bad and not cues:
        raise unreadable("none of its texts has a time that can be read")
    if not cues and reading.repairs["broken-xml"]:
        raise unreadable("it is not valid XML and has no text with a time")
    return language, cues


# Hours, minutes, seconds with a fraction, frames, sub-frames.
_CLOCK = re.compile(r"(-?)(?:(\d{1,9}):)?(\d{1,4}):(\d{1,4}(?:\.\d+)?)(?:[:;](\d{1,9})(?:\.(\d{1,9}))?)?")


@dataclass(frozen=True, slots=True)
class _Interval:
    """The active time of an element in seconds; `end_s` is None if nothing ends it, `timed` False without any time."""

    start_s: float
    end_s: float | None
    timed: bool


class _TtmlReader:
    """Read one document: its rates, and its elements in document order."""

    def __init__(self, root: Element, reading: Reading):
        """Read the parameters of the document (TTML2, section 7.2). Raises ValueError."""
        self.root, self.reading = root, reading
        found = next(iter(root.iter("tt")), root)
        get = {name.lower(): value for name, value in found.attrib.items()}.get
        self.nominal_fps = float(get("framerate", 30))
        numerator, denominator = (float(x) for x in get("frameratemultiplier", "1 1").replace(":", " ").split())
        self.fps = self.nominal_fps * numerator / denominator
        self.sub_frames = float(get("subframerate", 1))
        # Without a tick rate a tick is a (sub)frame, and without a frame rate a second.
        self.ticks_per_s = float(get("tickrate", self.fps * self.sub_frames if get("framerate") else 1))
        for rate in (self.nominal_fps, self.fps, self.sub_frames, self.ticks_per_s):
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError("its frame or tick rate is not a positive number")
        self.smpte = get("timebase", "media") == "smpte"
        self.drop_mode = get("dropmode", "nonDrop")
        self.zero_s = 0.0  # time codes of broadcasts often begin at ten hours (EBU Tech 3390)
        begin = next((one.text for one in root.iter("documentStartOfProgramme") if one.text), None)
        if begin and self.smpte:
            self.zero_s = self._time(begin)

    def cues(self) -> Iterator[Cue]:
        yield from self._cues(self.root, _Interval(0.0, None, False))

    def _cues(self, element: Element, around: _Interval) -> Iterator[Cue]:
        """Yield the cues in the children of an element with the interval `around`."""
        origin_s = around.start_s
        for child in element:
            if child.tag in _UNSPOKEN:
                continue
            if child.tag == "p":
                inside = self._interval(child, origin_s, around)
                if inside:
                    yield from self._paragraph(child, inside)
            else:
                inside = self._interval(child, origin_s, around, keep=True)
                yield from self._cues(child, inside)
            if inside:
                origin_s = self._next_origin(element, inside, origin_s)

    def _next_origin(self, parent: Element, inside: _Interval, origin_s: float) -> float:
        """Return the time that the next child's times count from."""
        if _attribute(parent, "timeContainer") != "seq":
            return origin_s
        return inside.start_s if inside.end_s is None else inside.end_s

    def _interval(self, element: Element, origin_s: float, around: _Interval, keep: bool = False) -> _Interval | None:
        """Return the interval of an element. A bad time counts as a repair.

        It costs a cue whose begin is bad: None; `keep` ignores the time instead.
        """
        stated, bad = {}, set()
        for name in ("begin", "dur", "end"):
            value = element.get(name)
            if value is not None and value.strip() not in ("", "indefinite", "media"):
                try:
                    stated[name] = self._time(value)
                except (ValueError, ArithmeticError):
                    bad.add(name)
        self.reading.repairs["bad-cue"] += bool(bad)
        if "begin" in bad and not keep:
            return None
        # Only times that count from zero include the start of the programme.
        zero_s = 0.0 if around.timed else self.zero_s
        start_s = origin_s + stated["begin"] - zero_s if "begin" in stated else origin_s
        ends = [start_s + stated["dur"]] if "dur" in stated else []
        ends += [origin_s + stated["end"] - zero_s] if "end" in stated else []
        ends += [around.end_s] if around.end_s is not None else []
        return _Interval(start_s, min(ends, default=None), around.timed or bool(stated))

    def _paragraph(self, element: Element, inside: _Interval) -> Iterator[Cue]:
        """Yield the cues of a <p>: one per time that it and its spans have, or one with the times of its words."""
        pieces: list[tuple[_Interval, str]] = []
        for interval, text in self._runs(element, inside):
            blank = not text.strip()
            if pieces and (blank or pieces[-1][0] == interval or not pieces[-1][1].strip()):
                known = interval if not pieces[-1][1].strip() and not blank else pieces[-1][0]
                pieces[-1] = (known, pieces[-1][1] + text)
            else:
                pieces.append((interval, text))
        spoken = [(interval, visible(text)) for interval, text in pieces if says_something(text)]
        timed = [(interval, text) for interval, text in spoken if interval.timed]
        self.reading.repairs["no-time"] += len(spoken) - len(timed)
        if len(timed) > 1 and _are_words(timed):
            yield _word_cue(timed)
        else:
            for interval, text in timed:
                yield Cue(interval.start_s, _end(interval), text.strip())

    def _runs(self, element: Element, inside: _Interval) -> Iterator[tuple[_Interval, str]]:
        """Yield the text in an element with the interval of its innermost element; white space is collapsed."""
        if element.tag in _UNSPOKEN or element.get("ruby") in _RUBY_NOTES:
            return
        if element.tag == "br":
            yield inside, "\n"
            return
        yield inside, re.sub(r"\s+", " ", element.text or "")
        origin_s = inside.start_s
        for child in element:
            interval = self._interval(child, origin_s, inside, keep=True)
            yield from self._runs(child, interval)
            if any(child.get(name) for name in ("begin", "dur", "end")):
                origin_s = self._next_origin(element, interval, origin_s)
            yield inside, re.sub(r"\s+", " ", child.tail or "")

    def _time(self, expression: str) -> float:
        """Convert a clock time (HH:MM:SS[.fraction | :frames]) or a count with a unit (h m s ms f t) to seconds."""
        text = expression.strip().replace(",", ".")
        if match := re.fullmatch(r"(-?\d{1,15}(?:\.\d*)?|\.\d+)[ \t]*(h|m|s|ms|f|t|)", text):
            scale = {"h": 3600.0, "m": 60.0, "ms": 0.001, "f": 1 / self.fps, "t": 1 / self.ticks_per_s}
            return float(match[1]) * scale.get(match[2], 1.0)
        match = _CLOCK.fullmatch(text)
        if not match:
            raise ValueError(f"not a time: {expression[:40]!r}")
        minutes = int(match[2] or 0) * 60 + int(match[3])
        frames = int(match[5] or 0) + int(match[6] or 0) / self.sub_frames
        if self.smpte:
            count = (minutes * 60 + float(match[4])) * self.nominal_fps + frames - self._num_dropped(minutes)
            value = count / self.fps
        else:
            value = minutes * 60 + float(match[4]) + frames / self.fps
        return -value if match[1] else value

    def _num_dropped(self, minutes: int) -> int:
        """Return how many frame numbers a drop-frame time code has left out so far (TTML2, appendix I.3)."""
        if self.drop_mode == "dropNTSC":
            return 2 * (minutes - minutes // 10)
        if self.drop_mode == "dropPAL":
            return 4 * (minutes // 2 - minutes // 20)
        return 0


def _attribute(element: Element, name: str) -> str | None:
    """Return an attribute whatever its case: a lenient parser writes all names in lower case."""
    return element.get(name) or element.get(name.lower())


def _end(interval: _Interval) -> float:
    """Return the end of an interval; its start if nothing ends it, which `repaired` replaces by an estimate."""
    return interval.start_s if interval.end_s is None else interval.end_s


def _are_words(pieces: list[tuple[_Interval, str]]) -> bool:
    """Return whether the pieces of a paragraph are single words in time order."""
    starts = [interval.start_s for interval, _ in pieces]
    return starts == sorted(starts) and sum(len(tokens(text)) <= 1 for _, text in pieces) * 2 > len(pieces)


def _word_cue(pieces: list[tuple[_Interval, str]]) -> Cue:
    text, marks = "", []
    for interval, piece in pieces:
        piece = piece if text else piece.lstrip()
        marks.append(Mark(len(text), interval.start_s, interval.end_s))
        text += piece
    return Cue(marks[0].start_s, max(_end(interval) for interval, _ in pieces), text, tuple(marks))


# --- timedtext -----------------------------------------------------------------------------------------------------


def read_timedtext(text: str, reading: Reading) -> Read:
    """Read YouTube's timedtext: srv3 with word times, srv2, or srv1 (<transcript>)."""
    try:
        root = parse_xml(text, reading)
    except RecursionError as error:
        raise unreadable("its elements are nested too deeply") from error
    paragraphs = [element for element in root.iter() if element.tag in ("p", "text")]
    if not paragraphs and reading.repairs["broken-xml"]:
        raise unreadable("it is not valid XML and has no text with a time")
    return None, each_cue(paragraphs, lambda element: _timedtext_cue(element, reading), reading)


def _timedtext_cue(element: Element, reading: Reading) -> Cue:
    """Make a cue of a paragraph; raises ValueError."""
    if element.tag == "text" and "t" not in element.attrib:  # srv1 counts seconds and escapes its text twice
        start_s = _number(element.get("start"))
        end_s = start_s + _number(element.get("dur", "0"))
        return marked_up_cue(start_s, end_s, "".join(element.itertext()), reading.settings)
    start_s = _number(element.get("t")) / 1000
    end_s = start_s + _number(element.get("d", "0")) / 1000
    pieces, timed = [(start_s, element.text or "")], False
    for child in element:
        at = start_s + _number(child.get("t", "0")) / 1000
        timed = timed or (child.tag == "s" and "t" in child.attrib)
        shown = "\n" if child.tag == "br" else "".join(child.itertext())
        pieces += [(at, shown), (at, child.tail or "")]
    pieces = [piece for piece in pieces if piece[1]]
    return joined(start_s, end_s, pieces if timed else [(start_s, "".join(piece for _, piece in pieces))])


def _number(value: str | None) -> float:
    number = float(value if value is not None else "nan")
    if not math.isfinite(number):
        raise ValueError(f"not a time: {value!r}")
    return number


# --- SAMI ----------------------------------------------------------------------------------------------------------


class _SamiParser(HTMLParser):
    """Collect the text of each <P> with the time of its <SYNC> and its class, which stands for a language."""

    CDATA_CONTENT_ELEMENTS = ("style", "script")

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.lines: list[list[str]] = []  # start in ms as written, class, text
        self.start, self.style = "", ""
        self.in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.in_style = tag == "style"
        if tag == "sync":
            self.start = values.get("start", "")
            self.lines.append([self.start, "", ""])
        elif tag == "p" and self.lines:
            if not self.lines[-1][2].strip() and not self.lines[-1][1]:
                self.lines.pop()  # the <SYNC> of this <P>
            self.lines.append([self.start, values.get("class", "").lower(), ""])
        elif tag == "br" and self.lines:
            self.lines[-1][2] += "\n"
        elif self.lines:
            self.lines[-1][2] += self.get_starttag_text() or ""

    def handle_endtag(self, tag: str) -> None:
        self.in_style = False
        if self.lines and tag not in ("sync", "p", "body", "sami"):
            self.lines[-1][2] += f"</{tag}>"

    def handle_data(self, data: str) -> None:
        if self.in_style:
            self.style += data
        elif self.lines:
            self.lines[-1][2] += data

    def handle_entityref(self, name: str) -> None:
        self.handle_data(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self.handle_data(f"&#{name};")


def read_sami(text: str, reading: Reading) -> Read:
    """Read SAMI. Of several languages, each a class of <P>, the one with the most text is read."""
    parser = _SamiParser()
    parser.feed(re.sub(r"<!--|-->", "", text))
    parser.close()
    amounts: dict[str, int] = {}
    for _, name, line in parser.lines:
        amounts[name] = amounts.get(name, 0) + len(line.strip())
    chosen = max(amounts, key=lambda name: (amounts[name], bool(name)), default="")
    lines = [(start, line) for start, name, line in parser.lines if name == chosen]

    def cue(line: tuple[str, str]) -> Cue:
        start_s = _number(line[0]) / 1000
        return marked_up_cue(start_s, start_s, line[1].strip(), reading.settings)

    cues = each_cue(lines, cue, reading)
    ends = [cue.start_s for cue in cues[1:]] + [cue.start_s for cue in cues[-1:]]
    lang = rf"\.{re.escape(chosen)}\s*\{{[^}}]*\blang\s*:\s*([\w-]+)"
    declared = re.search(lang, parser.style, re.I) if chosen else None
    return (declared[1] if declared else None), [
        replace(cue, end_s=max(end_s, cue.start_s)) for cue, end_s in zip(cues, ends, strict=True)
    ]
