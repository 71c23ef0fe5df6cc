"""`msrvtt:FOLDER` becomes shards on a local Ray: whole videos with a split and twenty texts each, selectable by SQL."""

import json
import shutil
import tarfile

import pytest

from clipmill.base.errors import UserError
from pipeline.engine.registry import stage_names
from tests.helpers import benchmarks
from tests.helpers.builds import ask, build_here, clipmill, snapshot
from tests.helpers.media import Shape, make_video, numbers_in

pytestmark = pytest.mark.slow

CAPTIONED = tuple(stage for stage in stage_names() if stage != "score")
PLAIN = "caption.captioner=tests.helpers.plain_captioner:Plain"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a small MSR-VTT: four training videos and two of 1k-A; two are equal, one is missing, one is not a video."""
    folder = benchmarks.msrvtt(tmp_path_factory.mktemp("msrvtt"), num_train=4, num_test=2)
    for i in (0, 3, 4):
        make_video(folder / "videos", Shape(f"video{i}.mp4", num_frames=60 + 15 * i, size=(160, 96)))
    shutil.copy(folder / "videos" / "video0.mp4", folder / "videos" / "video1.mp4")
    (folder / "videos" / "video2.mp4").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    (folder / "videos" / "video5.mp4").unlink()
    return folder


@pytest.fixture(scope="module")
def built(folder, local_ray, tmp_path_factory):
    corpus = tmp_path_factory.mktemp("benchmark") / "corpus"
    return corpus, build_here(corpus, [f"msrvtt:{folder}"], PLAIN, stages=CAPTIONED)


def test_every_video_that_is_one_becomes_one_whole_clip(built):
    corpus, report = built
    columns = "clip_id, split, span_start_s, span_end_s, num_frames, origin"
    assert ask(corpus, f"SELECT {columns} FROM catalog ORDER BY clip_id") == [
        ("video0.0", "train", 0.0, 2.0, 6, "given"),
        ("video1.0", "train", 0.0, 2.0, 6, "given"),
        ("video3.0", "train", 0.0, 3.5, 11, "given"),
        ("video4.0", "test", 0.0, 4.0, 12, "given"),
    ]
    assert report.ingest.splits == [("train", 4, 80, 0), ("test", 1, 1, 0)]


def test_what_is_missing_or_broken_is_a_row(built):
    corpus, report = built
    failures = ask(corpus, "SELECT stage, error_class FROM failures ORDER BY 1")
    assert failures == [("download", "not-a-video"), ("ingest", "missing-video")]
    assert report.exit_code == 1
    columns = "split, num_videos, num_clips, num_texts"
    assert ask(corpus, f"SELECT {columns} FROM splits") == [("test", 1, 1, 1), ("train", 4, 3, 60)]


def test_sql_gives_training_its_clips_with_their_texts(built):
    """These are the queries of docs/benchmarks.md."""
    corpus, _ = built
    rows = dict(ask(corpus, "SELECT clip_id, texts FROM catalog WHERE split = 'train' ORDER BY clip_id"))
    assert rows == {f"video{i}.0": [f"caption {k} of {i}" for k in range(20)] for i in (0, 1, 3)}
    pairs = ask(
        corpus,
        "SELECT t.clip_id, t.n, t.text FROM texts t JOIN videos v USING (video_id) WHERE v.split = 'test' "
        "ORDER BY t.clip_id, t.n",
    )
    assert pairs == [("video4.0", 0, "the one sentence, of 4")]


def test_a_sample_is_searched_by_its_first_text_and_carries_all(built):
    corpus, _ = built
    samples = {}
    for path in sorted((corpus / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            samples |= {member.name: tar.extractfile(member).read() for member in tar}
    assert samples["video3_0000.txt"] == b"caption 0 of 3"
    sample = json.loads(samples["video3_0000.json"])
    assert (sample["split"], sample["texts"]) == ("train", [f"caption {k} of 3" for k in range(20)])
    assert ask(corpus, "SELECT clip_id, subtitle FROM samples WHERE clip_id = 'video4.0'") == [
        ("video4.0", "the one sentence, of 4")
    ]
    assert numbers_in(samples["video0_0000.mp4"]) == [0, 10, 20, 30, 40, 50]


def test_building_again_does_nothing_and_another_protocol_is_refused(built, folder):
    corpus, _ = built
    before = snapshot(corpus)
    assert not build_here(corpus, [f"msrvtt:{folder}"], recipe=None, stages=CAPTIONED).did_something
    with pytest.raises(UserError, match="a corpus of its own"):
        build_here(corpus, [f"msrvtt-full:{folder}"], recipe=None)
    assert snapshot(corpus) == before


def test_a_video_that_comes_later_is_the_only_work(built, folder, tmp_path):
    corpus = shutil.copytree(built[0], tmp_path / "corpus")
    make_video(folder / "videos", Shape("video5.mp4", num_frames=45, size=(160, 96)))
    try:
        report = build_here(corpus, [f"msrvtt:{folder}"], recipe=None, stages=CAPTIONED)
    finally:
        (folder / "videos" / "video5.mp4").unlink()
    assert report.ingest.num_new == 1 and report.engine.by_stage["cut"].done == 1
    assert ask(corpus, "SELECT clip_id, text FROM texts WHERE video_id = 'video5'") == [
        ("video5.0", "the one sentence, of 5")
    ]
    assert ask(corpus, "SELECT error_class FROM failures WHERE stage = 'ingest'") == []


def test_the_command_says_what_it_read_and_what_is_wrong(folder, tmp_path):
    torn = shutil.copytree(folder, tmp_path / "torn")
    (torn / "MSRVTT_data.json").write_text('{"videos": [')
    result = clipmill("build", f"msrvtt:{torn}", "--corpus", tmp_path / "corpus", "--recipe", "demo")
    assert result.returncode == 2 and "MSRVTT_data.json:1: not JSON" in result.stderr
