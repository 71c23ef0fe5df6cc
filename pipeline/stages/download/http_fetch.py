"""Direct links: stream one http(s) response to a file; resume it where an earlier attempt broke off.

Input is an untrusted URL: the server may redirect anywhere, announce a wrong length, stall, send a page instead of a
video, or never stop sending. The file in `work` is `media`; `media.json` beside it holds the validators (ETag,
Last-Modified) that decide whether the rest of the same bytes can be requested. Only the caller gives it a final name.
"""

import hashlib
import http.client
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from clipmill.base.atomic_file import write_text
from clipmill.base.errors import UserError
from pipeline.stages.download.address_guard import EgressGuard, resolve
from pipeline.stages.download.errors import DownloadError, from_http_status, from_os_error
from pipeline.stages.download.settings import DownloadSettings
from pipeline.stages.download.sniff import SNIFF_BYTES, is_text

if TYPE_CHECKING:
    import requests

MAX_REDIRECTS = 10
CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class HttpFile:
    """A completely downloaded response body."""

    path: Path
    num_bytes: int
    sha256: str
    final_url: str  # after redirects
    content_type: str


@dataclass(frozen=True)
class _State:
    """Identity of the file that a partial file belongs to."""

    url: str  # SHA-256 of the address
    etag: str = ""
    last_modified: str = ""
    content_type: str = ""  # of the first response: a later 416 has a content type of its own

    @property
    def validator(self) -> str:
        """Return the value for If-Range: a strong ETag, else the date; "" if the server sends neither."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


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
    have = part.stat().st_size if state.url == address and state.validator and part.exists() else 0
    try:
        with _Exchange(url, settings, guard) as exchange:
            response = exchange.get({"Range": f"bytes={have}-", "If-Range": state.validator} if have else {})
            start = _start_of_body(response, have)
            if start is None:
                part.unlink(missing_ok=True)
                raise DownloadError("truncated", f"{url}: the server no longer has the rest of the file")
            if start == 0:
                part.unlink(missing_ok=True)  # before the new validators are written, which do not fit the old bytes
                headers = response.headers
                # Ranges of a compressed body are not ranges of the file on disk: it cannot be resumed.
                plain = headers.get("Content-Encoding", "identity").lower() == "identity"
                validators = [headers.get(name, "") if plain else "" for name in ("ETag", "Last-Modified")]
                state = _State(address, *validators, headers.get("Content-Type", ""))
                write_text(state_path, json.dumps(asdict(state)))
            digest, num_bytes = _save(response, part, start, _Limits(max_bytes, media, guard, url))
            return HttpFile(part, num_bytes, digest, exchange.url, state.content_type)
    except OSError as error:
        guard.check()
        raise from_os_error(error) from error


def _start_of_body(response, have: int) -> int | None:
    """Return the offset in bytes at which the body begins, None if the partial file cannot be continued."""
    if response.status_code == 416:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return have if have and total == str(have) else None
    if response.status_code != 206:
        return 0
    return have if response.headers.get("Content-Range", "").startswith(f"bytes {have}-") else None


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
        session.headers.update({"User-Agent": self.settings.user_agent, "Accept": "*/*", "Accept-Encoding": "identity"})
        if self.settings.cookies_file:
            session.cookies = load_cookies(self.settings.cookies_file)
        self.guard.mount(session)
        return self

    def __exit__(self, *_exc) -> None:
        self._session.close()

    def get(self, headers: dict[str, str]):
        """Return the response after redirects, with its body unread.

        Raises DownloadError unless the status is 200, 206 or 416.
        """
        for _hop in range(MAX_REDIRECTS + 1):
            response = self._send(headers)
            if not response.is_redirect:
                break
            self.url = urljoin(self.url, response.headers["Location"])
            response.close()
        else:
            raise DownloadError("redirect-loop", f"more than {MAX_REDIRECTS} redirects; the last goes to {self.url}")
        if response.status_code not in (200, 206, 416):
            error = from_http_status(response.status_code, response.reason or "", _retry_after_s(response))
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
            check_behind_proxy(self.url, settings.allow_private_addresses)
        try:
            return self._session.get(
                self.url,
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
        except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, UnicodeError) as error:
            raise DownloadError("unsupported-url", f"{self.url} is not a valid URL: {error}") from error
        except (requests.RequestException, HTTPError, http.client.HTTPException) as error:
            self.guard.check()
            raise _from_network_error(self.url, error) from error


def check_behind_proxy(url: str, allow_private: bool) -> None:
    """Raise DownloadError "private-address" if the host resolves to one here.

    A name that does not resolve here is allowed: the proxy may resolve it.
    """
    host = urlsplit(url).hostname
    if allow_private or not host:
        return
    try:
        resolve(host, None, False)
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


def _retry_after_s(response) -> float | None:
    """Return Retry-After in seconds, whether it is a number or a date; None if it is absent or malformed."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()) if value else None
    except (ValueError, TypeError):  # malformed, or a date without a time zone
        return None


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
        while chunk := raw.read1(CHUNK_BYTES, decode_content=True):
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
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isdigit() and response.status_code != 416 else None


def _refuse_page(head: bytes, response, url: str) -> None:
    """Raise DownloadError "not-a-video" if the first bytes are text: a page, an error in JSON, a playlist."""
    text = is_text(head)
    if text:
        kind = response.headers.get("Content-Type", "no content type")
        message = f"{url} is {text} ({kind}), not a video: {head[:200].decode('utf-8', 'replace')!r}"
        raise DownloadError("not-a-video", message, is_page=text != "JSON")
