"""Bad lists, files and disks each cost a message and a row, and the rest of the corpus is complete."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from clipmill.base.errors import UserError
from shards.corpus.folder import Corpus
from tests.helpers.builds import PLAIN, SMALL, WORDLESS, ask, build_here, clipmill, sound_sources, write_list

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def good(world) -> Path:
    """Return a sound video with its truth."""
    row = next(row for row in world.truth.values() if row["works"] and row["broken"] is None and row["subtitle"])
    return world.folder / row["file"]


def test_bad_lines_of_a_list_are_rows_and_the_rest_is_built(good, tmp_path, local_ray):
    other = shutil.copy(good, tmp_path / f"other{good.suffix}")
    lines = [
        json.dumps({"url": str(good), "id": "fine"}),
        "{not json",
        json.dumps({"title": "no url"}),
        json.dumps({"url": "ftp://example.invalid/x.mp4", "id": "ftp"}),
        json.dumps({"url": str(other), "id": "../../etc/passwd"}),
        json.dumps({"url": "http://127.0.0.1:9/other.mp4", "id": "fine"}),
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines) + "\n")
    report = build_here(tmp_path / "corpus", [str(tmp_path / "list.jsonl")], stages=WORDLESS)
    assert report.exit_code == 1
    classes = [error for (error,) in ask(tmp_path / "corpus", "SELECT error_class FROM failures ORDER BY 1")]
    assert {"bad-line", "missing-url", "duplicate-id"} <= set(classes)
    assert ("fine",) in ask(tmp_path / "corpus", "SELECT video_id FROM videos WHERE path IS NOT NULL")
    assert ask(tmp_path / "corpus", "SELECT count(*) > 0 FROM samples") == [(True,)]
    outside = [p for p in tmp_path.rglob("passwd*")]
    assert outside == [], "an id never becomes a path"
    ids = ask(tmp_path / "corpus", "SELECT video_id, source_id FROM videos WHERE source_id LIKE '..%'")
    assert len(ids) == 1 and "/" not in ids[0][0]


def test_a_mended_list_has_no_problems_any_more(good, tmp_path, local_ray):
    listed = tmp_path / "list.jsonl"
    listed.write_text(json.dumps({"url": str(good), "id": "fine"}) + "\n{not json\n")
    assert build_here(tmp_path / "corpus", [str(listed)], stages=WORDLESS).exit_code == 1
    listed.write_text(json.dumps({"url": str(good), "id": "fine"}) + "\n")
    assert build_here(tmp_path / "corpus", [str(listed)], stages=WORDLESS).exit_code == 0


def test_given_spans_are_cut_as_given_and_one_past_the_end_is_a_row(good, tmp_path, local_ray):
    clips = [
        {"clip_id": "film.4.mp4", "span": ["00:00:02.500", "00:00:06.000"]},
        {"clip_id": "film.7.mp4", "span": ["00:00:06.000", "00:00:10.250"]},
        {"clip_id": "film.9.mp4", "span": ["01:00:00.000", "01:00:05.000"]},
    ]
    listed = write_list(tmp_path / "hdvila.jsonl", [{"video_id": "film", "url": str(good), "clip": clips}])
    report = build_here(tmp_path / "corpus", [str(listed)], stages=WORDLESS)
    assert report.exit_code == 1
    spans = ask(tmp_path / "corpus", "SELECT clip_id, span_start_s, span_end_s FROM clips ORDER BY n")
    assert spans == [("film.4", 2.5, 6.0), ("film.7", 6.0, 10.25)]
    assert ask(tmp_path / "corpus", "SELECT stage, item_id, error_class FROM failures") == [
        ("cut", "film.9", "span-past-end")
    ]


def test_unreadable_subtitles_cost_the_words_and_not_the_video(good, tmp_path, local_ray):
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(good, folder / f"a{good.suffix}")
    (folder / "a.vtt").write_bytes(b"<html>404</html>")
    report = build_here(tmp_path / "corpus", [str(folder)], stages=WORDLESS)
    assert ask(tmp_path / "corpus", "SELECT count(*) > 0, max(num_words) FROM clips") == [(True, 0)]
    failed = ask(tmp_path / "corpus", "SELECT stage, error_class FROM failures")
    assert failed == [("download", "bad-subtitle")] and report.exit_code == 1


def test_a_model_that_is_not_there_fails_its_stage_and_nothing_else(good, tmp_path, local_ray):
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"no weights at all")
    scorer = ("score.model=ViT-B-32", f"score.pretrained={weights}")
    report = build_here(tmp_path / "corpus", [str(good)], *PLAIN, *scorer)
    assert report.exit_code == 1
    assert ask(tmp_path / "corpus", "SELECT DISTINCT stage, error_class FROM failures") == [
        ("score", "model-unavailable")
    ]
    assert ask(tmp_path / "corpus", "SELECT count(*) = count(caption) AND count(*) > 0 FROM samples") == [(True,)]


def test_sources_can_be_deleted_after_cutting_and_are_fetched_again_when_needed(world, tmp_path, local_ray):
    working = sound_sources(world)
    listed, corpus = write_list(tmp_path / "list.jsonl", working[:1]), tmp_path / "corpus"
    assert build_here(corpus, [str(listed)], "download.keep_sources=false", stages=WORDLESS).exit_code == 0
    video = f"sources/*/{working[0]['id']}.*"
    assert not [path for path in corpus.glob(video) if path.suffix not in (".vtt", ".srt", ".json3")]
    assert not build_here(corpus, [], recipe=None, stages=WORDLESS).did_something
    report = build_here(corpus, [], "cut.fps=2", stages=WORDLESS, recipe=None)
    assert report.exit_code == 0 and report.engine.by_stage["cut"].done == 1
    assert ask(corpus, "SELECT DISTINCT fps FROM clips") == [(2.0,)]


def test_a_mistake_that_only_a_worker_can_see_ends_the_run_as_a_mistake(footage, tmp_path, local_ray):
    with pytest.raises(UserError, match="transcribe.whisper"):
        build_here(
            tmp_path / "corpus",
            [str(footage / "nasa_13013.mp4")],
            "transcribe.min_words=1000",  # the video has a subtitle track
            "transcribe.whisper=enormous",
            stages=WORDLESS,
        )


def test_a_corpus_that_cannot_be_written_is_a_clear_message(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("not a folder")
    result = clipmill("build", "http://127.0.0.1:9/x.mp4", "--corpus", folder / "corpus")
    assert result.returncode == 2 and "cannot be written" in result.stderr


def test_a_corpus_that_was_begun_on_a_full_disk_is_a_corpus(tmp_path):
    """A build stopped before its settings were saved is completed by the same command."""
    (tmp_path / "corpus" / ".clipmill").mkdir(parents=True)
    (tmp_path / "corpus" / "fragments").mkdir()
    Corpus(tmp_path / "corpus").create()
    assert (tmp_path / "corpus" / "shards").is_dir()


def test_a_folder_that_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = clipmill("build", "http://127.0.0.1:9/x.mp4", "--corpus", tmp_path)
    assert result.returncode == 2 and "not empty and not a corpus" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_newer_corpus_is_refused(tmp_path):
    corpus = tmp_path / "corpus"
    Corpus(corpus).create()
    Corpus(corpus).save_settings({})
    text = (corpus / "corpus.yaml").read_text()
    (corpus / "corpus.yaml").write_text(text.replace("format: 1", "format: 99"))
    result = clipmill("status", corpus)
    assert result.returncode == 2 and "format 99" in result.stderr


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small file system can be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_a_build_cleanly_and_the_command_resumes(world, small_disk, tmp_path, local_ray, monkeypatch):
    corpus, listed = small_disk / "corpus", write_list(tmp_path / "list.jsonl", sound_sources(world)[:2])
    settings = ["engine.cpus=2", *PLAIN]
    words = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    monkeypatch.setenv("RAY_ADDRESS", local_ray.get_runtime_context().gcs_address)
    result = clipmill("build", listed, "--corpus", corpus, "--recipe", "demo", *words)
    assert result.returncode in (1, 3) and "Traceback" not in result.stderr, result.stdout + result.stderr
    assert "No space left" in result.stderr + result.stdout or "disk-full" in result.stdout
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    assert build_here(corpus, [str(listed)], *settings).exit_code == 0
    assert ask(corpus, "SELECT count(*) FROM failures") == [(0,)]
    assert ask(corpus, "SELECT count(*) > 0, count(*) = count(caption) FROM samples") == [(True, True)]
