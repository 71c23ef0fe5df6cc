"""Freezing a selection keeps to its memory limit: tables beyond it go to disk, and the file has the same bytes."""

import duckdb
import pytest

from clipmill.base.errors import UserError
from tests.helpers.manifests import make_manifest
from training.data.clip_query import SPILL, open_samples
from training.data.selection import freeze_run
from training.settings import DataSettings, EvalSettings

NUM_CLIPS = 60_000  # whose subtitles with two neighbours on either side exceed SMALL
SMALL = "100MB"
HELD_OUT = EvalSettings(where="n = 3 AND num_words > 20", overlap="exclude")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    make_manifest(folder / "manifest.duckdb", NUM_CLIPS)
    return folder


def _freeze(folder, corpus, memory: str) -> list[bytes]:
    freeze_run(folder, corpus, DataSettings(neighbours=2, select_memory=memory), HELD_OUT)
    return [(folder / name).read_bytes() for name in ("selection.arrow", "eval.arrow")]


def test_a_small_limit_spills_and_gives_the_same_bytes(corpus, tmp_path):
    left = tmp_path / "small" / f"{SPILL}of-a-killed-process"
    left.mkdir(parents=True)
    assert _freeze(tmp_path / "small", corpus, SMALL) == _freeze(tmp_path / "large", corpus, "4GB")
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["eval.arrow", "selection.arrow"]


def test_the_limit_reaches_duckdb_and_what_exceeds_it_the_disk(corpus, tmp_path):
    with open_samples(corpus, num_neighbours=2, memory=SMALL, spill_in=tmp_path) as samples:
        assert samples.row("SELECT current_setting('memory_limit')") == ("95.3 MiB",)
        [spill] = tmp_path.iterdir()
        assert spill.stat().st_mode & 0o077 == 0, "other users can read the clips' texts"
        samples.connection.execute("CREATE TEMP TABLE large AS SELECT s.* FROM samples s, range(4)")
        assert sum(file.stat().st_size for file in spill.iterdir()) > 10_000_000
        (corpus / "other.txt").write_text("secret")
        for path in (corpus / "other.txt", f"{spill}/../{corpus.name}/other.txt"):
            with pytest.raises(duckdb.PermissionException):
                samples.row(f"SELECT content FROM read_text('{path}')")
    assert not list(tmp_path.iterdir())


def test_a_limit_that_is_too_small_names_the_setting(corpus, tmp_path):
    with pytest.raises(UserError, match="data.select_memory = 5MB is too little"):
        _freeze(tmp_path, corpus, "5MB")
    assert not list(tmp_path.iterdir())
