"""Roll-up captions, as automatic ones are, give every word once despite repeated lines."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.stages.transcribe.subtitles import SubtitleSettings, read_subtitles, words_of

VOCABULARY = ["red", "blue", "circle", "moves", "the", "a", "past", "square", "yeah"]


def clock(seconds: float) -> str:
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d}.{ms % 1000:03d}"


def spoken(seed: int, num_lines: int, pauses: tuple[float, ...] = (0.05, 0.05, 3.0)) -> list[list[tuple[str, float]]]:
    """Return lines of (word, start) as spoken, with pauses between some lines."""
    rng, at, lines = random.Random(seed), 1.0, []
    for _ in range(num_lines):
        line = []
        for _ in range(rng.randint(1, 6)):
            line.append((rng.choice(VOCABULARY), round(at, 3)))
            at += rng.uniform(0.2, 0.6)
        lines.append(line)
        at += rng.choice(pauses)
    return lines


def rolling_vtt(lines: list[list[tuple[str, float]]], tags: bool = True, twins: bool = True) -> str:
    """Write the lines as YouTube does: each cue repeats the line before, with a 10 ms cue in between."""
    cues, shown = [], " "
    for k, line in enumerate(lines):
        start = line[0][1]
        end = min(line[-1][1] + 0.5, lines[k + 1][0][1] - 0.011 if k + 1 < len(lines) else 1e9)
        first, *rest = line
        payload = first[0] + "".join(f"<{clock(at)}><c> {word}</c>" if tags else f" {word}" for word, at in rest)
        plain = " ".join(word for word, _ in line)
        cues.append(f"{clock(start)} --> {clock(end)} align:start position:0%\n{shown}\n{payload}\n")
        if twins:
            cues.append(f"{clock(end)} --> {clock(end + 0.01)} align:start position:0%\n{plain}\n \n")
        silence = k + 1 < len(lines) and lines[k + 1][0][1] - end > 2
        shown = " " if silence else plain
    return "WEBVTT\nKind: captions\nLanguage: en\n\n" + "\n".join(cues)


@given(st.integers(0, 10_000), st.integers(3, 12))
def test_every_word_of_rolling_captions_comes_once_at_its_time(seed, num_lines):
    lines = spoken(seed, num_lines)
    words, word_times = words_of(read_subtitles(rolling_vtt(lines).encode()))
    truth = [pair for line in lines for pair in line]
    assert [word.text for word in words] == [word for word, _ in truth]
    assert [word.start_s for word in words] == pytest.approx([at for _, at in truth], abs=0.002)
    assert word_times == ("tags" if sum(len(line) for line in lines if len(line) > 1) * 2 >= len(truth) else "cues")


@given(st.integers(0, 10_000), st.booleans())
def test_rolling_captions_without_tags_collapse_too(seed, twins):
    lines = spoken(seed, 8, pauses=(0.05,))
    words, word_times = words_of(read_subtitles(rolling_vtt(lines, tags=False, twins=twins).encode()))
    if twins:  # without pairs, a line repeated at once looks like one that is still shown
        assert [word.text for word in words] == [word for line in lines for word, _ in line]
    assert word_times == "cues" and len(words) <= sum(map(len, lines))


def srt(texts: list[str]) -> bytes:
    return "\n".join(
        f"{k}\n{clock(k)[:-4]},000 --> {clock(k + 1)[:-4]},000\n{text}\n" for k, text in enumerate(texts)
    ).encode()


def text_of(data: bytes, **settings) -> str:
    return " ".join(word.text for word in words_of(read_subtitles(data, None, SubtitleSettings(**settings)))[0])


def test_captions_that_grow_word_by_word_collapse():
    assert text_of(srt(["one", "one two", "one two three", "one two three four"])) == "one two three four"


def test_repeated_speech_in_ordinary_subtitles_stays():
    lines = ["No.", "No.", "I said no.", "Why?", "Because.", "It is so."]
    assert text_of(srt(lines)) == " ".join(lines)


def test_the_setting_decides_where_the_file_does_not():
    assert text_of(srt(["a b", "b c"])) == "a b b c"
    rolling = srt(["a b", "a b\nc d", "c d\ne f", "e f\ng h"])
    assert text_of(rolling) == "a b c d e f g h"
    assert text_of(rolling, roll_up="keep") == "a b a b c d c d e f e f g h"
    assert text_of(srt(["a", "a\nb", "c"]), roll_up="collapse") == "a b c"
