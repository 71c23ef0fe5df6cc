"""Verify shards with a decoder: clips are decoded in sandboxes, one per checking thread."""

import io
import os
import threading
from pathlib import Path

import duckdb
from rich.console import Console
from rich.progress import Progress

from clipmill.base.errors import ItemError, UserError
from clipmill.media.encode import JPEG_MAGIC, jpeg_frames
from clipmill.media.probe import NO_REFERENCES
from clipmill.media.sandbox import Sandbox
from pipeline.engine.repair import write_suspects
from shards.corpus.folder import SETTINGS, Corpus
from shards.corpus.packs import samples_of
from shards.packing.deep_verify import deep_problems
from shards.packing.verify import Problem, packs_in, verify
from shards.query.sql import open_manifest
from shards.storage.local import MANIFEST_NAME
from shards.storage.mirror import for_reading

CLIP_TIMEOUT_S = 120.0


def verify_with_sandbox(
    root: str | Path, decode: bool, console: Console, *, deep: bool = False
) -> tuple[list[Problem], str]:
    """Return the problems of a corpus's shards, or with `deep` of all files, and a description of the check.

    The next build looks at the problems of a deep check and repairs what it can.
    """
    if not deep:
        return _verify_shards(root, decode, console)
    corpus = Corpus(root).require()
    here = for_reading(root, SETTINGS, MANIFEST_NAME, "fragments/", "shards/")
    problems, checked = [], "no manifest"
    try:
        corpus.load_settings()
    except UserError as error:
        problems.append(Problem(SETTINGS, "", "damaged", str(error)))
    try:
        with open_manifest(here) as connection:
            problems += deep_problems(here, connection)
        found, checked = _verify_shards(root, decode, console)
        problems += found
    except (UserError, duckdb.Error) as error:
        problems += deep_problems(here, None)
        problems.append(Problem(MANIFEST_NAME, "", "damaged", str(error)))
    problems = sorted(dict.fromkeys(problems), key=lambda problem: problem.is_warning)
    corpus.private.mkdir(exist_ok=True)
    write_suspects(corpus, problems)
    return problems, f"{checked}, and all other files"


def _verify_shards(root: str | Path, decode: bool, console: Console) -> tuple[list[Problem], str]:
    here = for_reading(root, SETTINGS, MANIFEST_NAME, "fragments/forgotten/", "shards/")
    Corpus(here).require()
    with open_manifest(here) as connection, Progress(console=console, transient=True) as progress:
        packs = packs_in(here, connection)
        counts = [f"SELECT count(DISTINCT shard) AS s, count(*) AS n FROM {samples_of(pack)}" for pack in packs]
        sql = f"SELECT sum(s)::BIGINT, sum(n)::BIGINT FROM ({' UNION ALL '.join(counts)})"
        ((num_shards, num_samples),) = connection.execute(sql).fetchall()
        task = progress.add_task("verify", total=num_shards)
        problems = verify(
            here,
            connection,
            decode_frames=_count_frames_safely if decode else None,
            workers=os.cpu_count() or 1,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    how = "decoded" if decode else "not decoded"
    return problems, f"{num_shards:,} shards, {num_samples:,} samples, {how}"


_of_this_thread = threading.local()


def _count_frames_safely(data: bytes) -> int:
    if not hasattr(_of_this_thread, "sandbox"):
        _of_this_thread.sandbox = Sandbox()
    return _of_this_thread.sandbox.call(count_frames, data, timeout_s=CLIP_TIMEOUT_S)


def count_frames(data: bytes) -> int:
    """Count the frames of a clip that really decode. Raises ItemError "undecodable", "not-jpeg-frames"."""
    import av

    kind, options = None, NO_REFERENCES
    if data.endswith(JPEG_MAGIC):  # a sequence of JPEG files, which refer to no other file
        kind, options, data = "mjpeg", {}, b"".join(jpeg_frames(data))
    try:
        with av.open(io.BytesIO(data), format=kind, options=options) as container:
            return sum(1 for _ in container.decode(video=0))
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise ItemError("undecodable", str(error)) from error
