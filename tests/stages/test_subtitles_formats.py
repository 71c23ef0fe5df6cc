"""Subtitle files of every format and encoding, damaged ones included, become words in time order."""

import codecs
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from clipmill.base.errors import ItemError
from pipeline.stages.transcribe.subtitles import SubtitleSettings, read_subtitles, words_of
from pipeline.stages.transcribe.words import join_words
from tests.helpers.call_count import count_calls

FILES = Path(__file__).parents[1] / "data" / "subtitles"


def text_of(source, **settings) -> str:
    return join_words(word.text for word in words_of(read_subtitles(source, None, SubtitleSettings(**settings)))[0])


def srt(*cues: tuple[str, str, str]) -> bytes:
    return "\n".join(f"{k}\n{a} --> {b}\n{text}\n" for k, (a, b, text) in enumerate(cues, 1)).encode()


def test_automatic_vtt_gives_each_word_once_at_the_time_of_its_tag():
    cues = read_subtitles(FILES / "automatic.vtt")
    words, word_times = words_of(cues)
    assert (cues.format, cues.language, word_times) == ("vtt", "en", "tags")
    assert [(word.text, word.start_s) for word in words] == [
        ("red", 0.16),
        ("circles", 0.5),
        ("move", 1.0),
        ("past", 2.399),
        ("the", 3.0),
        ("blue", 3.5),
        ("square", 4.0),
        ("again", 7.02),
        ("again", 9.03),  # said twice, shown four times
        ("and", 9.8),
    ]
    assert words[2].end_s < 1.7  # a tag says when a word begins; the silence after it is not part of the word


def test_json3_gives_the_same_words_as_the_vtt_of_the_same_captions():
    cues = read_subtitles(FILES / "automatic.json3")
    words, word_times = words_of(cues)
    vtt = words_of(read_subtitles(FILES / "automatic.vtt"))[0]
    assert (cues.format, word_times) == ("json3", "tags")
    assert [word.text for word in words] == [word.text for word in vtt[:7]] + ["again"]
    assert [word.start_s for word in words[:7]] == pytest.approx([word.start_s for word in vtt[:7]], abs=0.002)


def test_srt_with_short_times_cue_zero_tags_entities_and_blank_lines_inside():
    cues = read_subtitles(FILES / "manual.srt")
    assert cues.format == "srt" and words_of(cues)[1] == "cues"
    assert [cue.start_s for cue in cues.cues] == [0.5, 4.0, 9.0, 11.0]
    assert cues.cues[1].end_s == 7.25
    assert text_of(FILES / "manual.srt") == (
        "Red & green circles move. Where to? Past the square! It was 2024 The end (really)."
    )


def test_ttml_times_are_relative_to_their_parents_and_come_in_clock_frames_and_ticks():
    cues = read_subtitles(FILES / "nested.ttml")
    assert (cues.format, cues.language) == ("ttml", "en")
    assert [(cue.start_s, cue.end_s) for cue in cues.cues] == [(10.5, 12.0), (12.0, 13.5), (14.2, 15.0)]
    assert text_of(FILES / "nested.ttml") == "Red circles move. Past <the> square. Done."


def test_ass_gives_its_dialogue():
    script = (
        "[Script Info]\nScriptType: v4.00+\n[Events]\n"
        "Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
        "Dialogue: 0,0:00:01.50,0:00:03.00,Default,,0,0,0,,{\\i1}Red{\\i0} circles\\Nmove.\n"
    )
    cues = read_subtitles(script.encode())
    assert [(cue.start_s, cue.end_s) for cue in cues.cues] == [(1.5, 3.0)]
    assert text_of(script.encode()) == "Red circles move."


def test_vtt_notes_styles_ids_and_settings_are_not_text():
    vtt = b"""WEBVTT - title

STYLE
::cue { color: red }

NOTE one
two

intro
00:01.000 --> 00:02.000 align:start
Red <v.loud Mary>circles</v>

NOTE between

second
0:00:02.000 --> 0:00:03.500 line:0
move<00:00:02.500> <c.yellow>on</c>

"""
    assert text_of(vtt) == "Red circles move on"
    words, _ = words_of(read_subtitles(vtt))
    assert words[-1].start_s == 2.5 and words[0].start_s == 1.0


def test_a_payload_line_with_two_time_tags_is_not_a_timing_line():
    vtt = b"WEBVTT\n\n00:00:01.000 --> 00:00:04.000\na<00:00:02.000><c> b</c><00:00:03.000><c> c</c>\n"
    assert [(w.text, w.start_s) for w in words_of(read_subtitles(vtt))[0]] == [("a", 1.0), ("b", 2.0), ("c", 3.0)]


def test_content_decides_the_format_whatever_the_name_says():
    assert read_subtitles(FILES / "manual.srt", "vtt").format == "srt"
    assert read_subtitles(FILES / "automatic.json3", "srt").format == "json3"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"   \n",
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b'{"events": 3}',
        b'{"events": [{"segs": [{"utf8": "x", "tOffsetMs": "soon"}]}]}',
        b'<tt xmlns="http://www.w3.org/ns/ttml"><body><p begin="soon">x</p></body></tt>',
        b'<!DOCTYPE tt [<!ENTITY a "aaaa">]><tt><body><p begin="1s" end="2s">&a;</p></body></tt>',
        b"just some text\nwithout times",
        b'<?xml version="1.0"?><x xmlns="http://www.w3.org/ns/ttml"><tt:p begin="1s">no end',
        b'<!DOCTYPE x [<!ENTITY a "aa">]><x xmlns="http://www.w3.org/ns/ttml"><p begin="1s" end="2s">&a;</p></x>',
    ],
)
def test_a_file_that_is_not_a_subtitle_fails_as_unreadable(data):
    with pytest.raises(ItemError) as failure:
        read_subtitles(data)
    assert failure.value.error_class == "subtitle-unreadable"


def test_a_missing_file_fails_as_unreadable(tmp_path):
    with pytest.raises(ItemError, match="gone.vtt"):
        read_subtitles(tmp_path / "gone.vtt")


@pytest.mark.parametrize("data", [b"WEBVTT\n\n", b'{"events": []}', b"1\n00:00:01,000 --> 00:00:02,000\n\n"])
def test_a_proper_file_without_words_has_no_words(data):
    assert words_of(read_subtitles(data)) == ([], "none")


# --- encodings -----------------------------------------------------------------------------------------------------

FRENCH = "Où êtes-vous, garçon ? L’été déjà…"


@pytest.mark.parametrize(
    ("encoding", "bom"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-16-le", b""),
        ("utf-16-be", b""),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("cp1252", b""),
    ],
)
def test_encodings_are_recognised(encoding, bom):
    data = bom + srt(("00:00:01,000", "00:00:03,000", FRENCH)).decode().encode(encoding)
    assert text_of(data) == FRENCH


def test_a_named_encoding_is_used():
    data = srt(("00:00:01,000", "00:00:03,000", "红色的圆")).decode().encode("gbk")
    assert text_of(data, encoding="gbk") == "红色的圆"
    with pytest.raises(ValidationError, match="codec name"):
        SubtitleSettings(encoding="utf-9")


def test_a_bad_byte_in_good_utf8_does_not_spoil_the_rest():
    data = srt(("00:00:01,000", "00:00:03,000", FRENCH)).replace("garçon".encode(), b"gar\xffon")
    cues = read_subtitles(data)
    assert cues.repairs == {"broken-bytes": 1} and not cues.encoding_guessed
    assert "Où êtes-vous, garon ?" in text_of(data)


PREFIXES = [
    b"",
    b"WEBVTT\n\n00:01.000 --> 00:02.000\n",
    b'{"events": [',
    b"[Script Info]\n[V4+ Styles]\n[Events]\nFormat: Layer, Start, End, Style, Text\nDialogue: ",
    b'<tt xmlns="http://www.w3.org/ns/ttml"><body><p begin="1s" end="',
    b"<SAMI><BODY><SYNC Start=",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@given(st.binary(max_size=400) | st.text('0123456789:.,-> \n<>{}"\\abc/=', max_size=80).map(str.encode))
def test_no_bytes_crash_the_reader(prefix, data):
    try:
        words_of(read_subtitles(prefix + data))
    except ItemError as error:
        assert error.error_class == "subtitle-unreadable"


@pytest.mark.parametrize(
    "data",
    [
        b'{"events": [{"tStartMs": 1' + b"0" * 400 + b', "segs": [{"utf8": "x"}]}]}',
        b'<tt frameRateMultiplier="1 0"><body><p begin="1s" end="2s">x</p></body></tt>',
        b'<tt><body><p begin="1' + b"0" * 4000 + b':00:00" end="2s">x</p></body></tt>',
        b"<tt>" + b"<div>" * 20_000 + b"</div>" * 20_000 + b"</tt>",
        b'{"events": ' + b"[" * 100_000,
    ],
    ids=["huge int", "zero rate", "huge hours", "deep xml", "deep json"],
)
def test_numbers_and_depths_beyond_reason_do_not_crash_the_reader(data):
    with pytest.raises(ItemError, match="subtitle-unreadable"):
        read_subtitles(data)


@pytest.mark.parametrize(
    "unit", ["[", "(", "<", "<a ", "{\\", "A", "A B ", ">> ", "<rt>", "\n \n", "- ", "♪", "00:00:01.000 --> "]
)
def test_long_nonsense_takes_no_long_time(unit, ordinary_s):
    """The cost is proportional to the length, in time against ordinary words and in number of calls."""

    def read(num_units: int) -> None:
        words_of(read_subtitles(b"1\n00:00:01,000 --> 00:00:02,000\n" + (unit * num_units).encode() + b" word\n"))

    began = time.process_time()
    read(100_000)
    assert time.process_time() - began < 50 * ordinary_s
    assert count_calls(read, 10_000)[1] < 1000 + 20 * 10_000 * len(unit.encode())


@pytest.fixture(scope="module")
def ordinary_s() -> float:
    began = time.process_time()
    words_of(read_subtitles(b"1\n00:00:01,000 --> 00:00:02,000\n" + b"word " * 100_000))
    return time.process_time() - began


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["tStartMs", "dDurationMs", "segs", "utf8", "tOffsetMs"]), inner, max_size=5)
    ),
    max_leaves=20,
)


@given(st.lists(json_values, max_size=4))
def test_no_json_crashes_the_reader(events):
    try:
        words_of(read_subtitles(json.dumps({"events": events}).encode()))
    except ItemError as error:
        assert error.error_class == "subtitle-unreadable"


# --- text that is not spoken ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (">> Hello there", "Hello there"),
        ("&gt;&gt; JOHN: Hello there", "Hello there"),
        ("- Hello", "Hello"),
        ("-Hello", "Hello"),
        ("-5 degrees", "-5 degrees"),
        ("MARY ANN: Hello", "Hello"),
        ("Speaker 2: Hello", "Hello"),
        ("Warning: hello", "Warning: hello"),
        ("HE SAID: STOP", "HE SAID: STOP"),
        ("[Music] Hello [Applause]", "Hello"),
        ("[Scene 12] Hello", "Hello"),
        ("[ __ ] Hello", "Hello"),
        ("(applause) Hello", "Hello"),
        ("(DOOR CREAKS) Hello", "Hello"),
        ("(softly)", ""),
        ("every browser (even iPhone)", "every browser (even iPhone)"),
        ("the States (USA) are", "the States (USA) are"),
        ("♪ la la ♪", "la la"),
        ("【音楽】こんにちは", "こんにちは"),
        ("<font color='#fff'>Hello</font> {\\an8}there", "Hello there"),
        ("f<i>oo</i>", "foo"),
        ("<ruby>漢<rt>kan</rt></ruby>", "漢"),
        ("&lt;video&gt; a < b &amp; I <3 it", "<video> a < b & I <3 it"),
        ("zero\u200bwidth\u00a0space", "zerowidth space"),
        ("quoi ?", "quoi ?"),
    ],
)
def test_tags_that_are_not_spoken_are_removed_and_the_rest_is_kept(line, kept):
    assert text_of(srt(("00:00:01,000", "00:00:03,000", line))) == kept


def test_tags_stay_where_the_settings_keep_them():
    data = srt(("00:00:01,000", "00:00:03,000", "<v Mary>JOHN: [Music] <i>Hello</i>"))
    assert text_of(data, speakers="keep", sounds="keep") == "Mary: JOHN: [Music] Hello"
    assert text_of(data, markup="keep").startswith("<v Mary>JOHN: <i>Hello</i>")


def test_chinese_counts_character_by_character_and_joins_without_spaces():
    words, _ = words_of(read_subtitles(srt(("00:00:00,000", "00:00:04,000", "「红色」的圆 moves。"))))
    assert [word.text for word in words] == ["「红", "色」", "的", "圆", "moves。"]
    assert join_words(word.text for word in words) == "「红色」的圆 moves。"


# --- broken times --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cues", "repair"),
    [
        ([("-00:00:01,000", "00:00:02,000", "a")], "negative-time"),
        ([("-00:00:03,000", "-00:00:02,000", "a"), ("00:00:02,000", "00:00:03,000", "b")], "negative-time"),
        ([("00:00:03,000", "00:00:02,000", "a")], "reversed-time"),
        ([("00:00:03,000", "00:00:03,000", "a")], "zero-length"),
        ([("00:00:03,000", "00:00:04,000", "a"), ("00:00:01,000", "00:00:02,000", "b")], "unsorted"),
        ([("00:00:01,000", "00:00:04,000", "a"), ("00:00:03,000", "00:00:05,000", "b")], "overlap"),
        ([("900:00:01,000", "900:00:04,000", "a"), ("00:00:03,000", "00:00:05,000", "b")], "absurd-time"),
        ([("00:00:01,000", "900:00:04,000", "a")], "absurd-time"),
    ],
)
def test_broken_times_are_set_right_and_counted(cues, repair):
    read = read_subtitles(srt(*cues))
    words, _ = words_of(read)
    assert read.repairs[repair] == 1
    assert words and all(0 <= word.start_s < word.end_s < 10 for word in words)
    assert [word.start_s for word in words] == sorted(word.start_s for word in words)


def test_cues_with_one_time_are_spoken_one_after_the_other():
    words, _ = words_of(read_subtitles(srt(*[("00:00:01,000", "00:00:05,000", f"line {k} here") for k in range(3)])))
    assert [word.text for word in words] == "line 0 here line 1 here line 2 here".split()
    assert words[0].start_s == 1.0 and words[-1].end_s == 5.0
    assert all(a.end_s == b.start_s for a, b in zip(words, words[1:], strict=False))


clock = st.floats(-5, 400).map(lambda t: f"{'-' if t < 0 else ''}00:{int(abs(t)) // 60:02d}:{abs(t) % 60:06.3f}")
lines = st.lists(st.sampled_from(["red", "circle", "moves.", "a", "- b", "[Music]", "\n"]), max_size=8).map(" ".join)


@given(st.lists(st.tuples(clock, clock, lines), max_size=12))
def test_words_are_in_order_and_never_overlap_whatever_the_times(cues):
    words, word_times = words_of(read_subtitles(b"WEBVTT\n\n" + srt(*cues)))
    assert (word_times == "none") == (not words)
    for word in words:
        assert 0 <= word.start_s <= word.end_s
    for before, after in zip(words, words[1:], strict=False):
        assert before.end_s <= after.start_s


def test_a_word_s_share_of_its_cue_is_its_share_of_the_characters():
    words, word_times = words_of(read_subtitles(srt(("00:00:10,000", "00:00:20,000", "abcd ef ghij"))))
    assert word_times == "cues"
    assert [(word.start_s, word.end_s) for word in words] == [(10.0, 14.0), (14.0, 16.0), (16.0, 20.0)]


def test_real_files(footage):
    for path in sorted((footage / "subs").iterdir()):
        cues = read_subtitles(path)
        words, _ = words_of(cues)
        assert len(words) > 100 and not cues.repairs
        assert "[Scene" not in join_words(word.text for word in words)
    assert text_of(footage / "subs" / "mediaelement.srt").startswith("HTML5 <video> and <audio> was supposed")
