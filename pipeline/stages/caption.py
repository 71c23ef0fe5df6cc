"""The caption stage: a clip's caption frames → a caption of each, by the captioner that the settings name."""

from captioning.captioner import fingerprint_of, load_captioner
from captioning.settings import CaptionSettings
from clipmill.base.errors import ItemError
from pipeline.runtime.task import Outcome, Result, Task, load_model
from pipeline.runtime.watchdog import time_limit
from pipeline.stages.caption_frames import read_frames
from pipeline.stages.stage import Stage

WANTED = """
    SELECT clip_id AS item_id, unit, len(frames)::DOUBLE AS cost,
           md5(concat_ws('|', $fingerprint, list_transform(frames, lambda f: f.sha256)::VARCHAR)) AS key
    FROM current_clips WHERE len(frames) > 0
"""

# Every captioner's captions of the frames that the clips have now; `current` marks those that are served.
CURRENT_CAPTIONS = """
    CREATE OR REPLACE TEMP TABLE current_captions AS
    SELECT r.* EXCLUDE (fragment), r.unit AS caption_unit, coalesce(c.item_id IS NOT NULL, false) AS current
    FROM captions r
    JOIN current_clips k ON k.clip_id = r.clip_id AND k.frames[r.frame_index + 1].sha256 = r.frame_sha256
    LEFT JOIN chosen_caption c ON c.item_id = r.item_id AND c.key = r.key AND c.fragment = r.fragment
    QUALIFY row_number() OVER (PARTITION BY r.clip_id, r.frame_index, r.frame_sha256, r.fingerprint
                               ORDER BY c.item_id IS NULL, r.fragment DESC) = 1
"""

PAYLOAD = """
    SELECT w.item_id, w.key, w.attempts, w.cost, k.clip_id, k.tar, k.frames
    FROM work w JOIN current_clips k ON k.clip_id = w.item_id ORDER BY w.item_id
"""


def run_caption(task: Task) -> Result:
    """Caption all frames of the task's clips in batches; a clip fails if one of its frames does."""
    captioner = load_model(load_captioner, task.settings, task.fingerprint)
    if isinstance(captioner, ItemError):
        return [Outcome(item["item_id"], failure=captioner) for item in task.items], []
    frames = [(item, index, frame) for item in task.items for index, frame in enumerate(item["frames"])]
    images = read_frames(task.root, [(item["tar"], frame) for item, _, frame in frames])
    readable = [image for image in images if not isinstance(image, ItemError)]
    limit_s = task.settings.timeout_base_s + task.settings.timeout_per_image_s * len(readable)
    with time_limit(limit_s, f"captioning {len(readable):,} images"):
        answers = iter(captioner.caption(readable))
    outcomes = {item["item_id"]: Outcome(item["item_id"]) for item in task.items}
    for (item, index, frame), image in zip(frames, images, strict=True):
        outcome = outcomes[item["item_id"]]
        caption = image if isinstance(image, ItemError) else next(answers)
        if isinstance(caption, ItemError):
            outcome.failure = caption
            continue
        row = {
            "clip_id": item["clip_id"],
            "frame_index": index,
            "frame_sha256": frame["sha256"],
            "frame_time_s": frame["time_s"],
            "captioner": captioner.name,
            "fingerprint": task.fingerprint,
            "text": caption.text,
            "score": caption.score,
            "num_tokens": caption.num_tokens,
        }
        outcome.rows.setdefault("captions", []).append(row)
    for outcome in outcomes.values():
        if outcome.failure:
            outcome.rows.clear()
    return list(outcomes.values()), []


CAPTION = Stage(
    "caption",
    help="caption frames → captions",
    settings=CaptionSettings,
    identity=fingerprint_of,
    switch="captioner",
    item="clip",
    pool="model",
    load=load_captioner,
    after=("cut",),
    wanted=WANTED,
    current=(CURRENT_CAPTIONS,),
    payload=PAYLOAD,
    run=run_caption,
)
