"""The download stage: a URL, path or page → the video's file, its subtitle files and its metadata."""

import contextvars
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from clipmill.base.credentials import Redactor, credentials_in_url
from clipmill.base.errors import ItemError, UserError
from clipmill.media.probe import MediaInfo, probe
from pipeline.runtime.task import HOST_LIMITER, NotNow, Outcome, Result, Stopwatch, Task, require_lock, sandbox
from pipeline.stages.download.fetch import GivenBack, fetch, new_rate_limiter
from pipeline.stages.download.host_limiter import host_of
from pipeline.stages.download.http_fetch import load_cookies
from pipeline.stages.download.settings import DownloadSettings
from pipeline.stages.stage import Stage
from shards.corpus.fragments import sync_files
from shards.corpus.source_ids import source_spellings
from shards.corpus.stage_query import chosen_rows
from shards.corpus.tombstones import FORGOTTEN, all_hashes, is_forgotten, read_tombstones
from shards.storage.mirror import files_of

# Of all units, not only those in scope, because a video may be a copy of any other video.
WANTED = """
    SELECT video_id AS item_id, unit, 1.0::DOUBLE AS cost,
           md5(concat_ws('|', $fingerprint, url, coalesce(subtitle, ''))) AS key
    FROM sources
    QUALIFY row_number() OVER (PARTITION BY video_id ORDER BY ordinal, fragment) = 1
"""

# A video with reference texts never counts as a copy, because its texts would be lost with it.
VIDEO_CONTENTS = """
    CREATE OR REPLACE TEMP TABLE video_contents AS
    SELECT v.video_id, min(s.ordinal) AS ordinal,
           if(bool_or(len(s.texts) > 0), 'video ' || v.video_id, any_value(v.sha256)) AS content,
           any_value(s.spans) AS spans
    FROM all_videos v JOIN sources s USING (video_id) GROUP BY v.video_id
"""

# Only the first of several videos with the same bytes is cut. `outside_copies`: those of other volumes.
VIDEO_COPIES = """
    CREATE OR REPLACE TEMP TABLE video_copies AS
    WITH contents AS (
        SELECT video_id, ordinal, content, spans FROM video_contents
        UNION ALL SELECT video_id, ordinal, content, spans FROM outside_copies
    ), canonical AS (
        SELECT content, arg_min(video_id, ordinal) AS video_id FROM contents GROUP BY content
    )
    SELECT k.video_id, k.ordinal, k.spans, c.video_id AS first_id FROM contents k JOIN canonical c USING (content)
"""

CURRENT_VIDEOS = """
    CREATE OR REPLACE TEMP TABLE current_videos AS
    SELECT v.*, nullif(c.first_id, v.video_id) AS duplicate_of
    FROM all_videos v JOIN video_copies c USING (video_id) SEMI JOIN scope USING (unit)
"""

# The spans that a list gives for copies of a video and not for the video, which is cut for all of them.
COPIED_SPANS = """
    CREATE OR REPLACE TEMP TABLE copied_spans AS
    WITH each AS (
        SELECT first_id, ordinal, unnest(spans, max_depth := 2), generate_subscripts(spans, 1) AS position
        FROM video_copies WHERE video_id <> first_id AND len(spans) > 0
    ), own AS (
        SELECT video_id AS first_id, unnest(spans, max_depth := 2) FROM sources
        WHERE len(spans) > 0 AND video_id IN (SELECT first_id FROM each)
    ), missing AS (
        SELECT e.* FROM each e WHERE NOT EXISTS (
            SELECT 1 FROM own o
            WHERE o.first_id = e.first_id AND o.start_s = e.start_s AND o.end_s IS NOT DISTINCT FROM e.end_s)
        QUALIFY row_number() OVER (PARTITION BY first_id, start_s, end_s ORDER BY ordinal, position) = 1
    )
    SELECT first_id AS video_id,
           list(struct_pack(n := n, start_s := start_s, end_s := end_s) ORDER BY ordinal, position) AS spans
    FROM missing GROUP BY first_id
"""

PAYLOAD = """
    SELECT w.item_id, w.key, w.attempts, w.cost, s.* EXCLUDE (item_id, key, fragment)
    FROM work w JOIN sources s ON s.video_id = w.item_id
    QUALIFY row_number() OVER (PARTITION BY w.item_id ORDER BY s.ordinal, s.fragment) = 1
    ORDER BY s.ordinal
"""


# Seconds that a source waits for a further turn of its host, before a retry, and keeps its place among the downloads.
# For a longer pause it gives its place to another source.
WAITS_IN_PLACE_S = 5.0


def host(item: dict) -> str | None:
    """Return the host whose turn a source has to wait for; None for a local file."""
    return None if item["kind"] == "file" else host_of(item["url"])


def _spellings(address: str) -> list[str]:
    try:
        return source_spellings(address) if "://" in address else []
    except ValueError:
        return []


# Columns whose text a server wrote. Paths are left as they are.
FROM_OUTSIDE = ("title", "categories", "licence", "channel", "language", "meta")


def run_download(task: Task) -> Result | NotNow:
    """Download sources in parallel. One whose host makes it wait is given back, if the driver can wait for it."""
    root = Path(task.root)
    folder = root / "sources" / task.unit
    limiter, waits = None, {}
    if any(item["kind"] != "file" for item in task.items):
        import ray

        # The driver starts the cluster's one limiter of requests per host with the first URL, for its workers.
        in_worker = ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
        limiter = ray.get_actor(HOST_LIMITER) if in_worker else new_rate_limiter(task.settings)
        if in_worker and len(task.items) == 1:
            waits = {"client": task.client, "longest_wait_s": WAITS_IN_PLACE_S}
    tombstones = read_tombstones(root)
    forgotten, hashes = set(tombstones["sha256"].to_pylist()), all_hashes(tombstones)

    def refuse(spellings: list[str | None]) -> None:
        """Raise ItemError for a name or an address of a forgotten video."""
        for spelling in filter(None, spellings):
            if hashes and is_forgotten([spelling, *_spellings(spelling)], hashes):
                raise ItemError(FORGOTTEN, "the video was forgotten with `clipmill forget`, under another address")

    call = sandbox().call  # before the threads start, so that they share one sandbox

    def download(item: dict) -> Outcome:
        redactor = Redactor(secrets_of(item, task))
        with Stopwatch(item["item_id"]) as outcome:
            row = fetch(
                item,
                folder,
                task.settings,
                corpus_root=root,
                rate_limiter=limiter,
                probe=partial(_probe, call, task.settings.probe_timeout_s),
                require_lock=partial(require_lock, task),
                refuse=refuse,
                **waits,
            )
            if row["sha256"] in forgotten:
                for path in folder.glob(f"{item['video_id']}.*"):
                    path.unlink()
                raise ItemError(
                    FORGOTTEN, "the file has the bytes of a video that was forgotten with `clipmill forget`"
                )
            copied = [str(path.relative_to(root)) for path in folder.glob(f"{item['video_id']}.*")]
            if task.fsync:
                sync_files(root, copied)
            files_of(root).upload(*copied)
            row |= redactor.data({name: row[name] for name in FROM_OUTSIDE})
            outcome.rows["downloads"] = [row]
            # An unreadable subtitle is a failure of its own; the video is kept.
            for number, problem in enumerate(json.loads(row["meta"] or "{}").get("subtitle_errors", [])):
                error = ItemError(problem["error_class"], f"{problem['subtitle']}: {problem['message']}")
                outcome.parts.append((f"{row['video_id']}.subtitle{number}", error))
        if outcome.failure:
            outcome.failure.message = redactor.text(outcome.failure.message)
        return outcome

    if len(task.items) == 1:
        try:
            return [download(task.items[0])], []
        except GivenBack as given_back:
            return NotNow(given_back.wait_s, given_back.so_far)
    with ThreadPoolExecutor(max_workers=len(task.items), thread_name_prefix="download") as pool:
        contexts = [contextvars.copy_context() for _ in task.items]
        return list(pool.map(lambda context, item: context.run(download, item), contexts, task.items)), []


def secrets_of(item: dict, task: Task) -> list[str]:
    """Return what must not be recorded of a download: the secrets of its settings, its cookies and its URLs."""
    found = [*task.secrets, *credentials_in_url(item["url"]), *credentials_in_url(item["subtitle"] or "")]
    if task.settings.cookies_file:
        with suppress(UserError):  # the download itself fails with it
            found += [cookie.value for cookie in load_cookies(task.settings.cookies_file) if cookie.value]
    return found


PROBED_BYTES_PER_S = 10_000_000  # of a slow network disk: probing reads the whole file, for its real duration


def _probe(call: Callable, base_s: float, path: Path) -> MediaInfo:
    return call(probe, path, timeout_s=base_s + path.stat().st_size / PROBED_BYTES_PER_S)


DOWNLOAD = Stage(
    "download",
    help="URL → file, subtitles, metadata",
    settings=DownloadSettings,
    item="video",
    pool="io",
    host=host,
    after=(),
    wanted=WANTED,
    current=(
        f"CREATE OR REPLACE TEMP TABLE all_videos AS {chosen_rows('download', 'downloads')}",
        VIDEO_CONTENTS,
        VIDEO_COPIES,
        CURRENT_VIDEOS,
        COPIED_SPANS,
        "DELETE FROM state_download WHERE unit NOT IN (SELECT unit FROM scope)",
    ),
    payload=PAYLOAD,
    run=run_download,
)
