"""Make a small unpacked corpus with real media: clips in `clips/*.tar` and a manifest of them."""

import io
from hashlib import sha256
from pathlib import Path

import av
import duckdb
import numpy as np
import pyarrow as pa
from PIL import Image

from shards.corpus.manifest import view_statements
from shards.packing.index import read_index
from shards.packing.pack import (
    PackSettings,
    ShardPlan,
    commit_shards,
    pending_shards,
    plan_shards,
    rows_by_shard,
    select_samples,
    write_shard,
)
from shards.packing.tar import Blob, Member, scan, write_clips_tar
from shards.query.sql import open_manifest
from tests.helpers.manifests import make_manifest


def make_corpus(root: Path, num_clips: int = 12, seed: int = 0) -> Path:
    """Make clips of 2–5 frames of 64x48, each with its own colours, and correct columns about their media."""
    for name in ("clips", "shards"):
        (root / name).mkdir(parents=True)
    make_manifest(root / "manifest.duckdb", num_clips, seed)
    with duckdb.connect(str(root / "manifest.duckdb")) as connection:
        connection.execute("DELETE FROM samples")
        clip_ids = [row[0] for row in connection.execute("SELECT clip_id FROM clips ORDER BY clip_id").fetchall()]
        _write_media(root, connection, clip_ids, seed)
        for table in ("captions", "scores"):
            connection.execute(
                f"UPDATE {table} c SET frame_sha256 = k.frame_sha256 FROM clips k WHERE k.clip_id = c.clip_id"
            )
    return root


def pack(root: Path, settings: PackSettings | None = None) -> list:
    """Run the whole pack stage in this process; return the plans."""
    settings = settings or PackSettings(shard_bytes=1_000_000, max_samples=5)
    with open_manifest(root) as connection:
        plans = plan_shards(select_samples(connection, settings), settings)
        for plan in pending_shards(root, plans):
            write_shard(plan, shard_rows(connection, plan), root)
    commit_shards(root, plans)
    publish_samples(root)
    return plans


def shard_rows(connection: duckdb.DuckDBPyConnection, plan: ShardPlan) -> pa.Table:
    """Return the rows of `catalog` that a plan's samples are made from, in the tar's order."""
    return next(rows for _, rows in rows_by_shard(connection, [plan]))


def list_members(path: str | Path) -> list[Member]:
    """Return every member of a tar of ours in file order, reading headers only. Raises ItemError as `scan` does."""
    return [member for member, _ in scan(path, lambda member: None)]


def publish_samples(root: Path) -> None:
    """Add the samples that the indexes list to the manifest."""
    with duckdb.connect(str(root / "manifest.duckdb")) as connection:
        connection.execute("DELETE FROM samples")
        for path in sorted((root / "shards").glob("*.parquet")):
            connection.register("rows", read_index(path))
            connection.execute("INSERT INTO samples BY NAME SELECT * FROM rows")
            connection.unregister("rows")


def change_manifest(root: Path, sql: str) -> None:
    with duckdb.connect(str(root / "manifest.duckdb")) as connection:
        connection.execute(sql)
        connection.execute(view_statements())


def shard_bytes(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "shards").iterdir()) if path.is_file()}


def decode_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def mp4_bytes(number: int, num_frames: int, seed: int) -> bytes:
    """Encode frames of random 8-pixel blocks, so that no two clips look alike."""
    random = np.random.default_rng([seed, number])
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=3, options={"preset": "ultrafast", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = 64, 48, "yuv420p", 1
        for _ in range(num_frames):
            picture = random.integers(0, 255, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def jpeg_bytes(number: int, seed: int) -> bytes:
    random = np.random.default_rng([seed, number, 1])
    out = io.BytesIO()
    picture = random.integers(0, 255, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(picture).save(out, "JPEG")
    return out.getvalue()


def _write_media(root: Path, connection: duckdb.DuckDBPyConnection, clip_ids: list[str], seed: int) -> None:
    rows, blobs, scratch = [], [], root / "blobs"
    with open(scratch, "wb") as file:
        for number, clip_id in enumerate(clip_ids):
            num_frames = 2 + number % 4
            pieces = {"mp4": mp4_bytes(number, num_frames, seed), "0.jpg": jpeg_bytes(number, seed)}
            for extension, data in pieces.items():
                blobs.append(Blob(f"{clip_id}.{extension}", scratch, file.tell(), len(data)))
                file.write(data)
            rows.append({"clip_id": clip_id, "num_frames": num_frames})
    members = {member.name: member for member in write_clips_tar(root / "clips" / "u00000.tar", blobs)}
    scratch.unlink()
    for row in rows:
        mp4, jpg = members[f"{row['clip_id']}.mp4"], members[f"{row['clip_id']}.0.jpg"]
        row |= {"mp4_offset": mp4.offset, "num_bytes": mp4.num_bytes, "sha256": mp4.sha256}
        row |= {"jpg_offset": jpg.offset, "jpg_bytes": jpg.num_bytes, "jpg_sha256": jpg.sha256}
    connection.register("media", pa.Table.from_pylist(rows))
    connection.execute("""
        UPDATE clips c SET tar = 'clips/u00000.tar', mp4_offset = m.mp4_offset, num_bytes = m.num_bytes,
            sha256 = m.sha256, frame_sha256 = m.jpg_sha256, num_frames = m.num_frames, fps = 3.0,
            duration_s = m.num_frames / 3.0, width = 64, height = 48,
            frames = [{time_s: c.frame_time_s, sha256: m.jpg_sha256, "offset": m.jpg_offset, num_bytes: m.jpg_bytes}]
        FROM media m WHERE m.clip_id = c.clip_id
    """)


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()
