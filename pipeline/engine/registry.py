"""The stages of a build, in order. A new stage is one line here.

A stage from another package is one entry point of the group "clipmill.stages": NAME = "MODULE:ATTRIBUTE". It runs
after the stages below and before packing.
"""

from functools import cache
from importlib import metadata

from pipeline.stages.caption import CAPTION
from pipeline.stages.cut.stage import CUT
from pipeline.stages.download.stage import DOWNLOAD
from pipeline.stages.ingest.stage import INGEST
from pipeline.stages.pack import PACK
from pipeline.stages.score import SCORE
from pipeline.stages.segment.stage import SEGMENT
from pipeline.stages.stage import DriverStage, Stage
from pipeline.stages.transcribe.stage import TRANSCRIBE

STAGES = (
    INGEST,
    DOWNLOAD,
    TRANSCRIBE,
    SEGMENT,
    CUT,
    CAPTION,
    SCORE,
    PACK,
)
ENTRY_POINTS = "clipmill.stages"


@cache
def all_stages() -> tuple[Stage | DriverStage, ...]:
    """Return the stages above and those of installed packages."""
    further = [point.load() for point in sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda p: p.name)]
    return (*STAGES[:-1], *further, STAGES[-1])


def stages() -> tuple[Stage, ...]:
    """Return the stages that the ledger keeps items of: all but ingest and pack."""
    return tuple(stage for stage in all_stages() if isinstance(stage, Stage))


def stage_names() -> tuple[str, ...]:
    return tuple(stage.name for stage in all_stages())


def fingerprints(settings) -> dict[str, str | None]:
    """Return the fingerprint of every stage, None for one that is off. `settings`: a `CorpusSettings`.

    Raises UserError for a model file that the settings name and that is missing.
    """
    return {stage.name: stage.fingerprint(getattr(settings, stage.name)) for stage in stages()}
