"""The score stage: a clip's caption frame, subtitle and caption → how well each pair of them fits."""

from captioning.scorer import ScoreInput, fingerprint_of, load_scorer
from captioning.settings import ScoreSettings
from clipmill.base.errors import ItemError
from pipeline.runtime.task import Outcome, Result, Task, load_model
from pipeline.runtime.watchdog import time_limit
from pipeline.stages.caption_frames import read_frames
from pipeline.stages.stage import Stage

WANTED = """
    SELECT k.clip_id AS item_id, k.unit, 1.0::DOUBLE AS cost,
           md5(concat_ws('|', $fingerprint, k.frame_sha256, md5(coalesce(k.text, '')), md5(coalesce(c.text, '')),
                         k.duration_s)) AS key
    FROM current_clips k LEFT JOIN current_captions c ON c.clip_id = k.clip_id AND c.current AND c.frame_index = 0
    WHERE len(k.frames) > 0
"""

PAYLOAD = """
    SELECT w.item_id, w.key, w.attempts, w.cost, k.clip_id, k.tar, k.frames[1] AS frame, k.frame_sha256,
           k.duration_s, k.text AS subtitle, coalesce(c.text, '') AS caption
    FROM work w JOIN current_clips k ON k.clip_id = w.item_id
    LEFT JOIN current_captions c ON c.clip_id = w.item_id AND c.current AND c.frame_index = 0
    ORDER BY w.item_id
"""


def run_score(task: Task) -> Result:
    """Score the first caption frame of each clip against its texts, in batches."""
    scorer = load_model(load_scorer, task.settings, task.fingerprint)
    if isinstance(scorer, ItemError):
        return [Outcome(item["item_id"], failure=scorer) for item in task.items], []
    images = read_frames(task.root, [(item["tar"], item["frame"]) for item in task.items])
    inputs = [
        ScoreInput(item["clip_id"], image, item["subtitle"], item["caption"], item["duration_s"])
        for item, image in zip(task.items, images, strict=True)
        if not isinstance(image, ItemError)
    ]
    limit_s = task.settings.timeout_base_s + task.settings.timeout_per_image_s * len(inputs)
    with time_limit(limit_s, f"scoring {len(inputs):,} images"):
        answers, outcomes = iter(scorer.score(inputs)), []
    for item, image in zip(task.items, images, strict=True):
        scores = image if isinstance(image, ItemError) else next(answers)
        if isinstance(scores, ItemError):
            outcomes.append(Outcome(item["item_id"], failure=scores))
            continue
        stamp = {"clip_id": item["clip_id"], "frame_sha256": item["frame_sha256"], "fingerprint": task.fingerprint}
        outcomes.append(Outcome(item["item_id"], rows={"scores": [{**scores, **stamp}]}))
    return outcomes, []


# `table` alone, so that only up-to-date rows count: an older score may be of other texts.
SCORE = Stage(
    "score",
    help="frames and texts → similarities",
    settings=ScoreSettings,
    identity=fingerprint_of,
    switch="model",
    item="clip",
    pool="model",
    load=load_scorer,
    after=("caption", "cut", "segment"),
    wanted=WANTED,
    table="scores",
    payload=PAYLOAD,
    run=run_score,
)
