"""Check that a step of a build costs the same however large the corpus is (gates), on a ledger of made-up rows.

    python -m bench.scale.ledger [--videos 1000 10000 100000] [--folder DIR]

Every video has ten clips and is done with every stage; volumes have 2,000 videos. At each size:

derive   CPU seconds of deriving the items of one unit. Gate: at the largest size at most 1.5 times that at the smallest
publish  CPU seconds of publishing the manifest after the rows of one unit have changed, as during a build; the same
         with the near-duplicate groups, as at its end; and of publishing it whole, without them
start    wall seconds of opening the ledger and finding nothing to do
bytes    of the ledger and of the manifest, per clip

And for one volume of 800 videos, with the fragments of its commits:

fresh    CPU milliseconds a commit of loading it without the cache, loose and merged. Gate: merged at most a fifth

The corpus grows from one size to the next, since making it takes most of the time. CPU seconds are those of all threads
of this process, which other work on the machine changes less than the wall seconds.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.engine import registry
from shards.corpus.fragments import table_schema, write_commit
from shards.corpus.ledger import Ledger
from shards.corpus.manifest import publish
from shards.corpus.schema import LEDGER, TABLES
from shards.corpus.volume_files import INDEX, remove_cache

UNIT_VIDEOS, VOLUME_VIDEOS, CLIPS = 8, 2000, 10
MOST_GROWTH = 1.5
FRESH_VIDEOS, MOST_OF_LOOSE = 800, 0.2
RUN = {"run_id": "bench", "max_attempts": 3}
PRINTS = {stage.name: f"{stage.name}-1" for stage in registry.stages()}

_SOURCES = f"""
    INSERT INTO {INDEX}.all_sources BY NAME
    SELECT printf('v%08d', i) AS item_id, item_id AS video_id, printf('u%06d', i // {UNIT_VIDEOS}) AS unit,
           'ingested' AS key, 'https://video.example/watch?v=' || item_id AS url, 'url' AS kind, i AS ordinal,
           $volume AS volume, 'ingest-' || $volume AS fragment
    FROM range($first, $last) r(i)
"""

_LEDGER = """
    INSERT INTO ledger BY NAME
    SELECT '$stage' AS stage, item_id, unit, key, '$stage-1' AS fingerprint, 'done' AS status, 1 AS attempts,
           1 AS num_rows, 1.0 AS wall_s, 1.0 AS cpu_s, TIMESTAMPTZ '2024-05-01' AS "at", 'made' AS run_id,
           '$stage-' || unit || '-0123456789ab' AS fragment
    FROM state_$stage WHERE status = 'pending'
"""

_OF_ITEM = "item_id, unit, key, '$stage-' || unit || '-0123456789ab' AS fragment"

# A text of some sixty letters, which no two clips share.
_TEXT = "md5(clip_id) || ' ' || substr(sha256(clip_id), 1, 28)"

# Rows of the items that are pending, by stage.
_ROWS: dict[str, dict[str, str]] = {
    "download": {
        "downloads": """
            SELECT $item, item_id AS video_id, 'sources/' || unit || '/' || item_id || '.mp4' AS path,
                   20000000 AS num_bytes, sha256(item_id) AS sha256, 'mov' AS container, 420.0 AS duration_s,
                   1280 AS width, 720 AS height, 30.0 AS fps, 'h264' AS video_codec, 'aac' AS audio_codec,
                   'title of ' || item_id AS title, 'http' AS extractor FROM state_download WHERE status = 'pending'
        """
    },
    "transcribe": {
        "transcripts": """
            SELECT $item, item_id AS video_id, 'en' AS language, 'manual' AS origin, 'cues' AS word_times,
                   100 AS num_words, md5(item_id) AS digest FROM state_transcribe WHERE status = 'pending'
        """
    },
    "segment": {
        table: f"""
            SELECT $item, item_id AS video_id, concat(item_id, '.', n) AS clip_id, n::INT AS n, 40.0 * n AS start_s,
                   40.0 * n + 12.5 AS end_s, {_TEXT} AS text, 12 AS num_words, {more} sha256(item_id) AS source_sha256
            FROM state_segment, range({CLIPS}) r(n) WHERE status = 'pending'
        """
        for table, more in (("spans", "'sentences' AS origin,"), ("sentences", ""))
    },
    "cut": {
        "clips": """
            SELECT s.*, p.video_id, p.clip_id, p.n, p.start_s AS span_start_s, p.end_s AS span_end_s, p.start_s,
                   p.end_s, 12.5 AS duration_s, 38 AS num_frames, 3.0 AS fps, 456 AS width, 256 AS height,
                   'h264' AS codec, false AS has_audio, 200000 + hash(p.clip_id) % 50000 AS num_bytes,
                   sha256('mp4' || p.clip_id) AS sha256,
                   [{time_s: p.start_s, sha256: sha256(p.clip_id), "offset": 1000, num_bytes: 20000}] AS frames,
                   p.start_s AS frame_time_s, sha256(p.clip_id) AS frame_sha256, 0.1 AS motion, 0.5 AS brightness,
                   [hash(p.clip_id, 1), hash(p.clip_id, 2), hash(p.clip_id, 3)] AS phash,
                   'clips/cut-' || s.unit || '.tar' AS tar, 1000 AS mp4_offset, p.source_sha256
            FROM (SELECT $item FROM state_cut WHERE status = 'pending') s JOIN current_spans p ON p.video_id = s.item_id
        """
    },
    "caption": {
        "captions": f"""
            SELECT $item, item_id AS clip_id, 0 AS frame_index, sha256(item_id) AS frame_sha256, 'coca' AS captioner,
                   {_TEXT.replace("clip_id", "item_id")} AS text, -0.5 AS score, 'caption-1' AS fingerprint
            FROM state_caption WHERE status = 'pending'
        """
    },
    "score": {
        "scores": """
            SELECT $item, item_id AS clip_id, 'clip' AS model, sha256(item_id) AS frame_sha256,
                   'score-1' AS fingerprint, 0.25 AS caption_similarity, 0.2 AS subtitle_similarity
            FROM state_score WHERE status = 'pending'
        """
    },
}


def grow(ledger: Ledger, first: int, last: int) -> None:
    """Add the videos first … last - 1 with the rows of every stage, a volume at a time."""
    connection = ledger.connection
    while first < last:
        volume = first // VOLUME_VIDEOS
        end = min(last, (volume + 1) * VOLUME_VIDEOS)
        connection.execute(_SOURCES, {"volume": volume, "first": first, "last": end})
        connection.execute(
            f"INSERT INTO {INDEX}.volumes VALUES (?, ?) ON CONFLICT DO NOTHING", [volume, first // UNIT_VIDEOS]
        )
        ledger._note_volumes()
        ledger._back(volume)
        ledger.refresh_state(PRINTS, units=[f"u{first // UNIT_VIDEOS:06d}"], **RUN)
        for stage, tables in _ROWS.items():
            ledger.changed(volume)
            ledger.show(volume)
            for table, select in tables.items():
                connection.execute(
                    f"INSERT INTO {table} BY NAME {select.replace('$item', _OF_ITEM).replace('$stage', stage)}"
                )
            connection.execute(_LEDGER.replace("$stage", stage))
        ledger.changed(volume)
        first = end
    ledger.refresh_state(PRINTS, units=None, **RUN)


def cpu_s(function: Callable[[], None], rounds: int = 1) -> float:
    """Return the least CPU seconds of several calls."""
    times = []
    for _ in range(rounds):
        begun = time.process_time()
        function()
        times.append(time.process_time() - begun)
    return min(times)


def measure(root: Path, ledger: Ledger, num_videos: int) -> dict[str, float]:
    """Measure a ledger in which nothing is to do."""
    units = [f"u{num_videos // UNIT_VIDEOS // 2:06d}"]
    row = {"clips": num_videos * CLIPS, "derive": cpu_s(lambda: ledger.refresh_state(PRINTS, units=units, **RUN), 5)}
    ledger.refresh_state(PRINTS, units=None, **RUN)
    row["whole"] = cpu_s(lambda: publish(ledger, groups=False))

    def change_and_publish(groups: bool) -> None:
        ledger.activate(ledger.volume_of(units[0]))
        ledger.connection.execute("UPDATE ledger SET attempts = attempts + 1 WHERE unit = ?", units)
        ledger.changed(ledger.volume_of(units[0]))
        ledger.refresh_state(PRINTS, units=None, **RUN)
        publish(ledger, groups=groups)

    row["publish"] = cpu_s(lambda: change_and_publish(False), 2)
    publish(ledger)
    row["groups"] = cpu_s(lambda: change_and_publish(True), 2)
    ledger.connection.execute("CHECKPOINT")
    files = [ledger.path, *ledger.volumes_folder.iterdir()]
    row["ledger"] = sum(path.stat().st_size for path in files) / row["clips"]
    row["manifest"] = (root / "manifest.duckdb").stat().st_size / row["clips"]
    return row


def start(root: Path) -> float:
    """Return the wall seconds of opening a ledger and finding nothing to do."""
    begun = time.perf_counter()
    ledger = Ledger(root, registry.stages())
    ledger.refresh_state(PRINTS, units=None, **RUN)
    counts = ledger.counts()
    ledger.close()
    assert all(set(of_stage) == {"done"} for of_stage in counts.values()), counts
    return time.perf_counter() - begun


def fresh_start(root: Path) -> tuple[int, float, float]:
    """Return the number of commits of a volume, and CPU ms a commit of loading it loose and merged, without a cache."""
    ledger = Ledger(root, registry.stages())
    grow(ledger, 0, FRESH_VIDEOS)
    tables = [table for table in ("ledger", *TABLES) if table != "sources"]
    names = sorted({name for table in tables for (name,) in ledger._rows(f"SELECT DISTINCT fragment FROM {table}")})
    sources = ledger._rows_of("ingest-0", "sources", table_schema("sources"))
    write_commit(root, "ingest-0", {"sources": sources}, LEDGER.empty_table(), [])
    for name in names:
        of_stage = _ROWS[name.partition("-")[0]]
        rows = {table: ledger._rows_of(name, table, table_schema(table)) for table in of_stage}
        items = ledger._rows_of(name, "ledger", LEDGER)
        for at in range(items.num_rows) if "downloads" in rows else ():  # a commit each
            one = {"downloads": rows["downloads"].slice(at, 1)}
            write_commit(root, f"{name}{at:x}", one, items.slice(at, 1), [])
        if "downloads" not in rows:
            write_commit(root, name, rows, items, [])
    num_commits = len(list((root / "fragments" / "ledger").glob("[!.]*"))) - 1
    ledger.close()

    def load() -> None:
        remove_cache(root)
        ledger = Ledger(root, registry.stages())
        ledger.sync()
        ledger.activate(0)
        assert ledger._rows("SELECT count(DISTINCT fragment) FROM ledger") == [(num_commits,)]
        ledger.close()

    loose = cpu_s(load, 2)
    ledger = Ledger(root, registry.stages())
    ledger.sync()
    ledger.merged.merge(0)
    ledger.close()
    return num_commits, 1000 * loose / num_commits, 1000 * cpu_s(load, 2) / num_commits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--folder", type=Path, help="where the ledger is made; by default a temporary folder")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root, done = Path(folder) / "corpus", 0
        print("    clips   derive  publish  +groups    whole    start   ledger  manifest", flush=True)
        print("             CPU-s    CPU-s    CPU-s    CPU-s        s   B/clip    B/clip", flush=True)
        for num_videos in options.videos:
            ledger = Ledger(root, registry.stages())
            grow(ledger, done, num_videos)
            row, done = measure(root, ledger, num_videos), num_videos
            ledger.close()
            row["start"] = start(root)
            rows.append(row)
            print(
                f"{row['clips']:9,} {row['derive']:8.3f} {row['publish']:8.2f} {row['groups']:8.2f} "
                f"{row['whole']:8.2f} "
                f"{row['start']:8.2f} {row['ledger']:8.0f} {row['manifest']:9.0f}",
                flush=True,
            )
        num_commits, loose, merged = fresh_start(Path(folder) / "fresh")
    part = merged / loose
    print(f"fresh: {num_commits:,} commits, {loose:.2f} CPU-ms each loose, {merged:.3f} merged")
    print(f"gate {'met' if part <= MOST_OF_LOOSE else 'missed'}: a merged commit costs {part:.3f} of a loose one")
    growth = rows[-1]["derive"] / rows[0]["derive"]
    met = growth <= MOST_GROWTH
    print(
        f"gate {'met' if met else 'missed'}: deriving a unit costs {growth:.2f} times as much as in the smallest corpus"
    )
    return 0 if met and part <= MOST_OF_LOOSE else 1


if __name__ == "__main__":
    sys.exit(main())
