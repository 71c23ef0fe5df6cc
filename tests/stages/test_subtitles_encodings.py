"""Old encodings are found with the help of the language, recorded as a guess, or refused by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.base.errors import ItemError
from pipeline.stages.transcribe.cues import SubtitleSettings
from pipeline.stages.transcribe.encodings import decode, groups_of
from pipeline.stages.transcribe.subtitles import read_subtitles

SAID = {
    "zh": ["你好，今天天气很好。", "我们一起去公园散步吧。", "他说他不知道这件事情。"],
    "zh-TW": ["你好，今天天氣很好。", "我們一起去公園散步吧。", "他說他不知道這件事情。"],
    "ja": ["こんにちは、今日はいい天気ですね。", "公園へ散歩に行きましょう。", "彼は知らないと言った。"],
    "ko": ["안녕하세요, 오늘 날씨가 좋네요.", "공원에 산책하러 갑시다.", "그는 모른다고 말했다."],
    "ru": ["Привет, сегодня хорошая погода.", "Пойдём гулять в парк.", "Он сказал, что не знает."],
    "uk": ["Привіт, сьогодні гарна погода.", "Ходімо гуляти в парк.", "Він сказав, що не знає."],
    "el": ["Γεια σου, ο καιρός είναι καλός.", "Πάμε στο πάρκο.", "Δεν ξέρω τίποτα."],
    "pl": ["Cześć, dzisiaj jest ładna pogoda.", "Chodźmy na spacer.", "Powiedział, że nie wie."],
    "cs": ["Ahoj, dnes je hezké počasí.", "Pojďme na procházku.", "Řekl, že neví."],
    "hu": ["Jó napot, ma szép idő van.", "Gyerünk a parkba.", "Azt mondta, hogy őrült."],
    "tr": ["Merhaba, bugün hava çok güzel.", "Parka yürüyüşe gidelim.", "Bilmediğini söyledi."],
    "lv": ["Labdien, šodien ir jauks laiks.", "Ļoti žēl, ņemiet.", "Viņš teica, ka nezina."],
    "he": ["שלום, מזג האוויר יפה היום.", "בוא נלך לפארק.", "הוא אמר שאינו יודע."],
    "ar": ["مرحبا، الطقس جميل اليوم.", "دعنا نذهب إلى الحديقة.", "قال إنه لا يعرف."],
    "th": ["สวัสดี วันนี้อากาศดี", "ไปเดินเล่นกันเถอะ", "เขาบอกว่าไม่รู้"],
    "fr": ["Où êtes-vous, garçon ?", "L’été déjà, là-bas.", "Il a dit qu’il ne savait pas."],
    "de": ["Schöne Grüße, das Wetter ist gut.", "Gehen wir für Äpfel.", "Er weiß es nicht."],
}
ENCODINGS = [
    *[("zh", name) for name in ("gbk", "gb18030", "hz")],
    *[("zh-TW", name) for name in ("big5", "gb18030")],
    *[("ja", name) for name in ("shift_jis", "euc_jp", "iso2022_jp")],
    *[("ko", name) for name in ("euc_kr", "cp949", "iso2022_kr")],
    *[("ru", name) for name in ("cp1251", "koi8_r", "cp866", "iso8859_5", "mac_cyrillic")],
    *[("uk", name) for name in ("cp1251", "koi8_u", "cp1125")],
    *[("el", name) for name in ("cp1253", "iso8859_7")],
    *[("pl", name) for name in ("cp1250", "iso8859_2")],
    *[("cs", name) for name in ("cp1250", "iso8859_2")],
    *[("hu", name) for name in ("cp1250", "cp852")],
    *[("fr", name) for name in ("cp1252", "mac_roman", "cp850")],
    *[("de", name) for name in ("cp1252", "cp850", "latin-1")],
    *[("tr", "cp1254"), ("lv", "cp1257"), ("he", "cp1255"), ("ar", "cp1256"), ("th", "cp874")],
]


def srt(lines: list[str]) -> str:
    return "\n".join(f"{k}\n00:00:0{k},000 --> 00:00:0{k},900\n{line}\n" for k, line in enumerate(lines, 1))


def encoded(language: str, encoding: str) -> tuple[bytes, list[str]]:
    lines = [line if encoding in ("cp1252", "mac_roman") else line.replace("’", "'") for line in SAID[language]]
    return srt(lines).encode(encoding), lines


@pytest.mark.parametrize(("language", "encoding"), ENCODINGS)
@pytest.mark.parametrize("num_lines", [1, 3])
def test_the_language_tells_the_encoding_even_of_one_line(language, encoding, num_lines):
    lines = encoded(language, encoding)[1][:num_lines]
    cues = read_subtitles(srt(lines).encode(encoding), language=language)
    assert [cue.text for cue in cues.cues] == lines
    assert cues.encoding_guessed and cues.repairs["encoding-guessed"] == 1


@pytest.mark.parametrize("language", ["zh", "zho", "chi", "ZH_cn", "zh-Hans", "cmn"])
def test_every_spelling_of_the_language_helps(language):
    data, lines = encoded("zh", "gbk")
    assert [cue.text for cue in read_subtitles(data, language=language).cues] == lines


@pytest.mark.parametrize(
    ("language", "encoding"), [("ja", "shift_jis"), ("zh", "gbk"), ("ru", "cp1251"), ("fr", "cp1252")]
)
def test_without_a_language_a_text_that_is_plausible_in_one_way_only_is_read(language, encoding):
    data, lines = encoded(language, encoding)
    cues = read_subtitles(data)
    assert [cue.text for cue in cues.cues] == lines and cues.encoding_guessed


@pytest.mark.parametrize("language", [None, "en", "not a language"])
def test_a_text_that_is_plausible_in_several_ways_is_refused_with_their_names(language):
    data = srt(["שלום, מזג האוויר יפה היום."]).encode("cp1255")
    with pytest.raises(ItemError, match="subtitle-unreadable: its encoding cannot be told") as refused:
        read_subtitles(data, language=language)
    for named in ("cp1255", "cp1251", "gb18030", "transcribe.encoding", "language"):
        assert named in str(refused.value)


@given(
    st.sampled_from(sorted(SAID)),
    st.sampled_from([name for _, name in ENCODINGS]),
    st.none() | st.sampled_from(sorted(SAID)),
)
def test_a_file_is_read_or_refused_and_a_guess_is_always_recorded(language, encoding, hint):
    data = srt(SAID[language]).encode(encoding, "ignore")
    try:
        decoded = decode(data, language=hint)
    except ItemError as error:
        assert error.error_class == "subtitle-unreadable" and "tried" in error.message
        return
    assert "\ufffd" not in decoded.text
    assert decoded.guessed or data.decode("utf-8") == decoded.text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("language", ["zh", "ru", "fr"])
def test_wide_encodings_are_recognised_without_a_byte_order_mark(encoding, language):
    cues = read_subtitles(srt(SAID[language]).encode(encoding))
    assert [cue.text for cue in cues.cues] == SAID[language] and cues.encoding == encoding


@pytest.mark.parametrize(
    "declaration",
    ["<?xml version='1.0' encoding='{}'?><tt><body><p begin='1s' end='2s'>{}</p></body></tt>",
     '<SAMI><HEAD><META http-equiv="Content-Type" content="text/html; charset={}"></HEAD>'
     "<BODY><SYNC Start=1000><P>{}</BODY></SAMI>"],
)  # fmt: skip
def test_an_encoding_that_the_file_declares_is_no_guess(declaration):
    said = SAID["ru"][0]
    cues = read_subtitles(declaration.format("koi8-r", said).encode("koi8-r"))
    assert [cue.text for cue in cues.cues] == [said]
    assert (cues.encoding, cues.encoding_guessed) == ("koi8-r", False)


def test_a_declaration_that_is_wrong_is_not_believed():
    text = f"<?xml version='1.0' encoding='utf-8'?><tt><body><p begin='1s' end='2s'>{SAID['ru'][0]}</p></body></tt>"
    assert read_subtitles(text.encode("cp1251"), language="ru").cues[0].text == SAID["ru"][0]
    text = text.replace("utf-8", "koi8-r")
    assert read_subtitles(text.encode()).cues[0].text == SAID["ru"][0]


def test_a_wrong_setting_is_refused_and_a_damaged_byte_is_left_out_and_counted():
    data, lines = encoded("zh", "gbk")
    with pytest.raises(ItemError, match=r"not in the encoding utf-8; correct the setting transcribe\.encoding"):
        read_subtitles(data, settings=SubtitleSettings(encoding="utf-8"))
    damaged = data.replace("你".encode("gbk"), b"\xff")
    for cues in (
        read_subtitles(damaged, settings=SubtitleSettings(encoding="gbk")),
        read_subtitles(damaged, language="zh"),
    ):
        assert cues.cues[1].text == lines[1] and cues.repairs["broken-bytes"] >= 1


def test_marks_in_the_middle_of_a_file_are_not_text():
    data = b"\xef\xbb\xbf" + srt(["one"]).encode() + b"\n\xef\xbb\xbf2\n00:00:03,000 --> 00:00:04,000\ntwo\n"
    assert [cue.text for cue in read_subtitles(data).cues] == ["one", "two"]


def test_the_script_of_a_language_decides_its_encodings():
    assert groups_of("sr") == ["Cyrl", "central"] and groups_of("sr-Latn") == ["central"]
    assert groups_of("zh-HK")[0] == "Hant" and groups_of("en-orig") == ["western"]
    assert groups_of(None) == groups_of("und") == groups_of("nonsense!") == []
