"""Publish `manifest.duckdb`, the snapshot that all other commands read.

The file is written beside the old one and renamed over it. So a reader always opens a whole, consistent manifest, can
keep it open for any time, and never waits for a lock. It has the storage version of DuckDB 1.0, which clients of all
later versions read. It holds the tables of `shards.corpus.schema.MANIFEST` and the views of `views.sql` beside this
file.
"""

from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import duckdb
import pyarrow as pa

from clipmill.base.atomic_file import atomic_path, copy_file
from clipmill.base.settings import digest
from clipmill.base.text import sql_identifier, sql_literal
from shards.corpus.clip_groups import update_groups
from shards.corpus.ledger import Ledger
from shards.corpus.near_duplicates import duplicate_groups
from shards.corpus.packs import MAIN, folder_of, index_files, named_packs, volume_of
from shards.corpus.rows import insert_rows
from shards.corpus.schema import GLOBAL_TABLES, INDEX, MANIFEST, catalog_columns
from shards.corpus.tombstones import read_tombstones
from shards.storage.local import MANIFEST_NAME, UNFINISHED
from shards.storage.mirror import files_of
from shards.storage.sealed_parquet import DamagedFile, check_parquet

STORAGE_VERSION = "v1.0.0"  # of DuckDB's files
_OWN_TABLES = {  # for publishing alone
    # `content`: hash of what the volume's rows are made from; `grouped`: the same, of when its clips were last grouped
    "volumes": "volume INTEGER, content VARCHAR, grouped VARCHAR",
    "clip_groups": "volume INTEGER, clip_id VARCHAR, duplicate_group VARCHAR",
    "shard_files": "pack VARCHAR, shard VARCHAR, num_bytes BIGINT, mtime_ns BIGINT",
}


def publish(ledger: Ledger, *, groups: bool = True, whole: bool = False) -> None:
    """Write the manifest: the volumes that have changed, into a copy of the one that is there.

    Call `refresh_state` for all units before. A corpus of one volume is written whole, in the order of its ids.

    groups: False leaves out the near-duplicate groups, which take seconds for a million clips.
    whole: write all volumes into a new file, because rows that are deleted from a copy leave their bytes in it.
    """
    connection, path, volumes = ledger.connection, ledger.root / MANIFEST_NAME, ledger.volumes()
    contents = {volume: ledger.content_of(volume) for volume in volumes}
    with atomic_path(path) as temporary:
        kept = _copy(path, temporary) if len(volumes) > 1 and not whole else {}  # volume → content
        connection.execute(f"ATTACH {sql_literal(temporary)} AS manifest (STORAGE_VERSION '{STORAGE_VERSION}')")
        try:
            if not kept:
                _create_tables(connection)
            for volume in volumes:
                if kept.get(volume) != contents[volume]:
                    ledger.show(volume)
                    _write_volume(ledger, volume, groups=groups and len(volumes) == 1)
            _note_contents(connection, contents)
            # A group may be named after a forgotten clip, which no query may show any more.
            if len(volumes) > 1 and (groups or _has_new_tombstones(connection, ledger.root)):
                update_groups(connection)
            _write_samples(ledger)
            _write_global(ledger)
            connection.execute(
                f"COMMENT ON TABLE manifest.videos IS '{_made_from(ledger) if groups else 'unfinished'}'"
            )
        finally:
            connection.execute("DETACH manifest")
        if not kept:
            with duckdb.connect(str(temporary)) as manifest:
                manifest.execute(view_statements())
                manifest.execute(f"COMMENT ON VIEW catalog IS '{_layout()}'")
    files_of(ledger.root).upload(MANIFEST_NAME)


def _copy(path: Path, temporary: Path) -> dict[int, str]:
    """Copy the manifest, if its tables and views are this version's; return volume → content of its parts."""
    try:
        with duckdb.connect() as connection:
            connection.execute(f"ATTACH {sql_literal(path)} AS manifest (READ_ONLY)")
            if _comment(connection, "view", "catalog") != _layout():
                return {}
            volumes = dict(connection.execute("SELECT volume, content FROM manifest.volumes").fetchall())
    except duckdb.Error:  # none, or damaged
        return {}
    copy_file(path, temporary)
    return volumes


def _create_tables(connection: duckdb.DuckDBPyConnection) -> None:
    for table, schema in MANIFEST.items():
        connection.register("columns", schema.empty_table())
        connection.execute(f"CREATE TABLE manifest.{table} AS SELECT * FROM columns")
        connection.unregister("columns")
    for table, columns in _OWN_TABLES.items():
        connection.execute(f"CREATE TABLE manifest.{table} ({columns})")


def _write_volume(ledger: Ledger, volume: int, *, groups: bool) -> None:
    """Replace the rows of the volume that the ledger shows."""
    connection = ledger.connection
    only = "" if groups else " WHERE false"
    hashes = connection.sql(f"SELECT clip_id, phash FROM current_clips{only} ORDER BY clip_id").to_arrow_table()
    connection.register("duplicate_groups", duplicate_groups(hashes))
    for table, schema in MANIFEST.items():
        if table not in GLOBAL_TABLES:
            select = _SELECT.get(table, _SELECT_STAGE.replace("$table", table)).replace("$volume", str(volume))
            select = select.replace("$columns", _columns(name for name in schema.names if name != "volume"))
            connection.execute(f"DELETE FROM manifest.{table} WHERE volume = {volume}")
            connection.execute(
                f"INSERT INTO manifest.{table} BY NAME SELECT *, {volume}::INTEGER AS volume FROM ({select})"
            )
    connection.unregister("duplicate_groups")


def _note_contents(connection: duckdb.DuckDBPyConnection, contents: dict[int, str]) -> None:
    grouped = dict(connection.execute("SELECT volume, grouped FROM manifest.volumes").fetchall())
    rows = [[volume, content, grouped.get(volume)] for volume, content in contents.items()]
    connection.execute("DELETE FROM manifest.volumes")
    insert_rows(connection, "manifest.volumes", _VOLUMES, rows)


def _write_samples(ledger: Ledger) -> None:
    """Bring `samples` and `pack_samples` up to date with the indexes of the shards, where each clip is packed.

    Rows stay in the order of shards, which is the order of a training's clips. A clip may be in two shards while
    `pack.shuffle` changes: the shards of the other way stay until all new ones are in place.
    """
    connection = ledger.connection
    is_new = _has_new_tombstones(connection, ledger.root)
    connection.register("tombstones", read_tombstones(ledger.root))
    if is_new:
        for table in ("samples", "pack_samples"):
            connection.execute(
                f"DELETE FROM manifest.{table} WHERE video_id IN (SELECT video_id FROM (SELECT DISTINCT video_id FROM "
                f"manifest.{table}) WHERE sha256(video_id) IN (SELECT video_hash FROM tombstones))"
            )
    known = {
        (pack, shard): stamp
        for pack, shard, *stamp in connection.execute(
            "SELECT pack, shard, num_bytes, mtime_ns FROM manifest.shard_files"
        ).fetchall()
    }
    there, mixed = {}, False
    for pack in (MAIN, *named_packs(ledger.root)):
        paths = index_files(ledger.root, pack)
        mixed |= len({volume_of(path.name) is None for path in paths}) > 1
        for path in paths:
            stat = path.stat()
            there[pack, f"{path.stem}.tar"] = [stat.st_size, stat.st_mtime_ns]
    kept = {key for key in known if known[key] == there.get(key)} if not mixed else set()
    if kept and any(key not in kept and key < max(kept) for key in there):
        kept = set()  # rows would be out of order
    if len(kept) == len(known) == len(there):
        connection.unregister("tombstones")
        return
    connection.register("kept_shards", pa.table([[pack for pack, _ in kept], [shard for _, shard in kept]], _KEPT))
    connection.execute("DELETE FROM manifest.shard_files WHERE (pack, shard) NOT IN (FROM kept_shards)")
    connection.execute(f"DELETE FROM manifest.samples WHERE ('{MAIN}', shard) NOT IN (FROM kept_shards)")
    connection.execute("DELETE FROM manifest.pack_samples WHERE (pack, shard) NOT IN (FROM kept_shards)")
    connection.unregister("kept_shards")
    for pack in sorted({pack for pack, _ in there}):
        shards = sorted(shard for of_pack, shard in there if of_pack == pack and (of_pack, shard) not in kept)
        paths = [ledger.root / folder_of(pack) / f"{Path(shard).stem}.parquet" for shard in shards]
        files = [str(path) for path in paths if _is_sound(path)]
        if files:
            table = "pack_samples" if pack else "samples"
            connection.execute(
                f"INSERT INTO manifest.{table} BY NAME SELECT {f'{sql_literal(pack)} AS pack, ' if pack else ''}"
                f"{_columns(INDEX.names)} FROM read_parquet(?) "
                "WHERE sha256(video_id) NOT IN (SELECT video_hash FROM tombstones)"
                + (_ONE_WAY if mixed else "")
                + " ORDER BY shard, position",
                [files],
            )
        if shards and not mixed:  # else all are read again next time
            rows = [[pack, shard, *there[pack, shard]] for shard in shards]
            insert_rows(connection, "manifest.shard_files", _SHARD_FILES, rows)
    connection.unregister("tombstones")


def _has_new_tombstones(connection: duckdb.DuckDBPyConnection, root: Path) -> bool:
    """Return whether videos were forgotten since the manifest was published."""
    known = {video for (video,) in connection.execute("SELECT video_hash FROM manifest.forgotten").fetchall()}
    return not known.issuperset(read_tombstones(root)["video_hash"].to_pylist())


_VOLUMES = pa.schema([("volume", pa.int32()), ("content", pa.string()), ("grouped", pa.string())])
_SHARD_FILES = pa.schema(
    [("pack", pa.string()), ("shard", pa.string()), ("num_bytes", pa.int64()), ("mtime_ns", pa.int64())]
)
_KEPT = pa.schema([("pack", pa.string()), ("shard", pa.string())])
_ONE_WAY = " QUALIFY row_number() OVER (PARTITION BY clip_id ORDER BY contains(shard, '-') DESC, shard) = 1"


def _write_global(ledger: Ledger) -> None:
    connection = ledger.connection
    connection.execute("DELETE FROM manifest.runs")
    folder = ledger.root / "fragments" / "runs"
    files = sorted(str(path) for path in folder.glob("[!.]*.parquet") if _is_sound(path))  # else a record is lost
    if files:
        connection.execute(
            f"INSERT INTO manifest.runs BY NAME SELECT {_columns(MANIFEST['runs'].names)} FROM read_parquet(?) "
            "ORDER BY started_at",
            [files],
        )
    connection.register("tombstones", read_tombstones(ledger.root))
    connection.execute("DELETE FROM manifest.forgotten")
    names = _columns(MANIFEST["forgotten"].names)
    connection.execute(f'INSERT INTO manifest.forgotten SELECT {names} FROM tombstones ORDER BY "at", video_hash')
    connection.unregister("tombstones")


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
        if _comment(connection, "view", "catalog") != _layout():
            return False
        if ledger and _comment(connection, "table", "videos") != _made_from(ledger):
            return False
        num_applied = connection.execute("SELECT count(*) FROM manifest.forgotten").fetchall()[0][0]
    return num_applied == read_tombstones(root).num_rows


def _comment(connection: duckdb.DuckDBPyConnection, kind: str, name: str) -> str | None:
    sql = f"SELECT comment FROM duckdb_{kind}s() WHERE database_name = 'manifest' AND {kind}_name = '{name}'"
    rows = connection.execute(sql).fetchall()
    return rows[0][0] if rows else None


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
    further = dict.fromkeys(table for table, _, _ in columns if table not in (*_SELECT, *GLOBAL_TABLES))
    joins = [f"LEFT JOIN {table} ON {table}.clip_id = clips.clip_id" for table in further]
    shown = [f"{table}.{name}" + ("" if name == alias else f" AS {alias}") for table, name, alias in columns]
    template = resources.files("shards.corpus").joinpath("views.sql").read_text()
    return template.replace("    $columns", ",\n".join(f"    {column}" for column in shown)).replace(
        "$joins", "\n".join(joins)
    )


def _layout() -> str:
    tables = {table: [f"{field.name} {field.type}" for field in schema] for table, schema in MANIFEST.items()}
    return f"layout {digest([tables, _OWN_TABLES, view_statements()])}"


def _made_from(ledger: Ledger) -> str:
    """Hash the inputs of a manifest: the settings, every row of the ledger, the shards that are in place."""
    contents = [(volume, ledger.content_of(volume)) for volume in ledger.volumes()]
    shards = sorted(
        (f"{folder_of(pack)}/{name}" if pack else name, size)
        for pack in (MAIN, *named_packs(ledger.root))
        for name, size in ledger.files.sizes(folder_of(pack)).items()
        if name.endswith(".parquet")
    )
    return f"made from {digest([ledger.fingerprints, contents, shards])}"


def _is_sound(path: Path) -> bool:
    try:
        check_parquet(path)
    except DamagedFile:
        return False
    return True


def _columns(names: Iterable[str]) -> str:
    return ", ".join(sql_identifier(name) for name in names)  # `at` is a reserved word


# For tables without an entry below: `current_TABLE` holds the rows that count.
_SELECT_STAGE = "SELECT $columns FROM current_$table ORDER BY clip_id"

_SELECT = {
    "videos": """
        SELECT s.video_id, s.unit, s.url, s.kind, s.source_id, coalesce(s.title, v.title) AS title,
               coalesce(s.category, v.categories[1]) AS category,
               coalesce(s.language, t.language, v.language) AS language, coalesce(s.licence, v.licence) AS licence,
               v.channel, v.upload_date, v.path, v.num_bytes, v.sha256, v.duplicate_of, v.container, v.duration_s,
               v.width, v.height, v.fps, v.video_codec, v.audio_codec, v.extractor, t.origin AS transcript_origin,
               t.word_times, t.num_words, t.encoding AS subtitle_encoding,
               t.encoding_guessed AS subtitle_encoding_guessed, t.repairs AS subtitle_repairs, s.split, s.ordinal,
               s.extra, v.meta, w.reason AS no_clip_reason
        FROM sources s LEFT JOIN current_videos v USING (video_id) LEFT JOIN current_transcripts t USING (video_id)
        LEFT JOIN (SELECT video_id, reason FROM ledger.main.without_clips WHERE volume = $volume) w USING (video_id)
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
        FROM ledger.main.standing WHERE volume = $volume ORDER BY stage, item_id
    """,
}
