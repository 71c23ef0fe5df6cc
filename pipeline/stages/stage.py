"""The type of a stage: one object with its settings, the SQL of its pending items, and its function.

A stage lives in one file, in that reading order. `pipeline.engine.registry` lists all of them; the tree of settings,
the choices of `clipmill run`, `status`, the ledger's keys and the warm-up of models follow from that list.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from clipmill.base.settings import Settings, digest
from pipeline.runtime.task import NotNow, Result, Task
from shards.corpus.stage_query import StageQuery


@dataclass(frozen=True)
class DriverStage:
    """A stage that the driver runs as a whole, without tasks and pending items: ingest and pack."""

    name: str
    _: KW_ONLY
    help: str  # input → output, as `status` shows it
    settings: type[Settings]


@dataclass(frozen=True)
class Stage(StageQuery):
    """A stage that workers run task by task, for the items that the ledger finds pending.

    Attributes:
        help: input → output, as `status` shows it.
        settings: the class of the stage's section of settings.
        run: function of a task; returns an `Outcome` per item and the media files that it wrote.
        item: kind of item, whose item_id is a video_id or a clip_id.
        pool: place of the tasks. io: many at a time, mostly waiting · cpu: one per core · model: actors with models.
        version: raised when `run` changes its output for the same input and settings.
        identity: hash of the settings and other inputs, such as weights; None: of the settings.
        switch: the setting that is null when the stage is off.
        load: loads the stage's model; the actors of pool "model" call it before the first task.
        host: returns the host whose turn an item waits for, or None. Such an item is a task of its own, and takes a
            place among the downloads only when it has its turn.
        reads_source: `run` reads the video's file, which is downloaded again if it was deleted after cutting.
    """

    _: KW_ONLY
    help: str
    settings: type[Settings]
    run: Callable[[Task], Result | NotNow]
    item: Literal["video", "clip"]
    pool: Literal["io", "cpu", "model"] = "cpu"
    version: int = 1
    identity: Callable[[Any], str] | None = None
    switch: str | None = None
    load: Callable[[Any], object] | None = None
    host: Callable[[dict], str | None] | None = None
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
