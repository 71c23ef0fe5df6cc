"""Settings of the ingest stage."""

from pydantic import Field

from clipmill.base.settings import Settings, operational


class IngestSettings(Settings):
    """How lists are read and sources grouped."""

    # Videos per unit, the piece that is cut and committed as one. Small units spread better over workers and lose less
    # when one is killed; large ones make fewer files. Units that exist keep their size.
    unit_videos: int = Field(8, ge=1, le=10_000)
    # The column (key) of a list that holds the URL; by default the first of url, video_url, webpage_url, link, …
    url_column: str | None = None
    # The column that holds the id; by default the first of id, video_id, videoid, source_id, …
    id_column: str | None = None
    # A packed list (.gz) may unpack to so many bytes: a few megabytes can be made to fill any memory.
    max_unpacked_bytes: int = operational(4_000_000_000, ge=1)
