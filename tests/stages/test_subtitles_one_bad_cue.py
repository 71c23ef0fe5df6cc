"""One bad cue never costs the others, in any format; words keep their times where the format has them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.base.errors import ItemError
from pipeline.stages.transcribe.subtitles import READERS, read_subtitles, words_of


def spoken(data: bytes | str, **hints) -> list[tuple[float, float, str]]:
    data = data if isinstance(data, bytes) else data.encode()
    return [(round(cue.start_s, 3), round(cue.end_s, 3), cue.text) for cue in read_subtitles(data, **hints).cues]


def timed(data: bytes | str, **hints) -> list[tuple[str, float]]:
    data = data if isinstance(data, bytes) else data.encode()
    words, word_times = words_of(read_subtitles(data, **hints))
    assert word_times == "tags"
    return [(word.text, word.start_s) for word in words]


# --- words that look like comments ---------------------------------------------------------------------------------

CAPITALS = ["NOTE THAT THE VALVE IS CLOSED.", "STYLE IS EVERYTHING.", "REGION FOUR IS NEXT.", "NOTE", "STYLE", "REGION"]


@pytest.mark.parametrize("header", ["", "WEBVTT\n\n"])
@pytest.mark.parametrize("text", [*CAPITALS, "TAKE IT OUT.\nNOTE THE TIME."])
def test_a_cue_that_begins_with_the_name_of_a_block_is_speech(header, text):
    body = f"1\n00:00:01.000 --> 00:00:02.000\n{text}\n\n2\n00:00:03.000 --> 00:00:04.000\nYES.\n"
    assert spoken(header + body) == [(1.0, 2.0, text), (3.0, 4.0, "YES.")]


def test_srt_has_no_comments_and_vtt_has_them_only_after_a_blank_line():
    body = "00:00:01.000 --> 00:00:02.000\nFirst.\n\nNOTE said or not\nmore\n\n00:00:03.000 --> 00:00:04.000\nLast.\n"
    assert [text for *_, text in spoken(body)] == ["First.\nNOTE said or not\nmore", "Last."]
    assert [text for *_, text in spoken(f"WEBVTT\n\n{body}")] == ["First.", "Last."]
    styled = f"WEBVTT\n\n{body}".replace("NOTE said or not\nmore", "STYLE\n::cue { color: red }")
    assert [text for *_, text in spoken(styled)] == ["First.", "Last."]
    words = f"WEBVTT\n\n{body}".replace("NOTE said or not\nmore", "STYLE IS ALL\nNOTED")
    assert spoken(words)[0][2] == "First.\nSTYLE IS ALL\nNOTED"


def test_the_id_of_a_vtt_cue_may_be_a_block_s_name():
    vtt = "WEBVTT\n\nNOTE\n00:01.000 --> 00:02.000\none\n\nSTYLE\n00:03.000 --> 00:04.000\ntwo\n"
    assert [text for *_, text in spoken(vtt)] == ["one", "two"]


# --- segments of a stream ------------------------------------------------------------------------------------------


def segment(ticks: int | None, *cues: tuple[str, str, str], local: str = "00:00:00.000", header: str = "") -> str:
    mapped = "" if ticks is None else f"X-TIMESTAMP-MAP=LOCAL:{local},MPEGTS:{ticks}\n"
    return f"WEBVTT\n{mapped}{header}\n" + "".join(f"{a} --> {b}\n{text}\n\n" for a, b, text in cues)


ONE, TWO = ("00:01.000", "00:03.000", "Hello."), ("00:02.000", "00:04.000", "Goodbye.")


OTHER_ORDER = segment(None, TWO, header="X-TIMESTAMP-MAP=MPEGTS:1350000, LOCAL:00:00.000\n")


@pytest.mark.parametrize(
    ("first", "second", "starts_s"),
    [
        (segment(900_000, ONE), segment(900_000, TWO), [1.0, 2.0]),
        (segment(900_000, ONE), segment(1_350_000, TWO), [1.0, 7.0]),
        (segment(0, ONE), segment(450_000, TWO), [1.0, 7.0]),
        (segment(900_000, ONE), segment(1_350_000, TWO, local="00:00:05.000"), [1.0, 2.0]),
        (segment(2**33 - 450_000, ONE), segment(0, TWO), [1.0, 7.0]),
        (segment(2**33 - 90_000, ONE), segment(2**33 + 360_000, TWO), [1.0, 7.0]),
        (segment(900_000, ONE), segment(None, TWO), [1.0, 2.0]),
        (segment(None, ONE), segment(None, TWO), [1.0, 2.0]),
        (segment(900_000, ONE), OTHER_ORDER, [1.0, 7.0]),
    ],
    ids=["one clock", "offset", "from zero", "local", "wraps", "beyond 33 bits", "no map", "no maps", "other order"],
)  # fmt: skip
@pytest.mark.parametrize("joint", ["", "\n", "\ufeff", "\n\ufeff"])
def test_segments_are_placed_on_one_clock_and_their_headers_are_not_speech(first, second, starts_s, joint):
    cues = spoken(first.rstrip("\n") + "\n\n" + joint + second)
    assert [(start_s, text) for start_s, _, text in cues] == list(zip(starts_s, ["Hello.", "Goodbye."], strict=True))
    assert spoken((first + joint + second).replace("\n", "\r\n")) == cues


def test_segments_joined_without_a_line_break_are_told_apart():
    joined = segment(900_000, ONE).rstrip("\n") + segment(1_350_000, TWO)
    assert [(start_s, text) for start_s, _, text in spoken(joined)] == [(1.0, "Hello."), (7.0, "Goodbye.")]


def test_a_cue_in_two_segments_is_said_once():
    again = segment(900_000, ONE, TWO) + segment(1_350_000, ("-00:03.000", "-00:01.000", "Goodbye."), ONE)
    assert [(start_s, text) for start_s, _, text in spoken(again)] == [
        (1.0, "Hello."),
        (2.0, "Goodbye."),
        (6.0, "Hello."),
    ]
    rest = [
        ("00:05.000", "00:06.000", "A long one."),
        ("00:06.000", "00:07.000", "No."),
        ("00:07.000", "00:08.000", "No."),
    ]
    cut = segment(None, ("00:01.000", "00:05.000", "A long one.")) + segment(None, *rest)
    assert [cue[:2] for cue in spoken(cut)] == [(1.0, 6.0), (6.0, 7.0), (7.0, 8.0)]


def test_speech_about_webvtt_and_word_times_of_a_segment():
    vtt = segment(0, ("00:01.000", "00:02.000", "WEBVTT is it.")) + segment(
        450_000, ("00:01.000", "00:02.000", "red<00:01.250> blue<00:01.500> green")
    )
    assert spoken(vtt)[0][2] == "WEBVTT is it."
    assert ("green", 6.5) in timed(vtt)


@given(
    st.lists(st.tuples(st.integers(0, 2**33 - 1), st.booleans()), min_size=1, max_size=4),
    st.text("WEBVTT\nX-TIMESTAMP=:,0", max_size=60),
)
def test_no_header_loses_a_cue(maps, junk):
    segments = [
        segment(ticks if mapped else None, ("00:01.000", "00:02.000", f"word{k}"))
        for k, (ticks, mapped) in enumerate(maps)
    ]
    cues = read_subtitles((segments[0] + "".join(segments[1:])).encode())
    lost = sum(cues.repairs.get(kind, 0) for kind in ("negative-time", "absurd-time"))
    assert len({cue.text for cue in cues.cues}) + lost >= len(maps)
    try:
        read_subtitles((segments[0] + junk + "".join(segments[1:])).encode())
    except ItemError as error:
        assert error.error_class == "subtitle-unreadable"


# --- TTML ----------------------------------------------------------------------------------------------------------


def ttml(body: str, attributes: str = "", head: str = "") -> str:
    return f'<tt xmlns="http://www.w3.org/ns/ttml" xmlns:ttp="urn:p" xmlns:tts="urn:s" {attributes}>{head}{body}</tt>'


@pytest.mark.parametrize(
    ("body", "cues"),
    [
        ('<body><div><p><span begin="4s" end="7s">A b.</span></p></div></body>', [(4, 7, "A b.")]),
        ('<body><div begin="4s" end="8s"><p>A b.</p></div></body>', [(4, 8, "A b.")]),
        ('<body begin="1s" dur="9s"><div begin="4s"><p>A b.</p></div></body>', [(5, 10, "A b.")]),
        (
            '<body begin="1s"><div begin="1s"><p begin="1s"><span begin="1s" dur="2s">A b.</span></p></div></body>',
            [(4, 6, "A b.")],
        ),
        ('<body><div end="5s"><p begin="4s" end="8s">A b.</p></div></body>', [(4, 5, "A b.")]),
        ('<body><p begin="4s" dur="3s" end="5s">A b.</p></body>', [(4, 5, "A b.")]),
        ('<body timeContainer="seq"><p dur="2s">A b.</p><p dur="3s">C d.</p></body>', [(0, 2, "A b."), (2, 5, "C d.")]),
        (
            '<body><div timeContainer="seq"><p dur="2s">A b.</p><p begin="1s" dur="1s">C d.</p></div></body>',
            [(0, 2, "A b."), (3, 4, "C d.")],
        ),
        (
            '<body timeContainer="par"><p begin="1s" end="2s">A b.</p><p begin="2s" end="3s">C d.</p></body>',
            [(1, 2, "A b."), (2, 3, "C d.")],
        ),
        (
            '<body><p begin="1s" end="9s">A b. <span begin="2s" end="4s">C d e.</span></p></body>',
            [(1, 9, "A b."), (3, 5, "C d e.")],
        ),
        ('<body><p begin="1s" end="2s"><metadata><desc>no</desc></metadata>A<br/>b.</p></body>', [(1, 2, "A\nb.")]),
        ('<body><p begin="1s" end="2s">A <span tts:ruby="text">no</span>b.</p></body>', [(1, 2, "A b.")]),
        ('<body><p begin="1500ms" end="0.05m">A b.</p></body>', [(1.5, 3, "A b.")]),
        ('<body><p begin="00:00:01,500" end="00:00:03">A b.</p></body>', [(1.5, 3, "A b.")]),
        ('<body><p begin="2t" end="3t">A b.</p></body>', [(2, 3, "A b.")]),
    ],
)  # fmt: skip
def test_ttml_times_may_stand_on_any_element(body, cues):
    assert spoken(ttml(body)) == cues
    prefixed = ttml(body).replace("<", "<tt:").replace("<tt:/", "</tt:").replace("xmlns=", "xmlns:tt=")
    assert spoken(prefixed) == cues


SMPTE = 'ttp:timeBase="smpte" ttp:frameRate="30" ttp:frameRateMultiplier="1000 1001"'


@pytest.mark.parametrize(
    ("attributes", "begin", "at_s"),
    [
        ('ttp:frameRate="25"', "00:00:01:05", 1.2),
        ('ttp:frameRate="24" ttp:frameRateMultiplier="1000 1001"', "24f", 1.001),
        ('ttp:frameRate="25"', "50t", 2.0),
        ('ttp:frameRate="25" ttp:subFrameRate="2"', "00:00:01:05.1", 1.22),
        ('ttp:tickRate="10000000"', "15000000t", 1.5),
        (f'{SMPTE} ttp:dropMode="dropNTSC"', "00:10:00;00", 599.999),
        (SMPTE, "00:10:00:00", 600.6),
    ],
)  # fmt: skip
def test_ttml_counts_frames_and_ticks_as_the_document_says(attributes, begin, at_s):
    assert spoken(ttml(f'<body><p begin="{begin}" dur="1s">A b.</p></body>', attributes))[0][0] == pytest.approx(
        at_s, abs=0.001
    )


def test_time_codes_count_from_the_start_of_the_programme():
    head = "<head><metadata><documentStartOfProgramme>10:00:00:00</documentStartOfProgramme></metadata></head>"
    body = '<body><div><p begin="10:00:04:00" end="10:00:06:00">A b.</p></div></body>'
    assert spoken(ttml(body, 'ttp:timeBase="smpte" ttp:frameRate="25"', head)) == [(4, 6, "A b.")]


def test_spans_of_single_words_are_word_times():
    spans = '<span begin="0s" end="1s">Red</span> <span begin="1s">blue</span> <span begin="2s">green.</span>'
    body = f'<body><p begin="1s" end="4s">{spans}</p></body>'
    assert timed(ttml(body)) == [("Red", 1.0), ("blue", 2.0), ("green.", 3.0)]


def test_documents_one_behind_another_are_all_read():
    pieces = [ttml(f'<body><p begin="{k}s" end="{k + 1}s">A{k} b.</p></body>') for k in range(3)]
    assert spoken("".join(pieces)) == spoken("".join('<?xml version="1.0"?>\n' + piece for piece in pieces))
    assert [start_s for start_s, *_ in spoken("\n".join(pieces))] == [0, 1, 2]


# --- one bad cue ---------------------------------------------------------------------------------------------------

ENTITIES = [
    *("&#99999999999;", "&#x110000;", "&#" + "9" * 6000 + ";", "&#xD800;", "&#55296;", "&#0;", "&#1;", "&unknown;"),
    *("&", "<", "\x01", "\ud800", "\ufffe"),
]
GOOD = ["Before it.", "After it."]


def in_format(name: str, texts: list[str], times: list[str] | None = None) -> bytes:
    """Write three texts as a file of a format; `times` replaces their times as written."""
    rows = list(enumerate(texts, 1))

    def write(form: str, begin: str, separator: str = "") -> str:
        written = [(times or {}) and times[k - 1] or begin.format(k) for k, _ in rows]
        return separator.join(
            form.format(at=at, k=k, end=k + 1, text=text) for at, (k, text) in zip(written, rows, strict=True)
        )

    text = {
        "vtt": lambda: "WEBVTT\n\n" + write("{at} --> 00:0{end}.000\n{text}\n\n", "00:0{}.000"),
        "srt": lambda: write("{k}\n{at} --> 00:00:0{end},000\n{text}\n\n", "00:00:0{},000"),
        "sbv": lambda: write("{at},0:00:0{end}.000\n{text}\n\n", "0:00:0{}.000"),
        "ttml": lambda: ttml("<body>" + write('<p begin="{at}" end="{end}s">{text}</p>', "{}s") + "</body>"),
        "srv3": lambda: (
            '<timedtext format="3"><body>' + write('<p t="{at}" d="1000">{text}</p>', "{}000") + "</body></timedtext>"
        ),
        "json3": lambda: '{{"events":[{}]}}'.format(
            write('{{"tStartMs":{at},"dDurationMs":1000,"segs":[{{"utf8":"{text}"}}]}}', "{}000", ",")
        ),
        "ass": lambda: (
            "[Script Info]\n[V4+ Styles]\nStyle: x\n[Events]\n"
            + write("Dialogue: 0,{at},0:00:0{end}.00,Default,,0,0,0,,{text}\n", "0:00:0{}.00")
        ),
        "sami": lambda: "<SAMI><BODY>" + write("<SYNC Start={at}><P>{text}\n", "{}000") + "</BODY></SAMI>",
        "microdvd": lambda: write("{{{at}}}{{{end}0}}{text}\n", "{}0"),
    }[name]()
    return text.encode("utf-8", "surrogatepass").replace("\ud800".encode("utf-8", "surrogatepass"), b"")


FORMATS = sorted(set(READERS) - {"subviewer", "subviewer1"})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("entity", ENTITIES, ids=[ascii(entity)[:12] for entity in ENTITIES])
def test_an_impossible_character_costs_no_word(name, entity):
    if name == "json3" and entity == "\x01":
        entity = "\\u0001"  # JSON refuses it unescaped
    read = spoken(in_format(name, [GOOD[0], f"It {entity} is.", GOOD[1]]), fps=10)
    texts = [text for *_, text in read]
    assert [texts[0], texts[-1]] == GOOD and len(texts) == 3
    assert texts[1].startswith("It") and texts[1].endswith("is.")
    for text in texts:
        text.encode()  # no half of a surrogate pair
        assert "\0" not in text and "\ufffd" not in text


def test_surrogates_and_nul_in_json_cost_no_word():
    data = b'{"events":[{"tStartMs":1000,"dDurationMs":1000,"segs":[{"utf8":"a\\ud800b\\u0000 c"}]}]}'
    assert spoken(data) == [(1.0, 2.0, "ab c")]


BAD_TIMES = {
    "ttml": ["soon", "1:2:3:4:5", "--1s", "9" * 400 + "s"],
    "srv3": ["soon", "", "nan", "1e999"],
    "json3": ['"soon"', "null", "[1]", "1" + "0" * 5000, "NaN"],
    "ass": ["soon", "0:00", "", "0:00:00:00:00"],
    "sami": ["soon", '""', "nan"],
    "microdvd": ["soon", "9" * 400],
    "sbv": ["soon"],
}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, bads in BAD_TIMES.items() for bad in bads])
def test_a_cue_with_a_bad_time_costs_only_itself(name, bad):
    good = {"ttml": "{}s", "ass": "0:00:0{}.00", "microdvd": "{}0", "sbv": "0:00:0{}.000"}.get(name, "{}000")
    read = spoken(in_format(name, [GOOD[0], "Lost.", GOOD[1]], [good.format(1), bad, good.format(3)]), fps=10)
    assert (read[0][0], read[-1][0]) == (1.0, 3.0)
    assert read[0][2].startswith(GOOD[0]) and read[-1][2] == GOOD[1]


@pytest.mark.parametrize("bad", ["</i>", "<i>", "<p>", "a < b", "<3", "</div>", "<!-- x", "<br>"])
def test_a_broken_tag_costs_only_itself(bad):
    read = spoken(in_format("ttml", [GOOD[0], f"It is {bad}", GOOD[1]]))
    assert read[0][2] == GOOD[0] and "It is" in read[1][2]
    assert bad == "<!-- x" or read[-1][2] == GOOD[1]  # an open comment hides what follows


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_bad_cues_alone_is_refused(name):
    bad = {"vtt": None, "srt": "x", "sbv": "x", "json3": '"x"'}.get(name, "x")
    if bad is None:
        return  # a WebVTT file without cues is valid
    with pytest.raises(ItemError, match="subtitle-unreadable"):
        read_subtitles(in_format(name, ["Lost."], [bad]), fps=10)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_no_change_to_a_file_raises_anything_but_the_documented_error(name, data):
    content = bytearray(in_format(name, [GOOD[0], "It &amp; <i>that</i>.", GOOD[1]]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(at, min(len(content), at + 20)))
        content[at:end] = data.draw(
            st.binary(max_size=12)
            | st.sampled_from([b"&#99999999999;", b"<", b"{", b"9" * 500, b"\n\n", b"WEBVTT\n\n", b"<p>"])
        )
    try:
        cues = read_subtitles(bytes(content), fps=data.draw(st.none() | st.floats(allow_nan=True)))
        words = words_of(cues)[0]
    except ItemError as error:
        assert error.error_class == "subtitle-unreadable"
        return
    for cue in cues.cues:
        assert 0 <= cue.start_s < cue.end_s
        cue.text.encode()
    assert all(word.start_s <= word.end_s for word in words)


# --- other formats -------------------------------------------------------------------------------------------------


def test_srv3_has_words_with_times_and_srv2_and_srv1_have_cues():
    head = '<?xml version="1.0" encoding="utf-8" ?><timedtext format="3"><head><pen id="1"/></head><body>'
    line = '<w t="0" id="1"/><p t="1000" d="3000" w="1"><s ac="248">Red</s><s t="500" ac="9"> circles</s></p>'
    assert timed(f'{head}{line}<p t="3990" d="10" w="1" a="1">\n</p></body></timedtext>') == [
        ("Red", 1.0),
        ("circles", 1.5),
    ]
    assert spoken(head + '<p t="1000" d="3000">Hello &amp; you.<br/>Bye.</p></body></timedtext>') == [
        (1, 4, "Hello & you.\nBye.")
    ]
    assert spoken('<timedtext><window/><text t="1000" d="3000">Hello.</text></timedtext>') == [(1, 4, "Hello.")]
    assert spoken(
        '<?xml version="1.0"?><transcript><text start="1.5" dur="2.5">It&amp;#39;s so.</text></transcript>'
    ) == [(1.5, 4, "It's so.")]


def test_microdvd_takes_its_own_rate_or_else_the_video_s():
    frames = "{25}{75}Hello|{Y:i}there\n{100}{}/Open end\n"
    assert spoken(frames, fps=25.0) == [(1, 3, "Hello\nthere"), (4, 4.533, "Open end")]
    assert spoken("{1}{1}12.5\n" + frames, fps=25.0)[0] == (2, 6, "Hello\nthere")
    assert spoken("{0}{0}12,5\n" + frames)[0][0] == 2
    assert spoken("{1}{1}10 men came.\n" + frames, fps=25.0)[0][2] == "10 men came."
    for rate in (None, 0.0, float("nan"), 1e9):
        with pytest.raises(ItemError, match=r"frame numbers .* put a first line such as \{1\}\{1\}23.976"):
            read_subtitles(frames.encode(), fps=rate)


def test_sbv_subviewer_mpl2_and_tmplayer():
    assert spoken("0:00:01.000,0:00:02.500\nHello\nthere\n\n0:00:03.000,0:00:04.000\n42\n") == [
        (1, 2.5, "Hello\nthere"),
        (3, 4, "42"),
    ]
    head = "[INFORMATION]\n[TITLE]No\n[END INFORMATION]\n[SUBTITLE]\n[COLF]&HFFFFFF,[STYLE]no,[SIZE]18\n"
    assert spoken(head + "00:00:01.00,00:00:02.50\nHello[br]there\n\n00:00:03.00,00:00:04.00\nBye\n")[0] == (
        1,
        2.5,
        "Hello\nthere",
    )
    assert spoken("[BEGIN]\n[00:00:01]\nHello|there\n[00:00:03]\n\n[00:00:05]\nBye\n[00:00:06]\n[END]\n") == [
        (1, 3, "Hello\nthere"),
        (5, 6, "Bye"),
    ]
    assert spoken("[10][25]Hello|/there\n[30][40]Bye\n") == [(1, 2.5, "Hello\nthere"), (3, 4, "Bye")]
    assert [cue[0] for cue in spoken("00:00:01:Hello|there\n00:00:03:Bye\n")] == [1, 3]


def test_ass_follows_its_format_line_and_keeps_karaoke_times():
    ssa = (
        "[Script Info]\nScriptType: v4.00\n[V4 Styles]\nStyle: x,broken,,\n[Events]\nFormat: Marked, Start, End, Text\n"
    )
    assert spoken(
        ssa
        + "Dialogue: Marked=0,0:00:01.50,0:00:03.00,Hello, {\\i1}you{note}\n"
        + "Comment: Marked=0,0:00:01.50,0:00:03.00,No\n"
    ) == [(1.5, 3, "Hello, you")]
    sung = ssa + "Dialogue: Marked=0,0:00:01.00,0:00:04.00,{\\k100}Red {\\kf50}cir{\\k50}cles {\\k100\\b1}move\n"
    assert timed(sung) == [("Red", 1.0), ("circles", 2.0), ("move", 3.0)]
    drawn = ssa + "Dialogue: Marked=0,0:00:01.00,0:00:04.00,{\\p1}m 0 0 l 9 9{\\p0}Shown.\n"
    assert spoken(drawn) == [(1, 4, "Shown.")]


def test_sami_reads_one_of_its_languages():
    style = "<STYLE TYPE='text/css'><!-- .ENCC {Name: English; lang: en-US;} .KRCC {lang: ko-KR;} --></STYLE>"
    lines = "<SYNC Start=1000><P Class=ENCC>Hello there.<P Class=KRCC>안녕"
    lines += "<SYNC Start=2000><P Class=ENCC>&nbsp;<P Class=KRCC>&nbsp;<SYNC Start=3000><P Class=ENCC>Bye."
    cues = read_subtitles(f"<SAMI><HEAD>{style}</HEAD><BODY>{lines}</BODY></SAMI>".encode())
    assert [(cue.start_s, cue.text) for cue in cues.cues] == [(1, "Hello there."), (3, "Bye.")]
    assert cues.cues[0].end_s == 2 and cues.language == "en-US"
