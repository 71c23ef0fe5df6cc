-- Ten queries worth having. Each ends with a semicolon; the comment above it is its title. `clipmill sql DIR "…"` runs any
-- of them, `python -m bench.sql` times them all on a million clips. `catalog` has every column of a clip in one row; a join
-- of two of its tables is faster where two are enough.

-- 1. What is in it?
SELECT num_videos, num_clips, num_sentences, num_samples, clip_hours, mean_clip_s, words_per_sentence FROM totals;

-- 2. Where did it go? Sources, videos, spans, clips, captions, samples, and the share that each step kept.
SELECT * FROM funnel;

-- 3. What failed, why, and what may work next time?
SELECT stage, error_class, num_items, num_transient, example FROM failures_by_reason LIMIT 20;

-- 4. Which categories is it made of?
SELECT category, num_videos, video_share, num_clips, clip_share, hours FROM categories;

-- 5. How long are the clips?
SELECT from_s, to_s, num_clips, bar(num_clips, 0, max(num_clips) OVER (), 40) AS histogram
FROM clip_lengths ORDER BY from_s;

-- 6. The clips whose picture, speech and caption agree best.
SELECT clip_id, caption, text, caption_similarity, subtitle_similarity
FROM catalog
WHERE caption_similarity IS NOT NULL AND subtitle_similarity IS NOT NULL
ORDER BY caption_similarity + subtitle_similarity DESC, clip_id LIMIT 10;

-- 7. Where is something said, with the address and the second to look at?
SELECT clip_id, url, round(start_s, 1) AS at_s, text
FROM clips JOIN videos USING (video_id) WHERE text ILIKE '%circle%' ORDER BY clip_id LIMIT 10;

-- 8. How much is left if I am strict? Clips and hours by how well the caption fits the picture.
WITH levels AS (
    SELECT floor(caption_similarity * 20) / 20 AS level, count(*) AS num_clips, sum(duration_s) / 3600 AS hours
    FROM clips JOIN scores USING (clip_id)
    WHERE num_words >= 3 AND motion > 0.01 AND (duplicate_group IS NULL OR duplicate_group = clip_id)
    GROUP BY level
)
SELECT threshold, sum(num_clips) AS num_clips, sum(hours) AS hours
FROM levels, (VALUES (0.0), (0.1), (0.15), (0.2), (0.25), (0.3)) t(threshold)
WHERE level >= threshold
GROUP BY threshold ORDER BY threshold;

-- 9. What two captioners say of the same frame, where they differ most in length.
SELECT a.clip_id, a.captioner, a.text, b.captioner AS other, b.text AS other_text
FROM captions a JOIN captions b
  ON a.clip_id = b.clip_id AND a.frame_index = b.frame_index AND a.current AND NOT b.current
ORDER BY abs(length(a.text) - length(b.text)) DESC, a.clip_id LIMIT 10;

-- 10. Which clips are in the corpus more than once, and from how many videos?
SELECT duplicate_group, num_clips, num_videos, first_clips FROM duplicates LIMIT 10;
