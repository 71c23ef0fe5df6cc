"""Mutated videos and subtitles give results or classified errors: a short seeded run of `bench.fuzz`."""

import random

import pytest

from bench import fuzz, fuzz_answers
from clipmill.base.errors import ItemError
from clipmill.media.probe import probe
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_video
from pipeline.stages.download.fetch import DownloadSettings, fetch
from pipeline.stages.ingest.ingest import IngestSettings, read_sources
from pipeline.stages.transcribe.speech import extract_speech
from tests.helpers.http import http_answer, scripted_server


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


def test_mutated_answers_of_servers_give_files_or_classed_errors(monkeypatch):
    monkeypatch.setattr(fuzz_answers, "LIMIT_S", float("inf"))  # the machine may be slow
    tally = fuzz.Tally()
    fuzz_answers.fuzz_answers(7, iter(range(24)), tally)
    assert tally.findings == [] and tally.num_cases == 24
    assert ("answers", "ok") in tally.outcomes and len(tally.outcomes) > 4, "too few failures to prove anything"


def test_an_unforeseen_exception_in_a_download_is_a_finding(monkeypatch):
    monkeypatch.setattr(fuzz_answers, "fetch", lambda *args, **options: 1 / 0)
    tally = fuzz.Tally()
    fuzz_answers.fuzz_answers(1, iter([0]), tally)
    assert tally.findings == ["--target answers --seed 1 --only 0: FINDING: ZeroDivisionError: division by zero"]


def test_a_length_in_letters_is_an_error_of_the_site(tmp_path):
    """`bench.fuzz --target answers --seed 1` found this case: yt-dlp reads the length of a segment unchecked."""
    segment = http_answer("200 OK", bytes(5000), Content_Length="letters")
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/s.ts\n#EXT-X-ENDLIST\n"

    def answer(target, _asked, send):
        send(segment if target == "/s.ts" else http_answer("200 OK", playlist, Content_Type="application/x-mpegurl"))

    settings = DownloadSettings(allow_private_addresses=True, retries=0)
    with scripted_server(answer) as server, pytest.raises(ItemError) as caught:
        fetch({"video_id": "v", "url": server.url("/v.m3u8"), "kind": "url"}, tmp_path / "sources", settings)
    assert caught.value.error_class == "extractor" and caught.value.transient
