"""Work whose worker dies is retried, at last after all other work; an item that kills every worker fails.

The engine runs with functions as workers, without Ray or media.
"""

from collections import Counter

import pytest

from clipmill.base.errors import ItemError
from pipeline.engine import driver as engines
from pipeline.engine.driver import MAX_LOST, MAX_WORKER_FAILURES, Engine
from pipeline.engine.pools import WorkerFailure
from pipeline.engine.settings import CorpusSettings
from pipeline.runtime.task import commit
from shards.corpus.folder import Corpus
from tests.helpers.ledgers import STAGES, FragmentCorpus


class Workers:
    """Run one task at a time.

    deaths  number of workers that an item kills before one survives it
    lost    number of times that this process's node is lost after an item's task was sent
    """

    active_units = 8
    num_free_sources = 8
    cut_off = False

    def __init__(self, corpus: FragmentCorpus, deaths: Counter):
        self.corpus, self.deaths, self.tried, self.lost = corpus, deaths, Counter(), Counter()

    def warm_up(self, models: list) -> None: ...

    def close(self) -> None: ...

    def leave(self) -> None:
        self.cut_off = False

    def turns(self, flights: list) -> list[float]:
        return [0.0] * len(flights)

    def has_room(self, pool: str) -> bool:
        return True

    def start(self, flight) -> int:
        return id(flight)

    def wait(self, references: list) -> list:
        return references

    def result(self, reference, flight):
        work = flight.task
        for item in work.items:
            if self.lost[item["item_id"]] > 0:
                self.lost[item["item_id"]] -= 1
                self.cut_off = True
                return WorkerFailure("its node is dead", lost=True)
        self.tried.update(item["item_id"] for item in work.items)
        killers = [item["item_id"] for item in work.items if self.deaths[f"{work.stage}:{item['item_id']}"] > 0]
        if killers:
            self.deaths[f"{work.stage}:{killers[0]}"] -= 1
            return WorkerFailure(f"killed by {killers[0]}")
        return commit(work, [self.corpus._outcome(work.stage, item) for item in work.items], [])


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    corpus = FragmentCorpus(tmp_path)
    corpus.add_sources("a", "b")
    monkeypatch.setattr(engines, "fingerprints", lambda settings: corpus.fingerprints)
    return corpus


def run(corpus: FragmentCorpus, monkeypatch, name: str = "run", lost: dict[str, int] | None = None, **deaths: int):
    """Run every stage once; return (the engine's report, its workers)."""
    workers = Workers(corpus, Counter({item.replace("_", ":", 1): count for item, count in deaths.items()}))
    workers.lost.update(lost or {})
    monkeypatch.setattr(engines, "Pools", lambda settings: workers)
    engine = Engine(Corpus(corpus.root), CorpusSettings(), corpus.ledger, name, STAGES)
    engine.refresh_state()
    report = engine.run(lambda engine: None)
    engine.refresh_state()
    return report, workers


def test_an_item_whose_workers_died_too_often_is_done_in_the_last_round(corpus, monkeypatch):
    report, _ = run(corpus, monkeypatch, **{"caption_a.0": MAX_WORKER_FAILURES + 1})
    assert corpus.ledger.counts()["caption"] == {"done": 4} and corpus.ledger.counts()["score"] == {"done": 4}
    assert corpus.ledger.standing_failures() == []
    assert report.num_failed == 0 and report.by_stage["caption"].failed == 0


def test_an_item_that_kills_every_worker_fails_alone(corpus, monkeypatch):
    _, workers = run(corpus, monkeypatch, **{"caption_a.0": 1000})
    assert corpus.ledger.counts()["caption"] == {"done": 3, "failed": 1}
    assert workers.tried["a.0"] <= 2 * MAX_WORKER_FAILURES + 2  # … and its score, without a caption
    assert [row[:3] for row in corpus.ledger.standing_failures()] == [("caption", "worker-died", 1)]
    run(corpus, monkeypatch, name="next", **{"caption_a.0": 1000})
    assert corpus.ledger.counts()["caption"] == {"done": 3, "quarantined": 1}
    _, workers = run(corpus, monkeypatch, name="last", **{"caption_a.0": 1000})
    assert not workers.tried


def test_other_failures_are_not_tried_again_in_their_run(corpus, monkeypatch):
    corpus.fail["download:b"] = ItemError("timeout", "slow", transient=True)
    _, workers = run(corpus, monkeypatch, **{"caption_a.0": MAX_WORKER_FAILURES})
    assert workers.tried["b"] == 1
    assert corpus.ledger.counts()["download"] == {"done": 1, "failed": 1}
    assert corpus.ledger.counts()["caption"] == {"done": 2}


def test_work_lost_with_the_drivers_own_node_is_sent_again_from_another(corpus, monkeypatch):
    report, workers = run(corpus, monkeypatch, lost={"a": MAX_LOST - 1, "b.1": MAX_WORKER_FAILURES})
    assert workers.tried["a"] == 4 and report.num_failed == 0  # once in each stage of videos
    assert all(stage.in_flight == 0 for stage in report.by_stage.values())
    assert {stage: set(by) for stage, by in corpus.ledger.counts().items()} == dict.fromkeys(STAGES, {"done"})


def test_a_cluster_that_loses_every_node_is_not_joined_without_end(corpus, monkeypatch):
    run(corpus, monkeypatch, lost={"a": 10**6})
    assert [row[:3] for row in corpus.ledger.standing_failures()] == [("download", "worker-died", 1)]
    assert corpus.ledger.counts()["caption"] == {"done": 2}
