"""A build from URLs to shards on a real local Ray is complete and correct, and does each piece of work once."""

import io
import shutil
import sys
import tarfile

import pytest

from clipmill.base.errors import UserError
from clipmill.cli import app as cli
from tests.helpers.builds import (
    PLAIN,
    WORDLESS,
    ask,
    build_here,
    clipmill,
    hashes,
    snapshot,
    sound_sources,
    tables,
    write_list,
)

pytestmark = pytest.mark.slow

EXPECTED_FAILURES = {
    "not-found": "not-found",
    "html": "not-a-video",
    "empty": "empty-file",
    "audio-only": "no-video-stream",
}


def test_a_build_is_complete_and_its_failures_are_those_of_the_broken_links(built, world):
    corpus, report = built
    truth = world.truth
    working = {video_id for video_id, row in truth.items() if row["works"]}
    downloaded = {video_id for (video_id,) in ask(corpus, "SELECT video_id FROM videos WHERE path IS NOT NULL")}
    assert working <= downloaded
    failures = dict(ask(corpus, "SELECT item_id, error_class FROM failures WHERE stage = 'download'"))
    for video_id, row in truth.items():
        if row["broken"] in EXPECTED_FAILURES:
            assert failures[video_id] == EXPECTED_FAILURES[row["broken"]]
    assert set(failures) == {video_id for video_id, row in truth.items() if not row["works"]} - downloaded
    assert report.exit_code == 1
    counts = dict(ask(corpus, "SELECT step, num_items FROM funnel"))
    assert counts["clip"] == counts["span"] == counts["caption"] == counts["sample"] > 15


def test_the_copy_under_another_url_shares_one_video(built, world):
    corpus, _ = built
    copies = ask(corpus, "SELECT video_id, duplicate_of FROM videos WHERE duplicate_of IS NOT NULL")
    assert len(copies) == 1
    assert ask(corpus, f"SELECT count(*) FROM clips WHERE video_id = '{copies[0][0]}'") == [(0,)]


def test_clips_hold_the_words_spoken_in_them(built, world):
    corpus, _ = built
    spoken = ask(
        corpus,
        "SELECT c.video_id, c.start_s, c.end_s, c.text FROM clips c JOIN videos v USING (video_id) "
        "WHERE v.transcript_origin <> 'none' AND c.num_words > 5",
    )
    assert spoken
    for _video_id, start_s, end_s, text in spoken:
        rate = len(text.split()) / (end_s - start_s)
        assert 0.3 < rate < 6


def test_a_second_build_does_nothing_and_says_so(built, world):
    corpus, _ = built
    before = snapshot(corpus)
    result = clipmill("build", world.sources, "--corpus", corpus)
    assert "Nothing to do" in result.stdout and result.returncode == 0, result.stdout + result.stderr
    assert "failed in earlier runs" in result.stdout
    assert snapshot(corpus) == before


def test_shards_are_the_same_whatever_the_build_went_through(built, world, tmp_path, local_ray):
    corpus, _ = built
    torn = tmp_path / "corpus"
    shutil.copytree(corpus, torn, ignore=shutil.ignore_patterns(".clipmill"))
    next((torn / "fragments" / "clips").glob("*.parquet")).unlink()
    next((torn / "clips").glob("*.tar")).unlink()
    for path in list((torn / "shards").iterdir())[:2]:
        path.unlink()
    report = build_here(torn, [str(world.sources)], *PLAIN)
    assert report.engine.by_stage["cut"].done > 0
    assert hashes(torn / "shards") == hashes(corpus / "shards")
    assert tables(torn) == tables(corpus)


@pytest.fixture(scope="module")
def recaptioned(built, tmp_path_factory):
    """Return the corpus with captions and scores by the demo's models, and the report of that run."""
    corpus = tmp_path_factory.mktemp("recaptioned") / "corpus"
    shutil.copytree(built[0], corpus)
    waiting = clipmill("status", corpus, "--set", "caption.captioner=demo")
    assert "if set caption.captioner" in waiting.stdout
    return corpus, build_here(corpus, [], stages=["caption", "score"])


def test_a_new_captioner_recaptions_and_touches_nothing_else(built, recaptioned):
    corpus, report = recaptioned
    assert hashes(corpus / "shards") == hashes(built[0] / "shards")
    assert snapshot(corpus / "clips") == snapshot(built[0] / "clips")
    done = {stage: progress.done for stage, progress in report.engine.by_stage.items()}
    old, new = (dict(ask(root, "SELECT clip_id, caption FROM samples")) for root in (built[0], corpus))
    assert done == {"caption": len(old), "score": len(old)}
    assert report.pack.num_refreshed == len(hashes(corpus / "shards"))
    assert set(new) == set(old) and not set(new.values()) & set(old.values())
    kept = ask(corpus, "SELECT fingerprint, count(*), bool_and(current), bool_or(current) FROM captions GROUP BY 1")
    assert sorted(row[1:] for row in kept) == [(len(old), False, False), (len(old), True, True)]


def test_captions_say_true_things_about_the_scenes(recaptioned, world):
    corpus, _ = recaptioned
    truth, named, true = world.truth, 0, 0
    for video_id, frame_time_s, caption in ask(corpus, "SELECT video_id, frame_time_s, caption FROM catalog"):
        scenes = [s for s in truth[video_id]["scenes"] if s["start_s"] + 0.6 <= frame_time_s < s["end_s"]]
        for scene in scenes:
            for thing in scene["facts"]["objects"][:1]:
                named += 1
                true += thing["colour"] in caption and thing["shape"] in caption
    assert named > 10 and true / named > 0.8
    assert ask(corpus, "SELECT count(*) FROM catalog WHERE caption_similarity IS NULL") == [(0,)]


def test_appending_sources_does_only_the_new_ones(world, tmp_path, local_ray):
    working = sound_sources(world)
    first = write_list(tmp_path / "first.jsonl", working[:2])
    both = write_list(tmp_path / "both.jsonl", working[:3])
    corpus = tmp_path / "corpus"
    assert build_here(corpus, [str(first)], stages=WORDLESS).exit_code == 0
    report = build_here(corpus, [str(both)], stages=WORDLESS)
    assert (report.ingest.num_new, report.ingest.num_duplicates) == (1, 2)
    assert report.engine.by_stage["download"].done == report.engine.by_stage["cut"].done == 1
    fresh = tmp_path / "fresh"
    build_here(fresh, [str(both)], stages=WORDLESS)
    assert hashes(corpus / "shards") == hashes(fresh / "shards"), "history leaves no trace in the shards"


def test_verify_finds_nothing_and_then_a_flipped_byte(built, tmp_path):
    assert clipmill("verify", built[0]).returncode == 0
    corpus = tmp_path / "corpus"
    shutil.copytree(built[0], corpus)
    shard = next((corpus / "shards").glob("*.tar"))
    with tarfile.open(shard) as tar:
        member = next(m for m in tar if m.name.endswith(".mp4"))
    with open(shard, "r+b") as file:
        file.seek(member.offset_data + member.size // 2)
        byte = file.read(1)
        file.seek(-1, io.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    result = clipmill("verify", corpus, "--no-decode")
    assert result.returncode == 1 and "hash-mismatch" in result.stdout and member.name in result.stdout


def test_a_writer_shuts_out_a_second_one(built):
    from shards.corpus.folder import Corpus

    with Corpus(built[0]).writer():
        result = clipmill("build", "--corpus", built[0])
        assert result.returncode == 2 and "is being written by process" in result.stderr
        assert clipmill("sql", built[0], "SELECT 42 AS answer", "--format", "csv").stdout.split() == ["answer", "42"]


def test_users_mistakes_exit_with_2_and_say_what_is_allowed(built, tmp_path, monkeypatch, capsys):
    corpus = built[0]
    result = clipmill("build", "--corpus", corpus, "--recipe", "nosuch")
    assert result.returncode == 2 and "demo" in result.stderr and "Traceback" not in result.stderr
    ended_with: list[int] = []
    monkeypatch.setattr(cli, "_leave", ended_with.append)  # the rest is packed in this process
    for arguments, words in [
        (["build", "nowhere.txt", "--corpus", tmp_path / "c"], "nowhere.txt"),
        (["build", "--corpus", corpus, "--set", "cut.fpss=2"], "cut.fpss"),
        (["build", "--corpus", corpus, "--set", "cut.fps=-1"], "greater than 0"),
        (["run", "cutt", "--corpus", corpus], "download, transcribe"),
        (["run", "cut", "--corpus", tmp_path / "none"], "corpus.yaml"),
        (["run", "caption", "--corpus", corpus, "--where", "no_such_column = 1"], "no_such_column"),
        (["sql", corpus, "SELECT * FROM nowhere"], "nowhere"),
        (["sql", corpus, "CREATE TABLE x (a INT)"], ""),
        (["status", tmp_path / "none"], "corpus.yaml"),
    ]:
        monkeypatch.setattr(sys, "argv", ["clipmill", *map(str, arguments)])
        cli.main()
        said = capsys.readouterr()
        assert ended_with.pop() == 2, (arguments, said)
        assert words in said.err and "Traceback" not in said.err


def test_where_reruns_the_named_items_only(built, tmp_path, local_ray):
    corpus = tmp_path / "corpus"
    shutil.copytree(built[0], corpus)
    report = build_here(corpus, [], stages=["download"], recipe=None, where="error_class = 'not-found'")
    assert (report.engine.by_stage["download"].done, report.engine.by_stage["download"].failed) == (0, 1)
    attempts = ask(corpus, "SELECT attempts FROM failures WHERE error_class = 'not-found'")
    assert attempts == [(2,)]
    with pytest.raises(UserError):
        build_here(corpus, [], stages=["download"], recipe=None, where="error_klass = 1")
