"""Error classes of downloads: the meaning of each, and if a later attempt can succeed."""

import errno

from clipmill.base.errors import ItemError

# error class → (retryable, meaning)
ERROR_CLASSES: dict[str, tuple[bool, str]] = {
    "private": (False, "the owner made the video private"),
    "removed": (False, "the video or its account no longer exists (HTTP 410, taken down, terminated)"),
    "geo-blocked": (False, "not served to this country (also HTTP 451)"),
    "rate-limited": (True, "the site refuses this IP address for now (HTTP 429, bot check); its whole queue pauses"),
    "login-required": (False, "needs an account: set download.cookies_file (also HTTP 401, members-only)"),
    "age-restricted": (False, "needs an account with a verified age: set download.cookies_file"),
    "paid": (False, "must be bought or rented, or is protected by DRM"),
    "not-found": (False, "HTTP 404, or a local file or object that does not exist"),
    "forbidden": (False, "HTTP 403, or a file without read permission"),
    "http-error": (False, "another HTTP status that refuses the request"),
    "source-changed": (True, "a local file was changed while it was read"),
    "server-error": (True, 'HTTP 5xx, or an answer that means "not yet"'),
    "unknown-host": (False, "the host name does not exist (retryable if only the name server did not answer)"),
    "connection": (True, "refused, reset or broken connection, or an invalid certificate"),
    "timeout": (True, "not finished within download.timeout_s"),
    "stalled": (True, "no byte for download.stall_timeout_s, or fewer than download.min_bytes_per_s"),
    "truncated": (True, "fewer bytes than announced (retryable), or a file that ends before its own index says"),
    "too-large": (False, "more than download.max_bytes"),
    "empty-file": (False, "no bytes"),
    "not-a-video": (False, "a page, a text or another format that no demuxer accepts"),
    "no-video-stream": (False, "media without a video stream (audio only)"),
    "undecodable": (False, "no frame can be decoded"),
    "unsupported-url": (False, "a scheme or a page that cannot be downloaded"),
    "playlist": (False, "a page with several videos: list their own URLs"),
    "live-stream": (True, "live or not yet started; may be a video later"),
    "redirect-loop": (False, "too many redirects"),
    "private-address": (False, "resolves to a loopback, private, link-local or reserved address"),
    "in-use": (True, "a process of an earlier build is still downloading it"),
    "disk-full": (True, "no space left on the disk"),
    "not-writable": (True, "the corpus folder cannot be written"),
    "bad-subtitle": (False, "a listed subtitle file is not a subtitle file; noted in `meta`, the video is kept"),
    "extractor": (True, "the site's extractor failed: an update of yt-dlp may help"),
}

# Classes that are retried at once; the other retryable ones wait for a later build.
RETRIED = {"connection", "stalled", "truncated", "server-error", "unknown-host"}

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


class DownloadError(ItemError):
    """An ItemError of one of the classes above; `transient` defaults to the table's value.

    retry_after_s  seconds that the server asked to wait, None if it did not ask
    is_page        the response was a page or a playlist, in which an extractor may find a video
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
        retryable = ERROR_CLASSES[error_class][0] if transient is None else transient
        super().__init__(error_class, message, transient=retryable)
        self.retry_after_s = retry_after_s
        self.is_page = is_page


def from_os_error(error: OSError) -> DownloadError:
    """Return the DownloadError for an OSError from reading or writing files."""
    if error.errno in _NO_ROOM:
        return DownloadError("disk-full", str(error))
    if error.errno in _NOT_ALLOWED:
        return DownloadError("not-writable", str(error))
    return DownloadError("connection", f"{type(error).__name__}: {error}")


def from_http_status(status: int, reason: str, retry_after_s: float | None = None) -> DownloadError:
    """Return the DownloadError for an HTTP status that does not come with the file."""
    classes = {401: "login-required", 403: "forbidden", 404: "not-found", 408: "timeout", 410: "removed"}
    classes |= {420: "rate-limited", 429: "rate-limited", 451: "geo-blocked", 204: "empty-file", 205: "empty-file"}
    classes |= {202: "server-error", 425: "server-error"}  # not ready yet
    error_class = classes.get(status) or ("server-error" if 500 <= status < 600 else "http-error")
    return DownloadError(error_class, f"HTTP {status} {reason}".strip(), retry_after_s=retry_after_s)
