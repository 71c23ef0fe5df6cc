"""Make a synthetic manifest of any number of clips inside DuckDB, for tests and for `bench/sql.py`.

Every value is a function of the clip's number and the seed. There are no media: offsets and hashes are invented.
"""

from pathlib import Path

import duckdb

from shards.corpus.manifest import view_statements
from shards.corpus.schema import MANIFEST

CLIPS_PER_VIDEO = 30  # HD-VILA's mean

# `u(i, name)` is a number in [0, 1) that depends on the row, the name of its use, and the seed.
_MACROS = """
CREATE TEMP MACRO u(i, name) AS (hash(i, name, $seed) >> 11) / 9007199254740992.0;
CREATE TEMP MACRO hex64(i, name) AS sha256(concat(i, name, $seed));
CREATE TEMP MACRO pick(i, name, items) AS items[1 + floor(u(i, name) * len(items))::INT];
CREATE TEMP MACRO vid(i) AS concat('v', substr(md5(concat('video', i, $seed)), 1, 10));
CREATE TEMP MACRO cid(i) AS concat(vid(i // $per_video), '.', i % $per_video);
CREATE TEMP MACRO sentence(i, n) AS array_to_string(list_transform(range(n),
    lambda k: list_extract(['red', 'blue', 'circle', 'square', 'moves', 'left', 'right', 'the', 'a', 'over', 'sea',
                            'field', 'we', 'see', 'now', 'then'], 1 + (hash(i, k, $seed) % 16)::INT)), ' ');
CREATE TEMP MACRO words(i) AS CASE WHEN u(i, 'silent') < 0.05 THEN 0 ELSE 3 + (u(i, 'words') * 59)::INT END;
CREATE TEMP MACRO seconds(i) AS 2.0 + 22.8 * u(i, 'seconds');
"""

_FILL = {
    "videos": """
        SELECT vid(i) AS video_id, printf('u%05d', i // 32) AS unit,
               'https://video.example/watch?v=' || vid(i) AS url, 'url' AS kind, sentence(i, 5) AS title,
               pick(i, 'category', ['Music','Gaming','Education','Sports','News & Politics','Entertainment',
                                    'People & Blogs', 'Film & Animation', 'Autos & Vehicles']) AS category,
               pick(i, 'language', ['en','en','en','de','es']) AS language,
               pick(i, 'licence', ['youtube','creativeCommon']) AS licence,
               concat('channel ', (u(i, 'channel') * 1000)::INT) AS channel, '2024-05-01' AS upload_date,
               concat('sources/', vid(i), '.mp4') AS path, 20000000 AS num_bytes, hex64(i, 'video') AS sha256,
               'mov' AS container, 420.0 AS duration_s, 1280 AS width, 720 AS height, 30.0 AS fps,
               'h264' AS video_codec, 'aac' AS audio_codec, 'http' AS extractor,
               pick(i, 'origin', ['auto','manual','whisper']) AS transcript_origin,
               pick(i, 'times', ['tags','cues','asr']) AS word_times, 900 AS num_words, i AS ordinal
        FROM range($num_videos) r(i)
    """,
    "spans": """
        SELECT vid(i // $per_video) AS video_id, cid(i) AS clip_id, i % $per_video AS n,
               (i % $per_video) * 14.0 AS start_s, (i % $per_video) * 14.0 + seconds(i) AS end_s,
               'sentences' AS origin, sentence(i, words(i)) AS text,
               words(i) AS num_words,
               CASE WHEN words(i) > 0 THEN 1 ELSE 0 END AS num_sentences, u(i, 'align') * 0.2 AS align_cost,
               hex64(i // $per_video, 'video') AS source_sha256
        FROM range($num_clips) r(i)
    """,
    "sentences": """
        SELECT video_id, n, start_s, end_s, text, num_words, align_cost, clip_id, source_sha256
        FROM spans WHERE num_words > 0
    """,
    "clips": """
        SELECT vid(i // $per_video) AS video_id, cid(i) AS clip_id, i % $per_video AS n,
               (i % $per_video) * 14.0 AS span_start_s, (i % $per_video) * 14.0 + seconds(i) AS span_end_s,
               span_start_s AS start_s, span_end_s AS end_s, greatest(1, round(seconds(i) * 3)) / 3 AS duration_s,
               greatest(1, round(seconds(i) * 3)) AS num_frames, 3.0 AS fps, 456 AS width, 256 AS height,
               'h264' AS codec, false AS has_audio, (100000 + 200000 * u(i, 'bytes'))::BIGINT AS num_bytes,
               hex64(i, 'mp4') AS sha256,
               [{time_s: span_start_s + 3.0, sha256: hex64(i, 'jpg'), "offset": i * 400000 + 350000,
                 num_bytes: 20000 + (i % 977)}] AS frames,
               span_start_s + 3.0 AS frame_time_s, hex64(i, 'jpg') AS frame_sha256, u(i, 'motion') * 0.3 AS motion,
               u(i, 'brightness') AS brightness, u(i, 'shot') * 60 AS shot_score,
               [hash(i, 'a', $seed), hash(i, 'b', $seed), hash(i, 'c', $seed)] AS phash,
               printf('clips/u%05d.tar', i // $per_video // 32) AS tar, i * 400000 AS mp4_offset,
               hex64(i // $per_video, 'video') AS source_sha256, sentence(i, words(i)) AS text, words(i) AS num_words,
               CASE WHEN words(i) > 0 THEN 1 ELSE 0 END AS num_sentences, u(i, 'align') * 0.2 AS align_cost,
               'sentences' AS origin,
               pick(i // $per_video, 'language', ['en','en','en','de','es']) AS language,
               printf('u%05d', i // $per_video // 32) AS unit
        FROM range($num_clips) r(i) ORDER BY video_id, n
    """,
    "captions": """
        SELECT cid(i) AS clip_id, 0 AS frame_index, hex64(i, 'jpg') AS frame_sha256,
               (i % $per_video) * 14.0 + 3.0 AS frame_time_s, captioner, captioner AS fingerprint,
               sentence(i + 7 * len(captioner), 8) AS text, -u(i, captioner) * 2 AS score, 9 AS num_tokens,
               captioner = 'coca' AS current
        FROM range($num_clips) r(i), (VALUES ('coca'), ('older')) c(captioner)
        WHERE u(i, 'captioned') < 0.97 AND (captioner = 'coca' OR i % 10 = 0) ORDER BY clip_id
    """,
    "scores": """
        SELECT cid(i) AS clip_id, 'clip' AS model, 'f' AS fingerprint, hex64(i, 'jpg') AS frame_sha256,
               CASE WHEN words(i) > 0 THEN 0.1 + 0.25 * u(i, 'sub') END AS subtitle_similarity,
               CASE WHEN u(i, 'captioned') < 0.97 THEN 0.15 + 0.2 * u(i, 'cap') END AS caption_similarity,
               CASE WHEN words(i) > 0 THEN u(i, 'text') END AS text_similarity,
               words(i) / seconds(i) AS words_per_s, u(i, 'repeat') * 0.5 AS repeated_word_ratio,
               CASE WHEN i % 50 < 2 THEN cid(i - i % 50) END AS duplicate_group
        FROM range($num_clips) r(i) ORDER BY clip_id
    """,
    "samples": """
        SELECT clip_id, video_id, video_id || printf('_%04d', n) AS key, printf('%06d.tar', rank // 800) AS shard,
               rank % 800 AS position, rank % 800 * 400000 AS mp4_offset, num_bytes AS mp4_bytes, sha256 AS mp4_sha256,
               rank % 800 * 400000 + 300512 AS jpg_offset, frames[1].num_bytes AS jpg_bytes,
               frame_sha256 AS jpg_sha256,
               rank % 800 * 400000 + 330000 AS txt_offset, strlen(text) AS txt_bytes,
               rank % 800 * 400000 + 340000 AS json_offset, 900 AS json_bytes, num_frames, fps, duration_s,
               width, height, text AS subtitle, 'a caption' AS caption, 'coca' AS captioner, -1.0 AS caption_score,
               frame_time_s, language
        FROM (SELECT *, row_number() OVER (ORDER BY hash(clip_id)) - 1 AS rank FROM clips WHERE num_words > 0)
        ORDER BY shard, position
    """,
    "failures": """
        SELECT pick(i, 'stage', ['download','download','cut','caption']) AS stage, vid(1000000000 + i) AS item_id,
               pick(i, 'class', ['private','removed','not-found','timeout','not-a-video']) AS error_class,
               'HTTP Error 404' AS message, i % 3 = 0 AS transient, 3 AS attempts,
               TIMESTAMPTZ '2026-01-01 00:00:00+00' AS at, 'u00000' AS unit
        FROM range($num_videos // 10) r(i)
    """,
    "runs": """
        SELECT 'run' AS run_id, 'build' AS command, TIMESTAMPTZ '2026-01-01 00:00:00+00' AS started_at,
               TIMESTAMPTZ '2026-01-01 01:00:00+00' AS ended_at, '{}' AS settings, '{}' AS versions
    """,
}


def make_manifest(path: str | Path, num_clips: int, seed: int = 0) -> Path:
    """Write a manifest with all tables and views; a million clips take well under a minute."""
    path = Path(path)
    path.unlink(missing_ok=True)
    with duckdb.connect(str(path)) as connection:
        values = {"seed": seed, "per_video": CLIPS_PER_VIDEO, "num_clips": num_clips}
        values["num_videos"] = -(-num_clips // CLIPS_PER_VIDEO)
        connection.execute(_filled(_MACROS, values))
        for table, schema in MANIFEST.items():
            connection.register("empty", schema.empty_table())
            connection.execute(f"CREATE TABLE {table} AS SELECT * FROM empty")
            connection.unregister("empty")
        for table, select in _FILL.items():
            connection.execute(f"INSERT INTO {table} BY NAME {_filled(select, values)}")
        connection.execute(view_statements())
    return path


def _filled(sql: str, values: dict[str, int]) -> str:
    for name, value in values.items():
        sql = sql.replace(f"${name}", str(value))
    return sql
