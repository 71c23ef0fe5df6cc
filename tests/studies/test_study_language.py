"""The distance of two sources of texts is 0 if they are indistinguishable and 1 if they are separate."""

from pathlib import Path

import numpy as np
import pytest

from bench.studies.language import SOURCES, STUDY, Size, nmi, probe, texts_of, two_means


def clouds(distance: float, num: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Return features of two sources whose means have the given distance, and their labels."""
    draw = np.random.default_rng(3)
    features = draw.normal(size=(2 * num, 8))
    sources = np.repeat([0, 1], num)
    features[:, 0] += distance * sources
    return features, sources


def test_nmi_of_labels_that_agree_and_of_labels_that_know_nothing() -> None:
    one = np.array([0, 0, 1, 1])
    assert nmi(one, one) == pytest.approx(1) == nmi(one, 1 - one)
    assert nmi(one, np.array([0, 1, 0, 1])) == pytest.approx(0, abs=1e-12)
    assert nmi(one, np.zeros(4, int)) == 0
    # by hand: I = ln 2 - (3/4) ln 3 + (1/4) ln 3 ... of the joint table (2 0; 1 1) / 4
    joint = -(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))
    rows, columns = np.log(2), -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert nmi(one, np.array([0, 0, 0, 1])) == pytest.approx(2 * (rows + columns - joint) / (rows + columns))


def test_one_source_split_in_two_is_near_nothing_and_distant_clouds_are_near_one() -> None:
    near, sources = clouds(0.0)
    assert nmi(two_means(near, seed=0), sources) < 0.1
    far, sources = clouds(30.0)
    assert nmi(two_means(far, seed=0), sources) == pytest.approx(1)
    assert probe(far, sources, seed=0) == 1 and 0.3 < probe(near, sources, seed=0) < 0.7


def test_clusters_are_a_function_of_the_seed_and_survive_equal_rows() -> None:
    features, _ = clouds(2.0)
    assert (two_means(features, seed=5) == two_means(features, seed=5)).all()
    assert len(two_means(np.ones((6, 3)), seed=0)) == 6


@pytest.mark.parametrize("source", SOURCES)
def test_sources_give_texts_of_the_seed(source: str, tmp_path: Path) -> None:
    texts = texts_of(source, [1, 0], Size(num_texts=20), tmp_path)
    assert texts == texts_of(source, [1, 0], Size(num_texts=20), tmp_path)
    assert texts != texts_of(source, [1, 1], Size(num_texts=20), tmp_path) and all(texts)
    if source == "subtitles":
        assert all(text == text.lower() and "." not in text for text in texts)


@pytest.mark.slow
def test_a_small_study_of_language(tmp_path: Path) -> None:
    values = {arm.name: STUDY.run(arm, 0, STUDY.sizes["small"], tmp_path) for arm in STUDY.arms}
    assert all(0 <= value <= 1 for of_arm in values.values() for value in of_arm.values())
    assert values["captions and filler talk"]["nmi"] > values["queries and queries"]["nmi"]
