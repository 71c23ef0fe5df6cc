"""Direct links: one http(s) request streamed to a file, resumed where it broke, never taken for more than it is.

What comes in is a URL of the open internet: it may redirect anywhere, lie about its length, stall, send a page
instead of a video, or send for ever. The file under `work` is `media` with `media.json` beside it, the validators
that tell whether the rest of the same bytes can be asked for; nobody but the caller gives it a final name.
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
from pipeline.stages.download.address_guard import Gate, resolve
from pipeline.stages.download.errors import DownloadError, from_http_status, from_os_error
from pipeline.stages.download.settings import DownloadSettings
from pipeline.stages.download.sniff import SNIFF_BYTES, is_text

if TYPE_CHECKING:
    import requests

MAX_REDIRECTS = 10
CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class HttpFile:
    """A complete body on disk."""

    path: Path
    num_bytes: int
    sha256: str
    final_url: str  # after redirects
    content_type: str


@dataclass(frozen=True)
class _State:
    """What a partial file is a part of."""

    url: str
    etag: str = ""
    last_modified: str = ""
    content_type: str = ""  # of the first answer: a later one, "there is no more than you have", has its own

    @property
    def validator(self) -> str:
        """For If-Range: a strong ETag, else the date; "" where the server gives neither."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


def download_http(
    url: str, work: Path, settings: DownloadSettings, gate: Gate, *, max_bytes: int, media: bool = True
) -> HttpFile:
    """One attempt; what an earlier one left in `work` is continued where the server can prove it is the same file.

    `media`: refuse a text as soon as it shows itself to be one.
    Raises DownloadError of nearly every class. A permanent failure of the content leaves nothing in `work`.
    """
    part, state_path = work / "media", work / "media.json"
    state = _read_state(state_path)
    have = part.stat().st_size if state.url == url and state.validator and part.exists() else 0
    try:
        with _Exchange(url, settings, gate) as exchange:
            response = exchange.get(_range_headers(have, state))
            start = _start_of_body(response, have)
            if start is None:
                part.unlink(missing_ok=True)
                raise DownloadError("truncated", f"{url}: the server does not have what was left to fetch")
            if start == 0:  # in this order: new validators never stand beside old bytes
                part.unlink(missing_ok=True)
                state = _State(url, *_validators(response), response.headers.get("Content-Type", ""))
                _write_state(state_path, state)
            digest, num_bytes = _save(response, part, start, _Limits(max_bytes, media, gate, url))
            return HttpFile(part, num_bytes, digest, exchange.url, state.content_type)
    except OSError as error:
        gate.check()
        raise from_os_error(error) from error


def _range_headers(have: int, state: _State) -> dict[str, str]:
    return {"Range": f"bytes={have}-", "If-Range": state.validator} if have else {}


def _validators(response) -> tuple[str, str]:
    """(ETag, Last-Modified); neither for a compressed body, whose ranges are not those of the file on disk."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        return "", ""
    return response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")


def _start_of_body(response, have: int) -> int | None:
    """The offset that the body begins at; None when what is on disk cannot be continued."""
    if response.status_code == 416:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return have if have and total == str(have) else None
    if response.status_code != 206:
        return 0
    return have if response.headers.get("Content-Range", "").startswith(f"bytes {have}-") else None


class _Exchange:
    """One GET through all its redirects. Every hop goes through the gate; every failure becomes a DownloadError."""

    def __init__(self, url: str, settings: DownloadSettings, gate: Gate):
        self.url = url
        self.settings = settings
        self.gate = gate
        self._session: requests.Session | None = None

    def __enter__(self) -> "_Exchange":
        import requests

        session = self._session = requests.Session()
        session.trust_env = False  # no proxy, .netrc or certificate from the environment: settings say it all
        session.headers.update({"User-Agent": self.settings.user_agent, "Accept": "*/*", "Accept-Encoding": "identity"})
        if self.settings.cookies_file:
            session.cookies = load_cookies(self.settings.cookies_file)
        self.gate.mount(session)
        return self

    def __exit__(self, *_exc) -> None:
        self._session.close()

    def get(self, headers: dict[str, str]):
        """The final answer, its body not read yet. Raises DownloadError for any status but 200, 206 and 416."""
        for _hop in range(MAX_REDIRECTS + 1):
            response = self._send(headers)
            if not response.is_redirect:
                break
            self.url = urljoin(self.url, response.headers["Location"])
            response.close()
        else:
            raise DownloadError("redirect-loop", f"more than {MAX_REDIRECTS} redirects, the last to {self.url}")
        if response.status_code not in (200, 206, 416):
            error = from_http_status(response.status_code, response.reason or "", _retry_after_s(response))
            response.close()
            raise error
        return response

    def _send(self, headers: dict[str, str]):
        import requests
        from urllib3.exceptions import HTTPError

        settings = self.settings
        if urlsplit(self.url).scheme.lower() not in ("http", "https"):
            raise DownloadError("unsupported-url", f"leads to {self.url}")
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
                raise UserError(f"download.proxy = {settings.proxy!r}: SOCKS needs the package PySocks") from error
            raise DownloadError("unsupported-url", f"{self.url}: {error}") from error
        except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, UnicodeError) as error:
            raise DownloadError("unsupported-url", f"{self.url}: {error}") from error
        except (requests.RequestException, HTTPError, http.client.HTTPException) as error:
            self.gate.check()
            raise _from_network_error(self.url, error) from error


def check_behind_proxy(url: str, allow_private: bool) -> None:
    """Refuse a target that resolves here to a private address; a name that only the proxy can resolve is left to it."""
    host = urlsplit(url).hostname
    if allow_private or not host:
        return
    try:
        resolve(host, None, False)
    except DownloadError as error:
        if error.error_class != "unknown-host":
            raise


def load_cookies(path: str):
    """A Netscape cookie file as browsers' extensions and yt-dlp write it. Raises UserError."""
    from http.cookiejar import LoadError, MozillaCookieJar

    jar = MozillaCookieJar(path)
    try:
        jar.load(ignore_discard=True, ignore_expires=True)
    except (OSError, LoadError, UnicodeDecodeError) as error:
        raise UserError(f"download.cookies_file = {path!r}: not a Netscape cookie file: {error}") from error
    for cookie in jar:  # 0 stands for "until the browser closes", which http.cookiejar takes for 1970
        cookie.expires = cookie.expires or None
    return jar


def _from_network_error(url: str, error: Exception) -> DownloadError:
    """requests and urllib3 wrap the reason several levels deep; their own words tell it."""
    text = str(error)
    if "timed out" in text.lower():
        return DownloadError("stalled", f"{url}: {text}")
    if "IncompleteRead" in text:
        return DownloadError("truncated", f"{url}: {text}")
    return DownloadError("connection", f"{url}: {text}")


def _retry_after_s(response) -> float | None:
    """Retry-After in seconds, given as a number or as a date."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()) if value else None
    except (ValueError, TypeError):  # neither form, or a date without a zone: as if not given
        return None


# --- the body -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limits:
    max_bytes: int
    media: bool
    gate: Gate
    url: str

    def check_size(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            message = f"{self.url}: {num_bytes} bytes or more, at most {self.max_bytes} allowed (download.max_bytes)"
            raise DownloadError("too-large", message)


def _save(response, part: Path, start: int, limits: _Limits) -> tuple[str, int]:
    """Append the body to `part` from `start`; (sha256, size) of the whole file."""
    announced, url = _announced_bytes(response), limits.url
    limits.check_size(start + (announced or 0))
    _check_room(part.parent, announced or 0)
    digest, size, head = hashlib.sha256(), start, b""
    with open(part, "r+b" if start else "wb") as file:
        if start:
            file.truncate(start)
            for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
                digest.update(chunk)
        for chunk in _chunks(response, url, limits.gate) if response.status_code != 416 else ():
            if limits.media and size < SNIFF_BYTES:  # the first bytes may come in crumbs
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
        raise DownloadError("empty-file", f"{url}: the answer has no body")
    if limits.media and size < SNIFF_BYTES:
        _refuse_page(part.read_bytes(), response, url)
    return digest.hexdigest(), size


def _chunks(response, url: str, gate: Gate) -> Iterator[bytes]:
    """The decoded body as it arrives. Raises "truncated" where less comes over the wire than was announced."""
    from urllib3.exceptions import HTTPError

    announced, raw = _announced_bytes(response), response.raw
    before = raw.tell()
    try:
        while chunk := raw.read1(CHUNK_BYTES, decode_content=True):
            gate.check()
            yield chunk
    except (HTTPError, http.client.HTTPException) as error:
        gate.check()
        raise _from_network_error(url, error) from error
    gate.check()
    arrived = raw.tell() - before
    if announced is not None and arrived < announced:
        raise DownloadError("truncated", f"{url}: {arrived} of {announced} bytes came")


def _announced_bytes(response) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isdigit() and response.status_code != 416 else None


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise DownloadError("disk-full", f"{num_bytes} bytes to come, {free} free in {folder}")


def _refuse_page(head: bytes, response, url: str) -> None:
    """Raises "not-a-video" where the first bytes are text: a page, an error in JSON, a playlist."""
    text = is_text(head)
    if text:
        kind = response.headers.get("Content-Type", "no content type")
        message = f"{url}: {text} ({kind}) instead of media: {head[:200].decode('utf-8', 'replace')!r}"
        raise DownloadError("not-a-video", message, is_page=text != "JSON")


# --- the state of a partial file ------------------------------------------------------------------------------------


def _read_state(path: Path) -> _State:
    try:
        return _State(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # none yet, or torn by a crash: begin anew
        return _State("")


def _write_state(path: Path, state: _State) -> None:
    write_text(path, json.dumps(asdict(state)))
