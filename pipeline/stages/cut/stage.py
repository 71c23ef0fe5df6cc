"""The cut stage: a video's spans → clips, with caption frames, motion, brightness and perceptual hashes."""

from pathlib import Path

from pipeline.runtime.source_file import unchanged
from pipeline.runtime.task import Outcome, Result, Stopwatch, Task, sandbox
from pipeline.stages.cut.cut import cut_in_sandbox
from pipeline.stages.cut.settings import CutSettings, SpanRequest
from pipeline.stages.stage import Stage
from shards.corpus.fragments import temporary_folder
from shards.corpus.stage_query import chosen_rows
from shards.packing.tar import write_clips
from shards.storage.mirror import files_of

WANTED = """
    SELECT p.video_id AS item_id, p.unit, coalesce(any_value(v.duration_s), 0) AS cost,
           md5(concat_ws('|', $fingerprint, any_value(v.sha256),
                         string_agg(concat_ws('@', p.clip_id, p.start_s, p.end_s), ',' ORDER BY p.n))) AS key
    FROM current_spans p JOIN current_videos v USING (video_id)
    GROUP BY p.video_id, p.unit
"""

# Clips whose spans have not moved since cutting, with the place of their bytes (`packed_clips`: of those that are in
# shards alone) and with the span's text or first reference text.
CURRENT_CLIPS = f"""
    CREATE OR REPLACE TEMP TABLE current_clips AS
    SELECT r.* REPLACE (coalesce(b.tar, r.tar) AS tar, if(b.tar IS NULL, r.mp4_offset, b.mp4_offset) AS mp4_offset,
                       if(b.tar IS NULL, r.frames, b.frames) AS frames),
           coalesce(x.text, p.text) AS text,
           coalesce(len(regexp_extract_all(x.text, '\\S+'))::INT, p.num_words) AS num_words,
           if(x.text IS NULL, p.num_sentences, NULL) AS num_sentences,
           if(x.text IS NULL, p.align_cost, NULL) AS align_cost,
           if(x.text IS NULL, p.avg_logprob, NULL) AS avg_logprob,
           if(x.text IS NULL, p.no_speech_prob, NULL) AS no_speech_prob,
           if(x.text IS NULL, p.compression_ratio, NULL) AS compression_ratio, p.origin, t.language
    FROM ({chosen_rows("cut", "clips")}) r
    JOIN current_spans p ON p.clip_id = r.clip_id AND p.start_s = r.span_start_s AND p.end_s = r.span_end_s
         AND coalesce(p.source_sha256 = r.source_sha256, true)
    LEFT JOIN packed_clips b ON b.clip_id = r.clip_id AND b.fragment = r.fragment
    LEFT JOIN current_transcripts t ON t.video_id = r.video_id
    LEFT JOIN current_texts x ON x.clip_id = r.clip_id AND x.n = 0
"""

PAYLOAD = """
    SELECT w.item_id, w.key, w.attempts, w.cost, v.video_id, v.path, v.duration_s, v.sha256, v.file_stamp,
           list({clip_id: p.clip_id, n: p.n, start_s: p.start_s, end_s: p.end_s} ORDER BY p.n) AS spans
    FROM work w JOIN current_videos v ON v.video_id = w.item_id JOIN current_spans p ON p.video_id = w.item_id
    GROUP BY ALL ORDER BY w.item_id
"""


def run_cut(task: Task) -> Result:
    """Cut each video into a file of its own in the sandbox; the files then become one tar with the task's name."""
    root, name = Path(task.root), f"clips/{task.name}.tar"
    with temporary_folder(root / "clips" / task.name) as folder:
        outcomes = [_cut_video(task, item, folder) for item in task.items]
        rows = [row for outcome in outcomes for row in outcome.rows.get("clips", [])]
        if rows:
            write_clips(root / name, rows, lambda row: folder / row["video_id"])
            for row in rows:
                row["tar"] = name
        return outcomes, [name] if rows else []


def _cut_video(task: Task, item: dict, folder: Path) -> Outcome:
    with Stopwatch(item["item_id"]) as outcome:
        spans = [SpanRequest(**span) for span in item["spans"]]
        source = files_of(task.root).local(item["path"])
        target = folder / item["video_id"]
        with unchanged(source, item["sha256"], item["file_stamp"]):
            result = cut_in_sandbox(sandbox(), source, spans, task.settings, target, item["duration_s"])
        stamp = {"video_id": item["video_id"], "source_sha256": item["sha256"]}
        outcome.rows["clips"] = [{**row, **stamp} for row in result.rows]
        outcome.parts = list(result.failures)
    return outcome


CUT = Stage(
    "cut",
    help="spans → clips, caption frames, motion, hashes",
    settings=CutSettings,
    item="video",
    reads_source=True,
    after=("segment", "download"),
    wanted=WANTED,
    current=(CURRENT_CLIPS,),
    payload=PAYLOAD,
    run=run_cut,
)
