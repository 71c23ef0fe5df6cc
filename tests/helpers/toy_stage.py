"""Define a stage as another package would: settings, a table, the SQL of pending items, the function."""

from clipmill.base.errors import ItemError
from clipmill.base.settings import Settings
from pipeline.runtime.task import Outcome, Result, Stopwatch, Task
from pipeline.stages.caption_frames import read_frames
from pipeline.stages.stage import Stage
from shards.corpus.schema import INT64, STRING, add_table, column


class ToySettings(Settings):
    unit: str | None = "byte"
    scale: int = 1


add_table(
    "frame_sizes",
    clip_id=STRING,
    frame_sha256=column(STRING, made_from="frame"),
    frame_size=column(INT64, in_catalog=True, in_shard=True),
)

WANTED = """
    SELECT clip_id AS item_id, unit, 1.0::DOUBLE AS cost, md5(concat_ws('|', $fingerprint, frame_sha256)) AS key
    FROM current_clips WHERE len(frames) > 0
"""

PAYLOAD = """
    SELECT w.item_id, w.key, w.attempts, w.cost, k.clip_id, k.tar, k.frames[1] AS frame
    FROM work w JOIN current_clips k ON k.clip_id = w.item_id ORDER BY w.item_id
"""


def run_toy(task: Task) -> Result:
    outcomes: list[Outcome] = []
    for item, image in zip(
        task.items, read_frames(task.root, [(item["tar"], item["frame"]) for item in task.items]), strict=True
    ):
        with Stopwatch(item["item_id"]) as outcome:
            if isinstance(image, ItemError):
                raise image
            row = {"clip_id": item["clip_id"], "frame_sha256": item["frame"]["sha256"]}
            outcome.rows["frame_sizes"] = [{**row, "frame_size": task.settings.scale * len(image)}]
        outcomes.append(outcome)
    return outcomes, []


TOY = Stage(
    "toy",
    help="caption frames → their sizes",
    settings=ToySettings,
    switch="unit",
    item="clip",
    after=("cut",),
    wanted=WANTED,
    table="frame_sizes",
    payload=PAYLOAD,
    run=run_toy,
)
