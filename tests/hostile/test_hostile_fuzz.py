"""Mutated videos and subtitles give results or classified errors: a short seeded run of `bench.fuzz`."""

import random

import pytest

from bench import fuzz
from clipmill.base.errors import ItemError
from clipmill.media.probe import probe
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_video
from pipeline.stages.ingest.ingest import IngestSettings, read_sources
from pipeline.stages.transcribe.speech import extract_speech


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return fuzz.made_seeds(tmp_path_factory.mktemp("seeds"))


@pytest.mark.slow
def test_mutated_videos_and_subtitles_give_results_or_classed_errors(seeds):
    videos, subtitles = seeds
    tally = fuzz.fuzz(videos, subtitles, seed=7, numbers=iter(range(16)), limit_s=600)
    assert tally.findings == [] and tally.num_cases == 16
    classes = {outcome for _, outcome in tally.outcomes}
    assert "ok" in classes and len(classes) > 2, "too few failures to prove anything"


@pytest.mark.slow
def test_mutated_lists_give_rows_or_classed_errors(tmp_path):
    lists = fuzz.made_lists(tmp_path)
    tally = fuzz.fuzz([], [], seed=7, numbers=iter(range(24)), limit_s=600, lists=lists)
    assert tally.findings == [] and tally.num_cases == 24
    assert tally.outcomes["list", "ok"] > 8


@pytest.mark.parametrize("number", range(11))
def test_the_lists_to_mutate_are_read_without_a_problem(tmp_path, number):
    listed = read_sources([str(fuzz.made_lists(tmp_path)[number])], IngestSettings())
    assert {problem.error_class for problem in listed.problems} <= {"unread-spans"} and listed.table.num_rows >= 4


def test_sound_of_no_known_kind_costs_the_sound_alone(seeds, tmp_path):
    """`bench.fuzz --seed 2` found this case."""
    content = seeds[0][0].read_bytes()
    assert content.count(b"mp4a") == 1
    (tmp_path / "odd.mp4").write_bytes(content.replace(b"mp4a", b"zzzz").replace(b"esds", b"zzzz"))
    info = probe(tmp_path / "odd.mp4")
    assert (info.video_codec, info.audio_codec) == ("h264", None)
    with pytest.raises(ItemError, match="audio"):
        extract_speech(tmp_path / "odd.mp4")
    spans = [SpanRequest("v.0", 0, 0.0, 1.0)]
    (row,) = cut_video(tmp_path / "odd.mp4", spans, CutSettings(audio=True), tmp_path / "out").rows
    assert row["has_audio"] is False


def test_a_case_is_a_function_of_seed_and_number(seeds):
    data = seeds[0][0].read_bytes()
    assert fuzz.mutated(data, random.Random("1:5")) == fuzz.mutated(data, random.Random("1:5"))
    assert len({fuzz.mutated(data, random.Random(f"1:{n}")) for n in range(50)} - {data}) > 45


def test_an_unforeseen_exception_is_a_finding(seeds, monkeypatch):
    """A sandbox that only passes exceptions on would otherwise hide it."""
    monkeypatch.setattr(fuzz, "VIDEO_STEPS", {"cut": fuzz.mutated})  # called without its second argument
    tally = fuzz.fuzz(seeds[0][:1], [], seed=1, numbers=iter([0]), limit_s=600)
    assert len(tally.findings) == 1 and tally.findings[0].startswith("internal-error: cut --seed 1 --only 0")
