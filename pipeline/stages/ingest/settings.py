"""Settings of the ingest stage."""

from pydantic import Field

from clipmill.base.settings import Settings, operational


class IngestSettings(Settings):
    """Settings of reading lists and of grouping sources into units."""

    # Videos per unit, which is downloaded, cut and committed together. Small units spread better over workers and lose
    # less when one is killed; large ones make fewer files. Existing units keep their size.
    unit_videos: int = Field(8, ge=1, le=10_000)
    # Units per volume, of which ledger, clips and shards are kept apart: a step of work reads the volumes that it
    # changes and no others. New sources fill the last volume, then begin another. Existing units keep their volume.
    volume_units: int = Field(250, ge=1, le=1_000_000)
    # The column (key) of a list that holds the URL; by default the first of url, video_url, webpage_url, link, …
    url_column: str | None = None
    # The column that holds the id; by default the first of id, video_id, videoid, source_id, …
    id_column: str | None = None
    # Read spans from columns of start and end times and from columns that list spans. false: only from clip, clips and
    # spans; the others are kept in `extra`.
    read_spans: bool = True
    # Most bytes that a packed list (.gz) may unpack to, because a few megabytes can be made to fill any memory.
    max_unpacked_bytes: int = operational(4_000_000_000, ge=1)
