"""A volume that is done is merged into one file per table: same rows, same bytes however it came about, killed anywhere."""

import shutil
from pathlib import Path

import pytest

from clipmill.base.errors import ItemError
from shards.corpus.fragments import fragment_path
from shards.corpus.merged import merge, merged_volumes, read_head
from tests.helpers.ledgers import FragmentCorpus
from tests.storage.test_volumes_are_one_corpus import rows


def make(root: Path, num_volumes: int = 2) -> FragmentCorpus:
    """Make a corpus with several units and commits in each volume, and nothing to do."""
    corpus = FragmentCorpus(root)
    for unit in range(2 * num_volumes):
        corpus.add_sources(*(f"v{unit}_{n}" for n in range(3)), unit=f"u{unit:06d}", volume=unit // 2)
    corpus.fail["cut:v1_1"] = ItemError("made-up", "it fails", transient=False)
    corpus.work_off()
    return corpus


def merge_all(corpus: FragmentCorpus) -> None:
    corpus.refresh_state()
    corpus.ledger.merge_finished(1)


def merged_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("fragments/*/merged-*.parquet"))}


def loose(root: Path) -> list[str]:
    """Return the names of the fragments that are not lists."""
    names = {path.stem for path in root.glob("fragments/*/*.parquet")}
    return sorted(name for name in names if not name.startswith(("ingest-", "merged-")))


def lose_cache(corpus: FragmentCorpus) -> None:
    corpus.ledger.close()
    shutil.rmtree(corpus.root / ".clipmill")
    corpus.open()


def test_a_merged_corpus_has_the_same_rows_and_few_files(tmp_path):
    corpus = make(tmp_path)
    expected, commits = rows(corpus), set(loose(tmp_path))
    merge_all(corpus)
    assert loose(tmp_path) == [] and merged_volumes(tmp_path) == [0, 1]
    assert {name for volume in (0, 1) for name in read_head(tmp_path, volume).commits} == commits
    tables = {path.parent.name for path in tmp_path.glob("fragments/*/*-000000*.parquet")}
    assert len(merged_files(tmp_path)) == 2 * len(tables - {"sources"})
    assert rows(corpus) == expected
    corpus.reopen()
    assert corpus.synchronised == (0, 0) and rows(corpus) == expected
    lose_cache(corpus)
    assert corpus.synchronised == (len(commits) + 4, 0)
    assert rows(corpus) == expected and corpus.work_off() == {}
    corpus.ledger.close()
