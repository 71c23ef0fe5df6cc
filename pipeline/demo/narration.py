"""Speech of a demo video, word by word, and its subtitle files in YouTube's formats.

`narrate` makes the truth: sentences with the times at which each word is spoken. The writers below convert it to files
as YouTube serves them: manual VTT and SRT with punctuation, and automatic captions (roll-up VTT with word tags, or
json3) in lower case without punctuation. A late or early file is the same file with an offset.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from pipeline.demo.grammar import Scene, filler_sentence, num_words_in, spoken_sentences, words_of

LEAD_S = 0.25  # silence at both ends of a scene
AUTO_LINE_CHARS = 36  # an automatic caption line is full at about this length
AUTO_PAUSE_S = 1.5  # and ends earlier at a pause of this length
MUSIC_GAP_S = 2.0  # a silence of at least this length may be captioned as [Music]
MANUAL_CUE_CHARS = 80


@dataclass(frozen=True)
class Word:
    text: str  # as a person would write it, punctuation attached
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Sentence:
    words: tuple[Word, ...]
    scene: int
    filler: bool  # True if it does not describe the picture

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def start_s(self) -> float:
        return self.words[0].start_s

    @property
    def end_s(self) -> float:
        return self.words[-1].end_s


# ---------------------------------------------------------------- sentences and words


def narrate(
    scenes: Sequence[tuple[float, Scene]], rng: np.random.Generator, filler_fraction: float = 0.0
) -> list[Sentence]:
    """Return sentences for (start second, scene) pairs, each within its scene.

    The speaker's rate is sampled from 2.3–3.0 words per second. `filler_fraction` of the scenes get filler instead.
    """
    words_per_s = float(rng.uniform(2.3, 3.0))
    sentences: list[Sentence] = []
    for n, (start_s, scene) in enumerate(scenes):
        filler = bool(rng.random() < filler_fraction)
        now_s, end_s = start_s + LEAD_S, start_s + scene.duration_s - LEAD_S
        num_words = int((end_s - now_s) * words_per_s * 0.9)  # the rest of the time is pauses
        texts = _filler_talk(rng, num_words) if filler else spoken_sentences(scene, rng, num_words)
        for text in texts:
            words = _speak(text, now_s, words_per_s, rng)
            if words[-1].end_s > end_s:
                break
            sentences.append(Sentence(words, n, filler))
            now_s = words[-1].end_s + float(rng.uniform(0.15, 0.5))
    return sentences


def _filler_talk(rng: np.random.Generator, num_words: int) -> list[str]:
    texts = [filler_sentence(rng)]
    while sum(map(num_words_in, texts)) + 8 <= num_words:
        text = filler_sentence(rng)
        if text != texts[-1]:
            texts.append(text)
    return texts


def _speak(text: str, start_s: float, words_per_s: float, rng: np.random.Generator) -> tuple[Word, ...]:
    """Give each word its times in whole milliseconds, as in subtitle files.

    Long words take longer, and a comma is followed by a pause.
    """
    words, now_s = [], start_s
    for word in text.split():
        length_s = (0.45 + 0.12 * len(words_of(word)[0])) / words_per_s * float(rng.uniform(0.85, 1.15))
        words.append(Word(word, round(now_s, 3), round(now_s + 0.92 * length_s, 3)))
        now_s += length_s + (0.15 if word.endswith(",") else 0.0)
    return tuple(words)


def shifted(sentences: Sequence[Sentence], offset_s: float) -> list[Sentence]:
    """Return the sentences `offset_s` later or earlier; words that would start before zero start at zero."""

    def move(word: Word) -> Word:
        start_s = max(0.0, round(word.start_s + offset_s, 3))
        return Word(word.text, start_s, max(round(word.end_s + offset_s, 3), round(start_s + 0.02, 3)))

    return [Sentence(tuple(map(move, s.words)), s.scene, s.filler) for s in sentences]


# ---------------------------------------------------------------- manual subtitles


def manual_vtt(sentences: Sequence[Sentence]) -> str:
    """Return the text of a manual WebVTT file."""
    cues = [f"{_clock(a)} --> {_clock(b)}\n{text}\n" for a, b, text in _manual_cues(sentences)]
    return "\n".join(["WEBVTT\nKind: captions\nLanguage: en\n", *cues])


def manual_srt(sentences: Sequence[Sentence]) -> str:
    """Return the text of a manual SRT file, with Windows line ends as in most of them."""
    cues = enumerate(_manual_cues(sentences), 1)
    text = "\n".join(f"{n}\n{_clock(a, ',')} --> {_clock(b, ',')}\n{text}\n" for n, (a, b, text) in cues)
    return text.replace("\n", "\r\n")


def _manual_cues(sentences: Sequence[Sentence]) -> list[tuple[float, float, str]]:
    """Return (start, end, text of one or two lines) per cue; a long sentence becomes several cues."""
    cues = []
    for sentence in sentences:
        for words in _filled(sentence.words, MANUAL_CUE_CHARS):
            texts = [word.text for word in words]
            lines = [" ".join(texts)]
            if len(lines[0]) > MANUAL_CUE_CHARS // 2:
                half = len(texts) // 2
                lines = [" ".join(texts[:half]), " ".join(texts[half:])]
            cues.append((words[0].start_s, words[-1].end_s, "\n".join(lines)))
    return cues


# ---------------------------------------------------------------- automatic captions


@dataclass(frozen=True)
class Line:
    """A line of automatic captions: words in lower case, shown from `start_s` until `end_s`."""

    words: tuple[Word, ...]
    end_s: float

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def start_s(self) -> float:
        return self.words[0].start_s


def auto_lines(sentences: Sequence[Sentence], music: bool = False) -> list[Line]:
    """Join sentences and split them into lines as the recogniser does, by length and pauses.

    `music` captions long silences as [Music].
    """
    spoken = [word for sentence in sentences for word in sentence.words]
    heard = [Word(" ".join(words_of(word.text)), word.start_s, word.end_s) for word in spoken]
    groups = [list(words) for words in _filled(heard, AUTO_LINE_CHARS, AUTO_PAUSE_S)]
    if music:
        groups = _with_music(groups)
    lines = []
    for words, following in zip_longest(groups, groups[1:]):
        # A line stays until the next one appears, even through a pause; the last one stays for a second.
        end_s = following[0].start_s if following else round(words[-1].end_s + 1.0, 3)
        lines.append(Line(tuple(words), end_s))
    return lines


def _with_music(groups: list[list[Word]]) -> list[list[Word]]:
    out = []
    for words in groups:
        before_s = out[-1][-1].end_s if out else 0.0
        if words[0].start_s - before_s >= MUSIC_GAP_S:
            out.append([Word("[Music]", round(before_s + 0.3, 3), round(words[0].start_s - 0.3, 3))])
        out.append(words)
    return out


def auto_vtt(lines: Sequence[Line]) -> str:
    """Return roll-up captions in YouTube's WebVTT, in which each line is shown twice.

    A cue has the previous line as plain text and below it the new line, in which each word but the first is tagged with
    the time when it appears. Then a cue of 10 ms has the new line alone as plain text. An empty line is a single blank.
    """
    out, above = ["WEBVTT\nKind: captions\nLanguage: en\n"], " "
    for line in lines:
        end_s = max(line.end_s - 0.01, line.start_s + 0.01)
        tagged = line.words[0].text + "".join(f"<{_clock(w.start_s)}><c> {w.text}</c>" for w in line.words[1:])
        out.append(f"{_clock(line.start_s)} --> {_clock(end_s)} align:start position:0%\n{above}\n{tagged}\n")
        out.append(f"{_clock(end_s)} --> {_clock(end_s + 0.01)} align:start position:0%\n{line.text}\n \n")
        above = line.text
    return "\n".join(out)


def auto_json3(lines: Sequence[Line]) -> str:
    """Return YouTube's json3: a window, then each line's words with offsets.

    Between lines there are appended line breaks.
    """
    last_ms = round(lines[-1].end_s * 1000) if lines else 0
    events: list[dict] = [{"tStartMs": 0, "dDurationMs": last_ms, "id": 1, "wpWinPosId": 1, "wsWinStyleId": 1}]
    for n, line in enumerate(lines):
        start_ms = round(line.start_s * 1000)
        until_s = lines[min(n + 1, len(lines) - 1)].end_s  # it stays above the next line until that one ends
        segments: list[dict] = [{"utf8": line.words[0].text, "acAsrConf": 0}]
        for word in line.words[1:]:
            offset_ms = round(word.start_s * 1000) - start_ms
            segments.append({"utf8": f" {word.text}", "tOffsetMs": offset_ms, "acAsrConf": 0})
        if n:
            break_ms = min(round(lines[n - 1].end_s * 1000), start_ms) - 10
            events.append(
                {"tStartMs": break_ms, "dDurationMs": round(until_s * 1000) - break_ms, "wWinId": 1, "aAppend": 1}
                | {"segs": [{"utf8": "\n"}]}
            )
        events.append(
            {"tStartMs": start_ms, "dDurationMs": round(until_s * 1000) - start_ms, "wWinId": 1, "segs": segments}
        )
    styles = {"wsWinStyles": [{}, {"mhModeHint": 2, "juJustifCode": 0, "sdScrollDir": 3}]}
    places = {"wpWinPositions": [{}, {"apPoint": 6, "ahHorPos": 20, "avVerPos": 100, "rcRows": 2, "ccCols": 40}]}
    return json.dumps({"wireMagic": "pb3", "pens": [{}], **styles, **places, "events": events}, indent=1)


# ---------------------------------------------------------------- files

SUBTITLE_WRITERS: dict[str, tuple[str, Callable[[Sequence[Sentence], bool], str]]] = {
    # kind: (extension, writer of (sentences, True to caption long silences as music))
    "manual-vtt": ("vtt", lambda sentences, music: manual_vtt(sentences)),
    "manual-srt": ("srt", lambda sentences, music: manual_srt(sentences)),
    "auto-vtt": ("vtt", lambda sentences, music: auto_vtt(auto_lines(sentences, music))),
    "auto-json3": ("json3", lambda sentences, music: auto_json3(auto_lines(sentences, music))),
}


def _filled(words: Sequence[Word], max_chars: int, max_pause_s: float = float("inf")) -> list[Sequence[Word]]:
    """Group words up to `max_chars` characters, splitting at long pauses as well.

    A word that is longer stands alone.
    """
    groups: list[list[Word]] = []
    length = 0
    for word in words:
        pause_s = word.start_s - groups[-1][-1].end_s if groups else 0.0
        if not groups or length + 1 + len(word.text) > max_chars or pause_s > max_pause_s:
            groups.append([])
            length = -1
        groups[-1].append(word)
        length += 1 + len(word.text)
    return groups


def _clock(time_s: float, mark: str = ".") -> str:
    ms = round(time_s * 1000)
    return f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d}{mark}{ms % 1000:03d}"
