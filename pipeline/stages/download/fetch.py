"""Download one source: its video file, its subtitle files and its metadata, as a row of `downloads`.

A source is a local file (used in place), an object in a store, a direct link, or a page of a site. All input is
untrusted until probed: a fault of one source is one ItemError of the classes in `pipeline.stages.download.errors`.
During a download its files are in FOLDER/VIDEO_ID.part/, where a later attempt resumes; final names
(FOLDER/VIDEO_ID.EXT, FOLDER/VIDEO_ID.LANG.EXT) appear complete, by a rename, or not at all.
"""

import hashlib
import json
import math
import os
import random
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clipmill.base.credentials import REMOVED, strip_credentials, strip_url_credentials
from clipmill.base.errors import ItemError, UserError
from clipmill.base.file_lock import lock_file
from pipeline.runtime.source_file import CHANGED, file_stamp
from pipeline.runtime.task import Postponed
from pipeline.runtime.watchdog import GRACE_S, time_limit
from pipeline.stages.download.address_guard import EgressGuard, LeastRate
from pipeline.stages.download.errors import RETRIED, DownloadError, from_os_error
from pipeline.stages.download.host_limiter import HostBusy, HostRateLimiter, Slot, hold, host_of
from pipeline.stages.download.http_fetch import CHUNK_BYTES, HttpFile, download_http
from pipeline.stages.download.settings import DownloadSettings
from pipeline.stages.download.sniff import (
    SNIFF_BYTES,
    check_regular,
    check_whole,
    container_extension,
    hash_file,
    is_text,
    subtitle_format,
)
from pipeline.stages.ingest.sidecars import sidecars

MEDIA_EXTENSIONS = frozenset(
    "mp4 m4v mov mkv webm avi flv f4v wmv asf ts m2ts mts mpg mpeg vob ogv ogg 3gp 3g2 mxf ivf gif".split()
)
PLAYLIST_EXTENSIONS = frozenset("m3u8 mpd ism f4m".split())  # only an extractor can turn these into a file
MAX_SUBTITLE_BYTES = 50_000_000
WORKER_ENDS_WITHIN_S = 120.0  # after its build was killed: Ray notices a failed node within a minute


@dataclass
class _Fetched:
    """A complete file; not yet under its final name unless `in_place`."""

    path: Path
    num_bytes: int
    sha256: str
    extractor: str
    in_place: bool = False
    stamp: str = ""  # of a file in place, before it was hashed
    subtitles: list[tuple[Path, str | None, str]] = field(default_factory=list)  # (file in work, language, kind)
    columns: dict[str, Any] = field(default_factory=dict)  # title, categories, … if the source has them
    meta: dict[str, Any] = field(default_factory=dict)


class GivenBack(Postponed):
    """A source whose host's turn does not come soon; what it has so far stays for the next attempt.

    wait_s  seconds after which to try again
    so_far  its counts: used_s, and by way of downloading [failures, lockouts]
    """

    def __init__(self, wait_s: float, so_far: dict[str, Any]):
        super().__init__(f"try again after {wait_s:.1f} s")
        self.wait_s, self.so_far = wait_s, so_far


def new_rate_limiter(settings: DownloadSettings) -> HostRateLimiter:
    """Create a HostRateLimiter with the limits of the settings."""
    return HostRateLimiter(settings.per_host, settings.min_interval_s, patience_s=settings.lockout_patience_s)


def new_guard(settings: DownloadSettings, timeout_s: float) -> EgressGuard:
    """Create the EgressGuard of one attempt, with the limits of the settings."""
    least_rate = LeastRate(settings.min_bytes_per_s, settings.rate_window_s)
    return EgressGuard(settings.allow_private_addresses, timeout_s, least_rate, settings.refused_networks)


def fetch(
    source: dict[str, Any],
    folder: Path,
    settings: DownloadSettings,
    *,
    corpus_root: Path | None = None,
    rate_limiter=None,
    probe: Callable[[Path], Any] | None = None,
    require_lock: Callable[[], None] = lambda: None,
    refuse: Callable[[list[str]], None] = lambda spellings: None,
    client: str | None = None,
    longest_wait_s: float = math.inf,
) -> dict[str, Any]:
    """Download a source (a row of `sources`) into `folder`; return its row of `downloads`.

    corpus_root   paths below it are relative to it in the row; default: the parent of `folder`
    rate_limiter  a HostRateLimiter or a Ray actor of one; default: a new one for this call
    probe         returns a `clipmill.media.probe.MediaInfo` for a path or raises ItemError
    require_lock  called before the first write and before files get their final names; an exception ends the download
    refuse        called with addresses and names of the source as they become known; an ItemError ends the download
    client        name under which the host's turn is asked for; default: one of this thread
    longest_wait_s  seconds to wait for a turn at once

    Raises ItemError, and GivenBack if a turn does not come in time; `source["so_far"]` continues its counts. After a
    permanent failure partial files are removed, after a transient one they stay, so that the next attempt resumes.
    """
    from clipmill.media import probe as media

    job = _Job(source, Path(folder), settings, rate_limiter or new_rate_limiter(settings))
    job.client, job.longest_wait_s, job.refuse = client or job.client, longest_wait_s, refuse
    try:
        with job.exclusive(require_lock):
            given = job.given_subtitles()
            fetched = job.fetch()
            fetched.subtitles[:0] = given
            info = _checked(fetched, probe or media.probe)
            require_lock()
            return job.publish(fetched, info, Path(corpus_root) if corpus_root else job.folder.parent)
    except OSError as error:
        raise from_os_error(error) from error


class _Job:
    """Download of one source: its paths, its id in the host's queue, the time it has used."""

    def __init__(self, source: dict[str, Any], folder: Path, settings: DownloadSettings, rate_limiter):
        self.source = source
        self.url: str = source["url"]
        self.video_id: str = source["video_id"]
        self.folder = folder
        self.settings = settings
        self.rate_limiter = rate_limiter
        self.work = folder / f"{self.video_id}.part"
        self.lock = folder / f"{self.video_id}.part.lock"
        self.client = f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}:{self.video_id}"
        self.longest_wait_s = math.inf
        self.refuse: Callable[[list[str]], None] = lambda spellings: None
        self.so_far: dict[str, Any] = {"used_s": 0.0} | (source.get("so_far") or {})
        self.truncated_sha256 = ""  # of the last file that ended too early
        self.notes: list[dict[str, str]] = []  # subtitle files that could not be read

    @contextmanager
    def exclusive(self, require_lock: Callable[[], None]) -> Iterator[None]:
        """Lock and create the folder for partial files; remove it at the end unless an attempt can resume.

        A worker of a killed build may still write to it, and two writers would mix their bytes. Raises DownloadError
        "in-use" if that worker does not end.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_file(self.lock, WORKER_ENDS_WITHIN_S, remove=True))
            except TimeoutError as error:
                raise DownloadError("in-use", str(error)) from error
            require_lock()
            self.work.mkdir(exist_ok=True)
            try:
                yield
            except ItemError as error:
                if not error.transient or not any(self.work.iterdir()):
                    shutil.rmtree(self.work)
                raise
            shutil.rmtree(self.work)

    # --- the video

    def fetch(self) -> _Fetched:
        """Get the video's file by the way that fits the source. Raises DownloadError."""
        if self.source["kind"] == "file":
            return self._local()
        if REMOVED in self.url and strip_url_credentials(self.url) == self.url and "://" in self.url:
            raise DownloadError(
                "login-required",
                f"{self.url}: its password or signature is kept only by the user and machine that listed it; "
                "give the list again to `clipmill build`",
            )
        scheme = urlsplit(self.url).scheme.lower()
        if scheme in ("http", "https"):
            return self._web()
        if scheme in self.settings.object_store_schemes and "::" not in self.url:
            return self._attempts("object", self.url, lambda guard: self._object())
        allowed = ", ".join(["http", "https", *self.settings.object_store_schemes])
        message = f"{self.url}: scheme {scheme!r} is not one of {allowed} (download.object_store_schemes)"
        raise DownloadError("unsupported-url", message)

    def _web(self) -> _Fetched:
        """Download through the site's extractor if yt-dlp has one, else directly.

        A page that a direct download meets goes to the generic extractor.
        """
        from pipeline.stages.download.site_fetch import site_extractor, site_key_of

        with time_limit(GRACE_S, f"looking up {strip_credentials(self.url)}"):
            extractor = site_extractor(self.url)
            key = site_key_of(self.url) if extractor else None
        self.refuse([self.url, key] if key else [self.url])
        if extractor:
            return self._attempts("site", self.url, lambda guard: self._site(guard, generic=False))
        extension = os.path.splitext(urlsplit(self.url).path)[1].lstrip(".").lower()
        if extension in PLAYLIST_EXTENSIONS and self.settings.generic_pages:
            return self._attempts("page", self.url, lambda guard: self._site(guard, generic=True))
        try:
            return self._attempts("link", self.url, self._link)
        except DownloadError as error:  # a media link that returns a page is broken, not a page with a video
            if not (error.is_page and self.settings.generic_pages) or extension in MEDIA_EXTENSIONS:
                raise
        return self._attempts("page", self.url, lambda guard: self._site(guard, generic=True))

    def _link(self, guard) -> _Fetched:
        """Download a direct link."""
        file = download_http(self.url, self.work, self.settings, guard, max_bytes=self.settings.max_bytes)
        self._retry_if_truncated(file)
        meta = {"content_type": file.content_type} if file.content_type else {}
        if file.final_url != self.url:
            self.refuse([file.final_url])
            meta["final_url"] = file.final_url
        return _Fetched(file.path, file.num_bytes, file.sha256, "http", meta=meta)

    def _retry_if_truncated(self, file: HttpFile) -> None:
        """Raise a retryable "truncated" the first time that a file is incomplete: a server may announce too few bytes.

        The same bytes pass a second time, and become a permanent failure later, in `_checked`.
        """
        try:
            check_whole(file.path)
        except DownloadError as error:
            if file.sha256 != self.truncated_sha256 and self.settings.retries:
                self.truncated_sha256 = file.sha256
                raise DownloadError("truncated", error.message) from error

    def _site(self, guard, *, generic: bool) -> _Fetched:
        from pipeline.stages.download.site_fetch import download_site, metadata

        video = download_site(self.url, self.work, self.settings, guard, generic=generic, refuse=self.refuse)
        columns = metadata(video.info)
        meta = json.loads(columns.pop("meta"))
        num_bytes, digest = hash_file(video.path)
        return _Fetched(
            video.path, num_bytes, digest, video.extractor, subtitles=video.subtitles, columns=columns, meta=meta
        )

    def _local(self) -> _Fetched:
        path = Path(self.url)
        check_regular(path, self.settings.max_bytes)
        if self.settings.reference_local_files:
            stamp = file_stamp(path)
            num_bytes, digest = hash_file(path)
            return _Fetched(path, num_bytes, digest, "file", in_place=True, stamp=stamp)
        copy = self.work / "media"
        shutil.copyfile(path, copy)
        num_bytes, digest = hash_file(copy)  # not of the file, which may change
        return _Fetched(copy, num_bytes, digest, "file")

    def _object(self) -> _Fetched:
        """Stream one object of a store through fsspec; a broken download starts over."""
        copy, digest, num_bytes = self.work / "media", hashlib.sha256(), 0
        with open(copy, "wb") as file:
            for chunk in _object_chunks(self.url, self.settings.max_bytes):
                file.write(chunk)
                digest.update(chunk)
                num_bytes += len(chunk)
        return _Fetched(copy, num_bytes, digest.hexdigest(), "fsspec")

    # --- rate limit and retries

    def _attempts(self, way: str, url: str, attempt: Callable[[Any], Any]) -> Any:
        """Call `attempt(guard)` under the host's rate limit, with retries, which are counted for each way.

        Raises the DownloadError of the last attempt.
        """
        settings, so_far = self.settings, self.so_far
        counts = so_far.setdefault(way, {"failures": 0, "lockouts": 0})
        while True:
            left_s = max(0.001, settings.timeout_s - so_far["used_s"])
            with self._turn(url) as slot:
                started = time.monotonic()
                try:
                    limit = time_limit(left_s + GRACE_S, f"downloading {strip_credentials(url)}")
                    with new_guard(settings, left_s) as guard, limit:
                        return attempt(guard)
                except DownloadError as error:
                    failure = error
                finally:
                    so_far["used_s"] += time.monotonic() - started
                if failure.retry_after_s is not None and failure.error_class in ("rate-limited", "server-error"):
                    slot.penalty_s = failure.retry_after_s
                elif failure.error_class == "rate-limited":
                    slot.penalty_s = settings.cooldown_s
            if failure.error_class == "rate-limited":
                counts["lockouts"] += 1  # the next turn comes after the host's cool-down
                if counts["lockouts"] > settings.lockout_retries:
                    raise failure
                continue
            counts["failures"] += 1
            if not failure.transient or failure.error_class not in RETRIED or counts["failures"] > settings.retries:
                raise failure
            if not slot.penalty_s:
                time.sleep(backoff_s(settings.backoff_s, counts["failures"], url))

    @contextmanager
    def _turn(self, url: str) -> Iterator[Slot]:
        """Wait for the turn of this URL's host. Raises GivenBack if it does not come in time."""
        with ExitStack() as stack:
            try:
                slot = stack.enter_context(hold(self.rate_limiter, host_of(url), self.client, self.longest_wait_s))
            except HostBusy as busy:
                raise GivenBack(busy.wait_s, self.so_far) from busy
            yield slot

    # --- subtitles that come with the source

    def given_subtitles(self) -> list[tuple[Path, str | None, str]]:
        """Return (file, language, kind) of the subtitle named in the list and of files beside a local video.

        A missing or invalid file is noted. A transient failure of its server fails the whole source, which is retried.
        """
        beside = sidecars(Path(self.url)) if self.source["kind"] == "file" and Path(self.url).exists() else []
        found = [(path, language, "sidecar") for path, language in beside]
        named = self.source.get("subtitle")
        if named and named not in {str(path) for path, _ in beside}:
            found.insert(0, (self._named_subtitle(named), self.source.get("language"), "given"))
        return [entry for entry in found if entry[0] and self._is_subtitle(entry[0])]

    def _named_subtitle(self, address: str) -> Path | None:
        """Return the local file of the subtitle that the list names, None if it cannot be downloaded."""
        if "://" not in address:
            return Path(address)
        folder = self.work / "subtitle"
        folder.mkdir(exist_ok=True)

        def attempt(guard) -> Path:
            limit = min(MAX_SUBTITLE_BYTES, self.settings.max_bytes)
            return download_http(address, folder, self.settings, guard, max_bytes=limit, media=False).path

        try:
            if urlsplit(address).scheme.lower() not in ("http", "https"):
                raise DownloadError("unsupported-url", f"subtitle {address} is neither an http(s) URL nor a path")
            return self._attempts("subtitle", address, attempt)
        except DownloadError as error:
            if error.transient:
                raise
            self._note(address, error)
            return None

    def _is_subtitle(self, path: Path) -> bool:
        """Return True for a readable subtitle file; note the problem otherwise."""
        try:
            check_regular(path, MAX_SUBTITLE_BYTES)
            subtitle_format(path)
        except ItemError as error:
            if error.error_class == "bad-subtitle" and not path.is_relative_to(self.work):
                # Nothing of it is quoted: a list may name any file of this machine.
                error = DownloadError("bad-subtitle", "not a subtitle file")
            self._note(str(path), error)
            return False
        return True

    def _note(self, address: str, error: ItemError) -> None:
        self.notes.append({"subtitle": address, "error_class": error.error_class, "message": error.message})

    # --- final names

    def publish(self, fetched: _Fetched, info: Any, root: Path) -> dict[str, Any]:
        """Rename the fetched files to their final names and return the row of `downloads`."""
        names = {self.work.name, self.lock.name}
        final = fetched.path
        if not fetched.in_place:
            final = self.folder / f"{self.video_id}.{container_extension(fetched.path, info.container)}"
            os.replace(fetched.path, final)
        stamp = file_stamp(final)
        if fetched.in_place and stamp != fetched.stamp:
            raise DownloadError(CHANGED, f"{final.name} was changed while it was read")
        names.add(final.name)
        subtitles = []
        for path, language, kind in fetched.subtitles:
            entry = self._publish_subtitle(path, language, kind, names)
            names.add(Path(entry["path"]).name)
            subtitles.append({**entry, "path": _relative(Path(entry["path"]), root)})
        for stale in self.folder.glob(f"{self.video_id}.*"):  # left by an earlier download in another container
            if stale.name not in names:
                stale.unlink()
        meta = fetched.meta | ({"subtitle_errors": self.notes} if self.notes else {})
        return {
            "video_id": self.video_id,
            "path": _relative(final, root),
            "num_bytes": fetched.num_bytes,
            "sha256": fetched.sha256,
            "file_stamp": stamp,
            **info.as_row(),
            "subtitles": subtitles,
            **{key: fetched.columns.get(key) for key in _SITE_COLUMNS},
            "extractor": fetched.extractor,
            "meta": json.dumps(meta, ensure_ascii=False, sort_keys=True) if meta else None,
        }

    def _publish_subtitle(self, path: Path, language: str | None, kind: str, taken: set[str]) -> dict[str, Any]:
        """Give a downloaded subtitle file a final name not in `taken`; return its entry in `downloads`.

        A local file stays in place.
        """
        form = subtitle_format(path)
        _size, digest = hash_file(path)
        if path.is_relative_to(self.work):
            tag = re.sub(r"[^A-Za-z0-9-]", "", language or "") or kind
            name = f"{self.video_id}.{tag}.{form}"
            name = name if name not in taken else f"{self.video_id}.{tag}-{kind}.{form}"
            final = self.folder / name
            os.replace(path, final)
        else:
            final = path.absolute()
        return {"path": str(final), "language": language, "kind": kind, "format": form, "sha256": digest}


_SITE_COLUMNS = ("title", "categories", "licence", "channel", "upload_date", "language")


def backoff_s(first_s: float, num_failures: int, url: str) -> float:
    """Return the pause in seconds before the next try.

    It doubles with every failure, up to a minute, times a jitter of 0.5-1.5 that follows from URL and count.
    """
    jitter = 0.5 + random.Random(f"{num_failures}:{url}").random()
    return min(60.0, first_s * 2 ** (num_failures - 1)) * jitter


def _relative(path: Path, root: Path) -> str:
    path = Path(os.path.abspath(path))
    root = Path(os.path.abspath(root))
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _object_chunks(url: str, max_bytes: int):
    """Yield the bytes of an object in chunks. Any failure of the store's library becomes a DownloadError."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be opened: {error}. Install clipmill[s3] or clipmill[gcs]") from error
    num_bytes = 0
    try:
        with filesystem.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise DownloadError("too-large", f"{url} has more than download.max_bytes = {max_bytes} bytes")
                yield chunk
    except DownloadError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DownloadError("not-found", f"{url}: {error}") from error
    except PermissionError as error:
        raise DownloadError("forbidden", f"{url}: {error}") from error
    except GeneratorExit:
        raise
    except Exception as error:  # each store's library has its own exceptions
        raise DownloadError("connection", f"{url}: {type(error).__name__}: {error}") from error
    if num_bytes == 0:
        raise DownloadError("empty-file", f"{url}: the object is empty")


def _checked(fetched: _Fetched, probe: Callable[[Path], Any]) -> Any:
    """Probe a file that is media and complete; return its MediaInfo. Raises ItemError.

    Messages quote downloaded bytes, but never a local file: a list may name any file of this machine.
    """
    path = fetched.path
    with open(path, "rb") as file:
        head = file.read(SNIFF_BYTES)
    text = is_text(head)
    if text:
        quoted = "" if fetched.extractor == "file" else f": {head[:200].decode('utf-8', 'replace')!r}"
        raise DownloadError("not-a-video", f"{path.name} is {text}, not a video{quoted}")
    check_whole(path)
    return probe(path)
