"""A corpus of a real build forgets a video for good: `compact` removes it, and the same list does not add it again."""

import shutil

import pytest

from pipeline.maintenance.forget import compact, find, forget
from shards.packing.tar import read_member
from shards.packing.verify import verify
from shards.query.sql import open_manifest
from tests.helpers.builds import PLAIN, ask, build_here, snapshot

pytestmark = pytest.mark.slow


def test_a_built_corpus_forgets_for_good(built, world, tmp_path):
    root = tmp_path / "corpus"
    shutil.copytree(built[0], root)
    [(video_id, url)] = ask(
        root, "SELECT video_id, any_value(url) FROM catalog WHERE shard IS NOT NULL GROUP BY 1 ORDER BY 1 LIMIT 1"
    )
    [(path,)] = ask(root, f"SELECT path FROM videos WHERE video_id = '{video_id}'")
    [(tar, offset, size)] = ask(
        root, f"SELECT tar, mp4_offset, num_bytes FROM clips WHERE video_id = '{video_id}' ORDER BY n LIMIT 1"
    )
    source, clip = (root / path).read_bytes(), read_member(root / tar, offset, size)
    others = "SELECT clip_id, sha256, text FROM clips WHERE video_id <> $id ORDER BY 1".replace("$id", f"'{video_id}'")
    before = ask(root, others)

    forget(root, find(root, [], [url], None), None)
    compact(root)
    for file in root.rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        assert source not in data and clip not in data and video_id not in file.name
        assert video_id.encode() not in data or file.suffix == ".parquet", file
    with open_manifest(root) as connection:
        assert verify(root, connection) == []
    assert ask(root, others) == before

    settled = snapshot(root)
    report = build_here(root, [str(world.sources)], *PLAIN)
    assert report.ingest.num_forgotten >= 1 and report.ingest.num_new == 0
    assert report.engine.num_done == 0 and report.pack.num_written == 0
    changed = {name for name in snapshot(root).items() ^ settled.items()}
    assert not any(name.startswith(("shards/", "clips/", "sources/")) for name, _ in changed), changed
