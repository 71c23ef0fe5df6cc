"""A rerun does pending work only: nothing twice, nothing omitted, and only what a change affects."""

import pytest

from clipmill.base.errors import ItemError
from shards.corpus.fragments import fragment_path
from shards.corpus.manifest import publish
from shards.query.sql import open_manifest
from tests.helpers.ledgers import STAGES, FragmentCorpus


@pytest.fixture
def corpus(tmp_path):
    corpus = FragmentCorpus(tmp_path)
    corpus.add_sources("a", "b", unit="u000000")
    corpus.add_sources("c", unit="u000001")
    return corpus


def test_everything_is_done_once_and_then_nothing_is_pending(corpus):
    assert corpus.work_off() == {"download": 3, "transcribe": 3, "segment": 3, "cut": 3, "caption": 6, "score": 6}
    assert corpus.work_off() == {}
    assert {stage: set(by) for stage, by in corpus.refresh_state().items()} == dict.fromkeys(STAGES, {"done"})


def test_new_sources_are_the_only_work(corpus):
    corpus.work_off()
    corpus.add_sources("d", unit="u000002")
    assert corpus.work_off() == {"download": 1, "transcribe": 1, "segment": 1, "cut": 1, "caption": 2, "score": 2}


def test_a_changed_captioner_redoes_captions_and_scores_alone(corpus):
    corpus.work_off()
    corpus.fingerprints["caption"] = "caption-2"
    counts = corpus.refresh_state()
    assert counts["caption"] == {"pending": 6} and counts["score"] == {"waiting": 6} and counts["cut"] == {"done": 3}
    assert corpus.work_off() == {"caption": 6, "score": 6}
    assert all(text.startswith("caption-2") for text in corpus.served_captions().values())
    kept = corpus.ledger.connection.execute("SELECT DISTINCT captioner FROM current_captions ORDER BY 1").fetchall()
    assert kept == [("caption-1",), ("caption-2",)], "the first captioner's texts stay to be queried"


def test_going_back_to_the_first_captioner_serves_its_captions_without_captioning(corpus):
    corpus.work_off()
    first = corpus.served_captions()
    corpus.fingerprints["caption"] = "caption-2"
    corpus.work_off()
    corpus.fingerprints["caption"] = "caption-1"
    assert corpus.work_off(("caption",)) == {}
    assert corpus.served_captions() == first


def test_a_stage_that_is_off_has_no_work_and_what_it_did_does_not_count(corpus):
    corpus.fingerprints["caption"] = None
    assert corpus.work_off() == {"download": 3, "transcribe": 3, "segment": 3, "cut": 3, "score": 6}
    corpus.fingerprints["caption"] = "caption-1"
    assert corpus.work_off() == {"caption": 6, "score": 6}
    corpus.fingerprints |= {"caption": None, "score": None}
    assert corpus.work_off() == {} and corpus.served_captions() == {}
    assert corpus.ledger.connection.execute("SELECT count(*) FROM current_scores").fetchall() == [(0,)]
    corpus.fingerprints |= {"caption": "caption-1", "score": "score-1"}
    assert corpus.work_off() == {} and len(corpus.served_captions()) == 6


def test_status_tells_before_any_work_what_depends_on_a_change(corpus):
    corpus.work_off()
    corpus.fingerprints["segment"] = "segment-2"
    counts = corpus.refresh_state()
    assert counts["segment"] == {"pending": 3}
    assert counts["cut"] == {"waiting": 3} and counts["caption"] == {"waiting": 6}
    assert counts["download"] == {"done": 3} and counts["transcribe"] == {"done": 3}


def test_work_that_comes_out_the_same_stops_the_wave(corpus):
    corpus.work_off()
    corpus.fingerprints["segment"] = "segment-2"
    assert corpus.work_off() == {"segment": 3}, "the spans did not move, so nothing is cut again"


def test_moved_spans_cut_only_that_video_again(corpus):
    corpus.work_off()
    corpus.fingerprints["segment"], corpus.spans_of["b"] = "segment-2", [(0.0, 10.0), (12.0, 20.0)]
    done = corpus.work_off()
    assert done == {"segment": 3, "cut": 1, "caption": 1, "score": 1}
    clips = corpus.ledger.connection.execute(
        "SELECT span_start_s FROM current_clips WHERE video_id = 'b' ORDER BY 1"
    ).fetchall()
    assert clips == [(0.0,), (12.0,)], "the clip of the old span is removed"


def test_a_deleted_fragment_is_made_again(corpus):
    corpus.work_off()
    lost = next((corpus.root / "fragments" / "clips").glob("cut-u000000-*"))
    content = lost.read_bytes()
    lost.unlink()
    corpus.reopen()
    assert corpus.work_off() == {"cut": 2}
    assert lost.read_bytes() == content, "the same work lands in the same place with the same bytes"


def test_a_torn_ledger_fragment_never_happened(corpus):
    corpus.work_off()
    torn = next((corpus.root / "fragments" / "ledger").glob("transcribe-u000001-*"))
    torn.write_bytes(torn.read_bytes()[:100])
    corpus.reopen()
    assert corpus.synchronised == (0, 1)
    assert corpus.work_off() == {"transcribe": 1}


def test_a_torn_record_of_a_run_is_left_out(corpus):
    folder = corpus.root / "fragments" / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "20261121T150706-1.parquet").write_bytes(b"PAR1 and no more")
    (folder / "20261121T150707-1.parquet").write_bytes(b"")
    corpus.refresh_state()
    publish(corpus.ledger)
    with open_manifest(corpus.root) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (0,)


def test_fragments_without_their_ledger_are_not_counted(corpus):
    corpus.work_off(("download", "transcribe", "segment"))
    name = next((corpus.root / "fragments" / "ledger").glob("segment-u000001-*")).stem
    fragment_path(corpus.root, "ledger", name).unlink()
    corpus.reopen()
    assert corpus.refresh_state()["segment"] == {"done": 2, "pending": 1}


def test_the_working_database_is_only_a_cache(corpus):
    corpus.work_off()
    before = corpus.served_captions()
    corpus.ledger.close()
    (corpus.root / ".clipmill" / "ledger.duckdb").write_bytes(b"torn")
    corpus.open()
    assert corpus.work_off() == {} and corpus.served_captions() == before


def test_a_permanent_failure_is_not_tried_again_and_blocks_no_other_item(corpus):
    corpus.fail["download:b"] = ItemError("not-found", "404")
    done = corpus.work_off()
    assert done["download"] == 3 and done["cut"] == 2
    assert corpus.work_off() == {}
    assert corpus.refresh_state()["download"] == {"done": 2, "failed": 1}
    assert corpus.ledger.standing_failures() == [("download", "not-found", 1, "b: 404")]


def test_a_transient_failure_is_tried_once_a_run_and_three_times_in_all(corpus):
    corpus.fail["download:b"] = ItemError("timeout", "slow", transient=True)
    corpus.work_off()
    assert corpus.refresh_state("next")["download"] == {"done": 2, "retry": 1}
    assert corpus.work_off() == {"download": 1}
    assert corpus.work_off() == {"download": 1}
    assert corpus.work_off() == {}, "three attempts over all runs, then it stands"
    attempts = corpus.ledger.connection.execute("SELECT max(attempts) FROM ledger WHERE item_id = 'b'").fetchall()[0]
    assert attempts == (3,)
    assert corpus.refresh_state()["download"] == {"done": 2, "quarantined": 1}


def test_a_failure_may_be_given_one_more_attempt_in_its_run_and_no_more_than_there_are(corpus):
    corpus.fail["download:b"] = ItemError("worker-died", "again and again", transient=True)
    corpus.work_off()
    assert corpus.refresh_state()["download"] == {"done": 2, "failed": 1}
    corpus.ledger.try_again([("download", "b", 1)])
    assert corpus.refresh_state()["download"] == {"done": 2, "retry": 1}
    corpus._do("download", corpus.ledger.work("download"))
    assert corpus.refresh_state()["download"] == {"done": 2, "failed": 1}, "its attempt is used up"
    corpus.work_off()
    corpus.ledger.try_again([("download", "b", 3)])
    assert corpus.refresh_state()["download"] == {"done": 2, "quarantined": 1}


def test_a_later_success_removes_the_failure(corpus):
    corpus.fail["download:b"] = ItemError("timeout", "slow", transient=True)
    corpus.work_off()
    corpus.fail.clear()
    assert corpus.work_off()["download"] == 1
    corpus.refresh_state()
    assert corpus.ledger.standing_failures() == []


def test_forced_items_are_done_once_more_in_this_run_only(corpus):
    corpus.fail["download:b"] = ItemError("not-found", "404")
    corpus.work_off()
    corpus.fail.clear()
    corpus.ledger.mark_pending("download", ["b"])
    assert corpus.work_off() == {"download": 1, "transcribe": 1, "segment": 1, "cut": 1, "caption": 2, "score": 2}
    corpus.reopen()
    assert corpus.work_off() == {}


def test_two_urls_with_the_same_bytes_share_one_video(corpus):
    corpus.bytes_of.update(a="film", c="film")
    assert corpus.work_off()["transcribe"] == 2
    rows = corpus.ledger.connection.execute("SELECT video_id, duplicate_of FROM current_videos ORDER BY 1").fetchall()
    assert rows == [("a", None), ("b", None), ("c", "a")]


def test_units_looked_at_alone_give_the_same_answer_as_all(corpus):
    corpus.work_off(("download", "transcribe"))
    every = corpus.refresh_state()["segment"]
    parts = [corpus.refresh_state(units=[unit])["segment"]["pending"] for unit in ("u000000", "u000001")]
    assert parts == [2, 1] and every == {"pending": 3}
