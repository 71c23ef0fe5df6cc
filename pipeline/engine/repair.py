"""Find rot while building, and make pending what has to be made again.

`clipmill verify --deep` looks at every file and leaves its findings in `.clipmill/suspects.json`. A build looks at
those files again, and at a random part of the corpus besides, bounded in bytes (`engine.check_bytes`).
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from clipmill.base.atomic_file import write_text
from clipmill.base.text import sql_literal
from shards.corpus.folder import Corpus
from shards.corpus.ledger import Ledger
from shards.corpus.packs import MAIN, index_files, named_packs
from shards.corpus.released_clips import recorded_volumes
from shards.packing.deep_verify import (
    Stored,
    clip_ranges,
    file_problems,
    fragment_problems,
    is_bad_fragment,
    is_bad_shard,
    video_files,
)
from shards.packing.index import read_index
from shards.packing.release import index_tars
from shards.packing.verify import Problem
from shards.storage.sealed_parquet import DamagedFile

SUSPECTS = "suspects.json"
FEW = 200  # rows to draw from for each kind of file


def write_suspects(corpus: Corpus, problems: Iterable[Problem]) -> None:
    """Leave the problems that a build can repair to the next one."""
    found = [asdict(problem) for problem in problems if not problem.is_warning]
    write_text(corpus.private / SUSPECTS, json.dumps(found))


def find_rot(corpus: Corpus, ledger: Ledger, check_bytes: int, run_id: str) -> list[Problem]:
    """Check the suspects and a random part of a corpus in a folder; a store checks its objects itself.

    The ledger's last `refresh_state` was for all units. The random part is of one volume.
    """
    if corpus.store:
        return []
    root, suspects = corpus.root, _read_suspects(corpus)
    ledger.show(random.Random(run_id).choice(ledger.volumes()))
    fragments, sources, clips = _drawn(ledger, check_bytes, run_id)
    fragments |= {problem.path for problem in suspects if is_bad_fragment(problem)}
    videos = {problem.item for problem in suspects if problem.kind == "changed-source"}
    of_clips = [problem for problem in suspects if problem.kind == "changed-clip"]
    for volume in ledger.volumes_of([*videos, *(problem.item.partition(".")[0] for problem in of_clips)]):
        ledger.show(volume)
        sources += [file for file in video_files(ledger.connection, "current_videos") if file.item in videos]
        for tar in sorted({problem.path for problem in of_clips}):
            rest = f"WHERE tar = {sql_literal(tar)} ORDER BY mp4_offset"
            clips += clip_ranges(ledger.connection, ["current_clips"], rest)
    problems = [
        *fragment_problems(root, sorted(path for path in fragments if (root / path).is_file())),
        *file_problems(root, sources, "changed-source"),
        *file_problems(root, clips, "changed-clip"),
        *file_problems(root, _drawn_members(root, check_bytes, run_id), "hash-mismatch"),
        *(problem for problem in suspects if is_bad_shard(problem) or problem.kind == "changed-subtitle"),
    ]
    return [problem for problem in dict.fromkeys(problems) if not problem.is_warning]


def repair(corpus: Corpus, ledger: Ledger, problems: Sequence[Problem]) -> None:
    """Make pending what the problems' files hold, or write it again from the working database. Refresh afterwards."""
    for problem in problems:
        if is_bad_fragment(problem):
            ledger.rewrite(Path(problem.path).stem)
        elif problem.kind in ("changed-source", "changed-subtitle"):
            ledger.mark_pending("download", [problem.item])
        elif problem.kind == "changed-clip":
            ledger.mark_pending("cut", [problem.item.partition(".")[0]])
        elif is_bad_shard(problem):
            corpus.files.remove(str(Path(problem.path).with_suffix(".parquet")))  # so that it is packed again
    if any(is_bad_shard(problem) for problem in problems):
        index_tars(corpus.root)  # what is whole in a shard that holds the only copy of clips is read from it
        for volume in recorded_volumes(corpus.root):
            ledger.relocated(volume)
    (corpus.private / SUSPECTS).unlink(missing_ok=True)


def _read_suspects(corpus: Corpus) -> list[Problem]:
    try:
        return [Problem(**row) for row in json.loads((corpus.private / SUSPECTS).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def _drawn(ledger: Ledger, check_bytes: int, run_id: str) -> tuple[set[str], list[Stored], list[Stored]]:
    """Draw fragments, source files and clips, each for a quarter of the bytes."""
    order = f"ORDER BY hash($0 || {sql_literal(run_id)}) LIMIT {FEW}"
    sizes = ledger.drawn_files(run_id, FEW)
    fragments = _up_to(sizes, check_bytes // 4)
    connection = ledger.connection
    sources = [
        (file, _size_of(ledger.root / file.path))
        for file in video_files(connection, "current_videos", order.replace("$0", "video_id"))
    ]
    clips = clip_ranges(connection, ["current_clips"], order.replace("$0", "clip_id"))
    return (
        set(fragments),
        _up_to([(file, size) for file, size in sources if size is not None], check_bytes // 4),
        _up_to([(clip, clip.num_bytes) for clip in clips], check_bytes // 4),
    )


def _drawn_members(root: Path, check_bytes: int, run_id: str) -> Iterator[Stored]:
    """Draw clips of one shard of any pack."""
    indexes = [path for pack in (MAIN, *named_packs(root)) for path in index_files(root, pack)]
    if not indexes or not check_bytes:
        return
    chosen = random.Random(run_id).choice(indexes)
    try:
        rows = read_index(chosen).to_pylist()
    except DamagedFile:
        return  # packing writes this shard again
    rows = [row for row in random.Random(run_id).sample(rows, min(FEW, len(rows))) if row["mp4_offset"] is not None]
    path = str(chosen.relative_to(root).with_suffix(".tar"))
    members = [Stored(path, row["clip_id"], row["mp4_sha256"], row["mp4_offset"], row["mp4_bytes"]) for row in rows]
    yield from _up_to([(member, member.num_bytes) for member in members], check_bytes // 4)


def _up_to(sizes: list[tuple], num_bytes: int) -> list:
    """Return the things, in order, whose sizes together stay within `num_bytes`; larger ones are passed over."""
    taken = []
    for thing, size in sizes:
        if size <= num_bytes:
            taken.append(thing)
            num_bytes -= size
    return taken


def _size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
