"""A volume is packed as soon as it is complete, while others are not, and nothing depends on when that was."""

import shutil
import time
from pathlib import Path

import pytest

from pipeline.engine.build import session
from pipeline.engine.delivery import Delivery
from pipeline.stages import pack as pack_stage
from pipeline.stages.pack_notes import Pack
from shards.corpus.packs import volume_of
from shards.packing.index import read_index, read_stamp, write_index
from tests.helpers.builds import PLAIN, ask, build_here, hashes
from tests.helpers.http import http_answer, make_video, scripted_server
from tests.helpers.whole_corpus import VIDEOS, build_whole, pack_here, write_sources

LIMIT_S = 600  # after which what is waited for has failed


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Build a corpus of three volumes: abc, def, gh."""
    folder = tmp_path_factory.mktemp("volumes")
    sources = write_sources(folder / "list.jsonl", VIDEOS)
    build_whole(folder / "corpus", sources, settings=["ingest.volume_units=1"])
    return folder / "corpus"


@pytest.fixture
def corpus(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "corpus"))


def shard_files(corpus: Path) -> dict[str, str]:
    return hashes(corpus / "shards", "*.tar") | hashes(corpus / "shards", "*.parquet")


def deliver(corpus: Path, volumes: list[int], *assignments: str) -> tuple[int, int]:
    """Deliver these volumes; return how many shards were written then, and at the end of the build."""
    with session(corpus, None, [*assignments], "test", create=False) as (current, _):
        current.publish()
        delivery = Delivery(current, Pack("", current.settings.pack), num_at_once=1)
        delivery.offer(volumes)
        while delivery.waiting or delivery.packing:
            delivery.step()
        current.publish()
        return delivery.num_written, pack_here(current).num_written


def test_some_volumes_are_delivered_and_the_end_packs_the_others(corpus, local_ray):
    before = shard_files(corpus)
    for name in before:
        (corpus / "shards" / name).unlink()
    num_shards = {volume: sum(volume_of(name) == volume for name in before) // 2 for volume in range(3)}
    written, at_the_end = deliver(corpus, [0, 2])
    assert written == num_shards[0] + num_shards[2] and at_the_end == num_shards[1]
    assert shard_files(corpus) == before
    assert deliver(corpus, [0, 1, 2]) == (0, 0), "up to date"


def test_a_lost_shard_is_delivered_again_and_new_texts_reach_its_index(corpus, local_ray):
    before = shard_files(corpus)
    (corpus / "shards" / "000001-000000.tar").unlink()
    path = corpus / "shards" / "000001-000001.parquet"
    rows = read_index(path)
    old = rows.set_column(rows.column_names.index("caption"), "caption", [["an older caption"] * rows.num_rows])
    write_index(path, old, read_stamp(path))
    assert deliver(corpus, [1]) == (1, 0)
    assert shard_files(corpus) == before


def test_clips_that_cannot_be_read_end_nothing_and_are_tried_again(corpus, local_ray):
    before = shard_files(corpus)
    [(tar,)] = ask(corpus, "SELECT DISTINCT tar FROM clips WHERE video_id = 'video-d'")
    data = (corpus / tar).read_bytes()
    (corpus / tar).write_bytes(b"\0" * len(data))
    for name in before:
        if volume_of(name) == 1:
            (corpus / "shards" / name).unlink()
    written, again = deliver(corpus, [1])
    assert written == again > 0
    assert ask(corpus, "SELECT count(*) FROM failures WHERE stage = 'pack'") == [(9,)]
    (corpus / tar).write_bytes(data)
    deliver(corpus, [1])
    assert shard_files(corpus) == before


def test_a_shard_appears_while_a_video_of_another_volume_is_awaited(tmp_path, local_ray):
    """Its server answers only when the samples of the first volume can be queried."""
    film = make_video(tmp_path / "film.mp4", duration_s=6.0)
    seen: list[int] = []

    def samples() -> int:
        is_there = (tmp_path / "corpus" / "manifest.duckdb").exists()
        return ask(tmp_path / "corpus", "SELECT count(*) FROM samples")[0][0] if is_there else 0

    def answer(target, headers, send):
        started = time.monotonic()
        while target == "/late.mp4" and not samples() and time.monotonic() - started < LIMIT_S:
            time.sleep(0.2)
        seen.append(samples())
        send(http_answer("200 OK", film if target == "/early.mp4" else film + b"\0\0\0\x08free"))

    with scripted_server(answer) as server:
        urls = [f"http://127.0.0.1:{server.port}/{name}.mp4" for name in ("early", "late")]
        settings = ["ingest.unit_videos=1", "ingest.volume_units=1", "download.allow_private_addresses=true"]
        report = build_here(tmp_path / "corpus", urls, *settings, *PLAIN)
    assert max(seen) > 0, "the first volume was packed before the second was downloaded"
    assert {volume_of(name) for name in shard_files(tmp_path / "corpus")} == {0, 1}
    assert report.pack.num_written == report.pack.num_shards == 2


def test_a_pack_that_needs_the_whole_corpus_waits_for_it(corpus):
    for where in ("NOT is_duplicate", "clip_id IN (SELECT min(clip_id) FROM catalog)", "SELECT clip_id FROM clips"):
        assert not Pack("", pack_stage.PackSettings(where=where)).has_own_volumes
    assert not Pack("", pack_stage.PackSettings(shuffle="corpus")).has_own_volumes
    for where in ("", "motion > 0.1 AND text LIKE '%select%'", "catalog.language = 'en'"):
        assert Pack("", pack_stage.PackSettings(where=where)).has_own_volumes
