"""Downloads hold nothing up: places are per source, waiting takes none, and what is finished goes on.

The engine runs with functions as workers, without Ray or media; `test_build_from_urls.py` has real ones.
"""

import time
from collections import Counter
from collections.abc import Callable

import pytest

from pipeline.engine import driver as engines
from pipeline.engine.build import build
from pipeline.engine.driver import Engine
from pipeline.engine.host_queue import HostQueue
from pipeline.engine.pools import InFlightTask
from pipeline.engine.settings import CorpusSettings
from pipeline.runtime.task import NotNow, Task, commit
from pipeline.stages.download.host_limiter import LOCKED_OUT, HostRateLimiter
from pipeline.stages.download.stage import DOWNLOAD
from shards.corpus.folder import Corpus
from tests.helpers.http import http_answer, make_video, scripted_server
from tests.helpers.ledgers import STAGES, FragmentCorpus


class Workers:
    """Run tasks at once, in no other process, but the downloads of `slow` only when nothing else is left to do.

    turn      returns the answer to a request for the turn of a host
    postpone  number of times that a download gives its place back
    """

    active_units = 2
    cut_off = False

    def __init__(self, corpus: FragmentCorpus, num_places: int):
        self.corpus, self.num_places = corpus, num_places
        self.slow: set[str] = set()
        self.turn: Callable[[str], float] = lambda host: 0.0
        self.postpone: Counter[str] = Counter()
        self.running: dict[object, InFlightTask] = {}
        self.downloading: list[list[str]] = []  # at every start of a download, all that run
        self.so_far: list[dict] = []  # of the postponed downloads, as they came back
        self.num_done: Counter[str] = Counter()  # items by stage
        self.when_only_slow_ones_run: list[Counter[str]] = []  # the same

    def warm_up(self, models: list) -> None: ...

    def close(self) -> None: ...

    @property
    def num_free_sources(self) -> int:
        return self.num_places - len(self.sources())

    def sources(self) -> list[str]:
        return [f.task.items[0]["item_id"] for f in self.running.values() if f.host is not None]

    def turns(self, flights: list) -> list[float]:
        return [self.turn(flight.host) for flight in flights]

    def has_room(self, pool: str) -> bool:
        return True

    def start(self, flight):
        self.running[id(flight)] = flight
        if flight.host is not None:
            self.downloading.append(self.sources())
        return id(flight)

    def wait(self, references: list) -> list:
        ready = [r for r in references if not self.is_slow(self.running[r])]
        if not ready and references:
            self.when_only_slow_ones_run.append(self.num_done.copy())
            return references
        return ready

    def is_slow(self, flight) -> bool:
        return flight.host is not None and flight.task.items[0]["item_id"] in self.slow

    def result(self, reference, flight):
        del self.running[reference]
        (first, *_), task = flight.task.items, flight.task
        if self.postpone[first["item_id"]] > 0:
            self.postpone[first["item_id"]] -= 1
            self.so_far.append(first.get("so_far"))
            return NotNow(0.001, {"used_s": self.postpone[first["item_id"]]})
        self.num_done[task.stage] += len(task.items)
        return commit(task, [self.corpus._outcome(task.stage, item) for item in task.items], [])


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    corpus = FragmentCorpus(tmp_path)
    monkeypatch.setattr(engines, "fingerprints", lambda settings: corpus.fingerprints)
    monkeypatch.setattr(engines, "UNIT_WAITS_S", 0.0)
    monkeypatch.setattr(engines, "PATIENCE", (0, 0))
    return corpus


def run(corpus: FragmentCorpus, workers: Workers, monkeypatch, stages=("download",)) -> Engine:
    monkeypatch.setattr(engines, "Pools", lambda settings: workers)
    engine = Engine(Corpus(corpus.root), CorpusSettings(), corpus.ledger, "run", stages)
    engine.refresh_state()
    engine.run(lambda engine: None)
    engine.refresh_state()
    assert len(engine.waiting) == 0 and engine.downloads == engine.downloaded_at == {} and not workers.running
    assert all(stage.in_flight == 0 for stage in engine.report.by_stage.values())
    return engine


def test_slow_downloads_hold_up_no_other_video_of_their_unit(corpus, monkeypatch):
    videos = [f"v{n:02}" for n in range(32)]
    corpus.add_sources(*videos)
    workers = Workers(corpus, num_places=32)
    workers.slow = set(videos[:4])
    run(corpus, workers, monkeypatch, STAGES)
    clips = {"caption": 2 * 28, "score": 2 * 28}
    assert workers.when_only_slow_ones_run[0] == {stage: clips.get(stage, 28) for stage in STAGES}
    assert workers.num_done["cut"] == 32


def test_places_are_per_source(corpus, monkeypatch):
    """Slow downloads of as many units as may be looked at leave the other places to further units."""
    for unit in range(4):
        corpus.add_sources(*(f"u{unit}v{n}" for n in range(3)), unit=f"u{unit}")
    workers = Workers(corpus, num_places=5)
    workers.slow = {f"u{unit}v0" for unit in range(4)}
    run(corpus, workers, monkeypatch)
    assert max(map(len, workers.downloading)) == 5
    assert workers.when_only_slow_ones_run[0]["download"] == 8 and workers.num_done["download"] == 12


def test_waiting_for_a_locked_host_takes_no_place(corpus, monkeypatch):
    corpus.add_sources(*(f"a{n}" for n in range(6)), unit="u0", host="locked.example")
    for unit in range(1, 4):
        corpus.add_sources(*(f"b{unit}{n}" for n in range(2)), unit=f"u{unit}", host="open.example")
    workers = Workers(corpus, num_places=2)
    workers.turn = lambda host: 0.001 if host == "locked.example" and workers.num_done["download"] < 6 else 0.0
    run(corpus, workers, monkeypatch)
    order = [running[-1][0] for running in workers.downloading]
    assert order == ["b"] * 6 + ["a"] * 6
    assert max(map(len, workers.downloading)) == 2


def test_a_download_that_gives_its_place_back_comes_again_with_its_counts(corpus, monkeypatch):
    corpus.add_sources("a", "b", "c")
    workers = Workers(corpus, num_places=1)
    workers.postpone["a"] = 2
    engine = run(corpus, workers, monkeypatch)
    assert workers.so_far == [None, {"used_s": 1}]
    assert [running[0] for running in workers.downloading][:2] == ["a", "b"]
    assert workers.num_done["download"] == 3 and engine.report.num_failed == 0


def test_sources_of_a_host_that_stays_locked_fail_without_a_place(corpus, monkeypatch):
    corpus.add_sources("a", "b", host="locked.example")
    corpus.add_sources("c", unit="u1")
    workers = Workers(corpus, num_places=1)
    answers = iter([0.001, LOCKED_OUT, LOCKED_OUT])
    workers.turn = lambda host: next(answers) if host == "locked.example" else 0.0
    run(corpus, workers, monkeypatch)
    assert [row[:3] for row in corpus.ledger.standing_failures()] == [("download", "rate-limited", 2)]
    assert workers.downloading == [["c"]] and workers.num_done["download"] == 1


def test_finished_downloads_of_a_unit_go_on_together(corpus, monkeypatch):
    """Without a slow one among them, a unit is one task in the next stage, as it is for local files."""
    monkeypatch.setattr(engines, "UNIT_WAITS_S", float("inf"))
    corpus.add_sources("a", "b", "c")
    workers, tasks = Workers(corpus, num_places=3), []
    original = workers.start
    workers.start = lambda flight: tasks.append((flight.stage.name, len(flight.task.items))) or original(flight)
    run(corpus, workers, monkeypatch, STAGES)
    assert tasks == [("download", 1)] * 3 + [
        ("transcribe", 3),
        ("segment", 3),
        ("cut", 3),
        ("caption", 6),
        ("score", 6),
    ]


# --- the queue


def flight(host: str, name: str) -> InFlightTask:
    item = {"item_id": name, "key": "k", "cost": 1.0, "kind": "url", "url": f"http://{host}/{name}"}
    return InFlightTask(DOWNLOAD, Task("download", "u", [item], None, "f", "/", "run"), host=host)


def names(flights: list[InFlightTask]) -> list[str]:
    return [flight.task.items[0]["item_id"] for flight in flights]


def test_of_each_host_the_first_is_asked_for_until_it_must_wait():
    now = [0.0]
    queue = HostQueue(lambda: now[0])
    flights = [flight(host, f"{host}{n}") for n in range(2) for host in "abc"]
    for each in flights:
        queue.add(each)
    assert names(queue.due(9)) == ["a0", "b0", "c0"] and len(queue) == 6
    queue.wait(flights[0], 10.0)
    queue.remove(flights[1])
    assert names(queue.due(9)) == ["b1", "c0"] and len(queue) == 5
    for each in queue.due(9):
        queue.wait(each, 3.0)
    assert queue.due(9) == [] and queue.next_in_s() == 3.0
    now[0] = 3.0
    assert names(queue.due(9)) == ["b1", "c0"] and queue.next_in_s() == 0.0
    queue.ask_now("a")
    assert set(names(queue.due(9))) == {"a0", "b1", "c0"}


def test_no_host_is_asked_less_often_because_there_are_many():
    queue = HostQueue(lambda: 0.0)
    for host in "abcd":
        queue.add(flight(host, f"{host}0"))
    assert [names(queue.due(2)) for _ in range(3)] == [["a0", "b0"], ["c0", "d0"], ["a0", "b0"]]
    assert queue.due(0) == []


def test_a_task_with_a_wait_of_its_own_leaves_its_host_to_others():
    now = [0.0]
    queue = HostQueue(lambda: now[0])
    queue.add(flight("a", "a0"), 5.0)
    assert queue.due(9) == [] and queue.next_in_s() == 5.0 and len(queue) == 1
    queue.add(flight("a", "a1"))
    assert names(queue.due(9)) == ["a1"]
    now[0] = 5.0
    assert names(queue.due(9)) == ["a1"]
    queue.remove(queue.due(9)[0])
    assert names(queue.due(9)) == ["a0"]


def test_several_turns_are_asked_for_at_once():
    limiter = HostRateLimiter(per_host=1)
    assert limiter.acquire_all([("a", "x"), ("a", "y"), ("b", "z")]) == [0.0, limiter.poll_s, 0.0]


# --- on a real local Ray


def test_a_real_build_commits_what_is_downloaded_while_the_rest_is_awaited(tmp_path, local_ray):
    """Two answers are withheld until all others are committed; one host is locked for longer than a source waits."""
    video, meanwhile = make_video(tmp_path / "v.mp4", duration_s=0.5), []
    locked = iter([http_answer("429 Too Many Requests", Retry_After=6)])
    fragments = tmp_path / "corpus" / "fragments" / "downloads"

    def num_committed() -> int:
        return len(list(fragments.glob("[!.]*.parquet")))

    def answer(target, headers, send):
        ends_at = time.monotonic() + 300
        while "slow" in target and num_committed() < 4 and time.monotonic() < ends_at:
            time.sleep(0.05)  # asked for by nobody but this test
        if "slow" in target:
            meanwhile.append(num_committed())
        refusal = next(locked, None) if headers["host"].startswith("localhost") else None
        send(refusal or http_answer("200 OK", video + target.encode()))

    with scripted_server(answer) as server:
        urls = [server.url(f"/{name}.mp4") for name in ("slow1", "slow2", "a", "b", "c")]
        urls.append(server.url("/locked.mp4").replace("127.0.0.1", "localhost"))
        listed = tmp_path / "list.txt"
        listed.write_text("\n".join(urls) + "\n")
        limits = ["download.per_host=8", "download.stall_timeout_s=600", "download.answer_timeout_s=600"]
        limits += ["download.probe_timeout_s=600", "download.allow_private_addresses=true"]
        stages = ("ingest", "download")
        report = build(
            tmp_path / "corpus", [str(listed)], stages=stages, recipe="demo", assignments=limits, command="t"
        )
    assert report.engine.by_stage["download"].done == 6 == num_committed()
    assert min(meanwhile) == 4, "the others waited for the slow ones"
    assert [target for target, _ in server.requests].count("/locked.mp4") == 2
