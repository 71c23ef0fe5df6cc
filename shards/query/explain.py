"""The history of one source, clip or sample: its facts, every attempt of every stage, and where its bytes are.

Facts come from the manifest; attempts from the ledger fragments of its unit, which also keep the superseded ones.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import duckdb
import pyarrow.compute as pc

from clipmill.base.errors import UserError
from shards.corpus.fragments import fragment_path, unit_in
from shards.corpus.merged import read_head, read_rows
from shards.corpus.packs import MAIN, folder_of
from shards.corpus.schema import LEDGER
from shards.corpus.source_ids import canonical_url, source_spellings
from shards.corpus.tombstones import hash_of, read_tombstones
from shards.query.sql import open_manifest, video_of_url
from shards.storage.local import MANIFEST_NAME
from shards.storage.mirror import files_of, for_reading
from shards.storage.sealed_parquet import DamagedFile, read_parquet

Row = dict[str, Any]
MEMBERS = ("mp4", "jpg", "txt", "json")


@dataclass
class Story:
    """The history of one item; unknown parts are empty. Times are ISO 8601 in UTC."""

    kind: str  # source | clip | forgotten
    id: str
    source: Row = field(default_factory=dict)
    clip: Row = field(default_factory=dict)  # of a clip or sample
    clips: list[Row] = field(default_factory=list)  # of a source
    attempts: list[Row] = field(default_factory=list)
    failures: list[Row] = field(default_factory=list)
    captions: list[Row] = field(default_factory=list)
    scores: Row = field(default_factory=dict)
    stages: dict[str, list[Row]] = field(
        default_factory=dict
    )  # rows of a clip by table, of stages without a field here
    texts: list[str] = field(default_factory=list)
    places: list[Row] = field(default_factory=list)  # what, file, offset, num_bytes, sha256
    runs: list[Row] = field(default_factory=list)  # of the attempts
    tombstone: Row = field(default_factory=dict)


def explain(root: str | Path, name: str) -> Story:
    """Return the history of a video_id, clip_id, sample key, URL or path. Raises UserError for other names."""
    root = for_reading(root, *_READ)
    with open_manifest(root) as connection:
        video_id, clip_id = _resolve(connection, name)
        if video_id is None:
            if story := _forgotten(root, name):
                return story
            _raise_unknown(connection, name)
        story = _story_of_clip(connection, clip_id) if clip_id else _story_of_source(connection, video_id)
        story.source = _one(connection, "SELECT * FROM videos WHERE video_id = ?", video_id)
        story.attempts = _ingested(root, video_id) + _attempts(root, story.source, clip_id or video_id)
        story.failures = _rows(connection, _FAILURES, clip_id or video_id, video_id, f"{clip_id or video_id}.")
        run_ids = sorted({row["run_id"] for row in story.attempts})
        runs = "SELECT run_id, command, started_at, ended_at FROM runs WHERE run_id IN (SELECT unnest(?)) ORDER BY 3"
        story.runs = _rows(connection, runs, run_ids)
        story.places = [*_source_files(root, story.source), *story.places]
    return story


_READ = (MANIFEST_NAME, "fragments/forgotten/", "fragments/sources/", "fragments/ledger/", "fragments/merged/")

_FAILURES = """
    SELECT stage, item_id, error_class, message, transient, attempts, "at" FROM failures
    WHERE item_id IN (?, ?) OR starts_with(item_id, ?) ORDER BY "at"
"""


# -- from a name to an id -------------------------------------------------------------------------------------------


def _resolve(connection: duckdb.DuckDBPyConnection, name: str) -> tuple[str | None, str | None]:
    """Return (video_id, clip_id or None) of a name; (None, None) for an unknown one."""
    if found := connection.execute("SELECT video_id FROM videos WHERE video_id = ?", [name]).fetchall():
        return found[0][0], None
    for table, column in (("clips", "clip_id"), ("spans", "clip_id"), ("samples", "key"), *_keys_of_packs(connection)):
        sql = f"SELECT video_id, clip_id FROM {table} WHERE {column} = ?"
        if found := connection.execute(sql, [name]).fetchall():
            return found[0]
    if found := connection.execute("SELECT video_id FROM videos WHERE source_id = ?", [name]).fetchall():
        return found[0][0], None
    return video_of_url(connection, _canonical(name)), None


def _keys_of_packs(connection: duckdb.DuckDBPyConnection) -> list[tuple[str, str]]:
    """Return the table of named packs and its column with keys; older manifests lack it."""
    known = connection.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'pack_samples'").fetchall()
    return [("pack_samples", "key")] if known else []


def _canonical(name: str) -> str:
    try:
        return canonical_url(name if "://" in name else str(Path(name).absolute()))
    except ValueError:
        return name


def _spellings(name: str) -> list[str]:
    try:
        return source_spellings(name if "://" in name else str(Path(name).absolute()))
    except ValueError:
        return []


def _forgotten(root: Path, name: str) -> Story | None:
    hashes = {hash_of(word) for word in (name, name.rpartition(".")[0] or name, *_spellings(name))}
    for row in read_tombstones(root).to_pylist():
        if hashes & {row["video_hash"], row["url_hash"], *(row.pop("other_hashes") or ())}:
            row["num_clips"] = len(row.pop("places") or ())
            return Story("forgotten", name, tombstone=_plain(row))
    return None


def _raise_unknown(connection: duckdb.DuckDBPyConnection, name: str) -> NoReturn:
    """Raise UserError with ids that begin like the name or are spelt like it."""
    sql = "SELECT video_id FROM videos UNION ALL SELECT clip_id FROM clips UNION ALL SELECT url FROM videos"
    known = [row[0] for row in connection.execute(f"SELECT * FROM ({sql}) LIMIT 200000").fetchall()]
    near = get_close_matches(name, known, n=3) or [other for other in known if name and name in other][:3]
    hint = f" Similar: {', '.join(near)}." if near else " Give a video_id, a clip_id, a sample's key or a URL."
    raise UserError(f"ID {name}: the corpus has no such video, clip, sample or URL.{hint}")


# -- facts ----------------------------------------------------------------------------------------------------------


def _story_of_source(connection: duckdb.DuckDBPyConnection, video_id: str) -> Story:
    clips = """
        SELECT s.clip_id, s.start_s, s.end_s, s.origin, c.num_frames, c.tar, c.mp4_offset, c.num_bytes,
               p.shard, p.position, (SELECT count(*) FROM captions t WHERE t.clip_id = s.clip_id) AS num_captions
        FROM spans s LEFT JOIN clips c USING (clip_id) LEFT JOIN samples p USING (clip_id)
        WHERE s.video_id = ? ORDER BY s.n
    """
    return Story("source", video_id, clips=_rows(connection, clips, video_id))


def _story_of_clip(connection: duckdb.DuckDBPyConnection, clip_id: str) -> Story:
    story = Story("clip", clip_id, clip=_one(connection, "SELECT * FROM catalog WHERE clip_id = ?", clip_id))
    story.captions = _rows(
        connection, "SELECT * FROM captions WHERE clip_id = ? ORDER BY current DESC, frame_index, fingerprint", clip_id
    )
    story.scores = _one(connection, "SELECT * FROM scores WHERE clip_id = ?", clip_id)
    story.texts = [
        row["text"] for row in _rows(connection, "SELECT text FROM texts WHERE clip_id = ? ORDER BY n", clip_id)
    ]
    tables = "SELECT DISTINCT table_name AS name FROM duckdb_columns() SEMI JOIN duckdb_tables() USING (table_name) "
    for table in _rows(connection, tables + "WHERE column_name = 'clip_id' ORDER BY 1"):
        if table["name"] not in _SHOWN_APART:
            rows = _rows(connection, f"SELECT * EXCLUDE (clip_id) FROM {table['name']} WHERE clip_id = ?", clip_id)
            story.stages |= {table["name"]: rows} if rows else {}
    tar = story.clip.get("tar")
    if tar and not tar.startswith("shards/"):  # else its sample is all there is
        clip = story.clip
        story.places = [_place("clip", tar, clip["mp4_offset"], clip["num_bytes"], clip["sha256"])]
        for n, frame in enumerate(clip["frames"] or ()):
            story.places.append(_place(f"frame {n}", tar, frame["offset"], frame["num_bytes"], frame["sha256"]))
    for sample in _rows(connection, "SELECT * FROM samples WHERE clip_id = ?", clip_id):
        story.places += _sample_places(sample, folder_of(MAIN))
    for table, _ in _keys_of_packs(connection):
        for sample in _rows(connection, f"SELECT * FROM {table} WHERE clip_id = ? ORDER BY pack", clip_id):
            story.places += _sample_places(sample, folder_of(sample["pack"]))
    return story


# Tables of clips that a story shows in their own form, or leaves out.
_SHOWN_APART = {
    "spans", "sentences", "clips", "texts", "captions", "scores", "samples", "pack_samples", "clip_edits",
    "edited_clips",
}  # fmt: skip


def _sample_places(sample: Row, folder: str) -> list[Row]:
    shard = f"{folder}/{sample['shard']}"
    return [
        _place(f"{sample['key']}.{m}", shard, sample[f"{m}_offset"], sample[f"{m}_bytes"], sample.get(f"{m}_sha256"))
        for m in MEMBERS
        if sample[f"{m}_offset"] is not None
    ]


def _place(what: str, file: str, offset: int | None, num_bytes: int, sha256: str | None) -> Row:
    return {"what": what, "file": file, "offset": offset, "num_bytes": num_bytes, "sha256": sha256}


def _source_files(root: Path, source: Row) -> list[Row]:
    """List the video's file, if it still exists, and its subtitles."""
    if not source["path"]:
        return []
    path = source["path"]
    if Path(path).is_absolute():
        files = {path: Path(path).stat().st_size} if Path(path).is_file() else {}
    else:
        files = files_of(root).list_prefix(f"{path.rpartition('/')[0]}/{source['video_id']}.")
    return [
        _place("source", file, 0, size, source["sha256"] if file == path else None)
        for file, size in sorted(files.items())
    ]


def _ingested(root: Path, video_id: str) -> list[Row]:
    """Return the attempt in which the source was first seen, as a list of at most one."""
    for path in sorted((root / "fragments" / "sources").glob("[!.]*.parquet")):
        with suppress(DamagedFile, FileNotFoundError):  # such a commit does not count
            if pc.index(read_parquet(path, ["video_id"])["video_id"], video_id).as_py() < 0:
                continue
            [row] = read_parquet(fragment_path(root, "ledger", path.stem), LEDGER.names).to_pylist()
            return [_plain({**row, "item_id": video_id, "num_rows": 1, "commit": path.stem})]
    return []


def _attempts(root: Path, source: Row, item_id: str) -> list[Row]:
    """Read from ledgers the attempts on a video and its parts, or a clip and its video, by time."""
    video_id, tables = item_id.partition(".")[0], {}
    for path in sorted((root / "fragments" / "ledger").glob(f"[!.]*-{source['unit']}-*.parquet")):
        with suppress(DamagedFile, FileNotFoundError):  # such a commit does not count, or is merged since
            tables[path.stem] = read_parquet(path, LEDGER.names)
    with suppress(DamagedFile, FileNotFoundError):
        head = read_head(root, source.get("volume") or 0)
        names = [name for name in head.commits if unit_in(name) == source["unit"] and name not in tables]
        merged = read_rows(root, head, "ledger", names)
        tables |= {name: merged.filter(pc.field("commit") == name).select(LEDGER.names) for name in names}
    rows = []
    for name, table in sorted(tables.items()):
        ids = table["item_id"]
        mine = pc.or_(pc.equal(ids, video_id), pc.or_(pc.equal(ids, item_id), pc.starts_with(ids, f"{item_id}.")))
        rows += [{**row, "commit": name} for row in table.filter(mine).to_pylist() if row["stage"] != "ingest"]
    return [_plain(row) for row in sorted(rows, key=lambda row: (row["at"], row["item_id"]))]


def _one(connection: duckdb.DuckDBPyConnection, sql: str, *parameters: Any) -> Row:
    return next(iter(_rows(connection, sql, *parameters)), {})


def _rows(connection: duckdb.DuckDBPyConnection, sql: str, *parameters: Any) -> list[Row]:
    return [_plain(row) for row in connection.sql(sql, params=list(parameters)).to_arrow_table().to_pylist()]


def _plain(row: Row) -> Row:
    """Convert times to text, so that the row is JSON-able."""
    return {
        name: value.isoformat(timespec="seconds") if hasattr(value, "isoformat") else value
        for name, value in row.items()
    }


def as_json(story: Story) -> str:
    return json.dumps({name: value for name, value in vars(story).items() if value}, ensure_ascii=False, indent=2)
