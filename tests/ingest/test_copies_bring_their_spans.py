"""Two sources with the same bytes are one video with the spans of both; a video without a clip says why."""

import json

import duckdb
import pytest

from pipeline.engine.build import session
from pipeline.runtime.task import Outcome, Task, commit
from pipeline.stages.ingest.stage import ingest_sources
from pipeline.stages.segment.segment import SegmentSettings, segment_video, why_no_spans
from pipeline.stages.segment.stage import run_segment
from pipeline.stages.transcribe.words import Word

SETTINGS = ["ingest.unit_videos=1", "download.allow_private_addresses=true"]


def spans(*times: float) -> list[dict]:
    return [{"n": n, "start_s": start, "end_s": start + 1} for n, start in enumerate(times)]


def do(current, stage: str, rows) -> list[dict]:
    """Commit the pending items of a stage, whose Outcome `rows` gives; return their payloads."""
    current.refresh_state()
    items, units = current.ledger.work(stage), current.ledger.unit_of_work(stage)
    for item in items:
        settings = getattr(current.settings, stage)
        task = Task(
            stage, units[item["item_id"]], [item], settings, f"{stage}-s", str(current.corpus.root), current.run_id
        )
        outcomes = run_segment(task)[0] if stage == "segment" else [Outcome(item["item_id"], rows(item))]
        current.ledger.load([commit(task, outcomes, []).name])
    current.refresh_state()
    return items


def download(contents: dict[str, str], duration_s: float = 30.0):
    def rows(item: dict) -> dict:
        video_id = item["video_id"]
        row = {"video_id": video_id, "path": f"sources/{video_id}.mp4", "sha256": contents.get(video_id, video_id)}
        return {"downloads": [{**row, "duration_s": duration_s, "num_bytes": 1, "subtitles": [], "extractor": "http"}]}

    return rows


def transcribe(item: dict) -> dict:
    silent = {"video_id": item["video_id"], "origin": "none", "words": [], "num_words": 0, "digest": "silent"}
    return {"transcripts": [silent]}


def write(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps({"url": f"http://h/{row['id']}.mp4", **row}) + "\n" for row in rows))
    return str(path)


def current_spans(current) -> list[tuple]:
    return current.ledger.connection.sql("SELECT clip_id, start_s FROM current_spans ORDER BY ALL").fetchall()


def test_the_spans_of_a_copy_are_cut_from_the_first(tmp_path):
    same = {"a": "bytes", "b": "bytes", "c": "bytes"}
    with session(tmp_path / "corpus", None, SETTINGS, "test", create=True) as (current, _):
        rows = [
            {"id": "a", "clips": spans(1, 5)},
            {"id": "b", "clips": spans(5, 9)},
            {"id": "other", "clips": spans(1)},
        ]
        ingest_sources(current, [write(tmp_path / "l.jsonl", rows)])
        do(current, "download", download(same))
        do(current, "transcribe", transcribe)
        assert len(do(current, "segment", None)) == 2
        expected = [("a.0", 1.0), ("a.1", 5.0), ("a.2", 9.0), ("other.0", 1.0)]
        assert current_spans(current) == expected
        # A copy that arrives later makes its video pending, and no other; one without spans of its own does not.
        for later, pending in (({"id": "c", "clips": spans(1, 9)}, []), ({"id": "c", "clips": spans(20)}, ["a"])):
            ingest_sources(current, [write(tmp_path / "l.jsonl", [later])])
            do(current, "download", download(same))
            assert [item["item_id"] for item in current.ledger.work("segment")] == pending
        do(current, "segment", None)
        assert current_spans(current) == [*expected[:3], ("a.3", 20.0), expected[3]]
        assert do(current, "segment", None) == []


def test_a_copy_gives_spans_to_a_video_without_any(tmp_path):
    with session(tmp_path / "corpus", None, SETTINGS, "test", create=True) as (current, _):
        ingest_sources(current, [write(tmp_path / "l.jsonl", [{"id": "a"}, {"id": "b", "clips": spans(3)}])])
        do(current, "download", download({"a": "x", "b": "x"}))
        do(current, "transcribe", transcribe)
        do(current, "segment", None)
        assert current_spans(current) == [("a.0", 3.0)]


def test_a_copy_with_texts_is_cut_by_itself(tmp_path):
    rows = [{"id": name, "start": start, "end": start + 1, "caption": name} for name, start in (("a", 1), ("b", 5))]
    with session(tmp_path / "corpus", None, SETTINGS, "test", create=True) as (current, _):
        ingest_sources(current, [write(tmp_path / "l.jsonl", rows)])
        do(current, "download", download({"a": "x", "b": "x"}))
        do(current, "transcribe", transcribe)
        do(current, "segment", None)
        assert current_spans(current) == [("a.0", 1.0), ("b.0", 5.0)]
        texts = current.ledger.connection.sql("SELECT clip_id, text FROM current_texts ORDER BY ALL").fetchall()
        assert texts == [("a.0", "a"), ("b.0", "b")]


# --- no clip


def test_a_video_without_a_clip_says_why(tmp_path):
    root = tmp_path / "corpus"
    with session(root, None, SETTINGS, "test", create=True) as (current, _):
        ingest_sources(current, [write(tmp_path / "l.jsonl", [{"id": "a"}, {"id": "b"}, {"id": "c"}])])
        current.publish()
        do(current, "download", download({}, duration_s=1.0))
        current.publish()
        assert reasons(root) == {"a": "pending", "b": "pending", "c": "pending"}
        assert current.ledger.without_clips() == []
        do(current, "transcribe", transcribe)
        do(current, "segment", None)
        current.publish()
        (found,) = current.ledger.without_clips()
        assert found[:2] == ("too-short", 3) and "a: it has no words and lasts 1 s; segment.min_s is 2 s" in found[2]
        assert reasons(root) == dict.fromkeys("abc", "too-short")
        assert current.ledger.standing_failures() == []
    with duckdb.connect(str(root / "manifest.duckdb"), read_only=True) as connection:
        assert connection.sql("SELECT step, num_items, kept FROM funnel WHERE step LIKE 'no clip%'").fetchall() == [
            ("no clip: too-short", 3, 1.0)
        ]


def reasons(root) -> dict[str, str]:
    with duckdb.connect(str(root / "manifest.duckdb"), read_only=True) as connection:
        return dict(connection.sql("SELECT video_id, no_clip_reason FROM videos").fetchall())


@pytest.mark.parametrize(
    ("words", "duration_s", "options", "reason"),
    [
        ([], 1.0, {}, "too-short"),
        ([], 60.0, {"wordless": "skip"}, "no-words"),
        ([], None, {}, "unknown-duration"),
        ([Word("hi", 0.0, 0.5)], 1.0, {}, "too-short"),
        ([Word("hi", 0.0, 3.5)], 60.0, {"min_words": 3}, "too-few-words"),
        ([Word("hi", 8.0, 9.5)], 1.0, {}, "past-the-end"),
    ],
)
def test_every_way_to_no_spans_has_a_reason(words, duration_s, options, reason):
    settings = SegmentSettings(**options)
    segmented = segment_video("v", words, duration_s, None, None, settings)
    assert segmented.spans == []
    assert why_no_spans(segmented, words, duration_s, settings).error_class == reason


def test_shots_that_are_all_too_short_are_a_reason():
    settings = SegmentSettings(mode="shots")
    segmented = segment_video("v", [], 3.0, None, [(0.0, 1.0), (1.0, 2.0)], settings)
    assert why_no_spans(segmented, [], 3.0, settings).error_class == "short-shot"
