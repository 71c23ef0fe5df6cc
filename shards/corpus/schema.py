"""The tables of a corpus: what each fragment holds, column by column. Everything else is derived from these.

Every fragment table also carries the columns of `LEDGER_COLUMNS`, which say which work wrote the row. Times are seconds
from the first frame of the video as doubles. Ids: `video_id` is [A-Za-z0-9_-]{1,64}; `clip_id` is VIDEO_ID.N; the key
of a sample inside a tar is VIDEO_ID_NNNN, because WebDataset cuts a member's name at its first dot.
"""

import pyarrow as pa

STRING, DOUBLE, INT64, INT32, BOOL = pa.string(), pa.float64(), pa.int64(), pa.int32(), pa.bool_()

SPAN = pa.struct([("n", INT32), ("start_s", DOUBLE), ("end_s", DOUBLE)])
REFERENCE = pa.struct([("n", INT32), ("text", STRING)])  # a text that people wrote about the video's clip n
WORD = pa.struct([("text", STRING), ("start_s", DOUBLE), ("end_s", DOUBLE)])
SUBTITLE_FILE = pa.struct(
    [("path", STRING), ("language", STRING), ("kind", STRING), ("format", STRING), ("sha256", STRING)]
)
FRAME = pa.struct(
    [("time_s", DOUBLE), ("sha256", STRING), ("offset", INT64), ("num_bytes", INT64)]
)  # a caption frame: a JPEG member of the clips tar
# Room that a forgotten clip leaves in the order of packing, so that the other clips stay in the shards they are in.
PLACE = pa.struct(
    [("seed", INT64), ("rank", pa.uint64()), ("mp4_bytes", INT64), ("jpg_bytes", INT64), ("txt_bytes", INT64)]
)
BIN = pa.struct([("from", DOUBLE), ("num_clips", INT64)])  # of a histogram; the first bin reaches down without end
REASON = pa.struct([("reason", STRING), ("num_clips", INT64)])


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()))


# Written by the engine with every commit: one row per item tried, done or failed.
LEDGER = _schema(
    stage=STRING,
    item_id=STRING,
    unit=STRING,
    key=STRING,  # hash of (stage fingerprint, the item's inputs): what makes a row current
    fingerprint=STRING,
    status=STRING,  # done | failed
    error_class=STRING,
    message=STRING,
    transient=BOOL,
    attempts=INT32,
    num_rows=INT64,
    wall_s=DOUBLE,
    cpu_s=DOUBLE,
    at=pa.timestamp("us", tz="UTC"),
    run_id=STRING,
)

LEDGER_COLUMNS = [("item_id", STRING), ("unit", STRING), ("key", STRING)]

TABLES: dict[str, pa.Schema] = {
    # ingest: one row per distinct source
    "sources": _schema(
        video_id=STRING,
        url=STRING,  # http(s)/s3/… URL, or the absolute path of a local file
        kind=STRING,  # "url" | "file"
        source_id=STRING,  # the id as the list gave it, whatever it was
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
    ),
    # download: one row per video that is here
    "downloads": _schema(
        video_id=STRING,
        path=STRING,  # relative to the corpus, or absolute for local files by reference
        num_bytes=INT64,
        sha256=STRING,
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
    "transcripts": _schema(
        video_id=STRING,
        language=STRING,
        origin=STRING,  # manual | auto | given | sidecar | whisper | none
        word_times=STRING,  # tags | cues | asr | none: where the words' times come from
        source_sha256=STRING,  # of the video file; null in rows of before there was this column
        words=pa.list_(WORD),  # de-overlapped, in time order
        num_words=INT32,
        digest=STRING,  # of language and words: segmenting again is needed only when this changes
    ),
    # segment: the sentences …
    "sentences": _schema(
        video_id=STRING,
        n=INT32,
        start_s=DOUBLE,
        end_s=DOUBLE,
        text=STRING,
        num_words=INT32,
        align_cost=DOUBLE,  # mean DTW cost, 0 = every word found as it is
        clip_id=STRING,  # the span that holds it, null if it was dropped
        source_sha256=STRING,  # of the video file that the words were heard in; null: unknown
    ),
    # … and the spans chosen to become clips
    "spans": _schema(
        video_id=STRING,
        clip_id=STRING,
        n=INT32,
        start_s=DOUBLE,
        end_s=DOUBLE,
        origin=STRING,  # sentences | given | shots | fixed
        text=STRING,  # "" where nothing is said
        num_words=INT32,
        num_sentences=INT32,
        align_cost=DOUBLE,
        source_sha256=STRING,  # as in sentences
    ),
    # cut: one row per clip; offsets point into clips/…tar
    "clips": _schema(
        video_id=STRING,
        clip_id=STRING,
        n=INT32,
        span_start_s=DOUBLE,  # as asked
        span_end_s=DOUBLE,
        start_s=DOUBLE,  # time of the first source frame taken
        end_s=DOUBLE,  # end of the last source frame taken
        duration_s=DOUBLE,  # num_frames / fps: how long the clip plays
        num_frames=INT32,
        fps=DOUBLE,
        width=INT32,
        height=INT32,
        codec=STRING,
        has_audio=BOOL,
        num_bytes=INT64,
        sha256=STRING,  # of the mp4
        frames=pa.list_(FRAME),  # caption frames, the first is the one that becomes KEY.jpg
        frame_time_s=DOUBLE,  # of that one
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
    "captions": _schema(
        clip_id=STRING,
        frame_index=INT32,  # which of the clip's caption frames
        frame_sha256=STRING,
        frame_time_s=DOUBLE,
        captioner=STRING,
        fingerprint=STRING,
        text=STRING,  # "" when the captioner really said nothing
        score=DOUBLE,  # mean log-probability per token under the captioner, null where it gives none
        num_tokens=INT32,
    ),
    # score: one row per clip
    "scores": _schema(
        clip_id=STRING,
        model=STRING,
        fingerprint=STRING,
        frame_sha256=STRING,
        subtitle_similarity=DOUBLE,  # cosine of frame and subtitle; null without a subtitle
        caption_similarity=DOUBLE,  # cosine of frame and caption; null without a caption
        text_similarity=DOUBLE,  # cosine of subtitle and caption; null unless both are there
        words_per_s=DOUBLE,
        repeated_word_ratio=DOUBLE,  # 1 - distinct words / words
    ),
    # edit: boundaries that a teacher moved. One row per clip and round, whether it moved or not: those of one round
    # are the boundaries after it. Spans, texts and clips stay as they are.
    "clip_edits": _schema(
        editing=STRING,  # which `clipmill edit`: a hash of its first teacher, its settings and its clips
        clip_id=STRING,
        video_id=STRING,
        round=INT32,
        start_s=DOUBLE,  # after the round
        end_s=DOUBLE,
        base_start_s=DOUBLE,  # of the clip as it was first made
        base_end_s=DOUBLE,
        teacher=STRING,  # hash of the weights that scored
        score_before=DOUBLE,  # of the boundaries before the round
        score_after=DOUBLE,  # of those after it; equal where nothing was accepted
        accepted=BOOL,
        reason=STRING,  # better | no-better | no-candidate | not-lowest | not-cut, with -without-source behind it
        text_md5=STRING,  # of the text that the clip was held against
    ),
    "edit_rounds": _schema(
        editing=STRING,
        round=INT32,  # 0: the warm-up, from 1 on the edits
        teacher=STRING,  # that edited; after the warm-up: the teacher it gave. Two of them are joined by "+"
        validation=DOUBLE,  # R@1 of the student after the round; null: none was trained
        best_before=DOUBLE,  # what it had to exceed; null for the warm-up
        outcome=STRING,  # warm-up | kept | rolled-back | collapsed | untrained
        step_scale=DOUBLE,  # of the steps of settings, in this round
        threshold=DOUBLE,  # clips that scored more than this were left alone; null: none
        num_clips=INT64,
        num_accepted=INT64,
        num_failed=INT64,  # videos that could not be scored
        num_overlapping=INT64,  # pairs of clips of one video that overlap by more than half of the shorter
        median_change=DOUBLE,  # of the clips' length, against the first boundaries
        share_at_limit=DOUBLE,
        reasons=pa.list_(REASON),
        length_changes=pa.list_(BIN),  # of e-folds of change from the first length
        shifts=pa.list_(BIN),  # of the middle, in seconds from the first boundaries'
        settings=STRING,  # of the editing, as JSON
    ),
}
# edit, too: clips cut again where the boundaries moved; span_start_s and span_end_s are those of the edit
TABLES["edited_clips"] = pa.schema([("editing", STRING), ("round", INT32), *TABLES["clips"]])

# shards/NNNNNN.parquet, and the table `samples`: one row per sample of a shard, in the tar's order
INDEX = _schema(
    clip_id=STRING,
    video_id=STRING,
    key=STRING,
    shard=STRING,  # "000000.tar"
    position=INT32,  # of the sample in its tar
    mp4_offset=INT64,  # of the member's data, not of its header
    mp4_bytes=INT64,
    mp4_sha256=STRING,
    jpg_offset=INT64,  # null where the clip has no caption frame
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

# The published manifest: what people query. `videos` joins sources, downloads and transcripts; `clips` takes its text
# from the current spans, or from `texts` where a clip has reference texts; `captions` keeps every captioner's rows and
# marks the one that is served; `scores` adds the near-duplicate group.
MANIFEST: dict[str, pa.Schema] = {
    "videos": _schema(
        video_id=STRING,
        unit=STRING,
        url=STRING,
        kind=STRING,
        source_id=STRING,
        title=STRING,
        category=STRING,
        language=STRING,
        licence=STRING,
        channel=STRING,
        upload_date=STRING,
        path=STRING,  # null: not downloaded
        num_bytes=INT64,
        sha256=STRING,
        duplicate_of=STRING,  # video_id of the earlier video with the same bytes, else null
        container=STRING,
        duration_s=DOUBLE,
        width=INT32,
        height=INT32,
        fps=DOUBLE,
        video_codec=STRING,
        audio_codec=STRING,
        extractor=STRING,
        transcript_origin=STRING,
        word_times=STRING,
        num_words=INT32,
        split=STRING,
        ordinal=INT64,
        extra=STRING,
        meta=STRING,
    ),
    "sentences": TABLES["sentences"],
    "spans": TABLES["spans"],
    "clips": _schema(
        **{field.name: field.type for field in TABLES["clips"]},
        text=STRING,  # the subtitle, "" where nothing is said; of a clip with reference texts the first of them
        num_words=INT32,
        num_sentences=INT32,
        align_cost=DOUBLE,
        origin=STRING,
        language=STRING,
        unit=STRING,
    ),
    # Reference texts of the clips that were cut from given spans: what a benchmark's videos are searched by.
    "texts": _schema(
        clip_id=STRING,
        n=INT32,  # from 0, in the order of the source list
        text=STRING,
        video_id=STRING,
        clip_sha256=STRING,  # of the mp4 that it is about
    ),
    "captions": _schema(**{field.name: field.type for field in TABLES["captions"]}, current=BOOL),
    "scores": _schema(
        **{field.name: field.type for field in TABLES["scores"]},
        duplicate_group=STRING,  # clip_id of the group's first clip; null for a clip without near-duplicates
    ),
    "samples": INDEX,
    "clip_edits": TABLES["clip_edits"],
    "edited_clips": TABLES["edited_clips"],
    "edit_rounds": pa.schema([*TABLES["edit_rounds"], ("at", pa.timestamp("us", tz="UTC"))]),
    "failures": _schema(
        stage=STRING,
        item_id=STRING,
        error_class=STRING,
        message=STRING,
        transient=BOOL,
        attempts=INT32,
        at=pa.timestamp("us", tz="UTC"),
        unit=STRING,
        quarantined=BOOL,  # engine.max_attempts are used up, over all runs: only `run --where` tries again
    ),
    # What the corpus was told to forget. It holds hashes alone: enough to know the video again, not to name it.
    "forgotten": _schema(
        video_hash=STRING,  # SHA-256 of the video_id
        url_hash=STRING,  # SHA-256 of the canonical URL
        sha256=STRING,  # of the video file; null: there was none
        reason=STRING,  # as --reason gave it, or null
        at=pa.timestamp("us", tz="UTC"),
        places=pa.list_(PLACE),  # of its clips in the order of packing
    ),
    "runs": _schema(
        run_id=STRING,
        command=STRING,
        started_at=pa.timestamp("us", tz="UTC"),
        ended_at=pa.timestamp("us", tz="UTC"),  # null: still running or killed
        settings=STRING,  # the resolved settings as JSON
        versions=STRING,  # of clipmill and what shapes its output, and the driver's peak memory in MB, as JSON
    ),
}


def sample_key(clip_id: str) -> str:
    """ "VIDEO_ID.3" → "VIDEO_ID_0003": the name of the sample's members inside a tar."""
    video_id, n = clip_id.rsplit(".", 1)
    return f"{video_id}_{int(n):04d}"
