"""`pack.keep_clips=false`: tars of clips go once shards hold the clips; whatever needs a clip reads it there."""

import hashlib
import io
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from clipmill.base.errors import UserError
from pipeline.engine import registry
from pipeline.engine.build import Silent, build, session, status
from pipeline.maintenance.forget import compact, find, forget
from pipeline.maintenance.verify import verify_with_sandbox
from pipeline.stages import pack as pack_stage
from pipeline.stages.caption_frames import read_frames
from shards.corpus.ledger import Ledger
from shards.packing.verify import verify
from shards.query.explain import explain
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
        ["pack.where=clip_id = ''"],
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
    if assignments[0] == "pack.members=[txt]":
        assert ask(corpus, "SELECT count(mp4_offset) FROM samples") == [(0,)], "no sample has an mp4"
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


# -- losses ----------------------------------------------------------------------------------------------------------


def clips_in(corpus: Path, shard: str) -> set[str]:
    return {clip_id for (clip_id,) in ask(corpus, f"SELECT clip_id FROM samples WHERE shard = '{shard}'")}


def cut_pending(corpus: Path) -> tuple[set[str], dict[str, str]]:
    """Return the videos that a build would cut again, and what it says of files."""
    with session(corpus, None, [], "test", create=False) as (current, _):
        current.refresh_state()
        found = set()
        for volume in current.ledger.volumes():
            current.ledger.show(volume)
            found |= {item["item_id"] for item in current.ledger.work("cut")}
        return found, dict(current.ledger.damaged)


SHARD = "000000-000001.tar"


def test_clips_of_a_lost_shard_are_cut_again(corpus, both, tmp_path):
    lost = {clip_id.partition(".")[0] for clip_id in clips_in(corpus, SHARD)}
    (corpus / "shards" / SHARD).unlink()
    pending, said = cut_pending(corpus)
    assert pending == lost
    assert "cut again" in said[f"shards/{SHARD}"]
    assert_status_says_so(corpus, len(lost))
    build_whole(corpus, write_sources(tmp_path / "same.jsonl", VIDEOS), settings=["ingest.volume_units=1"])
    assert shards_of(corpus) == shards_of(both[1])
    assert_every_clip_is_whole(corpus)
    pack(corpus)
    assert cut_pending(corpus) == (set(), {}) and clips_of(corpus) == []


def assert_status_says_so(corpus: Path, num_videos: int) -> None:
    found = status(corpus, [])
    assert found.counts["cut"]["pending"] == num_videos
    assert [problem.path for problem in found.damaged] == [f"shards/{SHARD}"]


def test_of_a_shard_that_ends_early_only_the_rest_is_cut_again(corpus):
    rows = ask(corpus, f"SELECT clip_id, jpg_offset FROM samples WHERE shard = '{SHARD}' ORDER BY position")
    with open(corpus / "shards" / SHARD, "r+b") as file:
        file.truncate(rows[-1][1])
    assert cut_pending(corpus)[0] == {rows[-1][0].partition(".")[0]}


def test_of_a_rotten_shard_the_other_clips_stay(corpus, tmp_path, both):
    ((clip_id, offset),) = ask(corpus, f"SELECT clip_id, mp4_offset FROM samples WHERE shard = '{SHARD}' LIMIT 1")
    with open(corpus / "shards" / SHARD, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    problems, _ = verify_with_sandbox(corpus, False, Console(file=io.StringIO()), deep=True)
    assert [problem.kind for problem in problems if not problem.is_warning] == ["hash-mismatch"]
    with session(corpus, None, [], "test", create=False) as (current, _):
        current.refresh_state()
        current.repair_damage(Silent())
        current.ledger.show(0)
        assert [item["item_id"] for item in current.ledger.work("cut")] == [clip_id.partition(".")[0]]
    build_whole(corpus, write_sources(tmp_path / "same.jsonl", VIDEOS), settings=["ingest.volume_units=1"])
    assert shards_of(corpus) == shards_of(both[1])
    assert_every_clip_is_whole(corpus)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-20])])
def test_a_shard_without_a_sound_index_still_has_its_clips(corpus, both, damage):
    damage((corpus / "shards" / SHARD).with_suffix(".parquet"))
    assert cut_pending(corpus)[0] == set()
    pack(corpus)
    assert shards_of(corpus) == shards_of(both[1])
    assert_every_clip_is_whole(corpus)


def test_a_shard_is_read_before_tars_are_deleted(both, tmp_path):
    corpus = Path(shutil.copytree(both[0], tmp_path / "corpus"))
    ((offset,),) = ask(corpus, f"SELECT mp4_offset FROM samples WHERE shard = '{SHARD}' LIMIT 1")
    with open(corpus / "shards" / SHARD, "r+b") as file:
        file.seek(offset)
        file.write(b"\0\0\0\0")
    pack(corpus, "pack.keep_clips=false")
    assert len(clips_of(corpus)) == 1, "the tar with this clip's only sound bytes stays"
    with session(corpus, None, [], "test", create=False) as (current, _):
        current.refresh_state()
        current.repair_damage(Silent())
    pack(corpus)
    assert clips_of(corpus) == [] and shards_of(corpus) == shards_of(both[1])


def test_a_reader_changes_no_record_while_tars_are_about_to_be_deleted(both, corpus, tmp_path):
    """As `status` does beside a build that has written its record and not yet deleted the tars."""
    shutil.copytree(both[0] / "clips", corpus / "clips", dirs_exist_ok=True)
    records = {path: path.read_bytes() for path in (corpus / "fragments/released_clips").iterdir()}
    ledger = Ledger(corpus, registry.stages(), cache=tmp_path / "cache")
    ledger.sync()
    ledger.close()
    assert records and records == {path: path.read_bytes() for path in (corpus / "fragments/released_clips").iterdir()}


def test_turned_off_and_on_again_it_deletes_what_came_between(both, corpus, tmp_path):
    released = clips_of(corpus)
    more = write_sources(tmp_path / "more.jsonl", [*VIDEOS, "video-i"])  # of the last volume
    build_whole(corpus, more, settings=["ingest.volume_units=1", "pack.keep_clips=true"])
    pack(corpus)
    assert clips_of(corpus) != released
    pack(corpus, "pack.keep_clips=false")
    assert clips_of(corpus) == released
    assert_every_clip_is_whole(corpus, 27)


def test_what_was_packed_before_a_release_is_not_planned_again(both, tmp_path, monkeypatch):
    """The release moves the places of all clips, which the shards do not depend on."""
    corpus, calls, select = tmp_path / "corpus", [], pack_stage.select_samples
    shutil.copytree(both[0], corpus)
    pack(corpus)
    monkeypatch.setattr(pack_stage, "select_samples", lambda *a: calls.append(a) or select(*a))
    pack(corpus, "pack.keep_clips=false")
    pack(corpus)
    assert not calls and clips_of(corpus) == clips_of(both[1])


def test_after_another_shuffle_the_manifest_names_the_shards_that_are_there(tmp_path):
    """The corpus has a single volume, so that no other volume makes the ledger derive its items again."""
    sources = write_sources(tmp_path / "list.jsonl", VIDEOS[:3])
    build_whole(tmp_path / "one", sources)
    pack(tmp_path / "one", "pack.keep_clips=false")
    for shuffle in ("corpus", "volume"):
        pack(tmp_path / "one", f"pack.shuffle={shuffle}")
        assert_every_clip_is_whole(tmp_path / "one", 9)


def test_a_damaged_record_is_not_passed_over(corpus):
    path = next((corpus / "fragments/released_clips").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="which tars of clips were deleted"):
        cut_pending(corpus)
    path.unlink()
    assert cut_pending(corpus)[0], "its volume is cut again"


def test_lost_tars_of_a_corpus_that_keeps_them_are_cut_again(both, tmp_path):
    corpus = Path(shutil.copytree(both[0], tmp_path / "corpus"))
    next((corpus / "clips").iterdir()).unlink()
    assert cut_pending(corpus)[0]


# -- killed ----------------------------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.packing.test_clips_are_kept_in_shards import pack
left = int(sys.argv[2])
def watch(event, arguments):
    global left
    if event in ("os.rename", "os.remove", "shutil.rmtree") and "/corpus/" in str(arguments[0]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
pack(Path(sys.argv[1]), *sys.argv[3:])
print(left)
"""


def run_killed(corpus: Path, number: int, *assignments: str) -> bool:
    """Pack in a process that is killed at its change number `number` of the corpus; return whether it was."""
    command = [sys.executable, "-c", KILLED, str(corpus), str(number), *assignments]
    process = subprocess.run(command, capture_output=True)
    assert process.returncode in (0, -signal.SIGKILL), process.stderr.decode()
    return process.returncode != 0


@pytest.mark.parametrize("numbers", [(3, 12, 4), (8, 17, 9)])
def test_killed_while_tars_are_deleted_the_next_run_ends_in_the_same_state(both, tmp_path, numbers):
    corpus = Path(shutil.copytree(both[0], tmp_path / "corpus"))
    for number in numbers:
        run_killed(corpus, number, "pack.keep_clips=false")
        assert cut_pending(corpus)[0] == set()
        assert_every_clip_is_whole(corpus)
    pack(corpus)
    assert clips_of(corpus) == [] and shards_of(corpus) == shards_of(both[1])
    assert_every_clip_is_whole(corpus)


@pytest.mark.parametrize("assignments", [["pack.max_samples=3"], ["pack.where=clip_id NOT LIKE '%.1'"]], ids=str)
@pytest.mark.parametrize("number", [18, 31, 44])
def test_killed_while_shards_are_replaced_no_clip_is_lost(both, corpus, assignments, number):
    run_killed(corpus, number, *assignments)
    assert cut_pending(corpus)[0] == set()
    pack(corpus, "pack.max_samples=5")  # other shards than those that wait under .next
    assert_every_clip_is_whole(corpus)
    pack(corpus, "pack.where=", "pack.max_samples=4")
    assert shards_of(corpus) == shards_of(both[1]) and clips_of(corpus) == []
    assert not (corpus / "shards/.next").exists()


# -- readers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["caption", "score"])
def test_stages_read_the_same_pictures_in_shards(both, tmp_path, stage):
    """Ask for the items of a stage again, as after a changed model, and read what their rows name."""

    def pictures(corpus: Path) -> dict[str, list[bytes]]:
        found = {}
        with session(corpus, None, [], "test", create=False) as (current, _):
            current.refresh_state()
            current.ledger.mark_pending(stage, [clip_id for (clip_id,) in ask(corpus, "SELECT clip_id FROM clips")])
            current.refresh_state()
            for volume in current.ledger.volumes():
                current.ledger.show(volume)
                for item in current.ledger.work(stage):
                    frames = item["frames"] if stage == "caption" else [item["frame"]]
                    found[item["item_id"]] = read_frames(str(corpus), [(item["tar"], frame) for frame in frames])
        return found

    kept, released = (Path(shutil.copytree(each, tmp_path / each.name)) for each in both)
    from_shards = pictures(released)
    assert len(from_shards) == 24 and from_shards == pictures(kept)
    assert all(isinstance(data, bytes) for some in from_shards.values() for data in some)


def test_a_story_names_the_shard_once(corpus):
    story = explain(corpus, "video-a.0")
    ((shard,),) = ask(corpus, "SELECT shard FROM samples WHERE clip_id = 'video-a.0'")
    assert f"shards/{shard}" in {place["file"] for place in story.places}
    assert not [place for place in story.places if place["file"].startswith("clips/")]
    assert len([place for place in story.places if place["what"].endswith(".mp4")]) == 1


def test_verify_deep_finds_nothing_wrong(corpus):
    problems, _ = verify_with_sandbox(corpus, False, Console(file=io.StringIO()), deep=True)
    assert problems == []


# -- forgetting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assignments", [[], ["pack.where=clip_id NOT LIKE '%.1'"]], ids=str)
def test_forgotten_clips_leave_nothing_in_shards_or_kept_tars(corpus, assignments):
    if assignments:
        pack(corpus, *assignments)
    media = [
        (corpus / tar).read_bytes()[offset : offset + num_bytes]
        for tar, offset, num_bytes in ask(
            corpus, "SELECT tar, mp4_offset, num_bytes FROM clips WHERE video_id = 'video-b'"
        )
    ]
    forget(corpus, find(corpus, ["video-b"], [], None), None)
    compact(corpus)
    remains = [
        path
        for path in corpus.rglob("*")
        if path.is_file() and any(each in path.read_bytes() for each in [b"video-b", *media])
    ]
    assert len(media) == 3 and remains == []
    assert_every_clip_is_whole(corpus, 21)
    assert all(set(of_stage) <= {"done"} for of_stage in state_of(corpus).values())
    pack(corpus, "pack.where=")
    assert_every_clip_is_whole(corpus, 21)
    assert [name for name in clips_of(corpus) if name.startswith("cut-")] == []
    assert problems_of(corpus) == []
