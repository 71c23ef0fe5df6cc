"""Videos of sites, by yt-dlp as a library: one extraction per URL gives file, subtitles and metadata.

Input is a URL and every response of the site, all untrusted; files are written to `work` under names of our own. All
requests go through the caller's `EgressGuard`: yt-dlp's HTTP handler is replaced by one that connects through the
guard, and only downloaders that use this handler are allowed, so that neither FFmpeg nor another program opens an
address by itself. FFmpeg only merges local files and may open nothing else.
"""

import io
import itertools
import json
import optparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yt_dlp
from yt_dlp.downloader import get_suitable_downloader
from yt_dlp.networking._requests import RequestsRH
from yt_dlp.networking.common import Response
from yt_dlp.networking.exceptions import HTTPError, RequestError, TransportError
from yt_dlp.utils import GeoRestrictedError, UnsupportedError

from clipmill.base.atomic_file import write_text
from clipmill.base.errors import ItemError, UserError
from clipmill.media.probe import CONTAINERS
from pipeline.stages.download.address_guard import EgressGuard
from pipeline.stages.download.errors import DownloadError, from_http_status, from_os_error
from pipeline.stages.download.http_fetch import (
    CHUNK_BYTES,
    Validators,
    check_behind_proxy,
    load_cookies,
    redirect_target,
    request_url,
    retry_after_s,
)
from pipeline.stages.download.settings import DownloadSettings
from pipeline.stages.download.ytdlp_options import check_extractor_arguments, check_names, command_line

# Downloaders that fetch through yt-dlp's request director only.
GUARDED_DOWNLOADERS = {"HttpFD", "HlsFD", "DashSegmentsFD", "IsmFD", "F4mFD"}
MAX_PAGE_BYTES = 1 << 26  # for a page, a playlist or a site's data
_FFMPEG_STEPS = "merger fixupm3u8 fixupm4a fixupstretched fixupduplicatemoov fixuptimestamp fixupduration".split()

# Pattern in yt-dlp's message (case-insensitive) → error class, first match wins.
MESSAGES: list[tuple[str, str]] = [
    (r"not a bot|rate.?limited|too many requests|HTTP Error 429|unusual traffic|session has been rate", "rate-limited"),
    (r"confirm your age|age.?restrict|age.?verif|age.?gate|inappropriate for some users", "age-restricted"),
    (r"private video|video is private|is a private|made it private|marked as private", "private"),
    (r"account associated with this video has been|no longer available|copyright claim|been taken down", "removed"),
    (r"has been (?:removed|deleted|terminated|deactivated|disabled|suspended)|has expired", "removed"),
    (r"not available (?:in|from) your (?:country|region|location|area)|geo.?(?:restrict|block)", "geo-blocked"),
    (r"your country|your region|not made this video available|(?:available|playable) only in", "geo-blocked"),
    (r"DRM protected|\bDRM\b|requires? payment|purchase|rental|premium (?:member|user)|available for premium", "paid"),
    (
        r"members.only|join this channel|registered users|log.?in|sign in|logged.in|subscri|password|passcode"
        r"|use --cookies|requires authentication|HTTP Error 401",
        "login-required",
    ),
    (
        r"live event will|premieres in|premiere will|not (?:yet )?(?:started|live)|currently live|is offline|is live",
        "live-stream",
    ),
    (r"larger than max-filesize|File is larger", "too-large"),
    (r"no space left|file too large|disk quota", "disk-full"),
    (r"certificate verify failed|SSL", "connection"),
    (r"timed out|timeout", "stalled"),
    (r"HTTP Error 404|not found|does not exist|no such video", "not-found"),
    (r"HTTP Error 410", "removed"),
    (r"HTTP Error 451", "geo-blocked"),
    (r"HTTP Error 403|forbidden", "forbidden"),
    (r"HTTP Error 5\d\d|server error|bad gateway|service unavailable", "server-error"),
    (r"content isn.t available, try again later|try again later|processing", "server-error"),
    (r"video (?:is )?unavailable|is not available|isn.t available|is unavailable|content is unreachable", "removed"),
    (r"name or service not known|getaddrinfo|failed to resolve", "unknown-host"),
    (r"did not get any data blocks|content too short|incompleteread|bytes read, \d+ more expected", "truncated"),
    (r"data blocks|downloaded file is empty", "empty-file"),
    (r"unsupported url|no suitable extractor|unsupported url scheme", "unsupported-url"),
    (r"connection|remote end closed|reset by peer|transport", "connection"),
]
_MESSAGES = [(re.compile(pattern, re.IGNORECASE), error_class) for pattern, error_class in MESSAGES]


@dataclass
class SiteVideo:
    """Files and metadata that one extraction left in the work folder."""

    path: Path
    extractor: str  # yt-dlp's key
    info: dict[str, Any]
    subtitles: list[tuple[Path, str, str]] = field(default_factory=list)  # (file, language, manual | auto)


def site_extractor(url: str) -> str | None:
    """Return the key of the site extractor whose URL pattern matches, None if none does.

    The generic extractor, which matches all URLs, does not count.
    """
    from yt_dlp.extractor import gen_extractor_classes

    for extractor in gen_extractor_classes():
        if extractor.ie_key() != "Generic" and extractor.suitable(url):
            return extractor.ie_key()
    return None


# Extractors that give no id of a site's own: the same id may be that of any page.
_NO_SITES = frozenset(("generic", "http", "file", "fsspec", "html5mediaembed", "commonmistakes"))


def site_key(extractor: str, video_id: str) -> str | None:
    """Return the name of a video at a site, the same for all its addresses; None if the extractor knows no site.

    extractor  yt-dlp's key, or what `downloads.extractor` says
    """
    return None if extractor.lower() in _NO_SITES else f"{extractor.lower()}:{video_id}"


def site_key_of(url: str) -> str | None:
    """Return the `site_key` that an address itself shows, None if it does not. Send no request."""
    from yt_dlp.extractor import get_info_extractor

    extractor = site_extractor(url) if "://" in url else None
    found = get_info_extractor(extractor).get_temp_id(url) if extractor else None
    return site_key(extractor, found) if found else None


def download_site(
    url: str,
    work: Path,
    settings: DownloadSettings,
    guard: EgressGuard,
    *,
    generic: bool = False,
    extractors: tuple = (),
    refuse: Callable[[list[str]], None] = lambda spellings: None,
) -> SiteVideo:
    """Make one attempt at the video of a page.

    generic     look for a video in a page of any site
    extractors  yt-dlp extractor instances to use in place of yt-dlp's own
    refuse      called with the names of what was found, before its files are fetched; an ItemError ends the download

    Raises DownloadError, what `refuse` raises, and UserError for settings that yt-dlp does not accept.
    """
    try:
        with _GuardedYoutubeDL(_parameters(work, settings, guard, refuse), settings, guard, work) as downloader:
            for extractor in extractors:
                downloader.add_info_extractor(extractor)
            if not extractors:
                downloader.add_default_info_extractors()
            info = downloader.extract_info(url, download=True, ie_key="Generic" if generic else None)
            downloader.parts.path.unlink(missing_ok=True)
            return _result(downloader, downloader.sanitize_info(info), url, work)
    except OSError as error:
        raise from_os_error(error) from error
    except (yt_dlp.utils.YoutubeDLError, TransportError) as error:
        guard.check()
        raise classify(error) from error
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError) as error:
        # An answer that yt-dlp takes for impossible: it guards its extractors against such errors, not its downloaders.
        guard.check()
        raise DownloadError("extractor", f"{url}: {type(error).__name__}: {str(error)[:500]}") from error


def _result(downloader: "_GuardedYoutubeDL", info: dict | None, url: str, work: Path) -> SiteVideo:
    """Collect the files that yt-dlp reports in `info`. Raises DownloadError if there is no video."""
    files = [item.get("filepath") for item in (info or {}).get("requested_downloads") or []]
    if not files or not files[0]:
        raise DownloadError("unsupported-url", f"{url}: the extractor found no video")
    requested = info.get("requested_subtitles") or {}
    subtitles = [
        (Path(entry["filepath"]), language, downloader.subtitle_kinds[language])
        for language, entry in requested.items()
        if entry.get("filepath") and Path(entry["filepath"]).stat().st_size
    ]
    return SiteVideo(Path(files[0]), info.get("extractor_key") or "Generic", info, subtitles)


# --- yt-dlp behind the guard ----------------------------------------------------------------------------------------


class _GuardedYoutubeDL(yt_dlp.YoutubeDL):
    """YoutubeDL with guarded requests and downloaders, one video per page and our choice of subtitles."""

    def __init__(self, parameters: dict, settings: DownloadSettings, guard: EgressGuard, work: Path):
        self.settings = settings
        self.guard = guard
        self.parts = _Parts(work)
        self.subtitle_kinds: dict[str, str] = {}
        super().__init__(parameters, auto_init=False)

    def build_request_director(self, handlers, preferences=None):
        """Build a director with the guarded handler alone: any other handler would bypass the guard."""
        guard, settings, parts = self.guard, self.settings, self.parts

        class GuardedRH(RequestsRH):
            def _create_instance(self, **kwargs):
                session = super()._create_instance(**kwargs)
                session.get_redirect_target = _redirect_target
                guard.mount(session)
                return session

            def _send(self, request):
                try:
                    request.url = request_url(request.url)
                    response = self._answer(request)
                    if not parts.fits(request, response):
                        response.close()
                        request = request.copy()
                        del request.headers["Range"]  # yt-dlp begins again when it gets the whole file
                        response = self._answer(request)
                    return _bounded(response, request.url, guard)
                except ItemError as error:  # the director treats any other class as a bug of the handler
                    raise RequestError(str(error), cause=error) from error

            def _answer(self, request):
                guard.check()
                if settings.proxy:
                    check_behind_proxy(request.url, settings)
                with guard.answer_within(settings.answer_timeout_s):
                    return super()._send(request)

        return super().build_request_director([GuardedRH], preferences)

    def process_ie_result(self, ie_result, download=True, extra_info=None):
        """Treat a list of one video as that video.

        Raises DownloadError for a list of several, after reading only two entries.
        """
        if ie_result.get("_type") not in ("playlist", "multi_video", "compat_list"):
            return super().process_ie_result(ie_result, download, extra_info)
        entries = [entry for entry in itertools.islice(iter(ie_result.get("entries") or ()), 2) if entry]
        address = ie_result.get("webpage_url") or ie_result.get("id")
        if not entries:
            raise DownloadError("unsupported-url", f"{address}: the page has no video")
        if len(entries) > 1:
            title = ie_result.get("title") or "a playlist"
            raise DownloadError("playlist", f"{address}: {title} has several videos; list their own URLs instead")
        origin = {key: ie_result[key] for key in ("extractor", "extractor_key", "webpage_url") if ie_result.get(key)}
        return super().process_ie_result({**origin, **entries[0]}, download, extra_info)

    def process_subtitles(self, video_id, normal_subtitles, automatic_captions):
        """Return the tracks that the settings choose, by language code, and note the kind of each."""
        chosen = choose_subtitles(normal_subtitles or {}, automatic_captions or {}, self.settings)
        self.subtitle_kinds = {language: kind for language, (kind, _) in chosen.items()}
        return {language: entry for language, (_, entry) in chosen.items()} or None

    def dl(self, name, info, subtitle=False, test=False):
        """Download one format. Raises DownloadError for a downloader that would bypass the guard."""
        if self.settings.allow_private_addresses:
            return super().dl(name, info, subtitle, test)
        downloader = get_suitable_downloader(info, self.params)
        if downloader is None or downloader.__name__ not in GUARDED_DOWNLOADERS:
            needs = "another program" if downloader is None else downloader.__name__
            raise DownloadError(
                "unsupported-url",
                f"{info.get('protocol')} needs {needs}, whose connections cannot be checked; "
                "set download.allow_private_addresses: true to allow it",
            )
        parameters = self.params
        self.params = {**parameters, "ffmpeg_location": "/nonexistent"}  # or yt-dlp falls back to FFmpeg for HLS
        try:
            return super().dl(name, info, subtitle, test)
        finally:
            self.params = parameters


def _redirect_target(response) -> str | None:
    """Return the URL that a response of `requests` redirects to, None if it does not."""
    return redirect_target(response.url, response.headers["location"]) if response.is_redirect else None


class _Parts:
    """Decide whether a response continues a partial file of yt-dlp, which itself compares nothing but offsets.

    Validators of the responses so far are kept in the work folder, by the size of the whole file: a later attempt
    extracts anew, and the same file then has another URL.
    """

    def __init__(self, work: Path):
        self.work = work
        self.path = work / "responses.json"
        self.fresh: set[int] = set()  # sizes of the files of this attempt
        try:
            self.known = {int(size): Validators(*pair) for size, pair in json.loads(self.path.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):  # absent, or damaged by a crash
            self.known = {}

    def fits(self, request, response: Response) -> bool:
        """Return False for a response to a request for the rest of a partial file that may be of another file."""
        match = re.match(r"bytes=([0-9]+)-", request.headers.get("Range", ""))
        start, found = int(match[1]) if match else 0, Validators.of(response.status, response.headers)
        resumes = start and response.status == 206 and start in self._part_sizes()
        if resumes:
            before = self.known.get(found.num_bytes)
            has_none = before is not None and not (before.etag or before.last_modified)
            same_attempt = found.num_bytes in self.fresh and has_none  # a server that never sends validators
            if before is None or not (before.prove_same_file(found) or same_attempt and not before.contradict(found)):
                return False
        elif found.num_bytes:
            self.fresh.add(found.num_bytes)
            self._remember(found.num_bytes, found)
        return True

    def _part_sizes(self) -> set[int]:
        return {path.stat().st_size for path in self.work.glob("*.part")}

    def _remember(self, size: int, found: Validators) -> None:
        pair = [found.etag, found.last_modified]
        if self.known.get(size) != Validators(*pair):
            self.known[size] = Validators(*pair)
            kept = {key: [value.etag, value.last_modified] for key, value in self.known.items()}
            write_text(self.path, json.dumps(kept))


def _bounded(response: Response, url: str, guard: EgressGuard) -> Response:
    """Limit reading a whole body at once to MAX_PAGE_BYTES: extractors read pages into memory.

    Bytes are read as they arrive, so that the guard's deadline and least rate hold within a block, too.
    """

    def arriving(amt: int | None = None) -> bytes:
        parts, num_bytes = [], 0
        limit = amt if amt is not None and amt >= 0 else None
        while limit is None or num_bytes < limit:
            step = CHUNK_BYTES if limit is None else min(CHUNK_BYTES, limit - num_bytes)
            part = guard.least_rate.measure(lambda step=step: response.fp.read1(step, decode_content=True))
            guard.check()
            if not part:
                break
            num_bytes += len(part)
            parts.append(part)
            if limit is None and num_bytes > MAX_PAGE_BYTES:
                raise DownloadError("too-large", f"{url}: the page has more than {MAX_PAGE_BYTES} bytes")
        return b"".join(parts)

    def bounded(amt: int | None = None) -> bytes:
        try:
            return arriving(amt)
        except ItemError as error:
            raise RequestError(str(error), cause=error) from error

    response._real_read = bounded
    return response


class _SilentLogger:
    """Logger that discards yt-dlp's messages.

    Its errors are raised anyway, and the rest would clutter a build's terminal.
    """

    def debug(self, message: str) -> None:
        pass

    info = warning = error = debug


def _parameters(
    work: Path, settings: DownloadSettings, guard: EgressGuard, refuse: Callable[[list[str]], None]
) -> dict:
    """Return the parameters of YoutubeDL. Raises UserError for options and cookie files that cannot be used."""
    import imageio_ffmpeg

    only_files = ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS]
    parameters: dict[str, Any] = {
        "outtmpl": {"default": str(work / "media.%(ext)s")},
        "logger": _SilentLogger(),
        "noprogress": True,
        "quiet": True,
        "noplaylist": True,
        "geo_bypass": False,  # a faked address to get around a refusal would cost a second extraction
        "format": "bv*+ba/b",
        "format_sort": [f"res:{settings.max_height}", "vcodec:h264", "acodec:aac"],
        "merge_output_format": "mp4/mkv",
        "ffmpeg_location": imageio_ffmpeg.get_ffmpeg_exe(),
        "postprocessor_args": {f"{step}+ffmpeg_i": only_files for step in _FFMPEG_STEPS},
        "writesubtitles": True,
        "writeautomaticsub": True,
        "external_downloader": {"default": "native"},
        "socket_timeout": settings.stall_timeout_s,
        "retries": settings.retries,
        "fragment_retries": settings.retries,
        "skip_unavailable_fragments": False,  # a video with a gap is a failure
        "proxy": settings.proxy or "",
        "ratelimit": settings.rate_limit_bytes_per_s,
        "progress_hooks": [_LimitHook(settings.max_bytes, guard)],
        "match_filter": partial(_check_found, refuse),
        "updatetime": False,
        "color": {"stdout": "no_color", "stderr": "no_color"},
    }
    parameters |= user_options(settings)
    if settings.cookies_file:
        load_cookies(settings.cookies_file)  # raises a UserError that names the setting
        # A copy, since yt-dlp writes cookies back and several workers must not write the user's file at once.
        parameters["cookiefile"] = io.StringIO(Path(settings.cookies_file).read_text())
    if settings.cookies_from_browser:
        parameters["cookiesfrombrowser"] = tuple(settings.cookies_from_browser.split(":"))
    return parameters


def user_options(settings: DownloadSettings) -> dict[str, Any]:
    """Parse `download.ytdlp_options` with yt-dlp's own parser; return parameters of YoutubeDL.

    Raises UserError for an option that is not allowed, see `ytdlp_options`, and for a value that yt-dlp refuses.
    """
    check_names(settings.ytdlp_options)
    arguments = list(command_line(settings.ytdlp_options))
    if not arguments:
        return {}
    given, default = _parsed(arguments), _parsed([])
    check_extractor_arguments(given["extractor_args"])
    return {key: value for key, value in given.items() if value != default.get(key)}


def _parsed(arguments: list[str]) -> dict[str, Any]:
    try:
        return yt_dlp.parse_options(["--ignore-config", *arguments]).ydl_opts
    except optparse.OptParseError as error:
        reason = str(error).strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"download.ytdlp_options: {reason}") from error


class _LimitHook:
    """Progress hook that ends a download which grows too large or takes too long."""

    def __init__(self, max_bytes: int, guard: EgressGuard):
        self.max_bytes = max_bytes
        self.guard = guard
        self.sizes: dict[str, int] = {}

    def __call__(self, progress: dict) -> None:
        self.guard.check()
        self.sizes[progress.get("filename") or ""] = progress.get("downloaded_bytes") or 0
        num_bytes = sum(self.sizes.values())
        if num_bytes > self.max_bytes:
            message = f"{num_bytes} bytes so far; the limit is {self.max_bytes} (download.max_bytes)"
            raise DownloadError("too-large", message)


def _check_found(refuse: Callable[[list[str]], None], info: dict, *, incomplete: bool = False) -> None:
    """Raise an ItemError for a video that must not be downloaded, by what its extraction found."""
    key = site_key(info.get("extractor_key") or "generic", str(info.get("id") or ""))
    addresses = [info.get(name) for name in ("webpage_url", "original_url")]
    refuse([key, *addresses] if key else addresses)
    if info.get("is_live") or info.get("live_status") in ("is_live", "is_upcoming", "post_live"):
        status = info.get("live_status") or "is_live"
        raise DownloadError("live-stream", f"{info.get('webpage_url')} is a live stream ({status}), not yet a video")


# --- subtitles ------------------------------------------------------------------------------------------------------


def choose_subtitles(
    manual: dict[str, list[dict]], automatic: dict[str, list[dict]], settings: DownloadSettings
) -> dict[str, tuple[str, dict]]:
    """Choose one track per wanted language: {site's language code: (kind, yt-dlp's entry)}.

    Kinds are tried in the settings' order. A language matches exactly or with a suffix ("en": "en-GB", "en-orig").
    """
    tracks = {"manual": manual, "auto": automatic}
    chosen: dict[str, tuple[str, dict]] = {}
    for wanted in settings.subtitle_languages:
        found = (
            (code, kind, entry)
            for kind in settings.subtitle_kinds
            for code in _codes(wanted, tracks[kind])
            if (entry := _entry(tracks[kind][code], settings.subtitle_formats))
        )
        code, kind, entry = next(found, (None, "", {}))
        if code:
            chosen.setdefault(code, (kind, entry))
    return chosen


def _codes(wanted: str, tracks: dict) -> list[str]:
    """Return the codes that match a language, the exact one first.

    Only codes of letters, digits and hyphens count, since they become part of file names.
    """
    codes = [code for code in tracks if re.fullmatch(r"[A-Za-z0-9-]{1,35}", code)]
    return sorted(
        (code for code in codes if code == wanted or code.startswith(f"{wanted}-")),
        key=lambda code: (code != wanted, not code.endswith("-orig"), code),
    )


def _entry(entries: list[dict], formats: list[str]) -> dict | None:
    """Return the last entry of the first format that is offered, as yt-dlp itself chooses."""
    for wanted in formats:
        for entry in reversed(entries):
            if entry.get("ext") == wanted:
                return entry
    return None


# --- errors ---------------------------------------------------------------------------------------------------------


def classify(error: BaseException) -> DownloadError:
    """Return the DownloadError for an exception of yt-dlp: by a known cause, else by its message."""
    chain = list(_chain(error))
    message = re.sub(r"^(?:\x1b\[[0-9;]*m)*ERROR:(?:\x1b\[[0-9;]*m)* ", "", str(error))
    for cause in chain:
        if isinstance(cause, DownloadError):
            return DownloadError(cause.error_class, cause.message, transient=cause.transient)
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ConnectionError | TimeoutError):
            known = from_os_error(cause)
            if known.error_class != "connection":
                return known
    if any(isinstance(cause, GeoRestrictedError) for cause in chain):
        return DownloadError("geo-blocked", message)
    if any(isinstance(cause, UnsupportedError) for cause in chain):
        return DownloadError("unsupported-url", message)
    from_message = next((name for pattern, name in _MESSAGES if pattern.search(message)), None)
    status = next((cause for cause in chain if isinstance(cause, HTTPError)), None)
    if status is not None and from_message in (None, "forbidden", "connection", "login-required"):
        return from_http_status(status.status, message, retry_after_s(status.response.headers))
    if from_message:
        return DownloadError(from_message, message)
    if any(isinstance(cause, TransportError) for cause in chain):
        return DownloadError("connection", message)
    return DownloadError("extractor", message)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and all its causes, whether linked by Python or by yt-dlp's own attributes."""
    seen: list[BaseException] = []
    queue = [error]
    while queue:
        item = queue.pop(0)
        if not isinstance(item, BaseException) or any(item is other for other in seen):
            continue
        seen.append(item)
        yield item
        info = getattr(item, "exc_info", None) or (None, None)
        queue += [info[1], getattr(item, "cause", None), item.__cause__, item.__context__]


# --- metadata -------------------------------------------------------------------------------------------------------

_META_KEYS = (
    "id webpage_url description tags uploader uploader_id channel_id chapters age_limit availability media_type "
    "view_count like_count format_id duration series season episode artist track"
).split()


def metadata(info: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of `downloads` that yt-dlp's info provides; `meta` is JSON text."""
    date = info.get("upload_date") or ""
    meta = {key: info[key] for key in _META_KEYS if info.get(key) not in (None, [], "")}
    return {
        "title": info.get("title"),
        "categories": info.get("categories"),
        "licence": info.get("license"),
        "channel": info.get("channel") or info.get("uploader"),
        "upload_date": f"{date[:4]}-{date[4:6]}-{date[6:8]}" if re.fullmatch(r"\d{8}", date) else None,
        "language": info.get("language"),
        "meta": json.dumps(meta, ensure_ascii=False, sort_keys=True),
    }
