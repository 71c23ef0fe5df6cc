"""`explain` finds a source, clip or sample by any of its names, and shows its history and its place."""

import json
import shutil

import pytest

from clipmill.base.errors import UserError
from clipmill.cli.explain import run_explain, told
from pipeline.maintenance.forget import find, forget
from shards.packing.tar import read_member
from shards.query.explain import as_json, explain
from tests.helpers.builds import ask
from tests.helpers.whole_corpus import url_of

STAGES = ["ingest", "download", "transcribe", "segment", "cut", "caption", "score"]


def test_every_name_of_a_thing_leads_to_it(whole):
    assert explain(whole, "video-c").id == explain(whole, url_of("video-c").replace("http:", "HTTP:")).id == "video-c"
    assert explain(whole, "video-c.1").id == explain(whole, "video-c_0001").id == "video-c.1"


def test_a_clip_is_explained_from_its_url_to_its_last_byte(whole):
    story = explain(whole, "video-c.1")
    assert story.source["url"] == url_of("video-c")
    assert [row["stage"] for row in story.attempts] == STAGES
    assert all(row["run_id"] and row["at"] and row["attempts"] == 1 for row in story.attempts)
    assert all(row["fingerprint"] for row in story.attempts[1:])
    assert story.captions[0]["text"] == "a picture of video-c.1" and story.captions[0]["current"]
    assert story.clip["text"].endswith("part 1")
    [run] = story.runs
    assert run["command"].startswith("clipmill build")


def test_the_bytes_are_where_it_says(whole):
    places = {place["what"]: place for place in explain(whole, "video-c.1").places}
    members = [f"video-c_0001.{extension}" for extension in ("mp4", "jpg", "txt", "json")]
    assert {"source", "clip", "frame 0", *members} == set(places)
    [(sha256,)] = ask(whole, "SELECT sha256 FROM clips WHERE clip_id = 'video-c.1'")
    clip, sample = places["clip"], places["video-c_0001.mp4"]
    assert clip["sha256"] == sample["sha256"] == sha256
    read = [read_member(whole / place["file"], place["offset"], place["num_bytes"]) for place in (clip, sample)]
    assert read[0] == read[1]
    text = places["video-c_0001.txt"]
    assert read_member(whole / text["file"], text["offset"], text["num_bytes"]).endswith(b"part 1")


@pytest.mark.parametrize("name", ["video-c", "video-c.1"])
def test_it_fits_eighty_columns_and_is_json_too(whole, name):
    lines = list(told(explain(whole, name)))
    assert len(lines) > 15 and max(map(len, lines)) <= 80
    assert "video-c" in lines[0] and any("download" in line for line in lines)
    values = json.loads(as_json(explain(whole, name)))
    assert values["source"]["video_id"] == "video-c" and len(values["attempts"]) >= 6


def test_a_source_lists_its_clips(whole):
    story = explain(whole, "video-c")
    assert [clip["clip_id"] for clip in story.clips] == ["video-c.0", "video-c.1", "video-c.2"]
    assert all(clip["shard"] and clip["num_captions"] == 1 for clip in story.clips)


def test_an_unknown_name_gets_suggestions(whole):
    with pytest.raises(UserError, match=r"no such video, clip, sample or URL. Similar: .*video-c\.1"):
        explain(whole, "vide-c.1")
    with pytest.raises(UserError, match="Give a video_id, a clip_id, a sample's key or a URL"):
        explain(whole, "zzz")


def test_what_was_forgotten_is_known_by_its_tombstone_alone(whole, tmp_path, capsys):
    root = tmp_path / "corpus"
    shutil.copytree(whole, root)
    forget(root, find(root, ["video-c"], [], None), "its owner asked")
    for name in ("video-c", "video-c.1", url_of("video-c")):
        assert run_explain(root, name, as_json=False) == 0
        said = capsys.readouterr().out
        assert "forgotten at" in said and "reason: its owner asked" in said and "title" not in said


def test_control_characters_of_titles_do_not_reach_the_terminal(whole):
    story = explain(whole, "video-c")
    story.source["title"] = "a\x1b[2Jb"
    assert not any("\x1b" in line for line in told(story))
