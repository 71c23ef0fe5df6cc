"""Direct links: stream one http(s) response to a file; resume it where an earlier attempt broke off.

Input is an untrusted URL: the server may redirect anywhere, announce a wrong length, stall, send a page instead of a
video, or never stop sending. The file in `work` is `media`; `media.json` beside it holds the validators (ETag,
Last-Modified, size) of the response that it began with. The rest of the file is appended only if the response that
brings it has the same ones. Only the caller gives the file a final name.
"""

import hashlib
import http.client
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

from clipmill.base.atomic_file import write_text
from clipmill.base.errors import UserError
from pipeline.stages.download.address_guard import EgressGuard, resolve
from pipeline.stages.download.errors import DownloadError, from_http_status, from_os_error
from pipeline.stages.download.settings import DownloadSettings
from pipeline.stages.download.sniff import SNIFF_BYTES, is_text

if TYPE_CHECKING:
    import requests

MAX_REDIRECTS = 10
REDIRECTS = {300, 301, 302, 303, 307, 308}
CHUNK_BYTES = 1 << 18
MAX_RETRY_AFTER_S = 86400.0


@dataclass(frozen=True)
class HttpFile:
    """A completely downloaded response body."""

    path: Path
    num_bytes: int
    sha256: str
    final_url: str  # after redirects
    content_type: str


@dataclass(frozen=True)
class Validators:
    """Version of a file, as the headers of a response state it (RFC 9110, 8.8 and 14.4)."""

    etag: str = ""
    last_modified: str = ""
    num_bytes: int | None = None  # of the whole file

    @classmethod
    def of(cls, status: int, headers) -> "Validators":
        """Read the validators of a response of this status. `headers`: a mapping that ignores case."""
        size = _content_range(headers)[2] if status in (206, 416) else _number(headers.get("Content-Length"))
        return cls(headers.get("ETag", "").strip(), headers.get("Last-Modified", "").strip(), size)

    def prove_same_file(self, other: "Validators") -> bool:
        """Return True if both are of one version of a file: at least one of ETag and date agrees, nothing differs."""
        pairs = [(self.etag, other.etag), (self.last_modified, other.last_modified)]
        agree = any(ours and ours == theirs for ours, theirs in pairs)
        return agree and not self.contradict(other)

    def contradict(self, other: "Validators") -> bool:
        """Return True if something that both have differs."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return any(ours and theirs and ours != theirs for ours, theirs in pairs)


@dataclass(frozen=True)
class _State:
    """Identity of the file that a partial file belongs to."""

    url: str  # SHA-256 of the address
    etag: str = ""
    last_modified: str = ""
    content_type: str = ""  # of the first response: a later 416 has a content type of its own
    num_bytes: int | None = None  # of the whole file, if announced

    @property
    def if_range(self) -> str:
        """Return the value for If-Range: a strong ETag, else the date; "" if the server sends neither."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    @property
    def validators(self) -> Validators:
        return Validators(self.etag, self.last_modified, self.num_bytes)


def download_http(
    url: str, work: Path, settings: DownloadSettings, guard: EgressGuard, *, max_bytes: int, media: bool = True
) -> HttpFile:
    """Make one attempt at a URL, resuming the partial file in `work` if the server's validators match.

    `media` refuses a response as soon as it turns out to be text. Raises DownloadError of nearly every class.
    """
    part, state_path = work / "media", work / "media.json"
    try:
        state = _State(**json.loads(state_path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # absent, or damaged by a crash: start over
        state = _State("")
    address = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()  # the URL may hold a password
    have = part.stat().st_size if state.url == address and state.if_range and part.exists() else 0
    try:
        while True:
            with _Exchange(url, settings, guard) as exchange:
                response = exchange.get({"Range": f"bytes={have}-", "If-Range": state.if_range} if have else {})
                start, end = _body_range(response, have, state)
                if start is None and have:
                    have = 0  # the rest is of another file, or cannot be proven to be of this one
                    continue
                if start is None:
                    span = response.headers.get("Content-Range", "")
                    raise DownloadError("truncated", f"{url}: the server sends a part of the file only ({span})")
                if start == 0:
                    part.unlink(missing_ok=True)  # before new validators are written, which do not fit the old bytes
                    state = _state_of(address, response)
                    write_text(state_path, json.dumps(asdict(state)))
                digest, have = _save(response, part, start, _Limits(max_bytes, media, guard, url))
                if end is None or have >= end:
                    return HttpFile(part, have, digest, exchange.url, state.content_type)
                if have == start or not state.if_range:  # without validators, the next piece may be of another file
                    raise DownloadError("truncated", f"{url}: the server sent {have} of {end} bytes")
    except OSError as error:
        guard.check()
        raise from_os_error(error) from error


def _state_of(url: str, response) -> _State:
    """Return the state of a file that begins with this response."""
    found, headers = Validators.of(response.status_code, response.headers), response.headers
    # Ranges of a compressed body are not ranges of the file on disk: it cannot be resumed.
    if headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        found = Validators()
    date = found.last_modified if _is_strong_date(found.last_modified, headers.get("Date", "")) else ""
    return _State(url, found.etag, date, headers.get("Content-Type", ""), found.num_bytes)


def _is_strong_date(last_modified: str, date: str) -> bool:
    """Return True if a file may not have changed twice within its Last-Modified second (RFC 9110, 8.8.2.2)."""
    changed, sent = _http_date(last_modified), _http_date(date)
    return changed is not None and sent is not None and (sent - changed).total_seconds() >= 1


def _body_range(response, have: int, state: _State) -> tuple[int | None, int | None]:
    """Return (offset at which the body begins, size of the whole file if the response says it) in bytes.

    The offset is None if the body is neither the whole file, or its beginning, nor the rest of the partial file.
    """
    status, headers = response.status_code, response.headers
    if status not in (206, 416):
        return 0, None
    found = Validators.of(status, headers)
    if status == 416:  # it has no body: the partial file is the whole one
        announced = Validators(state.etag, state.last_modified)  # without the size, which the server corrects
        return (have if have and found.num_bytes == have and not found.contradict(announced) else None), None
    start, _end, total = _content_range(headers)
    if not have:  # a server that answers 206 without being asked for a range sends the file, unless it says otherwise
        is_part = start or headers.get("Content-Type", "").lower().startswith("multipart/byteranges")
        return (None if is_part else 0), total
    is_plain = headers.get("Content-Encoding", "identity").strip().lower() == "identity"
    is_rest = start == have and is_plain and found.prove_same_file(state.validators)
    return (have if is_rest else None), total


def _content_range(headers) -> tuple[int | None, int | None, int | None]:
    """Return (first byte, last byte, bytes of the whole file) of Content-Range, None for what it does not say."""
    value = headers.get("Content-Range", "").strip()
    match = re.fullmatch(r"bytes[ =]+(?:([0-9]{1,18})-([0-9]{1,18})|\*)\s*/\s*([0-9]{1,18}|\*)", value, re.IGNORECASE)
    numbers = match.groups() if match else (None, None, None)
    return tuple(int(number) if number and number != "*" else None for number in numbers)


class _Exchange:
    """One GET request with its redirects, all of them through the guard. Every failure becomes a DownloadError."""

    def __init__(self, url: str, settings: DownloadSettings, guard: EgressGuard):
        self.url = url
        self.settings = settings
        self.guard = guard
        self._session: requests.Session | None = None

    def __enter__(self) -> "_Exchange":
        import requests

        session = self._session = requests.Session()
        session.trust_env = False  # proxy, .netrc and certificates come from the settings, not from the environment
        session.get_redirect_target = lambda response: None  # redirects are followed here, one by one
        session.headers.update({"User-Agent": self.settings.user_agent, "Accept": "*/*", "Accept-Encoding": "identity"})
        if self.settings.cookies_file:
            session.cookies = load_cookies(self.settings.cookies_file)
        self.guard.mount(session)
        return self

    def __exit__(self, *_exc) -> None:
        self._session.close()

    def get(self, headers: dict[str, str]):
        """Return the response after redirects, with its body unread.

        Raises DownloadError unless the status is 416 or one that comes with a file: 200, 203, 206, or another of
        2xx that RFC 9110, 15 lets a client treat as 200.
        """
        for _hop in range(MAX_REDIRECTS + 1):
            response = self._send(headers)
            target = response.headers.get("Location") if response.status_code in REDIRECTS else None
            if target is None:
                break
            response.close()
            try:
                self.url = redirect_target(self.url, target)
            except ValueError as error:
                raise DownloadError("unsupported-url", f"redirected to {target!r}: {error}") from error
        else:
            raise DownloadError("redirect-loop", f"more than {MAX_REDIRECTS} redirects; the last goes to {self.url}")
        status = response.status_code
        if status in (202, 204, 205) or not (200 <= status < 300 or status == 416):
            error = from_http_status(status, response.reason or "", retry_after_s(response.headers))
            response.close()
            raise error
        return response

    def _send(self, headers: dict[str, str]):
        """Return the response to one request, without following redirects. Raises DownloadError, UserError."""
        import requests
        from urllib3.exceptions import HTTPError

        settings = self.settings
        if urlsplit(self.url).scheme.lower() not in ("http", "https"):
            raise DownloadError("unsupported-url", f"redirected to {self.url}, which is not an http(s) URL")
        if settings.proxy:
            check_behind_proxy(self.url, settings)
        try:
            with self.guard.answer_within(settings.answer_timeout_s):
                return self._session.get(
                    request_url(self.url),
                    headers=headers,
                    stream=True,
                    allow_redirects=False,
                    timeout=(settings.stall_timeout_s, settings.stall_timeout_s),
                    proxies={"http": settings.proxy, "https": settings.proxy} if settings.proxy else None,
                )
        except requests.exceptions.InvalidSchema as error:
            if "SOCKS" in str(error):
                message = f"download.proxy = {settings.proxy!r}: SOCKS needs the package PySocks; install it"
                raise UserError(message) from error
            raise DownloadError("unsupported-url", f"{self.url} cannot be requested: {error}") from error
        except requests.exceptions.InvalidHeader as error:
            raise DownloadError("connection", f"{self.url}: {error}") from error
        except ValueError as error:  # such as requests' InvalidURL and MissingSchema
            raise DownloadError("unsupported-url", f"{self.url} is not a valid URL: {error}") from error
        except (requests.RequestException, HTTPError, http.client.HTTPException) as error:
            self.guard.check()
            raise _from_network_error(self.url, error) from error


def check_behind_proxy(url: str, settings: DownloadSettings) -> None:
    """Raise DownloadError "private-address" if the host resolves to one here.

    A name that does not resolve here is allowed: the proxy may resolve it.
    """
    host = urlsplit(url).hostname
    if settings.allow_private_addresses or not host:
        return
    try:
        resolve(host, None, False, settings.refused_networks)
    except DownloadError as error:
        if error.error_class != "unknown-host":
            raise


def load_cookies(path: str):
    """Read a Netscape cookie file, as written by browser extensions and yt-dlp. Raises UserError."""
    from http.cookiejar import LoadError, MozillaCookieJar

    jar = MozillaCookieJar(path)
    try:
        jar.load(ignore_discard=True, ignore_expires=True)
    except (OSError, LoadError, UnicodeDecodeError) as error:
        message = f"download.cookies_file = {path!r} is not a readable Netscape cookie file: {error}"
        raise UserError(message) from error
    for cookie in jar:  # 0 means "until the browser closes", but http.cookiejar reads it as 1970
        cookie.expires = cookie.expires or None
    return jar


def _from_network_error(url: str, error: Exception) -> DownloadError:
    """Return the DownloadError for an exception of requests or urllib3.

    It is classified by its text, since they nest the cause several levels deep.
    """
    text = str(error)
    if "timed out" in text.lower():
        return DownloadError("stalled", f"{url}: {text}")
    if "IncompleteRead" in text:
        return DownloadError("truncated", f"{url}: {text}")
    return DownloadError("connection", f"{url}: {text}")


# --- addresses and numbers in headers -------------------------------------------------------------------------------

_STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_NOT_IN_A_URL = re.compile(r"[^\x21\x23-\x3b\x3d\x3f-\x5b\x5d\x5f\x61-\x7a\x7e]+")


def request_url(url: str) -> str:
    """Return a URL with everything escaped that a request line cannot hold, in UTF-8 as browsers do it.

    A percent sign that begins no escape becomes %25. Escapes stay, so that the URL leads where it did. The host is
    returned as it is; bytes that are not UTF-8 (surrogate escapes) become the escapes of these bytes.
    """
    match = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*", url)
    if not match:
        return url
    rest = _STRAY_PERCENT.sub("%25", url[match.end() :])
    return match[0] + _NOT_IN_A_URL.sub(lambda part: quote(part[0], safe="%", errors="surrogateescape"), rest)


def redirect_target(url: str, location: str) -> str:
    """Return the URL that a Location header leads to. Servers send letters outside ASCII as UTF-8 bytes.

    location  the header as `http.client` gives it: one character per byte
    """
    try:
        raw = location.strip().encode("latin-1")
    except UnicodeEncodeError:  # decoded by somebody else already
        return request_url(urljoin(url, location.strip()))
    return request_url(urljoin(url, raw.decode("utf-8", "surrogateescape")))


def _number(value: str | None) -> int | None:
    """Return a header's number, None if it is absent or not ASCII digits. A repeated one counts once."""
    values = {part.strip() for part in (value or "").split(",")}
    number = values.pop() if len(values) == 1 else ""
    return int(number) if re.fullmatch(r"[0-9]{1,18}", number) else None


def _http_date(value: str) -> datetime | None:
    """Return a header's date, None if it is absent or malformed. A date without a time zone is in UTC."""
    try:
        found = parsedate_to_datetime(value)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def retry_after_s(headers, now: datetime | None = None) -> float | None:
    """Return the seconds that Retry-After asks to wait, whether it is a number or a date, at most a day.

    None if it is absent, malformed, negative, zero or in the past: the caller's own pause holds then.
    """
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        seconds = float(value[:20])
    else:
        at = _http_date(value)
        seconds = (at - (now or datetime.now(UTC))).total_seconds() if at else 0.0
    return min(seconds, MAX_RETRY_AFTER_S) if seconds > 0 else None


# --- the body -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limits:
    max_bytes: int
    media: bool
    guard: EgressGuard
    url: str

    def check_size(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            message = f"{self.url} has {num_bytes} bytes or more; the limit is {self.max_bytes} (download.max_bytes)"
            raise DownloadError("too-large", message)


def _save(response, part: Path, start: int, limits: _Limits) -> tuple[str, int]:
    """Write the body to `part` from offset `start`; return (SHA-256, size in bytes) of the whole file."""
    announced, url = _announced_bytes(response), limits.url
    limits.check_size(start + (announced or 0))
    free = shutil.disk_usage(part.parent).free
    if (announced or 0) > free:
        message = f"{url} sends {announced} bytes, but {part.parent} has {free} free; free some space and build again"
        raise DownloadError("disk-full", message)
    digest, size, head = hashlib.sha256(), start, b""
    with open(part, "r+b" if start else "wb") as file:
        if start:
            file.truncate(start)
            for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
                digest.update(chunk)
        for chunk in _chunks(response, url, limits.guard) if response.status_code != 416 else ():
            if limits.media and size < SNIFF_BYTES:  # the first bytes may arrive in small pieces
                head += chunk
                if len(head) >= SNIFF_BYTES:
                    _refuse_page(head, response, url)
            size += len(chunk)
            limits.check_size(size)
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    if size == 0:
        raise DownloadError("empty-file", f"{url}: the response has no body")
    if limits.media and size < SNIFF_BYTES:
        _refuse_page(part.read_bytes(), response, url)
    return digest.hexdigest(), size


def _chunks(response, url: str, guard: EgressGuard) -> Iterator[bytes]:
    """Yield the decoded body as it arrives.

    Raises DownloadError "truncated" if it is shorter than announced.
    """
    from urllib3.exceptions import HTTPError

    announced, raw = _announced_bytes(response), response.raw
    before = raw.tell()
    try:
        while chunk := guard.least_rate.measure(lambda: raw.read1(CHUNK_BYTES, decode_content=True)):
            guard.check()
            yield chunk
    except (HTTPError, http.client.HTTPException) as error:
        guard.check()
        raise _from_network_error(url, error) from error
    guard.check()
    arrived = raw.tell() - before
    if announced is not None and arrived < announced:
        raise DownloadError("truncated", f"{url}: {arrived} of {announced} bytes received")


def _announced_bytes(response) -> int | None:
    return None if response.status_code == 416 else _number(response.headers.get("Content-Length"))


def _refuse_page(head: bytes, response, url: str) -> None:
    """Raise DownloadError "not-a-video" if the first bytes are text: a page, an error in JSON, a playlist."""
    text = is_text(head)
    if text:
        kind = response.headers.get("Content-Type", "no content type")
        message = f"{url} is {text} ({kind}), not a video: {head[:200].decode('utf-8', 'replace')!r}"
        raise DownloadError("not-a-video", message, is_page=text != "JSON")
