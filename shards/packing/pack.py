"""Write a selection of clips as WebDataset shards that any reader of the format can read.

1. `select_samples` asks the manifest for the clips of some volumes, their sizes, and a digest of the content of their
   members.
2. `plan_shards` orders the clips of one volume by a hash of (seed, clip_id) and fills shards up to a size. It is a pure
   function: the same clips and seed always give the same shards, and another volume's clips change none of them. A
   plan's key covers every byte of the tar except for the late columns (captions, scores), which KEY.json has as of
   packing and the index as they are now: new captions never make a shard pending. But a failed caption or score
   marks the key as awaiting it: the clip is packed without it, and its shard is packed again when it exists.
   KEY.json does not name the clip's near-duplicates, because they may be in volumes that do not exist yet. It has the
   hashes by which a reader finds them.
3. `write_shard`, one task per pending shard, writes tar and index under `.next/` with the plan's key as a name.
4. `commit_shards` runs when all of a volume are complete: it renames them into place and removes files of the volume
   that belong to no plan. After a kill, the next run reuses what is complete and ends in the same bytes.

With `pack.shuffle: corpus` the corpus is packed like one volume, under names without a volume. `remove_other_names`
removes the shards of the other way, when all new ones are in place.

Clips come in as rows of the manifest's `catalog`, media by byte range from the file that it names: a tar of clips/, or
a shard that holds the only copy (`pack.keep_clips`). Such shards are read before others take their place.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from clipmill.base.atomic_file import sync
from clipmill.base.errors import ItemError, UserError
from clipmill.base.settings import Settings, digest, operational
from shards.corpus.packs import MAIN, NEXT, folder_of, is_shard_file, volume_of
from shards.corpus.schema import INDEX, late_columns, sample_key
from shards.packing.index import FORMAT, Stamp, read_stamp, write_index
from shards.packing.tar import Member, Sample, member_bytes, read_member, write_tar
from shards.query.sql import check_selection, selection
from shards.storage.mirror import files_of

Extension = Literal["mp4", "jpg", "txt", "json"]
EXTENSIONS: tuple[Extension, ...] = ("mp4", "jpg", "txt", "json")
SHARDS_AT_ONCE = 16  # shards whose rows are in memory together
CLIPS_AT_ONCE = 500_000  # of several volumes, for which one query is made
JSON_BYTES = 1500  # assumed size of a KEY.json when shards are planned

# Columns of `catalog` that KEY.json holds besides the clip's hashes. Their order is part of every plan's key. The late
# columns (`shards.corpus.schema.late_columns`) are in KEY.json, too, but not in the key.
FIXED = (
    "clip_id", "video_id", "url", "title", "category", "channel", "licence", "language", "upload_date", "text",
    "num_words", "num_sentences", "align_cost", "origin", "transcript_origin", "word_times", "span_start_s",
    "span_end_s", "start_s", "end_s", "duration_s", "num_frames", "fps", "width", "height", "codec", "has_audio",
    "frame_time_s", "motion", "brightness", "shot_score", "source_sha256",
)  # fmt: skip
REFERENCES = ("split", "texts")  # of benchmarks: part of a plan's key where a clip has one of them
MEDIA = ("kind", "sha256", "frame_sha256", "phash", "num_bytes", "frames", "tar", "mp4_offset")


class PackSettings(Settings):
    """Settings of the stage `pack`: the clips that are packed, and the form of the shards."""

    # Clips to pack, as an SQL condition on the view `catalog` or a SELECT with a column clip_id. Empty: every clip.
    where: str = ""

    # Bytes that a shard should have: large enough to stream well, small enough to shuffle.
    shard_bytes: int = Field(256_000_000, ge=1_000_000)
    # Most samples in a shard: limits shards of small clips, where the size alone would admit too many to shuffle.
    max_samples: int = Field(10_000, ge=1)
    # What is shuffled: the clips of each volume (see ingest.volume_units), so that a volume is packed as soon as it is
    # complete and new sources change no shard of another one; or the clips of the whole corpus, where every new source
    # changes every shard. A corpus that was begun before this setting keeps "corpus".
    shuffle: Literal["volume", "corpus"] = "volume"
    # Seed of the shuffle, which lets readers read shards in order.
    seed: int = 0

    # Files of a sample. A clip without words has an empty KEY.txt, because readers that infer columns from the first
    # samples need all samples alike; leave such clips out with `where: num_words > 0`.
    members: tuple[Extension, ...] = EXTENSIONS

    # Keep the cut clips (clips/) after they are packed. false: a tar of clips is deleted once shards of the main pack
    # hold every clip in it, were read back and compared, and the manifest names them. What needs a clip afterwards
    # reads its shard; clips of a shard that is lost or damaged are cut again from their sources. A tar stays while one
    # of its clips is not whole in a shard: pack.where leaves it out, pack.members leaves out its mp4 or jpg, or it has
    # several caption frames (cut.caption_frames), of which a shard holds the first. A named pack does not count, and
    # has no such choice.
    keep_clips: bool = operational(True)

    # Flush shards to the disk, so that they survive a power cut and not only a kill. Off, as it is slow on some disks.
    fsync: bool = operational(False)

    @field_validator("members")
    @classmethod
    def _in_one_order(cls, members: tuple[Extension, ...]) -> tuple[Extension, ...]:
        if not members:
            raise ValueError(f"name at least one of {', '.join(EXTENSIONS)}")
        return tuple(extension for extension in EXTENSIONS if extension in members)


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """Plan of one shard. `clip_ids`: a string array in the tar's order; `key`: digest of its content."""

    name: str  # "000000-000000.tar", see `shards.corpus.packs`
    clip_ids: pa.Array
    members: tuple[Extension, ...]
    key: str
    pack: str = MAIN

    @property
    def index_name(self) -> str:
        return Path(self.name).with_suffix(".parquet").name

    @property
    def tar(self) -> str:
        """Return the path of the tar in place, relative to the corpus."""
        return f"{folder_of(self.pack)}/{self.name}"

    @property
    def index(self) -> str:
        return f"{folder_of(self.pack)}/{self.index_name}"


@dataclass(frozen=True)
class Written:
    """Result of `write_shard`: the rows of the index, and the clips that were left out, with the reason."""

    index: pa.Table
    failures: list[tuple[str, ItemError]] = field(default_factory=list)


# -- planning -------------------------------------------------------------------------------------------------------


def clips_by_volume(connection: duckdb.DuckDBPyConnection) -> dict[int, int]:
    """Return volume → number of its clips, in order of the volumes."""
    sql = "SELECT coalesce(v.volume, 0) AS volume, count(*) FROM clips JOIN videos v USING (video_id) GROUP BY 1"
    return dict(connection.execute(f"{sql} ORDER BY 1").fetchall())


def volume_batches(counts: dict[int, int]) -> Iterator[list[int]]:
    """Yield consecutive volumes that together have at most CLIPS_AT_ONCE clips, or one volume that has more."""
    batch, num_clips = [], 0
    for volume, count in counts.items():
        if batch and num_clips + count > CLIPS_AT_ONCE:
            yield batch
            batch, num_clips = [], 0
        batch.append(volume)
        num_clips += count
    if batch:
        yield batch


def select_samples(
    connection: duckdb.DuckDBPyConnection, settings: PackSettings, volumes: Collection[int] | None = None
) -> pa.Table:
    """Return (clip_id, mp4_bytes, jpg_bytes, txt_bytes, content) of the clips of `pack.where`, in order of clip_id.

    With `volumes` only of these, and with the column `volume`. Raises UserError for an invalid condition.
    """
    check_selection(connection, settings.where, "pack.where")
    hashed = ", ".join(f"'{name}': {name}" for name in (*FIXED, "sha256", "frame_sha256", "phash", "kind"))
    referred = ", ".join(f"'{name}': {name}" for name in REFERENCES)
    volume = "" if volumes is None else ", coalesce(volume, 0) AS volume"
    among = "" if volumes is None else f"WHERE coalesce(volume, 0) IN ({', '.join(map(str, volumes)) or 'NULL'})"
    sql = f"""
        SELECT clip_id, num_bytes AS mp4_bytes, coalesce(frames[1].num_bytes, 0) AS jpg_bytes,
               strlen(text) AS txt_bytes,
               md5(concat(to_json({{{hashed}}})::VARCHAR, if(split IS NULL AND texts IS NULL, NULL,
                                                             to_json({{{referred}}})::VARCHAR),
                          if(clip_id IN ({_AWAITED}), 'awaited', NULL))) AS content{volume}
        FROM ({selection(settings.where)}) {among} ORDER BY clip_id
    """
    try:
        return connection.sql(sql).to_arrow_table()
    except duckdb.Error as error:  # for example a value that cannot be converted, found while rows are computed
        raise UserError(f"pack.where: {error}") from error


# Clips without a first caption or scores because these failed.
_AWAITED = """
    SELECT item_id FROM failures WHERE stage = 'score'
    UNION ALL SELECT item_id FROM failures WHERE stage = 'caption'
        AND item_id NOT IN (SELECT clip_id FROM captions WHERE current AND frame_index = 0)
"""


def plan_shards(
    samples: pa.Table,
    settings: PackSettings,
    slots: pa.Table | None = None,
    volume: int | None = None,
    pack: str = MAIN,
) -> list[ShardPlan]:
    """Assign clips to shards, in order. A pure function of the samples (not of their order) and the settings.

    slots   see `reserved_slots`: counted like clips; a shard of reserved slots alone is not planned
    volume  of all these samples; None: they are the whole corpus, of a pack that is shuffled over it
    """
    samples = samples.take(pc.sort_indices(samples["clip_id"]))  # the id decides between equal ranks
    clip_ids = samples["clip_id"].to_pylist()
    ranks = np.fromiter((_rank(settings.seed, clip_id) for clip_id in clip_ids), np.uint64, count=len(clip_ids))
    sizes = _tar_bytes(samples, settings.members)
    if slots is not None:
        slots = slots.filter(pc.field("seed") == settings.seed)
        ranks = np.concatenate([ranks, slots["rank"].to_numpy()])
        sizes = np.concatenate([sizes, _tar_bytes(slots, settings.members)])
    order = np.argsort(ranks, kind="stable")
    bounds = _bounds(sizes[order], settings)
    plans = []
    for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        rows = order[start:end]
        piece = samples.take(rows[rows < samples.num_rows])
        if not piece.num_rows:
            continue
        name = f"{number:06d}.tar" if volume is None else f"{volume:06d}-{number:06d}.tar"
        clip_ids = piece["clip_id"].combine_chunks()
        content = list(zip(clip_ids.to_pylist(), piece["content"].to_pylist(), strict=True))
        key = digest({"format": FORMAT, "name": name, "members": settings.members, "samples": content})
        plans.append(ShardPlan(name, clip_ids, settings.members, key, pack))
    return plans


def reserved_slots(connection: duckdb.DuckDBPyConnection, volume: int | None = None, pack: str = MAIN) -> pa.Table:
    """Return the slots of forgotten clips, which stay reserved so that no other clip has to move to another shard.

    volume  only of this one; None: of all. Tombstones from before volumes are of volume 0, as their sources were.
    """
    among = "" if volume is None else f"WHERE coalesce(volume, 0) = {volume}"
    if not pack:
        return connection.sql(f"SELECT unnest(places, max_depth := 2) FROM forgotten {among}").to_arrow_table()
    slots = connection.sql(f"SELECT unnest(pack_places, max_depth := 2) FROM forgotten {among}").to_arrow_table()
    return slots.filter(pc.field("pack") == pack).drop_columns("pack")


def slots_of(samples: pa.Table, seed: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield (clip_id, its slot as tombstones store it) for rows of `select_samples`."""
    for row in samples.select(["clip_id", "mp4_bytes", "jpg_bytes", "txt_bytes"]).to_pylist():
        clip_id = row.pop("clip_id")
        yield clip_id, {"seed": seed, "rank": _rank(seed, clip_id), **row}


def _rank(seed: int, clip_id: str) -> int:
    """Return the hash of (seed, clip_id) by which clips are ordered."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {clip_id}".encode(), digest_size=8).digest(), "big")


def _tar_bytes(samples: pa.Table, members: Iterable[Extension]) -> np.ndarray:
    """Return [N] bytes that each sample adds to a tar; KEY.json is estimated: its text may change, a plan must not."""
    total = np.zeros(samples.num_rows, np.int64)
    for extension in members:
        size = JSON_BYTES if extension == "json" else samples[f"{extension}_bytes"].to_numpy()
        total += member_bytes(size)
    return total


def _bounds(sizes: np.ndarray, settings: PackSettings) -> list[int]:
    """Return bounds: shard k has samples bounds[k] … bounds[k+1], at least one, as many as both limits allow."""
    ends = np.cumsum(sizes)
    bounds = [0]
    while bounds[-1] < len(sizes):
        start = bounds[-1]
        before = ends[start] - sizes[start]
        full = int(np.searchsorted(ends, before + settings.shard_bytes, side="right"))
        bounds.append(min(max(full, start + 1), start + settings.max_samples))
    return bounds


def pending_shards(root: Path, plans: Iterable[ShardPlan], *, retry_missing: bool = False) -> list[ShardPlan]:
    """Return the plans whose shards have to be written: neither in place nor complete under `.next`.

    retry_missing  also those written without some of their clips, which may be readable now
    """
    stamps = ((plan, _stamp_of(root, plan)) for plan in plans)
    return [plan for plan, stamp in stamps if stamp is None or (retry_missing and stamp.missing)]


def _stamp_of(root: Path, plan: ShardPlan) -> Stamp | None:
    """Return the stamp of a complete shard of this plan, in place, under `.next` or between; else None.

    Under `.next` the index is written after the tar, and `place` removes the old pair before it moves the new tar and
    then its index. So a pair in place always belongs together, and an index that waits under `.next` without its tar
    belongs to the tar that is in place without an index.
    """
    size_of = files_of(root).size
    next_tar, next_index = next_paths(plan)
    tar, index = plan.tar, plan.index
    waiting, placed = read_stamp(root / next_index), read_stamp(root / index)
    if waiting and waiting.plan_key == plan.key:
        if size_of(next_tar) == waiting.tar_bytes:
            return waiting
        if size_of(next_tar) is None and not (root / index).exists() and size_of(tar) == waiting.tar_bytes:
            return waiting
    if placed and placed.plan_key == plan.key and size_of(tar) == placed.tar_bytes:
        return placed
    return None


def next_paths(plan: ShardPlan) -> tuple[str, str]:
    """Return the relative paths of tar and index of a shard that is not yet in place."""
    stem = f"{folder_of(plan.pack)}/{NEXT}/{Path(plan.name).stem}-{plan.key}"
    return f"{stem}.tar", f"{stem}.parquet"


# -- writing --------------------------------------------------------------------------------------------------------


def rows_by_shard(
    connection: duckdb.DuckDBPyConnection, plans: Sequence[ShardPlan]
) -> Iterator[tuple[ShardPlan, pa.Table]]:
    """Yield (plan, rows of `catalog` that its samples are made from, in the tar's order) for each plan.

    One query serves several shards, because finding the rows of one costs as much as a scan of the whole catalog.
    """
    late = [name for name in late_columns() if name != "duplicate_group" or _has_groups(plans)]
    columns = ", ".join(f"c.{name}" for name in (*FIXED, *late, *REFERENCES, *MEDIA))
    for start in range(0, len(plans), SHARDS_AT_ONCE):
        some = plans[start : start + SHARDS_AT_ONCE]
        clip_ids = pa.concat_arrays([plan.clip_ids for plan in some])
        connection.register("wanted_clips", pa.table({"clip_id": clip_ids, "rank": np.arange(len(clip_ids))}))
        try:
            sql = f"SELECT {columns} FROM wanted_clips w JOIN catalog c USING (clip_id) ORDER BY w.rank"
            rows = connection.sql(sql).to_arrow_table()
        finally:
            connection.unregister("wanted_clips")
        for plan in some:
            yield plan, rows.slice(0, len(plan.clip_ids))
            rows = rows.slice(len(plan.clip_ids))


def _has_groups(plans: Sequence[ShardPlan]) -> bool:
    """Return whether KEY.json names near-duplicate groups: only in a pack that is shuffled over the whole corpus."""
    return any(volume_of(plan.name) is None for plan in plans)


def write_shard(plan: ShardPlan, rows: pa.Table, root: Path, *, fsync: bool = False) -> Written:
    """Write one planned shard under `shards/.next`; `rows` are those of `rows_by_shard`.

    Clips whose media differ from the manifest (missing, truncated, another hash) are left out and reported.
    """
    assert rows["clip_id"].to_pylist() == plan.clip_ids.to_pylist(), f"{plan.name}: rows are not the plan's"
    packed: list[dict[str, Any]] = []
    failures: list[tuple[str, ItemError]] = []

    def samples() -> Iterator[Sample]:
        for row in (row for batch in rows.to_batches(max_chunksize=256) for row in batch.to_pylist()):
            try:
                sample = _sample(row, plan.members, root)
            except ItemError as error:
                failures.append((row["clip_id"], error))
                continue
            packed.append(row)
            yield sample

    files, (tar, index) = files_of(root), next_paths(plan)
    files.remove(index)  # an index under `.next` marks its tar as complete
    members = {member.name: member for member in write_tar(root / tar, samples(), fsync=fsync)}
    lines = [_index_line(row, plan, position, members) for position, row in enumerate(packed)]
    table = pa.Table.from_pylist(lines, INDEX)
    files.upload(tar)
    stamp = Stamp(plan.key, (root / tar).stat().st_size, tuple(clip_id for clip_id, _ in failures))
    write_index(root / index, table, stamp, fsync=fsync)
    files.upload(index)
    return Written(table, failures)


def commit_shards(
    root: Path,
    plans: Sequence[ShardPlan],
    *,
    volume: int | None = None,
    pack: str = MAIN,
    there: Collection[str] | None = None,
    fsync: bool = False,
) -> tuple[int, int]:
    """Put the shards of one volume in place, then remove its files without a plan; return how many of each.

    All plans must be complete (see `pending_shards`). After a kill, calling it again continues. The caller refreshes
    `shards`, once for all volumes.

    volume  of the plans, which may be none; None: of a pack that is shuffled over the whole corpus
    there   names of the volume's shards and indexes in place, if the caller has listed the folder
    """
    files, folder = files_of(root), folder_of(pack)
    for plan in plans:
        assert _stamp_of(root, plan), f"{plan.name} was not written"
    placed = sum(place(root, plan) for plan in plans)
    if fsync and placed:
        sync(root / folder)
    wanted = {plan.name for plan in plans} | {plan.index_name for plan in plans}
    if there is None:
        there = [name for name in shard_files(root, pack) if volume_of(name) == volume]
    stale = [name for name in there if name not in wanted]
    _remove_shards(root, [f"{folder}/{name}" for name in stale])
    if volume is None:
        files.remove_folder(f"{folder}/{NEXT}")
    else:
        waiting = files.list_prefix(f"{folder}/{NEXT}/{volume:06d}-")
        _remove_shards(root, [name for name in waiting if volume_of(f"{_shard_of(name)}.tar") == volume])
    return placed, len(stale)


def _shard_of(waiting: str) -> str:
    """Return the shard's name, without an ending, of a file under `.next`: SHARD-KEY.tar."""
    return Path(waiting).stem.rpartition("-")[0]


def _remove_shards(root: Path, relatives: Collection[str]) -> None:
    """Remove indexes before tars: a tar without an index is not a shard."""
    files = files_of(root)
    files.remove(*(name for name in relatives if name.endswith(".parquet")))
    files.remove(*(name for name in relatives if not name.endswith(".parquet")))


def remove_other_names(root: Path, settings: PackSettings, pack: str = MAIN) -> int:
    """Remove the shards of the other `pack.shuffle`, and what is under `.next`; return how many files were in place.

    For the end of packing: until then, these are the only shards of clips whose volumes have none yet.
    """
    files, folder = files_of(root), folder_of(pack)
    by_volume = settings.shuffle == "volume"
    stale = [name for name in shard_files(root, pack) if (volume_of(name) is not None) != by_volume]
    _remove_shards(root, [f"{folder}/{name}" for name in stale])
    files.remove_folder(f"{folder}/{NEXT}")
    return len(stale)


def shard_files(root: Path, pack: str = MAIN) -> list[str]:
    """Return the names of a pack's shards and indexes that are in place, or were until a kill."""
    return [name for name in files_of(root).sizes(folder_of(pack)) if is_shard_file(name)]


def place(root: Path, plan: ShardPlan) -> bool:
    """Move a shard from `.next` into place, the index last (see `_stamp_of`); return False if it is there already."""
    files, (next_tar, next_index) = files_of(root), next_paths(plan)
    tar, index = plan.tar, plan.index
    if not (root / next_index).exists():
        return False
    if files.size(next_tar) is not None:
        files.remove(tar)
        files.remove(index)
        files.move(next_tar, tar)
    files.move(next_index, index)
    return True


# -- one sample -----------------------------------------------------------------------------------------------------


def _sample(row: dict[str, Any], members: tuple[Extension, ...], root: Path) -> Sample:
    """Read the members of a sample. Raises ItemError: hash-mismatch, truncated-tar, tar-missing."""
    content: dict[str, bytes] = {}
    if "mp4" in members:
        content["mp4"] = _checked(row, "mp4", root, row["mp4_offset"], row["num_bytes"], row["sha256"])
    if "jpg" in members and row["frames"]:
        frame = row["frames"][0]
        content["jpg"] = _checked(row, "jpg", root, frame["offset"], frame["num_bytes"], frame["sha256"])
    if "txt" in members:
        content["txt"] = row["text"].encode()
    if "json" in members:
        content["json"] = sample_json(row)
    return Sample(sample_key(row["clip_id"]), content)


def _checked(row: dict[str, Any], extension: str, root: Path, offset: int, num_bytes: int, sha256: str) -> bytes:
    data = read_member(files_of(root).local(row["tar"]), offset, num_bytes)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ItemError("hash-mismatch", f"{row['tar']}: the {extension} at {offset} does not have the clip's hash")
    return data


def sample_json(row: dict[str, Any]) -> bytes:
    """Return the content of KEY.json, with sorted keys.

    Unknown values are left out: readers that infer types from the first samples (Hugging Face `datasets`) accept keys
    that appear later, but not a null that becomes a text. Hashes of 64 bits are hex, because JSON readers lose the low
    bits of such integers. Local sources are named without their folder.
    """
    values = {name: value for name, value in row.items() if name not in MEDIA}
    values["url"] = Path(row["url"]).name if row["kind"] == "file" and row["url"] else row["url"]
    values["key"] = sample_key(row["clip_id"])
    values["subtitle"] = values.pop("text")
    values["mp4_sha256"], values["jpg_sha256"] = row["sha256"], row["frame_sha256"]
    values["phash"] = [f"{value:016x}" for value in row["phash"] or ()] or None
    known = {name: value for name, value in values.items() if value is not None and value == value}  # nor NaN
    return json.dumps(known, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def _index_line(row: dict[str, Any], plan: ShardPlan, position: int, members: dict[str, Member]) -> dict[str, Any]:
    key = sample_key(row["clip_id"])
    line = {name: row[name] for name in INDEX.names if name in row and name != "mp4_offset"}  # that is the clip's
    line |= {"key": key, "shard": plan.name, "position": position, "subtitle": row["text"]}
    for extension in EXTENSIONS:
        if member := members.get(f"{key}.{extension}"):
            line |= {f"{extension}_offset": member.offset, f"{extension}_bytes": member.num_bytes}
            line |= {f"{extension}_sha256": member.sha256} if extension in ("mp4", "jpg") else {}
    return line
