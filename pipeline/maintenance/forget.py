"""`forget` and `compact`: remove videos from a corpus, first for every reader and then all of their bytes.

forget    finds videos by id, URL or SQL, and all copies of their files, and writes a tombstone for each
compact   removes everything with a tombstone from shards, clips, sources and fragments
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import duckdb

from clipmill.base.errors import UserError
from pipeline.engine.build import session, with_defaults
from pipeline.engine.settings import resolve
from pipeline.engine.trust import RUNS_CODE, trust_in
from pipeline.stages.download.site_fetch import site_key, site_key_of
from pipeline.stages.ingest import private_urls
from pipeline.stages.pack import packs_of, planned
from pipeline.stages.pack_notes import Pack
from shards.corpus.folder import Corpus
from shards.corpus.manifest import is_current
from shards.corpus.packs import samples_of
from shards.corpus.source_ids import canonical_url, normal_url, source_spellings, video_id_for
from shards.corpus.tombstones import all_hashes, hash_of, is_forgotten, read_tombstones, write_tombstones
from shards.packing.compact import (
    CompactReport,
    ForgottenIndex,
    compact_commits,
    compact_shards,
    redact,
    remove_sources,
)
from shards.packing.pack import ShardPlan, select_samples, slots_of
from shards.packing.release import compact_kept, keep_needed, packed_clips_of
from shards.query.sql import open_manifest, rows_of, selection, video_of_url
from shards.storage.local import MANIFEST_NAME, UNFINISHED
from shards.storage.mirror import for_reading, mirror_folder


@dataclass(frozen=True)
class ForgetPlan:
    """Videos to forget, with their rows in the manifest. `urls`: addresses of sources that the corpus does not have."""

    videos: list[dict] = field(default_factory=list)  # video_id, url, kind, path, sha256, is_copy, num_clips …
    urls: list[str] = field(default_factory=list)

    @property
    def video_ids(self) -> list[str]:
        return [video["video_id"] for video in self.videos]

    def total(self, name: str) -> int:
        return sum(video[name] or 0 for video in self.videos)


# --- forget


def find(root: str | Path, ids: Sequence[str], urls: Sequence[str], where: str | None) -> ForgetPlan:
    """Find the named videos and those with the same bytes. Raises UserError for an option that finds nothing."""
    here = for_reading(root, MANIFEST_NAME, "fragments/forgotten/")
    forgotten = all_hashes(read_tombstones(here))
    if not (ids or urls or where):
        raise UserError(
            "nothing to forget is given: add --video ID, --url URL or --where SQL (a condition on `videos`)."
        )
    if where and not where.strip(" \t\r\n;"):  # an empty condition would select every video
        raise UserError(f"--where {where!r}: the condition is empty.")
    with open_manifest(here) as connection:
        named = [_known_id(connection, video_id) for video_id in ids if hash_of(video_id) not in forgotten]
        by_url = {}
        for url in urls:
            try:
                by_url[url] = _video_in_any_spelling(connection, url if "://" in url else str(Path(url).absolute()))
            except ValueError as error:
                raise UserError(f"--url {url}: {error}; give a whole URL or a file's path.") from error
        named += [video_id for video_id in by_url.values() if video_id]
        if where:
            named += rows_of(connection, f"SELECT video_id FROM ({selection(where, 'videos', 'video_id')})")
        if where and not named:
            raise UserError(f"--where {where}: no video meets this condition.")
        unknown = [url for url, video_id in by_url.items() if video_id is None]
        known = connection.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'pack_samples'").fetchall()
        sql = _NAMED_AND_COPIES.replace("$more", _IN_NAMED_PACKS if known else "")  # older manifests lack the table
        videos = connection.sql(sql, params={"ids": sorted(set(named))}).to_arrow_table().to_pylist()
    return ForgetPlan(videos, [url for url in unknown if not is_forgotten(source_spellings(url), forgotten)])


def _video_in_any_spelling(connection, url: str) -> str | None:
    """Return the id of the video with this URL or path, else of one whose URL leads to the same place."""
    if found := video_of_url(connection, canonical_url(url)):
        return found
    wanted = normal_url(url)
    rows = connection.execute("SELECT video_id, url FROM videos ORDER BY video_id").fetchall()
    return next((video_id for video_id, known in rows if normal_url(known) == wanted), None)


_NAMED_AND_COPIES = """
WITH named AS (SELECT unnest($ids::VARCHAR[]) AS video_id),
found AS (
    SELECT v.*, v.video_id NOT IN (SELECT video_id FROM named) AS is_copy FROM videos v
    WHERE v.video_id IN (SELECT video_id FROM named)
       OR v.sha256 IN (SELECT sha256 FROM videos SEMI JOIN named USING (video_id))
)
SELECT d.video_id, d.url, d.kind, d.title, d.path, d.num_bytes, d.sha256, d.extractor, d.meta, d.is_copy,
       (SELECT count(*) FROM clips c WHERE c.video_id = d.video_id) AS num_clips,
       (SELECT count(*) FROM samples s WHERE s.video_id = d.video_id) $more AS num_samples,
       (SELECT count(*) FROM captions t WHERE split_part(t.clip_id, '.', 1) = d.video_id) AS num_captions,
       (SELECT count(*) FROM sentences s WHERE s.video_id = d.video_id) AS num_sentences
FROM found d ORDER BY d.is_copy, d.video_id
"""


_IN_NAMED_PACKS = "+ (SELECT count(*) FROM pack_samples s WHERE s.video_id = d.video_id)"


def _known_id(connection, video_id: str) -> str:
    if not connection.execute("SELECT 1 FROM videos WHERE video_id = ?", [video_id]).fetchall():
        near = get_close_matches(video_id, rows_of(connection, "SELECT video_id FROM videos ORDER BY 1"), n=3)
        raise UserError(
            f"--video {video_id}: the corpus has no such video." + (f" Similar: {', '.join(near)}." if near else "")
        )
    return video_id


def forget(root: str | Path, plan: ForgetPlan, reason: str | None) -> bool:
    """Write the tombstones, after which all readers leave these videos out.

    Returns True if the manifest is published without them, False if a running build will publish it.
    """
    corpus, at = Corpus(root).require(), datetime.now(UTC)
    trust_in(corpus, resolve(corpus.load_settings(), None, [])).require(reaches=RUNS_CODE)
    _publish_if_older(corpus)
    slots = _slots_of(corpus, plan)
    rows = [
        {
            "video_hash": hash_of(video["video_id"]),
            "url_hash": hash_of(canonical_url(video["url"])),
            "other_hashes": _other_hashes(video["url"], video["extractor"], video["meta"]),
            "sha256": video["sha256"],
            **slots[video["video_id"]],
        }
        for video in plan.videos
    ]
    rows += [
        {
            "video_hash": hash_of(video_id_for(url)),
            "url_hash": hash_of(canonical_url(url)),
            "other_hashes": _other_hashes(url),
            "places": [],
            "pack_places": [],
        }
        for url in plan.urls
    ]
    write_tombstones(corpus.root, [{**row, "reason": reason, "at": at} for row in rows])
    try:
        with session(corpus.root, None, [], "forget", create=False) as (current, _):
            current.publish()
    except UserError:
        if corpus.is_being_written():
            return False
        raise
    return True


def _publish_if_older(corpus: Corpus) -> None:
    """Publish the manifest if an earlier version did, because it may lack columns that packing reads."""
    if is_current(for_reading(corpus.name, MANIFEST_NAME, "fragments/forgotten/")):
        return
    try:
        with session(corpus.root, None, [], "forget", create=False) as (current, _):
            current.publish()
    except UserError:
        if not corpus.is_being_written():
            raise


def _other_hashes(url: str, extractor: str | None = None, meta: str | None = None) -> list[str]:
    """Return the hashes of a source's normal URL, and of its site with its id there, as far as they are known."""
    found = json.loads(meta or "{}").get("id")
    at_site = [site_key(extractor, found)] if extractor and found else []
    return sorted({hash_of(key) for key in [normal_url(url), *at_site, site_key_of(url)] if key})


def _slots_of(corpus: Corpus, plan: ForgetPlan) -> dict[str, dict[str, Any]]:
    """Return video → its volume and the reserved slots of its clips in the order of packing, of every pack.

    Only of packs that have been packed; a named pack whose condition does not fit any more has none.
    """
    found: dict[str, dict[str, Any]] = {}
    settings = resolve(with_defaults(corpus.load_settings()), None, [])
    with open_manifest(for_reading(corpus.name, MANIFEST_NAME)) as connection:
        sql = "SELECT video_id, coalesce(volume, 0) AS volume FROM videos WHERE video_id IN (SELECT unnest(?))"
        for video_id, volume in connection.execute(sql, [plan.video_ids]).fetchall():
            found[video_id] = {"volume": volume, "places": [], "pack_places": []}
        volumes = sorted({each["volume"] for each in found.values()})
        for pack in packs_of(corpus, settings):
            if not rows_of(connection, f"SELECT 1 FROM {samples_of(pack.name)} LIMIT 1"):
                continue
            try:
                samples = select_samples(connection, pack.settings, volumes)
            except UserError:
                if not pack.name:
                    raise
                continue
            for clip_id, slot in slots_of(samples, pack.settings.seed):
                if each := found.get(clip_id.rpartition(".")[0]):
                    each["pack_places" if pack.name else "places"].append(
                        {"pack": pack.name, **slot} if pack.name else slot
                    )
    return found


# --- compact


def compact(root: str | Path) -> CompactReport:
    """Remove all bytes and rows of videos with a tombstone. A second run after a kill ends in the same bytes."""
    corpus, report = Corpus(root).require(), CompactReport()
    with session(corpus.root, None, [], "compact", create=False) as (current, _):
        current.publish()  # without the forgotten videos
        (corpus.root / UNFINISHED).touch()
        corpus.files.upload(UNFINISHED)
        forgotten = ForgottenIndex.of(corpus.root)
        with open_manifest(corpus.root) as connection:
            plans_of = partial(_plans_of, corpus.root, connection, packs_of(corpus, current.settings))
            keep_needed(current.ledger, lambda file: file.is_in_place)
            compact_shards(corpus.root, connection, plans_of, forgotten, report)
        compact_kept(corpus.root, forgotten.covers)
        redact(corpus.root, forgotten, report)
        remove_sources(corpus.root, forgotten, report)
        private_urls.forget(forgotten.covers)
        compact_commits(corpus.root, forgotten, report, partial(packed_clips_of, current.ledger))
    with session(corpus.root, None, [], "compact", create=False, fresh=True) as (current, _):
        current.publish(whole=True)
        corpus.files.remove(UNFINISHED)
    if corpus.store:
        shutil.rmtree(mirror_folder(corpus.store, "read"), ignore_errors=True)  # this machine's copy for readers
    report.settings = [name for name in forgotten.names if name in corpus.settings_path.read_text()]
    return report


def _plans_of(
    root: Path, connection: duckdb.DuckDBPyConnection, packs: Sequence[Pack], name: str, volume: int | None
) -> list[ShardPlan]:
    """Return the shards that a volume of a pack ought to have; [] if this is not known or its shuffle has changed."""
    for pack in packs:
        if pack.name == name and (volume is None) == (pack.settings.shuffle == "corpus"):
            try:
                return next(planned(root, connection, pack, volumes=None if volume is None else [volume]))[1]
            except UserError:  # the condition of a named pack does not fit any more
                if not name:
                    raise
    return []
