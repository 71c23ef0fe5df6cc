"""Identity of a source: the canonical form of its URL and the `video_id` made from it.

Two lines of a list are the same source when their canonical URLs are equal. An id occurs in file names, tar members and
SQL, so it always matches [A-Za-z0-9_-]{1,64}. Every rule exists for one string and for Arrow arrays: those handle the
ordinary cases in a vectorised pass and apply the rule for one string to unusual URLs only.
"""

import hashlib
import posixpath
import re
from pathlib import PurePath
from urllib.parse import SplitResult, parse_qsl, quote, unquote, unquote_to_bytes, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.compute as pc

ID_PATTERN = r"[A-Za-z0-9_-]{1,64}"
SCHEME_PATTERN = r"[A-Za-z][A-Za-z0-9+.-]*://"

# Valid in Python's re and in RE2. NOT_YOUTUBE_IDS are words of eleven letters in the place of an id.
YOUTUBE_PATTERN = (
    r"(?i:https?://(?:(?:www|m|music|gaming)\.)?(?:youtube(?:-nocookie)?\.com/"
    r"(?:watch/?\?(?:[^#]*?&)?v=|watch/|shorts/|embed/|live/|v/|e/)|youtu\.be/))"
    r"(?P<id>[A-Za-z0-9_-]{11})(?:[?&/#].*)?"
)
NOT_YOUTUBE_IDS = ("videoseries", "live_stream")

# A URL of this shape without tracking parameters is its own canonical form; ports of 4 or 5 digits are never defaults.
_PLAIN_PATTERN = r"^https?://[a-z0-9_-]+(?:\.[a-z0-9_-]+)*(?::[1-5]?[1-9][0-9]{3})?/[^?#\s]*(?:\?[^#\s]+)?$"
_TRACKING = r"(?:utm_[^=&]*|fbclid|gclid|igshid|mc_cid|mc_eid)"
_TRACKING_PATTERN = rf"[?&]{_TRACKING}(?:=|&|$)"
_DEFAULT_PORTS = {"http": 80, "https": 443}

_YOUTUBE = re.compile(YOUTUBE_PATTERN)
_ID = re.compile(ID_PATTERN)
_SCHEME = re.compile(SCHEME_PATTERN)
_TRACKING_NAME = re.compile(_TRACKING)
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_-]+")


def youtube_id(url: str) -> str | None:
    """Return the eleven characters of a YouTube id from any usual form of the URL, else None."""
    match = _YOUTUBE.fullmatch(url)
    return match["id"] if match and match["id"] not in NOT_YOUTUBE_IDS else None


def canonical_url(url: str) -> str:
    """Return the one spelling of an address, by which duplicates are found. A local path is returned unchanged.

    Scheme and host in lower case, no default port, no fragment (but "#!" and "#/" routes, which are part of the
    address), no utm_* and click-id parameters, order of the others kept; all YouTube forms become the watch URL.
    Raises ValueError for an invalid URL (a broken IPv6 literal, a port that is not a number, no host).
    """
    if not _SCHEME.match(url):
        return url
    youtube = youtube_id(url)
    if youtube:
        return f"https://www.youtube.com/watch?v={youtube}"
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    if not parts.netloc:
        raise ValueError(f"no host in {url!r}")
    fragment = parts.fragment if parts.fragment.startswith(("!", "/")) else ""
    if scheme not in _DEFAULT_PORTS:  # buckets and paths of object stores are case-sensitive
        return urlunsplit((scheme, parts.netloc, parts.path, parts.query, fragment))
    query = "&".join(part for part in parts.query.split("&") if not _TRACKING_NAME.fullmatch(part.partition("=")[0]))
    return urlunsplit((scheme, _canonical_netloc(parts, scheme), parts.path or "/", query, fragment))


def _canonical_netloc(parts, scheme: str) -> str:
    host = (parts.hostname or "").rstrip(".")
    if not host:
        raise ValueError(f"no host in {parts.geturl()!r}")
    host = f"[{host}]" if ":" in host else host
    userinfo = parts.netloc.rpartition("@")[0]
    port = parts.port
    shown_port = "" if port in (None, _DEFAULT_PORTS[scheme]) else f":{port}"
    return f"{userinfo}@{host}{shown_port}" if userinfo else f"{host}{shown_port}"


# --- the same source in any spelling -------------------------------------------------------------------------------

_YOUTUBE_HOST = re.compile(r"(?:.+\.)?(?:youtube|youtube-nocookie|youtubekids)\.com|youtube\.googleapis\.com")
_YOUTUBE_SHORT = {"youtu.be", "www.youtu.be", "yt.be", "y2u.be"}
_YOUTUBE_PATHS = {"shorts", "embed", "live", "v", "vi", "e", "watch"}
_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_VIMEO_HOST = re.compile(r"(?:.+\.)?(?:vimeo|vimeopro)\.com")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def source_spellings(url: str) -> list[str]:
    """Return strings of which two URLs of one source share at least one: by them a forgotten source is recognised.

    They are the canonical URL, also with the other of http and https, and `normal_url`. Raises ValueError for an
    invalid URL.
    """
    canonical, normal = canonical_url(url), normal_url(url)
    schemes = re.subn(r"^https?:", "", canonical)
    both = [f"http:{schemes[0]}", f"https:{schemes[0]}"] if schemes[1] else []
    return list(dict.fromkeys([canonical, *both, normal]))


def normal_url(url: str) -> str:
    """Return a URL in the normal form of RFC 3986, 6.2.2 and 6.2.3, with https for http and one URL for each video.

    It sees more spellings as one than `canonical_url`, from which ids are made and which therefore never changes: host
    names in Unicode, needless or lower-case escapes, dots in paths, user names. Videos of YouTube and Vimeo have one
    URL, whichever page or player shows them. A local path is returned unchanged. Raises ValueError as `canonical_url`.
    """
    if not _SCHEME.match(url):
        return url
    parts = urlsplit(canonical_url(url))
    if parts.scheme not in _DEFAULT_PORTS:
        return urlunsplit(parts)
    host, port = _normal_host(parts.hostname or ""), f":{parts.port}" if parts.port else ""
    path, query, fragment = (_normal_escapes(part) for part in parts[2:])
    segments = [unquote(part) for part in path.split("/") if part]
    if found := _youtube_video(host, segments, parts) or _vimeo_video(host, segments, query):
        return found
    folder = posixpath.normpath(re.sub("^/+", "/", path))
    path = folder + ("/" if path.endswith(("/", "/.", "/..")) and folder != "/" else "")
    return urlunsplit(("https", host + port, path, query, fragment))


def _normal_host(host: str) -> str:
    host = unquote(host).lower().rstrip(".")
    if ":" in host:
        return f"[{host}]"
    try:
        return host.encode("idna").decode()
    except UnicodeError:  # a label that is empty or too long: compared as it is
        return host


def _normal_escapes(text: str) -> str:
    """Decode the escapes of characters that need none; escape all that needs it, in capitals (RFC 3986, 6.2.2)."""

    def escape(match: re.Match[str]) -> str:
        byte = unquote_to_bytes(match[0])
        return byte.decode() if byte[0] in _UNRESERVED else match[0].upper()

    text = quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", text), safe="%!$&'()*+,/:;=?@[]~", errors="surrogatepass")
    return re.sub(r"%[0-9A-Fa-f]{2}", escape, text)


def _youtube_video(host: str, segments: list[str], parts: SplitResult) -> str | None:
    """Return the watch URL of a YouTube video on any of the site's pages and players, else None."""
    if host in _YOUTUBE_SHORT:
        found = segments[:1]
    elif _YOUTUBE_HOST.fullmatch(host):
        if parts.fragment:  # "#/watch?v=" and "#!v=" are paths of the site's old pages
            old = urlsplit(f"//{host}/{parts.fragment.lstrip('!/')}".replace("/v=", "/watch?v=", 1))
            return _youtube_video(host, [part for part in old.path.split("/") if part], old)
        named = [value for name, value in parse_qsl(parts.query) if name.lower() in ("v", "vi")]
        nested = [value for name, value in parse_qsl(parts.query) if name in ("u", "url", "q") and "watch" in value]
        if nested and not named:
            inner = urlsplit(nested[0] if "://" in nested[0] else f"https://{host}{nested[0]}")
            return _youtube_video(inner.hostname or "", inner.path.strip("/").split("/"), inner)
        found = segments[1:2] if len(segments) > 1 and segments[0].lower() in _YOUTUBE_PATHS else named
    else:
        return None
    match = _YOUTUBE_ID.match(found[0]) if found else None
    known = match and match[0] not in NOT_YOUTUBE_IDS
    return f"https://www.youtube.com/watch?v={match[0]}" if known else None


def _vimeo_video(host: str, segments: list[str], query: str) -> str | None:
    """Return the page of a Vimeo video on any of the site's pages and players, else None."""
    if not _VIMEO_HOST.fullmatch(host):
        return None
    numbers = [part for part in segments if re.fullmatch(r"[0-9]+", part)]
    named = [value for name, value in parse_qsl(query) if name == "clip_id"]
    after = [part for word, part in zip(segments, segments[1:], strict=False) if word in ("video", "videos")]
    if segments and segments[0] in numbers:
        numbers = numbers[:1]
    found = next((part for part in [*after, *numbers[-1:], *named] if re.fullmatch(r"[0-9]+", part)), None)
    return f"https://vimeo.com/{int(found)}" if found else None


def video_id_for(url: str, given_id: str | None = None) -> str:
    """Return the id of a source: the given one if safe in a path, else YouTube's, else a hash of the canonical URL.

    A hash id is "v" and 20 hex digits; a local file's is its name (safe characters) and 10 hex digits of its path.
    """
    if given_id and _ID.fullmatch(given_id):
        return given_id
    return youtube_id(url) or _hash_id(canonical_url(url))


def _hash_id(canonical: str) -> str:
    digits = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
    if _SCHEME.match(canonical):
        return "v" + digits[:20]
    name = _NOT_IN_A_NAME.sub("_", PurePath(canonical).stem).strip("_-")[:40]
    return f"{name}-{digits[:10]}" if name else "v" + digits[:20]


def canonical_urls(urls: pa.Array) -> pa.Array:
    """Apply `canonical_url` to every element; null for an invalid URL and for null."""
    youtube = _youtube_ids(urls)
    plain = pc.and_not(
        pc.match_substring_regex(urls, _PLAIN_PATTERN), pc.match_substring_regex(urls, _TRACKING_PATTERN)
    )
    watch = pc.binary_join_element_wise("https://www.youtube.com/watch?v=", youtube, "")
    known = pc.coalesce(watch, pc.if_else(plain, urls, pa.scalar(None, pa.string())))
    return _fill(known, urls, _canonical_or_none)


def video_ids(canonical: pa.Array, given: pa.Array) -> pa.Array:
    """Apply `video_id_for` to every (canonical URL, given id); no canonical URL may be null."""
    safe = pc.match_substring_regex(pc.fill_null(given, ""), f"^{ID_PATTERN}$")
    known = pc.coalesce(pc.if_else(safe, given, pa.scalar(None, pa.string())), _youtube_ids(canonical))
    return _fill(known, canonical, _hash_id)


def _youtube_ids(urls: pa.Array) -> pa.Array:
    ids = pc.struct_field(pc.extract_regex(urls, f"^{YOUTUBE_PATTERN}$"), "id")
    words = pc.is_in(ids, value_set=pa.array(NOT_YOUTUBE_IDS))
    return pc.if_else(words, pa.scalar(None, pa.string()), ids)


def _canonical_or_none(url: str | None) -> str | None:
    try:
        return url and canonical_url(url)
    except ValueError:  # the caller reports every null with its line
        return None


def _fill(known: pa.Array, values: pa.Array, rule) -> pa.Array:
    """Replace the nulls of `known` by rule(value)."""
    unknown = pc.is_null(known)
    filled = [rule(value) for value in values.filter(unknown).to_pylist()]
    return pc.replace_with_mask(known, unknown, pa.array(filled, pa.string()))
