"""The hash in a row is that of the bytes that a stage read, also when a file is replaced between or during stages."""

import hashlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from clipmill.base.errors import ItemError
from pipeline.engine import registry
from pipeline.engine.build import session
from pipeline.runtime.source_file import file_stamp, unchanged
from pipeline.runtime.task import execute
from pipeline.stages.ingest.stage import ingest_sources
from tests.helpers.builds import write_list
from tests.helpers.media import SHORT_GOP, Shape, make_video

SETTINGS = ["transcribe.whisper=null", "segment.wordless=fixed", "cut.short_side=96", "caption.captioner=null"]
SETTINGS += ["score.model=null", "segment.min_s=0.5", "segment.target_s=1", "segment.max_s=2"]
WORDS = "WEBVTT\n\n00:00.000 --> 00:02.000\n{}\n"


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[bytes]:
    """Two videos of one length in bytes that show different frames."""
    folder = tmp_path_factory.mktemp("videos")
    made = [
        make_video(folder, Shape(f"{n}.mp4", num_frames=60, size=size, options=dict(SHORT_GOP))).read_bytes()
        for n, size in enumerate([(320, 180), (160, 90)])
    ]
    return [data + bytes(max(map(len, made)) - len(data)) for data in made]


class Stages:
    """Run stages on a corpus in this process, each with the sources that the driver would download again."""

    def __init__(self, current):
        self.current = current
        self.engine = current.engine([stage.name for stage in registry.stages()])

    def run(self, name: str) -> dict[str, list[tuple]]:
        """Run one stage on its pending items; return its failures as (item, class)."""
        self.engine.refresh_state()
        if self.engine._fetch_lost_sources():
            self.engine.refresh_state()
        return self._work(name)

    def only(self, name: str) -> list[tuple[str, str]]:
        """Run one stage as `clipmill run STAGE` does, without downloads."""
        self.engine.refresh_state()
        return self._work(name)

    def _work(self, name: str) -> list[tuple[str, str]]:
        ledger, stage = self.current.ledger, next(s for s in self.engine.stages if s.name == name)
        items = ledger.work(name)
        if items:
            task = self.engine._task(stage, ledger.unit_of_work(name)[items[0]["item_id"]], items)
            ledger.load([execute(stage.run, task).name])
        self.engine.refresh_state()
        return [(error_class, count) for s, error_class, count, _ in ledger.standing_failures() if s == name]

    def rows(self, sql: str) -> list[tuple]:
        return self.current.ledger.connection.execute(sql).fetchall()

    def hashes(self, table: str) -> set[str]:
        return {sha for (sha,) in self.rows(f"SELECT source_sha256 FROM {table}")}


@contextmanager
def corpus_of(tmp_path: Path, *settings: str, run: str = "first", **columns):
    sources = write_list(tmp_path / "list.jsonl", [{"id": "v", "url": str(tmp_path / "v.mp4"), **columns}])
    with session(tmp_path / "corpus", None, [*SETTINGS, *settings], "test", create=True) as (current, _):
        current.run_id = run
        ingest_sources(current, [str(sources)])
        yield Stages(current)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def replace_unseen(path: Path, data: bytes) -> None:
    """Replace a file by another of the same size and modification time."""
    before = path.stat()
    assert len(data) == before.st_size
    beside = path.with_name("beside")
    beside.write_bytes(data)
    os.utime(beside, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(beside, path)


@pytest.mark.parametrize("stage", ["segment", "cut"])
def test_a_file_replaced_between_stages_is_not_cut_under_the_old_hash(tmp_path, videos, stage):
    path = tmp_path / "v.mp4"
    path.write_bytes(videos[0])
    with corpus_of(tmp_path) as first:
        for name in ["download", "transcribe", *(["segment"] if stage == "cut" else [])]:
            assert first.run(name) == []
    replace_unseen(path, videos[1])
    with corpus_of(tmp_path, run="alone") as alone:
        if stage == "segment":
            alone.only("segment")  # without shots it reads no picture
        assert alone.only("cut") == [("source-changed", 1)]
        assert alone.rows("SELECT * FROM clips") == []
    with corpus_of(tmp_path, run="build") as build:
        for name in ("download", "transcribe", "segment", "cut"):
            assert build.run(name) == []
        assert build.hashes("current_clips") == build.hashes("current_spans") == {sha(videos[1])}
        assert build.rows("SELECT DISTINCT width, height FROM current_clips") == [(160, 90)]


def test_a_copy_that_was_replaced_in_the_corpus_is_made_again(tmp_path, videos):
    (tmp_path / "v.mp4").write_bytes(videos[0])
    settings = ["download.reference_local_files=false"]
    with corpus_of(tmp_path, *settings) as first:
        for name in ("download", "transcribe", "segment"):
            assert first.run(name) == []
    [copy] = (tmp_path / "corpus" / "sources").rglob("v.mp4")
    replace_unseen(copy, videos[1])
    with corpus_of(tmp_path, *settings, run="build") as build:
        assert build.run("cut") == [("source-changed", 1)]
        assert build.run("download") == [] and copy.read_bytes() == videos[0]
        assert build.run("cut") == [], "the same run tries it again"
        assert build.hashes("current_clips") == {sha(videos[0])}


def test_a_file_that_was_only_touched_or_copied_is_read(tmp_path, videos, monkeypatch):
    path = tmp_path / "v.mp4"
    path.write_bytes(videos[0])
    with corpus_of(tmp_path, "download.reference_local_files=false") as first:
        for name in ("download", "transcribe", "segment"):
            first.run(name)
        [copy] = (tmp_path / "corpus" / "sources").rglob("v.mp4")
        os.utime(copy)
        assert first.run("cut") == [] and first.hashes("current_clips") == {sha(videos[0])}
    shutil.copytree(tmp_path / "corpus", tmp_path / "moved", copy_function=shutil.copy)  # with new times
    with session(tmp_path / "moved", None, ["cut.fps=2"], "test", create=False) as (current, _):
        moved = Stages(current)
        assert moved.run("cut") == [] and moved.hashes("current_clips") == {sha(videos[0])}


def test_a_file_with_its_stamp_is_not_hashed(tmp_path, monkeypatch):
    path = tmp_path / "v"
    path.write_bytes(b"abc")
    monkeypatch.setattr("pipeline.runtime.source_file._hash_of", lambda path: pytest.fail("it was hashed"))
    with unchanged(path, sha(b"abc"), file_stamp(path)):
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_that_is_replaced_while_it_is_read(tmp_path, fails):
    path = tmp_path / "v"
    path.write_bytes(b"abc")
    with pytest.raises(ItemError) as caught, unchanged(path, sha(b"abc"), file_stamp(path)):
        replace_unseen(path, b"xyz")
        if fails:
            raise ItemError("undecodable", "half of one file and half of another")
    assert (caught.value.error_class, caught.value.transient) == ("source-changed", True)


def test_a_subtitle_that_was_replaced_is_read_under_its_own_hash(tmp_path, videos):
    (tmp_path / "v.mp4").write_bytes(videos[0])
    words = tmp_path / "v.en.vtt"
    words.write_text(WORDS.format("the old words"))
    with corpus_of(tmp_path) as first:
        first.run("download")
    words.write_text(WORDS.format("the new words"))
    with corpus_of(tmp_path, run="build") as build:
        assert build.run("transcribe") == [("source-changed", 1)]
        assert build.run("download") == [] and build.run("transcribe") == []
        [(read, kept)] = build.rows(
            "SELECT t.words, v.subtitles[1].sha256 FROM current_transcripts t JOIN current_videos v USING (video_id)"
        )
        assert [word["text"] for word in read] == ["the", "new", "words"] and kept == sha(words.read_bytes())


def test_words_of_older_bytes_are_not_given_the_hash_of_newer_ones(tmp_path, videos):
    """A new version of a file cannot be transcribed; its spans are made from the old words, and say so."""
    path, words = tmp_path / "v.mp4", tmp_path / "v.en.vtt"
    path.write_bytes(videos[0])
    words.write_text(WORDS.format("they are spoken in the first version"))
    speech = ["segment.mode=sentences", "segment.min_words=1"]
    with corpus_of(tmp_path, *speech) as first:
        for name in ("download", "transcribe", "segment", "cut"):
            assert first.run(name) == []
        assert first.hashes("current_sentences") == {sha(videos[0])}
    path.write_bytes(videos[1])
    with corpus_of(tmp_path, *speech, "cut.fps=2", run="build") as build:
        build.run("download")
        build.run("segment")  # before the words of the new bytes are known
        assert build.hashes("current_sentences") == {sha(videos[0])}
        assert build.hashes("current_clips") == {sha(videos[0])}, "the old clips keep their words until they are new"
        build.run("cut")
        assert build.rows("SELECT * FROM current_clips") == [], "no words of other bytes are served with a clip"
        for name in ("transcribe", "segment", "cut"):
            assert build.run(name) == []
        assert build.hashes("current_sentences") == build.hashes("current_clips") == {sha(videos[1])}
