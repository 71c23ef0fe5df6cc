"""What is to be done in each stage, as SQL over the ledger's tables (see `shards.corpus.ledger.StageQuery`).

The chain reads top to bottom. Each stage's key hashes its fingerprint and the *content* of its inputs, so work that
comes out the same stops the wave: a re-segmented video whose spans did not move is not cut again.
"""

from shards.corpus.ledger import StageQuery


def _rows_of(stage: str, table: str) -> str:
    """The rows of `table` that the chosen commits of `stage` wrote."""
    return (
        f"SELECT r.*, c.fresh FROM {table} r JOIN chosen_{stage} c ON r.item_id = c.item_id AND r.key = c.key "
        "AND r.fragment = c.fragment"
    )


DOWNLOAD = StageQuery(
    name="download",
    depends=(),
    # All units: whether a video is a duplicate depends on every other video.
    inputs="""
        SELECT video_id AS item_id, unit, 1.0::DOUBLE AS cost,
               md5(concat_ws('|', $fingerprint, url, coalesce(subtitle, ''))) AS key
        FROM sources
        QUALIFY row_number() OVER (PARTITION BY video_id ORDER BY ordinal, fragment) = 1
    """,
    current=(
        f"CREATE OR REPLACE TEMP TABLE all_videos AS {_rows_of('download', 'downloads')}",
        """
        -- Of videos with the same bytes only the first is cut; but one with reference texts is never another's copy:
        -- its texts would go with it.
        CREATE OR REPLACE TEMP TABLE current_videos AS
        WITH contents AS (
            SELECT v.video_id, min(s.ordinal) AS ordinal,
                   if(bool_or(len(s.texts) > 0), 'video ' || v.video_id, any_value(v.sha256)) AS content
            FROM all_videos v JOIN sources s USING (video_id) GROUP BY v.video_id
        ), canonical AS (
            SELECT content, arg_min(video_id, ordinal) AS video_id FROM contents GROUP BY content
        )
        SELECT v.*, nullif(c.video_id, v.video_id) AS duplicate_of
        FROM all_videos v JOIN contents k USING (video_id) JOIN canonical c USING (content) SEMI JOIN scope USING (unit)
        """,
        "DELETE FROM state_download WHERE unit NOT IN (SELECT unit FROM scope)",
    ),
    payload="""
        SELECT w.item_id, w.key, w.attempts, w.cost, s.* EXCLUDE (item_id, key, fragment)
        FROM work w JOIN sources s ON s.video_id = w.item_id
        QUALIFY row_number() OVER (PARTITION BY w.item_id ORDER BY s.ordinal, s.fragment) = 1
        ORDER BY s.ordinal
    """,
)

TRANSCRIBE = StageQuery(
    name="transcribe",
    depends=("download",),
    inputs="""
        -- Costs are in seconds of video to cut: reading a subtitle is nothing, listening is about as dear as cutting.
        SELECT video_id AS item_id, unit, coalesce(duration_s, 0) / if(len(subtitles) > 0, 100, 1) AS cost,
               md5(concat_ws('|', $fingerprint, sha256, subtitles::VARCHAR)) AS key
        FROM current_videos WHERE duplicate_of IS NULL
    """,
    current=(f"CREATE OR REPLACE TEMP TABLE current_transcripts AS {_rows_of('transcribe', 'transcripts')}",),
    payload="""
        SELECT w.item_id, w.key, w.attempts, w.cost, v.video_id, v.path, v.sha256, v.duration_s, v.subtitles,
               v.audio_codec,
               coalesce(s.language, v.language) AS language
        FROM work w JOIN current_videos v ON v.video_id = w.item_id JOIN sources s ON s.video_id = w.item_id
        ORDER BY w.item_id
    """,
)

SEGMENT = StageQuery(
    name="segment",
    depends=("transcribe", "download"),
    inputs="""
        SELECT t.video_id AS item_id, t.unit, coalesce(v.duration_s, 0) / 100 AS cost,
               md5(concat_ws('|', $fingerprint, t.digest, s.spans::VARCHAR, v.duration_s, v.sha256)) AS key
        FROM current_transcripts t JOIN current_videos v USING (video_id) JOIN sources s USING (video_id)
    """,
    current=(
        f"CREATE OR REPLACE TEMP TABLE current_sentences AS {_rows_of('segment', 'sentences')}",
        f"CREATE OR REPLACE TEMP TABLE current_spans AS {_rows_of('segment', 'spans')}",
        # Reference texts of given spans: they are about those pieces of the video and no others.
        """
        CREATE OR REPLACE TEMP TABLE current_texts AS
        WITH given AS (SELECT clip_id, video_id, n FROM current_spans WHERE origin = 'given'),
        referred AS (
            SELECT video_id, unnest(texts, max_depth := 2), generate_subscripts(texts, 1) AS position
            FROM sources WHERE len(texts) > 0 AND video_id IN (SELECT video_id FROM given)
        )
        SELECT g.clip_id, g.video_id, r.text,
               (row_number() OVER (PARTITION BY g.clip_id ORDER BY r.position) - 1)::INT AS n
        FROM given g JOIN referred r ON r.video_id = g.video_id AND r.n = g.n
        """,
    ),
    payload="""
        SELECT w.item_id, w.key, w.attempts, w.cost, v.video_id, v.path, v.sha256, v.duration_s, t.words,
               s.spans AS given_spans
        FROM work w JOIN current_videos v ON v.video_id = w.item_id JOIN current_transcripts t ON t.video_id = w.item_id
        JOIN sources s ON s.video_id = w.item_id
        ORDER BY w.item_id
    """,
)

CUT = StageQuery(
    name="cut",
    depends=("segment", "download"),
    inputs="""
        SELECT p.video_id AS item_id, p.unit, coalesce(any_value(v.duration_s), 0) AS cost,
               md5(concat_ws('|', $fingerprint, any_value(v.sha256),
                             string_agg(concat_ws('@', p.clip_id, p.start_s, p.end_s), ',' ORDER BY p.n))) AS key
        FROM current_spans p JOIN current_videos v USING (video_id)
        GROUP BY p.video_id, p.unit
    """,
    current=(
        f"""
        CREATE OR REPLACE TEMP TABLE current_clips AS
        SELECT r.*, coalesce(x.text, p.text) AS text,
               coalesce(len(regexp_extract_all(x.text, '\\S+'))::INT, p.num_words) AS num_words,
               if(x.text IS NULL, p.num_sentences, NULL) AS num_sentences,
               if(x.text IS NULL, p.align_cost, NULL) AS align_cost, p.origin, t.language
        FROM ({_rows_of("cut", "clips")}) r
        JOIN current_spans p ON p.clip_id = r.clip_id AND p.start_s = r.span_start_s AND p.end_s = r.span_end_s
             AND coalesce(p.source_sha256 = r.source_sha256, true)
        LEFT JOIN current_transcripts t ON t.video_id = r.video_id
        LEFT JOIN current_texts x ON x.clip_id = r.clip_id AND x.n = 0
        """,
    ),
    payload="""
        SELECT w.item_id, w.key, w.attempts, w.cost, v.video_id, v.path, v.duration_s, v.sha256,
               list({clip_id: p.clip_id, n: p.n, start_s: p.start_s, end_s: p.end_s} ORDER BY p.n) AS spans
        FROM work w JOIN current_videos v ON v.video_id = w.item_id JOIN current_spans p ON p.video_id = w.item_id
        GROUP BY ALL ORDER BY w.item_id
    """,
)

CAPTION = StageQuery(
    name="caption",
    depends=("cut",),
    inputs="""
        SELECT clip_id AS item_id, unit, len(frames)::DOUBLE AS cost,
               md5(concat_ws('|', $fingerprint, list_transform(frames, lambda f: f.sha256)::VARCHAR)) AS key
        FROM current_clips WHERE len(frames) > 0
    """,
    current=(
        # Every captioner's text of the frames that the clips have now; the chosen commit's is the one that is served.
        """
        CREATE OR REPLACE TEMP TABLE current_captions AS
        SELECT r.* EXCLUDE (fragment), r.unit AS caption_unit, coalesce(c.item_id IS NOT NULL, false) AS current
        FROM captions r
        JOIN current_clips k ON k.clip_id = r.clip_id AND k.frames[r.frame_index + 1].sha256 = r.frame_sha256
        LEFT JOIN chosen_caption c ON c.item_id = r.item_id AND c.key = r.key AND c.fragment = r.fragment
        QUALIFY row_number() OVER (PARTITION BY r.clip_id, r.frame_index, r.frame_sha256, r.fingerprint
                                   ORDER BY c.item_id IS NULL, r.fragment DESC) = 1
        """,
    ),
    payload="""
        SELECT w.item_id, w.key, w.attempts, w.cost, k.clip_id, k.tar, k.frames
        FROM work w JOIN current_clips k ON k.clip_id = w.item_id ORDER BY w.item_id
    """,
)

SCORE = StageQuery(
    name="score",
    depends=("caption", "cut", "segment"),
    inputs="""
        SELECT k.clip_id AS item_id, k.unit, 1.0::DOUBLE AS cost,
               md5(concat_ws('|', $fingerprint, k.frame_sha256, md5(coalesce(k.text, '')), md5(coalesce(c.text, '')),
                             k.duration_s)) AS key
        FROM current_clips k LEFT JOIN current_captions c ON c.clip_id = k.clip_id AND c.current AND c.frame_index = 0
        WHERE len(k.frames) > 0
    """,
    # A score of other texts than the present ones would be a wrong pair: only fresh rows count.
    current=(
        f"CREATE OR REPLACE TEMP TABLE current_scores AS SELECT * FROM ({_rows_of('score', 'scores')}) WHERE fresh",
    ),
    payload="""
        SELECT w.item_id, w.key, w.attempts, w.cost, k.clip_id, k.tar, k.frames[1] AS frame, k.frame_sha256,
               k.duration_s, k.text AS subtitle, coalesce(c.text, '') AS caption
        FROM work w JOIN current_clips k ON k.clip_id = w.item_id
        LEFT JOIN current_captions c ON c.clip_id = w.item_id AND c.current AND c.frame_index = 0
        ORDER BY w.item_id
    """,
)

QUERIES = (DOWNLOAD, TRANSCRIBE, SEGMENT, CUT, CAPTION, SCORE)
