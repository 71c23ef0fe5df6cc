"""Statistics equal a recount from the shards alone, add up, and fit the terminal."""

import io
import json
import statistics
import tarfile
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shards.query.sql import open_manifest
from shards.query.statistics import HD_VILA_CATEGORIES, _bar, render, report
from tests.helpers.manifests import make_manifest
from tests.helpers.shards import change_manifest, make_corpus, pack


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = make_corpus(tmp_path_factory.mktemp("statistics") / "corpus", 36)
    pack(root)
    return root


@pytest.fixture(scope="module")
def from_shards(corpus):
    """Read every KEY.json in the tars with the standard library only."""
    samples = []
    for path in sorted((corpus / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            samples += [json.load(tar.extractfile(info)) for info in tar if info.name.endswith(".json")]
    return samples


def drawn(root, width):
    console = Console(file=io.StringIO(), width=width)
    with open_manifest(root) as connection:
        render(report(connection), console)
    return console.file.getvalue()


def stats_of(root):
    with open_manifest(root) as connection:
        return report(connection)


def test_totals_are_those_of_the_shards(corpus, from_shards):
    totals = stats_of(corpus).totals
    durations = [sample["duration_s"] for sample in from_shards]
    spoken = [sample["num_words"] for sample in from_shards if sample["num_sentences"]]
    assert totals["num_clips"] == totals["num_samples"] == len(from_shards) == 36
    assert totals["num_videos"] == len({sample["video_id"] for sample in from_shards})
    assert totals["num_sentences"] == sum(sample["num_sentences"] for sample in from_shards)
    assert totals["clip_hours"] == pytest.approx(sum(durations) / 3600)
    assert totals["mean_clip_s"] == pytest.approx(statistics.fmean(durations))
    assert totals["words_per_sentence"] == pytest.approx(statistics.fmean(spoken))
    assert totals["num_shards"] == len(list((corpus / "shards").glob("*.tar")))
    tar_bytes = sum(path.stat().st_size for path in (corpus / "shards").glob("*.tar"))
    assert 0.3 * tar_bytes < totals["sample_bytes"] < tar_bytes


def test_shares_and_histograms_are_those_of_the_shards(corpus, from_shards):
    stats = stats_of(corpus)
    by_category = Counter(sample.get("category") for sample in from_shards)
    assert {row["category"]: row["num_clips"] for row in stats.categories} == by_category
    assert sum(row["clip_share"] for row in stats.categories) == pytest.approx(1)
    by_length = Counter(int(sample["duration_s"] // 2) * 2 for sample in from_shards)
    assert {row["from_s"]: row["num_clips"] for row in stats.clip_lengths} == by_length
    by_language = Counter(sample["language"] for sample in from_shards)
    assert {row["language"]: row["num_clips"] for row in stats.languages} == by_language
    durations = sorted(sample["duration_s"] for sample in from_shards)
    assert stats.percentiles["clip seconds"][2] == durations[17]


def test_the_funnel_counts_each_step(corpus):
    funnel = {row["step"]: row for row in stats_of(corpus).funnel}
    assert list(funnel) == ["source", "video", "span", "clip", "caption", "sample"]
    assert funnel["clip"]["num_items"] == 36 and funnel["sample"]["num_items"] == 36
    assert funnel["sample"]["kept"] == 1
    assert funnel["caption"]["kept"] == pytest.approx(funnel["caption"]["num_items"] / 36)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_report_fits_its_terminal_and_says_what_matters(corpus, width):
    text = drawn(corpus, width)
    assert max(map(len, text.splitlines())) <= width
    for expected in ("HD-VILA-100M", "mean clip length, s", "371,500", "32.5", "Yield", "█", "p95", "Failures"):
        assert expected in text
    assert "…" not in text


def test_an_empty_corpus_and_one_with_lying_lengths_are_drawn_too(tmp_path):
    make_manifest(tmp_path / "manifest.duckdb", 0)
    text = drawn(tmp_path, 80)
    assert "No clips yet" in text and "–" in text
    make_manifest(tmp_path / "manifest.duckdb", 3000)
    change_manifest(tmp_path, "UPDATE clips SET duration_s = duration_s * 1e6 WHERE n = 3")
    text = drawn(tmp_path, 80)
    assert "≥ 42 s" in text and max(map(len, text.splitlines())) <= 80


def test_names_from_videos_cannot_steer_the_terminal(tmp_path):
    make_manifest(tmp_path / "manifest.duckdb", 60)
    change_manifest(tmp_path, "UPDATE videos SET category = chr(27) || '[2J[red]' || repeat('long ', 50)")
    text = drawn(tmp_path, 80)
    assert "\x1b" not in text and "\\x1b[2J[red]" in text


def test_published_shares_are_those_of_fifteen_categories():
    assert len(HD_VILA_CATEGORIES) == 15
    videos, clips = (sum(shares) for shares in zip(*HD_VILA_CATEGORIES.values(), strict=True))
    assert (round(videos, 1), round(clips, 1)) == (100.2, 99.8)


@given(st.floats(0, 1), st.integers(1, 200))
def test_a_bar_is_as_long_as_its_share(share, width):
    bar = _bar(share, width)
    assert len(bar) <= width
    assert bool(bar) == (share > 0)
    assert abs(len(bar) - share * width) <= 1
