"""What a stage is: one object with its settings, the SQL of what is pending, and the function that does it.

A stage lives in one file, in that reading order. `pipeline.engine.registry` lists all of them; the tree of settings,
what `clipmill run` offers, `status`, the ledger's keys and the warm-up of models follow from that list.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from clipmill.base.settings import Settings, digest
from pipeline.runtime.task import Result, Task
from shards.corpus.stage_query import StageQuery


@dataclass(frozen=True)
class DriverStage:
    """A stage that the driver runs as a whole, without tasks and pending items: ingest and pack."""

    name: str
    _: KW_ONLY
    help: str  # what goes in → what comes out, as `status` shows it
    settings: type[Settings]


@dataclass(frozen=True)
class Stage(StageQuery):
    """A stage that workers run task by task, for the items that the ledger finds pending.

    Attributes:
        help: what goes in → what comes out, as `status` shows it.
        settings: the class of the stage's section of settings.
        run: does a task: returns an `Outcome` per item and the media files it wrote.
        item: what an item is; its item_id is a video_id or a clip_id.
        pool: where tasks run. io: many at a time, mostly waiting · cpu: one per core · model: actors that keep models.
        version: raised when `run` writes something else for the same input and settings.
        identity: hash of what else shapes the rows, such as a model's weights; by default of the settings alone.
        switch: the setting that is null when the stage is off.
        load: loads the stage's model; the actors of pool "model" call it before there is work.
        reads_source: `run` reads the video's file, which is downloaded again if it was deleted after cutting.
    """

    _: KW_ONLY
    help: str
    settings: type[Settings]
    run: Callable[[Task], Result]
    item: Literal["video", "clip"]
    pool: Literal["io", "cpu", "model"] = "cpu"
    version: int = 1
    identity: Callable[[Any], str] | None = None
    switch: str | None = None
    load: Callable[[Any], object] | None = None
    reads_source: bool = False

    def is_off(self, settings: Settings) -> bool:
        return self.switch is not None and getattr(settings, self.switch) is None

    def fingerprint(self, settings: Settings) -> str | None:
        """Hash everything but the inputs that shapes the stage's rows; None if the stage is off.

        Raises UserError for a file that the settings name and that is missing.
        """
        if self.is_off(settings):
            return None
        identity = self.identity(settings) if self.identity else settings.fingerprint()
        return digest([self.name, self.version, identity])
