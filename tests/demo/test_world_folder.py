"""The demo world as a folder: deterministic bytes, truth files, sound and broken sources, repeated calls, errors."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from pydantic import ValidationError

from clipmill.base.errors import ItemError, UserError
from clipmill.media.probe import probe
from pipeline.demo.grammar import held_out
from pipeline.demo.plan import CATEGORIES, plan_video
from pipeline.demo.world import UNKNOWN_HOST, WorldSettings, make_world, read_truth, write_sources

ROOT = Path(__file__).resolve().parents[2]
BROKEN = (
    "not-found",
    "html",
    "truncated",
    "empty",
    "unknown-host",
    "audio-only",
    "unavailable-once",
    "cut-off",
    "duplicate",
)
SMALL = dict(num_videos=3, min_video_s=4.0, max_video_s=6.0, sizes=("320x240",), rates=("12.5",), broken=BROKEN)
MAKE = """
import json, sys
from pipeline.demo.world import WorldSettings, make_world
for folder, settings in json.loads(sys.argv[1]).items():
    make_world(folder, WorldSettings(**settings))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, WorldSettings(**SMALL, workers=1))
    return folder


def rows_by_kind(folder: Path) -> dict[str, dict]:
    return {row["broken"]: row for row in read_truth(folder) if row["broken"]}


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_elsewhere(worlds: dict[str, dict]) -> None:
    """Make worlds, given as {folder: settings}, in another Python process."""
    subprocess.run([sys.executable, "-c", MAKE, json.dumps(worlds)], check=True, cwd=ROOT, capture_output=True)


def test_every_format_gives_the_same_bytes_in_another_process(tmp_path):
    one = dict(num_videos=1, min_video_s=3.0, max_video_s=3.0, rates=("15",), sizes=("320x240",), workers=1)
    wanted = {name: one | {"formats": (name,), "audio_fraction": 1.0} for name in WorldSettings().formats}
    make_elsewhere({str(tmp_path / "there" / name): settings for name, settings in wanted.items()})
    for name, settings in wanted.items():
        make_world(tmp_path / "here" / name, WorldSettings(**settings))
        assert hashes(tmp_path / "here" / name) == hashes(tmp_path / "there" / name), name


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, world):
    make_elsewhere({str(tmp_path / "w"): SMALL | {"workers": 2}})
    assert hashes(tmp_path / "w") == hashes(world)


def test_another_seed_gives_another_world(tmp_path, world):
    first = plan_video(WorldSettings(seed=1), 0)
    assert first != plan_video(WorldSettings(seed=2), 0)
    assert first == plan_video(WorldSettings(seed=1, num_videos=1000), 0)


def test_no_name_of_the_machine_leaks_into_any_file(world):
    for path in world.rglob("*"):
        if path.is_file():
            assert str(world).encode() not in path.read_bytes()


def test_a_finished_world_is_kept_and_progress_is_reported(tmp_path):
    settings = WorldSettings(num_videos=2, min_video_s=3.0, max_video_s=4.0, workers=1)
    reported = []
    first = make_world(tmp_path / "w", settings, lambda done, total: reported.append((done, total)))
    assert reported == [(1, 2), (2, 2)]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*")}
    assert make_world(tmp_path / "w", settings.model_copy(update={"workers": 2}), reported.append) == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*")}


def test_an_interrupted_world_is_made_again(tmp_path):
    settings = WorldSettings(num_videos=2, min_video_s=3.0, max_video_s=4.0, workers=1)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_world(tmp_path / "a", settings, stop)
    make_world(tmp_path / "a", settings)
    make_world(tmp_path / "b", settings)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_folder_with_other_things_is_refused(tmp_path, world):
    (tmp_path / "letter.txt").write_text("mine")
    for folder in (tmp_path, world):
        with pytest.raises(UserError, match="another folder"):
            make_world(folder, WorldSettings(num_videos=1, seed=99))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (dict(num_videos=0), "num_videos"),
        (dict(min_video_s=50.0, max_video_s=40.0), "min_video_s"),
        (dict(min_scene_s=5.0, max_scene_s=4.0), "max_scene_s"),
        (dict(filler_fraction=1.5), "filler_fraction"),
        (dict(formats=("avi",)), "formats"),
        (dict(formats=("h264-ts",)), "variable"),
        (dict(colour="red"), "colour"),
    ],
)
def test_a_wrong_setting_is_named(wrong, named):
    with pytest.raises(ValidationError, match=named):
        WorldSettings(**wrong)


def test_truth_names_files_that_are_there(world):
    for row in read_truth(world):
        path = world / row["file"]
        assert path.exists() == (row["broken"] not in ("not-found", "unknown-host"))
        if path.exists():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        if row["subtitle"]:
            assert (world / row["subtitle"]["file"]).stat().st_size > 0
        assert row["works"] == bool(row["scenes"])
        assert row["category"] in CATEGORIES


def test_broken_sources_are_broken_in_their_way(world):
    kinds = rows_by_kind(world)
    assert set(kinds) == set(BROKEN)
    for kind, error_class in [("html", "not-a-video"), ("empty", "empty-file"), ("truncated", "not-a-video")]:
        with pytest.raises(ItemError, match=error_class):
            probe(world / kinds[kind]["file"])
    with pytest.raises(ItemError, match="no-video-stream"):
        probe(world / kinds["audio-only"]["file"])
    for kind in ("unavailable-once", "cut-off", "duplicate"):
        assert probe(world / kinds[kind]["file"]).width == 320
        assert kinds[kind]["works"]
    original = next(row for row in read_truth(world) if row["video_id"] == kinds["duplicate"]["duplicate_of"])
    assert original["sha256"] == kinds["duplicate"]["sha256"]
    assert original["url_path"] != kinds["duplicate"]["url_path"]
    faults = json.loads((world / "faults.json").read_text())
    assert set(faults) == {kinds[kind]["file"] for kind in ("html", "unavailable-once", "cut-off")}


def test_sources_point_at_the_server_and_carry_metadata(world, tmp_path):
    assert write_sources(world, "http://127.0.0.1:9/", tmp_path / "list.jsonl") == 3 + len(BROKEN)
    rows = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    truth = read_truth(world)
    assert len({row["url"] for row in rows}) == len(rows) == len({row["id"] for row in rows})
    for row, video in zip(rows, truth, strict=True):
        host = UNKNOWN_HOST if video["broken"] == "unknown-host" else "http://127.0.0.1:9"
        assert row["url"] == host + video["url_path"]
        assert {"id", "title", "category", "language", "licence"} <= set(row)
        assert ("subtitle" in row) == (video["subtitle"] is not None)


def test_the_parquet_truth_answers_sql(world):
    rows = duckdb.sql(f"SELECT * FROM '{world / 'truth.parquet'}' ORDER BY video_id, n").fetchdf()
    scenes = [scene for row in sorted(read_truth(world), key=lambda r: r["video_id"]) for scene in row["scenes"]]
    assert len(rows) == len(scenes)
    for (_, row), scene in zip(rows.iterrows(), scenes, strict=True):
        first = scene["facts"]["objects"][0]
        assert (row["start_s"], row["end_s"]) == (scene["start_s"], scene["end_s"])
        assert all(row[name] == value for name, value in first.items())
        assert row["still_text"] == scene["still_text"]
        assert row["spoken"] == " ".join(sentence["text"] for sentence in scene["narration"])


def test_summary_counts(world):
    summary = make_world(world, WorldSettings(**SMALL, workers=1))
    truth = read_truth(world)
    assert summary.num_videos == sum(row["works"] for row in truth) == 6
    assert summary.num_broken == 6
    assert summary.num_scenes == sum(len(row["scenes"]) for row in truth)
    assert summary.num_bytes == sum(path.stat().st_size for path in (world / "videos").iterdir())


def test_seen_and_held_out_worlds_share_no_combination():
    combinations = {}
    for which in ("seen", "held-out"):
        settings = WorldSettings(combinations=which, seed=4)
        plans = [plan_video(settings, index) for index in range(30)]
        combinations[which] = {
            thing.combination for plan in plans for _, scene in plan.scenes for thing in scene.objects
        }
    assert combinations["seen"].isdisjoint(combinations["held-out"])
    assert all(held_out(c, 0.15, 0) for c in combinations["held-out"])


def test_a_small_world_already_has_the_variety():
    plans = [plan_video(WorldSettings(), index) for index in range(24)]
    assert len({plan.format_name for plan in plans}) >= 7
    assert {plan.size for plan in plans} == {(320, 240), (426, 240), (240, 320), (640, 360)}
    assert any(plan.rate is None for plan in plans)
    assert len({plan.rate for plan in plans}) == 6
    assert len({plan.category for plan in plans}) >= 12
    h264 = [plan for plan in plans if plan.format_name.startswith("h264")]
    assert len(h264) > len(plans) / 2


def test_videos_and_scenes_have_the_asked_lengths():
    plans = [plan_video(WorldSettings(), index) for index in range(60)]
    assert all(29.5 <= plan.duration_s <= 120.5 for plan in plans)
    durations = [scene.duration_s for plan in plans for _, scene in plan.scenes]
    assert min(durations) > 2.8 and max(durations) < 15.2
    assert 7 < sum(durations) / len(durations) < 10
