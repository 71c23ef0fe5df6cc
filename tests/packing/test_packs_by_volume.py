"""Shards belong to a volume: new sources change those of the open one alone. Named packs stand beside the main one."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from clipmill.base.errors import UserError
from clipmill.cli.app import app
from pipeline.engine.build import build, session, status, with_defaults
from pipeline.engine.settings import resolve
from pipeline.maintenance.forget import compact, find, forget
from pipeline.stages import pack as pack_stage
from pipeline.stages.pack import VolumePacking, planned, write_task
from pipeline.stages.pack_notes import Pack
from shards.corpus.packs import is_name, named_packs, pack_of, volume_of
from shards.packing.index import read_index, read_stamp, write_index
from shards.packing.pack import PackSettings, plan_shards, volume_batches
from shards.packing.verify import verify
from shards.query.explain import explain
from shards.query.sql import open_manifest
from shards.storage.sealed_parquet import read_parquet, write_parquet
from tests.helpers.builds import ask
from tests.helpers.whole_corpus import build_whole, write_sources
from tests.packing.test_pack_shards import CLIP_IDS, samples_table
from training.data.relocation import RelocationIndex
from training.data.selection import Selection, freeze
from training.launch import launch_estimate

VIDEOS = [f"video-{letter}" for letter in "abcdefgh"]  # three to a unit, one unit to a volume: abc, def, gh
PER_UNIT = ["ingest.volume_units=1"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Build a corpus of three volumes, each of three or two shards, with a named pack."""
    folder = tmp_path_factory.mktemp("volumes")
    build_whole(folder / "corpus", write_sources(folder / "list.jsonl", VIDEOS), settings=PER_UNIT)
    run_pack(folder / "corpus", "pack.where=clip_id NOT LIKE '%.2'", name="no-twos")
    return folder / "corpus"


@pytest.fixture
def corpus(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "corpus"))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(pack_stage, "FEW_SHARDS", 1000)


def run_pack(corpus: Path, *assignments: str, name: str | None = None):
    few, pack_stage.FEW_SHARDS = pack_stage.FEW_SHARDS, 1000
    try:
        stages = ["pack"]
        return build(corpus, [], stages=stages, recipe=None, assignments=[*assignments], command="test", pack=name).pack
    finally:
        pack_stage.FEW_SHARDS = few


def shard_files(corpus: Path, folder: str = "shards") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((corpus / folder).iterdir()) if path.is_file()}


def settings_in(corpus: Path) -> dict:
    return yaml.safe_load((corpus / "corpus.yaml").read_text())


def problems_of(corpus: Path) -> list[str]:
    with open_manifest(corpus) as connection:
        return [f"{problem.path} {problem.kind} {problem.message}" for problem in verify(corpus, connection)]


# -- volumes ---------------------------------------------------------------------------------------------------------


def test_no_shard_holds_clips_of_two_volumes(packed):
    rows = ask(packed, "SELECT DISTINCT shard, volume FROM catalog ORDER BY 1")
    assert [volume for _, volume in rows] == [volume_of(shard) for shard, _ in rows]
    assert {shard for shard, _ in rows} == {f"{v:06d}-{n:06d}.tar" for v, n in [*VOLUMES_AND_SHARDS]}
    assert ask(packed, "SELECT count(*), count(DISTINCT clip_id) FROM samples") == [(24, 24)]


VOLUMES_AND_SHARDS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]  # nine or six clips, at most four


def test_new_sources_change_the_shards_of_the_open_volume_alone(corpus, tmp_path, monkeypatch):
    asked, select = [], pack_stage.select_samples
    monkeypatch.setattr(pack_stage, "select_samples", lambda *a: asked.append(a[2]) or select(*a))
    run_pack(corpus)
    asked.clear()
    before, named = shard_files(corpus), shard_files(corpus, "shards/no-twos")
    more = write_sources(tmp_path / "more.jsonl", ["video-i", "video-j", "video-k"])  # unit 3, so the open volume is 3
    build_whole(corpus, more, settings=PER_UNIT)
    assert asked == [[3]], "no other volume is looked at"
    after = shard_files(corpus)
    assert {name: after[name] for name in before} == before
    assert {volume_of(name) for name in after.keys() - before.keys()} == {3}
    assert shard_files(corpus, "shards/no-twos") == named, "only `run pack --name` changes a named pack"
    run_pack(corpus, name="no-twos")
    again = shard_files(corpus, "shards/no-twos")
    assert {name: again[name] for name in named} == named and len(again) > len(named)
    assert problems_of(corpus) == []


@settings(deadline=None, max_examples=50)
@given(CLIP_IDS, CLIP_IDS, st.integers(1, 5))
def test_a_volume_is_planned_as_if_it_were_alone(clips, others, max_samples):
    limits = PackSettings(max_samples=max_samples)
    alone = plan_shards(samples_table(clips), limits, volume=7)
    assert [plan.name for plan in alone] == [f"000007-{number:06d}.tar" for number in range(len(alone))]
    whole = plan_shards(samples_table(clips), limits)
    assert [plan.clip_ids for plan in alone] == [plan.clip_ids for plan in whole], "the order of the same shuffle"
    beside = plan_shards(samples_table(others), limits, volume=8)
    assert not {plan.key for plan in alone} & {plan.key for plan in beside}


@given(st.lists(st.integers(0, 1_200_000), max_size=30))
def test_volumes_are_asked_for_in_batches_of_bounded_size(counts):
    batches = list(volume_batches(dict(enumerate(counts))))
    assert [volume for batch in batches for volume in batch] == list(range(len(counts)))
    assert all(len(batch) == 1 or sum(counts[volume] for volume in batch) <= 500_000 for batch in batches)


def test_one_volume_is_packed_while_others_are_not_complete(corpus):
    before = shard_files(corpus)
    for name in before:
        (corpus / "shards" / name).unlink()
    with session(corpus, None, [], "test", create=False) as (current, _):
        pack = Pack("", current.settings.pack)
        with open_manifest(corpus) as connection:
            [(volume, plans)] = planned(corpus, connection, pack, volumes=[1])
            packing = VolumePacking(current, pack, volume, plans)
            for task in packing.tasks(connection):
                assert not packing.is_written
                packing.add(write_task(*task))
            assert packing.is_written and packing.commit().num_written == 3
    assert shard_files(corpus) == {name: data for name, data in before.items() if volume_of(name) == 1}
    run_pack(corpus)
    assert shard_files(corpus) == before


def test_killed_between_two_volumes_the_next_run_ends_in_the_same_bytes(corpus, monkeypatch):
    """Killed for real, in the place of, or after, each file operation that puts a shard of a volume in place."""
    before = shard_files(corpus)
    for name in before:
        (corpus / "shards" / name).unlink()
    for number in (2, 9):
        process = subprocess.run([sys.executable, "-c", KILLED, str(corpus), str(number)], capture_output=True)
        assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    run_pack(corpus)
    assert shard_files(corpus) == before and not (corpus / "shards/.next").exists()


KILLED = """
import os, signal, sys
from pipeline.stages import pack as stage
from tests.packing.test_packs_by_volume import run_pack
left = int(sys.argv[2])
def watch(event, arguments):
    global left
    if event == "os.rename" and "/shards/" in str(arguments[1]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
run_pack(__import__("pathlib").Path(sys.argv[1]))
"""


def test_the_whole_corpus_is_shuffled_on_request_and_back(corpus):
    before = shard_files(corpus)
    run_pack(corpus, "pack.shuffle=corpus")
    whole = shard_files(corpus)
    assert sorted(name for name in whole if name.endswith(".tar")) == [f"{number:06d}.tar" for number in range(6)]
    assert problems_of(corpus) == [] and run_pack(corpus).num_written == 0
    run_pack(corpus, "pack.shuffle=volume")
    assert shard_files(corpus) == before


def test_both_ways_may_be_in_place_until_all_of_the_new_one_is(corpus):
    """As after a kill: queries see each clip once, and the next run completes the change."""
    for path in (corpus / "shards").glob("000001-*"):
        path.unlink()
    of_volumes = shard_files(corpus)
    run_pack(corpus, "pack.shuffle=corpus")
    whole = shard_files(corpus)
    for name, data in of_volumes.items():
        (corpus / "shards" / name).write_bytes(data)
    with session(corpus, None, [], "test", create=False) as (current, _):
        current.publish()
    assert ask(corpus, "SELECT count(*), count(DISTINCT clip_id) FROM samples") == [(24, 24)]
    assert ask(corpus, "SELECT count(*) FROM catalog WHERE shard IS NOT NULL") == [(24,)]
    run_pack(corpus)
    assert shard_files(corpus) == whole


def test_a_corpus_from_before_the_setting_keeps_its_shuffle(corpus, tmp_path):
    content = settings_in(corpus)
    del content["settings"]["pack"]["shuffle"]
    assert with_defaults(content["settings"])["pack"]["shuffle"] == "corpus"
    (corpus / "corpus.yaml").write_text(yaml.safe_dump(content))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"pack": {"max_samples": 4}, "ingest": {"unit_videos": 3, "volume_units": 1}}))
    for given_recipe, shuffle in ((None, "corpus"), (str(recipe), "corpus")):
        with session(corpus, given_recipe, [], "test", create=False) as (current, _):
            assert current.settings.pack.shuffle == shuffle
    recipe.write_text(yaml.safe_dump({"pack": {"shuffle": "volume"}}))
    with session(corpus, str(recipe), [], "test", create=False) as (current, _):
        assert current.settings.pack.shuffle == "volume"
    assert resolve(None, None, []).pack.shuffle == "volume"


def test_new_texts_are_written_into_the_indexes_that_have_old_ones(corpus):
    before = shard_files(corpus)
    path = corpus / "shards" / "000001-000001.parquet"
    rows = read_index(path)
    names = rows.column_names
    old = rows.set_column(names.index("caption"), "caption", [["an older caption"] * rows.num_rows])
    write_index(path, old, read_stamp(path))
    with session(corpus, None, [], "test", create=False) as (current, _):
        current.publish()
    assert run_pack(corpus).num_refreshed == 1
    assert shard_files(corpus) == before


def test_clips_that_cannot_be_packed_are_recorded_by_volume(corpus):
    clean = shard_files(corpus)
    (tar,) = ask(corpus, "SELECT DISTINCT tar FROM clips WHERE video_id = 'video-d'")[0]
    data = (corpus / tar).read_bytes()
    (corpus / tar).write_bytes(b"\0" * len(data))
    for name in clean:
        if volume_of(name) == 1:
            (corpus / "shards" / name).unlink()
    failed = {clip_id for clip_id, _ in run_pack(corpus).failures}
    assert failed == {f"video-{letter}.{n}" for letter in "def" for n in range(3)}
    recorded = "SELECT item_id FROM failures WHERE stage = 'pack'"
    assert {item for (item,) in ask(corpus, recorded)} == failed
    (corpus / "shards" / "000000-000000.tar").unlink()
    run_pack(corpus)
    assert {item for (item,) in ask(corpus, recorded)} == failed, "packing another volume forgets no failure"
    (corpus / tar).write_bytes(data)
    run_pack(corpus)
    assert ask(corpus, recorded) == [] and shard_files(corpus) == clean


@pytest.mark.parametrize("shuffle", ["volume", "corpus"])
def test_a_sample_of_a_volume_does_not_name_clips_of_other_volumes(corpus, shuffle):
    """Not even its near-duplicates: when it is packed, there may be none yet."""
    run_pack(corpus, f"pack.shuffle={shuffle}")
    groups = ask(corpus, "SELECT count(duplicate_group) FROM catalog WHERE shard IS NOT NULL")
    named = sum(data.count(b'"duplicate_group"') for data in shard_files(corpus).values())
    assert groups[0][0] > 0 and named == (groups[0][0] if shuffle == "corpus" else 0)


# -- named packs -----------------------------------------------------------------------------------------------------


def test_a_named_pack_has_its_settings_and_the_main_one_keeps_its_own(packed):
    assert ask(packed, "SELECT pack, count(*) FROM pack_samples GROUP BY 1") == [("no-twos", 16)]
    content = settings_in(packed)
    assert content["packs"]["no-twos"]["where"] == "clip_id NOT LIKE '%.2'"
    assert content["settings"]["pack"]["where"] == ""
    assert ask(packed, "SELECT count(*) FROM samples") == [(24,)], "one row per clip, of the main pack"
    assert ask(packed, "SELECT count(*) FROM catalog") == [(24,)]
    assert problems_of(packed) == []


def test_a_named_pack_comes_up_to_date_with_its_recorded_settings(corpus):
    before = shard_files(corpus, "shards/no-twos")
    main = shard_files(corpus)
    assert run_pack(corpus, name="no-twos").num_written == 0
    run_pack(corpus, "pack.max_samples=2", name="no-twos")
    assert shard_files(corpus, "shards/no-twos").keys() > before.keys()
    assert settings_in(corpus)["packs"]["no-twos"]["where"] == "clip_id NOT LIKE '%.2'"
    run_pack(corpus, "pack.max_samples=4", name="no-twos")
    assert shard_files(corpus, "shards/no-twos") == before and shard_files(corpus) == main
    build(corpus, [], stages=["pack"], recipe=None, assignments=[], command="test")
    assert settings_in(corpus)["packs"].keys() == {"no-twos"} and shard_files(corpus, "shards/no-twos") == before
    assert status(corpus, []).pack == {"packed": 24, "to_pack": 0}


@pytest.mark.parametrize("name", ["", ".next", "Good", "a_b", "-a", "a" * 65, "a/b", "..", "a.b"])
def test_other_names_are_refused(corpus, name):
    files = shard_files(corpus)
    with pytest.raises(UserError, match="lowercase letters, digits and dashes"):
        run_pack(corpus, name=name)
    assert not is_name(name) and shard_files(corpus) == files and named_packs(corpus) == ["no-twos"]


def test_a_wrong_condition_records_nothing(corpus):
    before = (corpus / "corpus.yaml").read_text()
    for condition in ("nonsense > 1", "text::INT > 1"):
        with pytest.raises(UserError, match=r"pack\.where"):
            run_pack(corpus, f"pack.where={condition}", name="broken")
    with pytest.raises(UserError, match=r"shufle.*there is no such setting"):
        run_pack(corpus, "pack.shufle=corpus", name="broken")
    assert (corpus / "corpus.yaml").read_text() == before and named_packs(corpus) == ["no-twos"]


def test_the_command_packs_under_a_name_and_refuses_one_for_other_stages(corpus):
    arguments = ["run", "pack", "--corpus", str(corpus), "--name", "one", "--set", "pack.where=video_id = 'video-a'"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert ask(corpus, "SELECT DISTINCT video_id FROM pack_samples WHERE pack = 'one'") == [("video-a",)]
    result = CliRunner().invoke(app, ["run", "cut", "--corpus", str(corpus), "--name", "one"])
    assert isinstance(result.exception, UserError) and "clipmill run pack" in str(result.exception)


def test_training_reads_the_shards_of_the_pack(corpus, tmp_path):
    for pack, folder in (("", "shards"), ("no-twos", "shards/no-twos")):
        freeze(tmp_path / "s.arrow", corpus, "video_id < 'video-d' AND shard LIKE '000000-%'", pack=pack)
        selection = Selection(tmp_path / "s.arrow")
        rows = selection.take(range(selection.num_clips)).to_pylist()
        assert len(rows) == (6 if pack else 9)
        for row in rows:
            assert Path(row["shard"]).parent == Path(folder)
            index = read_index(corpus / Path(row["shard"]).with_suffix(".parquet")).to_pylist()
            [line] = [line for line in index if line["clip_id"] == row["clip_id"]]
            assert (line["mp4_offset"], line["mp4_bytes"]) == (row["mp4_offset"], row["mp4_bytes"])
    with pytest.raises(UserError, match=r"data\.pack = 'other'.* has no-twos"):
        freeze(tmp_path / "s.arrow", corpus, pack="other")
    with pytest.raises(UserError, match=r"data\.pack"):
        freeze(tmp_path / "s.arrow", f"{corpus}/shards/*.tar", pack="no-twos")


def test_plan_counts_the_clips_of_the_pack(packed):
    tiny = ["train.batch_size=2", "data.where=video_id < 'video-d'"]
    counts = [launch_estimate(packed, pack=pack, gpus=["H100"], assignments=tiny)[0].data for pack in (None, "no-twos")]
    assert [count.num_clips for count in counts] == [9, 6]


def test_a_clip_of_a_named_pack_is_found_where_it_is_now(corpus):
    [(sha256,)] = ask(corpus, "SELECT sha256 FROM clips WHERE clip_id = 'video-a.0'")
    for path in (corpus / "shards").glob("000000-*"):
        path.unlink()
    [place] = RelocationIndex(corpus).find([bytes.fromhex(sha256)])
    assert Path(place.shard).parent == Path("shards/no-twos")


def test_explain_names_every_shard_of_a_clip(packed):
    files = {place["file"] for place in explain(packed, "video-a.0").places if place["what"].endswith(".mp4")}
    assert {pack_of(file) for file in files} == {"", "no-twos"}


def test_a_damaged_shard_of_a_named_pack_is_found_and_packed_again(corpus):
    before = shard_files(corpus, "shards/no-twos")
    path = corpus / "shards" / "no-twos" / "000001-000000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    [problem] = problems_of(corpus)
    assert problem.startswith("shards/no-twos/000001-000000.tar bad-tar")
    run_pack(corpus, name="no-twos")
    assert shard_files(corpus, "shards/no-twos") == before and problems_of(corpus) == []


def test_a_named_pack_that_waits_for_its_packing_is_a_warning(corpus):
    path = corpus / "shards" / "no-twos" / "000001-000000.parquet"
    rows = read_index(path)
    old = rows.set_column(rows.column_names.index("caption"), "caption", [["an older caption"] * rows.num_rows])
    write_index(path, old, read_stamp(path))
    with session(corpus, None, [], "test", create=False) as (current, _):
        current.publish()
    [problem] = problems_of(corpus)
    assert problem.startswith("shards/no-twos outdated-pack 4 of its clips") and "--name no-twos" in problem


# -- forgetting ------------------------------------------------------------------------------------------------------


def test_forgetting_changes_only_shards_with_its_clips_in_every_pack(corpus):
    gone = "video-d"
    before = {folder: shard_files(corpus, folder) for folder in ("shards", "shards/no-twos")}
    held = {
        "shards": {shard for (shard,) in ask(corpus, f"SELECT shard FROM samples WHERE video_id = '{gone}'")},
        "shards/no-twos": {s for (s,) in ask(corpus, f"SELECT shard FROM pack_samples WHERE video_id = '{gone}'")},
    }
    plan = find(corpus, [gone], [], None)
    assert plan.total("num_samples") == 5
    assert forget(corpus, plan, None)
    assert ask(corpus, f"SELECT count(*) FROM pack_samples WHERE video_id = '{gone}'") == [(0,)]
    assert ask(corpus, "SELECT volume, len(places), len(pack_places) FROM forgotten") == [(1, 3, 2)]
    compact(corpus)
    for folder, files in before.items():
        after = shard_files(corpus, folder)
        same = {name for name in files if after.get(name) == files[name]}
        assert {Path(name).stem for name in files.keys() - same} == {Path(name).stem for name in held[folder]}
        assert not any(gone.encode() in data for data in after.values())
        assert not any(gone in str(pq.read_table(path).to_pylist()) for path in (corpus / folder).glob("*.parquet"))
    assert run_pack(corpus).num_written == 0 and run_pack(corpus, name="no-twos").num_written == 0
    assert problems_of(corpus) == []


def test_no_sample_names_a_group_after_a_forgotten_clip(corpus):
    run_pack(corpus, "pack.shuffle=corpus")
    named = "SELECT duplicate_group FROM catalog WHERE duplicate_group <> clip_id AND shard IS NOT NULL"
    (gone, _), *_ = [group.split(".") for (group,) in ask(corpus, named)]
    assert any(f'"duplicate_group": "{gone}'.encode() in data for data in shard_files(corpus).values())
    assert forget(corpus, find(corpus, [gone], [], None), None)
    compact(corpus)
    assert not any(gone.encode() in data for data in shard_files(corpus).values())


def test_tombstones_of_earlier_versions_reserve_places_in_volume_0(corpus):
    """They hold no volume, because all sources of their time are in volume 0."""
    assert forget(corpus, find(corpus, ["video-a"], [], None), None)
    [path] = (corpus / "fragments/forgotten").glob("*.parquet")
    table = read_parquet(path)
    write_parquet(path, table.drop_columns(["volume", "pack_places"]))
    with session(corpus, None, [], "test", create=False) as (current, _):
        current.publish()
    assert ask(corpus, "SELECT volume, len(places) FROM forgotten") == [(None, 3)]
    before = shard_files(corpus)
    with duckdb.connect(str(corpus / "manifest.duckdb"), read_only=True) as connection:
        holds_it = {volume_of(name) for name in before}
        assert holds_it == {0, 1, 2} and connection.sql("SELECT count(*) FROM samples").fetchall() == [(21,)]
    places = dict(ask(corpus, "SELECT clip_id, shard FROM samples"))
    run_pack(corpus)
    assert dict(ask(corpus, "SELECT clip_id, shard FROM samples")) == places, "no other clip moves"


# -- nothing to do ---------------------------------------------------------------------------------------------------


def test_what_is_up_to_date_is_not_planned_again(corpus, monkeypatch):
    """Until anything changes: a file, a setting, a row or a tombstone."""
    calls = []
    select = pack_stage.select_samples
    monkeypatch.setattr(pack_stage, "select_samples", lambda *a: calls.append(a) or select(*a))

    def has_planned(*assignments: str, name: str | None = None) -> bool:
        calls.clear()
        run_pack(corpus, *assignments, name=name)
        return bool(calls)

    assert has_planned() and not has_planned() and not has_planned("pack.fsync=true")
    assert status(corpus, []).pack == {"packed": 24, "to_pack": 0} and not calls
    assert status(corpus, ["pack.where=video_id = 'video-a'"]).pack == {"packed": 0, "to_pack": 3}
    assert not has_planned(name="no-twos") and has_planned("pack.seed=1", name="no-twos")
    assert not has_planned(name="no-twos")
    index = corpus / "shards" / "000001-000000.parquet"
    data = index.read_bytes()
    index.write_bytes(data[:-40] + bytes(8) + data[-32:])  # damage that keeps the size
    assert has_planned() and index.read_bytes() == data and not has_planned()
    assert has_planned("pack.max_samples=5") and has_planned("pack.max_samples=4") and not has_planned()
    assert forget(corpus, find(corpus, ["video-h"], [], None), None)
    assert has_planned() and not has_planned()
    shutil.rmtree(corpus / ".clipmill")
    assert has_planned(), "the note is a cache"


def test_items_may_be_named_when_a_stage_is_run(corpus):
    """The items of `--where` are no pack."""
    arguments = {"stages": ["pack"], "recipe": None, "assignments": [], "command": "test"}
    for options in ({"where": "clip_id = 'video-a.0'"}, {"redo": True}, {"redo": True, "pack": "no-twos"}):
        before = shard_files(corpus), shard_files(corpus, "shards/no-twos")
        build(corpus, [], **arguments, **options)
        assert (shard_files(corpus), shard_files(corpus, "shards/no-twos")) == before
    assert settings_in(corpus)["packs"].keys() == {"no-twos"}
