"""The segment stage: a video's words → sentences → the spans that become clips."""

from pipeline.runtime.source_file import unchanged
from pipeline.runtime.task import Result, Stopwatch, Task, sandbox
from pipeline.runtime.watchdog import time_limit
from pipeline.stages.ingest.added_spans import united_spans
from pipeline.stages.segment.segment import SegmentSettings, needs_shots, segment_video, why_no_spans
from pipeline.stages.segment.shots import detect_shots
from pipeline.stages.stage import Stage
from pipeline.stages.transcribe.words import Word
from shards.corpus.stage_query import chosen_rows
from shards.storage.mirror import files_of

WANTED = """
    -- Until the words of changed bytes are known, those of the old bytes are all there is. They make rows of another
    -- key, so that the video is segmented again when its words are there, even if these are the same.
    SELECT t.video_id AS item_id, t.unit, coalesce(v.duration_s, 0) / 100 AS cost,
           md5(concat_ws('|', $fingerprint, t.digest, s.spans::VARCHAR, v.duration_s, v.sha256,
                         nullif(t.source_sha256, v.sha256), c.spans::VARCHAR)) AS key
    FROM current_transcripts t JOIN current_videos v USING (video_id) JOIN sources s USING (video_id)
    LEFT JOIN copied_spans c USING (video_id)
"""

# The reference texts of given spans; they describe only those parts of the video.
CURRENT_TEXTS = """
    CREATE OR REPLACE TEMP TABLE current_texts AS
    WITH given AS (SELECT clip_id, video_id, n FROM current_spans WHERE origin = 'given'),
    referred AS (
        SELECT video_id, unnest(texts, max_depth := 2), generate_subscripts(texts, 1) AS position
        FROM sources WHERE len(texts) > 0 AND video_id IN (SELECT video_id FROM given)
    )
    SELECT g.clip_id, g.video_id, r.text,
           (row_number() OVER (PARTITION BY g.clip_id ORDER BY r.position) - 1)::INT AS n
    FROM given g JOIN referred r ON r.video_id = g.video_id AND r.n = g.n
"""

PAYLOAD = """
    SELECT w.item_id, w.key, w.attempts, w.cost, v.video_id, v.path, v.sha256, v.file_stamp, v.duration_s, t.words,
           t.asr_segments, coalesce(t.source_sha256, v.sha256) AS words_sha256, s.spans AS given_spans,
           c.spans AS copied_spans
    FROM work w JOIN current_videos v ON v.video_id = w.item_id JOIN current_transcripts t ON t.video_id = w.item_id
    JOIN sources s ON s.video_id = w.item_id LEFT JOIN copied_spans c ON c.video_id = w.item_id
    ORDER BY w.item_id
"""


def run_segment(task: Task) -> Result:
    """Choose the spans of each video; its pictures are decoded only if the settings ask for shots."""
    outcomes, settings = [], task.settings
    for item in task.items:
        with Stopwatch(item["item_id"]) as outcome:
            words = [Word(**word) for word in item["words"]]
            given = united_spans(item["given_spans"] or (), item.get("copied_spans") or ())
            shots = None
            if needs_shots(words, given, settings):
                limit_s = settings.timeout_base_s + settings.timeout_per_second * (item["duration_s"] or 0)
                limit_s = min(limit_s, settings.timeout_most_s)
                path = files_of(task.root).local(item["path"])
                with unchanged(path, item["sha256"], item["file_stamp"]):
                    shots = sandbox().call(detect_shots, path, settings.shots, timeout_s=limit_s)
            with time_limit(settings.timeout_base_s, f"segmenting {len(words):,} words"):
                segmented = segment_video(
                    item["video_id"], words, item["duration_s"], given, shots, settings, item["asr_segments"] or ()
                )
            stamp = {"source_sha256": item["words_sha256"]}
            outcome.rows["sentences"] = [{**row, **stamp} for row in segmented.sentences]
            outcome.rows["spans"] = [{**row, **stamp} for row in segmented.spans]
            if not segmented.spans:
                outcome.note = why_no_spans(segmented, words, item["duration_s"], settings)
        outcomes.append(outcome)
    return outcomes, []


SEGMENT = Stage(
    "segment",
    help="words → sentences → spans",
    settings=SegmentSettings,
    item="video",
    reads_source=True,
    after=("transcribe", "download"),
    wanted=WANTED,
    current=(
        f"CREATE OR REPLACE TEMP TABLE current_sentences AS {chosen_rows('segment', 'sentences')}",
        f"CREATE OR REPLACE TEMP TABLE current_spans AS {chosen_rows('segment', 'spans')}",
        CURRENT_TEXTS,
    ),
    payload=PAYLOAD,
    run=run_segment,
)
