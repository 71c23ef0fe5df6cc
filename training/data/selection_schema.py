"""Columns of a selection file (`selection.arrow`, `eval.arrow` of a run): one row per selected clip."""

import pyarrow as pa

SELECTION_FILE, EVAL_FILE = "selection.arrow", "eval.arrow"  # of a run folder

HASHES = ("mp4_sha256", "jpg_sha256")
SELECTION = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video_id", pa.string()),
        ("shard", pa.string()),  # relative to `root` of the file's metadata; of plain tars the full path or URL
        ("mp4_offset", pa.int64()),  # of the member's data in the shard
        ("mp4_bytes", pa.int64()),
        ("jpg_offset", pa.int64()),  # null: the sample has no still picture
        ("jpg_bytes", pa.int64()),
        ("num_frames", pa.int32()),  # null: not known
        ("fps", pa.float64()),  # frames a second; null: not known
        ("subtitle", pa.string()),  # null or "": none
        ("caption", pa.string()),
        ("texts", pa.list_(pa.string())),  # reference texts of a benchmark; null: none
        ("duplicate_group", pa.string()),  # null: no near-duplicates
        (HASHES[0], pa.binary(32)),  # bytes read must have this hash; null: not known
        (HASHES[1], pa.binary(32)),
        # Subtitles of the clips before and after in the video, selected or not: first before, first after, second
        # before, … as many as data.neighbours says; null in the list: no such clip, or no subtitle
        ("neighbours", pa.list_(pa.string())),
    ]
)
# Columns that files of older versions lack; they are read as nulls
LATER = (("neighbours", "fps"), (*HASHES, "neighbours", "fps"))


def is_selection(schema: pa.Schema) -> bool:
    """Return True if a file has the columns of a selection of this version or an older one."""
    names = [field.name for field in SELECTION]
    known = [names, *([name for name in names if name not in later] for later in LATER)]
    return schema.names in known and all(schema.field(name).type == SELECTION.field(name).type for name in schema.names)


def complete(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Add the columns that an older file lacks, as nulls."""
    columns = [
        batch[field.name] if field.name in batch.schema.names else pa.nulls(batch.num_rows, field.type)
        for field in SELECTION
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SELECTION)
