"""Publish `manifest.duckdb`, the snapshot that all other commands read.

The file is written beside the old one and renamed over it. So a reader always opens a whole, consistent manifest, can
keep it open for any time, and never waits for a lock. It has the storage version of DuckDB 1.0, which clients of all
later versions read. It holds the tables of `shards.corpus.schema.MANIFEST` and the views of `views.sql` beside this
file.
"""

from importlib import resources
from pathlib import Path

import duckdb
import pyarrow as pa

from clipmill.base.atomic_file import atomic_path
from clipmill.base.settings import digest
from clipmill.base.text import sql_identifier, sql_literal
from shards.corpus.ledger import Ledger
from shards.corpus.near_duplicates import duplicate_groups
from shards.corpus.packs import MAIN, folder_of, index_files, named_packs, volume_of
from shards.corpus.schema import INDEX, MANIFEST, catalog_columns
from shards.corpus.tombstones import read_tombstones
from shards.storage.local import MANIFEST_NAME, UNFINISHED
from shards.storage.mirror import files_of
from shards.storage.sealed_parquet import DamagedFile, check_parquet

STORAGE_VERSION = "v1.0.0"  # of DuckDB's files


def publish(ledger: Ledger, *, groups: bool = True) -> None:
    """Write the manifest. The ledger's last `refresh_state` must have been for all units.

    groups: False leaves out the near-duplicate groups, which take seconds for a million clips.
    """
    connection = ledger.connection
    path = ledger.root / MANIFEST_NAME
    _prepare(ledger, groups)
    with atomic_path(path) as temporary:
        connection.execute(f"ATTACH {sql_literal(temporary)} AS manifest (STORAGE_VERSION '{STORAGE_VERSION}')")
        try:
            for table, schema in MANIFEST.items():
                select = _SELECT.get(table, _SELECT_STAGE.replace("$table", table))
                select = select.replace("$columns", _columns(schema))
                connection.execute(f"CREATE TABLE manifest.{table} AS {select}")
        finally:
            connection.execute("DETACH manifest")
        with duckdb.connect(str(temporary)) as manifest:
            manifest.execute(view_statements())
            manifest.execute(f"COMMENT ON VIEW catalog IS '{_layout()}'")
            manifest.execute(f"COMMENT ON TABLE videos IS '{_made_from(ledger) if groups else 'unfinished'}'")
    files_of(ledger.root).upload(MANIFEST_NAME)


def is_current(root: Path, ledger: Ledger | None = None) -> bool:
    """Return whether the manifest has this version's tables and views, and leaves out all forgotten videos.

    ledger: after `refresh_state` for all units; also compare the manifest's content with the ledger, because a build
    may have been killed after it loaded the last commits or put the last shards in place, and before it published them.
    """
    path = root / MANIFEST_NAME
    if not path.is_file() or (root / UNFINISHED).exists():
        return False
    try:
        return _is_current(path, root, ledger)
    except duckdb.Error:
        return False  # damaged: it is published again


def _is_current(path: Path, root: Path, ledger: Ledger | None) -> bool:
    with duckdb.connect() as connection:
        try:
            connection.execute(f"ATTACH {sql_literal(path)} AS manifest (READ_ONLY)")
        except duckdb.Error:  # torn
            return False
        sql = "SELECT comment FROM duckdb_views() WHERE database_name = 'manifest' AND view_name = 'catalog'"
        if connection.execute(sql).fetchall() != [(_layout(),)]:
            return False
        sql = "SELECT comment FROM duckdb_tables() WHERE database_name = 'manifest' AND table_name = 'videos'"
        if ledger and connection.execute(sql).fetchall() != [(_made_from(ledger),)]:
            return False
        num_applied = connection.execute("SELECT count(*) FROM manifest.forgotten").fetchall()[0][0]
    return num_applied == read_tombstones(root).num_rows


def empty_manifest() -> duckdb.DuckDBPyConnection:
    """Return a database in memory with this version's tables and views and no rows, for checking SQL."""
    connection = duckdb.connect()
    for table, schema in MANIFEST.items():
        connection.register("columns", schema.empty_table())
        connection.execute(f"CREATE TABLE {table} AS SELECT * FROM columns")
        connection.unregister("columns")
    connection.execute(view_statements())
    return connection


def view_statements() -> str:
    """Return the SQL that creates the views, `catalog` with the columns that the schema declares for it."""
    columns = catalog_columns()
    further = dict.fromkeys(table for table, _, _ in columns if table not in _SELECT)
    joins = [f"LEFT JOIN {table} ON {table}.clip_id = clips.clip_id" for table in further]
    shown = [f"{table}.{name}" + ("" if name == alias else f" AS {alias}") for table, name, alias in columns]
    template = resources.files("shards.corpus").joinpath("views.sql").read_text()
    return template.replace("    $columns", ",\n".join(f"    {column}" for column in shown)).replace(
        "$joins", "\n".join(joins)
    )


def _layout() -> str:
    tables = {table: [f"{field.name} {field.type}" for field in schema] for table, schema in MANIFEST.items()}
    return f"layout {digest([tables, view_statements()])}"


def _made_from(ledger: Ledger) -> str:
    """Hash the inputs of a manifest: the settings, every row of the ledger, the shards that are in place."""
    rows = 'count(*), bit_xor(hash(fragment, item_id, key, status, attempts, epoch_us("at")))'
    ((num_rows, rows_hash),) = ledger.connection.execute(f"SELECT {rows} FROM ledger").fetchall()
    shards = sorted(
        (f"{folder_of(pack)}/{name}" if pack else name, size)
        for pack in (MAIN, *named_packs(ledger.root))
        for name, size in ledger.files.sizes(folder_of(pack)).items()
        if name.endswith(".parquet")
    )
    return f"made from {digest([ledger.fingerprints, num_rows, rows_hash, shards])}"


def _prepare(ledger: Ledger, groups: bool) -> None:
    """Load the inputs of the manifest that are not in the ledger: near-duplicate groups, shard indexes, runs."""
    connection = ledger.connection
    only = "" if groups else " WHERE false"
    hashes = connection.sql(f"SELECT clip_id, phash FROM current_clips{only} ORDER BY clip_id").to_arrow_table()
    connection.register("groups", duplicate_groups(hashes))
    connection.execute("CREATE OR REPLACE TEMP TABLE duplicate_groups AS SELECT * FROM groups")
    connection.unregister("groups")
    _load_samples(connection, ledger.root)
    _load_parquet(connection, "recorded_runs", ledger.root / "fragments" / "runs", MANIFEST["runs"])
    connection.register("all_tombstones", read_tombstones(ledger.root))
    connection.execute("CREATE OR REPLACE TEMP TABLE tombstones AS SELECT * FROM all_tombstones")
    connection.unregister("all_tombstones")
    for table in ("indexed_samples", "indexed_pack_samples"):
        connection.execute(
            f"DELETE FROM {table} WHERE video_id IN (SELECT video_id FROM (SELECT DISTINCT video_id FROM "
            f"{table}) WHERE sha256(video_id) IN (SELECT video_hash FROM tombstones))"
        )
    connection.execute(f"CREATE OR REPLACE TEMP TABLE without_clips AS {ledger.without_clips_sql()}")
    connection.execute(f"CREATE OR REPLACE TEMP TABLE standing_failures AS {ledger.failures_sql()}")


def _load_samples(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    """Load the indexes of all packs, each clip of a pack once.

    A clip may be in two shards while `pack.shuffle` changes: the shards of the other way stay until all new ones are
    in place.
    """
    _load_parquet(connection, "indexed_samples", root / "shards", INDEX)
    _keep_one_way(connection, "indexed_samples", root, MAIN)
    connection.register("empty", MANIFEST["pack_samples"].empty_table())
    connection.execute("CREATE OR REPLACE TEMP TABLE indexed_pack_samples AS SELECT * FROM empty")
    connection.unregister("empty")
    for pack in named_packs(root):
        _load_parquet(connection, "of_pack", root / folder_of(pack), INDEX)
        _keep_one_way(connection, "of_pack", root, pack)
        rows = f"SELECT {sql_literal(pack)} AS pack, * FROM of_pack"
        connection.execute(f"INSERT INTO indexed_pack_samples BY NAME {rows}")
        connection.execute("DROP TABLE of_pack")


def _keep_one_way(connection: duckdb.DuckDBPyConnection, table: str, root: Path, pack: str) -> None:
    if len({volume_of(path.name) is None for path in index_files(root, pack)}) > 1:
        connection.execute(
            f"CREATE OR REPLACE TEMP TABLE {table} AS SELECT * FROM {table} "
            "QUALIFY row_number() OVER (PARTITION BY clip_id ORDER BY contains(shard, '-') DESC, shard) = 1"
        )


def _load_parquet(connection: duckdb.DuckDBPyConnection, table: str, folder: Path, schema: pa.Schema) -> None:
    connection.register("empty", schema.empty_table())
    connection.execute(f"CREATE OR REPLACE TEMP TABLE {table} AS SELECT * FROM empty")
    connection.unregister("empty")
    # A file may be damaged: a shard is then packed again, the record of a run is lost.
    files = sorted(str(path) for path in folder.glob("[!.]*.parquet") if _is_sound(path))
    if files:
        connection.execute(f"INSERT INTO {table} BY NAME SELECT {_columns(schema)} FROM read_parquet(?)", [files])


def _is_sound(path: Path) -> bool:
    try:
        check_parquet(path)
    except DamagedFile:
        return False
    return True


def _columns(schema: pa.Schema) -> str:
    return ", ".join(sql_identifier(name) for name in schema.names)  # `at` is a reserved word


# For tables without an entry below: `current_TABLE` holds the rows that count.
_SELECT_STAGE = "SELECT $columns FROM current_$table ORDER BY clip_id"

_SELECT = {
    "videos": """
        SELECT s.video_id, s.unit, coalesce(s.volume, 0) AS volume, s.url, s.kind, s.source_id,
               coalesce(s.title, v.title) AS title,
               coalesce(s.category, v.categories[1]) AS category,
               coalesce(s.language, t.language, v.language) AS language, coalesce(s.licence, v.licence) AS licence,
               v.channel, v.upload_date, v.path, v.num_bytes, v.sha256, v.duplicate_of, v.container, v.duration_s,
               v.width, v.height, v.fps, v.video_codec, v.audio_codec, v.extractor, t.origin AS transcript_origin,
               t.word_times, t.num_words, t.encoding AS subtitle_encoding,
               t.encoding_guessed AS subtitle_encoding_guessed, t.repairs AS subtitle_repairs, s.split, s.ordinal,
               s.extra, v.meta, w.reason AS no_clip_reason
        FROM sources s LEFT JOIN current_videos v USING (video_id) LEFT JOIN current_transcripts t USING (video_id)
        LEFT JOIN without_clips w USING (video_id)
        ORDER BY s.ordinal
    """,
    "sentences": "SELECT $columns FROM current_sentences ORDER BY video_id, n",
    "spans": "SELECT $columns FROM current_spans ORDER BY video_id, n",
    "clips": "SELECT $columns FROM current_clips ORDER BY video_id, n",
    "texts": """
        SELECT x.clip_id, x.n, x.text, x.video_id, k.sha256 AS clip_sha256
        FROM current_texts x JOIN current_clips k USING (clip_id) ORDER BY x.video_id, x.clip_id, x.n
    """,
    "captions": "SELECT $columns FROM current_captions ORDER BY clip_id, frame_index, fingerprint",
    "scores": """
        SELECT s.* EXCLUDE (item_id, unit, key, fragment, up_to_date), g.duplicate_group
        FROM current_scores s LEFT JOIN duplicate_groups g USING (clip_id) ORDER BY s.clip_id
    """,
    "samples": "SELECT $columns FROM indexed_samples ORDER BY shard, position",
    "pack_samples": "SELECT $columns FROM indexed_pack_samples ORDER BY pack, shard, position",
    "clip_edits": "SELECT $columns FROM clip_edits SEMI JOIN sources USING (video_id) ORDER BY editing, round, clip_id",
    "edited_clips": """
        SELECT $columns FROM edited_clips SEMI JOIN sources USING (video_id) ORDER BY editing, round, clip_id
    """,
    "edit_rounds": """
        SELECT r.* EXCLUDE (item_id, unit, key, fragment), l."at"
        FROM edit_rounds r JOIN ledger l ON l.stage = 'edit' AND l.item_id = r.item_id AND l.key = r.key
        ORDER BY r.editing, r.round
    """,
    "failures": """
        SELECT stage, failed_id AS item_id, error_class, message, transient, attempts, "at", unit, quarantined
        FROM standing_failures ORDER BY stage, item_id
    """,
    "forgotten": 'SELECT $columns FROM tombstones ORDER BY "at", video_hash',
    "runs": "SELECT $columns FROM recorded_runs ORDER BY started_at",
}
