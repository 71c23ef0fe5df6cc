"""A build of real videos, by folder and by URL, with three broken ones among them, is complete and correct."""

import shutil

import pytest

from pipeline.demo.server import serve
from tests.helpers.builds import WORDLESS, ask, build_here, clipmill, hashes, write_list
from tests.stages.test_transcribe_whisper import weights  # noqa: F401  (a fixture: Whisper with random weights)

pytestmark = pytest.mark.slow

BROKEN = {"empty.mp4": b"", "page.mp4": b"<!DOCTYPE html><html>no video</html>", "noise.mkv": bytes(range(256)) * 40}
TOO_SHORT = {"tc_h264_10bits.mp4", "tc_h265_video.mp4"}  # one second: below segment.min_s


@pytest.fixture(scope="module")
def shelf(footage, tmp_path_factory):
    """Put the footage and three broken files in a folder, and list the same files as URLs."""
    folder = tmp_path_factory.mktemp("shelf")
    for path in footage.iterdir():
        if path.suffix in (".mp4", ".webm", ".mkv"):
            shutil.copy(path, folder)
    for name, content in BROKEN.items():
        (folder / name).write_bytes(content)
    with serve(folder) as base_url:
        urls = [{"url": f"{base_url}/{path.name}"} for path in sorted(folder.iterdir())]
        yield folder, write_list(folder.parent / f"{folder.name}.jsonl", urls)


def test_folder_and_urls_share_videos_and_everything_real_is_cut(shelf, tmp_path, local_ray):
    folder, urls = shelf
    corpus = tmp_path / "corpus"
    report = build_here(corpus, [str(folder), str(urls)], stages=WORDLESS)
    videos = ask(corpus, "SELECT count(*), count(path), count(duplicate_of) FROM videos")[0]
    num_real = len(list(folder.iterdir())) - len(BROKEN)
    assert videos == (2 * (num_real + len(BROKEN)), 2 * num_real, num_real), "each file is listed by path and by URL"
    classes = dict(ask(corpus, "SELECT error_class, count(*) FROM failures GROUP BY 1"))
    assert classes == {"empty-file": 2, "not-a-video": 4} and report.exit_code == 1
    uncut = ask(
        corpus,
        "SELECT url FROM videos WHERE duplicate_of IS NULL AND path IS NOT NULL "
        "AND video_id NOT IN (SELECT video_id FROM clips)",
    )
    assert {url.rpartition("/")[2] for (url,) in uncut} == TOO_SHORT
    assert clipmill("verify", corpus).returncode == 0
    wrong = ask(
        corpus,
        "SELECT clip_id FROM clips "
        "WHERE abs(start_s - span_start_s) > 0.05 OR num_frames < 3 OR end_s > span_end_s + 0.05",
    )
    assert wrong == []
    sizes = ask(corpus, "SELECT DISTINCT width % 2, height % 2 FROM clips")
    assert sizes == [(0, 0)]
    again = build_here(corpus, [str(folder), str(urls)], stages=WORDLESS)
    assert not again.did_something
    before = hashes(corpus / "shards")
    next((corpus / "fragments" / "spans").glob("*.parquet")).unlink()
    build_here(corpus, [], recipe=None, stages=WORDLESS)
    assert hashes(corpus / "shards") == before


def test_speech_without_subtitles_goes_through_whisper(footage, weights, tmp_path, local_ray):  # noqa: F811
    corpus = tmp_path / "corpus"
    quick = ["transcribe.whisper_temperatures=[0.0]", "transcribe.whisper_beam_size=1"]
    quick.append("transcribe.min_words=1000")  # the video has a subtitle track
    build_here(corpus, [str(footage / "nasa_13013.mp4")], f"transcribe.whisper={weights}", *quick, stages=WORDLESS)
    rows = ask(corpus, "SELECT transcript_origin, word_times, language IS NOT NULL FROM videos")
    assert rows == [("whisper", "asr", True)]
    assert ask(corpus, "SELECT count(*) > 0 FROM samples") == [(True,)]
