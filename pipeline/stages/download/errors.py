"""Why a download fails: the error classes, what each means, and which of them trying again can heal."""

import errno

from clipmill.base.errors import ItemError

# error class → (heals by itself, what it means)
ERROR_CLASSES: dict[str, tuple[bool, str]] = {
    "private": (False, "the owner made the video private"),
    "removed": (False, "the video or its account is gone (HTTP 410, taken down, terminated)"),
    "geo-blocked": (False, "not served to this country (also HTTP 451)"),
    "rate-limited": (True, "the site refuses this address for now (HTTP 429, bot check); its whole queue pauses"),
    "login-required": (False, "needs an account: set download.cookies_file (also HTTP 401, members-only)"),
    "age-restricted": (False, "needs an account of proven age: set download.cookies_file"),
    "paid": (False, "must be bought or rented, or is protected by DRM"),
    "not-found": (False, "HTTP 404, or a local file or object that is not there"),
    "forbidden": (False, "HTTP 403, or a file that may not be read"),
    "http-error": (False, "another HTTP status that says no"),
    "server-error": (True, "HTTP 5xx"),
    "unknown-host": (False, "the name does not exist (healable where only the name server did not answer)"),
    "connection": (True, "refused, reset or broken connection, or one whose certificate is not valid"),
    "timeout": (True, "not done within download.timeout_s"),
    "stalled": (True, "no byte for download.stall_timeout_s"),
    "truncated": (True, "fewer bytes than announced (healable), or a file that ends before its own index says"),
    "too-large": (False, "more than download.max_bytes"),
    "empty-file": (False, "no bytes"),
    "not-a-video": (False, "a page, a text or something else that no demuxer takes"),
    "no-video-stream": (False, "media without a picture (audio only)"),
    "undecodable": (False, "not one frame decodes"),
    "unsupported-url": (False, "a scheme or a page that nothing here can fetch"),
    "playlist": (False, "a page with several videos: list their own URLs"),
    "live-stream": (True, "live now or not yet; may be a video later"),
    "redirect-loop": (False, "too many redirects"),
    "private-address": (False, "leads to a loopback, private, link-local or reserved address"),
    "in-use": (True, "a process of a build before is still downloading it"),
    "disk-full": (True, "no room to write"),
    "not-writable": (True, "the corpus folder cannot be written"),
    "bad-subtitle": (False, "a named subtitle file is none; noted in `meta`, the video is kept"),
    "extractor": (True, "the site's extractor failed: an update of yt-dlp may heal it"),
}

# Classes worth another try at once; the other healable ones wait for a later build.
RETRIED = {"connection", "stalled", "truncated", "server-error", "unknown-host"}

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


class DownloadError(ItemError):
    """An ItemError of one of the classes above; `transient` is the table's unless said otherwise.

    retry_after_s  what the server asked to wait, if it did
    is_page        the answer was a page or a playlist, in which an extractor may find a video
    """

    def __init__(
        self,
        error_class: str,
        message: str,
        *,
        transient: bool | None = None,
        retry_after_s: float | None = None,
        is_page: bool = False,
    ):
        heals = ERROR_CLASSES[error_class][0] if transient is None else transient
        super().__init__(error_class, message, transient=heals)
        self.retry_after_s = retry_after_s
        self.is_page = is_page


def from_os_error(error: OSError) -> DownloadError:
    """The failure behind an OSError of writing or reading files."""
    if error.errno in _NO_ROOM:
        return DownloadError("disk-full", str(error))
    if error.errno in _NOT_ALLOWED:
        return DownloadError("not-writable", str(error))
    return DownloadError("connection", f"{type(error).__name__}: {error}")


def from_http_status(status: int, reason: str, retry_after_s: float | None = None) -> DownloadError:
    """The failure behind an HTTP status of 300 and above."""
    classes = {401: "login-required", 403: "forbidden", 404: "not-found", 408: "timeout", 410: "removed"}
    classes |= {429: "rate-limited", 451: "geo-blocked"}
    error_class = classes.get(status) or ("server-error" if status >= 500 else "http-error")
    return DownloadError(error_class, f"HTTP {status} {reason}".strip(), retry_after_s=retry_after_s)
