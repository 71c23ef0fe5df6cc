"""`pack.keep_clips=false`: tars of clips go once shards hold the clips, and whatever needs a clip reads it from there."""

import hashlib
import shutil
from pathlib import Path

import pytest

from pipeline.engine.build import build, session
from pipeline.stages import pack as pack_stage
from shards.packing.verify import verify
from shards.query.sql import open_manifest
from tests.helpers.builds import ask
from tests.helpers.whole_corpus import build_whole, write_sources

VIDEOS = [f"video-{letter}" for letter in "abcdefgh"]  # three to a unit, one unit to a volume: abc, def, gh
ARGUMENTS = {"recipe": None, "command": "test"}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(pack_stage, "FEW_SHARDS", 1000)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path]:
    """Build a corpus that keeps its clips, and the same one after its tars of clips were deleted."""
    folder = tmp_path_factory.mktemp("kept")
    build_whole(folder / "kept", write_sources(folder / "list.jsonl", VIDEOS), settings=["ingest.volume_units=1"])
    shutil.copytree(folder / "kept", folder / "released")
    pack(folder / "released", "pack.keep_clips=false")
    return folder / "kept", folder / "released"


@pytest.fixture
def corpus(both, tmp_path) -> Path:
    return Path(shutil.copytree(both[1], tmp_path / "corpus"))


def pack(corpus: Path, *assignments: str, **more):
    few, pack_stage.FEW_SHARDS = pack_stage.FEW_SHARDS, 1000
    try:
        return build(corpus, [], stages=["pack"], assignments=list(assignments), **ARGUMENTS, **more)
    finally:
        pack_stage.FEW_SHARDS = few


def clips_of(corpus: Path) -> list[str]:
    return sorted(path.name for path in (corpus / "clips").iterdir())


def shards_of(corpus: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (corpus / "shards").iterdir() if path.is_file()}


def assert_every_clip_is_whole(corpus: Path, num_clips: int = 24) -> None:
    """Read every clip and its frame where the manifest says that they are."""
    rows = ask(corpus, "SELECT tar, mp4_offset, num_bytes, sha256, frames FROM clips")
    assert len(rows) == num_clips
    for tar, offset, num_bytes, sha256, frames in rows:
        data = (corpus / tar).read_bytes()
        for at, size, wanted in [
            (offset, num_bytes, sha256),
            *((f["offset"], f["num_bytes"], f["sha256"]) for f in frames),
        ]:
            assert hashlib.sha256(data[at : at + size]).hexdigest() == wanted


def state_of(corpus: Path) -> dict:
    with session(corpus, None, [], "test", create=False) as (current, _):
        current.refresh_state()
        return current.ledger.counts()


def problems_of(corpus: Path) -> list[str]:
    with open_manifest(corpus) as connection:
        return [f"{problem.path} {problem.kind} {problem.message}" for problem in verify(corpus, connection)]


def test_tars_of_packed_clips_are_deleted_and_shards_do_not_change(both):
    kept, released = both
    assert clips_of(kept) and clips_of(released) == []
    assert shards_of(kept) == shards_of(released)
    assert_every_clip_is_whole(released)
    assert problems_of(released) == []
    assert all(set(of_stage) <= {"done"} for of_stage in state_of(released).values())
    report = pack(released)
    assert not report.did_something and clips_of(released) == []


# -- packing again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "assignments",
    [
        ["pack.max_samples=3"],
        ["pack.seed=7", "pack.max_samples=5"],
        ["pack.shuffle=corpus"],
        ["pack.shuffle=corpus", "pack.where=clip_id NOT LIKE '%.1'"],
        ["pack.where=clip_id NOT LIKE 'video-a%'", "pack.max_samples=5"],
        ["pack.where=false"],
        ["pack.members=[mp4, json]"],
        ["pack.members=[txt]", "pack.keep_clips=true"],
    ],
    ids=str,
)
def test_packed_again_no_clip_is_lost_and_shards_are_those_of_a_corpus_with_clips(both, corpus, tmp_path, assignments):
    kept = Path(shutil.copytree(both[0], tmp_path / "kept"))
    pack(kept, *(text for text in assignments if "keep_clips" not in text))
    pack(corpus, *assignments)
    assert shards_of(corpus) == shards_of(kept)
    assert_every_clip_is_whole(corpus)
    assert all(set(of_stage) <= {"done"} for of_stage in state_of(corpus).values())
    left_out = [name for name in clips_of(corpus) if not name.startswith("kept-")]
    assert left_out == []
    pack(corpus, "pack.where=", "pack.members=[mp4, jpg, txt, json]", "pack.max_samples=4", "pack.seed=0",
         "pack.shuffle=volume", "pack.keep_clips=false")  # fmt: skip
    assert shards_of(corpus) == shards_of(both[1]) and clips_of(corpus) == []
    assert_every_clip_is_whole(corpus)
    assert problems_of(corpus) == []


def test_clips_that_are_left_out_keep_their_tar(both, tmp_path):
    corpus = Path(shutil.copytree(both[0], tmp_path / "corpus"))
    before = clips_of(corpus)
    pack(corpus, "pack.where=clip_id <> 'video-d.1'", "pack.keep_clips=false")
    assert len(clips_of(corpus)) == 1 and set(clips_of(corpus)) < set(before)
    assert_every_clip_is_whole(corpus)
    pack(corpus, "pack.where=")
    assert clips_of(corpus) == [] and shards_of(corpus) == shards_of(both[1])


def test_a_named_pack_is_made_from_shards(both, corpus, tmp_path):
    kept = Path(shutil.copytree(both[0], tmp_path / "kept"))
    for each in (kept, corpus):
        pack(each, "pack.where=clip_id LIKE '%.2'", pack="twos")
    assert {p.name: p.read_bytes() for p in (kept / "shards/twos").iterdir()} == {
        p.name: p.read_bytes() for p in (corpus / "shards/twos").iterdir()
    }


def test_new_sources_are_cut_and_released_while_others_are_in_shards(both, corpus, tmp_path):
    more = write_sources(tmp_path / "more.jsonl", ["video-i"])  # joins unit 2
    for each in (corpus, kept := Path(shutil.copytree(both[0], tmp_path / "kept"))):
        build_whole(each, more, settings=["ingest.volume_units=1"])
    assert shards_of(corpus) == shards_of(kept)
    assert_every_clip_is_whole(corpus, 27)
    pack(corpus)
    assert clips_of(corpus) == []
    assert_every_clip_is_whole(corpus, 27)
