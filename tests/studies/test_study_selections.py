"""The selections study: each arm excludes the right clips, is drawn by its seed, and is described correctly."""

from pathlib import Path

import pytest

from bench.studies.selections import POOLS, drawn, facts
from shards.query.sql import open_manifest
from tests.helpers.loaders import select
from tests.helpers.shards import make_corpus, pack

NUM_CLIPS, HALF = 60, 0.5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_corpus(tmp_path_factory.mktemp("corpus"), NUM_CLIPS)
    pack(root)
    return root


def ids(corpus: Path, sql: str) -> list[str]:
    with open_manifest(corpus) as connection:
        return [clip_id for (clip_id,) in connection.execute(sql).fetchall()]


@pytest.mark.parametrize("name", POOLS)
def test_a_selection_is_the_trainers_and_a_function_of_the_seed(corpus: Path, name: str) -> None:
    pool = POOLS[name].format(half=HALF)
    chosen = ids(corpus, drawn(pool, 8, seed=0))
    assert len(chosen) == 8 == len(set(chosen)) and set(chosen) <= set(ids(corpus, pool))
    assert chosen == ids(corpus, drawn(pool, 8, seed=0)) and set(chosen) != set(ids(corpus, drawn(pool, 8, seed=1)))
    assert set(select(corpus, drawn(pool, 8, seed=0))["clip_id"].to_pylist()) == set(chosen)


def test_pools_leave_what_they_say(corpus: Path) -> None:
    pools = {name: set(ids(corpus, sql.format(half=HALF))) for name, sql in POOLS.items()}
    assert all(pool <= pools["all"] for pool in pools.values())
    halves = [
        len(pools[name]) / len(pools["all"]) for name in ("subtitles like captions", "captions like their frames")
    ]
    assert halves == pytest.approx([HALF, HALF], abs=0.06)
    with open_manifest(corpus) as connection:
        rows = connection.execute("SELECT clip_id, text_similarity, duplicate_group FROM catalog").fetchall()
    similarity, group = ({row[0]: row[n] for row in rows} for n in (1, 2))
    worst = min(similarity[clip_id] for clip_id in pools["subtitles like captions"])
    assert all(similarity[clip_id] <= worst for clip_id in pools["all"] - pools["subtitles like captions"])
    groups = [group[clip_id] for clip_id in pools["no duplicates"] if group[clip_id]]
    assert len(groups) == len(set(groups)) and len(pools["no duplicates"]) < len(pools["all"])


def test_what_an_arms_clips_are_is_counted(corpus: Path) -> None:
    whole = facts(corpus, POOLS["all"])
    assert whole["filler"] == 0 and 0 < whole["distinct"] < 1
    assert facts(corpus, POOLS["no duplicates"])["distinct"] == 1
