"""`clipmill edit` adds rows and clips beside the originals, and training reads the edited frames."""

import hashlib
from pathlib import Path

import duckdb
import pytest

from clipmill.base.errors import UserError
from pipeline.editing.clips import Items
from shards.packing.tar import read_member
from tests.helpers.edits import CLIP_FPS, copy_of, edit, edits, numbers_of, rows, shown
from training.data.selection import Selection, freeze, freeze_run
from training.settings import DataSettings, EvalSettings

ORIGINALS = ("sources", "spans", "sentences", "clips", "samples", "texts", "captions", "videos")


@pytest.fixture(scope="module")
def edited(numbered, tmp_path_factory):
    """Edit a corpus once with the demo's model; return (corpus, its files before)."""
    folder = tmp_path_factory.mktemp("edited")
    corpus = copy_of(numbered, folder)
    before = files_of(corpus), tables_of(corpus)
    edit(corpus, folder / "edit")
    return corpus, before


def files_of(corpus: Path) -> dict[str, str]:
    """Return the content of every file except the published manifest and private files."""
    paths = [path for path in corpus.rglob("*") if path.is_file() and ".clipmill" not in path.parts]
    return {
        str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.name != "manifest.duckdb"
    }


def tables_of(corpus: Path) -> dict[str, list[str]]:
    return {name: sorted(map(str, rows(corpus, f"SELECT * FROM {name}"))) for name in ORIGINALS[1:]}


def test_originals_are_byte_identical_before_and_after(edited):
    corpus, (files, tables) = edited
    after = files_of(corpus)
    assert {name: after[name] for name in files} == files
    assert tables_of(corpus) == tables
    new = set(after) - set(files)
    assert new and all("edit-" in name or "/runs/" in name for name in new)


def test_every_edit_has_its_teacher_and_both_scores(edited):
    corpus, _ = edited
    accepted = [row for row in edits(corpus) if row["accepted"]]
    assert len(accepted) >= 3
    for row in accepted:
        assert len(row["teacher"]) == 16 and row["score_after"] > row["score_before"]
        assert (row["start_s"], row["end_s"]) != (row["base_start_s"], row["base_end_s"])
        assert abs(row["start_s"] - row["base_start_s"]) <= 4 and abs(row["end_s"] - row["base_end_s"]) <= 4
    [warm_up, played] = rows(corpus, "SELECT * FROM edit_rounds ORDER BY round")
    assert (warm_up["outcome"], played["outcome"]) == ("warm-up", "untrained")
    assert {warm_up["teacher"], played["teacher"]} == {row["teacher"] for row in accepted}
    assert played["num_accepted"] == len(accepted) and played["num_clips"] == 9
    assert sum(bin_["num_clips"] for bin_ in played["shifts"]) == 9
    by_reason = {reason["reason"]: reason["num_clips"] for reason in played["reasons"]}
    assert by_reason == {row["reason"]: row["num_clips"] for row in rows(corpus, "SELECT * FROM edits_by_reason")}
    assert sum(by_reason.values()) == 9


def test_an_edited_clip_shows_the_frames_of_its_new_boundaries(edited):
    corpus, _ = edited
    clips = rows(corpus, "SELECT * FROM edited_clips")
    assert {(c["clip_id"], c["span_start_s"], c["span_end_s"]) for c in clips} == {
        (row["clip_id"], row["start_s"], row["end_s"]) for row in edits(corpus) if row["accepted"]
    }
    for clip in clips:
        expected = numbers_of(clip["clip_id"], clip["span_start_s"], clip["span_end_s"])
        assert shown(corpus, clip["tar"], clip["mp4_offset"], clip["num_bytes"]) == expected
        [frame] = clip["frames"]
        jpeg = read_member(corpus / clip["tar"], frame["offset"], frame["num_bytes"])
        assert hashlib.sha256(jpeg).hexdigest() == clip["frame_sha256"]


def test_training_reads_edited_clips_as_edited_and_the_others_as_they_are(edited, tmp_path):
    corpus, _ = edited
    training, _ = freeze_run(tmp_path, corpus, DataSettings(edits="accepted"), EvalSettings())
    freeze(tmp_path / "plain.arrow", corpus)
    selection, plain = Selection(tmp_path / "selection.arrow"), Selection(tmp_path / "plain.arrow")
    spans = {row["clip_id"]: (row["start_s"], row["end_s"]) for row in edits(corpus) if row["accepted"]}
    assert training.num_edited == len(spans) < selection.num_clips == plain.num_clips
    assert any("edited boundaries" in note for note in training.notes())
    original = {row["clip_id"]: row for row in plain.take(range(plain.num_clips)).to_pylist()}
    table = selection.take(range(selection.num_clips))
    keys = list(zip(table["shard"].to_pylist(), table["mp4_offset"].to_pylist(), strict=True))
    assert keys == sorted(keys)
    for row in table.to_pylist():
        before = original[row["clip_id"]]
        if row["clip_id"] not in spans:
            assert row == before
            continue
        numbers = shown(corpus, row["shard"], row["mp4_offset"], row["mp4_bytes"])
        assert numbers == numbers_of(row["clip_id"], *spans[row["clip_id"]]) and len(numbers) == row["num_frames"]
        assert row["caption"] is None and row["subtitle"] == before["subtitle"]
    assert selection.hash != plain.hash


def test_a_stale_caption_is_left_out_and_the_text_stays(edited, tmp_path):
    """The captions were written for the clips before the edit."""
    corpus = copy_of(edited[0], tmp_path)
    with duckdb.connect(str(corpus / "manifest.duckdb")) as connection:
        connection.execute("UPDATE samples SET caption = 'a circle'")
    freeze_run(tmp_path, corpus, DataSettings(edits="accepted"), EvalSettings())
    selection = Selection(tmp_path / "selection.arrow")
    moved = {row["clip_id"] for row in edits(corpus) if row["accepted"]}
    for row in selection.take(range(selection.num_clips)).to_pylist():
        assert row["caption"] == (None if row["clip_id"] in moved else "a circle")


def test_clips_held_out_for_evaluation_are_read_as_they_are(edited, tmp_path):
    corpus, _ = edited
    where = "n = 0"
    freeze_run(tmp_path, corpus, DataSettings(edits="accepted"), EvalSettings(where=where, overlap="allow"))
    held_out = Selection(tmp_path / "eval.arrow")
    assert all(shard.startswith("shards/") for shard in held_out.column("shard").to_pylist())


def test_an_edit_counts_only_for_the_clip_and_the_text_it_was_made_for(edited, tmp_path):
    corpus = copy_of(edited[0], tmp_path)
    moved = sorted(row["clip_id"] for row in edits(corpus) if row["accepted"])
    with duckdb.connect(str(corpus / "manifest.duckdb")) as connection:
        connection.execute("UPDATE clips SET text = 'something else' WHERE clip_id = ?", [moved[0]])
        connection.execute("UPDATE clips SET span_start_s = span_start_s - 1 WHERE clip_id = ?", [moved[1]])
        connection.execute("UPDATE clips SET source_sha256 = 'x' WHERE clip_id = ?", [moved[2]])
    training, _ = freeze_run(tmp_path, corpus, DataSettings(edits="accepted"), EvalSettings())
    assert training.num_edited == len(moved) - 3


def test_clips_without_a_text_are_failures_and_stay(edited):
    corpus, _ = edited
    failures = rows(corpus, "SELECT item_id, error_class FROM failures WHERE stage = 'edit'")
    silent = rows(corpus, "SELECT clip_id FROM clips WHERE text = ''")
    assert {row["item_id"] for row in failures} == {row["clip_id"] for row in silent} and silent
    assert {row["error_class"] for row in failures} == {"no-text"}
    assert not {row["clip_id"] for row in silent} & {row["clip_id"] for row in edits(corpus)}


def test_settings_that_name_unknown_edits_list_the_known_ones(edited, numbered, tmp_path):
    corpus, _ = edited
    [editing] = {row["editing"] for row in edits(corpus)}
    for value, message in (("e00:accepted", f"no such editing. Known here: {editing}"), (7, "has no round 7")):
        with pytest.raises(UserError, match=message):
            freeze_run(tmp_path, corpus, DataSettings(edits=value), EvalSettings())
    with pytest.raises(UserError, match="no such editing. Known here: none: `clipmill edit` makes one"):
        freeze_run(tmp_path, numbered, DataSettings(edits="accepted"), EvalSettings())
    with pytest.raises(UserError, match="Allowed: a data.apart with video in it"):
        freeze_run(tmp_path, corpus, DataSettings(edits=1, apart=()), EvalSettings())
    tars = f"{corpus}/shards/*.tar"
    with pytest.raises(UserError, match="no such editing"):
        freeze_run(tmp_path, tars, DataSettings(edits=1), EvalSettings())


def test_without_its_source_a_clip_only_loses_frames(numbered, tmp_path):
    corpus = copy_of(numbered, tmp_path)
    gone = rows(corpus, "SELECT video_id FROM videos ORDER BY video_id")[0]["video_id"]
    hide_source(corpus, gone)
    edit(corpus, tmp_path / "edit")
    table = [row for row in edits(corpus) if row["video_id"] == gone]
    assert {row["reason"].partition("-without-")[2] for row in table} == {"source"}
    assert {row["reason"] for row in edits(corpus) if row["video_id"] != gone} <= {"better", "no-better"}
    clips = {row["clip_id"]: row for row in rows(corpus, "SELECT * FROM clips")}
    for row in table:
        clip = clips[row["clip_id"]]
        assert clip["start_s"] - 1e-9 <= row["start_s"] < row["end_s"] <= clip["span_end_s"]
    cut = [clip for clip in rows(corpus, "SELECT * FROM edited_clips") if clip["video_id"] == gone]
    assert cut and len(cut) == sum(row["accepted"] for row in table)
    for clip in cut:
        before = clips[clip["clip_id"]]
        own, numbers = (shown(corpus, c["tar"], c["mp4_offset"], c["num_bytes"]) for c in (before, clip))
        assert set(numbers) < set(own) and numbers == sorted(numbers)
        first = round((clip["span_start_s"] - before["start_s"]) * CLIP_FPS)
        assert numbers[0] == own[first]
        assert clip["start_s"] == pytest.approx(before["start_s"] + first / CLIP_FPS)


def hide_source(corpus: Path, video_id: str) -> None:
    """Move the source away, as if it had been deleted after cutting."""
    with duckdb.connect(str(corpus / "manifest.duckdb")) as connection:
        connection.execute("UPDATE videos SET path = 'sources/gone.mp4' WHERE video_id = ?", [video_id])


def test_an_unreadable_video_is_a_failure_and_the_others_are_edited(numbered, tmp_path):
    corpus = copy_of(numbered, tmp_path)
    broken = rows(corpus, "SELECT video_id FROM videos ORDER BY video_id")[0]["video_id"]
    (corpus / "sources" / "broken.mp4").write_bytes(b"no video")
    with duckdb.connect(str(corpus / "manifest.duckdb")) as connection:
        connection.execute("UPDATE videos SET path = 'sources/broken.mp4' WHERE video_id = ?", [broken])
    played = edit(corpus, tmp_path / "edit")
    assert played[-1]["num_failed"] == 1 and played[-1]["num_accepted"] > 0
    failures = rows(corpus, "SELECT * FROM failures WHERE stage = 'edit' AND error_class <> 'no-text'")
    assert [(row["item_id"], row["error_class"]) for row in failures] == [(broken, "source-changed")]
    assert broken not in {row["video_id"] for row in edits(corpus)}
    training, _ = freeze_run(tmp_path, corpus, DataSettings(edits=1), EvalSettings())
    assert training.num_edited == played[-1]["num_accepted"]


def test_only_the_lowest_share_is_edited_where_asked(numbered, tmp_path):
    corpus = copy_of(numbered, tmp_path)
    [_, played] = edit(corpus, tmp_path / "edit", "edit.lowest_share=0.5")
    table = edits(corpus)
    left = [row for row in table if row["reason"] == "not-lowest"]
    assert 0 < len(left) <= 6 and not any(row["accepted"] for row in left)
    assert min(row["score_before"] for row in left) > played["threshold"]
    assert all(row["score_before"] <= played["threshold"] for row in table if row not in left)


def test_a_condition_says_which_clips_are_edited(numbered, tmp_path):
    corpus = copy_of(numbered, tmp_path)
    edit(corpus, tmp_path / "edit", where="n > 0")
    assert {row["clip_id"].rpartition(".")[2] for row in edits(corpus)} == {"1", "2"}
    with pytest.raises(UserError, match="picks no clip"):
        edit(corpus, tmp_path / "other", where="n = 99")
    with pytest.raises(UserError, match="--where"):
        edit(corpus, tmp_path / "another", where="no_such_column")


@pytest.mark.parametrize(
    "settings",
    [
        ("model.method=clip4clip", "model.clip4clip.head=seqTransf"),
        ("model.method=clip4clip", "model.clip4clip.head=tightTransf"),
        ("model.method=unipt", "model.pooling=mean"),
    ],
    ids=" ".join,
)
def test_a_model_of_any_method_edits(numbered, tmp_path, settings):
    corpus = copy_of(numbered, tmp_path)
    [_, played] = edit(corpus, tmp_path / "edit", *settings, where="n < 2")
    assert played["num_failed"] == 0 and played["num_accepted"] > 0


def test_videos_kept_for_measuring_are_never_edited(numbered, tmp_path):
    corpus = copy_of(numbered, tmp_path)
    ids = [row["video_id"] for row in rows(corpus, "SELECT video_id FROM videos ORDER BY video_id")]
    with duckdb.connect(str(corpus / "manifest.duckdb")) as connection:
        for video_id, split in zip(ids, ("train", "val", "test"), strict=False):
            connection.execute("UPDATE videos SET split = ? WHERE video_id = ?", [split, video_id])
    edit(corpus, tmp_path / "edit", "edit.bank_size=0")  # one video is left, and no other's texts
    assert {row["video_id"] for row in edits(corpus)} == {ids[0]}
    items = Items(tmp_path / "edit" / "clips.arrow")
    assert items.held_out_videos == {ids[1]}
