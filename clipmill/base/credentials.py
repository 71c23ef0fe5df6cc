"""Remove credentials from text that is recorded or printed: URLs, messages, commands, metadata of sites.

What counts: userinfo (`//user:password@`), query parameters whose names say so (`token`, `X-Amz-Signature`, …), headers
such as Cookie and Authorization, values beside a name such as `password`, and any value that a `Redactor` knows.
`ItemError` strips its message, so that every row of `failures` is clean wherever it was raised.
"""

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, quote_plus, unquote

REMOVED = "REMOVED"  # in the place of a credential

_WORDS = frozenset(
    "token tokens sig signature secret password passwd passphrase pwd jwt hmac authorization bearer credential "
    "credentials cookie cookies apikey authkey accesskey secretkey privatekey authtoken accesstoken accesskeyid "
    "awsaccesskeyid googleaccessid ossaccesskeyid hdnts hdnea hdntl lsig pot otp twofactor auth sessionid".split()
)
# Names that are credentials only with a value that looks random, because they have other uses as well.
_AMBIGUOUS = frozenset("key session sid pass ticket policy code st md5 hash".split())
_WITH_KEY = frozenset("api access auth secret private subscription signing account".split())
_RANDOM = re.compile(r"(?=.*\d)[\w~%+=-]{16,}")

_USERINFO = re.compile(
    r"""([A-Za-z][A-Za-z0-9+.-]*:(?:\\?/){2})(?:[^\s/?#"'<>\\]*@|[^\s/?#:@"'<>\\]+:(?!\d{1,5}(?:[/?#\s]|$))[^\s@"'<>]*@)"""
)
_PARAMETER = re.compile(r"""([?&;#]|&amp;|\\u0026)([\w.$~-]+)=([^&;#\s"'<>\\]+)""")
_ENCODED_USERINFO = re.compile(r"""(%3A%2F%2F)(?:(?!%2F|%3F|%23)[^\s&"'<>])*?%40""", re.IGNORECASE)
_ENCODED_PARAMETER = re.compile(r"""(%3F|%26|%23)([\w.$~-]+)(%3D)((?:(?!%26|%23)[^\s&"'<>])+)""", re.IGNORECASE)
_HEADER = re.compile(
    r"""\b((?:proxy-)?authorization|(?:set-)?cookie)(["']?\s*[:=]\s*["']?)(?!\s)([^\r\n"']+)""", re.IGNORECASE
)
_SCHEME = re.compile(r"\b(bearer|basic)\s+(?=[A-Za-z._~+/=-]*\d)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_PAIR = re.compile(r"""([\w.-]+)(["']?\s*=\s*["']?|["']\s*:\s*["']?|:\s+["']?)([^\s"'&,;}\]{\[][^\s"'&,;}\]]*)""")
_SURE = re.compile(r"pass(word|wd|phrase)|pwd|secret|api_?-?key|(access|auth)_?-?token|twofactor", re.IGNORECASE)


def is_secret_name(name: str, value: str | None = None) -> bool:
    """Return whether a parameter, option or header of this name holds a credential.

    value  decides for names with other uses, such as `key`; without one these do not count
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", words) if word]
    if not _WORDS.isdisjoint(words) or "".join(words) in _WORDS:
        return True
    if "key" in words and not _WITH_KEY.isdisjoint(words):
        return True
    return (
        value is not None and not _AMBIGUOUS.isdisjoint(words) and _RANDOM.fullmatch(value.rstrip(":.,)")) is not None
    )


def strip_url_credentials(text: str) -> str:
    """Return a URL, or text with URLs in it, without userinfo and without the values of secret parameters."""
    if "=" not in text and "@" not in text and "%" not in text:
        return text
    text = _USERINFO.sub(rf"\1{REMOVED}@", text)
    text = _ENCODED_USERINFO.sub(rf"\1{REMOVED}%40", text)
    text = _PARAMETER.sub(lambda found: _parameter(found, "="), text)
    return _ENCODED_PARAMETER.sub(lambda found: _parameter(found, found[3]), text)


def _parameter(found: re.Match, equals: str) -> str:
    name, value = found[2], found[found.lastindex]
    return f"{found[1]}{name}{equals}{REMOVED}" if is_secret_name(unquote(name), value) else found[0]


def strip_credentials(text: str) -> str:
    """Return a message or a command without credentials: those of URLs, headers, and `password=…`."""
    text = strip_url_credentials(text)
    text = _HEADER.sub(rf"\1\2{REMOVED}", text)
    text = _SCHEME.sub(rf"\1 {REMOVED}", text)
    return _PAIR.sub(_pair, text)


def _pair(found: re.Match) -> str:
    name, between, value = found.groups()
    name = name.rpartition(".")[2]
    is_secret = _SURE.fullmatch(name) if between.startswith(":") else is_secret_name(name, value)
    refers = value.startswith(("$", "file:", "kept:", REMOVED))
    return f"{found[1]}{between}{REMOVED}" if is_secret and not refers else found[0]


def credentials_in_url(url: str) -> list[str]:
    """Return the credentials of one URL, as they stand there: password, user name and secret parameters."""
    found = []
    if match := _USERINFO.match(url):
        found += [part for part in match[0][len(match[1]) : -1].split(":", 1) if part]
    found += [match[3] for match in _PARAMETER.finditer(url) if is_secret_name(unquote(match[2]), match[3])]
    return [value for value in found if value != REMOVED]


class Redactor:
    """Remove known values, and whatever `strip_credentials` finds, from anything that is about to be recorded."""

    def __init__(self, values: Iterable[str]):
        """Values shorter than 6 characters are left: they occur in ordinary text."""
        spelled = {
            form for value in values for form in (value, quote(value, safe=""), quote_plus(value), unquote(value))
        }
        known = sorted((value for value in spelled if len(value) >= 6 and value != REMOVED), key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def text(self, text: str) -> str:
        """Clean a message."""
        return strip_credentials(self.exact(text))

    def exact(self, text: str) -> str:
        """Remove the known values alone."""
        return self._known.sub(REMOVED, text) if self._known else text

    def data(self, value: Any) -> Any:
        """Clean every text in plain data: known values, and the credentials of URLs."""
        if isinstance(value, str):
            return strip_url_credentials(self.exact(value))
        if isinstance(value, dict):
            return {key: self.data(each) for key, each in value.items()}
        return [self.data(each) for each in value] if isinstance(value, list) else value
