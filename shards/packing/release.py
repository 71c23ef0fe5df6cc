"""Delete tars of clips that shards hold, and keep every clip in some file while shards change (`pack.keep_clips`).

release_clips   deletes the tars whose clips are all in shards of the main pack, after reading them there
keep_needed     copies clips to a tar of their own before the last file that holds them is changed
index_tars      finds the clips in shards whose index is lost or was removed

Order of a release: the shards' bytes are read and compared, the record (`shards.corpus.released_clips`) is written, the
manifest that names the shards is published, the tars are deleted. Killed anywhere, the next one continues.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipmill.base.atomic_file import write_text
from clipmill.base.errors import ItemError
from clipmill.base.settings import digest
from shards.corpus.fragments import sync_files
from shards.corpus.ledger import Ledger
from shards.corpus.packs import MAIN, NEXT, folder_of
from shards.corpus.released_clips import (
    FOUND,
    KEPT,
    KEPT_CLIPS,
    PackedFile,
    Record,
    packed_files,
    read_record,
    recorded_volumes,
    write_record,
)
from shards.corpus.schema import INDEX
from shards.corpus.stage_query import chosen_rows
from shards.packing.index import Stamp, read_index, write_index
from shards.packing.pack import shard_files
from shards.packing.tar import read_member, scan, write_clips
from shards.packing.verify import Problem
from shards.storage.local import MANIFEST_NAME, PRIVATE
from shards.storage.mirror import files_of
from shards.storage.sealed_parquet import DamagedFile

NOTES = f"{PRIVATE}/released.json"  # volume → what it was made of when nothing was left to release: a cache

Stays = Callable[[PackedFile], bool]


@dataclass
class ReleaseReport:
    num_tars: int = 0
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)  # of shards that do not hold the bytes of their clips


# -- deleting tars --------------------------------------------------------------------------------------------------


def release_clips(ledger: Ledger, publish: Callable[[], None], *, delete: bool, fsync: bool) -> ReleaseReport:
    """Delete the tars of which every clip that counts is in a shard of the main pack with the bytes of its row.

    Call it when the shards are in place and the manifest is published. `publish` publishes it again. Without `delete`
    only the records of earlier deletions are brought up to date.
    """
    root, files, report = ledger.root, ledger.files, ReleaseReport()
    files.refresh("shards")
    sizes = {f"clips/{name}": size for name, size in files.sizes("clips").items() if name.startswith("cut-")}
    by_volume: dict[int, list[str]] = {volume: [] for volume in recorded_volumes(root)}
    for tar in sizes if delete else ():
        by_volume.setdefault(ledger.volume_of_commit(Path(tar).stem), []).append(tar)
    packed = [file for file in packed_files(root) if file.pack == MAIN and file.is_in_place]
    known, done, stale, shards = _read_notes(root), [], [], set()
    for volume, tars in sorted(by_volume.items()):
        here = ledger.released.of_volume(packed, volume)
        if known.get(str(volume)) == _made_of(ledger, volume, here, delete):
            continue
        ledger.show(volume)
        whole, held_in = _whole_tars(ledger, volume, tars, here, report)
        done += whole
        shards |= held_in
        stale += _record(ledger, volume, {tar: sizes[tar] for tar in whole}, here)
    if done or stale:
        if fsync and not files.store:
            sync_files(root, sorted({*shards, *(str(Path(tar).with_suffix(".parquet")) for tar in shards)}))
        publish()
        if fsync and not files.store:
            sync_files(root, [MANIFEST_NAME])
        files.remove(*done, *stale)
    notes = {
        str(volume): _made_of(ledger, volume, ledger.released.of_volume(packed, volume), delete) for volume in by_volume
    }
    write_text(root / NOTES, json.dumps({} if report.problems else notes))
    report.num_tars, report.num_bytes = len(done), sum(sizes[tar] for tar in done)
    return report


def _whole_tars(
    ledger: Ledger, volume: int, tars: list[str], files: list[PackedFile], report: ReleaseReport
) -> tuple[list[str], set[str]]:
    """Return the tars of which all clips that count were read in a shard, and these shards."""
    ledger.released.find("packed_now", tars, files)
    with ledger._as_table("named_tars", tars):
        rows = ledger.connection.sql(f"""
            SELECT r.tar AS own_tar, r.clip_id, r.num_bytes, r.sha256, p.tar, p.mp4_offset, p.frames,
                   k.clip_id IS NOT NULL AND p.tar IS NOT NULL AS packed
            FROM ({chosen_rows("cut", "clips")}) r
            LEFT JOIN current_clips k ON k.clip_id = r.clip_id AND k.fragment = r.fragment
            LEFT JOIN packed_now p ON p.clip_id = r.clip_id AND p.fragment = r.fragment
            WHERE r.tar IN (SELECT name FROM named_tars) ORDER BY p.tar, p.mp4_offset
        """).to_arrow_table()
    rows = rows.to_pylist()
    kept = {row["own_tar"] for row in rows if not row["packed"]}
    shards: set[str] = set()
    for row in rows:
        if row["own_tar"] in kept:
            continue
        if why := _difference(ledger.root, row):
            kept.add(row["own_tar"])
            report.problems.append(Problem(row["tar"], row["clip_id"], "hash-mismatch", why))
        shards.add(row["tar"])
    return sorted({row["own_tar"] for row in rows} - kept), shards


def _difference(root: Path, row: dict[str, Any]) -> str:
    """Return how the bytes of a clip in its shard differ from its row; "" if they do not."""
    members = [(row["mp4_offset"], row["num_bytes"], row["sha256"])]
    members += [(frame["offset"], frame["num_bytes"], frame["sha256"]) for frame in row["frames"] or ()]
    for offset, num_bytes, sha256 in members:
        try:
            data = read_member(files_of(root).local(row["tar"]), offset, num_bytes)
        except ItemError as error:
            return error.message
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            return f"its SHA-256 at {offset} is {found}, not {sha256}"
    return ""


def _record(ledger: Ledger, volume: int, tars: dict[str, int], files: Iterable[PackedFile]) -> list[str]:
    """Bring the record of a volume up to date, with these tars; return the tars of kept clips that are packed again."""
    record = read_record(ledger.root, volume)
    known = {tar for (tar,) in ledger.connection.execute("SELECT DISTINCT tar FROM clips").fetchall()}
    all_tars = {tar: size for tar, size in record.tars.items() if tar in known} | tars
    ledger.released.find("packed_now", list(all_tars), list(files))
    needed = ledger.connection.execute(
        "SELECT clip_id FROM packed_now p WHERE p.tar IS NULL AND (clip_id, fragment) IN (SELECT (clip_id, fragment) "
        "FROM current_clips)"
    ).fetchall()
    kept = record.kept.filter(
        pc.is_in(record.kept["clip_id"], pa.array([clip_id for (clip_id,) in needed], pa.string()))
    )
    new = Record(all_tars, {file.tar: file.num_bytes for file in files}, kept)
    if (new.tars, new.shards) != (record.tars, record.shards) or not new.kept.equals(record.kept):
        write_record(ledger.root, volume, new)
        ledger.relocated(volume)
    return sorted(set(record.kept["tar"].to_pylist()) - set(kept["tar"].to_pylist()))


def _made_of(ledger: Ledger, volume: int, files: Iterable[PackedFile], delete: bool) -> str:
    return digest([delete, ledger.content_of(volume), sorted((file.tar, file.num_bytes) for file in files)])


def _read_notes(root: Path) -> dict[str, str]:
    try:
        return json.loads((root / NOTES).read_text())
    except (OSError, ValueError):
        return {}


# -- changing shards ------------------------------------------------------------------------------------------------


def keep_needed(ledger: Ledger, stays: Stays, volumes: Iterable[int] | None = None) -> None:
    """Copy the clips that no file but those without `stays` holds to a tar of their own, before these are changed.

    volumes  whose clips may be in them; None: all. Clips that do not count any more are not kept.
    """
    recorded = recorded_volumes(ledger.root)
    for volume in recorded if volumes is None else set(recorded) & set(volumes):
        record = read_record(ledger.root, volume)
        if not record.tars:
            continue
        ledger.relocated(volume)  # shards may have changed since they were last looked at
        ledger.show(volume)
        files = ledger.released.of_volume(packed_files(ledger.root), volume)
        ledger.released.find("packed_then", list(record.tars), [file for file in files if stays(file)], record.kept)
        rows = ledger.connection.sql("""
            SELECT k.clip_id, k.num_bytes, k.sha256, k.tar, k.mp4_offset, k.frames
            FROM current_clips k JOIN packed_clips n ON n.clip_id = k.clip_id AND n.fragment = k.fragment
            JOIN packed_then t ON t.clip_id = k.clip_id AND t.fragment = k.fragment
            WHERE n.tar IS NOT NULL AND t.tar IS NULL ORDER BY k.clip_id
        """).to_arrow_table()
        rows = [row for row in rows.to_pylist() if not _difference(ledger.root, row)]
        if rows:
            write_kept(ledger.root, volume, record, rows)
            ledger.relocated(volume)
            ledger.show(volume)


def write_kept(root: Path, volume: int, record: Record, rows: list[dict[str, Any]]) -> None:
    """Copy clips to a tar of their own and add them to the record. `rows`: with the places where they are now."""
    tar = f"{KEPT}{volume:06d}-{digest([[row['clip_id'], row['sha256']] for row in rows])[:12]}.tar"
    files = files_of(root)
    write_clips(root / tar, rows, lambda row: files.local(row["tar"]))
    if not files.store:
        sync_files(root, [tar])
    files.upload(tar)
    lines = []
    for row in rows:
        line = {"clip_id": row["clip_id"], "tar": tar, "mp4_offset": row["mp4_offset"], "mp4_bytes": row["num_bytes"]}
        line["mp4_sha256"] = row["sha256"]
        for frame in row["frames"] or ():
            line |= {"jpg_offset": frame["offset"], "jpg_bytes": frame["num_bytes"], "jpg_sha256": frame["sha256"]}
        lines.append(line)
    kept = pa.concat_tables([record.kept, pa.Table.from_pylist(lines, KEPT_CLIPS)])
    write_record(root, volume, Record(record.tars, record.shards, kept))


# -- shards without an index ----------------------------------------------------------------------------------------


def index_tars(root: Path) -> list[str]:
    """Make an index for each shard of the main pack that has none, where clips are in shards alone.

    It is made by reading the tar, names the bytes that are there, and serves until the shard is packed again. Returns
    the shards.
    """
    if not recorded_volumes(root):
        return []
    files, folder, done = files_of(root), folder_of(MAIN), []
    names = set(shard_files(root))
    for name in sorted(name for name in names if name.endswith(".tar")):
        index = f"{folder}/{Path(name).with_suffix('.parquet').name}"
        if (root / index).is_file() and _can_read(root / index):
            continue
        stand_in = f"{folder}/{NEXT}/{Path(name).stem}-{FOUND}.parquet"
        rows = list(_rows_of(files.local(f"{folder}/{name}"), name))
        write_index(root / stand_in, pa.Table.from_pylist(rows, INDEX), Stamp(FOUND, -1))
        files.upload(stand_in)
        done.append(f"{folder}/{name}")
    return done


def _can_read(index: Path) -> bool:
    try:
        read_index(index)
    except (DamagedFile, OSError):
        return False
    return True


def _rows_of(tar: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of an index as far as a tar tells them; a tar that is damaged has those before the damage."""
    samples: dict[str, dict[str, Any]] = {}
    with suppress(ItemError):
        for member, sha256 in scan(tar, lambda member: lambda chunk: None):
            key, _, extension = member.name.partition(".")
            if extension in ("mp4", "jpg"):
                row = samples.setdefault(key, {"key": key, "shard": name, "position": len(samples)})
                row |= {f"{extension}_offset": member.offset, f"{extension}_bytes": member.num_bytes}
                row[f"{extension}_sha256"] = sha256
    for key, row in samples.items():
        video_id, _, n = key.rpartition("_")
        if n.isdigit():
            yield row | {"video_id": video_id, "clip_id": f"{video_id}.{int(n)}"}


def packed_clips_of(ledger: Ledger, commit: str) -> dict[str, dict[str, Any]] | None:
    """Return clip_id → tar, mp4_offset, frames: the present place of each clip of a commit whose tar was deleted.

    None if the tar is there. A clip without a place is in no file any more.
    """
    volume = ledger.volume_of_commit(commit)
    if f"clips/{commit}.tar" not in read_record(ledger.root, volume).tars or ledger.files.has(f"clips/{commit}.tar"):
        return None
    ledger.activate(volume)
    ledger.released.loaded = None  # shards have just been compacted
    ledger.released.load(volume)
    sql = "SELECT clip_id, tar, mp4_offset, frames FROM packed_clips WHERE fragment = $name AND tar IS NOT NULL"
    rows = ledger.connection.sql(sql, params={"name": commit}).to_arrow_table().to_pylist()
    return {row.pop("clip_id"): row for row in rows}


# -- forgetting -----------------------------------------------------------------------------------------------------


def compact_kept(root: Path, covers: Callable[[str], bool]) -> int:
    """Write the tars of kept clips again without the clips whose ids `covers`; return how many were removed."""
    num_removed = 0
    for volume in recorded_volumes(root):
        record = read_record(root, volume)
        rows = record.kept.to_pylist()
        touched = {row["tar"] for row in rows if covers(row["clip_id"])}
        if not touched:
            continue
        num_removed += sum(covers(row["clip_id"]) for row in rows)
        rest = [row for row in rows if row["tar"] in touched and not covers(row["clip_id"])]
        others = Record(record.tars, record.shards, pa.Table.from_pylist(
            [row for row in rows if row["tar"] not in touched], KEPT_CLIPS
        ))  # fmt: skip
        if rest:
            write_kept(root, volume, others, [_as_clip(row) for row in rest])
        else:
            write_record(root, volume, others)
        files_of(root).remove(*sorted(touched))
    return num_removed


def _as_clip(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a record in the form of a row of `clips`."""
    frame = {"offset": row["jpg_offset"], "num_bytes": row["jpg_bytes"], "sha256": row["jpg_sha256"]}
    return {
        "clip_id": row["clip_id"],
        "tar": row["tar"],
        "mp4_offset": row["mp4_offset"],
        "num_bytes": row["mp4_bytes"],
        "sha256": row["mp4_sha256"],
        "frames": [frame] if row["jpg_offset"] is not None else [],
    }
