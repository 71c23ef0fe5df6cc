"""Fetch one source: its file, its subtitle files and its metadata.

A source is a local file (used where it is), an object of a store, a direct link, or a page of a site; each of them
becomes the same kind of row of `downloads`. Every file is hostile until probed, and anything wrong with a source is one
ItemError of the classes in `errors` beside this file. During a download the files are in FOLDER/VIDEO_ID.part/, which a
later attempt continues; final names (FOLDER/VIDEO_ID.EXT, FOLDER/VIDEO_ID.LANG.EXT) appear complete, by a rename, or
not at all.
"""

import hashlib
import json
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

from clipmill.base.errors import ItemError, UserError
from clipmill.base.file_lock import lock_file
from pipeline.runtime.watchdog import GRACE_S, time_limit
from pipeline.stages.download.address_guard import Gate
from pipeline.stages.download.errors import RETRIED, DownloadError, from_os_error
from pipeline.stages.download.host_limiter import HostGovernor, hold, host_of
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
PLAYLIST_EXTENSIONS = frozenset("m3u8 mpd ism f4m".split())  # of these only an extractor makes a file
MAX_SUBTITLE_BYTES = 50_000_000
WORKER_ENDS_WITHIN_S = 120.0  # after its build; Ray takes a minute to see that a node is gone


@dataclass
class _Fetched:
    """A complete file, not yet under its final name unless `in_place`."""

    path: Path
    num_bytes: int
    sha256: str
    extractor: str
    in_place: bool = False
    subtitles: list[tuple[Path, str | None, str]] = field(default_factory=list)  # (file in work, language, kind)
    columns: dict[str, Any] = field(default_factory=dict)  # title, categories, … where the way of fetching knows them
    meta: dict[str, Any] = field(default_factory=dict)


def new_governor(settings: DownloadSettings) -> HostGovernor:
    """A HostGovernor as the settings want it."""
    return HostGovernor(settings.per_host, settings.min_interval_s, patience_s=settings.lockout_patience_s)


def fetch(
    source: dict[str, Any],
    folder: Path,
    settings: DownloadSettings,
    *,
    corpus_root: Path | None = None,
    governor=None,
    probe: Callable[[Path], Any] | None = None,
    require_right: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The row of `downloads` (its own columns) for a row of `sources`; files end up in `folder`.

    Paths in the row are relative to `corpus_root` (default: `folder`'s parent) where they lie below it. `governor` is
    a HostGovernor or a Ray actor of one. `probe` takes a path and gives a `clipmill.media.probe.MediaInfo` or raises
    ItemError. `require_right` is called before anything is written and before anything gets its final name; what it
    raises ends the download there. Raises ItemError; what a permanent failure left half-done is removed, after a
    transient one it is kept to go on from.
    """
    from clipmill.media import probe as media

    job = _Job(source, Path(folder), settings, governor or new_governor(settings))
    try:
        with job.alone(require_right):
            given = job.given_subtitles()
            fetched = job.fetch()
            fetched.subtitles[:0] = given
            info = _checked(fetched, probe or media.probe)
            require_right()
            return job.publish(fetched, info, Path(corpus_root) if corpus_root else job.folder.parent)
    except OSError as error:
        raise from_os_error(error) from error


class _Job:
    """One source on its way: where its files lie, whose turn it waits for, how much of its time is used."""

    def __init__(self, source: dict[str, Any], folder: Path, settings: DownloadSettings, governor):
        self.source = source
        self.url: str = source["url"]
        self.video_id: str = source["video_id"]
        self.folder = folder
        self.settings = settings
        self.governor = governor
        self.work = folder / f"{self.video_id}.part"
        self.lock = folder / f"{self.video_id}.part.lock"
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}:{self.video_id}"
        self.used_s = 0.0
        self.cut_off = ""  # hash of the last file that ended too early
        self.notes: list[dict[str, str]] = []  # subtitle files that could not be had

    @contextmanager
    def alone(self, require_right: Callable[[], None]) -> Iterator[None]:
        """In a folder for what is not complete, which is removed unless there is something in it to go on from.

        A killed build's worker may still be at it: two in one folder would mix their bytes. Raises DownloadError
        "in-use" if it does not end.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_file(self.lock, WORKER_ENDS_WITHIN_S, remove=True))
            except TimeoutError as error:
                raise DownloadError("in-use", str(error)) from error
            require_right()
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

        if self.source["kind"] == "file":
            return self._local()
        scheme = urlsplit(self.url).scheme.lower()
        if scheme in ("http", "https"):
            return self._web()
        if scheme in self.settings.object_store_schemes and "::" not in self.url:
            return self._attempts(self.url, lambda gate: self._object())
        raise DownloadError("unsupported-url", f"{self.url}: scheme {scheme!r} (download.object_store_schemes)")

    def _web(self) -> _Fetched:
        """A known site's page through its extractor; else the link itself; a page found there by the generic one."""
        from pipeline.stages.download.site_fetch import site_extractor

        with time_limit(GRACE_S, f"looking up {self.url}"):
            extractor = site_extractor(self.url)
        if extractor:
            return self._attempts(self.url, lambda gate: self._site(gate, generic=False))
        extension = _extension_of(self.url)
        if extension in PLAYLIST_EXTENSIONS and self.settings.generic_pages:
            return self._attempts(self.url, lambda gate: self._site(gate, generic=True))
        try:
            return self._attempts(self.url, self._direct)
        except DownloadError as error:  # a media link that answers with a page is broken, not a page with a video
            if not (error.is_page and self.settings.generic_pages) or extension in MEDIA_EXTENSIONS:
                raise
        return self._attempts(self.url, lambda gate: self._site(gate, generic=True))

    def _direct(self, gate) -> _Fetched:
        file = download_http(self.url, self.work, self.settings, gate, max_bytes=self.settings.max_bytes)
        self._ask_for_the_rest(file)
        meta = {"content_type": file.content_type} if file.content_type else {}
        meta |= {"final_url": file.final_url} if file.final_url != self.url else {}
        return _Fetched(file.path, file.num_bytes, file.sha256, "http", meta=meta)

    def _ask_for_the_rest(self, file: HttpFile) -> None:
        """A server may announce less than there is. Raises a "truncated" that heals, once for the same bytes."""
        try:
            check_whole(file.path)
        except DownloadError as error:
            if file.sha256 != self.cut_off and self.settings.retries:
                self.cut_off = file.sha256
                raise DownloadError("truncated", error.message) from error

    def _site(self, gate, *, generic: bool) -> _Fetched:
        from pipeline.stages.download.site_fetch import download_site, metadata

        video = download_site(self.url, self.work, self.settings, gate, generic=generic)
        columns = metadata(video.info)
        meta = json.loads(columns.pop("meta"))
        num_bytes, digest = hash_file(video.path)
        return _Fetched(
            video.path, num_bytes, digest, video.extractor, subtitles=video.subtitles, columns=columns, meta=meta
        )

    def _local(self) -> _Fetched:
        path = Path(self.url)
        check_regular(path, self.settings.max_bytes)
        num_bytes, digest = hash_file(path)
        if self.settings.reference_local_files:
            return _Fetched(path, num_bytes, digest, "file", in_place=True)
        copy = self.work / "media"
        shutil.copyfile(path, copy)
        return _Fetched(copy, num_bytes, digest, "file")

    def _object(self) -> _Fetched:
        """One object of a store, streamed by fsspec; what broke off begins anew."""
        copy, digest, num_bytes = self.work / "media", hashlib.sha256(), 0
        with open(copy, "wb") as file:
            for chunk in _object_chunks(self.url, self.settings.max_bytes):
                file.write(chunk)
                digest.update(chunk)
                num_bytes += len(chunk)
        return _Fetched(copy, num_bytes, digest.hexdigest(), "fsspec")

    # --- turns and tries

    def _attempts(self, url: str, attempt: Callable[[Any], Any]) -> Any:
        """Run `attempt(gate)` when the host's turn comes, again where that can heal. Raises its last DownloadError."""
        settings, num_failures, num_lockouts = self.settings, 0, 0
        while True:
            left_s = max(0.001, settings.timeout_s - self.used_s)
            with hold(self.governor, host_of(url), self.holder) as slot:
                started = time.monotonic()
                try:
                    limit = time_limit(left_s + GRACE_S, f"downloading {url}")
                    with Gate(settings.allow_private_addresses, left_s) as gate, limit:
                        return attempt(gate)
                except DownloadError as error:
                    failure = error
                finally:
                    self.used_s += time.monotonic() - started
                slot.penalty_s = self._penalty_s(failure)
            if failure.error_class == "rate-limited":
                num_lockouts += 1  # the wait is the host's cool-down, met in `hold`
                if num_lockouts > settings.lockout_retries:
                    raise failure
                continue
            num_failures += 1
            if not failure.transient or failure.error_class not in RETRIED or num_failures > settings.retries:
                raise failure
            if not slot.penalty_s:
                time.sleep(backoff_s(settings.backoff_s, num_failures, url))

    def _penalty_s(self, failure) -> float:
        """How long the host is left alone after this failure."""
        if failure.retry_after_s is not None and failure.error_class in ("rate-limited", "server-error"):
            return failure.retry_after_s
        return self.settings.cooldown_s if failure.error_class == "rate-limited" else 0.0

    # --- subtitles that the source brings along

    def given_subtitles(self) -> list[tuple[Path, str | None, str]]:
        """(file, language, kind) of side-cars and of the subtitle that the list names.

        One that is missing or none is noted; one whose server fails for now fails the whole source, to be tried again.
        """

        beside = sidecars(Path(self.url)) if self.source["kind"] == "file" and Path(self.url).exists() else []
        found = [(path, language, "sidecar") for path, language in beside]
        named = self.source.get("subtitle")
        if named and named not in {str(path) for path, _ in beside}:
            found.insert(0, (self._named_subtitle(named), self.source.get("language"), "given"))
        return [entry for entry in found if entry[0] and self._is_subtitle(entry[0])]

    def _named_subtitle(self, address: str) -> Path | None:

        if "://" not in address:
            return Path(address)
        folder = self.work / "subtitle"
        folder.mkdir(exist_ok=True)

        def attempt(gate) -> Path:
            limit = min(MAX_SUBTITLE_BYTES, self.settings.max_bytes)
            return download_http(address, folder, self.settings, gate, max_bytes=limit, media=False).path

        try:
            if urlsplit(address).scheme.lower() not in ("http", "https"):
                raise DownloadError("unsupported-url", f"subtitle {address}: only http(s) URLs and paths")
            return self._attempts(address, attempt)
        except DownloadError as error:
            if error.transient:
                raise
            self._note(address, error)
            return None

    def _is_subtitle(self, path: Path) -> bool:
        try:
            check_regular(path, MAX_SUBTITLE_BYTES)
            subtitle_format(path)
        except ItemError as error:
            if error.error_class == "bad-subtitle" and not path.is_relative_to(self.work):
                error = DownloadError("bad-subtitle", "it is no subtitle file")  # of which nothing is quoted
            self._note(str(path), error)
            return False
        return True

    def _note(self, address: str, error: ItemError) -> None:
        self.notes.append({"subtitle": address, "error_class": error.error_class, "message": error.message})

    # --- final names

    def publish(self, fetched: _Fetched, info: Any, root: Path) -> dict[str, Any]:
        """Rename what was fetched into place and give the row."""
        names = {self.work.name, self.lock.name}
        final = fetched.path
        if not fetched.in_place:
            final = self.folder / f"{self.video_id}.{container_extension(fetched.path, info.container)}"
            os.replace(fetched.path, final)
        names.add(final.name)
        subtitles = []
        for path, language, kind in fetched.subtitles:
            entry = self._publish_subtitle(path, language, kind, names)
            names.add(Path(entry["path"]).name)
            subtitles.append({**entry, "path": _relative(Path(entry["path"]), root)})
        for stale in self.folder.glob(f"{self.video_id}.*"):  # of an earlier download that another container replaced
            if stale.name not in names:
                stale.unlink()
        meta = fetched.meta | ({"subtitle_errors": self.notes} if self.notes else {})
        return {
            "video_id": self.video_id,
            "path": _relative(final, root),
            "num_bytes": fetched.num_bytes,
            "sha256": fetched.sha256,
            **info.as_row(),
            "subtitles": subtitles,
            **{key: fetched.columns.get(key) for key in _SITE_COLUMNS},
            "extractor": fetched.extractor,
            "meta": json.dumps(meta, ensure_ascii=False, sort_keys=True) if meta else None,
        }

    def _publish_subtitle(self, path: Path, language: str | None, kind: str, taken: set[str]) -> dict[str, Any]:
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
    """Pause before the next try: doubled each time up to a minute, times 0.5-1.5 by the URL and the count."""
    jitter = 0.5 + random.Random(f"{num_failures}:{url}").random()
    return min(60.0, first_s * 2 ** (num_failures - 1)) * jitter


def _extension_of(url: str) -> str:
    return os.path.splitext(urlsplit(url).path)[1].lstrip(".").lower()


def _relative(path: Path, root: Path) -> str:
    path = Path(os.path.abspath(path))
    root = Path(os.path.abspath(root))
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _object_chunks(url: str, max_bytes: int):
    """The bytes of an object. Whatever the store's library raises becomes a DownloadError."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error} (install clipmill[s3] or clipmill[gcs])") from error
    num_bytes = 0
    try:
        with filesystem.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise DownloadError("too-large", f"{url}: more than download.max_bytes = {max_bytes}")
                yield chunk
    except DownloadError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DownloadError("not-found", f"{url}: {error}") from error
    except PermissionError as error:
        raise DownloadError("forbidden", f"{url}: {error}") from error
    except GeneratorExit:
        raise
    except Exception as error:  # every store has its own library with its own exceptions
        raise DownloadError("connection", f"{url}: {type(error).__name__}: {error}") from error
    if num_bytes == 0:
        raise DownloadError("empty-file", f"{url}: the object has no bytes")


def _checked(fetched: _Fetched, probe: Callable[[Path], Any]) -> Any:
    """The probe's MediaInfo of a file that is media and complete. Raises ItemError.

    What came is quoted, a file that was here already is not: a list may name any file of this machine.
    """
    path = fetched.path
    with open(path, "rb") as file:
        head = file.read(SNIFF_BYTES)
    text = is_text(head)
    if text:
        quoted = "" if fetched.extractor == "file" else f": {head[:200].decode('utf-8', 'replace')!r}"
        raise DownloadError("not-a-video", f"{path.name} is {text}{quoted}")
    check_whole(path)
    return probe(path)
