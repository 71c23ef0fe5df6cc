"""Remove videos with a tombstone from the files that contain any of them; other files do not change.

1. Shards: tar and index are written again without the forgotten samples, by the same two steps as in packing. A
   KEY.json whose near-duplicate group is named after a forgotten clip loses that name.
2. Commits: written again without the forgotten rows and clips, under the name of the rest, with the name of the commit
   that they replace; then the old one is removed, its ledger fragment first. So a kill leaves the old commit, the new
   one, or both, and a ledger that finds both takes the new one. Those of a merged volume are replaced by loose commits,
   and its files are written again without them.
3. The fragments of `sources` come last, because only they name the units and the names to search for.

Nothing here depends on the time or on earlier runs, so a second run after a kill ends in the same bytes.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from clipmill.base.errors import ItemError, UserError
from clipmill.base.settings import digest
from shards.corpus.fragments import commit_name, fragment_path, outputs_of, unit_in, write_commit
from shards.corpus.merged import merge, merged_volumes, read_head, read_rows
from shards.corpus.packs import MAIN, folder_of, index_files, named_packs, volume_of
from shards.corpus.schema import INDEX, LEDGER, late_columns
from shards.corpus.tombstones import hash_of, read_tombstones
from shards.packing.index import Stamp, read_index, read_stamp, write_index
from shards.packing.pack import (
    EXTENSIONS,
    NEXT,
    Extension,
    ShardPlan,
    next_paths,
    place,
    rows_by_shard,
    sample_json,
)
from shards.packing.tar import Sample, read_member, write_clips, write_tar
from shards.storage.mirror import files_of
from shards.storage.sealed_parquet import DamagedFile, read_parquet, write_parquet

REDACTED = "[forgotten]"
_NAMES = ("run_id", "item_id", "unit", "key", "editing")  # of rows that are of no video


@dataclass
class CompactReport:
    num_shards: int = 0
    num_samples: int = 0
    num_commits: int = 0
    num_files: int = 0  # of sources/
    num_bytes: int = 0  # by which the corpus is smaller
    settings: list[str] = field(default_factory=list)  # forgotten names that a setting in corpus.yaml still contains

    @property
    def did_something(self) -> bool:
        return bool(self.num_shards or self.num_commits or self.num_files)


@dataclass(frozen=True)
class ForgottenIndex:
    """Find remains of forgotten videos: by hashes of ids, and by their names in fragments of `sources`."""

    hashes: frozenset[str]
    names: tuple[str, ...] = ()  # ids and URLs
    units: tuple[str, ...] = ()

    @classmethod
    def of(cls, root: Path) -> "ForgottenIndex":
        forgotten = cls(frozenset(read_tombstones(root)["video_hash"].to_pylist()))
        names, units = set(), set()
        for path in _fragments(root, "sources") if forgotten.hashes else ():
            table = read_parquet(path, columns=["video_id", "url", "source_id", "unit"])
            for row in table.filter(forgotten.mask(table["video_id"])).to_pylist():
                units.add(row.pop("unit"))
                names.update(name for name in row.values() if name)
        return cls(forgotten.hashes, tuple(sorted(names)), tuple(sorted(units)))

    def covers(self, item_id: str) -> bool:
        """Return whether an id is that of a forgotten video, or of a clip or sentence of one."""
        return hash_of(item_id.partition(".")[0]) in self.hashes

    def mask(self, ids: pa.ChunkedArray) -> pa.Array:
        return pa.array([self.covers(item_id) for item_id in ids.to_pylist()], pa.bool_())

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Return a pattern of the names, each as a whole word."""
        names = "|".join(re.escape(name) for name in sorted(self.names, key=len, reverse=True))
        return re.compile(rf"(?<![A-Za-z0-9_-])(?:{names})(?![A-Za-z0-9_-])" if names else r"(?!)")


# -- shards ---------------------------------------------------------------------------------------------------------


PlansOf = Callable[[str, int | None], Sequence[ShardPlan]]  # of (pack, volume); None: the pack is one over all volumes


def compact_shards(
    root: Path,
    connection: duckdb.DuckDBPyConnection,
    plans_of: PlansOf,
    forgotten: ForgottenIndex,
    report: CompactReport,
) -> None:
    """Write shards with forgotten samples again, those of named packs too.

    plans_of  returns the shards that packing plans now, without these samples; called for touched volumes only

    Raises UserError for a shard that cannot be read.
    """
    packs = [MAIN, *named_packs(root)]
    for pack in packs:
        _settle(root, pack)
    if not forgotten.hashes:
        return
    for pack in packs:
        planned: tuple[int | None, dict[str, ShardPlan]] = (-1, {})  # of one volume at a time
        for path in index_files(root, pack):
            try:
                shard = _Shard(root, path, pack)
                if shard.is_touched(forgotten):
                    volume = volume_of(path.name)
                    if planned[0] != volume:
                        planned = volume, {plan.name: plan for plan in plans_of(pack, volume)}
                    shard.rewrite(connection, planned[1].get(shard.name), forgotten, report)
                shard.evict()
            except (ItemError, DamagedFile, OSError) as error:
                name = f" --name {pack}" if pack else ""
                raise UserError(
                    f"{path} or its tar cannot be read ({error}): write it again with `clipmill run pack{name}`."
                ) from error
        _settle(root, pack)


def _settle(root: Path, pack: str) -> None:
    """Complete shards that a kill left half in place (see `shards.packing.pack.place`); clear `.next`."""
    files, folder = files_of(root), folder_of(pack)
    files.refresh("shards")
    for path in sorted((root / folder / NEXT).glob("*.parquet")):
        stamp, name = read_stamp(path), path.stem.rpartition("-")[0]
        index, next_tar = (f"{folder}/{NEXT}/{path.stem}{suffix}" for suffix in (".parquet", ".tar"))
        tar, placed = f"{folder}/{name}.tar", f"{folder}/{name}.parquet"
        if files.size(tar) is None and files.size(next_tar) is not None:
            files.remove(placed)
            files.move(next_tar, tar)
        if files.size(placed) is None and stamp is not None and files.size(tar) == stamp.tar_bytes:
            files.move(index, placed)
    files.remove_folder(f"{folder}/{NEXT}")


class _Shard:
    """One shard in place."""

    def __init__(self, root: Path, index: Path, pack: str):
        self.root, self.files, self.name, self.pack = root, files_of(root), f"{index.stem}.tar", pack
        self.relative = f"{folder_of(pack)}/{self.name}"
        self.index, self.stamp = read_index(index), read_stamp(index)
        if self.stamp is None:
            raise ItemError("bad-index", "its metadata do not name the plan that it was written for")

    @cached_property
    def tar(self) -> Path:
        return self.files.local(self.relative)

    def evict(self) -> None:
        """Delete the mirror's copy of the tar when the corpus is in a store: its shards need too much room."""
        if self.files.store:
            (self.root / self.relative).unlink(missing_ok=True)

    def is_touched(self, forgotten: ForgottenIndex) -> bool:
        if any(forgotten.mask(self.index["video_id"]).to_pylist()):
            return True
        ranges = zip(self.index["json_offset"].to_pylist(), self.index["json_bytes"].to_pylist(), strict=True)
        with open(self.tar, "rb") as file:
            return any(
                _group_is_forgotten(os.pread(file.fileno(), num_bytes, offset), forgotten)
                for offset, num_bytes in ranges
                if offset is not None
            )

    def rewrite(
        self,
        connection: duckdb.DuckDBPyConnection,
        plan: ShardPlan | None,
        forgotten: ForgottenIndex,
        report: CompactReport,
    ) -> None:
        before = self.tar.stat().st_size
        rows = self.index.filter(pc.invert(forgotten.mask(self.index["video_id"]))).to_pylist()
        report.num_shards += 1
        report.num_samples += self.index.num_rows - len(rows)
        missing = tuple(clip_id for clip_id in self.stamp.missing if not forgotten.covers(clip_id))
        if not rows:
            self.files.remove(str(Path(self.relative).with_suffix(".parquet")))
            self.files.remove(self.relative)
            report.num_bytes += before
            return
        if plan is None or not self._is_as_planned(connection, plan, rows, missing):
            clip_ids = [row["clip_id"] for row in rows]
            key = digest([self.stamp.plan_key, clip_ids])  # of no plan: the next packing writes this shard again
            plan = ShardPlan(self.name, pa.array(clip_ids, pa.string()), EXTENSIONS, key, self.pack)
        tar, index = next_paths(plan)
        members = {m.name: m for m in write_tar(self.root / tar, (self._sample(row, forgotten) for row in rows))}
        self.files.upload(tar)
        lines = []
        for position, row in enumerate(rows):
            lines.append(row | {"position": position})
            for extension in _extensions(row):
                member = members[f"{row['key']}.{extension}"]
                lines[-1] |= {f"{extension}_offset": member.offset, f"{extension}_bytes": member.num_bytes}
        stamp = Stamp(plan.key, (self.root / tar).stat().st_size, missing)
        write_index(self.root / index, pa.Table.from_pylist(lines, INDEX), stamp)
        self.files.upload(index)
        place(self.root, plan)
        report.num_bytes += before - self.tar.stat().st_size

    def _sample(self, row: dict[str, Any], forgotten: ForgottenIndex) -> Sample:
        content = {extension: self._member(row, extension) for extension in _extensions(row)}
        if "json" in content and _group_is_forgotten(content["json"], forgotten):
            values = json.loads(content["json"])
            del values["duplicate_group"]
            content["json"] = json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
        return Sample(row["key"], content)

    def _member(self, row: dict[str, Any], extension: Extension) -> bytes:
        return read_member(self.tar, row[f"{extension}_offset"], row[f"{extension}_bytes"])

    def _is_as_planned(
        self, connection: duckdb.DuckDBPyConnection, plan: ShardPlan, rows: list[dict[str, Any]], missing: tuple
    ) -> bool:
        """Return whether packing would write these samples, except for late columns: then they get the plan's key."""
        wanted = next(table for _, table in rows_by_shard(connection, [plan])).to_pylist()
        wanted = [row for row in wanted if row["clip_id"] not in missing]
        if [row["clip_id"] for row in wanted] != [row["clip_id"] for row in rows]:
            return False
        return all(
            set(_extensions(row)) == {e for e in plan.members if e != "jpg" or want["frames"]}
            and "json" in plan.members
            and _has_same_facts(self._member(row, "json"), sample_json(want))
            for row, want in zip(rows, wanted, strict=True)
        )


def _extensions(row: dict[str, Any]) -> list[Extension]:
    return [extension for extension in EXTENSIONS if row[f"{extension}_offset"] is not None]


def _has_same_facts(packed: bytes, wanted: bytes) -> bool:
    """Return whether a KEY.json equals the wanted one but for late columns, and lacks none of those but the group."""
    old, new, late = json.loads(packed), json.loads(wanted), set(late_columns())
    fixed = (old.keys() | new.keys()) - late
    return new.keys() - {"duplicate_group"} <= old.keys() and all(
        name in old and name in new and old[name] == new[name] for name in fixed
    )


def _group_is_forgotten(data: bytes, forgotten: ForgottenIndex) -> bool:
    return b'"duplicate_group"' in data and forgotten.covers(json.loads(data)["duplicate_group"])


# -- sources and words ----------------------------------------------------------------------------------------------


def remove_sources(root: Path, forgotten: ForgottenIndex, report: CompactReport) -> None:
    """Remove downloaded files and unfinished downloads. Local files that a list names do not belong to the corpus."""
    files = files_of(root)
    for path in sorted((root / "sources").glob("*/*.part*")):  # also the lock file of a killed worker
        if forgotten.covers(path.name):
            report.num_files += 1
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for relative, num_bytes in files.below("sources").items():
        if forgotten.covers(relative.rpartition("/")[2]):
            report.num_files += 1
            report.num_bytes += num_bytes
            files.remove(relative)


def redact(root: Path, forgotten: ForgottenIndex, report: CompactReport) -> None:
    """Remove forgotten names from all texts of runs and edits, and from the problems of lists."""
    for path in _fragments(root, "runs"):
        table = read_parquet(path)
        _replace(root, path, table, _redacted(table, forgotten), report)
    for path in _fragments(root, "edit_rounds"):
        table = read_parquet(path)
        if not (redacted := _redacted(table, forgotten)).equals(table):
            _rewrite_commit(root, path.stem, {"edit_rounds": redacted}, report)
    for path in [
        *(root / "fragments" / "ledger").glob("ingest-problems-*.parquet"),
        *(root / "fragments" / "ledger").glob("pack*.parquet"),
    ]:
        if path.is_file():
            table = read_parquet(path)
            kept = [
                row
                for row in table.to_pylist()
                if not (row["stage"] == "pack" and forgotten.covers(row["item_id"]))
                and not forgotten.pattern.search(f"{row['item_id']} {row['message'] or ''}")
            ]
            _replace(root, path, table, pa.Table.from_pylist(kept, table.schema), report)


def _redacted(table: pa.Table, forgotten: ForgottenIndex) -> pa.Table:
    texts = [field.name for field in table.schema if field.type == pa.string() and field.name not in _NAMES]
    rows = [
        row | {name: forgotten.pattern.sub(REDACTED, row[name]) for name in texts if row[name]}
        for row in table.to_pylist()
    ]
    return pa.Table.from_pylist(rows, table.schema)


def _rewrite_commit(root: Path, old: str, tables: dict[str, pa.Table], report: CompactReport) -> None:
    """Write a commit without media again under another name: its ledger fragment has the sizes of its files."""
    path = fragment_path(root, "ledger", old)
    outputs = outputs_of(path)
    report.num_commits += 1
    write_commit(root, f"{old}r", tables, read_parquet(path), [], replaces=old)
    files_of(root).remove(str(path.relative_to(root)))
    files_of(root).remove(*outputs)


def _replace(root: Path, path: Path, before: pa.Table, after: pa.Table, report: CompactReport) -> None:
    """Replace a fragment that refers to no other file, or remove it if no rows remain."""
    if after.equals(before):
        return
    report.num_commits += 1
    relative = str(path.relative_to(root))
    if after.num_rows:
        write_parquet(path, after.replace_schema_metadata(before.schema.metadata))
        files_of(root).upload(relative)
    else:
        files_of(root).remove(relative)


# -- commits --------------------------------------------------------------------------------------------------------


PlacesOf = Callable[[str], dict[str, dict[str, Any]] | None]  # see `shards.packing.release.packed_clips_of`


def compact_commits(root: Path, forgotten: ForgottenIndex, report: CompactReport, places_of: PlacesOf) -> None:
    """Compact the commits of all units with forgotten videos; those of `sources` last.

    places_of  where the clips of a commit without its tar are; those that remain get a tar again
    """
    for volume in merged_volumes(root):
        _compact_merged(root, volume, forgotten, report, places_of)
    ledger = root / "fragments" / "ledger"
    names = sorted({path.stem for unit in forgotten.units for path in ledger.glob(f"[!.]*-{unit}-*.parquet")})
    for name in names:
        if not name.startswith("ingest-"):
            _compact_commit(root, name, forgotten, report, places_of)
    for path in _fragments(root, "sources"):
        _compact_commit(root, path.stem, forgotten, report, places_of)


def _compact_merged(
    root: Path, volume: int, forgotten: ForgottenIndex, report: CompactReport, places_of: PlacesOf
) -> None:
    """Write what remains of the touched commits of a merged volume as loose ones, and its files without them.

    The remains are not merged here, so that a run after a kill leaves the same files. A commit that is loose, too, was
    made again: its own rows count, so only the merged ones go.
    """
    head = read_head(root, volume)
    names = [name for name in head.commits if unit_in(name) in forgotten.units]
    rows = {
        table: read_rows(root, head, table, names)
        for table in sorted({table for name in names for table in head.commits[name].tables})
    }
    touched = []
    for name in names:
        tables = {
            table: rows[table].filter(pc.field("commit") == name).drop_columns("commit")
            for table in head.commits[name].tables
        }
        if any(any(forgotten.mask(table["item_id"]).to_pylist()) for table in tables.values()):
            touched.append(name)
            if fragment_path(root, "ledger", name).is_file():
                continue
            kept = {table: _without(data, forgotten) for table, data in tables.items()}
            ledger = kept.pop("ledger")
            if (places := places_of(name)) is not None:
                kept["clips"], ledger = _at_places(kept["clips"], ledger, places)
            _write_in_place_of(root, name, {table: data for table, data in kept.items() if data.num_rows}, ledger)
    if touched or head.num_removed:
        after = merge(root, volume, (), touched, fsync=True)
        alone = [name for name in touched if not fragment_path(root, "ledger", name).is_file()]
        files_of(root).remove(*(relative for name in alone for relative in head.commits[name].media))
        report.num_commits += len(touched)
        report.num_bytes += sum(head.files.values()) - (sum(after.files.values()) if after else 0)
        report.num_bytes += sum(size for name in touched for size in head.commits[name].media.values())


def _compact_commit(
    root: Path, name: str, forgotten: ForgottenIndex, report: CompactReport, places_of: PlacesOf
) -> None:
    path = fragment_path(root, "ledger", name)
    outputs, ledger = outputs_of(path), read_parquet(path)
    tables = {Path(output).parts[1]: read_parquet(root / output) for output in outputs if output.endswith(".parquet")}
    if not any(any(forgotten.mask(table["item_id"]).to_pylist()) for table in (ledger, *tables.values())):
        return
    report.num_commits += 1
    kept = {table: _without(data, forgotten) for table, data in tables.items()}
    ledger = _without(ledger, forgotten)
    there = sum(size for output, size in outputs.items() if files_of(root).has(output))
    if (places := places_of(name)) is not None:
        kept["clips"], ledger = _at_places(kept["clips"], ledger, places)
    _write_in_place_of(root, name, {table: data for table, data in kept.items() if data.num_rows}, ledger)
    files_of(root).remove(str(path.relative_to(root)))
    files_of(root).remove(*outputs)
    report.num_bytes += there


def _at_places(clips: pa.Table, ledger: pa.Table, places: dict[str, dict[str, Any]]) -> tuple[pa.Table, pa.Table]:
    """Return the rows of clips with their present places, without videos that have lost a clip: these are cut again."""
    lost = {row["item_id"] for row in clips.to_pylist() if row["clip_id"] not in places}
    rows = [row | places[row["clip_id"]] for row in clips.to_pylist() if row["item_id"] not in lost]
    done = [row for row in ledger.to_pylist() if row["item_id"] not in lost]
    return pa.Table.from_pylist(rows, clips.schema), pa.Table.from_pylist(done, ledger.schema)


def _without(table: pa.Table, forgotten: ForgottenIndex) -> pa.Table:
    return table.filter(pc.invert(forgotten.mask(table["item_id"])))


def _write_in_place_of(root: Path, old: str, tables: dict[str, pa.Table], ledger: pa.Table) -> None:
    """Write a commit of the remaining rows, if any."""
    stage, unit = old.split("-")[:2]
    if stage == "ingest":
        if not tables:
            return
        sources = tables["sources"]
        items = list(zip(sources["item_id"].to_pylist(), sources["key"].to_pylist(), strict=True))
        name = commit_name(stage, unit, items)
        row = {**ledger.to_pylist()[0], "item_id": name, "num_rows": len(items)}
        ledger = pa.Table.from_pylist([row], LEDGER)
    elif not ledger.num_rows:
        return
    else:
        name = commit_name(stage, unit, zip(ledger["item_id"].to_pylist(), ledger["key"].to_pylist(), strict=True))
    media = []
    for table in {"clips", "edited_clips"} & set(tables):
        media = [f"clips/{name}.tar"]
        rows = tables[table].to_pylist()
        write_clips(root / media[0], rows, lambda row: files_of(root).local(row["tar"]))
        tables[table] = pa.Table.from_pylist([row | {"tar": media[0]} for row in rows], tables[table].schema)
    write_commit(root, name, tables, ledger, media, replaces=old, fsync=True)  # the old one is removed next


def _fragments(root: Path, table: str) -> list[Path]:
    return sorted((root / "fragments" / table).glob("[!.]*.parquet"))
