-- The views of a manifest, made over the tables of `MANIFEST` in shards/corpus/schema.py. One row of `catalog` is one
-- clip with all its facts; `pack.where` and training's selections are conditions on it.

-- One row per clip: the clip, its text (subtitle, or first reference text), its served caption, its
-- scores, its video, its reference texts, its shard. `is_duplicate` is true for all clips of a near-duplicate group but
-- the first, so that `WHERE NOT is_duplicate` keeps one of each. `$columns` are those that schema.py declares with
-- in_catalog, `$joins` the tables of further stages that have such a column.
CREATE OR REPLACE VIEW catalog AS
SELECT
    clips.* EXCLUDE (language),
    coalesce(clips.language, videos.language) AS language,
    $columns,
    coalesce(scores.duplicate_group <> clips.clip_id, false) AS is_duplicate
FROM clips
LEFT JOIN videos ON videos.video_id = clips.video_id
LEFT JOIN (SELECT * FROM captions WHERE current AND frame_index = 0) captions ON captions.clip_id = clips.clip_id
LEFT JOIN scores ON scores.clip_id = clips.clip_id
LEFT JOIN (SELECT clip_id, list(text ORDER BY n) AS text FROM texts GROUP BY clip_id) texts
    ON texts.clip_id = clips.clip_id
LEFT JOIN samples ON samples.clip_id = clips.clip_id
$joins;

-- Totals of the corpus, in one row. Only sentences inside clips count.
CREATE OR REPLACE VIEW totals AS
SELECT
    (SELECT count(*) FROM videos) AS num_sources,
    (SELECT count(*) FROM videos WHERE path IS NOT NULL AND duplicate_of IS NULL) AS num_videos,
    k.num_clips,
    n.num_sentences,
    (SELECT count(*) FROM captions WHERE current) AS num_captions,
    p.num_samples,
    p.num_shards,
    k.clip_hours,
    k.mean_clip_s,
    n.words_per_sentence,
    k.words_per_clip,
    k.clip_bytes,
    p.sample_bytes
FROM
    (SELECT count(*) AS num_clips, coalesce(sum(duration_s), 0) / 3600 AS clip_hours, avg(duration_s) AS mean_clip_s,
            avg(num_words) AS words_per_clip, coalesce(sum(num_bytes), 0)::BIGINT AS clip_bytes FROM clips) k,
    (SELECT count(*) AS num_sentences, avg(num_words) AS words_per_sentence
     FROM sentences WHERE clip_id IS NOT NULL) n,
    (SELECT count(*) AS num_samples, count(DISTINCT shard) AS num_shards,
            coalesce(sum(mp4_bytes + coalesce(jpg_bytes, 0) + coalesce(txt_bytes, 0) + coalesce(json_bytes, 0)), 0)::BIGINT
                AS sample_bytes FROM samples) p;

-- The yield, step by step. `kept` is the share of the step before, by number of items; for spans, by duration. Behind
-- the steps come the videos without a clip, by reason; there `kept` is their share of all videos.
CREATE OR REPLACE VIEW funnel AS
WITH steps(step, ordinal, num_items, hours) AS (
    SELECT 'source', 1, count(*), NULL::DOUBLE FROM videos
    UNION ALL SELECT 'video', 2, count(*), coalesce(sum(duration_s), 0) / 3600 FROM videos
        WHERE path IS NOT NULL AND duplicate_of IS NULL
    UNION ALL SELECT 'span', 3, count(*), coalesce(sum(end_s - start_s), 0) / 3600 FROM spans
    UNION ALL SELECT 'clip', 4, count(*), coalesce(sum(duration_s), 0) / 3600 FROM clips
    UNION ALL SELECT 'caption', 5, count(*), coalesce(sum(duration_s), 0) / 3600 FROM clips
        WHERE clip_id IN (SELECT clip_id FROM captions WHERE current AND frame_index = 0)
    UNION ALL SELECT 'sample', 6, count(*), coalesce(sum(duration_s), 0) / 3600 FROM samples
    UNION ALL SELECT 'no clip: ' || no_clip_reason, 7, count(*), coalesce(sum(duration_s), 0) / 3600 FROM videos
        WHERE no_clip_reason IS NOT NULL GROUP BY no_clip_reason
)
SELECT
    step,
    num_items,
    CASE WHEN step = 'span' THEN hours / nullif(lag(hours) OVER (ORDER BY ordinal), 0)
         WHEN ordinal = 7 THEN num_items / nullif(max(num_items) FILTER (step = 'video') OVER (), 0)
         WHEN step = 'sample' THEN num_items / nullif(max(num_items) FILTER (step = 'clip') OVER (), 0)
         ELSE num_items / nullif(lag(num_items) OVER (ORDER BY ordinal), 0) END AS kept,
    hours
FROM steps
ORDER BY ordinal, num_items DESC, step;

-- Histogram of the clips' lengths, two seconds a bin: [from_s, to_s).
CREATE OR REPLACE VIEW clip_lengths AS
SELECT bin * 2.0 AS from_s, bin * 2.0 + 2 AS to_s, count(*) AS num_clips, sum(duration_s) / 3600 AS hours
FROM (SELECT floor(duration_s / 2)::INT AS bin, duration_s FROM clips)
GROUP BY bin
ORDER BY bin;

-- Histogram of the words per clip, five a bin; clips without speech have their own bin.
CREATE OR REPLACE VIEW words_per_clip AS
SELECT from_words, from_words + CASE WHEN from_words = 0 THEN 0 ELSE 4 END AS to_words, count(*) AS num_clips
FROM (SELECT CASE WHEN num_words = 0 THEN 0 ELSE (num_words - 1) // 5 * 5 + 1 END AS from_words FROM clips)
GROUP BY from_words
ORDER BY from_words;

-- Histogram of the words per sentence, five a bin.
CREATE OR REPLACE VIEW words_per_sentence AS
SELECT from_words, from_words + 4 AS to_words, count(*) AS num_sentences
FROM (SELECT (num_words - 1) // 5 * 5 + 1 AS from_words FROM sentences WHERE clip_id IS NOT NULL AND num_words > 0)
GROUP BY from_words
ORDER BY from_words;

-- Shares of videos and of clips by category, the largest first; NULL: the source named none.
CREATE OR REPLACE VIEW categories AS
WITH v AS (
    SELECT category, count(*) AS num_videos FROM videos WHERE path IS NOT NULL AND duplicate_of IS NULL GROUP BY ALL
), c AS (
    SELECT v.category, sum(k.num_clips)::BIGINT AS num_clips, sum(k.hours) AS hours
    FROM (SELECT video_id, count(*) AS num_clips, sum(duration_s) / 3600 AS hours FROM clips GROUP BY video_id) k
    LEFT JOIN videos v USING (video_id)
    GROUP BY ALL
)
SELECT
    coalesce(v.category, c.category) AS category,
    coalesce(num_videos, 0) AS num_videos,
    num_videos / sum(num_videos) OVER () AS video_share,
    coalesce(num_clips, 0) AS num_clips,
    coalesce(num_clips, 0) / sum(num_clips) OVER () AS clip_share,
    coalesce(hours, 0) AS hours
FROM v FULL JOIN c ON v.category IS NOT DISTINCT FROM c.category
ORDER BY num_clips DESC, category;

-- Contents of a benchmark, by split. A video without a clip has failed. Repeated texts equal another text of the split,
-- so as queries they are ambiguous.
CREATE OR REPLACE VIEW splits AS
WITH t AS (
    SELECT split, sum(times)::BIGINT AS num_texts,
           coalesce(sum(times) FILTER (times > 1), 0)::BIGINT AS num_repeated_texts
    FROM (SELECT v.split, t.text, count(*) AS times FROM texts t JOIN videos v USING (video_id) GROUP BY v.split, t.text)
    GROUP BY split
), c AS (
    SELECT v.split, count(*) AS num_clips, sum(k.duration_s) / 3600 AS hours
    FROM clips k JOIN videos v USING (video_id) GROUP BY v.split
)
SELECT
    v.split,
    v.num_videos,
    coalesce(c.num_clips, 0) AS num_clips,
    coalesce(t.num_texts, 0) AS num_texts,
    coalesce(t.num_repeated_texts, 0) AS num_repeated_texts,
    coalesce(c.hours, 0) AS hours
FROM (SELECT split, count(*) AS num_videos FROM videos WHERE split IS NOT NULL GROUP BY split) v
LEFT JOIN c USING (split)
LEFT JOIN t USING (split)
ORDER BY v.split;

-- Failures counted by stage and class, the most frequent first.
CREATE OR REPLACE VIEW failures_by_reason AS
SELECT stage, error_class, count(*) AS num_items, count(*) FILTER (transient) AS num_transient,
       count(*) FILTER (quarantined) AS num_quarantined,
       max(attempts) AS max_attempts, min(message) AS example
FROM failures
GROUP BY stage, error_class
ORDER BY num_items DESC, stage, error_class;

-- Picture sizes of the downloaded videos, with the number of their clips.
CREATE OR REPLACE VIEW resolutions AS
SELECT v.width, v.height, count(*) AS num_videos, coalesce(sum(c.num_clips), 0)::BIGINT AS num_clips,
       sum(v.duration_s) / 3600 AS hours
FROM (SELECT * FROM videos WHERE path IS NOT NULL AND duplicate_of IS NULL) v
LEFT JOIN (SELECT video_id, count(*) AS num_clips FROM clips GROUP BY video_id) c USING (video_id)
GROUP BY v.width, v.height
ORDER BY num_videos DESC, v.height, v.width;

CREATE OR REPLACE VIEW languages AS
SELECT language, count(*) AS num_clips, sum(duration_s) / 3600 AS hours FROM clips GROUP BY language
ORDER BY num_clips DESC, language;

-- Captioners by settings (fingerprint), and how many of their captions are served.
CREATE OR REPLACE VIEW captioners AS
SELECT captioner, fingerprint, count(*) AS num_captions, count(*) FILTER (current) AS num_served,
       count(*) FILTER (text = '') AS num_empty, avg(score) AS mean_score
FROM captions
GROUP BY captioner, fingerprint
ORDER BY num_served DESC, captioner, fingerprint;

-- Groups of near-duplicate clips, the largest first.
CREATE OR REPLACE VIEW duplicates AS
SELECT s.duplicate_group, count(*) AS num_clips, count(DISTINCT c.video_id) AS num_videos,
       list(c.clip_id ORDER BY c.clip_id)[:20] AS first_clips
FROM (SELECT clip_id, duplicate_group FROM scores WHERE duplicate_group IS NOT NULL) s
JOIN clips c USING (clip_id)
GROUP BY s.duplicate_group
ORDER BY num_clips DESC, s.duplicate_group;

-- Edits of clips' boundaries, by round and reason. Growth and shift are relative to the first boundaries.
CREATE OR REPLACE VIEW edits_by_reason AS
SELECT editing, round, reason, count(*) AS num_clips, avg(score_before) AS mean_score,
       avg(score_after - score_before) AS mean_gain,
       avg(end_s - start_s - (base_end_s - base_start_s)) AS mean_growth_s,
       avg((start_s + end_s - base_start_s - base_end_s) / 2) AS mean_shift_s
FROM clip_edits
GROUP BY editing, round, reason
ORDER BY editing, round, num_clips DESC, reason;
