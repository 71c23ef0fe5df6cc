"""Find the encoding of a subtitle file, with the help of its language, and decode it.

What the file or the user says comes first: a byte order mark, `transcribe.encoding`, an XML declaration. Then UTF-8 and
UTF-16, which are recognised with certainty. Other files are in one of the encodings that were used before Unicode;
most bytes are valid in many of them. Each candidate is decoded and judged by its letters (they must be of the
encoding's own script) and by charset-normalizer (chaos and coherence of the text). A known language leaves few
candidates and decides between the rest; without one the result has to be the only plausible one.
"""

import codecs
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from clipmill.base.errors import ItemError
from pipeline.stages.transcribe.cues import unreadable

SAMPLE_BYTES = 16_384  # lines with other bytes than ASCII, from which the encoding is guessed
FITS = 0.75  # least share of letters in the encoding's script, if the language is known
FITS_ALONE = 0.95  # the same without a language
CLEAR = 0.1  # lead in charset-normalizer's coherence by which one text beats another
MESSY = 0.2  # charset-normalizer's chaos above which a text is nonsense


@dataclass(frozen=True)
class Decoded:
    """The text of a file and how it was found."""

    text: str
    encoding: str
    guessed: bool = False
    num_broken: int = 0  # bytes that are not valid in the encoding and were left out


# --- candidates ----------------------------------------------------------------------------------------------------

# Encodings by group, and the beginnings of their letters' Unicode names. Supersets stand for the encodings that they
# contain: gb18030 for gbk and gb2312, cp932 for shift_jis, cp949 for euc_kr, cp1252 for iso8859_1.
_GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Hans": (("gb18030", "big5hkscs"), ("CJK",)),
    "Hant": (("big5hkscs", "gb18030"), ("CJK",)),
    "Jpan": (("cp932", "euc_jis_2004"), ("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA")),
    "Kore": (("cp949",), ("HANGUL", "CJK")),
    "Cyrl": (("cp1251", "koi8_u", "cp866", "iso8859_5", "mac_cyrillic"), ("CYRILLIC",)),
    "ukrainian": (("cp1251", "koi8_u", "cp1125", "iso8859_5", "mac_cyrillic"), ("CYRILLIC",)),
    "kazakh": (("kz1048", "ptcp154"), ("CYRILLIC",)),
    "Grek": (("cp1253", "iso8859_7", "cp737"), ("GREEK",)),
    "Hebr": (("cp1255", "cp862"), ("HEBREW",)),
    "Arab": (("cp1256", "iso8859_6", "cp720"), ("ARABIC",)),
    "Thai": (("cp874",), ("THAI",)),
    "western": (("cp1252", "mac_roman", "cp850"), ("LATIN",)),
    "central": (("cp1250", "iso8859_2", "cp852", "mac_latin2"), ("LATIN",)),
    "turkic": (("cp1254", "cp857", "mac_turkish"), ("LATIN",)),
    "baltic": (("cp1257", "iso8859_4", "cp775"), ("LATIN",)),
    "vietnamese": (("cp1258",), ("LATIN", "COMBINING")),
}
_LANGUAGES = {
    "central": ("pl", "cs", "sk", "hu", "sl", "hr", "bs", "ro", "sq", "sr"),
    "turkic": ("tr", "az"),
    "baltic": ("et", "lv", "lt"),
    "vietnamese": ("vi",),
    "ukrainian": ("uk",),
    "kazakh": ("kk",),
}
# Letters beyond ASCII of languages whose encodings differ in a few letters only, in lower case.
_RUSSIAN = "абвгдежзийклмнопрстуфхцчшщъыьэюяё"
_ALPHABETS = {
    **{"ru": _RUSSIAN, "bg": _RUSSIAN, "be": _RUSSIAN + "іў", "uk": _RUSSIAN + "іїєґ"},
    **{"cs": "áčďéěíňóřšťúůýž", "sk": "áäčďéíĺľňóôŕšťúýž", "pl": "ąćęłńóśźż", "hu": "áéíóöőúüű", "ro": "ăâîșțşţ"},
    **{"sl": "čšž", "hr": "čćđšž", "bs": "čćđšž", "sq": "çë", "tr": "çğıi̇öşüâîû", "az": "çəğıi̇öşü"},
    **{"et": "äõöüšž", "lv": "āčēģīķļņšūž", "lt": "ąčęėįšųūž", "de": "äöüß", "fr": "àâæçéèêëîïôœùûüÿ"},
    **{"es": "áéíñóúüª", "pt": "áâãàçéêíóôõúü", "it": "àèéìíîòóùú", "sv": "åäöé", "da": "æøåé", "no": "æøåéòô"},
    **{"nb": "æøåéòô", "fi": "äöåšž", "nl": "áéëèïíóöúü", "ca": "àçéèíïóòúü", "is": "áðéíóúýþæö"},
}
_RARE = ("ukrainian", "kazakh")  # nearly the same bytes as Cyrl: only the language tells them apart


def groups_of(language: str | None) -> list[str]:
    """Return the groups of encodings that texts of a language (a BCP 47 or ISO 639 code) come in, best first."""
    from langcodes import Language, LanguageTagError

    try:
        tag = Language.get(language or "und")
    except LanguageTagError:
        return []
    if tag.language in (None, "und", "mul", "zxx", "mis"):
        return []
    own = [group for group, languages in _LANGUAGES.items() if tag.language in languages]
    script = tag.maximize().script
    if script == "Latn":
        own = [group for group in own if "LATIN" in _GROUPS[group][1]]
    if script not in _GROUPS:  # Latin, and made-up scripts such as that of "en-orig"
        return own or ["western"]
    return [*(group for group in own if group in _RARE), script, *(group for group in own if group not in _RARE)]


# --- decoding ------------------------------------------------------------------------------------------------------


def decode(data: bytes, encoding: str = "auto", language: str | None = None) -> Decoded:
    """Decode a file. Raises ItemError "subtitle-unreadable" that names the encodings tried.

    `encoding` is a codec's name or "auto"; `language` is the code of the language that the text is probably in.
    """
    for bom, name in _BOMS:
        if data.startswith(bom):
            return _decoded(data[len(bom) :], name)
    if encoding != "auto":
        decoded = _decoded(data, encoding)
        if _is_damaged_text(decoded):
            return decoded
        raise unreadable(f"it is not in the encoding {encoding}; correct the setting transcribe.encoding")
    if name := _wide_without_bom(data):
        return _decoded(data, name, guessed=True)
    if name := _seven_bit(data, language):
        return _decoded(data, name, guessed=True)
    decoded = _decoded(data, "utf-8")
    if _is_damaged_text(decoded):
        return decoded
    declared = _declared(data)
    if declared and not (strict := _decoded(data, declared)).num_broken:
        return strict
    return _decoded(data, _guess(data, language), guessed=True)


_BOMS = (  # the UTF-32 marks begin with the UTF-16 ones, so they come first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def _decoded(data: bytes, encoding: str, guessed: bool = False) -> Decoded:
    text = data.decode(encoding, "replace")
    return Decoded(text.replace("\ufffd", ""), encoding, guessed, text.count("\ufffd"))


def _is_damaged_text(decoded: Decoded) -> bool:
    """Return whether the encoding is right: a few bad bytes among many good characters are damage."""
    return not decoded.num_broken or decoded.num_broken < sum(ch > "\x7f" for ch in decoded.text)


def _wide_without_bom(data: bytes) -> str | None:
    """Recognise UTF-16 and UTF-32 by their zero bytes: timing lines are ASCII in any language."""
    head = data[:2000]
    zeros = [head[k::4].count(0) for k in range(4)]
    if head and min(zeros[:2]) > 0.9 * len(head) / 4:
        return "utf-32-be"
    if head and min(zeros[2:]) > 0.9 * len(head) / 4:
        return "utf-32-le"
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    if max(even, odd) < len(head) / 8 or min(even, odd) > max(even, odd) / 4:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _seven_bit(data: bytes, language: str | None) -> str | None:
    """Recognise encodings that look like ASCII: ISO-2022 by its escapes, HZ by its brackets in Chinese text."""
    if re.search(rb"\x1b\$[@B]", data):
        names = ["iso2022_jp_ext", "iso2022_jp_2"]
    elif b"\x1b$)C" in data:
        names = ["iso2022_kr"]
    elif re.search(rb"~\{(?:[!-~]{2})+~\}", data) and groups_of(language)[:1] in (["Hans"], ["Hant"]):
        names = ["hz"]
    else:
        return None
    return next((name for name in names if not _decoded(data, name).num_broken), None)


_DECLARATION = re.compile(
    rb"""<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)|<meta[^>]*?charset\s*=\s*["']?([\w.:-]+)""", re.I
)


def _declared(data: bytes) -> str | None:
    """Return the codec that an XML declaration, or the META element of SAMI, names."""
    found = re.search(
        rb"""<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)|<meta[^>]*?charset\s*=\s*["']?([\w.:-]+)""", data[:2000], re.I
    )
    try:
        return codecs.lookup((found[1] or found[2]).decode()).name if found else None
    except LookupError:
        return None


# --- guessing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    encoding: str
    text: str
    fit: float  # share of the other characters than ASCII that are letters of the encoding's script
    alphabet: float  # share of these letters that the language has; 1 without a known alphabet
    chaos: float  # charset-normalizer's: 0 is ordinary text
    coherence: float  # charset-normalizer's: how usual the letters are in some language


def _guess(data: bytes, language: str | None) -> str:
    """Return the name of the encoding that fits best. Raises ItemError."""
    sample = _telling_lines(data)
    groups = groups_of(language)
    if found := _ranked(sample, groups or ["western"], FITS if groups else FITS_ALONE, _alphabet_of(language)):
        return found[0].encoding
    found = _ranked(sample, [group for group in _GROUPS if group not in _RARE], FITS_ALONE)
    found = [one for one in found if _is_east_asian(one)] or [one for one in found if one.encoding not in _MULTI_BYTE]
    best = max((one.coherence for one in found), default=0.0)
    rivals = {one.text: one.encoding for one in reversed(found) if one.coherence >= best - CLEAR}
    if len(rivals) == 1:
        return rivals.popitem()[1]
    raise _undecided(language, groups, sorted(rivals.values()))


def _undecided(language: str | None, groups: Sequence[str], rivals: Sequence[str]) -> ItemError:
    tried = dict.fromkeys(name for group in [*groups, *_GROUPS] for name in _GROUPS[group][0])
    usual = f"none that is usual for the language {language} fits, " if groups else ""
    result = f"{' and '.join(rivals)} fit equally well" if rivals else "none of them fits"
    return unreadable(
        f"its encoding cannot be told: it is not UTF-8, UTF-16 or UTF-32; tried {', '.join(tried)}; {usual}{result}; "
        "set transcribe.encoding, or give the video's language in the source list"
    )


def _telling_lines(data: bytes) -> bytes:
    """Return the lines that have other bytes than ASCII, without those bytes that every encoding shares."""
    lines, size = [], 0
    for line in re.split(rb"[\r\n]+", data):
        if not line.isascii() and size < SAMPLE_BYTES:
            lines.append(line[:SAMPLE_BYTES])
            size += len(line)
    return re.sub(rb"<[!-~ ]*?>|\{[!-~ ]*?\}", b"", b"\n".join(lines))


def _ranked(sample: bytes, groups: Sequence[str], least: float, alphabet: str = "") -> list[_Candidate]:
    """Return the candidates that fit, best first; among equals the order of the table decides."""
    found = []
    for group in groups:
        names, scripts = _GROUPS[group]
        found += [one for name in names if (one := _judged(sample, name, scripts, alphabet)) and one.fit >= least]
    return sorted(
        found, key=lambda one: (-round(one.fit, 1), -round(one.alphabet, 2), round(one.chaos, 2), -one.coherence)
    )


def _alphabet_of(language: str | None) -> str:
    from langcodes import Language, LanguageTagError

    try:
        return _ALPHABETS.get(Language.get(language or "und").language or "", "")
    except LanguageTagError:
        return ""


def _judged(sample: bytes, encoding: str, scripts: Sequence[str], alphabet: str) -> _Candidate | None:
    """Judge the sample in one encoding; None if it makes no sense in it."""
    import charset_normalizer

    text = sample.decode(encoding, "replace")
    fit = _fit(text, scripts)
    if fit < FITS:
        return None
    clean = text.replace("\ufffd", "")
    try:
        found = charset_normalizer.from_bytes(
            clean.encode(encoding), cp_isolation=[encoding], threshold=MESSY, enable_fallback=False
        )
    except UnicodeEncodeError:
        return None
    best = found.best()
    letters = [ch for ch in clean.lower() if ch > "\x7f" and ch.isalpha()]
    known = sum(ch in alphabet for ch in letters) / len(letters) if alphabet and letters else 1.0
    if best is None:  # nonsense, unless all its letters are those of the language
        return _Candidate(encoding, clean, fit, known, MESSY, 0.0) if alphabet and known == 1.0 else None
    return _Candidate(encoding, clean, fit, known, best.chaos, best.coherence)


_TYPOGRAPHIC = frozenset("’‘“”„‚–—…«»‹›¿¡°€£·•№\u00a0\n")


def _fit(text: str, scripts: Sequence[str]) -> float:
    """Return the share of the characters beyond ASCII that are letters of the scripts or usual signs.

    Texts in Latin letters have more letters inside ASCII than outside: others are another script, read wrongly.
    """
    others = [ch for ch in text if ch > "\x7f" and ch not in _TYPOGRAPHIC and not _is_east_asian_sign(ch, scripts)]
    good = sum(
        ch != "\ufffd" and ch.isprintable() and unicodedata.name(ch, "").startswith(tuple(scripts)) for ch in others
    )
    if "LATIN" in scripts and good > sum(ch.isascii() and ch.isalpha() for ch in text):
        return 0.0
    return good / len(others) if others else 1.0


def _is_east_asian_sign(ch: str, scripts: Sequence[str]) -> bool:
    return "CJK" in scripts and ("\u3000" <= ch <= "\u303f" or "\uff00" <= ch <= "\uff65")


# First bytes of the characters that everyday texts consist of (level 1 of each standard).
_MULTI_BYTE = {
    "gb18030": (0xB0, 0xD7),
    "big5hkscs": (0xA4, 0xC6),
    "cp949": (0xB0, 0xC8),
    "cp932": (),
    "euc_jis_2004": (),
}
_LEAST_CHARACTERS = 8  # fewer may be common by chance


def _is_east_asian(one: _Candidate) -> bool:
    """Return whether nearly all characters are common ones of the encoding: other bytes seldom give that by chance."""
    if one.encoding not in _MULTI_BYTE:
        return False
    letters = [ch for ch in one.text if ch > "\x7f" and not _is_east_asian_sign(ch, ("CJK",))]
    if not _MULTI_BYTE[one.encoding]:
        return sum("\u3041" <= ch <= "\u30fe" for ch in letters) >= max(3, 0.3 * len(letters))
    low, high = _MULTI_BYTE[one.encoding]
    num_common = sum(low <= ch.encode(one.encoding)[0] <= high for ch in letters)
    return num_common >= max(_LEAST_CHARACTERS, 0.9 * len(letters))
