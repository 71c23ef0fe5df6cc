"""The tables of a corpus, column by column. Everything else is derived from these.

A column's declaration decides if it is also in the view `catalog` and in the samples of shards; the view, the late
columns of KEY.json and the layout of the ledger follow. Every fragment table also carries `LEDGER_COLUMNS`, which name
the task that wrote the row. Times are seconds from the first frame of the video as doubles. Ids: `video_id` is
[A-Za-z0-9_-]{1,64}; `clip_id` is VIDEO_ID.N; the key of a sample inside a tar is VIDEO_ID_NNNN, because WebDataset cuts
a member's name at its first dot.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

STRING, DOUBLE, INT64, INT32, BOOL = pa.string(), pa.float64(), pa.int64(), pa.int32(), pa.bool_()

SPAN = pa.struct([("n", INT32), ("start_s", DOUBLE), ("end_s", DOUBLE)])
REFERENCE = pa.struct([("n", INT32), ("text", STRING)])  # a text that people wrote about the video's clip n
WORD = pa.struct([("text", STRING), ("start_s", DOUBLE), ("end_s", DOUBLE)])
# What speech recognition says of a piece of its text: mean log-probability of the tokens, probability that nobody
# speaks, and how far the text can be compressed (above 2.4 it repeats itself).
CONFIDENCES = {"avg_logprob": DOUBLE, "no_speech_prob": DOUBLE, "compression_ratio": DOUBLE}
ASR_SEGMENT = pa.struct([("start_s", DOUBLE), ("end_s", DOUBLE), *CONFIDENCES.items()])
SUBTITLE_FILE = pa.struct(
    [("path", STRING), ("language", STRING), ("kind", STRING), ("format", STRING), ("sha256", STRING)]
)
FRAME = pa.struct(
    [("time_s", DOUBLE), ("sha256", STRING), ("offset", INT64), ("num_bytes", INT64)]
)  # a caption frame: a JPEG member of the clips tar
# Slot that stays reserved for a forgotten clip in the order of packing, so that no other clip changes its shard.
RESERVED_SLOT = pa.struct(
    [("seed", INT64), ("rank", pa.uint64()), ("mp4_bytes", INT64), ("jpg_bytes", INT64), ("txt_bytes", INT64)]
)
PACK_SLOT = pa.struct([("pack", STRING), *((field.name, field.type) for field in RESERVED_SLOT)])  # of a named pack
BIN = pa.struct([("from", DOUBLE), ("num_clips", INT64)])  # of a histogram; the first bin has no lower bound
REASON = pa.struct([("reason", STRING), ("num_clips", INT64)])


@dataclass(frozen=True)
class Column:
    """The type of a column, and the other places that show its values."""

    type: pa.DataType
    in_catalog: bool | str = False
    in_shard: bool = False
    made_from: Literal["frame", "video", "clip"] | None = None


def column(
    type: pa.DataType,
    *,
    in_catalog: bool | str = False,
    in_shard: bool = False,
    made_from: Literal["frame", "video", "clip"] | None = None,
) -> Column:
    """Declare a column that is more than a value in its own table; for others the Arrow type is enough.

    Args:
        in_catalog: True, or the name that the column has in the view `catalog`.
        in_shard: KEY.json holds its value as of packing. A new value does not make the shard pending.
        made_from: the column is the SHA-256 of the caption frame, source video or mp4 that its row was made from;
            `verify` compares it with the clip's present one.
    """
    assert in_catalog or not in_shard, "samples are made from rows of `catalog`"
    return Column(type, in_catalog, in_shard, made_from)


Columns = dict[str, Column]


def _columns(**columns: pa.DataType | Column) -> Columns:
    return {name: each if isinstance(each, Column) else Column(each) for name, each in columns.items()}


def _arrow(columns: Columns) -> pa.Schema:
    return pa.schema([(name, each.type) for name, each in columns.items()])


# One row per item tried, done or failed. Every commit writes some (see `shards.corpus.fragments.ledger_row`).
LEDGER = _arrow(
    _columns(
        stage=STRING,
        item_id=STRING,
        unit=STRING,
        key=STRING,  # hash of (stage fingerprint, the item's inputs), which decides if a row is current
        fingerprint=STRING,
        status=STRING,  # done | failed
        error_class=STRING,  # of a failure; of an item that is done and has no rows: the reason
        message=STRING,
        transient=BOOL,
        attempts=INT32,
        num_rows=INT64,
        wall_s=DOUBLE,
        cpu_s=DOUBLE,
        at=pa.timestamp("us", tz="UTC"),
        run_id=STRING,
    )
)

LEDGER_COLUMNS = [("item_id", STRING), ("unit", STRING), ("key", STRING)]

# Columns of fragments, by table.
_FRAGMENTS: dict[str, Columns] = {
    # ingest: one row per distinct source
    "sources": _columns(
        video_id=STRING,
        url=STRING,  # http(s)/s3/… URL, or the absolute path of a local file
        kind=STRING,  # "url" | "file"
        source_id=STRING,  # the id as the list gave it, unchanged
        title=STRING,
        category=STRING,
        language=STRING,
        licence=STRING,
        subtitle=STRING,  # URL or path of a subtitle file that the list or a side-car names
        spans=pa.list_(SPAN),  # null: none given (HD-VILA lists give them); end_s null: to the end of the video
        split=STRING,  # of a benchmark: train, val, test …; null: of none
        texts=pa.list_(REFERENCE),  # reference texts, in their order; null: none given
        extra=STRING,  # the list's other columns as a JSON object, or null
        ordinal=INT64,  # position in order of first sight, over the life of the corpus
        volume=INT32,  # the volume of its unit; null in rows older than this column: volume 0
    ),
    # download: one row per downloaded video
    "downloads": _columns(
        video_id=STRING,
        path=STRING,  # relative to the corpus, or absolute for local files by reference
        num_bytes=INT64,
        sha256=STRING,
        # size, modification and change time of the file when it had this hash (`pipeline.runtime.source_file`)
        file_stamp=STRING,
        container=STRING,
        duration_s=DOUBLE,
        width=INT32,
        height=INT32,
        fps=DOUBLE,
        rotation=INT32,
        video_codec=STRING,
        audio_codec=STRING,  # null: no audio stream
        subtitles=pa.list_(SUBTITLE_FILE),
        title=STRING,
        categories=pa.list_(STRING),
        licence=STRING,
        channel=STRING,
        upload_date=STRING,  # YYYY-MM-DD
        language=STRING,
        extractor=STRING,  # "http", "file", "fsspec" or yt-dlp's extractor key
        meta=STRING,  # further metadata as a JSON object, or null
    ),
    # transcribe: one row per video with or without speech
    "transcripts": _columns(
        video_id=STRING,
        language=STRING,
        origin=STRING,  # manual | auto | given | sidecar | embedded (a track of the video) | whisper | none
        word_times=STRING,  # tags | cues | asr | none: source of the words' times
        source_sha256=STRING,  # of the video file; null in rows older than this column
        words=pa.list_(WORD),  # de-overlapped, in time order
        num_words=INT32,
        digest=STRING,  # of language and words: a video is segmented again only when this changes
        encoding=STRING,  # of the subtitle file, as Python names it; null: not of a file, or an older row
        encoding_guessed=BOOL,  # nothing names that encoding: it is the one that fits best
        repairs=STRING,  # JSON object: number of repairs of the subtitles by kind, such as "bad-cue"; null: none
        asr_segments=pa.list_(ASR_SEGMENT),  # null: the words are not from speech recognition
    ),
    # segment: the sentences …
    "sentences": _columns(
        video_id=STRING,
        n=INT32,
        start_s=DOUBLE,
        end_s=DOUBLE,
        text=STRING,
        num_words=INT32,
        align_cost=DOUBLE,  # mean DTW cost, 0 = every word found as it is
        clip_id=STRING,  # the span that holds it, null if it was dropped
        **CONFIDENCES,  # means over the segments of speech recognition; null: other words, or an earlier version
        # of the video file that the words come from; null: unknown
        source_sha256=column(STRING, made_from="video"),
    ),
    # … and the spans chosen to become clips
    "spans": _columns(
        video_id=STRING,
        clip_id=STRING,
        n=INT32,
        start_s=DOUBLE,
        end_s=DOUBLE,
        origin=STRING,  # sentences | given | shots | fixed
        text=STRING,  # "" without speech
        num_words=INT32,
        num_sentences=INT32,
        align_cost=DOUBLE,
        **CONFIDENCES,  # as in sentences
        source_sha256=column(STRING, made_from="video"),
    ),
    # cut: one row per clip; offsets point into clips/…tar
    "clips": _columns(
        video_id=STRING,
        clip_id=STRING,
        n=INT32,
        span_start_s=DOUBLE,  # as requested
        span_end_s=DOUBLE,
        start_s=DOUBLE,  # time of the first source frame taken
        end_s=DOUBLE,  # end of the last source frame taken
        duration_s=DOUBLE,  # playing time: num_frames / fps
        num_frames=INT32,
        fps=DOUBLE,
        width=INT32,
        height=INT32,
        codec=STRING,
        has_audio=BOOL,
        num_bytes=INT64,
        sha256=STRING,  # of the mp4
        frames=pa.list_(FRAME),  # caption frames, of which the first becomes KEY.jpg
        frame_time_s=DOUBLE,  # of the first caption frame
        frame_sha256=STRING,
        motion=DOUBLE,  # mean absolute luma change between neighbouring output frames, 0..1
        brightness=DOUBLE,  # mean luma, 0..1
        shot_score=DOUBLE,  # largest content change between neighbouring output frames, PySceneDetect's scale 0..255
        phash=pa.list_(pa.uint64()),  # 64-bit perceptual hashes of the first, middle and last frame
        tar=STRING,  # relative to the corpus
        mp4_offset=INT64,
        source_sha256=STRING,
    ),
    # caption: one row per clip, frame and captioner
    "captions": _columns(
        clip_id=STRING,
        frame_index=INT32,  # position among the clip's caption frames
        frame_sha256=column(STRING, made_from="frame"),
        frame_time_s=DOUBLE,
        captioner=column(STRING, in_catalog=True, in_shard=True),
        fingerprint=STRING,
        text=column(STRING, in_catalog="caption", in_shard=True),  # "" for an empty answer of the captioner
        # mean log-probability per token under the captioner, null if it gives none
        score=column(DOUBLE, in_catalog="caption_score", in_shard=True),
        num_tokens=INT32,
    ),
    # score: one row per clip
    "scores": _columns(
        clip_id=STRING,
        model=STRING,
        fingerprint=STRING,
        frame_sha256=column(STRING, made_from="frame"),
        # cosine of frame and subtitle; null without a subtitle
        subtitle_similarity=column(DOUBLE, in_catalog=True, in_shard=True),
        # cosine of frame and caption; null without a caption
        caption_similarity=column(DOUBLE, in_catalog=True, in_shard=True),
        # cosine of subtitle and caption; null unless both exist
        text_similarity=column(DOUBLE, in_catalog=True, in_shard=True),
        words_per_s=column(DOUBLE, in_catalog=True, in_shard=True),
        repeated_word_ratio=column(DOUBLE, in_catalog=True, in_shard=True),  # 1 - distinct words / words
    ),
    # edit: the boundaries of every clip after each round, moved by a teacher or not. Spans, texts and clips do not
    # change.
    "clip_edits": _columns(
        editing=STRING,  # id of a `clipmill edit`: hash of its first teacher, settings and clips
        clip_id=STRING,
        video_id=STRING,
        round=INT32,
        start_s=DOUBLE,  # after the round
        end_s=DOUBLE,
        base_start_s=DOUBLE,  # of the clip as it was first made
        base_end_s=DOUBLE,
        teacher=STRING,  # hash of the weights that scored
        score_before=DOUBLE,  # of the boundaries before the round
        score_after=DOUBLE,  # of the boundaries after it; equal to score_before unless accepted
        accepted=BOOL,
        reason=STRING,  # better | no-better | no-candidate | not-lowest | not-cut; may end in -without-source
        text_md5=STRING,  # of the text that the clip was compared with
    ),
    "edit_rounds": _columns(
        editing=STRING,
        round=INT32,  # 0: the warm-up; 1 and above: edits
        teacher=STRING,  # that edited; in the warm-up's row the one that it trained; two are joined by "+"
        validation=DOUBLE,  # R@1 of the student after the round; null: none was trained
        best_before=DOUBLE,  # best `validation` of earlier rounds, to be exceeded; null for the warm-up
        outcome=STRING,  # warm-up | kept | rolled-back | collapsed | untrained
        step_scale=DOUBLE,  # factor of the settings' steps in this round
        threshold=DOUBLE,  # clips that scored more than this were left alone; null: none
        num_clips=INT64,
        num_accepted=INT64,
        num_failed=INT64,  # videos that could not be scored
        num_overlapping=INT64,  # pairs of clips of one video that overlap by more than half of the shorter
        median_change=DOUBLE,  # of the clips' length, against the first boundaries
        share_at_limit=DOUBLE,
        reasons=pa.list_(REASON),
        length_changes=pa.list_(BIN),  # natural logarithms of length / first length
        shifts=pa.list_(BIN),  # distances of the middle from that of the first boundaries, in seconds
        settings=STRING,  # of the editing, as JSON
    ),
}
# edit, too: clips cut again because their boundaries moved; span_start_s and span_end_s are those of the edit
_FRAGMENTS["edited_clips"] = _columns(
    editing=STRING, round=INT32, **{name: each.type for name, each in _FRAGMENTS["clips"].items()}
)

# The index of a shard (see `shards.corpus.packs`), and the table `samples` of the main pack: one row per sample, in the
# tar's order
_INDEX = _columns(
    clip_id=STRING,
    video_id=STRING,
    key=STRING,
    shard=column(STRING, in_catalog=True),  # "000000-000000.tar"
    position=column(INT32, in_catalog=True),  # of the sample in its tar
    mp4_offset=INT64,  # of the member's data, not of its header
    mp4_bytes=INT64,
    mp4_sha256=STRING,
    jpg_offset=INT64,  # null if the clip has no caption frame
    jpg_bytes=INT64,
    jpg_sha256=STRING,
    txt_offset=INT64,
    txt_bytes=INT64,
    json_offset=INT64,
    json_bytes=INT64,
    num_frames=INT32,
    fps=DOUBLE,
    duration_s=DOUBLE,
    width=INT32,
    height=INT32,
    subtitle=STRING,
    caption=STRING,
    captioner=STRING,
    caption_score=DOUBLE,
    frame_time_s=DOUBLE,
    language=STRING,
)

# The published manifest, which users query. `videos` joins sources, downloads and transcripts; `clips` takes its text
# from the current spans, or from `texts` where a clip has reference texts; `captions` keeps every captioner's rows and
# marks the ones that are served; `scores` adds the near-duplicate group.
_PUBLISHED: dict[str, Columns] = {
    "videos": _columns(
        video_id=STRING,
        unit=STRING,
        volume=INT32,
        url=column(STRING, in_catalog=True),
        kind=column(STRING, in_catalog=True),
        source_id=STRING,
        title=column(STRING, in_catalog=True),
        category=column(STRING, in_catalog=True),
        language=STRING,
        licence=column(STRING, in_catalog=True),
        channel=column(STRING, in_catalog=True),
        upload_date=column(STRING, in_catalog=True),
        path=STRING,  # null: not downloaded
        num_bytes=INT64,
        sha256=STRING,
        duplicate_of=STRING,  # video_id of the earlier video with the same bytes, else null
        container=STRING,
        duration_s=DOUBLE,
        width=INT32,
        height=column(INT32, in_catalog="video_height"),
        fps=DOUBLE,
        video_codec=STRING,
        audio_codec=STRING,
        extractor=STRING,
        transcript_origin=column(STRING, in_catalog=True),
        word_times=column(STRING, in_catalog=True),
        num_words=INT32,
        subtitle_encoding=STRING,  # as in transcripts
        subtitle_encoding_guessed=BOOL,
        subtitle_repairs=STRING,
        split=column(STRING, in_catalog=True),
        ordinal=INT64,
        extra=STRING,
        meta=STRING,
        no_clip_reason=STRING,  # why a video that is there has no clip, as a failure's class or "pending"; else null
    ),
    "sentences": _FRAGMENTS["sentences"],
    "spans": _FRAGMENTS["spans"],
    "clips": _columns(
        **_FRAGMENTS["clips"],
        text=STRING,  # the first reference text of a clip that has any, else the subtitle; "" without speech
        num_words=INT32,
        num_sentences=INT32,
        align_cost=DOUBLE,
        **CONFIDENCES,  # of the subtitle, as in sentences; null for a reference text
        origin=STRING,
        language=STRING,
        unit=STRING,
    ),
    # Reference texts of the clips cut from given spans: the queries of a retrieval benchmark.
    "texts": _columns(
        clip_id=STRING,
        n=INT32,  # from 0, in the order of the source list
        text=column(STRING, in_catalog="texts"),
        video_id=STRING,
        clip_sha256=column(STRING, made_from="clip"),  # of the mp4 that the text describes
    ),
    "captions": _columns(**_FRAGMENTS["captions"], current=BOOL),
    "scores": _columns(
        **_FRAGMENTS["scores"],
        # clip_id of the group's first clip; null for a clip without near-duplicates
        duplicate_group=column(STRING, in_catalog=True, in_shard=True),
    ),
    "samples": _INDEX,
    "pack_samples": _columns(pack=STRING, **{name: each.type for name, each in _INDEX.items()}),  # of named packs
    "clip_edits": _FRAGMENTS["clip_edits"],
    "edited_clips": _FRAGMENTS["edited_clips"],
    "edit_rounds": _columns(**_FRAGMENTS["edit_rounds"], at=pa.timestamp("us", tz="UTC")),
    "failures": _columns(
        stage=STRING,
        item_id=STRING,
        error_class=STRING,
        message=STRING,
        transient=BOOL,
        attempts=INT32,
        at=pa.timestamp("us", tz="UTC"),
        unit=STRING,
        quarantined=BOOL,  # all engine.max_attempts are used up: only `run --where` tries again
    ),
    # Forgotten videos, as hashes alone: enough to recognise a video, not to name it.
    "forgotten": _columns(
        video_hash=STRING,  # SHA-256 of the video_id
        url_hash=STRING,  # SHA-256 of the canonical URL
        other_hashes=pa.list_(STRING),  # SHA-256 of its normal URL, and of its site and its id there
        sha256=STRING,  # of the video file; null: never downloaded
        reason=STRING,  # as --reason gave it, or null
        at=pa.timestamp("us", tz="UTC"),
        places=pa.list_(RESERVED_SLOT),  # of its clips in the order of packing
        pack_places=pa.list_(PACK_SLOT),  # the same in named packs
        volume=INT32,  # of the video; null: forgotten before there were volumes, when all were volume 0
    ),
    "runs": _columns(
        run_id=STRING,
        command=STRING,
        started_at=pa.timestamp("us", tz="UTC"),
        ended_at=pa.timestamp("us", tz="UTC"),  # null: still running or killed
        settings=STRING,  # the resolved settings as JSON
        versions=STRING,  # JSON: of clipmill and packages that shape its output; the driver's peak memory in MB
    ),
}

# A stage's table of clips is published unchanged, unless it has other columns above.
_PUBLISHED |= {table: each for table, each in _FRAGMENTS.items() if "clip_id" in each and table not in _PUBLISHED}

# Tables of the manifest whose rows do not belong to a volume.
GLOBAL_TABLES = ("samples", "pack_samples", "forgotten", "runs")


def _published(table: str, columns: Columns) -> pa.Schema:
    """Return the columns of a table of the manifest; rows of a volume name it, so that they can be replaced alone."""
    named = table in GLOBAL_TABLES or "volume" in columns
    return _arrow(columns if named else {**columns, "volume": Column(INT32)})


TABLES: dict[str, pa.Schema] = {table: _arrow(columns) for table, columns in _FRAGMENTS.items()}
MANIFEST: dict[str, pa.Schema] = {table: _published(table, columns) for table, columns in _PUBLISHED.items()}
INDEX = _arrow(_INDEX)


def add_table(table: str, **columns: pa.DataType | Column) -> None:
    """Declare the table of a stage from another package, with one row per clip and a column `clip_id`.

    Call it at the top of the module that holds the stage, so that every process that loads the stage knows the table.
    """
    assert "clip_id" in columns, f"table {table}: it needs a column clip_id"
    _PUBLISHED[table] = _FRAGMENTS[table] = _columns(**columns)
    TABLES[table], MANIFEST[table] = _arrow(_columns(**columns)), _published(table, _columns(**columns))


# `catalog` shows all columns of clips, then these in this fixed order, then all other declared ones.
_CATALOG_ORDER = (
    "caption", "captioner", "caption_score", "subtitle_similarity", "caption_similarity", "text_similarity",
    "words_per_s", "repeated_word_ratio", "duplicate_group", "title", "category", "channel", "licence", "url", "kind",
    "upload_date", "transcript_origin", "word_times", "video_height", "split", "texts", "shard", "position",
)  # fmt: skip


def catalog_columns() -> list[tuple[str, str, str]]:
    """Return (table, column, name in the view) of the columns that `catalog` shows besides those of clips."""
    shown = [
        (table, name, name if each.in_catalog is True else each.in_catalog)
        for table, columns in _PUBLISHED.items()
        for name, each in columns.items()
        if each.in_catalog and table != "clips"
    ]
    known = {name: place for place, name in enumerate(_CATALOG_ORDER)}
    return sorted(shown, key=lambda column: known.get(column[2], len(known)))


def late_columns() -> list[str]:
    """Return the names in `catalog` of columns that KEY.json holds as of packing and a shard's key leaves out."""
    return [
        name if each.in_catalog is True else each.in_catalog
        for columns in _PUBLISHED.values()
        for name, each in columns.items()
        if each.in_shard
    ]


def origins() -> Iterator[tuple[str, str, str]]:
    """Yield (table, column, frame | video | clip) of the columns that are hashes of their row's input."""
    for table, columns in _PUBLISHED.items():
        for name, each in columns.items():
            if each.made_from:
                yield table, name, each.made_from


def sample_key(clip_id: str) -> str:
    """Return the name of a clip's members inside a tar: "VIDEO_ID.3" → "VIDEO_ID_0003"."""
    video_id, n = clip_id.rsplit(".", 1)
    return f"{video_id}_{int(n):04d}"
