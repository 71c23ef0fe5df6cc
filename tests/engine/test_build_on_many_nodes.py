"""A cluster whose different nodes join and leave during a build makes the same corpus as one machine."""

import shutil
import time
from pathlib import Path

import pytest

from bench.chaos import Build, local_cluster
from tests.helpers.builds import PLAIN, SMALL, hashes, tables

pytestmark = pytest.mark.slow

SETTINGS = (*SMALL, *PLAIN, "engine.model_resources={captioner: 1}")


def commits(corpus: Path, stage: str) -> int:
    return len(list((corpus / "fragments" / "ledger").glob(f"{stage}-*.parquet")))


def wait_for(condition, build: Build) -> None:
    while not condition():
        assert build.running(), build.said()
        time.sleep(0.05)


def test_nodes_of_two_kinds_come_and_go(built, world, tmp_path):
    """The model actors wait for a node with their label; the node that cut the clips has left by then."""
    with local_cluster(num_nodes=1) as cluster:
        shutil.copy(world.sources, tmp_path / "sources.jsonl")
        build = Build(tmp_path / "corpus", tmp_path / "sources.jsonl", cluster.address, SETTINGS)
        build.start()
        wait_for(lambda: commits(build.corpus, "cut") >= 1, build)
        assert commits(build.corpus, "caption") == 0
        cluster.add(num_cpus=0, resources={"captioner": 1})
        cluster.remove(cluster.nodes[0])
        assert build.process.wait(1200) == 1, build.said()  # 1: the links that are made to fail
    assert hashes(build.corpus / "shards") == hashes(built[0] / "shards")
    assert tables(build.corpus) == tables(built[0])
