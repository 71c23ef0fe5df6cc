"""Narration and its subtitle files: timing, YouTube's roll-up structure, json3, offsets, noise levels."""

import json
import re

import numpy as np
import pysubs2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.demo.grammar import FILLER, VOCABULARY, sample_scene, words_of
from pipeline.demo.narration import (
    SUBTITLE_WRITERS,
    auto_json3,
    auto_lines,
    auto_vtt,
    manual_srt,
    manual_vtt,
    narrate,
    shifted,
)
from pipeline.demo.plan import NOISE_LEVELS, WorldSettings, plan_video

seeds = st.integers(0, 2**32 - 1)
CUE = re.compile(r"(\d\d):(\d\d):(\d\d)\.(\d{3}) --> (\d\d):(\d\d):(\d\d)\.(\d{3})(.*)")
TAG = re.compile(r"<(\d\d):(\d\d):(\d\d)\.(\d{3})><c> ([^<]*)</c>")


def talk(seed: int, filler_fraction: float = 0.2):
    """Return (scenes with start seconds, their narration)."""
    rng = np.random.default_rng(seed)
    scenes, start_s = [], 0.0
    for _ in range(int(rng.integers(1, 7))):
        scene = sample_scene(rng)
        scenes.append((start_s, scene))
        start_s += scene.duration_s
    return scenes, narrate(scenes, rng, filler_fraction)


def seconds(h: str, m: str, s: str, ms: str) -> float:
    return int(h) * 3600 + int(m) * 60 + int(s) + int(ms) / 1000


def cues_of(text: str) -> list[tuple[float, float, str, list[str]]]:
    """Return (start, end, cue settings, lines) of each cue of a VTT file, with blanks in lines kept."""
    cues = []
    for block in re.split(r"\n\n+", text)[1:]:
        head, *lines = block.rstrip("\n").split("\n")
        numbers = CUE.fullmatch(head).groups()
        cues.append((seconds(*numbers[:4]), seconds(*numbers[4:8]), numbers[8].strip(), lines))
    return cues


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_words_are_spoken_in_order_within_their_scene_at_a_natural_pace(seed):
    scenes, sentences = talk(seed)
    words = [word for sentence in sentences for word in sentence.words]
    assert all(word.start_s < word.end_s for word in words)
    assert all(a.end_s <= b.start_s for a, b in zip(words, words[1:], strict=False))
    for sentence in sentences:
        start_s, scene = scenes[sentence.scene]
        assert start_s <= sentence.start_s and sentence.end_s <= start_s + scene.duration_s
        pace = len(sentence.words) / (sentence.end_s - sentence.start_s)
        assert 1.4 < pace < 4.5
        assert sentence.filler == (sentence.text in FILLER)
        assert set(words_of(sentence.text)) <= set(VOCABULARY)


def test_speech_is_two_to_three_words_a_second_on_average():
    sentences = [sentence for seed in range(60) for sentence in talk(seed)[1]]
    pace = sum(len(s.words) for s in sentences) / sum(s.end_s - s.start_s for s in sentences)
    assert 2.2 < pace < 3.2


def test_nearly_every_scene_is_spoken_about():
    counts = [(len(scenes), len({s.scene for s in sentences})) for scenes, sentences in map(talk, range(60))]
    assert sum(spoken for _, spoken in counts) > 0.9 * sum(scenes for scenes, _ in counts)


@given(seeds, st.booleans())
@settings(max_examples=60, deadline=None)
def test_roll_up_captions_have_youtubes_structure(seed, music):
    _, sentences = talk(seed)
    lines = auto_lines(sentences, music)
    text = auto_vtt(lines)
    assert text.startswith("WEBVTT\nKind: captions\nLanguage: en\n")
    cues = cues_of(text)
    assert len(cues) == 2 * len(lines)
    above = " "
    for n, (long, brief) in enumerate(zip(cues[::2], cues[1::2], strict=True)):
        for cue in (long, brief):
            assert cue[2] == "align:start position:0%"
            assert len(cue[3]) == 2
        plain = TAG.sub(r" \5", long[3][1])
        assert long[3][0] == above  # the line before, or a blank
        assert brief[3] == [plain, " "]
        assert plain == lines[n].text and plain == plain.replace(".", "").replace(",", "")
        assert brief[0] == long[1] and brief[1] - brief[0] == pytest.approx(0.01)
        tags = [seconds(*tag[:4]) for tag in TAG.findall(long[3][1])]
        assert [long[0], *tags] == pytest.approx([word.start_s for word in lines[n].words], abs=1e-3)
        if n:
            assert cues[2 * n - 1][1] == pytest.approx(long[0])  # no gap at any pause
        above = plain
    spoken = [word for s in sentences for w in s.words for word in words_of(w.text)]
    heard = [word for line in lines for word in line.text.split() if word != "[Music]"]
    assert heard == spoken


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_json3_holds_every_word_once_with_its_time(seed):
    _, sentences = talk(seed)
    data = json.loads(auto_json3(auto_lines(sentences)))
    assert data["wireMagic"] == "pb3"
    assert "segs" not in data["events"][0]
    events = [event for event in data["events"][1:] if not event.get("aAppend")]
    heard = [
        (seg["utf8"].strip(), (event["tStartMs"] + seg.get("tOffsetMs", 0)) / 1000)
        for event in events
        for seg in event["segs"]
    ]
    spoken = [(" ".join(words_of(w.text)), w.start_s) for s in sentences for w in s.words]
    assert [word for word, _ in heard] == [word for word, _ in spoken]
    assert [t for _, t in heard] == pytest.approx([t for _, t in spoken], abs=2e-3)
    breaks = [event for event in data["events"] if event.get("aAppend")]
    assert len(breaks) == max(0, len(events) - 1)
    assert all(event["segs"] == [{"utf8": "\n"}] for event in breaks)


@pytest.mark.parametrize(("write", "form"), [(manual_vtt, "vtt"), (manual_srt, "srt")])
@pytest.mark.parametrize("seed", range(5))
def test_manual_subtitles_parse_and_keep_text_and_times(write, form, seed):
    _, sentences = talk(seed)
    parsed = pysubs2.SSAFile.from_string(write(sentences).replace("\r\n", "\n"), format_=form)
    assert " ".join(event.plaintext.replace("\n", " ") for event in parsed) == " ".join(s.text for s in sentences)
    assert parsed[0].start == round(sentences[0].start_s * 1000)
    assert parsed[-1].end == round(sentences[-1].end_s * 1000)
    assert all(len(line) <= 60 for event in parsed for line in event.plaintext.split("\n"))


def test_automatic_vtt_parses_too():
    _, sentences = talk(3)
    lines = auto_lines(sentences)
    parsed = pysubs2.SSAFile.from_string(auto_vtt(lines), format_="vtt")
    assert len(parsed) == 2 * len(lines)


def test_srt_has_windows_line_ends():
    text = manual_srt(talk(1)[1])
    assert text.count("\n") == text.count("\r\n") > 0


@given(seeds, st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_a_shift_moves_all_words_and_never_before_zero(seed, offset_s):
    _, sentences = talk(seed)
    moved = [word for sentence in shifted(sentences, offset_s) for word in sentence.words]
    words = [word for sentence in sentences for word in sentence.words]
    assert [word.text for word in moved] == [word.text for word in words]
    assert all(0 <= word.start_s < word.end_s for word in moved)
    for word, late in zip(words, moved, strict=True):
        if word.start_s + offset_s > 0:
            assert late.start_s == pytest.approx(word.start_s + offset_s, abs=1e-3)


def test_no_talk_gives_files_without_cues():
    for _, write in SUBTITLE_WRITERS.values():
        assert "-->" not in write([], True)
    assert json.loads(auto_json3([]))["events"][0]["dDurationMs"] == 0


def test_silence_is_captioned_as_music_only_where_it_is_long():
    for seed in range(20):
        lines = auto_lines(talk(seed)[1], music=True)
        tags = [line for line in lines if line.text == "[Music]"]
        assert all(line.words[0].end_s - line.words[0].start_s > 1.0 for line in tags)
    assert any("[Music]" in line.text for seed in range(20) for line in auto_lines(talk(seed)[1], music=True))


@pytest.mark.parametrize("level", list(NOISE_LEVELS))
def test_noise_levels_give_the_asked_shares(level):
    noise = NOISE_LEVELS[level]
    settings_ = WorldSettings(**noise, max_video_s=40.0)
    plans = [plan_video(settings_, index) for index in range(120)]
    subtitled = [plan for plan in plans if plan.subtitle_kind]
    assert 1 - len(subtitled) / len(plans) == pytest.approx(noise["missing_fraction"], abs=0.03)
    late = [plan.subtitle_offset_s for plan in subtitled if plan.subtitle_offset_s]
    assert len(late) / len(subtitled) == pytest.approx(noise["shifted_fraction"], abs=0.06)
    assert all(1.0 <= abs(offset_s) <= 2.0 for offset_s in late)
    filler = total = 0
    for index, plan in enumerate(plans):
        sentences = narrate(plan.scenes, np.random.default_rng(index), noise["filler_fraction"])
        total += len({s.scene for s in sentences})
        filler += len({s.scene for s in sentences if s.filler})
    assert filler / total == pytest.approx(noise["filler_fraction"], abs=0.08)


def test_every_subtitle_kind_occurs_in_a_small_world():
    kinds = {plan_video(WorldSettings(missing_fraction=0.2), index).subtitle_kind for index in range(16)}
    assert kinds == {*SUBTITLE_WRITERS, None}
