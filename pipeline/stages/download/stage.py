"""The download stage: a URL, path or page → the video's file, its subtitle files and its metadata."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from clipmill.base.errors import ItemError
from clipmill.media.probe import MediaInfo, probe
from pipeline.runtime.task import HOST_LIMITER, Outcome, Result, Stopwatch, Task, require_lock, sandbox
from pipeline.stages.download.fetch import fetch, new_rate_limiter
from pipeline.stages.download.settings import DownloadSettings
from pipeline.stages.stage import Stage
from shards.corpus.stage_query import chosen_rows
from shards.corpus.tombstones import FORGOTTEN, read_tombstones
from shards.storage.mirror import files_of

# Of all units, not only those in scope, because a video may be a copy of any other video.
WANTED = """
    SELECT video_id AS item_id, unit, 1.0::DOUBLE AS cost,
           md5(concat_ws('|', $fingerprint, url, coalesce(subtitle, ''))) AS key
    FROM sources
    QUALIFY row_number() OVER (PARTITION BY video_id ORDER BY ordinal, fragment) = 1
"""

CURRENT_VIDEOS = """
    -- Only the first of several videos with the same bytes is cut. A video with reference texts never counts as a
    -- copy, because its texts would be lost with it.
    CREATE OR REPLACE TEMP TABLE current_videos AS
    WITH contents AS (
        SELECT v.video_id, min(s.ordinal) AS ordinal,
               if(bool_or(len(s.texts) > 0), 'video ' || v.video_id, any_value(v.sha256)) AS content
        FROM all_videos v JOIN sources s USING (video_id) GROUP BY v.video_id
    ), canonical AS (
        SELECT content, arg_min(video_id, ordinal) AS video_id FROM contents GROUP BY content
    )
    SELECT v.*, nullif(c.video_id, v.video_id) AS duplicate_of
    FROM all_videos v JOIN contents k USING (video_id) JOIN canonical c USING (content) SEMI JOIN scope USING (unit)
"""

PAYLOAD = """
    SELECT w.item_id, w.key, w.attempts, w.cost, s.* EXCLUDE (item_id, key, fragment)
    FROM work w JOIN sources s ON s.video_id = w.item_id
    QUALIFY row_number() OVER (PARTITION BY w.item_id ORDER BY s.ordinal, s.fragment) = 1
    ORDER BY s.ordinal
"""


def run_download(task: Task) -> Result:
    """Download the unit's sources in parallel: they wait for the network, and each host has its own limit."""
    root = Path(task.root)
    folder = root / "sources" / task.unit
    limiter = None
    if any(item["kind"] != "file" for item in task.items):
        import ray

        # The driver starts the cluster's one limiter of requests per host with the first URL.
        limiter = ray.get_actor(HOST_LIMITER) if ray.is_initialized() else new_rate_limiter(task.settings)
    forgotten = set(read_tombstones(root)["sha256"].to_pylist())

    call = sandbox().call  # before the threads start, so that they share one sandbox

    def download(item: dict) -> Outcome:
        with Stopwatch(item["item_id"]) as outcome:
            row = fetch(
                item,
                folder,
                task.settings,
                corpus_root=root,
                rate_limiter=limiter,
                probe=partial(_probe, call, task.settings.probe_timeout_s),
                require_lock=partial(require_lock, task),
            )
            if row["sha256"] in forgotten:
                for path in folder.glob(f"{item['video_id']}.*"):
                    path.unlink()
                raise ItemError(
                    FORGOTTEN, "the file has the bytes of a video that was forgotten with `clipmill forget`"
                )
            if not os.path.isabs(row["path"]):
                files_of(root).upload(*(str(p.relative_to(root)) for p in folder.glob(f"{item['video_id']}.*")))
            outcome.rows["downloads"] = [row]
            # An unreadable subtitle is a failure of its own; the video is kept.
            for number, problem in enumerate(json.loads(row["meta"] or "{}").get("subtitle_errors", [])):
                error = ItemError(problem["error_class"], f"{problem['subtitle']}: {problem['message']}")
                outcome.parts.append((f"{row['video_id']}.subtitle{number}", error))
        return outcome

    with ThreadPoolExecutor(max_workers=len(task.items), thread_name_prefix="download") as pool:
        return list(pool.map(download, task.items)), []


PROBED_BYTES_PER_S = 10_000_000  # of a slow network disk: probing reads the whole file, for its real duration


def _probe(call: Callable, base_s: float, path: Path) -> MediaInfo:
    return call(probe, path, timeout_s=base_s + path.stat().st_size / PROBED_BYTES_PER_S)


DOWNLOAD = Stage(
    "download",
    help="URL → file, subtitles, metadata",
    settings=DownloadSettings,
    item="video",
    pool="io",
    after=(),
    wanted=WANTED,
    current=(
        f"CREATE OR REPLACE TEMP TABLE all_videos AS {chosen_rows('download', 'downloads')}",
        CURRENT_VIDEOS,
        "DELETE FROM state_download WHERE unit NOT IN (SELECT unit FROM scope)",
    ),
    payload=PAYLOAD,
    run=run_download,
)
